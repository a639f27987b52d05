from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from gradsieve.gradients.directions import References, UnitDirection
from gradsieve.gradients.engine import GradientEngine
from gradsieve.gradients.settings import EngineSettings
from gradsieve.gradients.sketch import SketchPlan
from gradsieve.gradients.wide import mean_sketch, wide_plan, wide_settings

LENGTHS = (14, 9, 11, 17, 12, 10)


def wide_references(twin: Any, model: Any, settings: EngineSettings, halves: dict[str, list[Any]]) -> References:
    with GradientEngine(model, wide_settings(settings)) as engine:
        means = {name: mean_sketch([engine.block(twin.pad(rows))]) for name, rows in halves.items()}
    units = {name: UnitDirection.of(name, mean) for name, mean in means.items()}
    return References.of_units(units, wide_plan(settings.sketch))


@pytest.mark.parametrize(("family", "spec"), [("llama-tied", "all"), ("gpt2", "linear,vectors"), ("llama", "lora")])
def test_products_are_those_of_the_wide_sketches_of_the_loop(
    twin: Any, family: str, spec: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gradsieve.gradients.head.TILE_FLOATS", 1000)  # several tiles of the vocabulary
    model = twin.model(family, torch.float64)
    if spec == "lora":
        model = twin.lora(model, torch.float64).get_base_model()
    settings, rows = EngineSettings(spec, SketchPlan(256, seed=5)), twin.rows(LENGTHS)
    references = wide_references(twin, model, settings, {"r": rows[:4]})
    with GradientEngine(model, settings, references) as engine:
        names, block = [site.name for site in engine.sites], engine.block(twin.pad(rows))
    true, plan = twin.naive(model, rows), wide_plan(settings.sketch)
    sketches = torch.stack([true.sketch(z, names, plan) for z in range(len(rows))])
    mean = sketches[:4].mean(0)
    assert references.facts["r"].norm == pytest.approx(mean.norm().item(), rel=1e-5)
    length = float(mean @ mean)  # norms of single gradients are exact, that of their mean is of its sketch
    variance = (sum(true.norm(z, names) ** 2 for z in range(4)) / 4 - length) * 4 / 3
    assert references.facts["r"].signal_share == pytest.approx(1 - variance / 4 / length, rel=1e-4)
    for z in range(len(rows)):
        norm = true.norm(z, names)
        assert block.columns["dot/r"][z].item() == pytest.approx((sketches[z] @ mean / mean.norm()).item(), abs=1e-6 * norm)
        assert (block.sketch[z] - true.sketch(z, names, settings.sketch)).norm() < 1e-6 * norm  # the stored sketch is as ever
        assert block.columns["norm"][z].item() == pytest.approx(norm)


def test_the_error_of_a_cosine_is_small_and_without_bias(twin: Any) -> None:
    model, rows, names = twin.model("llama"), twin.rows(LENGTHS), []
    errors = []
    for seed in range(12):
        settings = EngineSettings("linear", SketchPlan(64, seed=seed), signals=False)
        references = wide_references(twin, model, settings, {"r": rows[:4]})
        with GradientEngine(model, settings, references) as engine:
            names, block = [site.name for site in engine.sites], engine.block(twin.pad(rows))
        errors.append(block.columns["dot/r"] * references.facts["r"].norm)
    true = twin.naive(model, rows)
    r = true.mean(names, [0, 1, 2, 3])
    exact = torch.tensor([true.dot(z, r, names) for z in range(len(rows))], dtype=torch.float64)
    scale = (
        torch.tensor([true.norm(z, names) for z in range(len(rows))]) * sum(float(g.square().sum()) for g in r.values()) ** 0.5
    )
    error = (torch.stack(errors) - exact) / scale
    assert error.square().mean().sqrt() < 1.3 * 65536**-0.5
    assert error.mean().abs() < 4 * error.mean(1).std() / 12**0.5


def test_a_contrast_of_sketches_is_the_sketch_of_the_contrast(twin: Any) -> None:
    model, rows = twin.model("llama", torch.float64), twin.rows(LENGTHS)
    settings = wide_settings(EngineSettings("linear"))
    with GradientEngine(model, settings) as engine:
        blocks = [engine.block(twin.pad(part)) for part in (rows[:3], rows[3:])]
    right, wrong = (mean_sketch([block]) for block in blocks)
    noise = right.noise + wrong.noise
    contrast = right.minus(wrong)
    expected = (blocks[0].sketch.mean(0) - blocks[1].sketch.mean(0)).norm().item()
    assert contrast.facts().norm == pytest.approx(expected, rel=1e-5)
    assert contrast.noise == noise


def test_wide_settings_follow_parameters_seed_and_reduction() -> None:
    settings = EngineSettings("lora", SketchPlan(64, seed=9), "sum", layers="extremes", direction="adam")
    wide = wide_settings(settings)
    assert (wide.params, wide.reduction, wide.sketch, wide.direction) == ("lora", "sum", SketchPlan(65536, 9), "sgd")
    assert wide == wide_settings(dataclasses.replace(settings, direction="sgd"))
