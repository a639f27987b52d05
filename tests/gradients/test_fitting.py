"""Memory is really asked for here: a layer allocates more than any machine has, as soon as a batch is too large."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gradsieve.errors import MemoryLimit
from gradsieve.gradients.engine import GradientEngine
from gradsieve.gradients.fitting import Fitting, ran_out_of_memory, restarted
from gradsieve.gradients.settings import Batch, EngineSettings
from gradsieve.gradients.sketch import SketchPlan

LENGTHS = (14, 14, 13, 12, 12, 11, 11, 9)
SETTINGS = EngineSettings("linear", SketchPlan(256, seed=5))


def exhaust_cpu() -> None:
    torch.empty(1 << 60)


def exhaust_gpu() -> None:  # what the CUDA allocator raises; there is none here to raise it
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")


def limited(model: Any, most: int, exhaust: Callable[[], None] = exhaust_cpu) -> Any:
    """The model with a layer, in the middle of the forward pass, whose memory ends at `most` tokens of a batch."""

    def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        if args[0].shape[0] * args[0].shape[1] > most:
            exhaust()

    model.model.layers[1].mlp.register_forward_pre_hook(hook)
    return model


@pytest.mark.parametrize("exhaust", [exhaust_cpu, exhaust_gpu])
def test_a_batch_that_does_not_fit_is_split_and_said_so(twin: Any, exhaust: Callable[[], None]) -> None:
    batch, said = twin.pad(twin.rows(LENGTHS)), list[str]()
    with GradientEngine(twin.model("llama"), SETTINGS) as engine:
        whole = engine.block(batch)
    with GradientEngine(limited(twin.model("llama"), 30, exhaust), SETTINGS) as engine:
        fitting = Fitting(engine.block, said.append)
        parts = list(fitting.blocks(batch))
        again = list(fitting.blocks(batch))
    assert [len(part.sketch) for part in parts] == [2, 2, 2, 2]
    assert said == [
        "a batch of 8 x 14 tokens did not fit in memory and was split; --batch-tokens 56 would have saved the attempt",
        "a batch of 4 x 14 tokens did not fit in memory and was split; --batch-tokens 28 would have saved the attempt",
    ]
    assert [len(part.sketch) for part in again] == [2, 2, 2, 2]  # without another attempt
    for found in (parts, again):
        assert torch.allclose(torch.cat([part.sketch for part in found]), whole.sketch, rtol=1e-4, atol=1e-5)
        for name, column in whole.columns.items():
            assert torch.allclose(torch.cat([part.columns[name] for part in found]), column, rtol=1e-4, atol=1e-6), name


def test_halves_of_an_odd_batch_keep_every_row_in_order(twin: Any) -> None:
    batch = twin.pad(twin.rows(LENGTHS[:5]))
    seen: list[Tensor] = []

    def run(part: Batch) -> Any:
        if len(part.input_ids) > 1:
            exhaust_cpu()
        seen.append(part.input_ids)
        return part

    assert len(list(Fitting(run, lambda text: None).blocks(batch))) == 5
    assert torch.equal(torch.cat(seen), batch.input_ids)


def test_a_single_example_that_does_not_fit_is_an_error_with_cures(twin: Any) -> None:
    with GradientEngine(limited(twin.model("llama"), 12), SETTINGS) as engine:
        fitting = Fitting(engine.block, lambda text: None)
        with pytest.raises(
            MemoryLimit, match=r"one example of 14 tokens must fit in memory .*; lower --max-length, .*--params"
        ):
            list(fitting.blocks(twin.pad(twin.rows(LENGTHS))))


def test_another_error_is_not_taken_for_a_lack_of_memory(twin: Any) -> None:
    def fail(batch: Batch) -> Any:
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    with pytest.raises(RuntimeError, match="mat1"):
        list(Fitting(fail).blocks(twin.pad(twin.rows(LENGTHS))))
    assert ran_out_of_memory(RuntimeError("MPS backend out of memory (MPS allocated: 9 GB)"))
    assert ran_out_of_memory(MemoryError())
    assert not ran_out_of_memory(ValueError("out of memory"))


def test_a_failed_attempt_leaves_nothing_of_the_batch(twin: Any) -> None:
    batch = twin.pad(twin.rows(LENGTHS))
    gc.collect()
    with GradientEngine(limited(twin.model("llama"), 60), SETTINGS) as engine:
        engine.block(twin.pad(twin.rows(LENGTHS[:2])))
        gc.disable()
        try:
            before = sum(issubclass(type(item), Tensor) for item in gc.get_objects())
            blocks = Fitting(engine.block, lambda text: None).blocks(batch)
            kept = sum(len(block.columns) + 1 for block in blocks)
            after = sum(issubclass(type(item), Tensor) for item in gc.get_objects())
        finally:
            gc.enable()
    assert kept > 0
    assert after <= before + kept


def test_references_are_begun_anew_with_smaller_batches(twin: Any) -> None:
    rows, said = twin.rows(LENGTHS), list[str]()

    def mean_of(model: Any, first: int) -> Any:
        with GradientEngine(model, SETTINGS) as engine:

            def run(tokens: int) -> Any:
                size = max(1, tokens // 14)
                return engine.mean_gradient([twin.pad(rows[i : i + size], 14) for i in range(0, 8, size)])

            return restarted(run, first, 14, torch.device("cpu"), said.append)

    whole, parts = mean_of(twin.model("llama"), 200), mean_of(limited(twin.model("llama"), 30), 112)
    assert said == [
        f"batches of the references did not fit in memory; they were begun anew with {n} tokens each" for n in (56, 28)
    ]
    assert parts.count == 8  # nothing of the failed attempts was counted
    for name, tensor in whole.tensors.items():
        assert torch.allclose(parts.tensors[name], tensor, rtol=1e-4, atol=1e-7), name
    with pytest.raises(MemoryLimit, match="one example of 14 tokens must fit"):
        mean_of(limited(twin.model("llama"), 12), 112)
