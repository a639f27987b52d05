"""Warm-ups end to end on a tiny model: what is trained, what is taken where, what is reused, what is said when it fails."""

from __future__ import annotations

import importlib.util
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import gradsieve as gs
from gradsieve import warmup as module
from gradsieve.compute import ComputeSettings
from gradsieve.data import TokenSet
from gradsieve.gradients.settings import EngineSettings
from gradsieve.gradients.sketch import SketchPlan

Write = Callable[..., Path]
EXACT: dict[str, Any] = {"dim": 256, "dtype": "float64", "unit_tokens": 1500, "batch_tokens": 1500}
HALF = {"warmup_share": 0.5, "warmup_epochs": 2}


def twin() -> Any:
    """The naive gradients of tests/gradients: one backward pass per example in float64."""
    spec = importlib.util.spec_from_file_location("twin", Path(__file__).parent / "gradients" / "conftest.py")
    assert spec is not None
    assert spec.loader is not None
    loaded = importlib.util.module_from_spec(spec)
    sys.modules["twin"] = loaded
    spec.loader.exec_module(loaded)
    return loaded


@pytest.fixture
def data(write_data: Write) -> dict[str, str]:
    return {"pool": str(write_data("pool", 12)), "target": str(write_data("target", 3))}


def warmups(store: Path) -> list[Path]:
    return sorted(store.glob("warmup-*"))


def stages(result: gs.Result) -> list[str]:
    return [cost.stage for cost in result.clock.costs]


def adapted(tiny_model: Path, folder: Path) -> Any:
    """The tiny model in float64 with the adapters of a folder."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float64)
    with pytest.warns(FutureWarning):
        return PeftModel.from_pretrained(model, folder).get_base_model().double().eval()


def gamma_naive(g: Tensor, m: Tensor, v: Tensor, t: int, less_form: bool) -> Tensor:
    m, v = 0.9 * m.double() + 0.1 * g, 0.999 * v.double() + 0.001 * g**2
    if less_form:
        return m / (v + 1e-8).sqrt()
    return (m / (1 - 0.9 ** (t + 1))) / ((v / (1 - 0.999 ** (t + 1))).sqrt() + 1e-8)


def state_of(folder: Path) -> dict[str, tuple[Tensor, Tensor, int]]:
    """The optimizer's m, v and t by parameter name, as the trainer wrote them."""
    content = torch.load(folder / "optimizer.pt", weights_only=True)
    names = json.loads((folder / "parameters.json").read_text())
    return {
        names[i].removeprefix("base_model.model."): (s["exp_avg"], s["exp_avg_sq"], int(s["step"]))
        for i, s in content["state"].items()
    }


@pytest.mark.parametrize("less_form", [False, True])
def test_less_is_the_dense_reference_at_every_checkpoint(
    less_form: bool, data: dict[str, str], tiny_model: Path, tmp_path: Path
) -> None:
    method = gs.LESS(**HALF, less_form=less_form)
    target = tmp_path / "grouped.jsonl"
    rows = [json.loads(line) for line in Path(data["target"]).read_text().splitlines()]
    category = ("skin", "heart", "skin")
    target.write_text("".join(json.dumps({**row, "category": c}) + "\n" for row, c in zip(rows, category, strict=True)))
    data = data | {"target": str(target)}
    result = gs.select(method, model=str(tiny_model), **data, budget="4", store=str(tmp_path / "s"), **EXACT)
    assert result.pool.checkpoints == ("epoch-1", "epoch-2")
    own, plan = twin(), SketchPlan(256, 0)
    (folder,) = warmups(tmp_path / "s")
    facts = json.loads((folder / "training" / "trained.json").read_text())["checkpoints"]
    rates = [fact["learning_rate"] for fact in facts]
    assert rates[0] > rates[1] > 0
    assert result.selection.trace["shares"] == pytest.approx([rate / sum(rates) for rate in rates])
    sketched, dense = torch.zeros(12, 3, dtype=torch.float64), torch.zeros(12, 3, dtype=torch.float64)
    for fact in facts:
        checkpoint = folder / "training" / fact["folder"]
        model, state = adapted(tiny_model, checkpoint), state_of(checkpoint)
        names = [name for name, _ in model.named_parameters() if "lora_" in name]
        assert set(names) == set(state)
        sides = {}
        for role in ("pool", "target"):
            tokens = result.sets[role].tokens
            rows = [own.Row(torch.as_tensor(t.input_ids), torch.as_tensor(t.labels)) for t in tokens]
            true = own.naive(model, rows)
            if role == "pool":
                for g in true.gradients:
                    g.update({name: gamma_naive(g[name], *state[name], less_form) for name in names})
            sketches = torch.stack([true.sketch(z, names, plan) for z in range(len(rows))])
            whole = torch.stack([torch.cat([g[name].flatten() for name in names]) for g in true.gradients])
            sides[role] = [torch.nn.functional.normalize(X.double(), dim=1) for X in (sketches, whole)]
        share = fact["learning_rate"] / sum(rates)
        sketched += share * (sides["pool"][0] @ sides["target"][0].T)
        dense += share * (sides["pool"][1] @ sides["target"][1].T)
    grouped = [torch.stack([S[:, 1], S[:, [0, 2]].mean(1)]) for S in (sketched, dense)]
    (sketched, nearest), dense = grouped[0].max(0), grouped[1].amax(0)
    assert result.selection.scores.tolist() == pytest.approx(sketched.tolist(), abs=1e-3)  # stored as float16
    assert (result.selection.scores - dense).abs().mean() < 2 * 256**-0.5
    assert result.selection.rows.tolist() == sketched.argsort(descending=True)[:4].tolist()
    served = nearest[result.selection.rows].bincount(minlength=2).tolist()
    assert result.selection.trace["chosen_per_group"] == {"heart": served[0], "skin": served[1]}


def test_the_probe_scores_every_example_where_it_ends_and_leaves_the_model_as_it_was(
    data: dict[str, str], tiny_model: Path, tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    live = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float64)
    before = {name: tensor.clone() for name, tensor in live.state_dict().items()}
    common = {"pool": data["pool"], "budget": "4", **EXACT}
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    of_object = gs.select("grads", model=live, tokenizer=tokenizer, store=str(tmp_path / "a"), out=tmp_path / "out", **common)
    assert live.state_dict().keys() == before.keys()
    assert all(torch.equal(tensor, before[name]) for name, tensor in live.state_dict().items())
    assert not hasattr(live, "peft_config")
    assert "warm-up" in stages(of_object)
    (folder,) = warmups(tmp_path / "a")
    own = twin()
    true = own.naive(
        adapted(tiny_model, folder / "training" / "model"),
        [own.Row(torch.as_tensor(t.input_ids), torch.as_tensor(t.labels)) for t in of_object.sets["pool"].tokens],
    )
    assert of_object.pool.columns["loss"].tolist() == pytest.approx(true.losses)
    for column, name in (("norm/embedding", true.ends[0]), ("norm/lm_head", true.ends[1])):
        norms = [g[name].norm().item() for g in true.gradients]
        assert of_object.pool.columns[column].tolist() == pytest.approx(norms, rel=1e-6)
    scores = pq.read_table(tmp_path / "out" / "scores.parquet").to_pydict()
    for group, name in (("embedding", true.ends[0]), ("lm_head", true.ends[1])):
        G = torch.stack([g[name].flatten() for g in true.gradients])
        assert scores[f"max/{group}"] == pytest.approx(G.amax(1).tolist(), rel=1e-6)
        assert scores[f"min/{group}"] == pytest.approx(G.amin(1).tolist(), rel=1e-6)
        assert scores[f"mean/{group}"] == pytest.approx(G.mean(1).tolist(), abs=1e-12)
        assert scores[f"sd/{group}"] == pytest.approx(G.std(1, correction=0).tolist(), rel=1e-6)
        assert scores[f"norm/{group}"] == pytest.approx(G.norm(dim=1).tolist(), rel=1e-6)
    of_folder = gs.select("grads", model=str(tiny_model), store=str(tmp_path / "b"), **common)
    assert of_folder.pool.columns["loss"].tolist() == pytest.approx(true.losses)
    as_it_is = gs.select("grads", settings={"probe_epochs": 0}, model=str(tiny_model), store=str(tmp_path / "b"), **common)
    assert "warm-up" not in stages(as_it_is)
    assert not torch.allclose(as_it_is.pool.columns["loss"], of_folder.pool.columns["loss"], rtol=1e-4)
    assert of_folder.model.weights == as_it_is.model.weights
    spent = [result.overhead for result in (of_object, as_it_is)]
    assert spent[0] is not None
    assert spent[1] is not None
    assert spent[0].choosing == pytest.approx(2 * spent[1].choosing)  # an epoch of training, and a pass for gradients
    (note,) = (note for note in of_folder.notes if "warm-up" in note)
    assert "1 epoch of 12 of the 12 usable examples (lora, 1 steps" in note


def test_a_probe_of_all_weights_trains_a_copy(data: dict[str, str], tiny_model: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    live = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    before = {name: tensor.clone() for name, tensor in live.state_dict().items()}
    method = gs.GrADS(probe="full", diversity_weight=0.0, novelty_weight=0.0)
    common = {"pool": data["pool"], "budget": "4", **EXACT, "dtype": "float32"}
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    probed = gs.select(method, model=live, tokenizer=tokenizer, store=str(tmp_path / "s"), **common)
    assert all(torch.equal(tensor, before[name]) for name, tensor in live.state_dict().items())
    (folder,) = warmups(tmp_path / "s")
    trained = load_file(folder / "training" / "model" / "model.safetensors")
    assert any(not torch.equal(trained[name], before[name]) for name in trained)
    assert probed.overhead is not None
    assert probed.overhead.choosing == pytest.approx(2.5 * probed.overhead.whole / 3)  # all weights: half as much again
    for tensor in live.parameters():
        tensor.requires_grad_(False)
    live.load_state_dict(trained, strict=False)
    own = twin()
    rows = [own.Row(torch.as_tensor(t.input_ids), torch.as_tensor(t.labels)) for t in probed.sets["pool"].tokens]
    assert probed.pool.columns["loss"].tolist() == pytest.approx(own.naive(live, rows).losses, rel=1e-4)


def test_a_warm_up_is_made_once_for_all_who_want_it(data: dict[str, str], tiny_model: Path, tmp_path: Path) -> None:
    store = tmp_path / "s"
    common = {"model": str(tiny_model), **data, "budget": "4", "store": str(store), **EXACT}
    first = gs.select("g2is", settings=HALF, **common)
    assert first.pool.checkpoints == ("epoch-2",)
    assert [stage for stage in stages(first) if "pool" in stage] == ["gradients of the pool"]
    less = gs.select("less", settings=HALF, **common)
    assert "warm-up" not in stages(less)
    assert less.pool.checkpoints == ("epoch-1", "epoch-2")
    assert [stage for stage in stages(less) if "pool" in stage] == ["gradients of the pool (epoch-1)"]
    plain = gs.select("less", settings={"warmup_share": 0}, **common)
    assert plain.pool.checkpoints == ("base",)
    assert len(warmups(store)) == 1
    made = {path: path.stat().st_mtime_ns for path in store.rglob("*") if path.is_file()}
    again = gs.select("less", settings=HALF, **common)
    assert torch.equal(again.selection.scores, less.selection.scores)
    assert {path: path.stat().st_mtime_ns for path in store.rglob("*") if path.is_file()} == made
    shuffled = tmp_path / "shuffled.jsonl"
    shuffled.write_text("".join(reversed(Path(data["pool"]).read_text().splitlines(keepends=True))))
    other = gs.select("less", settings=HALF, **(common | {"pool": str(shuffled)}))
    assert [example.id for example in other.examples] == [example.id for example in less.examples]
    assert len(warmups(store)) == 1


class Stop(Exception):
    """Somebody pulls the plug."""


CONSTANT = "batch: 4\nlearning_rate: 1e-2\nschedule: constant\nwarmup: 0\nweight_decay: 0.0\nsave_steps: 1\n"


def loss_of(model: Any, tokens: Any) -> Tensor:
    ids, labels = torch.as_tensor(tokens.input_ids).long(), torch.as_tensor(tokens.labels).long()
    logits = model(input_ids=ids[None]).logits[0, :-1].double()
    return torch.nn.functional.cross_entropy(logits, labels[1:], ignore_index=-100)


@pytest.mark.parametrize("epochs", [1, 2])
def test_online_signals_are_those_of_a_loop_that_takes_gradients_before_each_step(
    epochs: int, data: dict[str, str], tiny_model: Path, tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM

    from gradsieve.train import Recipe
    from gradsieve.train.plan import make_plan

    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(CONSTANT)
    lines = Path(data["pool"]).read_text().splitlines()
    pool = tmp_path / "pool.jsonl"  # row 0 stands there twice, under another id
    pool.write_text("\n".join([*lines, json.dumps({**json.loads(lines[0]), "id": "zz"})]) + "\n")
    method = gs.GrADS(probe="full", online=True, probe_epochs=epochs)
    common = {"pool": str(pool), "warmup_recipe": str(recipe), "budget": "4", **EXACT}
    result = gs.select(method, model=str(tiny_model), store=str(tmp_path / "s"), out=tmp_path / "out", **common)
    scores = pq.read_table(tmp_path / "out" / "scores.parquet").to_pydict()
    assert result.pool.checkpoints == ("online",)

    own, tokens = twin(), result.sets["pool"].tokens
    by_id = sorted(range(13), key=result.sets["pool"].ids.__getitem__)
    model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float64).eval()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.0)
    plan = make_plan(Recipe(batch=4, epochs=epochs), 13)
    assert len(plan) == 4 * epochs
    met: set[int] = set()
    for step in plan:
        rows = [by_id[row] for row in step.rows]
        if step.epoch > epochs - 1:
            true = own.naive(model, [own.Row(*map(torch.as_tensor, (tokens[z].input_ids, tokens[z].labels))) for z in rows])
            for i, z in enumerate(rows):
                equal = {0, 12} if z in (0, 12) else {z}  # both are recorded at the first step that one of them is in
                for row in equal - met:
                    met.add(row)
                    assert scores["loss"][row] == pytest.approx(true.losses[i], rel=1e-9)
                    for group, name in zip(("embedding", "lm_head"), true.ends, strict=True):
                        G = true.gradients[i][name]
                        assert scores[f"norm/{group}"][row] == pytest.approx(G.norm().item(), rel=1e-6)
                        assert scores[f"max/{group}"][row] == pytest.approx(G.max().item(), rel=1e-6)
                        assert scores[f"min/{group}"][row] == pytest.approx(G.min().item(), rel=1e-6)
                        assert scores[f"mean/{group}"][row] == pytest.approx(G.mean().item(), abs=1e-12)
                        assert scores[f"sd/{group}"][row] == pytest.approx(G.std(correction=0).item(), rel=1e-6)
        optimizer.zero_grad()
        torch.stack([loss_of(model, tokens[z]) for z in rows]).mean().backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    assert sorted(met) == list(range(13))
    after = gs.select(gs.GrADS(probe="full", probe_epochs=epochs), model=str(tiny_model), store=str(tmp_path / "s"), **common)
    assert not torch.allclose(after.pool.columns["loss"], result.pool.columns["loss"], rtol=1e-3)
    first, second = warmups(tmp_path / "s")
    weights = Path("training") / "model" / "model.safetensors"
    assert (first / weights).read_bytes() == (second / weights).read_bytes()  # recording does not touch the training
    again = gs.select(method, model=str(tiny_model), store=str(tmp_path / "s"), **common)
    assert "warm-up" not in stages(again)
    assert torch.equal(again.selection.scores, result.selection.scores)
    (note,) = (note for note in result.notes if "recorded within a warm-up" in note)
    facts = json.loads(next((tmp_path / "s").glob("warmup-*/online")).with_name("warmup.json").read_text())
    assert 0 < facts["recording"] < facts["seconds"]
    assert f"{facts['recording']:.1f} s of them for recording" in note


def test_a_killed_probe_that_records_goes_on_and_ends_in_the_same_gradients(
    data: dict[str, str], tiny_model: Path, tmp_path: Path
) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("batch: 2\nlearning_rate: 1e-3\nsave_steps: 2\n")
    common = {"model": str(tiny_model), "pool": data["pool"], "budget": "4", "warmup_recipe": str(recipe), **EXACT}
    method = gs.GrADS(online=True)
    whole = gs.select(method, store=str(tmp_path / "whole"), **common)

    def pull(stage: str, done: int, total: int) -> None:
        if stage == "warm-up" and done > 0.4 * total:
            raise Stop

    with pytest.raises(Stop):
        gs.select(method, store=str(tmp_path / "killed"), progress=pull, **common)
    (folder,) = warmups(tmp_path / "killed")
    shards = folder / "online" / "pool" / "shards"
    written = {path: path.stat().st_mtime_ns for path in shards.iterdir()}
    assert 0 < len(written) < 6
    resumed = gs.select(method, store=str(tmp_path / "killed"), **common)
    assert len(list(shards.iterdir())) == 6
    assert all(path.stat().st_mtime_ns == time for path, time in written.items())
    assert torch.equal(resumed.selection.scores, whole.selection.scores)
    assert resumed.pool.columns.keys() == whole.pool.columns.keys()
    assert all(torch.equal(column, whole.pool.columns[name]) for name, column in resumed.pool.columns.items())
    next(shards.iterdir()).unlink()
    with pytest.raises(
        gs.DataError, match=r"must hold the gradients that the warm-up recorded, got 1 of .*; remove .*warmup-\w+"
    ):
        gs.select(method, store=str(tmp_path / "killed"), **common)


@pytest.mark.parametrize("probe", ["lora", "full"])
def test_a_probe_that_records_in_half_precision(probe: Any, data: dict[str, str], tiny_model: Path, tmp_path: Path) -> None:
    common = {"model": str(tiny_model), "pool": data["pool"], "budget": "4", "store": str(tmp_path / "s"), "dtype": "bfloat16"}
    result = gs.select(gs.GrADS(online=True, probe=probe), **common, dim=64)
    before = gs.select(gs.GrADS(probe_epochs=0), **common, dim=64)
    assert result.pool.columns["norm/lm_head"].tolist() == pytest.approx(before.pool.columns["norm/lm_head"].tolist(), rel=0.05)


def test_a_killed_warm_up_goes_on_and_ends_in_the_same_weights(data: dict[str, str], tiny_model: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("batch: 2\nlearning_rate: 1e-3\nsave_steps: 2\n")
    common = {"model": str(tiny_model), **data, "budget": "4", "warmup_recipe": str(recipe), **EXACT}
    whole = gs.select("less", settings=HALF, store=str(tmp_path / "whole"), **common)

    def pull(stage: str, done: int, total: int) -> None:
        if stage == "warm-up" and done > 0.6 * total:
            raise Stop

    with pytest.raises(Stop):
        gs.select("less", settings=HALF, store=str(tmp_path / "killed"), progress=pull, **common)
    (folder,) = warmups(tmp_path / "killed")
    assert not (folder / "warmup.json").exists()
    resumed = gs.select("less", settings=HALF, store=str(tmp_path / "killed"), **common)
    assert torch.equal(resumed.selection.scores, whole.selection.scores)
    (twin_folder,) = warmups(tmp_path / "whole")
    assert folder.name == twin_folder.name
    file = Path("training") / "model" / "adapter_model.safetensors"
    assert (folder / file).read_bytes() == (twin_folder / file).read_bytes()


def test_moments_that_are_gone_are_named_with_the_command_that_makes_them(
    data: dict[str, str], tiny_model: Path, tmp_path: Path
) -> None:
    common = {"model": str(tiny_model), **data, "budget": "4", "store": str(tmp_path / "s"), **EXACT}
    whole = gs.select("g2is", settings=HALF, **common)
    (folder,) = warmups(tmp_path / "s")
    first, last = sorted(folder.rglob("optimizer.pt"))
    shutil.copy(first, last)
    gs.select("g2is", settings=HALF, **common)  # nothing is missing in the store
    next((folder / "epoch-2" / "pool" / "shards").iterdir()).unlink()
    with pytest.raises(gs.DataError, match="must hold the moments that the warm-up left, got others; remove "):
        gs.select("g2is", settings=HALF, **common)
    first.unlink()
    last.unlink()
    with pytest.raises(gs.DataError, match=r"must hold Adam's moments .* got neither; remove .*warmup-\w+ and run the same"):
        gs.select("g2is", settings=HALF, **common)
    shutil.rmtree(folder)
    again = gs.select("g2is", settings=HALF, **common)
    assert [example.id for example in again.examples] == [example.id for example in whole.examples]


def test_without_the_packages_that_train_the_cure_is_named_before_anything_is_loaded(
    data: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    real = importlib.util.find_spec
    monkeypatch.setattr(module.importlib.util, "find_spec", lambda name: None if name == "trl" else real(name))
    for method, cure in (("grads", "--probe-epochs 0"), ("less", "--warmup-share 0"), ("g2is", "--warmup-share 0")):
        with pytest.raises(
            gs.MissingExtra, match=rf"^{method} fine-tunes the model .*pip install 'gradsieve\[train\]'.*{cure}"
        ):
            gs.select(method, model="nowhere/at-all", **data, budget="4")


def test_a_recipe_is_read_and_may_not_set_what_the_method_decides(
    data: dict[str, str], tiny_model: Path, tmp_path: Path
) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("batch: 3\nrank: 2\n")
    compute = ComputeSettings(EngineSettings(), torch.float32, "cpu", 100)
    made = module.recipe_of(gs.Warmup(0.5, 2, candidates="adam"), str(recipe), 6, 7, compute)
    assert (made.batch, made.rank, made.epochs, made.tuning, made.seed, made.save_epochs) == (3, 2, 2, "lora", 7, True)
    for wrong, message in (("epochs: 3", "must leave epochs to the method"), ("bach: 3", "got bach"), ("[", "readable YAML")):
        recipe.write_text(wrong)
        with pytest.raises((gs.InvalidArgument, gs.DataError), match=message):
            gs.select("grads", model=str(tiny_model), pool=data["pool"], budget="4", warmup_recipe=str(recipe), **EXACT)


@pytest.mark.parametrize(
    ("warmup", "count", "expected"),
    [
        (gs.Warmup(1.0, 1), 24, {"epochs": 1, "save_epochs": False, "warmup": 0.0, "batch": 16}),
        (gs.Warmup(1.0, 5), 32, {"epochs": 5, "save_epochs": False, "warmup": 0.1}),
        (gs.Warmup(1.0, 1, "full"), 24, {"tuning": "full", "dtype": "bfloat16"}),
        (gs.Warmup(1.0, 2, checkpoints="all"), 24, {"save_epochs": True, "dtype": "model", "device": "cpu"}),
    ],
)
def test_the_built_in_recipe(warmup: gs.Warmup, count: int, expected: dict[str, Any]) -> None:
    compute = ComputeSettings(EngineSettings(), torch.bfloat16, "cpu", 100)
    made = module.recipe_of(warmup, None, count, 0, compute).to_mapping()
    assert {key: made[key] for key in expected} == expected


def tokens_of(count: int, order: list[int]) -> TokenSet:
    examples = [gs.Example(f"{i:02d}", (), b"", "memory") for i in order]
    from gradsieve.data import Tokens

    tokens = [Tokens(torch.tensor([i]).numpy(), torch.tensor([i]).numpy(), False) for i in order]
    return TokenSet("pool", examples, list(range(count)), tokens, [b""] * count, [])


def test_the_part_is_drawn_at_random_in_the_order_of_the_ids() -> None:
    forth, back = tokens_of(30, list(range(30))), tokens_of(30, list(range(29, -1, -1)))
    drawn = [int(t.input_ids[0]) for t in module.part_of(forth, 0.2, 0).tokens]
    assert len(drawn) == 6
    assert drawn == sorted(drawn)
    assert drawn == [int(t.input_ids[0]) for t in module.part_of(back, 0.2, 0).tokens]
    assert drawn != [int(t.input_ids[0]) for t in module.part_of(forth, 0.2, 1).tokens]
    assert len(module.part_of(forth, 0.01, 0).kept) == 1  # rounded up
    assert len(module.part_of(forth, 0.1, 0).kept) == 3
    assert len(module.part_of(forth, 1.0, 0).kept) == 30


@pytest.mark.parametrize(("wrong", "message"), [({"share": 0.0}, r"\(0, 1\], got 0"), ({"epochs": 0}, "at least 1, got 0")])
def test_a_warm_up_that_is_none_is_refused(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(gs.InvalidArgument, match=message):
        gs.Warmup(**({"share": 0.1, "epochs": 1} | wrong))


def test_a_record_that_is_broken_is_named(data: dict[str, str], tiny_model: Path, tmp_path: Path) -> None:
    (tmp_path / "warmup.json").write_text('{"examples": 3}')
    with pytest.raises(gs.DataError, match=r"warmup.json: must be the record of a warm-up, got .*; remove the folder"):
        module._read(tmp_path / "warmup.json")


def test_a_run_after_a_warm_up_can_be_replayed(data: dict[str, str], tiny_model: Path, tmp_path: Path) -> None:
    from gradsieve.outputs import replay

    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("batch: 4\n")
    run = tmp_path / "o" / "run.json"
    gs.select(
        "g2is", settings=HALF, model=str(tiny_model), **data, budget="4", out=run.parent, warmup_recipe=str(recipe), **EXACT
    )
    record = json.loads(run.read_text())
    assert record["job"]["warmup_recipe"] == str(recipe)
    assert "warm-up" in [stage["stage"] for stage in record["stages"]]
    assert len(replay(run, tmp_path / "again").examples) == len((run.parent / "selected.jsonl").read_text().splitlines())
