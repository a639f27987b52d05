from collections.abc import Callable
from pathlib import Path

import pytest

import gradsieve as gs
from gradsieve import cli
from gradsieve.estimate import estimate
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


def test_all_of_a_small_set_is_measured_as_it_is(job: Job) -> None:
    found = estimate("less", job, {"warmup_share": 0.0}, tokens=10**9)
    assert found.share == 1
    assert all(stage.seconds == stage.measured for stage in found.stages)


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
