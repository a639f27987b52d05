from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import gradsieve as gs
from gradsieve import check as module
from gradsieve import cli, store
from gradsieve.check import TOLERANCES, Compared, errors_of
from gradsieve.gradients.loop import Loop, Truth
from gradsieve.gradients.settings import EngineSettings
from gradsieve.models import find_model
from gradsieve.pipeline import extract
from gradsieve.references import measure_references

Write = Callable[..., Path]
SMALL: dict[str, Any] = {"dim": 256, "dtype": "float32", "unit_tokens": 400, "batch_tokens": 200}


@pytest.fixture
def job(write_data: Write, tiny_model: Path, tmp_path: Path) -> gs.Job:
    roles = {
        "pool": (str(write_data("pool", 24)),),
        "target": (str(write_data("target", 6)),),
        "anchor": (str(write_data("anchor", 6, category="arithmetic")),),
    }
    return gs.Job(model=str(tiny_model), store=str(tmp_path / "store"), **roles, **SMALL)


def flags(job: gs.Job) -> list[str]:
    given = {"model": job.model, "pool": job.pool[0], "target": job.target[0], "store": str(job.store), **SMALL}
    return [word for key, value in given.items() for word in (f"--{key.replace('_', '-')}", str(value))]


@pytest.mark.parametrize(
    "changes", [{}, {"params": "all"}, {"params": "all", "dim": 65536}, {"reduction": "sum", "dtype": "float64"}]
)
def test_a_store_agrees_with_the_loop(job: gs.Job, changes: dict[str, Any]) -> None:
    done = extract(dataclasses.replace(job, **changes), check=3)
    names = {one.name for one in done.checked}
    dots = {"dot/target", "dot/anchor", "dot/anchor:arithmetic", "dot/contrast/target"}
    assert {"loss", "completion_tokens", "norm", "sketch", "norm/embedding", "min/lm_head"} | dots <= names
    for one in done.checked:
        assert one.passed, one
        assert one.worst in done.problem.candidates.ids
    assert max(one.error for one in done.checked) > 0


def test_progress_is_told_in_tokens(job: gs.Job) -> None:
    seen: list[tuple[int, int]] = []
    done = extract(job, lambda stage, *report: seen.append(report) if stage == "check" else None, check=24)
    tokens = int(done.problem.candidates.columns["tokens"].sum())
    assert len(seen) == 24
    assert seen[-1] == (tokens, tokens)
    assert seen[0][0] > 1


def test_an_error_of_an_extreme_is_measured_against_the_largest_entry_of_either_sign(tiny_llama: Callable[..., Any]) -> None:
    model = tiny_llama().double()
    loop = Loop(model, EngineSettings("linear", layers="extremes", signals=False), {})
    true = loop.example([1, 2, 3, 4, 5], [-100, -100, 3, 4, 5])
    by_sign = {True: 0, False: 0}
    for name, parameter in model.named_parameters():
        if f"max/{name}" in true.scales and parameter.grad is not None:
            g = parameter.grad
            assert true.scales[f"max/{name}"] == true.scales[f"min/{name}"] == pytest.approx(float(g.abs().max()))
            assert true.columns[f"max/{name}"] == pytest.approx(float(g.max()))
            by_sign[bool(g.max() > -g.min())] += 1
    assert min(by_sign.values()) > 0  # the largest is a negative one in some


def test_the_command_prints_a_table_and_finds_a_wrong_row(
    job: gs.Job, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    command = ["extract", *flags(job), "--check", "4"]
    assert cli.run(command) == 0
    printed = capsys.readouterr().out
    assert "4 random examples agree with one float64 backward pass each" in printed
    assert all(word in printed for word in ("quantity", "largest error", "tolerance", "dot/target", "sketch"))

    from gradsieve.store import gradient_store

    original = gradient_store.read_tensors

    def disturbed(path: Path, prefix: str) -> Any:
        found = original(path, prefix)
        return {name: values * (1.01 if name == "norm" else 1) for name, values in found.items()}

    monkeypatch.setattr(gradient_store, "read_tensors", disturbed)
    assert cli.run(command) == 2
    failed = capsys.readouterr()
    assert "errors of 4 examples must lie within tolerance, got larger ones in norm" in failed.err
    assert "TOO LARGE" in failed.out


def test_an_error_of_each_kind_is_seen(job: gs.Job, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = extract(job)
    from gradsieve.store.gradient_store import StoredGradients

    original = StoredGradients.rows

    def shifted(self: Any, index: torch.Tensor, checkpoint: str | None = None) -> torch.Tensor:
        return original(self, (index + 1) % len(self.ids), checkpoint)  # everybody's neighbour's sketch

    monkeypatch.setattr(StoredGradients, "rows", shifted)
    assert {one.name for one in extract(job, check=3).checked if not one.passed} == {"sketch"}
    assert len(kept.problem.candidates.ids) == 24


def test_a_gradient_of_zero_has_no_error(tiny_model: Path, write_data: Write, tmp_path: Path) -> None:
    source = find_model(tiny_model)
    model: Any = source.load(torch.float32, "cpu")
    with torch.no_grad():
        model.model.norm.weight.zero_()  # no layer below it can change the loss
    model.save_pretrained(tmp_path / "model")
    source.tokenizer.save_pretrained(tmp_path / "model")
    pool = (str(write_data("pool", 6)),)
    done = extract(gs.Job(model=str(tmp_path / "model"), pool=pool, store=str(tmp_path / "store"), **SMALL), check=3)
    found = {one.name: one for one in done.checked}
    assert done.problem.candidates.columns["norm"].tolist() == [0] * 6
    assert found["sketch"].error == found["norm"].error == 0
    assert all(one.passed for one in done.checked)


def test_what_is_no_number_on_one_side_or_both_fails() -> None:
    true = Truth({"norm": 2.0, "loss": 1.0, "max/w": 3.0}, {"norm": 2.0, "loss": 1.0, "max/w": 0.0}, torch.tensor([2.0, 0.0]))
    errors = errors_of(true, torch.tensor([2.0, 1.0]), {"norm": 2.5, "loss": math.nan, "max/w": 3.5, "other": 9.0})
    assert errors == {"sketch": 0.5, "norm": 0.25, "loss": math.inf, "max/w": 0.5}
    assert errors_of(true, torch.tensor([math.nan, 0.0]), {}) == {"sketch": math.inf}
    assert not Compared("loss", errors["loss"], 0.1, "a").passed


def test_a_wide_sketch_of_references_has_a_tolerance_of_its_own(job: gs.Job) -> None:
    done = extract(dataclasses.replace(job, reference_memory=0), check=2)
    found = {one.name: one for one in done.checked}
    assert found["dot/target"].tolerance > TOLERANCES[torch.float32][0] == found["norm"].tolerance
    assert found["dot/target"].passed


def test_references_that_do_not_fit_at_once_are_measured_one_after_another(
    job: gs.Job, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured: list[list[str]] = []

    def counted(model: Any, compute: Any, sources: Any, progress: Any) -> Any:
        measured.append(list(sources))
        return measure_references(model, compute, sources, progress)

    monkeypatch.setattr(module, "measure_references", counted)
    at_once = {one.name: one for one in extract(job, check=2).checked}
    names = {name.removeprefix("dot/") for name in at_once if name.startswith("dot/")}
    assert len(names) > 3
    assert [set(own) for own in measured] == [names]
    measured.clear()
    told: list[tuple[int, int]] = []
    monkeypatch.setattr(module, "with_form", lambda source, compute, count: dataclasses.replace(compute, form="wide sketch"))
    found = extract(job, lambda stage, *report: told.append(report) if stage == "check" else None, check=2).checked
    assert sorted(measured) == sorted([name] for name in names)
    assert {one.name: one.error for one in found} == pytest.approx({name: one.error for name, one in at_once.items()}, rel=1e-6)
    assert len(told) == 2 * len(names)
    assert told[-1][0] == told[-1][1]


def test_more_rows_than_there_are_cannot_be_checked(job: gs.Job) -> None:
    with pytest.raises(gs.InvalidArgument, match=r"check must lie in \[1, 24\] \(the usable examples\), got 25"):
        extract(job, check=25)
    assert not Compared("norm", 0.1, 0.01, "a").passed
    assert store.GradientStore.open(Path(str(job.store)) / "pool")
