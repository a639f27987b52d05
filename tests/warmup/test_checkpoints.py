"""Warm-ups end to end: what is taken at which checkpoint, what is reused, gone on with, missed and replayed."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from torch import Tensor

import gradsieve as gs
from gradsieve import warmup as module
from gradsieve.gradients.sketch import SketchPlan

from .conftest import EXACT, HALF, Stop, adapted, stages, twin, warmups


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
