"""Turns: each target in turn takes the candidate most like it that nobody took yet."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
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
"""Entries of all targets' lists together, at first; a list that runs out makes all twice as long."""


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


def take_turns(candidates: Directions, targets: Directions, budget: Budget) -> Turns:
    """Returns what the targets take in turns, in the order of their ids, until the budget is spent.

    Args:
        candidates: n rows; among equally similar ones the smaller id is taken first.
        targets: m rows of the same width.
        budget: With a token budget the last row may be one that it no longer pays for.

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
    among = by_id[~candidates.zero[by_id]]
    order = id_order(targets.gradients.ids)
    alive = order[~targets.zero[order]]
    T = targets.rows(alive)
    if not len(alive):
        raise InvalidArgument(f"a target must have a direction to take turns, got only zeros in {len(order)}; give others")
    limit = min(budget.limit(pool), len(among))
    length = min(len(among), max(LISTED // len(alive), 2 * math.ceil(limit / len(alive))))
    tokens = pool.columns["tokens"].tolist() if budget.tokens is not None else None
    while True:
        best, lists = _lists(candidates, T, among, length)
        taken = _turns(lists, limit, len(pool.ids), tokens, budget.tokens, complete=length == len(among))
        if taken is not None:
            break
        length = min(2 * length, len(among))
    rows, taker, similarity = taken
    return Turns(rows, alive[taker], similarity, best.where(~candidates.zero, torch.nan))


def _lists(candidates: Directions, T: Tensor, among: Tensor, length: int) -> tuple[Tensor, list[tuple[np.ndarray, np.ndarray]]]:
    """Returns the largest cosine of each candidate, and per target its `length` most similar candidates with their cosines."""
    best = torch.full((len(candidates.zero),), -torch.inf, dtype=torch.float64)
    lists = []
    for part in T.split(max(1, PRODUCT_BYTES // (8 * len(best)))):
        P = candidates.products(part.T)
        best = best.maximum(P.amax(1))
        for j in range(P.shape[1]):
            along = P[among, j]
            if length < len(along):
                far = (along >= along.topk(length).values[-1]).nonzero()[:, 0]
                far = far[along[far].argsort(descending=True, stable=True)][:length]
            else:
                far = along.argsort(descending=True, stable=True)
            lists.append((among[far].numpy(), along[far].numpy()))
    return best, lists


def _turns(
    lists: Sequence[tuple[np.ndarray, np.ndarray]],
    limit: int,
    n: int,
    tokens: Sequence[float] | None,
    purse: float | None,
    *,
    complete: bool,
) -> tuple[Tensor, Tensor, Tensor] | None:
    """Returns (rows, takers, cosines) of the turns; None if a list that is not complete ran out."""
    taken = bytearray(n)
    places = [0] * len(lists)
    rows: list[int] = []
    takers: list[int] = []
    cosines: list[float] = []
    spent = 0.0
    for target in _forever(len(lists)):
        if len(rows) == limit:
            break
        own, along = lists[target]
        place = places[target]
        while place < len(own) and taken[own[place]]:
            place += 1
        if place == len(own):  # with complete lists the limit is reached before
            assert not complete
            return None
        row = int(own[place])
        taken[row] = 1
        places[target] = place + 1
        rows.append(row)
        takers.append(target)
        cosines.append(float(along[place]))
        if tokens is not None and purse is not None:
            spent += tokens[row]
            if spent > purse:
                break
    return torch.tensor(rows), torch.tensor(takers), torch.tensor(cosines, dtype=torch.float64)


def _forever(m: int) -> Iterator[int]:
    while True:
        yield from range(m)
