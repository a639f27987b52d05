"""Turns: each target in turn takes the candidate most like it, less what that one costs, that nobody took yet."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from gradsieve.errors import InvalidArgument
from gradsieve.selectors.directions import CACHE_BYTES, Directions
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
    """

    rows: Tensor
    taker: Tensor
    similarity: Tensor


class Similar:
    """The cosines of candidates to targets, some targets at a time.

    Attributes:
        candidates: n rows.
        by_id: Their `id_order`.
        targets: The targets that have a direction, in the order of their ids: rows int64 [m] of what was given.
    """

    def __init__(self, candidates: Directions, targets: Directions, keep: bool = False) -> None:
        """Checks that they go together.

        Args:
            candidates: n rows.
            targets: Rows of the same width.
            keep: Keep the cosines for the next time, where all are at most `CACHE_BYTES`.

        Raises:
            InvalidArgument: The widths differ, or no target has a direction.
        """
        wide, own = (len(part.mean) for part in (candidates, targets))
        if wide != own:
            raise InvalidArgument(
                f"the targets must be as wide as the candidates ({wide}), got {own}; extract one of them again"
            )
        order = id_order(targets.gradients.ids)
        self.candidates, self.by_id = candidates, id_order(candidates.gradients.ids)
        self.targets = order[~targets.zero[order]]
        if not len(self.targets):
            raise InvalidArgument(f"a target must have a direction to take turns, got only zeros in {len(order)}; give others")
        self._rows = targets.rows(self.targets)
        self._best = torch.full((len(candidates.zero),), -torch.inf, dtype=torch.float64)
        self._seen = False
        self._kept: list[Tensor] = []
        self._keep = keep and 8 * len(candidates.zero) * len(self.targets) <= CACHE_BYTES

    def parts(self) -> Iterator[Tensor]:
        """Yields the cosines, float64 [q, n], of the targets in their order; O(nmd), or O(nm) where they were kept."""
        if self._seen and self._keep:
            yield from self._kept
            return
        self._kept.clear()
        for rows in self._rows.split(max(1, PRODUCT_BYTES // (8 * len(self.candidates.zero)))):
            cosines = self.candidates.products(rows.T).T.contiguous()
            self._best = self._best if self._seen else self._best.maximum(cosines.amax(0))
            if self._keep:
                self._kept.append(cosines)
            yield cosines
        self._seen = True

    def best(self) -> Tensor:
        """Returns the largest cosine of every candidate to a target: float64 [n], NaN where it has no direction."""
        for _ in self.parts() if not self._seen else ():
            pass
        return self._best.where(~self.candidates.zero, torch.nan)


def take_turns(similar: Similar, budget: Budget, cost: Tensor | None = None) -> Turns:
    """Returns what the targets take in turns, in the order of their ids, until the budget is spent.

    Args:
        similar: n candidates and m targets; among equally similar candidates the smaller id is taken first.
        budget: With a budget in tokens a candidate that what is left does not pay for is passed over.
        cost: What is taken off all of a candidate's cosines before the targets look at them, float64 [n]; nothing by default.
            A candidate whose cost is NaN is not taken.

    Returns:
        The turns; O(n m d + m n log n) at most, with `PRODUCT_BYTES` for products.
    """
    candidates, targets = similar.candidates, similar.targets
    pool = candidates.gradients
    cost = torch.zeros(len(pool.ids), dtype=torch.float64) if cost is None else cost
    among = similar.by_id[~(candidates.zero | cost.isnan())[similar.by_id]]
    limit = min(budget.limit(pool), len(among))
    table = _Table(limit, len(pool.ids), pool.columns["tokens"] if budget.tokens is not None else None, budget.tokens or 0)
    # without a budget in tokens no target goes further down than the number of picks
    length = min(limit, max(LISTED // len(targets), 2 * math.ceil(limit / len(targets))))
    table.serve(_lists(similar, cost, among, length))
    while len(table.rows) < limit and len(among := among[table.open(among)]):  # a list ran out: new ones of what is left
        table.serve(_lists(similar, cost, among, min(length, len(among))))
    similarity = torch.tensor(table.similarity, dtype=torch.float64)
    rows, takers = (torch.tensor(part, dtype=torch.long) for part in (table.rows, table.takers))
    return Turns(rows, targets[takers], similarity)


def _lists(similar: Similar, cost: Tensor, among: Tensor, length: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """Returns, per target, the `length` candidates it wants most with their cosines."""
    lists, price = [], cost[among]
    for cosines in similar.parts():
        for of_target in cosines:
            along = of_target[among]
            worth = along - price
            if length < len(worth):
                far = (worth >= worth.topk(length).values[-1]).nonzero()[:, 0]
                far = far[worth[far].argsort(descending=True, stable=True)][:length]
            else:
                far = worth.argsort(descending=True, stable=True)
            lists.append((among[far].numpy(), along[far].numpy()))
    return lists


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
