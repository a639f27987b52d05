"""Stores that several runs share, and go on in after a kill."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import gradsieve as gs
from gradsieve.errors import StoreMismatch
from gradsieve.pipeline import extract

LESS, GRADS = gs.LESS(warmup_share=0.0), gs.GrADS(probe_epochs=0)  # at the model as it is; warm-ups: tests/warmup
Write = Callable[..., Path]
SMALL = {"dim": 256, "dtype": "float32", "unit_tokens": 400, "batch_tokens": 200}


def test_a_store_serves_methods_that_need_less_and_refuses_others(
    data: dict[str, str], tiny_model: Path, tmp_path: Path
) -> None:
    common = {"model": str(tiny_model), **data, "budget": "5", **SMALL}
    store = str(tmp_path / "store")
    gs.select("ogs-static", store=store, settings={"against": "contrast"}, **common)
    before = {p: p.stat().st_mtime_ns for p in Path(store).rglob("*.safetensors")}
    gs.select(GRADS, store=store, **common)
    gs.select(LESS, store=store, **common)
    assert all(p.stat().st_mtime_ns == time_ for p, time_ in before.items())
    with pytest.raises(StoreMismatch, match=r"sketch\.dim 256 in the store, 1024 asked for"):
        gs.select(GRADS, store=store, **(common | {"dim": 1024}))
    with pytest.raises(StoreMismatch, match=r"references\.anchor absent in the store"):
        gs.select("orth-only", store=store, **common)


def test_a_reused_store_shows_only_the_references_asked_for(
    data: dict[str, str], tiny_model: Path, write_data: Write, tmp_path: Path
) -> None:
    code = str(write_data("code", 6, category="code"))
    settings = {"against": "contrast", "form": "filter", "draw": "random", "drop": 50.0}
    common = {"model": str(tiny_model), "pool": data["pool"], "budget": "6", "settings": settings, **SMALL}
    store = str(tmp_path / "store")
    gs.select("ogs-static", target=data["target"], anchor=(data["anchor"], code), store=store, **common)
    reused = gs.select("ogs-static", anchor=data["anchor"], store=store, **common)
    alone = gs.select("ogs-static", anchor=data["anchor"], store=str(tmp_path / "other"), **common)
    assert reused.selection.trace["references"] == ["contrast/anchor:arithmetic"]
    assert set(reused.references) == {"contrast/anchor:arithmetic"}
    assert [e.id for e in reused.examples] == [e.id for e in alone.examples]


def test_a_forward_pass_does_where_no_gradient_is_read_and_beside_gradients_gives_the_same(
    data: dict[str, str], tiny_model: Path, tmp_path: Path
) -> None:
    common = {"model": str(tiny_model), "pool": data["pool"], "target": data["target"], "budget": "6", **SMALL}
    alone = gs.select("rds", store=str(tmp_path / "alone"), **common)
    assert [cost.stage for cost in alone.clock.costs if "forward" in cost.stage or "gradients" in cost.stage] == [
        "forward pass of the pool",
        "forward pass of the target",
    ]
    assert {p.name for p in (tmp_path / "alone").iterdir()} == {"forward"}
    assert (alone.pool.dim, alone.pool.checkpoints, alone.pool.representations) == (0, (), ("hidden",))
    extract(
        gs.Job(model=str(tiny_model), store=str(tmp_path / "both"), pool=(data["pool"],), target=(data["target"],), **SMALL)
    )
    beside = gs.select("rds", store=str(tmp_path / "both"), **common)
    assert {p.name for p in (tmp_path / "both").iterdir()} == {"pool", "target", "excluded.jsonl"}
    assert beside.pool.dim == 256
    assert torch.equal(alone.selection.rows, beside.selection.rows)
    assert torch.allclose(alone.selection.scores, beside.selection.scores, atol=1e-3)
    one_by_one = gs.select("rds", store=str(tmp_path / "other"), **(common | {"batch_tokens": 1}))  # no padding
    assert torch.allclose(alone.selection.scores, one_by_one.selection.scores, atol=1e-3)


def test_a_forward_pass_and_gradients_share_a_store_folder_in_either_order(
    data: dict[str, str], tiny_model: Path, tmp_path: Path
) -> None:
    common = {"model": str(tiny_model), "pool": data["pool"], "target": data["target"], "budget": "6", **SMALL}
    first, second = str(tmp_path / "first"), str(tmp_path / "second")
    for store, methods in ((first, ("perplexity", "rds", "gradmatch")), (second, ("gradmatch", "rds", "perplexity"))):
        chosen = {method: gs.select(method, store=store, **common).selection.rows.tolist() for method in methods}
        assert chosen == {m: gs.select(m, store=str(tmp_path / m), **common).selection.rows.tolist() for m in methods}


def test_an_unfinished_store_is_finished_with_what_it_was_begun_with(
    data: dict[str, str], tiny_model: Path, tmp_path: Path
) -> None:
    store = tmp_path / "store"
    common = {"model": str(tiny_model), "budget": "3", "store": str(store), **SMALL}
    gs.select("ogs-static", **data, **common)
    shard = max((store / "pool" / "shards").iterdir())
    shard.unlink()
    with pytest.raises(StoreMismatch, match="must be finished with the references it was begun with"):
        gs.select(GRADS, pool=data["pool"], **common)
    fewer = tmp_path / "fewer.jsonl"
    fewer.write_text("".join(Path(data["pool"]).read_text().splitlines(keepends=True)[:-1]))
    common["store"] = str(tmp_path / "plain")
    gs.select(GRADS, pool=data["pool"], **common)
    for part in (tmp_path / "plain" / "pool" / "shards").iterdir():
        part.unlink()
    with pytest.raises(gs.StoreError, match="must be finished with the examples it was begun with"):
        gs.select(GRADS, pool=str(fewer), **common)


def test_a_killed_run_ends_with_the_bytes_of_a_whole_one(write_data: Write, tiny_model: Path, tmp_path: Path) -> None:
    data = {"pool": str(write_data("pool", 150)), "target": str(write_data("target", 10))}
    command = [
        sys.executable, "-m", "gradsieve.cli", "select", "less", "--warmup-share", "0", "--model", str(tiny_model),
        "--pool", data["pool"],
        "--target", data["target"], "--budget", "10%", "--dim", "256", "--dtype", "float32", "--unit-tokens", "500",
    ]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}

    def run(out: str) -> subprocess.Popen[bytes]:
        folder = ["--out", str(tmp_path / out)]
        return subprocess.Popen([*command, *folder], env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)

    def shards(out: str) -> dict[str, bytes]:
        store = tmp_path / out / "store"
        return {str(p.relative_to(store)): p.read_bytes() for p in sorted(store.rglob("*.safetensors"))}

    whole = run("whole")
    assert whole.wait() == 0, whole.stderr.read().decode()
    killed = run("killed")
    deadline = time.monotonic() + 180
    while len(shards("killed")) < 4:
        assert time.monotonic() < deadline
        assert killed.poll() is None, killed.stderr.read().decode()
        time.sleep(0.005)
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    there = {p: p.stat().st_mtime_ns for p in (tmp_path / "killed" / "store").rglob("0*.safetensors")}
    assert len(there) < len(shards("whole"))
    resumed = run("killed")
    assert resumed.wait() == 0, resumed.stderr.read().decode()
    assert shards("killed") == shards("whole")
    assert all(path.stat().st_mtime_ns == changed for path, changed in there.items())
    assert (tmp_path / "killed" / "selected.jsonl").read_bytes() == (tmp_path / "whole" / "selected.jsonl").read_bytes()
    for process in (whole, killed, resumed):
        process.stderr.close()
