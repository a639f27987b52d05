"""The engine on an accelerator against the engine on the processor. `--device cpu` tries the tests themselves."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from gradsieve.gradients.adam import Moments
from gradsieve.gradients.directions import References, UnitDirection
from gradsieve.gradients.engine import GradientEngine
from gradsieve.gradients.fitting import Fitting
from gradsieve.gradients.settings import Batch, Block, EngineSettings
from gradsieve.gradients.sketch import SketchPlan
from gradsieve.gradients.wide import mean_sketch, wide_plan, wide_settings

LENGTHS = (14, 9, 11, 17)


@pytest.fixture
def device(request: pytest.FixtureRequest) -> str:
    asked: str | None = request.config.getoption("--device")
    if asked is None and torch.accelerator.is_available():
        asked = str(torch.accelerator.current_accelerator())
    if asked is None:
        pytest.skip("no accelerator here; --device cpu tries these tests on the processor")
    try:
        torch.empty(0, device=asked)
    except (RuntimeError, AssertionError) as error:
        pytest.skip(f"no {asked} here: {error}")
    return asked


def moved(batch: Batch, device: str) -> Batch:
    return Batch(batch.input_ids.to(device), batch.labels.to(device))


def assert_same(found: Block, true: Block) -> None:
    scale = float(true.sketch.norm(dim=1).max())
    assert torch.allclose(found.sketch.cpu(), true.sketch, atol=1e-4 * scale)
    assert found.columns.keys() == true.columns.keys()
    for name, column in true.columns.items():
        assert torch.allclose(found.columns[name].cpu(), column, rtol=1e-3, atol=1e-4), name


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("layers", ["none", "moments", "extremes"])
@pytest.mark.parametrize("spec", ["all", "last:1"])
def test_every_number_is_that_of_the_processor(twin: Any, device: str, spec: str, layers: Any, checkpointing: bool) -> None:
    model, batch = twin.model("llama-tied"), twin.pad(twin.rows(LENGTHS))
    settings, blocks = EngineSettings(spec, SketchPlan(256, seed=5), layers=layers), []
    for place in ("cpu", device):
        model, own = model.to(place), moved(batch, place)
        with GradientEngine(model, settings, checkpointing=checkpointing) as engine:
            references = References.stack({"r": engine.mean_gradient([own], sketched=True)})
        with GradientEngine(model, settings, references, checkpointing=checkpointing) as engine:
            blocks += Fitting(engine.block).blocks(own)
    assert_same(blocks[1], blocks[0])


def test_wide_sketches_of_references_are_those_of_the_processor(twin: Any, device: str) -> None:
    model, batch = twin.model("llama"), twin.pad(twin.rows(LENGTHS))
    settings, blocks = EngineSettings("linear", SketchPlan(256, seed=5)), []
    for place in ("cpu", device):
        model, own = model.to(place), moved(batch, place)
        with GradientEngine(model, wide_settings(settings)) as engine:
            unit = UnitDirection.of("r", mean_sketch([engine.block(own)]))
        with GradientEngine(model, settings, References.of_units({"r": unit}, wide_plan(settings.sketch))) as engine:
            blocks.append(engine.block(own))
    assert_same(blocks[1], blocks[0])


def test_adam_s_direction_is_that_of_the_processor(twin: Any, device: str) -> None:
    model = twin.lora(twin.model("llama"), torch.float32).get_base_model()
    batch, blocks = twin.pad(twin.rows(LENGTHS)), []
    rng = torch.Generator().manual_seed(0)
    first = {name: 0.02 * torch.randn(p.shape, generator=rng) for name, p in model.named_parameters() if "lora_" in name}
    moments = Moments(first, {name: m.square() for name, m in first.items()}, dict.fromkeys(first, 5))
    settings = EngineSettings("lora", SketchPlan(256, seed=5), direction="adam")
    for place in ("cpu", device):
        with GradientEngine(model.to(place), settings, moments=moments) as engine:
            blocks.append(engine.block(moved(batch, place)))
    assert_same(blocks[1], blocks[0])
    with GradientEngine(model.to("cpu"), dataclasses.replace(settings, direction="sgd")) as engine:
        assert not torch.allclose(engine.block(batch).sketch, blocks[0].sketch)
