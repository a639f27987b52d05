import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import yaml

import gradsieve as gs
from gradsieve import cli
from gradsieve.data import read_examples, tokenize
from gradsieve.errors import DataError, InvalidArgument
from gradsieve.export import Export, export
from gradsieve.models import find_model

Write = Callable[..., Path]


@pytest.fixture
def run(tiny_model: Path, write_data: Write, tmp_path: Path) -> Path:
    out = tmp_path / "run"
    data = {"pool": write_data("pool", 20), "target": write_data("target", 5)}
    gs.select(gs.LESS(warmup_share=0.0), model=tiny_model, **data, budget=6, out=out, dim=256, dtype="float32")
    return out


def chosen_messages(run: Path) -> list[list[dict[str, Any]]]:
    return [[dict(turn) for turn in example.messages] for example in read_examples([run / "selected.jsonl"]).examples]


def test_trl_gets_the_tokens_and_labels_that_the_gradients_saw(run: Path, tiny_model: Path) -> None:
    out, notes = export(Export(run))
    table = pq.read_table(out / "train" / "train.parquet").to_pydict()
    wanted = tokenize(
        read_examples([run / "selected.jsonl"]).examples, find_model(tiny_model).tokenizer, max_length=1024
    ).tokens
    assert table["input_ids"] == [list(t.input_ids) for t in wanted]
    assert table["labels"] == [list(t.labels) for t in wanted]
    assert notes == [f"train with: trl sft --config {out / 'sft.yaml'}"]


def test_trl_gets_the_runs_own_length_and_chat_template(tiny_model: Path, write_data: Write, tmp_path: Path) -> None:
    template = tmp_path / "own.jinja"
    own = (tiny_model / "chat_template.jinja").read_text()
    template.write_text(own.replace("\n{% endfor %}", " \n{% endfor %}"))
    job = {"model": tiny_model, "pool": write_data("pool", 8), "max_length": 90, "chat_template": str(template)}
    gs.select("length", budget=4, out=tmp_path / "run", **job)
    out, notes = export(Export(tmp_path / "run"))
    examples, tokenizer = read_examples([tmp_path / "run" / "selected.jsonl"]).examples, find_model(tiny_model).tokenizer
    wanted = tokenize(examples, tokenizer, max_length=90, chat_template=template.read_text()).tokens
    table = pq.read_table(out / "train" / "train.parquet").to_pydict()
    assert table["input_ids"] == [list(t.input_ids) for t in wanted]
    assert table["labels"] == [list(t.labels) for t in wanted]
    assert {len(ids) for ids in table["input_ids"]} == {90}
    assert notes[1:] == ["4 of 4 examples are longer than 90 tokens and are cut at the end"]


def test_an_example_that_the_trained_model_cannot_use_is_not_dropped(
    tiny_model: Path, data: dict[str, str], tmp_path: Path
) -> None:
    large = tmp_path / "large"
    shutil.copytree(tiny_model, large)
    template = (large / "chat_template.jinja").read_text()
    (large / "chat_template.jinja").write_text("<|im_start|>system\nAnswer as a kind teacher would.<|im_end|>\n" + template)
    job = {"pool": data["pool"], "anchor": data["anchor"], "dim": 64, "max_length": 75}
    gs.select("orth-only", model=large, navigator=str(tiny_model), budget=8, out=tmp_path / "run", **job)
    with pytest.raises(DataError, match=r"of 8 chosen examples must be usable by .*large, .* the first, pool-.*--max-length"):
        export(Export(tmp_path / "run"))


@pytest.mark.filterwarnings("ignore")  # what TRL's own script warns of is not ours
def test_trl_trains_on_them_unchanged(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("trl")
    from trl import SFTTrainer
    from trl.scripts.sft import main, make_parser

    out, _ = export(Export(run))
    flags = ["--config", str(out / "sft.yaml"), "--max_steps", "1", "--report_to", "none", "--use_cpu", "--bf16", "false"]
    seen: dict[str, Any] = {}

    def keep(trainer: Any, *_: Any, **__: Any) -> None:
        seen.update(trainer.train_dataset.to_dict())

    monkeypatch.setattr(SFTTrainer, "train", keep)
    monkeypatch.setenv("HF_DATASETS_CACHE", str(out / "cache"))
    main(*make_parser().parse_args_and_config(args=flags))
    table = pq.read_table(out / "train" / "train.parquet").to_pydict()
    assert seen["input_ids"] == table["input_ids"]
    assert seen["labels"] == table["labels"]


def test_llamafactory_finds_its_data_through_the_registry(run: Path) -> None:
    out, notes = export(Export(run, "llamafactory"))
    config = yaml.safe_load((out / "train.yaml").read_text())
    entry = json.loads((out / "dataset_info.json").read_text())[config["dataset"]]
    rows = json.loads((Path(config["dataset_dir"]) / entry["file_name"]).read_text())
    assert [row[entry["columns"]["messages"]] for row in rows] == chosen_messages(run)
    assert (config["mask_history"], config["train_on_prompt"], config["cutoff_len"]) == (False, False, 1024)
    assert len(notes) == 2


def test_axolotl_trains_on_assistant_turns_only(run: Path) -> None:
    out, _ = export(Export(run, "axolotl"))
    config = yaml.safe_load((out / "axolotl.yaml").read_text())
    (data,) = config["datasets"]
    rows = [json.loads(line) for line in Path(data["path"]).read_text().splitlines()]
    assert [row["messages"] for row in rows] == chosen_messages(run)
    assert (data["roles_to_train"], data["train_on_eos"]) == (["assistant"], "turn")
    assert (config["sequence_len"], config["excess_length_strategy"]) == (1024, "truncate")


def test_parquet_and_datasets_keep_order_and_weights(run: Path) -> None:
    from datasets import load_from_disk

    table = pq.read_table(export(Export(run, "parquet"))[0] / "train.parquet").to_pydict()
    again = load_from_disk(export(Export(run, "hf"))[0] / "train").to_dict()
    assert table == again
    assert table["rank"] == [1, 2, 3, 4, 5, 6]
    assert table["score"] == sorted(table["score"], reverse=True)
    assert table["messages"] == chosen_messages(run)


def test_weights_that_a_trainer_cannot_honour_are_named(tiny_model: Path, data: dict[str, str], tmp_path: Path) -> None:
    job = {"pool": data["pool"], "target": data["target"], "dim": 256}
    gs.select("gradmatch", model=tiny_model, budget=6, out=tmp_path / "run", **job)
    _, notes = export(Export(tmp_path / "run"))
    assert "gave weights, and trl knows none" in notes[-1]


def test_a_folder_with_files_is_not_written_over(run: Path) -> None:
    export(Export(run))
    with pytest.raises(InvalidArgument, match="must be a new or empty folder"):
        export(Export(run))


def choose_all(rows: list[dict[str, Any]], model: Any, tmp_path: Path, **job: Any) -> Path:
    """A run that chooses every row of a pool."""
    pool = tmp_path / "all.jsonl"
    pool.write_text("".join(json.dumps(row) + "\n" for row in rows))
    gs.select("random", model=model, pool=pool, budget="100%", out=tmp_path / "all", **job)
    return tmp_path / "all"


def test_a_turn_with_more_than_text_is_refused_not_cut(tiny_model: Path, tmp_path: Path) -> None:
    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a", "name": "doctor"}]
    run = choose_all([{"messages": turns}], tiny_model, tmp_path)
    with pytest.raises(DataError, match="turns must be role and text for this format, got name"):
        export(Export(run, "axolotl"))


@pytest.mark.parametrize("format", ["llamafactory", "axolotl", "parquet", "hf"])
@pytest.mark.parametrize("field", [{"tools": [{"type": "function"}]}, {"chat_template_kwargs": {"enable_thinking": True}}])
def test_what_a_row_gives_to_its_template_is_refused_not_lost(
    format: Any, field: dict[str, Any], tiny_model: Path, tmp_path: Path
) -> None:
    run = choose_all([{"prompt": "q", "completion": "a"}, {"prompt": "r", "completion": "b", **field}], tiny_model, tmp_path)
    with pytest.raises(
        DataError, match=r"rows must be turns alone for this format, got .* for the chat template; export to trl"
    ):
        export(Export(run, format))
    export(Export(run, "trl"))


@pytest.mark.parametrize(
    "roles",
    ["assistant", "assistant user assistant", "user user assistant", "user assistant tool assistant", "system assistant"],
)
def test_what_llamafactory_would_skip_is_refused(roles: str, tiny_model: Path, tmp_path: Path) -> None:
    whole = [{"role": role, "content": "text"} for role in ("system", "user", "assistant", "user", "assistant")]
    turns = [{"role": role, "content": "text"} for role in roles.split()]
    run = choose_all([{"messages": whole}, {"messages": turns}], tiny_model, tmp_path)
    with pytest.raises(DataError, match=f"got {', '.join(roles.split())}, which llamafactory would skip; export to trl"):
        export(Export(run, "llamafactory"))
    export(Export(run, "axolotl"))


def test_the_runs_own_chat_template_is_written_or_named(tiny_model: Path, tmp_path: Path) -> None:
    template = tmp_path / "own.jinja"
    template.write_text("{# mine #}" + (tiny_model / "chat_template.jinja").read_text())
    run = choose_all([{"prompt": "q", "completion": "a"}], tiny_model, tmp_path, chat_template=str(template))
    config = yaml.safe_load((export(Export(run, "axolotl"))[0] / "axolotl.yaml").read_text())
    assert (config["chat_template"], config["chat_template_jinja"]) == ("jinja", template.read_text())
    for format, cure in (("llamafactory", "save it as chat_template.jinja"), ("parquet", "give it to"), ("hf", "give it to")):
        _, notes = export(Export(run, format))
        assert f"the chat template {template}, which is not in these files: {cure}" in notes[-1]


def test_the_trained_model_is_a_folder(tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gradsieve.demo.demo_model_dir", lambda: tiny_model)
    run = choose_all([{"prompt": "q", "completion": "a"}], "demo", tmp_path)
    named = {"trl": ("sft.yaml", "model_name_or_path"), "llamafactory": ("train.yaml", "model_name_or_path")}
    for format, (file, key) in (named | {"axolotl": ("axolotl.yaml", "base_model")}).items():
        assert yaml.safe_load((export(Export(run, format))[0] / file).read_text())[key] == str(tiny_model)


@pytest.mark.parametrize("format", ["trl", "llamafactory", "axolotl"])
def test_a_model_object_has_no_folder(format: Any, tiny_llama: Callable[..., Any], tiny_model: Path, tmp_path: Path) -> None:
    tokenizer = find_model(tiny_model).tokenizer
    run = choose_all([{"prompt": "q", "completion": "a"}], tiny_llama(), tmp_path, tokenizer=tokenizer)
    with pytest.raises(InvalidArgument, match="must name its model's folder, got a model object; export to parquet instead"):
        export(Export(run, format))
    assert not any((run / f"export-{format}").iterdir())
    export(Export(run, "parquet"))


def test_other_folders_are_no_selections(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["export", str(tmp_path)]) == 2
    assert "must be the folder of a selection" in capsys.readouterr().err


def test_a_run_of_an_earlier_version_is_told_to_be_made_again(run: Path, tmp_path: Path) -> None:
    old = Path(shutil.copytree(run, tmp_path / "old"))
    record = json.loads((old / "run.json").read_text())
    record["selection"].pop("content")
    (old / "run.json").write_text(json.dumps(record))
    with pytest.raises(DataError, match="got one of an earlier gradsieve; select again"):
        export(Export(old, "parquet"))


@pytest.mark.parametrize("name", ["file", "file/below"])
def test_what_is_no_folder_is_not_written_to(name: str, run: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(InvalidArgument, match="out must be a folder one can write to, got"):
        export(Export(run, "parquet", tmp_path / name))
    assert (tmp_path / "file").read_text() == "mine"


def test_scores_of_another_selection_are_refused(run: Path) -> None:
    lines = (run / "selected.jsonl").read_text().splitlines()
    (run / "selected.jsonl").write_text("\n".join(lines[:-1]) + "\n")
    with pytest.raises(DataError, match=r"must rank the 5 examples of selected\.jsonl, got 6"):
        export(Export(run))


def test_scores_are_not_given_to_other_examples(run: Path) -> None:
    lines = (run / "selected.jsonl").read_text().splitlines(keepends=True)
    (run / "selected.jsonl").write_text("".join(reversed(lines)))
    with pytest.raises(
        DataError, match=r"selected\.jsonl must be that of the run in run\.json, got another choice; select again"
    ):
        export(Export(run, "parquet"))


@pytest.mark.parametrize(
    ("stale", "named"), [(("scores.parquet", "run.json"), "selected.jsonl"), (("run.json",), "scores.parquet")]
)
def test_files_that_a_broken_off_run_left_behind_are_refused(
    stale: tuple[str, ...], named: str, tiny_model: Path, data: dict[str, str], tmp_path: Path
) -> None:
    job = {"model": tiny_model, "pool": data["pool"], "budget": 6, "out": tmp_path / "run"}
    gs.select("random", **job)
    kept = {name: (tmp_path / "run" / name).read_bytes() for name in stale}
    gs.select("random", seed=1, **job)
    for name, content in kept.items():
        (tmp_path / "run" / name).write_bytes(content)
    with pytest.raises(DataError, match=f"{named} must be that of the run"):
        export(Export(tmp_path / "run", "parquet"))


def test_other_weights_are_another_selection(run: Path) -> None:
    scores = pq.read_table(run / "scores.parquet")
    at = scores.column_names.index("weight")
    weights = [0.5 * rank if rank else 0.0 for rank in scores["rank"].to_pylist()]
    pq.write_table(scores.set_column(at, "weight", [weights]), run / "scores.parquet")
    with pytest.raises(DataError, match=r"scores\.parquet must be that of the run"):
        export(Export(run))


def test_files_of_any_shape_and_with_or_without_ids_may_be_one_pool(
    tiny_model: Path, write_data: Write, tmp_path: Path
) -> None:
    alpaca = tmp_path / "alpaca.jsonl"
    alpaca.write_text("".join(json.dumps({"instruction": f"say {i}", "output": f"it is {i}"}) + "\n" for i in range(3)))
    job = {"model": tiny_model, "pool": (str(write_data("pool", 3)), str(alpaca)), "budget": 6, "out": tmp_path / "run"}
    result = gs.select("random", **job)
    rows = pq.read_table(export(Export(tmp_path / "run", "parquet"))[0] / "train.parquet").to_pylist()
    assert [row["id"] for row in rows] == [example.id for example in result.examples]
    assert [row["messages"] for row in rows] == [[dict(turn) for turn in example.messages] for example in result.examples]
