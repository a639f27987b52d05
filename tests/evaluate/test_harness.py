from __future__ import annotations

import importlib
import importlib.util
import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from gradsieve.errors import DataError, InvalidArgument, MissingExtra
from gradsieve.evaluate import harness, task_digest, task_documents

module: Any = importlib.import_module("gradsieve.evaluate.harness")
OPTIONS = ("red", "blue", "a dark green")
TASK = """task: {name}
dataset_path: json
dataset_kwargs:
  data_files: {{test: {data}}}
  cache_dir: {cache}
test_split: test
doc_to_text: "{{{{question}}}} Answer:"
metadata: {{version: 1.0}}
"""
CHOICE = """output_type: multiple_choice
doc_to_choice: options
doc_to_target: gold
metric_list:
  - {metric: acc, aggregation: mean, higher_is_better: true}
  - {metric: acc_norm, aggregation: mean, higher_is_better: true}
"""
WRITE = """output_type: generate_until
doc_to_target: word
generation_kwargs: {until: ["\\n"], max_gen_toks: 4, do_sample: false}
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]
"""


LIKELY = """output_type: loglikelihood
doc_to_target: " {{word}}"
metric_list:
  - {metric: perplexity, aggregation: perplexity, higher_is_better: false}
  - {metric: acc, aggregation: mean, higher_is_better: false}
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with two tasks and their data."""
    rows = [{"question": f"What is {i}?", "options": OPTIONS, "gold": i % 3, "word": "x"} for i in range(6)]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name, rest in (("colours", CHOICE), ("words", WRITE), ("likely", LIKELY)):
        text = TASK.format(name=name, data=tmp_path / "data.jsonl", cache=tmp_path / "cache") + rest
        (tmp_path / f"{name}.yaml").write_text(text)
    return tmp_path


def log_likelihood(model: Any, tokenizer: Any, context: str, option: str) -> float:
    ids = tokenizer(context + option, add_special_tokens=False)["input_ids"]
    count = len(tokenizer(option, add_special_tokens=False)["input_ids"])
    with torch.no_grad():
        log_p = torch.log_softmax(model(input_ids=torch.tensor([ids])).logits[0].double(), -1)
    return sum(float(log_p[t - 1, ids[t]]) for t in range(len(ids) - count, len(ids)))


def test_a_local_task_on_an_adapted_model_is_solved_by_hand(folder: Path, tiny: Any, adapted: Any, tokenizer: Any) -> None:
    model = adapted(tiny())
    found = harness(model, tokenizer, ["colours"], include_path=folder)["colours"]
    acc, acc_norm = [], []
    for i in range(6):
        scores = [log_likelihood(model, tokenizer, f"What is {i}? Answer:", f" {option}") for option in OPTIONS]
        acc.append(float(np.argmax(scores) == i % 3))
        acc_norm.append(float(np.argmax([s / len(o) for s, o in zip(scores, OPTIONS, strict=True)]) == i % 3))
    assert found.items["acc"].tolist() == acc
    assert found.items["acc_norm"].tolist() == acc_norm
    assert found.scores["acc,none"] == pytest.approx(np.mean(acc))
    assert (found.version, found.fewshot) == ("1.0", 0)


def test_a_generating_task_is_held_to_its_text(folder: Path, tiny: Any, tokenizer: Any) -> None:
    model = tiny()
    with torch.no_grad():  # says "x" and nothing else
        model.lm_head.weight.zero_()
        bias = torch.zeros(259)
        bias[tokenizer.convert_tokens_to_ids("x")] = 5.0
        model.lm_head.bias = torch.nn.Parameter(bias)
    data = folder / "data.jsonl"
    data.write_text(data.read_text().replace('"word": "x"', '"word": "xxxx"', 2))
    found = harness(model, tokenizer, ["words"], include_path=folder, limit=4)["words"]
    assert found.items["exact_match"].tolist() == [1.0, 1.0, 0.0, 0.0]
    assert found.documents == 6


def test_perplexity_of_a_document_is_called_what_it_is_and_every_metric_has_its_direction(
    folder: Path, tiny: Any, tokenizer: Any
) -> None:
    model = tiny()
    found = harness(model, tokenizer, ["likely"], include_path=folder, limit=2)["likely"]
    assert set(found.items) == {"loglikelihood", "acc"}
    by_hand = [log_likelihood(model, tokenizer, f"What is {i}? Answer:", " x") for i in range(2)]
    assert found.items["loglikelihood"].tolist() == pytest.approx(by_hand, rel=1e-4)
    assert found.scores["perplexity,none"] == pytest.approx(np.exp(-np.mean(by_hand)), rel=1e-4)
    assert found.higher_is_better == {"loglikelihood": True, "acc": False}


def test_a_document_without_a_number_keeps_its_place(folder: Path, tiny: Any, tokenizer: Any) -> None:
    (folder / "utils.py").write_text(
        "def score(doc, results):\n"
        "    number = int(doc['question'][8])\n"
        "    return {'some': number if number % 2 else float('nan'), 'none': float('nan'), 'word': 'x' if number else 1.0}\n"
    )
    path = folder / "words.yaml"
    metrics = "".join(f"  - {{metric: {name}, aggregation: bypass}}\n" for name in ("some", "none", "word"))
    text = path.read_text().partition("metric_list")[0]
    path.write_text(f"{text}process_results: !function utils.score\nmetric_list:\n{metrics}")
    found = harness(tiny(), tokenizer, ["words"], include_path=folder, limit=4)["words"].items
    nan = float("nan")
    assert {*found} == {"some", "none"}
    assert found["some"].tolist() == pytest.approx([nan, 1.0, nan, 3.0], nan_ok=True)
    assert found["none"].isnan().all()


def test_the_documents_of_a_task_are_prompts_and_right_answers(folder: Path) -> None:
    asked = [f"What is {i}? Answer:" for i in range(6)]
    assert task_documents("colours", include_path=folder) == list(zip(asked, OPTIONS * 2, strict=True))
    assert task_documents("words", include_path=folder, limit=2) == [(asked[0], "x"), (asked[1], "x")]
    written = folder / "words.yaml"
    written.write_text(written.read_text().replace("doc_to_target: word", "doc_to_target: gold"))
    assert task_documents("words", include_path=folder, limit=2)[1] == (asked[1], "1")  # a number, and no option's
    (folder / "both.yaml").write_text("group: both\ntask: [colours, words]\n")
    with pytest.raises(DataError, match="both: must be a single task, got a group"):
        task_documents("both", include_path=folder)
    (folder / "data.jsonl").unlink()
    with pytest.raises(DataError, match="colours: the data must be local or within reach, got: "):
        task_documents("colours", include_path=folder)


def test_what_decides_a_tasks_numbers_is_in_its_digest(folder: Path) -> None:
    first = task_digest("colours", include_path=folder)
    assert task_digest("colours", include_path=folder) == first
    assert task_digest("colours", include_path=folder, limit=5) != first
    data, task, shots = folder / "data.jsonl", folder / "colours.yaml", folder / "shots.jsonl"
    rows, text = data.read_text(), task.read_text()
    data.write_text(rows.replace("red", "rad", 1))
    assert task_digest("colours", include_path=folder) != first
    data.write_text(rows)
    task.write_text(text.replace("Answer:", "So:"))
    assert task_digest("colours", include_path=folder) != first
    # what it includes, the module of its functions, and what solved examples are drawn from
    (folder / "base.yaml").write_text(text.replace("task: colours\n", ""))
    (folder / "own.py").write_text("def same(documents):\n    return documents.select([0])\n")
    task.write_text("include: base.yaml\ntask: colours\nprocess_docs: !function own.same\nfewshot_split: shots\n")
    with_shots = (folder / "base.yaml").read_text().replace("{test: ", f"{{shots: {shots}, test: ")
    (folder / "base.yaml").write_text(with_shots)
    shots.write_text(rows)
    second = task_digest("colours", include_path=folder, fewshot=1)
    assert task_digest("colours", include_path=folder, fewshot=1) == second
    shots.write_text(rows.replace("What is 0", "What was 0"))
    assert task_digest("colours", include_path=folder) != second
    assert task_digest("colours", include_path=folder, fewshot=1) != second
    shots.write_text(rows)
    (folder / "base.yaml").write_text(with_shots.replace("Answer:", "So:"))
    assert task_digest("colours", include_path=folder, fewshot=1) != second
    (folder / "base.yaml").write_text(with_shots)
    assert task_digest("colours", include_path=folder, fewshot=1) == second
    (folder / "own.py").write_text("def same(documents):\n    return documents.select([1])\n")
    assert task_digest("colours", include_path=folder, fewshot=1) != second


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (
            "{{question}}",
            "{{asked}}",
            "colours: its YAML must fit lm-eval and name splits and fields of the data, got Undefined",
        ),
        ("test_split: test", "test_split: tset", "colours: its YAML must fit lm-eval and name splits .*, got KeyError: 'tset'"),
        ("output_type: multiple_choice", "output_type: [", r"colours\.yaml: must be valid YAML, got .*; correct it"),
    ],
)
def test_a_local_task_that_is_written_wrong_is_refused_by_name(folder: Path, old: str, new: str, message: str) -> None:
    task = folder / "colours.yaml"
    task.write_text(task.read_text().replace(old, new))
    with pytest.raises(DataError, match=message):
        task_digest("colours", include_path=folder)


def test_the_model_and_the_random_state_are_left_as_they_were(folder: Path, tiny: Any, tokenizer: Any) -> None:
    model = tiny().train()
    random.seed(1)
    np.random.seed(1)  # noqa: NPY002
    torch.manual_seed(1)
    before = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()  # type: ignore[index]  # noqa: NPY002
    found = harness(model, tokenizer, ["colours", "words"], include_path=str(folder), limit=2)
    after = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()  # type: ignore[index]  # noqa: NPY002
    assert before == after
    assert model.training
    assert {name: len(result.items) for name, result in found.items()} == {"colours": 2, "words": 1}
    assert len(found["colours"].items["acc"]) == 2


def test_git_is_not_asked_about_a_folder_that_is_no_repository(
    folder: Path, tiny: Any, tokenizer: Any, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(folder)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(folder.parent))
    harness(tiny(), tokenizer, ["colours"], include_path=folder, limit=1)
    assert "fatal" not in capfd.readouterr().err


def test_prompts_may_go_through_the_chat_template(folder: Path, tiny: Any, tokenizer: Any) -> None:
    model = tiny()
    found = harness(model, tokenizer, ["colours"], include_path=folder, chat=True)["colours"]
    acc = []
    for i in range(6):
        turns = [{"role": "user", "content": f"What is {i}? Answer:"}]
        context = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        acc.append(float(np.argmax([log_likelihood(model, tokenizer, context, option) for option in OPTIONS]) == i % 3))
    assert found.items["acc"].tolist() == acc


def test_what_cannot_be_run_is_refused(folder: Path, tiny: Any, tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def run(*tasks: str, **fields: Any) -> None:
        harness(tiny(), tokenizer, tasks, **{"include_path": folder, **fields})

    own = folder / "own"  # a small collection in place of lm-eval's thousands, which take ten seconds to read
    own.mkdir()
    (own / "stock.yaml").write_text((folder / "colours.yaml").read_text().replace("colours", "stock"))
    monkeypatch.setattr("lm_eval.tasks.manager.__file__", str(own / "manager.py"))
    run("colours", "stock", limit=1)
    with pytest.raises(InvalidArgument, match="tasks must be known to lm-eval, got 'colors'; did you mean"):
        run("colors")
    with pytest.raises(InvalidArgument, match="at least one task"):
        run()
    with pytest.raises(InvalidArgument, match="limit must be at least 1"):
        run("colours", limit=0)
    with pytest.raises(InvalidArgument, match="include_path must be a folder"):
        run("colours", include_path=folder / "none")
    (folder / "data.jsonl").unlink()
    with pytest.raises(DataError, match="colours: the data must be local or within reach"):
        run("colours")
    monkeypatch.setattr(module.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingExtra, match=r"pip install 'gradsieve\[eval\]'"):
        run("colours")
