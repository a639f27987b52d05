"""The main job from files to a folder, and what single methods ask of it."""

import json
import math
import os
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pyarrow.parquet as pq
import pytest
import torch

import gradsieve as gs
from gradsieve.errors import InvalidArgument
from gradsieve.pipeline import extract

METHODS = [method for method in gs.SELECTORS if method not in ("embedding", "metadata")]  # they need an encoder, a field
LESS, GRADS = gs.LESS(warmup_share=0.0), gs.GrADS(probe_epochs=0)  # at the model as it is; warm-ups: tests/warmup
AS_IT_IS = {"less": {"warmup_share": 0.0}, "g2is": {"warmup_share": 0.0}, "grads": {"probe_epochs": 0}}
Write = Callable[..., Path]
SMALL = {"dim": 256, "dtype": "float32", "unit_tokens": 400, "batch_tokens": 200}


@pytest.mark.parametrize("method", METHODS)
def test_every_method_runs_from_files_to_a_folder(method: str, data: dict[str, str], tiny_model: Path, tmp_path: Path) -> None:
    result = gs.select(
        method, settings=AS_IT_IS.get(method), model=str(tiny_model), **data, budget="25%", out=tmp_path / "out", **SMALL
    )
    out = tmp_path / "out"
    assert {p.name for p in out.iterdir()} - {"store"} == {
        "selected.jsonl", "scores.parquet", "excluded.jsonl", "run.json", "report.html",
    }  # fmt: skip
    lines = (out / "selected.jsonl").read_bytes().splitlines()
    pool = Path(data["pool"]).read_bytes().splitlines()
    assert lines == [example.raw for example in result.examples]
    assert set(lines) <= set(pool)
    assert len(lines) == 6 or (0 < len(lines) < 6 and result.selection.notes)  # a shortfall is stated
    scores = pq.read_table(out / "scores.parquet").to_pydict()
    assert sorted(scores["row"]) == list(range(24))
    by_rank = sorted((rank, id) for rank, id in zip(scores["rank"], scores["id"], strict=True) if rank is not None)
    assert [id for _, id in by_rank] == [json.loads(line)["id"] for line in lines]
    assert sum(scores["selected"]) == len(lines)
    record = json.loads((out / "run.json").read_text())
    assert record["method"]["name"] == method
    assert record["selection"]["examples"] == len(lines)
    tokens = torch.tensor(scores["tokens"])
    chosen = tokens[torch.tensor(scores["selected"])]
    assert record["selection"]["tokens_per_example"] == pytest.approx(
        {"pool": float(tokens.mean()), "chosen": float(chosen.mean())}
    )
    assert f"{chosen.mean():,.0f} an example, {tokens.mean():,.0f} in the pool" in (out / "report.html").read_text()


def test_replay_gives_the_same_selection_and_notices_other_data(data: dict[str, str], tiny_model: Path, tmp_path: Path) -> None:
    from gradsieve.outputs import replay

    gs.select(LESS, model=str(tiny_model), pool=data["pool"], target=data["target"], out=tmp_path / "a", **SMALL)
    again = replay(tmp_path / "a" / "run.json", tmp_path / "b")
    assert (tmp_path / "a" / "selected.jsonl").read_bytes() == (tmp_path / "b" / "selected.jsonl").read_bytes()
    assert len(again.examples) == 1
    Path(data["pool"]).write_text(Path(data["pool"]).read_text().replace("Sure", "Yes"))
    with pytest.raises(InvalidArgument, match="pool must be the data of"):
        replay(tmp_path / "a" / "run.json", tmp_path / "c")


def test_the_anchor_is_measured_in_every_form_that_a_method_asks_for(
    write_data: Write, data: dict[str, str], tiny_model: Path, tmp_path: Path
) -> None:
    both = tmp_path / "both.jsonl"
    parts = [Path(data["anchor"]), write_data("knowledge", 5, category="knowledge")]
    both.write_text("".join(part.read_text() for part in parts))
    common = {**data, "anchor": str(both), "model": str(tiny_model), "budget": "4", "store": str(tmp_path / "store"), **SMALL}
    for settings in ({"normalize": "example"}, {"normalize": "category"}, {"space": "categories"}):
        result = gs.select("orth-only", settings=settings, **{**common, "store": str(tmp_path / str(settings))})
        assert any("the anchor has 11 usable examples; 300 to 500" in note for note in result.selection.notes)
    facts = result.references
    assert facts["anchor:arithmetic"].cosines["anchor:knowledge"] == facts["anchor:knowledge"].cosines["anchor:arithmetic"]
    assert facts["anchor:knowledge"].cosines["anchor:knowledge"] == pytest.approx(1)
    again = gs.select("orth-only", settings=settings, **{**common, "store": str(tmp_path / str(settings))})
    assert again.references == facts
    assert "nearest" in str(gs.select("ogs-static", settings={"utility": "nearest"}, **common).method)
    hidden = gs.select("ogs-static", settings={"utility": "hidden"}, **{**common, "store": str(tmp_path / "hidden")})
    assert "hidden" in hidden.pool.representations


def test_the_anchors_categories_may_be_a_file_each(
    write_data: Write, data: dict[str, str], tiny_model: Path, tmp_path: Path
) -> None:
    files = (str(write_data("maths", 5)), str(write_data("facts", 4)))
    target = str(write_data("other", 4)), data["target"]
    common = {"model": str(tiny_model), "pool": data["pool"], "target": target, "budget": "4", **SMALL}
    result = gs.select("ogs-static", anchor=files, settings={"against": "categories"}, **common)
    counts = {name: fact.count for name, fact in result.references.items()}
    assert counts == {"target": 10, "anchor:facts": 4, "anchor:maths": 5}
    assert any("5 of 5 rows have no \"category\"; theirs is the file's, 'maths'" in note for note in result.notes)
    one = gs.select("ogs-static", anchor=files[0], settings={"against": "categories"}, **common)
    assert set(one.references) == {"target", "anchor:general"}
    assert not any("theirs is the file's" in note for note in one.notes)  # nor for the two files of the target


def test_the_categories_of_the_target_are_its_groups(data: dict[str, str], tiny_model: Path, tmp_path: Path) -> None:
    target = tmp_path / "grouped.jsonl"
    rows = [json.loads(line) for line in Path(data["target"]).read_text().splitlines()]
    named = [{**row, "category": ("skin", "heart")[i % 2]} for i, row in enumerate(rows[:4])]
    target.write_text("".join(json.dumps(row) + "\n" for row in [*named, *rows[4:]]))
    common = {"model": str(tiny_model), "pool": data["pool"], "budget": "6", **SMALL}
    grouped = gs.select(LESS, target=str(target), **common)
    served = grouped.selection.trace["chosen_per_group"]
    assert set(served) == {"heart", "none", "skin"}
    assert sum(served.values()) == 6
    assert set(gs.select(LESS, target=data["target"], **common).selection.trace["chosen_per_group"]) == {"target"}


def test_batch_size_and_order_do_not_change_the_scores(data: dict[str, str], tiny_model: Path, tmp_path: Path) -> None:
    shuffled = tmp_path / "shuffled.jsonl"
    shuffled.write_text("".join(reversed(Path(data["pool"]).read_text().splitlines(keepends=True))))
    common = {"model": str(tiny_model), "target": data["target"], "budget": "5", "dim": 256, "dtype": "float64"}
    one = gs.select(LESS, pool=data["pool"], batch_tokens=10_000, store=str(tmp_path / "one"), **common)
    two = gs.select(LESS, pool=str(shuffled), batch_tokens=1, unit_tokens=100, store=str(tmp_path / "two"), **common)
    scores = dict(zip(two.pool.ids, two.selection.scores.tolist(), strict=True))
    assert one.selection.scores.tolist() == pytest.approx([scores[id] for id in one.pool.ids], abs=1e-3)  # float16 storage
    assert [e.id for e in one.examples] == [e.id for e in two.examples]


def test_examples_in_memory_and_a_selector_object_work(tiny_model: Path) -> None:
    pool = [
        gs.Example(
            str(i),
            ({"role": "user", "content": f"say {i}"}, {"role": "assistant", "content": "ok " * (i + 1)}),
            f'{{"n": {i}}}'.encode(),
            "memory",
        )
        for i in range(8)
    ]
    result = gs.select(GRADS, model=str(tiny_model), pool=pool, budget="3", **SMALL)
    assert [e.raw for e in result.examples] == [pool[int(e.id)].raw for e in result.examples]


@dataclass(frozen=True)
class Shortest:
    """A third party's method: the shortest examples."""

    most: int = 1000

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"tokens"})

    def select(self, problem: gs.Problem, budget: gs.Budget, rng: torch.Generator) -> gs.Selection:
        order = problem.candidates.columns["tokens"].argsort()
        rows = budget.take(order, problem.candidates)
        return gs.Selection(rows, torch.ones(len(rows)), -problem.candidates.columns["tokens"])


def test_a_third_party_method_needs_no_registration(data: dict[str, str], tiny_model: Path) -> None:
    result = gs.select(Shortest(), model=str(tiny_model), pool=data["pool"], budget="4")
    assert len(result.examples) == 4
    assert result.method[0].endswith(":Shortest")


@dataclass(frozen=True)
class Weighted(Shortest):
    """A third party's method with weights, and numbers per row and per step."""

    weight: ClassVar[float] = 1.0

    def select(self, problem: gs.Problem, budget: gs.Budget, rng: torch.Generator) -> gs.Selection:
        plain, n = super().select(problem, budget, rng), len(problem.candidates.ids)
        weights = plain.weights.clone()
        weights[0] = self.weight
        trace = {"second": list(range(n)), "first": [None, *range(1, n)], "error": [0.5] * n}
        return gs.Selection(plain.rows, weights, plain.scores, trace, per_row=("second", "first"))


def test_only_what_a_method_declares_per_row_is_told_per_row(data: dict[str, str], tiny_model: Path, tmp_path: Path) -> None:
    from gradsieve.outputs import page
    from gradsieve.rebuild import read_page
    from gradsieve.report.facts import row_values, step_panels

    own = gs.select(Weighted(), model=str(tiny_model), pool=data["pool"], budget="100%", out=tmp_path / "own")
    scores = pq.read_table(tmp_path / "own" / "scores.parquet").to_pydict()
    assert [name for name in scores if name.startswith("trace/")] == ["trace/second", "trace/first"]
    assert scores["trace/first"] == [None, *range(1, 24)]
    assert json.loads((tmp_path / "own" / "run.json").read_text())["trace"] == {"error": [0.5] * 24}
    for shown in (page(own), read_page(tmp_path / "own")):
        assert list(row_values(shown))[-2:] == ["second", "first"]
    for method, steps in ((gs.Curiosity(), "information"), (gs.RDS(), "similarity")):
        out = tmp_path / steps
        gs.select(method, model=str(tiny_model), pool=data["pool"], target=data["target"], budget="100%", out=out, **SMALL)
        assert f"trace/{steps}" not in pq.read_table(out / "scores.parquet").column_names
        shown = read_page(out)
        assert len(shown.selection.trace[steps]) == 24
        assert steps in step_panels(shown)
        assert steps not in row_values(shown)


def test_replay_notices_another_model_and_other_weights_of_the_same_rows(
    data: dict[str, str], tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from gradsieve.outputs import replay

    model = tmp_path / "model"
    shutil.copytree(tiny_model, model)
    gs.select(Weighted(), model=str(model), pool=data["pool"], budget="4", out=tmp_path / "a")
    replay(tmp_path / "a" / "run.json", tmp_path / "b")
    monkeypatch.setattr(Weighted, "weight", 0.5)
    with pytest.raises(InvalidArgument, match=r"the selection must be that of .*run\.json, got another one"):
        replay(tmp_path / "a" / "run.json", tmp_path / "c")
    monkeypatch.undo()
    config = model / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "rms_norm_eps": 0.5}))
    with pytest.raises(InvalidArgument, match=r"model must be the one of .*run\.json, got other weights in"):
        replay(tmp_path / "a" / "run.json", tmp_path / "d")


def test_a_number_of_the_examples_can_rank_them(write_data: Write, tiny_model: Path, tmp_path: Path) -> None:
    pool = tmp_path / "pool.jsonl"
    rows = [{"prompt": f"p{i}", "completion": f"c{i}", "stars": (i * 7) % 10} for i in range(10)]
    pool.write_text("".join(json.dumps(row) + "\n" for row in rows))
    chosen = gs.select(gs.Metadata("stars"), model=str(tiny_model), pool=str(pool), budget="3").examples
    assert [json.loads(example.raw)["stars"] for example in chosen] == [9, 8, 7]
    pool.write_text(pool.read_text() + json.dumps({"prompt": "p", "completion": "c", "stars": "many"}) + "\n")
    with pytest.raises(gs.DataError, match=r"pool.jsonl:11: field 'stars' must be a number for .*, got 'many'"):
        gs.select(gs.Metadata("stars", missing="drop"), model=str(tiny_model), pool=str(pool), budget="3")
    rows[9] = {"prompt": "p9", "completion": "c9", "stars": None}
    pool.write_text("".join(json.dumps(row) + "\n" for row in [*rows, {"prompt": "p", "completion": "c"}]))
    with pytest.raises(gs.DataError, match=r"pool.jsonl:10: field 'stars' must be a number for metadata, got None"):
        gs.select("metadata", settings={"column": "stars"}, model=str(tiny_model), pool=str(pool), budget="3")
    dropping = {"column": "stars", "missing": "drop"}
    result = gs.select("metadata", settings=dropping, model=str(tiny_model), pool=str(pool), budget="100%", out=tmp_path / "o")
    assert len(result.examples) == 9
    assert result.selection.trace["missing"] == 2
    assert any("2 of 11 examples have no stars and are left out" in note for note in result.selection.notes)
    scores = pq.read_table(tmp_path / "o" / "scores.parquet").to_pydict()
    assert sum(value is None or value != value for value in scores["meta/stars"]) == 2
    assert (tmp_path / "o" / "report.html").exists()


@pytest.mark.parametrize("record", ["[1]", '"x"', "3", "{}", "no inputs", "no files", "text"])
def test_replay_refuses_what_is_no_record(record: str, data: dict[str, str], tiny_model: Path, tmp_path: Path) -> None:
    from gradsieve.outputs import replay

    run = tmp_path / "a" / "run.json"
    gs.select("random", model=str(tiny_model), pool=data["pool"], budget="4", out=run.parent)
    known = json.loads(run.read_text())
    changed = {
        "no inputs": {key: value for key, value in known.items() if key != "inputs"},
        "no files": known | {"inputs": {"pool": {}}},
        "text": known | {"model": "demo"},
    }
    run.write_text(json.dumps(changed[record]) if record in changed else record)
    with pytest.raises(gs.DataError, match=r"run\.json: must be the run\.json of a selection, got .*; select again"):
        replay(run, tmp_path / "b")


def test_a_report_promises_no_replay_that_would_be_refused(data: dict[str, str], tiny_model: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from gradsieve.data import read_examples
    from gradsieve.outputs import replay

    live = {"model": AutoModelForCausalLM.from_pretrained(tiny_model), "tokenizer": AutoTokenizer.from_pretrained(tiny_model)}
    runs: dict[str, dict[str, Any]] = {
        "files": {"model": str(tiny_model), "pool": data["pool"]},
        "memory": {"model": str(tiny_model), "pool": read_examples(data["pool"]).examples},
        "live": {**live, "pool": data["pool"]},
    }
    for name, given in runs.items():
        gs.select("random", budget="4", out=tmp_path / name, **given)
        assert ("replay" in (tmp_path / name / "report.html").read_text()) == (name == "files")
        assert ("call <code>select</code> again" in (tmp_path / name / "report.html").read_text()) == (name != "files")
        if name != "files":
            with pytest.raises(InvalidArgument, match="call select again instead"):
                replay(tmp_path / name / "run.json", tmp_path / "again")


def test_a_report_promises_no_replay_of_a_scripts_own_method(
    data: dict[str, str], tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.modules["__main__"], "Weighted", Weighted, raising=False)
    monkeypatch.setattr(Weighted, "__module__", "__main__")
    gs.select(Weighted(), model=str(tiny_model), pool=data["pool"], budget="4", out=tmp_path)
    assert "gradsieve replay" not in (tmp_path / "report.html").read_text()


def test_replay_works_from_another_folder(
    data: dict[str, str], tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from gradsieve.outputs import replay

    monkeypatch.chdir(tiny_model.parent)
    (tmp_path / "template.jinja").write_text((tiny_model / "chat_template.jinja").read_text())
    template = os.path.relpath(tmp_path / "template.jinja")
    common = {"pool": data["pool"], "target": data["target"], "budget": "3", "chat_template": template, **SMALL}
    gs.select(LESS, model=tiny_model.name, out=tmp_path / "a", **common)
    monkeypatch.chdir(tmp_path)
    assert len(replay(tmp_path / "a" / "run.json", tmp_path / "b").examples) == 3


def test_extract_serves_every_method(data: dict[str, str], tiny_model: Path, tmp_path: Path) -> None:
    store = str(tmp_path / "store")
    tuples = {role: (path,) for role, path in data.items()}
    problem = extract(gs.Job(model=str(tiny_model), store=store, **tuples, **SMALL)).problem
    assert {"dot/target", "dot/anchor", "dot/contrast/anchor:arithmetic", "dot/contrast/target"} <= set(
        problem.candidates.columns
    )
    shards = {p: p.stat().st_mtime_ns for p in Path(store).rglob("*.safetensors")}
    for method in METHODS:
        if method != "ifd":  # it takes the answers alone besides
            gs.select(method, settings=AS_IT_IS.get(method), model=str(tiny_model), **data, budget="5", store=store, **SMALL)
    assert {p: p.stat().st_mtime_ns for p in Path(store).rglob("*.safetensors")} == shards


def test_ifd_reads_the_loss_of_the_same_tokens_with_and_without_the_prompt(
    data: dict[str, str], tiny_model: Path, tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM

    result = gs.select("ifd", model=str(tiny_model), pool=data["pool"], budget="6", settings={"ceiling": 9}, **SMALL)
    model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32).eval()
    pool = result.sets["pool"]
    for row in (0, 7):
        tokens = pool.tokens[row]
        said = [t for t in range(1, len(tokens.labels)) if tokens.labels[t] >= 0]
        ids = torch.tensor([int(tokens.input_ids[0]), *(int(tokens.input_ids[t]) for t in said)])
        with torch.no_grad():
            expected = torch.nn.functional.cross_entropy(model(input_ids=ids[None]).logits[0, :-1], ids[1:])
        assert float(result.pool.columns["loss/alone"][row]) == pytest.approx(float(expected), rel=1e-4)
    assert torch.allclose(result.selection.scores, result.pool.columns["loss"] / result.pool.columns["loss/alone"])
    stages = [cost.stage for cost in result.clock.costs]
    assert "forward pass of the answers alone" in stages
    assert not any("gradients" in stage for stage in stages)


def test_bm25_reads_words_alone(data: dict[str, str], tiny_model: Path) -> None:
    result = gs.select("bm25", model=str(tiny_model), pool=data["pool"], target=data["target"], budget="6", **SMALL)
    assert not any("pass" in cost.stage or "gradients" in cost.stage for cost in result.clock.costs)
    assert result.pool.columns["bm25/target"].max() > 0
    with pytest.raises(InvalidArgument, match=r"bm25 needs --target"):
        gs.select("bm25", model=str(tiny_model), pool=data["pool"], budget="6", **SMALL)


def lines_of(result: gs.Result) -> list[str]:
    return [*result.notes, *result.selection.notes]


def test_the_policy_is_played_on_a_live_model_and_the_model_is_left_as_it_was(
    data: dict[str, str], write_data: Write, tiny_model: Path, tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    quick = {"clusters": 3, "updates": 2, "episodes": 3, "batch": 2, "measurements": 2, "fidelity": "navigator"}
    run = {"model": model, "tokenizer": AutoTokenizer.from_pretrained(tiny_model), **data, "budget": "8", "dim": 256}
    for constraint in ("kl", "key"):
        result = gs.select("ogs", settings={**quick, "constraint": constraint}, navigator_rate=1e-2, **run)
        trace = result.selection.trace
        assert set(trace["measured"]) == {"ogs", "threshold", "random"}
        assert all(value["cost"] != 0 for value in trace["measured"].values())
        assert len(trace["navigator"]["reward/measured"]) == 2
        assert trace["measured_after"][-1] == 4
    assert any("the anchor was split: 3 examples give the references" in line for line in lines_of(result))
    assert result.references["anchor"].count == 3
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    again = gs.select("ogs", settings={**quick, "constraint": "key"}, navigator_rate=1e-2, **run)
    assert again.selection.rows.tolist() == result.selection.rows.tolist()
    assert again.selection.trace["measured"] == trace["measured"]


def test_a_navigator_scores_in_the_place_of_the_model(data: dict[str, str], tiny_model: Path, tmp_path: Path) -> None:
    small = tmp_path / "small"
    shutil.copytree(tiny_model, small)
    result = gs.select("orth-only", model=str(tiny_model), navigator=str(small), **data, budget="4", **SMALL)
    assert result.model.name == str(small)
    assert any("did the scoring; ask `gradsieve transfer`" in line for line in result.notes)
    assert result.overhead is not None
    pool, anchor = (sum(result.sets[role].lengths) for role in ("pool", "anchor"))
    chosen = int(result.pool.columns["tokens"][result.selection.rows].sum())
    assert (result.overhead.choosing, result.overhead.whole, result.overhead.chosen) == (pool + anchor, 3 * pool, 3 * chosen)
    assert gs.select("random", model=str(tiny_model), pool=data["pool"], budget="4").overhead is None


def test_replay_examples_join_the_pool_and_are_told(
    data: dict[str, str], write_data: Write, tiny_model: Path, tmp_path: Path
) -> None:
    replay = write_data("general", 9)
    quick = {"clusters": 3, "general_clusters": 2, "updates": 2, "episodes": 3}
    run = {"model": str(tiny_model), **data, **SMALL}
    result = gs.select("ogs", settings=quick, replay=(str(replay),), budget="50%", out=tmp_path / "out", **run)
    assert len(result.pool.ids) == 24 + 9
    clusters = result.selection.trace["clusters"]
    assert sum(c["rows"] for c in clusters if c["replay"]) == 9
    drawn = [example.id for example in result.examples if example.id.startswith("general")]
    assert result.selection.trace["replay_share"] == pytest.approx(len(drawn) / len(result.examples))
    lines = (tmp_path / "out" / "selected.jsonl").read_text().splitlines()
    assert sum(json.loads(line)["id"].startswith("general") for line in lines) == len(drawn)
    from gradsieve.outputs import replay as do_again

    assert do_again(tmp_path / "out" / "run.json", tmp_path / "again").selection.rows.tolist() == result.selection.rows.tolist()
    with pytest.raises(InvalidArgument, match="replay must be left out with less"):
        gs.select("less", replay=(str(replay),), budget="4", **run)
    with pytest.raises(InvalidArgument, match=r"replay must have ids of its own, got 'pool-0'"):
        gs.select("ogs", replay=(data["pool"],), budget="4", **run)
    with pytest.raises(InvalidArgument, match="the demo has pool, target and anchor"):
        gs.select("ogs", replay=("demo",), budget="4", **run)


def test_a_record_is_json_whatever_the_numbers(tiny_model: Path, tmp_path: Path) -> None:
    rows = [
        {"id": f"r{i}", "prompt": f"Letter {i}?", "completion": "a", "planted": [True, 3, None, "no"][i % 4]} for i in range(12)
    ]
    pool = tmp_path / "pool.jsonl"
    pool.write_text("".join(json.dumps(row) + "\n" for row in rows))
    done = gs.select("perplexity", model=str(tiny_model), pool=str(pool), budget="3", dtype="float32", out=str(tmp_path / "o"))
    assert math.isnan(done.selection.trace["length_correlation"]["loss"])  # all are of one length

    def refuse(word: str) -> None:
        raise AssertionError(word)

    record = json.loads((tmp_path / "o" / "run.json").read_text(), parse_constant=refuse)
    assert record["trace"]["length_correlation"]["loss"] is None
    assert "planted kinds" not in (tmp_path / "o" / "report.html").read_text()
