"""What a cell measures: tasks of lm-eval, written texts, each test by metrics it can have."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from gradsieve.compare import training
from gradsieve.compare.config import TaskSettings, parse_config
from gradsieve.compare.material import metrics_of
from gradsieve.compare.run import Comparison
from gradsieve.compare.training import Job, work
from gradsieve.compare.units import directed, lower_is_better
from gradsieve.errors import InvalidArgument

TASK = """task: colours
dataset_path: json
dataset_kwargs:
  data_files: {{test: {folder}/colours.jsonl}}
  cache_dir: {folder}/cache
test_split: test
doc_to_text: "{{{{question}}}} Answer:"
output_type: multiple_choice
doc_to_choice: options
doc_to_target: gold
metric_list:
  - {{metric: acc, aggregation: mean, higher_is_better: true}}
  - {{metric: acc_norm, aggregation: mean, higher_is_better: false}}
metadata: {{version: 1.0}}
"""


def test_tasks_and_written_texts_are_measured_like_tests(content: dict[str, Any], tmp_path: Path) -> None:
    rows = [{"question": f"What is {i}?", "options": ["red", "blue"], "gold": i % 2} for i in range(6)]
    (tmp_path / "colours.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "colours.yaml").write_text(TASK.format(folder=tmp_path))
    content["tests"]["asked"] |= {"metrics": ["loss", "stopped"], "limit": 3}
    content |= {"arms": {"random": None}, "seeds": [0], "max_new_tokens": 5}
    content["tasks"] = {"colours": {"include_path": str(tmp_path), "limit": 4}}
    comparison = Comparison.of(parse_config(content, "x.yaml"))
    one = comparison.run()[-1]
    measured = one.measurements()
    assert measured.items["colours"] == ["0", "1", "2", "3"]
    assert set(measured.values["colours"]) == {"acc", "acc_norm (lower is better)"}
    assert set(measured.values["colours"]["acc"]) <= {0.0, 1.0}
    assert len(measured.values["asked"]["stopped"]) == 3
    assert one.record["inputs"]["tasks"]["colours"]["limit"] == 4
    assert one.generations()[0]["item"] == measured.items["asked"][0]
    assert "colours" in (comparison.study / "summary.md").read_text()


@pytest.mark.parametrize(
    ("metric", "declared", "name", "lower"),
    [
        ("acc", True, "acc", False),
        ("acc", None, "acc", False),
        ("error", False, "error (lower is better)", True),
        ("error", None, "error", False),
        ("nll,strict", False, "nll,strict", True),
        ("loss", True, "loss (higher is better)", False),
        ("loglikelihood", True, "loglikelihood", False),
    ],
)
def test_what_a_task_says_is_better_of_its_metrics_counts(metric: str, declared: bool | None, name: str, lower: bool) -> None:
    assert directed(metric, declared) == name
    assert lower_is_better(name) == lower


def test_documents_of_local_tasks_are_searched_for_leaks_and_others_noted(content: dict[str, Any], tmp_path: Path) -> None:
    asked = "Which colour did the painter choose for the door of the house by the river?"
    rows = [{"question": asked if i else "And now?", "options": ["red", "blue"], "gold": i % 2} for i in range(3)]
    (tmp_path / "colours.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "colours.yaml").write_text(TASK.format(folder=tmp_path))
    content["tasks"] = {"colours": {"include_path": str(tmp_path), "limit": 2}, "arc_easy": {"limit": 2}}
    pool = Path(content["pool"])
    stolen = {"id": "stolen", "prompt": asked, "completion": "Blue."}
    pool.write_text(pool.read_text() + json.dumps(stolen) + "\n")
    config = parse_config(content, "x.yaml")
    with pytest.raises(InvalidArgument, match=r"pool .*:25 \(stolen\): \d+% like task colours document 1 \(1\)"):
        Comparison.of(config)
    material = Comparison.of(config, drop_leaks=True).material
    assert [(leak.id, leak.other_side) for leak in material.leaks()] == [("stolen", "task colours")]
    note = "the documents of the task arc_easy were not checked for leaks: not of a local YAML file"
    assert [one for one in material.notes if "were not checked" in one] == [note]


def test_wrong_options_and_a_tasks_data_decide_a_cells_numbers(content: dict[str, Any], tmp_path: Path) -> None:
    picks, task = tmp_path / "picks.jsonl", tmp_path / "colours.jsonl"

    def write(wrong: str = "a shoe", answer: int = 0, gold: int = 0) -> None:
        rows = [
            {"prompt": f"What is best for {i}?", "choices": ["a hat", wrong], "answer": answer, "completion": "a hat"}
            for i in range(3)
        ]
        picks.write_text("".join(json.dumps(row) + "\n" for row in rows))
        asked = [{"question": f"What is {i}?", "options": ["red", "blue"], "gold": gold} for i in range(3)]
        task.write_text("".join(json.dumps(row) + "\n" for row in asked))

    (tmp_path / "colours.yaml").write_text(TASK.format(folder=tmp_path))
    content["tests"]["picks"] = {"role": "general", "files": str(picks)}
    content["tasks"] = {"colours": {"include_path": str(tmp_path)}}
    config = parse_config(content | {"arms": {"random": None}, "seeds": [0], "metrics": ["loss", "choice"]}, "x.yaml")
    write()
    Comparison.of(config).run(only=["base"])
    write()
    assert len(Comparison.of(config).run(only=["base"])) == 1
    for changes, named in (({"wrong": "a boot"}, "tests.picks.options"), ({"gold": 1}, "tasks.colours.data")):
        write(**changes)  # type: ignore[arg-type]
        with pytest.raises(InvalidArgument, match=f"base must be of the comparison that is asked for.*{named}"):
            Comparison.of(config).run(only=["base"])


def test_a_task_in_the_chat_format_is_asked_in_the_template_of_the_comparison(
    content: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "own.jinja").write_text("{% for m in messages %}<{{ m['content'] }}>{% endfor %}")
    (tmp_path / "colours.jsonl").write_text("{}\n")
    (tmp_path / "colours.yaml").write_text(TASK.format(folder=tmp_path))
    seen: list[str] = []

    def stop(model: Any, tokenizer: Any, *_: Any, **__: Any) -> None:
        seen.append(tokenizer.apply_chat_template([{"role": "user", "content": "why"}], tokenize=False))
        raise KeyboardInterrupt

    monkeypatch.setattr(training, "harness", stop)
    content |= {"chat_template": str(tmp_path / "own.jinja")}
    material = Comparison.of(parse_config(content, "x.yaml")).material
    config = dataclasses.replace(material.config, tasks={"colours": TaskSettings(chat=True)})
    with pytest.raises(KeyboardInterrupt):
        training.run_task(None, "colours", dataclasses.replace(material, config=config), None)
    assert seen == ["<why>"]
    assert "<" not in str(material.source.tokenizer.chat_template)[:1]


def test_a_metric_that_a_test_cannot_have_is_refused_where_it_asks_for_it_and_left_out_else(content: dict[str, Any]) -> None:
    content["tests"]["asked"] |= {"metrics": ["loss", "bleu"]}
    with pytest.raises(InvalidArgument, match=r"tests\.asked\.metrics must be of sets of kind worked, got bleu; remove"):
        Comparison.of(parse_config(content, "x.yaml"))
    del content["tests"]["asked"]["metrics"]
    del content["metrics"]
    material = Comparison.of(parse_config(content, "x.yaml")).material
    assert [metrics_of(material.config, test) for test in material.tests] == [
        ("loss", "key_loss", "key_accuracy"),
        ("loss", "key_loss", "key_accuracy", "kl"),
    ]


def test_meteor_without_synonyms_is_kept_under_its_own_name(
    content: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import nltk

    monkeypatch.setattr(nltk.data, "path", [])
    path = tmp_path / "said.jsonl"
    rows = [{"prompt": f"Where from, {i}?", "completion": "From the steppe."} for i in range(2)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    content |= {"tests": {"said": {"role": "target", "files": str(path)}}, "metrics": ["rougeL", "meteor", "loss"]}
    material = Comparison.of(parse_config(content, "x.yaml")).material
    model = material.source.load(material.dtype, material.device)
    outcome, _ = work(model, None, material, Job(None), tmp_path / "cell")
    assert list(outcome.values["said"]) == ["rougeL", "meteor_nosyn", "loss"]
