"""Turns: each target in turn takes the candidate most like it, less what that one costs, that nobody took yet."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from gradsieve.errors import InvalidArgument
from gradsieve.selectors.directions import Directions
from gradsieve.selectors.ranking import id_order
from gradsieve.types import Budget

PRODUCT_BYTES = 1 << 28
"""Size of the products that are in memory at once: as many targets at a time as stay below it."""
LISTED = 1 << 22
"""Entries of all targets' lists together; when one runs out, all are made anew of the candidates that are left."""


@dataclass(frozen=True, eq=False)
class Turns:
    """What the targets took.

    Attributes:
        rows: Candidates in the order they were taken, int64 [k].
        taker: For each, the target that took it, int64 [k].
        similarity: For each, its cosine to that target, float64 [k].
        best: For every candidate its largest cosine to a target, float64 [n]; NaN where it has no direction.
    """

    rows: Tensor
    taker: Tensor
    similarity: Tensor
    best: Tensor


def take_turns(candidates: Directions, targets: Directions, budget: Budget, cost: Tensor | None = None) -> Turns:
    """Returns what the targets take in turns, in the order of their ids, until the budget is spent.

    Args:
        candidates: n rows; among equally similar ones the smaller id is taken first.
        targets: m rows of the same width.
        budget: With a budget in tokens a candidate that what is left does not pay for is passed over.
        cost: What is taken off all of a candidate's cosines before the targets look at them, float64 [n]; nothing by default.
            A candidate whose cost is NaN is not taken.

    Returns:
        The turns; O(n m d + m n log n) at most, with `PRODUCT_BYTES` for products.

    Raises:
        InvalidArgument: The widths differ, or no target has a direction.
    """
    wide, own = (len(part.mean) for part in (candidates, targets))
    if wide != own:
        raise InvalidArgument(f"the targets must be as wide as the candidates ({wide}), got {own}; extract one of them again")
    pool = candidates.gradients
    by_id = id_order(pool.ids)
    cost = torch.zeros(len(pool.ids), dtype=torch.float64) if cost is None else cost
    among = by_id[~(candidates.zero | cost.isnan())[by_id]]
    order = id_order(targets.gradients.ids)
    alive = order[~targets.zero[order]]
    T = targets.rows(alive)
    if not len(alive):
        raise InvalidArgument(f"a target must have a direction to take turns, got only zeros in {len(order)}; give others")
    limit = min(budget.limit(pool), len(among))
    table = _Table(limit, len(pool.ids), pool.columns["tokens"] if budget.tokens is not None else None, budget.tokens or 0)
    length = min(len(among), max(LISTED // len(alive), 2 * math.ceil(limit / len(alive))))
    best, lists = _lists(candidates, T, cost, among, length)
    table.serve(lists)
    while len(table.rows) < limit and len(among := among[table.open(among)]):  # a list ran out: new ones of what is left
        table.serve(_lists(candidates, T, cost, among, min(length, len(among)))[1])
    similarity = torch.tensor(table.similarity, dtype=torch.float64)
    rows, takers = (torch.tensor(part, dtype=torch.long) for part in (table.rows, table.takers))
    return Turns(rows, alive[takers], similarity, best.where(~candidates.zero, torch.nan))


def _lists(
    candidates: Directions, T: Tensor, cost: Tensor, among: Tensor, length: int
) -> tuple[Tensor, list[tuple[np.ndarray, np.ndarray]]]:
    """Returns the largest cosine of each candidate, and per target the `length` candidates it wants most with their cosines."""
    best = torch.full((len(candidates.zero),), -torch.inf, dtype=torch.float64)
    lists = []
    for part in T.split(max(1, PRODUCT_BYTES // (8 * len(best)))):
        P = candidates.products(part.T)
        best = best.maximum(P.amax(1))
        for j in range(P.shape[1]):
            along = P[among, j]
            worth = along - cost[among]
            if length < len(worth):
                far = (worth >= worth.topk(length).values[-1]).nonzero()[:, 0]
                far = far[worth[far].argsort(descending=True, stable=True)][:length]
            else:
                far = worth.argsort(descending=True, stable=True)
            lists.append((among[far].numpy(), along[far].numpy()))
    return best, lists


class _Table:
    """Who took what so far, whose turn it is, and what is left to spend.

    Attributes:
        rows: Candidates in the order they were taken.
        takers: The place of the target that took each.
        similarity: Its cosine to each.
    """

    def __init__(self, limit: int, n: int, tokens: Tensor | None, purse: float) -> None:
        self._limit, self._left = limit, float(purse)
        self._price = tokens.numpy() if tokens is not None else np.zeros(n)
        self._taken = np.zeros(n, dtype=bool)
        self._turn = 0
        self.rows: list[int] = []
        self.takers: list[int] = []
        self.similarity: list[float] = []

    def open(self, rows: Tensor) -> Tensor:
        """Returns which of these rows can still be taken: bool, shaped like `rows`."""
        return torch.from_numpy(~self._taken & (self._price <= self._left))[rows]

    def serve(self, lists: Sequence[tuple[np.ndarray, np.ndarray]]) -> None:
        """Goes on with the turns until the limit, or until the target whose turn it is finds nothing in its list.

        Args:
            lists: Per target the candidates it wants most, and their cosines.
        """
        places = [0] * len(lists)
        while len(self.rows) < self._limit:
            own, along = lists[self._turn]
            place = places[self._turn]
            while place < len(own) and (self._taken[own[place]] or self._price[own[place]] > self._left):
                place += 1
            if place == len(own):
                return
            row = int(own[place])
            self._taken[row] = True
            self._left -= float(self._price[row])
            self.rows.append(row)
            self.takers.append(self._turn)
            self.similarity.append(float(along[place]))
            places[self._turn] = place + 1
            self._turn = (self._turn + 1) % len(lists)
