"""Unit sketches whose products are exact, so that a choice never hangs on the order of a floating-point sum.

Every entry of a unit row is rounded to a multiple of 2^-24 (the step of a float32 next to 1; it moves a cosine by less than
1e-7, the sketch's own noise is 1/√d). The product of two entries is then a multiple of 2^-48, a partial sum of a row's
products is at most about 1 by Cauchy-Schwarz, and float64 holds such sums without rounding. Cosines are therefore the same bits
for any block size, thread count and device, and equal gradients tie exactly.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from gradsieve.errors import InvalidArgument
from gradsieve.types import Budget, Gradients

CACHE_BYTES = 2 << 30
"""Unit sketches of at most this size (as float32) stay in memory; larger ones are read again in each pass."""

_STEPS = 2.0**24


@dataclass(frozen=True, eq=False)
class Directions:
    """The unit sketches of some examples at one checkpoint; make it with `Directions.of`.

    Attributes:
        gradients: Where the sketches come from.
        checkpoint: Which of its checkpoints, None for the first, or one of its representations.
        zero: bool [n]: the sketch is zero, so that the row has no direction; its unit row is zero.
        mean: float64 [d] on the grid: the mean unit row over the rows that have a direction.
        cache: float32 [n, d], or None where it would exceed `CACHE_BYTES`.
    """

    gradients: Gradients
    checkpoint: str | None
    zero: Tensor
    mean: Tensor
    cache: Tensor | None

    @classmethod
    def of(cls, gradients: Gradients, checkpoint: str | None = None) -> Directions:
        """Reads all sketches, or rows of a representation, once; O(nd).

        Raises:
            InvalidArgument: A sketch is not finite.
        """
        n, d = len(gradients.ids), gradients.rows(torch.zeros(1, dtype=torch.long), checkpoint).shape[1]
        what = checkpoint if checkpoint in gradients.representations else "sketch"
        zero = torch.zeros(n, dtype=torch.bool)
        total = torch.zeros(d, dtype=torch.float64)
        cache = torch.empty(n, d) if 4 * n * d <= CACHE_BYTES else None
        for rows, sketch in gradients.blocks(checkpoint):
            finite = sketch.isfinite().all(1)
            if not finite.all():
                row = int(rows[~finite][0])
                raise InvalidArgument(f"the {what} of {gradients.ids[row]!r} must be finite; extract it again")
            U = unit_rows(sketch)
            zero[rows] = (U == 0).all(1)
            total += U.sum(0)  # exact for n < 2^29
            if cache is not None:
                cache[rows] = U.float()  # exact: 24 bits
        return cls(gradients, checkpoint, zero, on_grid(total / max(int((~zero).sum()), 1)), cache)

    def rows(self, index: Tensor) -> Tensor:
        """Returns the unit rows in `index` (int64 [k]), in that order: float64 [k, d]."""
        if self.cache is not None:
            return self.cache[index].double()
        return unit_rows(self.gradients.rows(index, self.checkpoint))

    def blocks(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yields (rows int64 [b], unit rows float64 [b, d]) until every row came once, in any order."""
        if self.cache is not None:
            for index in torch.arange(len(self.zero)).split(4096):
                yield index, self.cache[index].double()
        else:
            for index, sketch in self.gradients.blocks(self.checkpoint):
                yield index, unit_rows(sketch)

    def products(self, V: Tensor) -> Tensor:
        """Returns the product of every unit row with the columns of V: float64 [n, q]; O(ndq).

        Args:
            V: float64 [d, q] on the grid, columns of norm at most about 1: the results are then exact.
        """
        P = torch.empty(len(self.zero), V.shape[1], dtype=torch.float64)
        for index, U in self.blocks():
            P[index] = U @ V
        return P


def on_grid(values: Tensor) -> Tensor:
    """Returns the values rounded to multiples of 2^-24, float64."""
    return (values.double() * _STEPS).round() / _STEPS


def unit_rows(sketch: Tensor) -> Tensor:
    """Returns the rows scaled to unit length, on the grid: float64 [b, d]; a zero row stays zero."""
    G = sketch.double()
    norm = G.square().sum(1, keepdim=True).sqrt()
    return on_grid(G / norm.where(norm > 0, 1.0))


def marginal_relevance(
    directions: Directions, relevance: Tensor, weight: float, among: Tensor, budget: Budget
) -> tuple[Tensor, Tensor]:
    """Returns rows chosen greedily, each the one with the largest relevance that is least like those already chosen.

    argmax_z relevance(z) - weight · max(0, max_{s chosen} cos(z, s)), ties by the order of `among`: maximal marginal relevance
    (Carbonell & Goldstein 1998). The similarity of a row only grows, so its last known value is an upper bound: only rows whose
    bound reaches the top are brought up to date, in blocks (Minoux 1978). The choice is the one of the plain greedy rule.

    Args:
        directions: Unit sketches of the pool.
        relevance: float64 [n].
        weight: At least 0.
        among: The rows one may choose from, by id: int64 [r].
        budget: How much to choose; of tokens, until no row is left that the rest pays for.

    Returns:
        Rows in the order they were chosen, int64 [k], and max(0, largest cosine to the rows before) of each, float64 [k];
        O(r d k) at most.
    """
    pool = directions.gradients
    steps = min(budget.limit(pool), len(among))
    relevance = relevance[among]
    bound, nearest = relevance.clone(), torch.zeros_like(relevance)
    seen = torch.zeros(len(among), dtype=torch.long)  # how many of the chosen are in `nearest`
    chosen = torch.empty(steps, pool.dim)
    picks: list[int] = []
    price = pool.columns["tokens"][among] if budget.tokens is not None else None
    left = float(budget.tokens or 0)
    for step in range(steps):
        width = 256
        if price is not None:
            dear = price > left
            bound[dear], seen[dear] = -torch.inf, steps  # for good: what is left only falls
            if not (bound > -torch.inf).any():
                break
        while seen[top := int(bound.argmax())] < step:  # argmax returns the first of equals
            stale = torch.cat([bound.topk(min(width, len(bound))).indices, torch.tensor([top])]).unique()
            stale = stale[seen[stale] < step]
            for start in seen[stale].unique().tolist():
                group = stale[seen[stale] == start]
                recent = chosen[start:step].double().T
                closest = [(directions.rows(part) @ recent).amax(1) for part in among[group].split(4096)]
                nearest[group] = nearest[group].maximum(torch.cat(closest))
                bound[group] = relevance[group] - weight * nearest[group]
                seen[group] = step
            width *= 2
        picks.append(top)
        if price is not None:
            left -= price[top].item()
        chosen[step] = directions.rows(among[top : top + 1])[0].float()
        bound[top], seen[top] = -torch.inf, steps
    order = torch.tensor(picks, dtype=torch.long)
    return among[order], nearest[order]
