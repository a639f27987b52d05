"""Orders of rows: by score with ties on the id, spread over strata, and cut where the budget ends."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor

from gradsieve.errors import InvalidArgument
from gradsieve.selectors.reading import check_choice
from gradsieve.types import Budget, Gradients

Stratify = Literal["none", "length"]

LENGTH_BOUND = 0.5
"""Absolute rank correlation with length above which a score is called a length meter."""


def id_order(ids: Sequence[str]) -> Tensor:
    """Returns the rows sorted by id: int64 [n]. Work in this order does not depend on the order of the pool."""
    return torch.tensor(sorted(range(len(ids)), key=ids.__getitem__), dtype=torch.long)


def best_first(scores: Tensor, by_id: Tensor) -> Tensor:
    """Returns the rows by descending score, ties by id, rows without a score (NaN) left out: int64 [≤ n].

    Args:
        scores: float64 [n].
        by_id: `id_order` of the ids [n], or of the rows one may choose from.
    """
    scored = by_id[~scores[by_id].isnan()]
    return scored[scores[scored].argsort(descending=True, stable=True)]


def quantile_strata(values: Tensor, bins: int, by_id: Tensor) -> Tensor:
    """Returns the stratum of each row: int64 [n] in [0, bins), strata of equal size by ascending value, ties by id."""
    n = len(values)
    ascending = by_id[values[by_id].argsort(stable=True)]
    strata = torch.empty(n, dtype=torch.long)
    strata[ascending] = torch.arange(n) * bins // n
    return strata


def check_stratify(stratify: str, bins: int) -> None:
    """Raises InvalidArgument unless this is a way to stratify."""
    check_choice("stratify", stratify, Stratify)
    if bins < 2:
        raise InvalidArgument(f"bins must be at least 2, got {bins}; write stratify none for no strata")


def spread(order: Tensor, strata: Tensor) -> Tensor:
    """Returns the same rows, reordered so that every prefix holds each stratum in proportion to its size.

    Within a stratum the order stays. The j-th row (from 0) of a stratum of s rows goes to place (j + ½)/s, which is the
    apportionment of Webster and Sainte-Laguë: shares are right to within a row and, unlike with largest remainders, the
    choice for a budget contains that for every smaller one, so that a token budget may cut anywhere. Where places
    coincide the lower stratum comes first, so that how many rows a stratum gets never depends on the order.

    Args:
        order: Rows, best first: int64 [r].
        strata: Stratum of every row of the pool: int64 [n].
    """
    grouped = order[strata[order].argsort(stable=True)]
    sizes = strata[grouped].bincount()
    size = sizes[strata[grouped]]
    rank = torch.arange(len(order)) - (sizes.cumsum(0) - sizes)[strata[grouped]]
    return grouped[((rank + 0.5) / size).argsort(stable=True)]


def pay(order: Tensor, candidates: Gradients, budget: Budget) -> tuple[Tensor, list[str]]:
    """Returns the rows of `order` that the budget pays for, and a note if they fall short of it.

    Of a budget in tokens, rows that what is left does not pay for are passed over (see `Budget.take`).

    Args:
        order: The rows one may choose, best first: int64 [≤ n].
        candidates: The pool.
        budget: How much to choose.
    """
    rows = budget.take(order, candidates)
    if budget.tokens is None:
        limit = budget.limit(candidates)
        if len(rows) == limit:
            return rows, []
        return rows, [f"{len(rows)} examples are chosen of the {limit} the budget asks for: no others are eligible"]
    tokens = candidates.columns["tokens"]
    spent = int(tokens[rows].sum())
    if spent >= 0.95 * budget.tokens:
        return rows, []
    why = "no other eligible example is short enough"
    if len(rows) < len(order):
        why = f"the shortest of the others has {int(tokens[order[~torch.isin(order, rows)]].min())}"
    return rows, [f"the chosen {len(rows)} examples spend {spent} of the budget's {budget.tokens} tokens: {why}"]


def exact_mean(values: Tensor) -> float:
    """Returns the mean, NaN left out, rounded once: the same for any order and number of threads; NaN if none is left."""
    numbers = values[~values.isnan()].tolist()
    return math.fsum(numbers) / len(numbers) if numbers else math.nan


def deviation(values: Tensor) -> float:
    """Returns the standard deviation (divisor n) around `exact_mean`."""
    return math.sqrt(exact_mean((values - exact_mean(values)).square()))


def percentile(values: Tensor, q: float) -> float:
    """Returns the q-th percentile (q in [0, 100]) of the values that are not NaN, linear between neighbours."""
    ascending = values[~values.isnan()].sort().values
    place = q / 100 * (len(ascending) - 1)
    low, high = ascending[math.floor(place)].item(), ascending[math.ceil(place)].item()
    return low + (high - low) * (place - math.floor(place))


def spearman(x: Tensor, y: Tensor) -> float:
    """Returns Spearman's rank correlation with mean ranks for ties; NaN if either is constant or holds under 2 values."""
    if len(x) < 2:
        return float("nan")
    a, b = (_mean_ranks(v) for v in (x, y))
    a, b = a - a.mean(), b - b.mean()
    return float((a @ b) / (a.square().sum() * b.square().sum()).sqrt())


def split_half(candidates: Gradients, halves: Mapping[str, Tensor]) -> dict[str, float]:
    """Returns, for each reference, the rank correlation of the scores that two halves of its examples give the candidates.

    The score is the cosine, estimated on sketches: their error lowers the correlation and never makes one. One pass.

    Args:
        candidates: The pool, sketches of plain gradients.
        halves: float32 [splits, 2, d] by name; the mean over the splits is returned.
    """
    names, sides = list(halves), torch.stack(list(halves.values()))
    products = torch.empty(len(candidates.ids), sides[..., 0].numel(), dtype=torch.float32)
    for rows, block in candidates.blocks():
        products[rows] = torch.nn.functional.normalize(block, dim=1) @ sides.flatten(0, -2).T
    parts = products.T.double().view(len(names), -1, 2, len(candidates.ids))
    return {name: sum(spearman(a, b) for a, b in part) / len(part) for name, part in zip(names, parts, strict=True)}


def length_check(scores: Mapping[str, Tensor], candidates: Gradients) -> tuple[dict[str, float], list[str]]:
    """Returns the rank correlation of each score with the completion's length, and a note for each that is mostly length.

    Args:
        scores: float64 [n] by name, NaN where a row has none.
        candidates: The pool; without a `completion_tokens` column nothing is known about length and both results are empty.
    """
    if "completion_tokens" not in candidates.columns:
        return {}, []
    length = candidates.columns["completion_tokens"]
    rho = {name: spearman(s[~s.isnan()], length[~s.isnan()]) for name, s in scores.items()}
    return rho, [
        f"{name} is largely a measure of length: its rank correlation with completion_tokens is {r:+.2f}"
        for name, r in rho.items()
        if abs(r) > LENGTH_BOUND
    ]


def _mean_ranks(values: Tensor) -> Tensor:
    _, inverse, counts = values.unique(return_inverse=True, return_counts=True)
    rank: Tensor = counts.cumsum(0).double() - (counts.double() - 1) / 2
    return rank[inverse]
