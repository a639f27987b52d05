from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from gradsieve.gradients import layers

WANTS: dict[str, Any] = {"sides": ((128, 32),), "norm": True, "extremes": False, "references": 0, "half": False}


def drawn(B: int, T: int, d_out: int, d_in: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    rng = torch.Generator().manual_seed(seed)
    a = torch.randn(B, T, d_in, generator=rng, dtype=torch.float64)
    b = torch.randn(B, T, d_out, generator=rng, dtype=torch.float64)
    return a, b, torch.einsum("zto,zti->zoi", b, a)


@settings(max_examples=40, deadline=None)
@given(
    B=st.integers(1, 20), T=st.integers(1, 9), d_out=st.integers(1, 200), d_in=st.integers(1, 9), floats=st.integers(1, 4000)
)
def test_tiles_cover_every_product_once(B: int, T: int, d_out: int, d_in: int, floats: int) -> None:
    a, b, G = drawn(B, T, d_out, d_in)
    found = torch.full_like(G, torch.nan)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(layers, "TILE_FLOATS", floats)
        for rows, part, tile in layers.product_tiles(a, b, lambda shape, dtype: torch.empty(shape, dtype=dtype)):
            assert found[rows, part].isnan().all()
            found[rows, part] = tile
    assert torch.allclose(found, G)


@pytest.mark.parametrize("B", [3, 20])
def test_every_way_to_a_number_gives_the_same(B: int) -> None:
    a, b, G = drawn(B, 7, 12, 5)
    true = G.square().sum((1, 2))
    assert torch.allclose(layers.squared_norm(G), true)
    assert torch.allclose(layers.squared_norm_by_gram(layers.doubled(layers.gram(a)), b), true)
    smallest, largest = layers.extremes(G)
    assert torch.equal(smallest, G.amin((1, 2)))
    assert torch.equal(largest, G.amax((1, 2)))
    R = torch.randn(3, 12, 5, dtype=torch.float64)
    assert torch.allclose(layers.dots(G, R), layers.dots_around(a, b, R))
    assert torch.allclose(layers.dots(G, R), torch.einsum("zoi,roi->zr", G, R))
    for shape in ((12, 5), (5, 12)):
        M = torch.randn(B, *shape, dtype=torch.float64)
        P, Q = torch.randn(shape[0], 4, dtype=torch.float64), torch.randn(shape[1], 4, dtype=torch.float64)
        assert torch.allclose(layers.sketch_of(M, P, Q), torch.einsum("zoi,oj,ik->zjk", M, P, Q))


@pytest.mark.parametrize("T", [1, 16, 17, 64, 100, 130])
def test_gram_matrices_come_in_bands_below_the_diagonal(T: int) -> None:
    a, b, G = drawn(2, T, 12, 5)
    bands = layers.gram(a)
    for whole, band in zip((a @ a.mT).split(16 * -(-T // 64), 1), bands, strict=True):
        assert torch.allclose(band, whole[:, :, : band.shape[2]])
    assert sum(band.shape[1] for band in bands) == T == bands[-1].shape[2]
    assert len(bands) <= 4
    assert torch.allclose(layers.squared_norm_by_gram(layers.doubled(bands), b), G.square().sum((1, 2)))


def test_a_norm_keeps_its_digits_in_float32() -> None:
    G = torch.randn(2, 1536, 576, generator=torch.Generator().manual_seed(0))
    true = G.double().square().sum((1, 2))
    assert ((layers.squared_norm(G) - true) / true).abs().max() < 1e-6


def test_short_sequences_and_wide_layers_go_by_gram_matrices_and_others_by_products() -> None:
    def products(length: int, **changes: Any) -> bool:
        return layers.choose_way(length, 1536, 576, 1, **(WANTS | changes)).products

    assert not products(64)
    assert products(600)
    assert not products(128, extremes=True)
    assert products(600, extremes=True)
    assert products(128, extremes=True, references=1)
    assert not products(64, norm=False)
    assert not products(600, norm=False, sides=())
    assert not products(16, references=1)
    assert products(128, references=4)
    assert not products(128, references=2, half=True)
    assert products(128, references=8, half=True)


def test_thin_layers_are_sketched_from_their_products() -> None:
    assert layers.choose_way(128, 16, 576, 1, **WANTS) == layers.Way(True, True)
    assert layers.choose_way(128, 576, 16, 1, **WANTS) == layers.Way(True, True)
    assert layers.choose_way(128, 1536, 576, 1, **(WANTS | {"extremes": True, "references": 1})) == layers.Way(True, False)


def test_rows_of_an_embedding_add_up_over_equal_tokens() -> None:
    ids = torch.tensor([[3, 1, 3], [1, 1, 1]])
    b = torch.arange(12, dtype=torch.float64).view(2, 3, 2)
    example, token, rows = layers.embedding_rows(ids, b)
    assert example.tolist() == [0, 0, 1]
    assert token.tolist() == [1, 3, 1]
    assert rows.tolist() == [[2, 3], [4, 6], [24, 27]]


def test_rows_that_are_zero_count_in_statistics_unless_every_token_was_met() -> None:
    rows = torch.tensor([[1.0, 2.0], [3.0, 5.0], [4.0, 6.0]], dtype=torch.float64)
    own = layers.row_statistics(torch.tensor([0, 1, 1]), rows, 2, (2, 2))
    assert own.smallest.tolist() == [0.0, 3.0]
    assert own.largest.tolist() == [2.0, 6.0]
    columns = own.columns(("mean", "sd", "norm"), "g")
    assert columns["mean/g"].tolist() == [0.75, 4.5]
    assert columns["sd/g"][0].item() == pytest.approx((5 / 4 - 0.75**2) ** 0.5)


def test_squares_of_rows_are_added_up_in_float64() -> None:
    squares = layers.squared_norm(torch.tensor([[[4096.0], [1.0]]]))
    assert squares.tolist() == [2.0**24 + 1]  # one more than float32 can tell from 2**24
