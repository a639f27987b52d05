"""Probes end to end: where examples are scored, what is recorded within the training, and the model as it was."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import gradsieve as gs

from .conftest import EXACT, Stop, adapted, stages, twin, warmups

CONSTANT = "batch: 4\nlearning_rate: 1e-2\nschedule: constant\nwarmup: 0\nweight_decay: 0.0\nsave_steps: 1\n"


def loss_of(model: Any, tokens: Any) -> Tensor:
    ids, labels = torch.as_tensor(tokens.input_ids).long(), torch.as_tensor(tokens.labels).long()
    logits = model(input_ids=ids[None]).logits[0, :-1].double()
    return torch.nn.functional.cross_entropy(logits, labels[1:], ignore_index=-100)


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
