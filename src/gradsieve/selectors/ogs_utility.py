"""How an example's direction agrees with the target's: less what the whole pool shares, or by its nearest targets."""

from __future__ import annotations

import torch
from torch import Tensor

from gradsieve.errors import InvalidArgument
from gradsieve.selectors.directions import Directions, unit_rows
from gradsieve.selectors.ranking import exact_mean


def centrality(directions: Directions) -> Tensor:
    """Returns the cosine of every row with the pool's mean direction: float64 [n]; O(nd)."""
    return directions.products(unit_rows(directions.mean[None]).T)[:, 0]


def centred(utility: Tensor, directions: Directions) -> Tensor:
    """Returns the partial cosine of every row with the target given the pool's mean direction: float64 [n]; O(nd).

    The mean of the exact cosines is <μ, t>, so that q_t needs no sketch of the target. A row without a direction of its own
    gets 0.

    Raises:
        InvalidArgument: The target has no direction of its own either.
    """
    length = directions.mean.square().sum().sqrt().item()
    if length == 0:  # nothing is shared
        return utility
    shared = centrality(directions)
    target = exact_mean(utility) / length
    if target**2 >= 1:
        raise InvalidArgument(
            f"center must leave something of the target, got a cosine of {target:.3f} to the pool's mean direction; turn it off"
        )
    own = (1 - shared.square()) * (1 - target**2)
    return ((utility - shared * target) / own.sqrt()).where((1 - shared.square() > 1e-6) | utility.isnan(), 0.0)


def nearest_targets(directions: Directions, targets: Directions, neighbours: int) -> Tensor:
    """Returns the mean of each row's largest cosines to the targets, after centring: float64 [n]; O(nmd).

    With μ the pool's mean unit row, cos(u - μ, v - μ) for every unit target v; the mean of the `neighbours` largest. A row that
    is μ itself has no direction of its own and gets 0.

    Args:
        directions: Unit sketches of the pool, or unit rows of a representation.
        targets: The same of m targets; those without a direction do not count.
        neighbours: How many count, at least 1.

    Raises:
        InvalidArgument: No target has a direction of its own.
    """
    mean = directions.mean
    V = targets.rows((~targets.zero).nonzero().flatten()) - mean
    V = unit_rows(V[V.square().sum(1) > 1e-12])
    if not len(V):
        raise InvalidArgument("utility needs a target that differs from the pool's mean direction, got none; use utility mean")
    k = min(neighbours, len(V))
    shift, length = V @ mean, float(mean.square().sum())
    utility = torch.zeros(len(directions.zero), dtype=torch.float64)
    for rows, U in directions.blocks():
        own = (U.square().sum(1) - 2 * (U @ mean) + length).clamp(min=0)
        similar = (U @ V.T - shift).topk(k, dim=1).values.mean(1)
        utility[rows] = torch.where(own > 1e-6, similar / own.where(own > 1e-6, 1.0).sqrt(), 0.0)
    return utility
