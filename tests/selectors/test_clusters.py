"""Spherical k-means: against a naive twin, by hand, and whatever the order of rows."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from gradsieve.errors import InvalidArgument
from gradsieve.selectors import clusters
from gradsieve.selectors.clusters import cluster
from gradsieve.selectors.directions import Directions
from gradsieve.types import ArrayGradients


def directions(G: Tensor, ids: list[str] | None = None) -> Directions:
    return Directions.of(ArrayGradients(ids or [f"{i:04d}" for i in range(len(G))], G))


def run(G: Tensor, k: int, seed: int = 0, group: Tensor | None = None, ids: list[str] | None = None) -> Tensor:
    group = torch.zeros(len(G), dtype=torch.int64) if group is None else group
    return cluster(directions(G, ids), group, (k, 2), torch.Generator().manual_seed(seed))


def blobs(per: int, k: int, d: int = 32, noise: float = 0.3, seed: int = 0) -> tuple[Tensor, Tensor]:
    rng = torch.Generator().manual_seed(seed)
    centres = torch.linalg.qr(torch.randn(d, d, generator=rng)).Q[:k]
    truth = torch.arange(k).repeat(per)
    G = centres[truth] + noise * torch.randn(per * k, d, generator=rng) / d**0.5
    return G * torch.rand(per * k, 1, generator=rng).add(0.1), truth


def same_partition(a: Tensor, b: Tensor) -> bool:
    pairs = len(torch.stack([a, b]).unique(dim=1).T)
    return pairs == len(a.unique()) == len(b.unique())


def objective(G: Tensor, labels: Tensor) -> float:
    """Σ_i <u_i, c(i)> with the best centroid of each cluster is the sum of the norms of the clusters' sums."""
    U = G.double() / G.double().norm(dim=1, keepdim=True)
    return sum(float(U[labels == c].sum(0).norm()) for c in labels.unique())


def lloyd_naive(G: Tensor, labels: Tensor) -> Tensor:
    """One round of spherical k-means, row by row."""
    U = G.double() / G.double().norm(dim=1, keepdim=True)
    centres = []
    for c in range(int(labels.max()) + 1):
        total = torch.zeros(G.shape[1], dtype=torch.float64)
        for u in U[labels == c]:
            total += u
        centres.append(total / total.norm())
    return torch.tensor([max(range(len(centres)), key=lambda c: float(u @ centres[c])) for u in U])


@pytest.mark.parametrize("seed", range(4))
def test_planted_directions_are_found_whatever_the_norms(seed):
    G, truth = blobs(15, 8, seed=seed)
    assert same_partition(run(G, 8, seed), truth)


@pytest.mark.parametrize("seed", range(3))
def test_the_result_is_a_fixed_point_of_the_naive_round(seed):
    G = torch.randn(120, 12, generator=torch.Generator().manual_seed(seed))
    labels = run(G, 5, seed)
    assert torch.equal(lloyd_naive(G, labels), labels)


def test_restarts_find_what_one_start_may_miss(monkeypatch):
    G = torch.randn(300, 10, generator=torch.Generator().manual_seed(1))
    with_restarts = objective(G, run(G, 6))
    monkeypatch.setattr(clusters, "RESTARTS", 1)
    assert with_restarts > min(objective(G, run(G, 6, seed)) for seed in range(4))


def test_four_rows_by_hand():
    G = torch.tensor([[1.0, 0.1], [5.0, -0.5], [-0.1, 2.0], [0.0, 0.3]])
    assert same_partition(run(G, 2), torch.tensor([0, 0, 1, 1]))


def test_a_sample_smaller_than_the_pool_finds_the_same_clusters(monkeypatch):
    G, truth = blobs(200, 4, noise=0.2)
    monkeypatch.setattr(clusters, "SAMPLE_ROWS", 60)
    assert same_partition(run(G, 4), truth)


def test_the_sample_is_not_the_first_rows_by_id(monkeypatch):
    G, truth = blobs(100, 4, noise=0.2)
    order = truth.argsort(stable=True)
    monkeypatch.setattr(clusters, "SAMPLE_ROWS", 60)
    assert same_partition(run(G[order], 4), truth[order])


def test_the_pass_over_all_rows_moves_the_centroids(monkeypatch):
    G, _ = blobs(400, 3, d=64, noise=2.0, seed=3)
    whole = objective(G, run(G, 3))
    monkeypatch.setattr(clusters, "SAMPLE_ROWS", 24)
    sampled = objective(G, run(G, 3))
    monkeypatch.setattr(clusters, "_moved", lambda centroids, sums: centroids)
    assert sampled > objective(G, run(G, 3))
    assert sampled > 0.9 * whole


@given(seed=st.integers(0, 50), n=st.integers(1, 40), k=st.integers(1, 6))
@settings(max_examples=25, deadline=None)
def test_the_order_of_the_rows_changes_nothing(seed, n, k):
    rng = torch.Generator().manual_seed(seed)
    G = torch.randn(n, 4, generator=rng)
    order = torch.randperm(n, generator=rng)
    ids = [f"{i:03d}" for i in range(n)]
    a, b = run(G, k, seed, ids=ids), run(G[order], k, seed, ids=[ids[i] for i in order])
    assert torch.equal(a[order], b)
    assert a.min() == 0
    assert torch.equal(a.unique(), torch.arange(len(a.unique())))
    assert len(a.unique()) <= k


def test_groups_never_share_a_cluster_and_come_in_order():
    G, _ = blobs(20, 3)
    group = torch.zeros(60, dtype=torch.int64)
    group[::2] = 1
    group[5] = -1
    labels = run(G, 3, group=group)
    assert labels[5] == -1
    assert (labels == -1).sum() == 1
    assert labels[group == 0].max() < labels[group == 1].min()
    assert len(labels[group == 1].unique()) == 2


def test_rows_that_are_left_out_do_not_move_a_centroid():
    rng = torch.Generator().manual_seed(2)
    G, away = torch.randn(60, 6, generator=rng), torch.randn(6, generator=rng).expand(200, 6)
    group = torch.cat([torch.zeros(60, dtype=torch.int64), torch.full((200,), -1)])
    assert torch.equal(run(torch.cat([G, away]), 4, group=group)[:60], run(G, 4))


def test_equal_directions_are_one_cluster():
    G = torch.tensor([[1.0, 2.0], [3.0, -1.0]]).repeat(10, 1) * torch.arange(1, 21)[:, None]
    assert same_partition(run(G, 5), torch.arange(2).repeat(10))


def test_a_count_below_one_is_refused():
    with pytest.raises(InvalidArgument, match="clusters must be at least 1, got 0"):
        run(torch.eye(3), 0)
