import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import gradsieve as gs
from gradsieve import cli
from gradsieve.clock import silent
from gradsieve.estimate import _Steps, estimate
from gradsieve.job import Job

Write = Callable[..., Path]


@pytest.fixture
def job(tiny_model: Path, write_data: Write, tmp_path: Path) -> Job:
    data = {
        role: (str(write_data(role, count, category="math")),)
        for role, count in (("pool", 300), ("target", 40), ("anchor", 40))
    }
    return Job(model=str(tiny_model), budget="10", dim=256, dtype="float32", store=str(tmp_path / "store"), **data)


def test_counts_are_of_the_whole_and_bytes_are_those_of_the_real_run(job: Job, tmp_path: Path) -> None:
    found = estimate("ogs-static", job, tokens=2000)
    result = gs.select("ogs-static", **{**vars(job), "store": None, "out": tmp_path / "run"})
    pool = result.sets["pool"]
    assert found.sets["pool"] == (300, sum(pool.lengths))
    assert set(found.sets) == {"pool", "target", "anchor"}
    assert found.share < 0.5
    real = {cost.stage: cost for cost in result.clock.costs}
    stages = {stage.stage: stage for stage in found.stages}
    assert set(stages) == set(real) - {"selection", "writing"}
    assert stages["gradients of the pool"].bytes == pytest.approx(real["gradients of the pool"].bytes, rel=0.35)
    assert found.memory > 100 * 2**20


def test_a_stage_is_scaled_by_the_tokens_of_its_set(job: Job) -> None:
    found = estimate("ogs-static", job, tokens=2000)
    stages = {stage.stage: stage for stage in found.stages}
    ratio = stages["gradients of the pool"].seconds / stages["gradients of the pool"].measured
    assert 3 < ratio < 30
    assert stages["loading the model"].seconds == stages["loading the model"].measured
    assert stages["references"].seconds > stages["references"].measured


@pytest.mark.parametrize("share", [0.0, 0.05])
def test_all_of_a_small_set_is_measured_as_it_is(job: Job, share: float) -> None:
    found = estimate("less", job, {"warmup_share": share}, tokens=10**9)
    assert found.share == 1
    assert all(stage.seconds == stage.measured for stage in found.stages)


def test_of_a_warm_up_the_steps_are_scaled_and_nothing_else(job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from gradsieve import warmup
    from gradsieve.train.trainer import PlannedTrainer

    step, hashed, rows = PlannedTrainer.training_step, warmup.hash_weights, []

    def slow(self: Any, model: Any, inputs: Any, *more: Any) -> Any:
        rows.append(len(inputs["step"].rows))
        time.sleep(0.02 * rows[-1])
        return step(self, model, inputs, *more)

    def slower(folder: Path) -> str:  # once a checkpoint, however large the pool
        time.sleep(1.0)
        return hashed(folder)

    monkeypatch.setattr(PlannedTrainer, "training_step", slow)
    monkeypatch.setattr(warmup, "hash_weights", slower)
    settings = {"warmup_share": 0.2, "warmup_epochs": 2}
    found = estimate("less", job, settings, tokens=2000)
    stages = {stage.stage: stage for stage in found.stages}
    measured, whole = sum(rows), 2 * 60
    assert measured < whole / 2
    assert max(rows) == 16  # a whole batch, as in full
    more = 0.02 * (whole - measured)
    assert 0.7 * more < stages["warm-up"].seconds - stages["warm-up"].measured < more + 2
    assert stages["loading the model (warm-up)"].seconds == stages["loading the model (warm-up)"].measured
    monkeypatch.undo()
    result = gs.select("less", settings=settings, **{**vars(job), "store": None, "out": tmp_path / "run"})
    real = {cost.stage: cost for cost in result.clock.costs}
    assert stages["warm-up"].bytes == pytest.approx(real["warm-up"].bytes, rel=0.05)


def test_nothing_is_left_behind(job: Job, tmp_path: Path) -> None:
    before = sorted(path.name for path in tmp_path.iterdir())
    estimate("random", job)
    assert sorted(path.name for path in tmp_path.iterdir()) == before


def test_the_command_takes_the_options_of_select(job: Job, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--model", job.model, "--pool", *job.pool, "--target", *job.target, "--dim", "128", "--dtype", "float32"]
    assert cli.run(["estimate", "gradmatch", *flags]) == 0
    shown = capsys.readouterr().out
    assert "pool: 300 usable examples" in shown
    assert "gradients of the pool" in shown
    assert "until the choice" in shown
    assert cli.run(["estimate", "gradmatch", "--model", job.model, "--pool", "nowhere.jsonl"]) == 2


def test_the_first_step_of_a_warm_up_which_starts_things_up_is_not_that_of_others() -> None:
    steps = _Steps(silent, [(10.0, 100), (1.0, 100), (3.0, 200)])
    assert steps.more(3.0) == pytest.approx(2 * 400 * 4.0 / 300)
    assert _Steps(silent, [(10.0, 100)]).more(2.0) == pytest.approx(10.0)
