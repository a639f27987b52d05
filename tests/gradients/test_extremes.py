"""Extremes without most of the gradient: the same numbers as from all of it, on friendly and on unfriendly data."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from gradsieve.gradients import extremes
from gradsieve.gradients.extremes import Ranked, smallest_and_largest


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sizes at which small gradients are searched like large ones."""
    monkeypatch.setattr(extremes, "FIRST", 4)
    monkeypatch.setattr(extremes, "SAVED", 1)
    monkeypatch.setattr(extremes, "PIECE", 50)


def drawn(B: int, T: int, d_out: int, d_in: int, tail: float, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Inputs and output gradients whose columns differ in size, the more so the longer the tail; and every G."""
    rng = torch.Generator().manual_seed(seed)

    def one(d: int) -> Tensor:
        sizes = (tail * torch.randn(B, 1, d, generator=rng, dtype=torch.float64)).exp()
        return torch.randn(B, T, d, generator=rng, dtype=torch.float64) * sizes

    a, b = one(d_in), one(d_out)
    return a, b, b.mT @ a


@pytest.mark.usefixtures("tiny")
@settings(max_examples=60, deadline=None)
@given(
    T=st.integers(1, 12),
    d_out=st.integers(1, 90),
    d_in=st.integers(1, 90),
    tail=st.sampled_from([0.0, 0.5, 1.0, 2.0]),
    whole=st.sampled_from([0.0, 0.6, 2.0]),
    seed=st.integers(0, 99),
)
def test_extremes_are_those_of_the_whole_gradient(T: int, d_out: int, d_in: int, tail: float, whole: float, seed: int) -> None:
    a, b, G = drawn(3, T, d_out, d_in, tail, seed)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(extremes, "WHOLE", whole)
        smallest, largest = smallest_and_largest(Ranked.of(a), Ranked.of(b))
    scale = G.abs().amax((1, 2))
    assert ((smallest - G.amin((1, 2))).abs() <= 1e-12 * scale).all()
    assert ((largest - G.amax((1, 2))).abs() <= 1e-12 * scale).all()


@pytest.mark.usefixtures("tiny")
def test_an_extreme_far_from_the_columns_looked_at_first_is_found() -> None:
    # The columns with the largest norms are orthogonal to each other: all their products are zero.
    a, b = torch.zeros(1, 8, 20), torch.zeros(1, 8, 20)
    a[0, 0, :10], b[0, 1, :10] = 100.0, 100.0
    a[0, 2, 15], b[0, 2, 17], b[0, 2, 3] = 3.0, 5.0, -2.0
    smallest, largest = smallest_and_largest(Ranked.of(a), Ranked.of(b))
    assert (smallest.item(), largest.item()) == (-6.0, 15.0)


@pytest.mark.usefixtures("tiny")
def test_entries_of_one_sign_and_gradients_of_zero_have_their_extremes_too() -> None:
    a, b = torch.rand(2, 5, 30) + 0.1, torch.rand(2, 5, 30) + 0.1
    b[1] = 0
    smallest, largest = smallest_and_largest(Ranked.of(a), Ranked.of(b))
    G = b.mT @ a
    assert torch.allclose(smallest, G.amin((1, 2)))
    assert torch.allclose(largest, G.amax((1, 2)))
    assert smallest[0] > 0
    assert (smallest[1], largest[1]) == (0, 0)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_number_that_is_not_finite_is_not_hidden(bad: float) -> None:
    a, b, G = drawn(3, 6, 200, 150, 0.5)
    b[1, 2, 177] = bad
    smallest, largest = smallest_and_largest(Ranked.of(a), Ranked.of(b))
    assert not (smallest[1].isfinite() and largest[1].isfinite())
    for z in (0, 2):
        assert torch.allclose(smallest[z], G[z].min())
        assert torch.allclose(largest[z], G[z].max())


@pytest.mark.parametrize("scale", [1e-25, 1e15])
def test_tiny_and_huge_gradients_lose_nothing(scale: float) -> None:
    a, b, _ = (x.float() for x in drawn(2, 16, 300, 200, 0.7))
    b *= scale
    smallest, largest = smallest_and_largest(Ranked.of(a), Ranked.of(b))
    G = b.mT @ a
    assert torch.allclose(smallest / scale, G.amin((1, 2)) / scale, rtol=1e-5)
    assert torch.allclose(largest / scale, G.amax((1, 2)) / scale, rtol=1e-5)


def test_half_precision_finds_what_its_own_products_hold() -> None:
    a, b, _ = (x.to(torch.bfloat16) for x in drawn(2, 40, 300, 200, 0.7))
    smallest, largest = smallest_and_largest(Ranked.of(a), Ranked.of(b))
    G = b.mT @ a
    assert torch.allclose(smallest.float(), G.amin((1, 2)).float(), rtol=1e-2)
    assert torch.allclose(largest.float(), G.amax((1, 2)).float(), rtol=1e-2)


def test_columns_of_unlike_size_leave_most_of_the_gradient_out(monkeypatch: pytest.MonkeyPatch) -> None:
    a, b, _ = drawn(2, 32, 800, 600, 1.0)
    entries = []
    parts = extremes._parts
    monkeypatch.setattr(extremes, "_parts", lambda *given: (entries.append(part.numel()) or part for part in parts(*given)))
    smallest_and_largest(Ranked.of(a), Ranked.of(b))
    assert sum(entries) < 0.05 * 2 * 800 * 600


@pytest.mark.usefixtures("tiny")
@pytest.mark.parametrize("tail", [0.0, 1.0])
def test_no_product_is_larger_than_a_piece(monkeypatch: pytest.MonkeyPatch, tail: float) -> None:
    a, b, _ = drawn(2, 10, 70, 40, tail)
    shapes = []
    parts = extremes._parts
    monkeypatch.setattr(extremes, "_parts", lambda *given: (shapes.append(part.shape) or part for part in parts(*given)))
    smallest_and_largest(Ranked.of(a), Ranked.of(b))
    assert shapes
    assert all(rows == 1 or rows * width <= extremes.PIECE for rows, width in shapes)


@given(count=st.integers(1, 5000))
def test_bands_cover_a_staircase_once(count: int) -> None:
    edges = extremes._edges(count)
    widths = [max(0, 700 - edge // 2) for edge in edges[:-1]]
    bands = extremes._bands(edges, widths)
    assert [rows.start for rows, _ in bands] == [0, *(rows.stop for rows, _ in bands[:-1])]
    for begin, width in zip(edges, widths, strict=False):
        covered = [wide for rows, wide in bands if rows.start <= begin < rows.stop]
        assert (covered or [0])[0] >= width
