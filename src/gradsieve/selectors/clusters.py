"""Spherical k-means on unit sketches, streamed from blocks.

Clusters are the actions of OGS. Sketch noise on one cosine is about 1/√d, but a centroid averages it out, which is why
sketches may decide here.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from gradsieve.errors import InvalidArgument
from gradsieve.selectors.directions import Directions, unit_rows
from gradsieve.selectors.ranking import id_order

SAMPLE_ROWS = 4096
"""Rows of a group held in memory to find its centroids."""

RESTARTS = 4
ROUNDS = 50


def cluster(directions: Directions, group: Tensor, counts: Sequence[int], rng: torch.Generator) -> Tensor:
    """Returns each row's cluster: spherical k-means within every group (Dhillon & Modha 2001, Machine Learning 42).

    Maximises Σ_i <u_i, c(i)> over unit centroids, u_i = g_i/‖g_i‖. k-means++ and Lloyd's rounds run on a sample of at most
    4096 rows a group; one pass over the blocks then moves the centroids to the means of all rows, and one assigns. The
    order of rows and blocks changes nothing: the sample follows the ids, and products and sums are exact. A row whose
    sketch is zero though its gradient is not (a hashed sketch can do that) goes to its group's first centroid.

    Args:
        directions: Unit sketches of n rows.
        group: int64 [n]: rows of two groups never share a cluster (domain rows and replay rows); -1 leaves a row out.
        counts: Clusters to look for in group 0, 1, …; fewer come back where a group has fewer distinct directions.
        rng: Draws the sample and the starting centroids.

    Returns:
        int64 [n]: 0 … K-1, each used, those of group 0 first; -1 where left out. O(n·K·d) time, O(n + sample·d) memory.

    Raises:
        InvalidArgument: A count is below 1.
    """
    if min(counts) < 1:
        raise InvalidArgument(f"clusters must be at least 1, got {min(counts)}")
    by_id = id_order(directions.gradients.ids)
    found, owner = [], []
    for number, k in enumerate(counts):
        members = by_id[group[by_id] == number]
        if len(members) == 0:
            continue
        sample = members[torch.randperm(len(members), generator=rng)[:SAMPLE_ROWS]]
        found.append(_kmeans(directions.rows(sample), k, rng))
        owner += [number] * len(found[-1])
    centroids = torch.cat(found)
    allowed = torch.tensor(owner)[None, :] == group[:, None]

    sums = torch.zeros_like(centroids)
    for rows, U in directions.blocks():
        inside = group[rows] >= 0
        sums.index_add_(0, _nearest(U, centroids, allowed[rows])[inside], U[inside])
    centroids = _moved(centroids, sums)

    labels = torch.empty(len(group), dtype=torch.int64)
    for rows, U in directions.blocks():
        labels[rows] = _nearest(U, centroids, allowed[rows])
    labels[group < 0] = -1
    used = labels[labels >= 0].unique()
    return torch.searchsorted(used, labels).where(labels >= 0, -1)


def _nearest(U: Tensor, centroids: Tensor, allowed: Tensor) -> Tensor:
    return (U @ centroids.T).masked_fill(~allowed, -torch.inf).argmax(1)


def _moved(centroids: Tensor, sums: Tensor) -> Tensor:
    return torch.where((sums != 0).any(1, keepdim=True), unit_rows(sums), centroids)  # one that nobody is nearest to stays


def _kmeans(U: Tensor, k: int, rng: torch.Generator) -> Tensor:
    """Returns the best of a few k-means runs on unit rows U [s, d]: unit centroids [at most k, d]."""
    best, best_value = U[:1], -torch.inf
    for _ in range(RESTARTS):
        centroids = _plus_plus(U, k, rng)
        labels = (U @ centroids.T).argmax(1)
        for _ in range(ROUNDS):
            centroids = _moved(centroids, torch.zeros_like(centroids).index_add_(0, labels, U))
            previous, labels = labels, (U @ centroids.T).argmax(1)
            if torch.equal(previous, labels):
                break
        value = float((U @ centroids.T).max(1).values.sum())
        if value > best_value:
            best, best_value = centroids, value
    return best


def _plus_plus(U: Tensor, k: int, rng: torch.Generator) -> Tensor:
    """Returns k-means++ starts (Arthur & Vassilvitskii 2007): rows drawn in proportion to 1 - largest cosine so far."""
    chosen = [int(torch.randint(len(U), (1,), generator=rng))]
    distance = 1 - U @ U[chosen[0]]
    while len(chosen) < k:
        total = torch.where(distance > 1e-9, distance, 0.0).cumsum(0)  # 1e-9: rounding between equal directions
        if not total[-1] > 0:
            break  # every direction is a centroid already
        point = torch.rand(1, generator=rng, dtype=torch.float64) * total[-1]
        chosen.append(int(torch.searchsorted(total, point)))
        distance = torch.minimum(distance, 1 - U @ U[chosen[-1]])
    return U[chosen]
