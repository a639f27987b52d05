from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from gradsieve.gradients import vocabulary


def softmax_errors(seed: int, T: int, V: int, peaked: float) -> Tensor:
    rng = torch.Generator().manual_seed(seed)
    e = (peaked * torch.randn(T, V, generator=rng, dtype=torch.float64)).softmax(1)
    e[torch.arange(T), torch.randint(0, V, (T,), generator=rng)] -= 1
    return e


def tiles(V: int, step: int) -> list[slice]:
    return [slice(first, min(first + step, V)) for first in range(0, V, step)]


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    T=st.integers(1, 12),
    D=st.integers(1, 9),
    V=st.integers(2, 80),
    peaked=st.sampled_from([0.1, 1.0, 6.0]),
    shift=st.sampled_from([-5.0, 0.0, 5.0]),
)
def test_norm_total_and_extremes_equal_those_of_the_whole_gradient(
    seed: int, T: int, D: int, V: int, peaked: float, shift: float
) -> None:
    e = softmax_errors(seed, T, V, peaked)
    h = shift + torch.randn(T, D, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    G = e.T @ h
    squares, total = vocabulary.squared_norm_and_total(h, lambda part: e[:, part], tiles(V, 7))
    assert torch.allclose(squares, G.square().sum(), rtol=1e-9)
    assert torch.allclose(total, G.sum(), atol=1e-10)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(vocabulary, "FIRST_ROWS", 2)
        patch.setattr(vocabulary, "ROWS_AT_ONCE", 3)
        smallest, largest = vocabulary.extremes(h, lambda part: e[:, part], tiles(V, 7))
    assert torch.allclose(smallest, G.min(), rtol=1e-12)
    assert torch.allclose(largest, G.max(), rtol=1e-12)


def test_an_extreme_outside_the_rows_looked_at_first_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vocabulary, "FIRST_ROWS", 1)
    h = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    e = torch.tensor([[3.0, 0.0, 0.0], [3.0, -4.0, 3.5]])  # bounds 6, 4, 3.5; row 0 has only 3 and 3
    smallest, largest = vocabulary.extremes(h, lambda part: e[:, part], [slice(0, 3)])
    assert (smallest, largest) == (-4.0, 3.5)


def test_most_of_the_vocabulary_is_never_multiplied() -> None:
    e = softmax_errors(0, 20, 5000, 4.0)
    h = torch.randn(20, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    asked = []

    def errors(part: slice | Tensor) -> Tensor:
        if isinstance(part, Tensor):
            asked.append(len(part))
        return e[:, part]

    vocabulary.extremes(h, errors, tiles(5000, 512))
    assert sum(asked) < 500


def test_extremes_that_are_not_a_number_are_not_hidden() -> None:
    e = softmax_errors(0, 5, 600, 1.0)
    e[2, 300] = torch.nan
    smallest, largest = vocabulary.extremes(torch.ones(5, 3, dtype=torch.float64), lambda part: e[:, part], tiles(600, 64))
    assert smallest.isnan()
    assert largest.isnan()


@pytest.mark.parametrize(("T", "D"), [(40, 8), (8, 40)])
def test_the_norm_comes_from_the_smaller_of_gram_matrix_and_products(T: int, D: int) -> None:
    e = softmax_errors(0, T, 900, 1.0)
    h = torch.randn(T, D, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    with FlopCounterMode(display=False) as counter:
        squares, _ = vocabulary.squared_norm_and_total(h, lambda part: e[:, part], tiles(900, 300))
    assert torch.allclose(squares, (e.T @ h).square().sum(), rtol=1e-9)
    assert counter.get_total_flops() <= 2 * (T * min(T, D) * 900 + T * T * D)
