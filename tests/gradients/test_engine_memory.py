"""What the engine keeps of a batch, and for how long."""

from __future__ import annotations

import contextlib
import gc
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor

from gradsieve.gradients import accumulator
from gradsieve.gradients import engine as engine_module
from gradsieve.gradients.accumulator import Accumulator
from gradsieve.gradients.engine import GradientEngine
from gradsieve.gradients.readings import Reading
from gradsieve.gradients.settings import EngineSettings
from gradsieve.gradients.sketch import SketchPlan
from gradsieve.gradients.sums import Sums

FULL: dict[str, Any] = {"layers": "extremes", "signals": True, "norms": True}


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("fault", [False, True])
def test_nothing_of_a_batch_outlives_it(twin: Any, checkpointing: bool, fault: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(self: Sums, *args: Any) -> None:
        raise RuntimeError("on purpose")

    model, batch = twin.model("llama"), twin.pad(twin.rows((33, 41)))
    with GradientEngine(model, EngineSettings("all", **FULL), checkpointing=checkpointing) as engine:
        engine.block(batch)
        if fault:
            monkeypatch.setattr(Sums, "add_embedding", fail)
        gc.collect()
        gc.disable()
        try:
            before = sum(issubclass(type(item), Tensor) for item in gc.get_objects())
            with contextlib.suppress(RuntimeError):
                engine.block(batch)
            left = sum(issubclass(type(item), Tensor) for item in gc.get_objects()) - before
        finally:
            gc.enable()
    assert left <= 2


def test_a_batch_is_let_go_without_the_garbage_collector(twin: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    kept: list[weakref.ref[Any]] = []

    class Watched(accumulator.Accumulator):
        def __init__(self, *arguments: Any) -> None:
            super().__init__(*arguments)
            kept.append(weakref.ref(self))

        def saw(self, *arguments: Any, **more: Any) -> Any:
            call = super().saw(*arguments, **more)
            if call is not None and call.reading is not None:
                kept.append(weakref.ref(call.reading))
            return call

    monkeypatch.setattr(engine_module, "Accumulator", Watched)
    batch = twin.pad(twin.rows((9, 12)))
    gc.collect()
    gc.disable()
    try:
        with GradientEngine(twin.model("llama"), EngineSettings(params="all")) as opened:
            opened.block(batch)
            opened.mean_gradient([batch])
            alive = [reference() for reference in kept if reference() is not None]
    finally:
        gc.enable()
    assert len(kept) > 20
    assert alive == []


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_layer_frees_what_it_read_and_received_as_soon_as_it_is_added(
    twin: Any, checkpointing: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, rows = twin.model("llama", torch.float64), twin.rows((6, 5, 6))
    held: list[int] = []

    def finish(state: Accumulator) -> None:
        held.append(sum(type(one) is Reading for one in gc.get_objects()))

    monkeypatch.setattr(Accumulator, "finish", finish)
    settings = EngineSettings("linear", SketchPlan(256, seed=5), layers="extremes", signals=False)
    with GradientEngine(model, settings, checkpointing=checkpointing) as engine:
        engine.block(twin.pad(rows))
    assert held == [0]


def test_what_a_gated_layer_reads_is_not_kept_beside_its_factors(twin: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model, rows = twin.model("llama", torch.float64), twin.rows((6, 5, 6))
    kept: dict[str, bool] = {}
    head = Accumulator.head

    def looked_at(state: Accumulator, *args: Any) -> torch.Tensor:
        done = head(state, *args)
        readings = [one for one in gc.get_objects() if type(one) is Reading]
        kept.update({reading.name: reading._tensor is not None for reading in readings if not reading.gone})
        return done

    monkeypatch.setattr(Accumulator, "head", looked_at)
    settings = EngineSettings("linear", SketchPlan(256, seed=5), layers="extremes", signals=False)
    with GradientEngine(model, settings) as engine:
        block = engine.block(twin.pad(rows))
    assert {name.split(".")[-2] for name, there in kept.items() if not there} == {"down_proj"}
    assert any(kept.values())
    name = "model.layers.0.mlp.down_proj.weight"
    true = twin.naive(model, rows)
    for z in range(len(rows)):
        assert block.columns[f"max/{name}"][z].item() == pytest.approx(float(true.gradients[z][name].max()), rel=1e-9)
