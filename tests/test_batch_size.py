from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import gradsieve as gs
from gradsieve.batch_size import best_size, describe, is_flat, try_sizes
from gradsieve.data import TokenSet
from gradsieve.gradients.engine import GradientEngine
from gradsieve.models import find_model

Write = Callable[..., Path]
LESS = gs.LESS(warmup_share=0.0)


def test_doubling_ends_where_it_gains_nothing_and_the_smallest_good_size_is_taken() -> None:
    assert not is_flat({256: 100.0})
    assert not is_flat({256: 100.0, 512: 106.0})
    assert is_flat({256: 100.0, 512: 104.0})
    assert best_size({256: 100.0, 512: 180.0, 1024: 182.0}) == 512
    assert best_size({256: 100.0, 512: 96.0}) == 256
    assert best_size({256: 100.0, 512: 106.0}) == 512
    assert describe({256: 99.6, 512: 96.0}) == (
        "--batch-tokens auto took 256; tokens per second by batch size: 100 at 256, 96 at 512"
    )


def pool_tokens(tiny_model: Path, write_data: Write, n: int) -> tuple[Any, list[Any]]:
    from gradsieve.data import read_examples

    source = find_model(tiny_model)
    examples = read_examples([str(write_data("pool", n))]).examples
    tokens = TokenSet.of("pool", examples, source.tokenizer, max_length=1024).tokens
    return source.load(torch.float32, "cpu"), sorted(tokens, key=lambda t: -len(t.input_ids))


def test_sizes_double_from_the_smallest_and_end_with_the_examples_or_the_unit(tiny_model: Path, write_data: Write) -> None:
    model, tokens = pool_tokens(tiny_model, write_data, 40)
    half = sum(len(t.input_ids) for t in tokens[20:])
    assert half > 512
    with GradientEngine(model) as engine:
        rates = try_sizes(engine, tokens, 100_000, "cpu")
        assert list(rates) == [256 * 2**i for i in range(len(rates))]
        assert max(rates) <= half
        assert all(rate > 0 for rate in rates.values())
        assert set(try_sizes(engine, tokens, 400, "cpu")) == {256}
        assert set(try_sizes(engine, tokens[:2], 100_000, "cpu")) == {256}  # too few for even that: tried as they are


def run_out(model: Any, most: int) -> None:
    """Lets a model ask for more memory than there is where a batch has more tokens."""

    def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        if args[0].shape[0] * args[0].shape[1] > most:
            torch.empty(1 << 60)

    model.model.layers[1].mlp.register_forward_pre_hook(hook)


def test_a_size_that_does_not_fit_in_memory_is_the_end(tiny_model: Path, write_data: Write) -> None:
    model, tokens = pool_tokens(tiny_model, write_data, 60)
    run_out(model, 256)
    with GradientEngine(model) as engine:
        assert set(try_sizes(engine, tokens, 100_000, "cpu")) == {256}


def test_a_first_size_that_does_not_fit_is_halved_down_to_single_examples(tiny_model: Path, write_data: Write) -> None:
    model, tokens = pool_tokens(tiny_model, write_data, 60)
    longest = len(tokens[0].input_ids)
    assert 64 < longest < 128
    run_out(model, 130)
    with GradientEngine(model) as engine:
        assert set(try_sizes(engine, tokens, 100_000, "cpu")) == {128}
    run_out(model, longest)
    with GradientEngine(model) as engine:
        assert max(try_sizes(engine, tokens, 100_000, "cpu")) <= 128
    run_out(model, longest - 1)
    message = f"one example of {longest} tokens must fit in memory beside the model, got: .*; lower --max-length"
    with GradientEngine(model) as engine, pytest.raises(gs.MemoryLimit, match=message):
        try_sizes(engine, tokens, 100_000, "cpu")


def test_auto_is_resolved_recorded_and_changes_no_score(write_data: Write, tiny_model: Path, tmp_path: Path) -> None:
    roles = {"pool": str(write_data("pool", 40)), "target": str(write_data("target", 6))}
    common = {"model": str(tiny_model), **roles, "budget": "5", "dim": 256, "dtype": "float64", "unit_tokens": 2000}
    found = gs.select(LESS, batch_tokens="auto", out=tmp_path / "auto", **common)
    given = gs.select(LESS, batch_tokens=100, store=str(tmp_path / "given"), **common)
    record = json.loads((tmp_path / "auto" / "run.json").read_text())
    assert record["job"]["batch_tokens"] == found.job.batch_tokens
    assert found.job.batch_tokens in (256, 512, 1024)
    assert any(f"auto took {found.job.batch_tokens}; tokens per second" in note for note in found.notes)
    assert [e.id for e in found.examples] == [e.id for e in given.examples]
    assert found.selection.scores.tolist() == pytest.approx(given.selection.scores.tolist(), abs=1e-3)  # float16 storage
    again = gs.select(LESS, batch_tokens="auto", out=tmp_path / "auto", **common)  # nothing to compute: nothing to try
    assert again.job.batch_tokens == "auto"
    with pytest.raises(gs.InvalidArgument, match="batch_tokens must be at least 1, got 0"):
        gs.select(LESS, batch_tokens=0, **common)
