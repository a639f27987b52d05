"""What a run is given: what is refused before the model is loaded, and what is left out with its reason."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch

import gradsieve as gs
from gradsieve.errors import GradsieveError, InvalidArgument, ModelError

LESS, GRADS = gs.LESS(warmup_share=0.0), gs.GrADS(probe_epochs=0)  # at the model as it is; warm-ups: tests/warmup
Write = Callable[..., Path]
SMALL = {"dim": 256, "dtype": "float32", "unit_tokens": 400, "batch_tokens": 200}


def bad(change: dict[str, object], data: dict[str, str], tiny_model: Path) -> str:
    arguments = {"model": str(tiny_model), **data, "budget": "5", **SMALL, **change}
    method = str(arguments.pop("method", "ogs-static"))
    with pytest.raises(GradsieveError) as caught:
        gs.select(method, **arguments)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_bad_input_is_named_before_the_model_is_loaded(
    data: dict[str, str], tiny_model: Path, write_data: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from gradsieve.models import ModelSource

    monkeypatch.setattr(ModelSource, "load", lambda *_: pytest.fail("the model was loaded"))
    broken = tmp_path / "broken.jsonl"
    broken.write_text(Path(data["pool"]).read_text() + '{"prompt": "x", "compl\n')
    roles = tmp_path / "roles.jsonl"
    roles.write_text(json.dumps({"messages": [{"role": "assistant", "content": "a"}, {"role": "user", "content": "b"}]}) + "\n")
    empty = tmp_path / "empty.jsonl"
    empty.touch()
    plain = tmp_path / "file.txt"
    plain.touch()
    cases = {
        "nowhere.jsonl": {"pool": str(tmp_path / "nowhere.jsonl")},
        "broken.jsonl:25": {"pool": str(broken)},
        "roles.jsonl:1": {"pool": str(roles)},
        "empty.jsonl": {"pool": str(empty)},
        "budget must be above 0": {"budget": "0"},
        "[1, 24]": {"budget": "25"},
        "needs --target": {"target": ()},
        "needs --anchor": {"anchor": ()},
        "anchor must not share": {"anchor": data["target"]},
        "target must not share": {"target": data["pool"]},
        "out must be a folder": {"out": plain},
        "method must be one of": {"method": "ogz"},
        "fields of Job, got poool": {"poool": "x"},
        "seed must lie in [0, 4294967296), got 8589934592": {"seed": 2**33},
        "settings of ogs-static": {"settings": {"droop": 1}},
        "which does not exist": {"model": "/nowhere/model"},
        "dim must lie in": {"dim": 3},
        "device must be usable": {"device": "warp"},
        "chat_template must be": {"chat_template": str(tmp_path / "none.jinja")},
    }
    for expected, change in cases.items():
        assert expected in bad(change, data, tiny_model)


def test_models_without_tokenizer_template_or_safe_weights_are_refused(
    data: dict[str, str], tiny_model: Path, tmp_path: Path
) -> None:
    import shutil

    def copy(name: str) -> Path:
        return Path(shutil.copytree(tiny_model, tmp_path / name))

    bare = copy("bare")
    for file in bare.glob("tokenizer*"):
        file.unlink()
    (bare / "chat_template.jinja").unlink(missing_ok=True)
    assert "must have a tokenizer" in bad({"model": str(bare)}, data, tiny_model)
    speechless = copy("speechless")
    (speechless / "chat_template.jinja").unlink(missing_ok=True)
    config = json.loads((speechless / "tokenizer_config.json").read_text())
    config.pop("chat_template", None)
    (speechless / "tokenizer_config.json").write_text(json.dumps(config))
    message = bad({"model": str(speechless)}, data, tiny_model)
    assert "chat template" in message
    assert "--chat-template" in message
    unsafe = copy("unsafe")
    (unsafe / "model.safetensors").rename(unsafe / "pytorch_model.bin")
    assert "pytorch_model.bin, which can run code" in bad({"model": str(unsafe)}, data, tiny_model)
    cut = copy("cut")
    (cut / "model.safetensors").write_bytes((cut / "model.safetensors").read_bytes()[:50])
    with pytest.raises(ModelError, match="could not be loaded"):
        gs.select(GRADS, model=str(cut), pool=data["pool"], budget="5", **SMALL)


def test_examples_in_memory_need_unique_ids(tiny_model: Path) -> None:
    turns = ({"role": "user", "content": "q"}, {"role": "assistant", "content": "a"})
    twice = [gs.Example("x", turns, b"{}", "memory:1"), gs.Example("x", turns, b"{}", "memory:2")]
    with pytest.raises(InvalidArgument, match=r"pool must have unique ids, got 'x' at memory:1 and memory:2"):
        gs.select(GRADS, model=str(tiny_model), pool=twice, budget="1", **SMALL)
    with pytest.raises(InvalidArgument, match="pool must be files or examples, not both"):
        gs.select(GRADS, model=str(tiny_model), pool=[twice[0], "pool.jsonl"], budget="1", **SMALL)


def test_rows_in_memory_must_be_examples(tiny_model: Path) -> None:
    with pytest.raises(InvalidArgument, match=r"files or gradsieve\.Example objects, got dict"):
        gs.select(GRADS, model=str(tiny_model), pool=[{"prompt": "q", "completion": "a"}], budget="1", **SMALL)


def test_tokens_and_places_that_the_model_lacks_are_refused(data: dict[str, str], tiny_model: Path, tmp_path: Path) -> None:
    import transformers

    def variant(name: str, model: Any) -> str:
        folder = tmp_path / name
        shutil.copytree(tiny_model, folder)
        (folder / "model.safetensors").unlink()
        model.save_pretrained(folder)
        return str(folder)

    small = transformers.AutoModelForCausalLM.from_pretrained(tiny_model)
    count = small.get_input_embeddings().weight.shape[0]
    small.resize_token_embeddings(count // 2)
    config = transformers.GPT2Config(vocab_size=count, n_positions=16, n_embd=16, n_layer=1, n_head=2)
    models = {"must have an embedding of every token": variant("few", small)}
    models["must have a place for every token"] = variant("short", transformers.GPT2LMHeadModel(config))
    for expected, model in models.items():
        with pytest.raises(ModelError, match=expected):
            gs.select(GRADS, model=model, pool=data["pool"], budget="5", **SMALL)
        gs.select("random", model=model, pool=data["pool"], budget="5", **SMALL)


def test_own_wrong_copies_make_the_contrast(data: dict[str, str], tiny_model: Path, tmp_path: Path) -> None:
    rows = [json.loads(line) for line in Path(data["anchor"]).read_text().splitlines()][:4]
    wrong = tmp_path / "wrong.jsonl"
    wrong.write_text("".join(json.dumps({**row, "completion": "No idea."}) + "\n" for row in rows))
    common = {"model": str(tiny_model), **data, "budget": "5", **SMALL}
    own = gs.select("ogs-static", corrupted=(str(wrong),), settings={"against": "contrast"}, **common)
    assert own.references["contrast/anchor:arithmetic"].count == 4
    assert any("2 of 6 examples of anchor:arithmetic" in note for note in own.notes)
    assert not any("--corrupted" in note for note in own.notes)
    unused = gs.select("ogs-static", corrupted=(str(wrong),), **common)
    assert any("of --corrupted were not used: ogs-static as it is set reads no contrast" in note for note in unused.notes)
    built_in = gs.select("ogs-static", settings={"against": "contrast"}, **common)
    assert built_in.references["contrast/anchor:arithmetic"].count == 6
    target = Path(data["target"])
    named = [json.loads(line) for line in target.read_text().splitlines()]
    target.write_text(
        "".join(json.dumps({**row, "id": rows[0]["id"]} if i == 0 else row) + "\n" for i, row in enumerate(named))
    )
    assert f"no ids where --corrupted names copies by id, got {rows[0]['id']!r} in both" in bad(
        {"corrupted": (str(wrong),)}, data, tiny_model
    )
    target.write_text("".join(json.dumps(row) + "\n" for row in named))
    wrong.write_text(json.dumps({"id": "stranger", "prompt": "a", "completion": "b"}) + "\n")
    assert "got " + str(wrong) in bad({"corrupted": (str(wrong),)}, data, tiny_model)


def test_what_is_left_out_or_cut_is_noted(data: dict[str, str], tiny_model: Path, tmp_path: Path) -> None:
    target = Path(data["target"])
    target.write_text(target.read_text() + json.dumps({"id": "long", "prompt": "x" * 400, "completion": "y"}) + "\n")
    common = {"model": str(tiny_model), "pool": data["pool"], "target": str(target), "budget": "5", **SMALL}
    notes = gs.select(LESS, max_length=300, **common).notes
    assert any("1 of 7 examples of the target could not be used" in note and "300" in note for note in notes)
    assert not any("cut" in note for note in notes)
    cut = gs.select(LESS, max_length=100, **common)
    count = sum(tokens.truncated for tokens in cut.sets["pool"].tokens)
    assert count > 0
    assert any(f"{count} of 24 examples of the pool are longer than 100 tokens and were cut" in note for note in cut.notes)


def test_every_example_is_scored_or_excluded_with_its_reason(write_data: Write, tiny_model: Path, tmp_path: Path) -> None:
    pool = write_data("pool", 12)
    long = {"id": "long", "prompt": "x" * 500, "completion": "never reached"}
    pool.write_text(pool.read_text() + json.dumps(long) + "\n")
    target = str(write_data("target", 4))
    result = gs.select(
        LESS, model=str(tiny_model), pool=str(pool), target=target, budget="3", out=tmp_path / "o", max_length=300, **SMALL
    )
    excluded = [json.loads(line) for line in (tmp_path / "o" / "excluded.jsonl").read_text().splitlines()]
    assert [(row["id"], row["row"]) for row in excluded] == [("long", 12)]
    assert "300" in excluded[0]["reason"]
    scores = pq.read_table(tmp_path / "o" / "scores.parquet").to_pydict()
    assert sorted(scores["row"] + [row["row"] for row in excluded]) == list(range(13))
    assert len(result.pool.ids) == 12


def test_an_example_whose_gradient_is_not_finite_is_excluded(write_data: Write, tiny_model: Path, tmp_path: Path) -> None:
    model, tokenizer = broken_model(tiny_model)
    pool = write_data("pool", 8)
    pool.write_text(pool.read_text() + json.dumps({"id": "bad", "prompt": "Q?", "completion": "A"}) + "\n")
    result = gs.select(
        LESS, model=model, tokenizer=tokenizer, pool=str(pool), target=str(write_data("target", 4)), budget="8",
        out=tmp_path / "o", dim=256,
    )  # fmt: skip
    assert [(e.id, "not finite" in e.reason) for e in result.excluded] == [("bad", True)]
    assert "bad" not in result.pool.ids


def broken_model(tiny_model: Path) -> tuple[torch.nn.Module, object]:
    """The tiny model with a NaN at the letter Q."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    with torch.no_grad():
        model.get_input_embeddings().weight[tokenizer("Q")["input_ids"][0]] = torch.nan
        model.lm_head.weight = torch.nn.Parameter(torch.randn_like(model.lm_head.weight))
    return model, tokenizer


def test_a_target_whose_gradient_is_not_finite_is_noted(write_data: Write, tiny_model: Path) -> None:
    model, tokenizer = broken_model(tiny_model)
    target = write_data("target", 4)
    target.write_text(target.read_text() + json.dumps({"id": "bad", "prompt": "Q?", "completion": "A"}) + "\n")
    pool = str(write_data("pool", 8))
    result = gs.select(LESS, model=model, tokenizer=tokenizer, pool=pool, target=str(target), budget="2", dim=256)
    assert "1 of the target's gradients are not finite and were left out" in result.notes


def test_duplicates_are_left_out_before_the_method_and_shown(
    write_data: Write, tiny_model: Path, data: dict[str, str], tmp_path: Path
) -> None:
    pool = write_data("pool", 12)
    rows = [json.loads(line) for line in pool.read_text().splitlines()]
    copy, near = {**rows[3], "id": "zz-copy"}, {**rows[5], "id": "zz-near"}
    near |= {key: near[key].upper() + "!" for key in ("prompt", "completion")}
    pool.write_text("".join(json.dumps(row) + "\n" for row in [copy, near, *rows]))
    common = {"model": str(tiny_model), "pool": str(pool), "budget": "100%", **SMALL}
    out = tmp_path / "out"
    result = gs.select("length", out=out, dedup="near", dedup_threshold=0.99, **common)
    excluded = [json.loads(line) for line in (out / "excluded.jsonl").read_text().splitlines()]
    assert [(row["id"], row["row"], row["reason"]) for row in excluded] == [
        ("zz-copy", 0, f"copy of {rows[3]['id']}"),
        ("zz-near", 1, f"near-duplicate of {rows[5]['id']}"),
    ]
    assert len(result.examples) == 12
    assert any("2 of 14 usable examples of the pool repeat one of 2 others" in note for note in result.notes)
    page = (out / "report.html").read_text()
    assert "left out, because they repeat it" in page
    assert "near-duplicate of another example" in page
    assert len(gs.select("length", dedup="exact", **common).examples) == 13
    assert len(gs.select("length", **common).examples) == 14
    with pytest.raises(InvalidArgument, match="dedup must be one of off, exact, near"):
        gs.select("length", dedup="fuzzy", **common)


def test_a_mean_gradient_is_not_taken_of_one_example(write_data: Write, tiny_model: Path) -> None:
    pool, target, anchor = (str(write_data(name, count)) for name, count in (("pool", 8), ("target", 1), ("anchor", 4)))
    with pytest.raises(InvalidArgument, match=r"target must hold at least 2 usable examples, got 1"):
        gs.select("ogs-static", model=tiny_model, pool=pool, target=target, anchor=anchor, budget="2", dim=256)
