import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gradsieve.selectors import directions as module
from gradsieve.selectors.directions import Directions, marginal_relevance, on_grid, unit_rows
from gradsieve.types import ArrayGradients, Budget


def gradients(n, d, seed=0, dtype=torch.float32):
    G = torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return ArrayGradients([f"{i:04d}" for i in range(n)], G.to(dtype), {"tokens": torch.arange(n) % 7 + 1})


def marginal_relevance_naive(cosines, relevance, weight, among, k, tokens=None, purse=0):
    chosen, similar = [], []
    for _ in range(min(k, len(among))):
        left = purse - sum(tokens[row] for row in chosen) if tokens else 0
        if tokens and all(row in chosen or tokens[row] > left for row in among):
            break
        nearest = [max([0.0, *(cosines[row][s] for s in chosen)]) for row in among]
        barred = [row in chosen or bool(tokens and tokens[row] > left) for row in among]
        value = [-1e9 if no else relevance[row] - weight * c for row, c, no in zip(among, nearest, barred, strict=True)]
        best = value.index(max(value))
        chosen.append(among[best])
        similar.append(nearest[best])
    return chosen, similar


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_products_are_the_cosines(dtype):
    g = gradients(50, 256, dtype=dtype)
    G = g.sketch.double()
    unit = G / G.norm(dim=1, keepdim=True)
    D = Directions.of(g)
    P = D.products(D.rows(torch.arange(50)).T)
    assert (P - unit @ unit.T).abs().max() < 1e-7
    assert (D.mean - unit.mean(0)).abs().max() < 1e-7


def test_products_are_the_same_bits_however_they_are_summed():
    D = Directions.of(gradients(300, 1000))
    U = D.rows(torch.arange(300))
    P = D.products(U.T)
    shuffled = torch.randperm(1000, generator=torch.Generator().manual_seed(1))
    assert torch.equal(P, U[:, shuffled] @ U[:, shuffled].T)
    assert torch.equal(P[:, 7], (U * U[7]).flip(1).cumsum(1)[:, -1])
    assert torch.equal(P, torch.stack([U @ U[i] for i in range(300)]))
    assert torch.equal(P, P.T)


def test_unit_rows_lie_on_the_grid_and_zero_stays_zero():
    U = unit_rows(torch.tensor([[3e-30, 4e-30], [0.0, 0.0], [1.0, 2.0]]))
    assert torch.allclose(U[0], torch.tensor([0.6, 0.8], dtype=torch.float64), atol=1e-7)
    assert torch.equal(U[1], torch.zeros(2, dtype=torch.float64))
    assert torch.equal(U * 2**24, (U * 2**24).round())
    assert torch.equal(U.float().double(), U)
    assert torch.equal(on_grid(U), U)


def test_zero_rows_are_marked_and_not_in_the_mean():
    G = torch.tensor([[2.0, 0.0], [0.0, 0.0], [0.0, 5.0]])
    D = Directions.of(ArrayGradients(["a", "b", "c"], G))
    assert D.zero.tolist() == [False, True, False]
    assert D.mean.tolist() == [0.5, 0.5]


def test_what_does_not_fit_in_memory_is_read_again_with_the_same_result(monkeypatch):
    g = gradients(40, 8)
    cached = Directions.of(g)
    monkeypatch.setattr(module, "CACHE_BYTES", 0)
    streamed = Directions.of(g)
    assert streamed.cache is None
    assert cached.cache is not None
    V = cached.rows(torch.tensor([3, 1])).T
    assert torch.equal(streamed.products(V), cached.products(V))
    assert torch.equal(streamed.rows(torch.tensor([5, 2])), cached.rows(torch.tensor([5, 2])))
    args = (torch.zeros(40, dtype=torch.float64), 1.0, torch.arange(40), Budget.parse("9"))
    assert torch.equal(marginal_relevance(streamed, *args)[0], marginal_relevance(cached, *args)[0])


@settings(deadline=None, max_examples=60)
@given(
    n=st.integers(1, 24),
    distinct=st.integers(1, 24),
    weight=st.sampled_from([0.0, 0.25, 1.0, 3.0]),
    k=st.integers(1, 24),
    levels=st.integers(1, 5),
    seed=st.integers(0, 999),
)
def test_lazy_greedy_is_plain_greedy(n, distinct, weight, k, levels, seed):
    """`distinct` and `levels` make equal rows and equal relevances, so that ties are met."""
    g = gradients(n, 4, seed)
    g = ArrayGradients(g.ids, g.sketch[torch.arange(n) % distinct])
    rng = torch.Generator().manual_seed(seed)
    relevance = torch.randint(levels, (n,), generator=rng).double() / levels
    among = torch.randperm(n, generator=rng)[: max(1, n - 2)]
    D = Directions.of(g)
    U = D.rows(torch.arange(n))
    rows, nearest = marginal_relevance(D, relevance, weight, among, Budget.parse(min(k, n)))
    chosen, similar = marginal_relevance_naive((U @ U.T).tolist(), relevance.tolist(), weight, among.tolist(), min(k, n))
    assert rows.tolist() == chosen
    assert nearest.tolist() == similar


def test_lazy_greedy_over_many_rows_is_plain_greedy():
    g = gradients(700, 3)  # more than one block of stale rows
    D = Directions.of(g)
    U = D.rows(torch.arange(700))
    relevance = torch.zeros(700, dtype=torch.float64)
    rows, _ = marginal_relevance(D, relevance, 1.0, torch.arange(700), Budget.parse("30"))
    assert rows.tolist() == marginal_relevance_naive((U @ U.T).tolist(), relevance.tolist(), 1.0, list(range(700)), 30)[0]


def test_a_token_budget_passes_over_what_the_rest_does_not_pay_for():
    g = gradients(50, 4)
    U = Directions.of(g).rows(torch.arange(50))
    tokens = g.columns["tokens"].tolist()
    naive = marginal_relevance_naive((U @ U.T).tolist(), [0.0] * 50, 1.0, list(range(50)), 50, tokens, 33)[0]
    part, nearest = marginal_relevance(
        Directions.of(g), torch.zeros(50, dtype=torch.float64), 1.0, torch.arange(50), Budget.parse("33tok")
    )
    assert part.tolist() == naive
    assert len(nearest) == len(naive)
    assert sum(tokens[i] for i in naive) == 33
