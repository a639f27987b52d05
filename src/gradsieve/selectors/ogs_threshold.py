"""The threshold rule of constrained selection: the most utility whose mean risk keeps a bound (OGS-8)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from gradsieve.selectors.ranking import exact_mean
from gradsieve.types import Budget, Gradients

LARGEST_PENALTY = 1e6
"""Above this λ a difference in risk of one millionth outweighs any utility: the order is by risk first, utility second."""

PRECISION = 1e-12
"""How near, relative to λ, the bisection comes to it."""

TOLERANCE = 1e-12
"""On a mean risk, for the rounding of the mean itself."""


@dataclass(frozen=True, eq=False)
class Trade:
    """The order at the smallest λ that meets the bound.

    Attributes:
        order: Rows, best first.
        penalty: λ, or None where the order is by risk first and utility second.
        riskier: The order just below that λ, which misses the bound; the same as `order` if λ is 0 or None.
        path: (λ, mean risk, mean utility) of the rows paid for, for every λ tried.
    """

    order: Tensor
    penalty: float | None
    riskier: Tensor
    path: list[tuple[float, float, float]]


def trade(
    order_at: Callable[[float], Tensor],
    utility: Tensor,
    risk: Tensor,
    bound: float,
    safe: Tensor,
    take: Callable[[Tensor], Tensor],
    precision: float,
) -> Trade:
    """Returns the order at the smallest λ whose choice has a mean risk within the bound (Eq. OGS-8), found by bisection.

    max Σ a_i x_i with Σ x_i = k, Σ r_i x_i <= k·bound, 0 <= x <= 1 has the Lagrangian dual min_λ Σ top-k(a - λr) + λ·k·bound: a
    choice by a - λr that meets the bound with equality is optimal, and its mean risk falls in λ. (A token budget lets k vary
    with λ, and other orders than by a - λr need not fall everywhere: then the bound is met too, but nothing is claimed about
    the optimum.)

    Args:
        order_at: Gives the rows, best first, where a unit of risk costs λ ≥ 0 of utility.
        utility: float64 [n], for the path alone.
        risk: float64 [n], NaN where the row may not be chosen.
        bound: On the mean risk of the rows taken.
        safe: The order by risk first and utility second.
        take: Cuts an order where the budget ends.
        precision: How near, relative to λ, the bisection comes to it.
    """
    path: list[tuple[float, float, float]] = []

    def meets(order: Tensor) -> bool:
        return not exact_mean(risk[take(order)]) > bound + TOLERANCE

    def tried(order: Tensor, penalty: float) -> bool:
        rows = take(order)
        path.append((penalty, exact_mean(risk[rows]), exact_mean(utility[rows])))
        return meets(order)

    order = order_at(0.0)
    if tried(order, 0.0):
        return Trade(order, 0.0, order, path)
    if not meets(safe):
        return Trade(safe, None, safe, path)
    low, riskier, high = 0.0, order, 1.0
    while not tried(order := order_at(high), high):
        low, riskier, high = high, order, 2 * high
        if high > LARGEST_PENALTY:
            return Trade(safe, None, safe, path)
    while high - low > precision * high:
        middle = (low + high) / 2
        trial = order_at(middle)
        if tried(trial, middle):
            high, order = middle, trial
        else:
            low, riskier = middle, trial
    return Trade(order, high, riskier, path)


def within(order: Tensor, pool: Gradients, budget: Budget, risk: Tensor, bound: float) -> Tensor:
    """Returns the order without the rows that may not fill up a token budget: after the first that it does not pay for, only
    rows within the bound count, which cannot lift the mean risk above it."""
    if budget.tokens is None:
        return order
    head = int((pool.columns["tokens"][order].cumsum(0) <= budget.tokens).sum())
    return torch.cat([order[:head], order[head:][risk[order[head:]] <= bound]])


def exchange(rows: Tensor, riskier: Tensor, safest: Tensor, risk: Tensor, strata: Tensor, bound: float) -> Tensor:
    """Returns `rows` with as many rows of the riskier choice swapped in as the bound has room for.

    The two choices lie on either side of the critical λ, where all rows in which they differ have equal a - λr: there the
    riskier row is the more useful one. What room is left in the end is less than the next swap would take.

    Args:
        rows: A choice that meets the bound: int64 [k].
        riskier: One that does not, with as many rows of each stratum: int64 [k].
        safest: The rows one may choose from, by ascending risk, ties by id.
        risk: float64 [n].
        strata: int64 [n].
        bound: On the mean risk of the chosen.
    """
    grouped = safest[strata[safest].argsort(stable=True)]
    out = grouped[torch.isin(grouped, rows) & ~torch.isin(grouped, riskier)]
    into = grouped[torch.isin(grouped, riskier) & ~torch.isin(grouped, rows)]
    rise = risk[into] - risk[out]
    rows, total = rows.clone(), exact_mean(risk[rows]) * len(rows)
    for pair in rise.argsort(stable=True).tolist():
        if rise[pair] <= 0:
            continue
        total += rise[pair].item()
        if total > (bound + TOLERANCE) * len(rows):
            break
        rows[rows == out[pair]] = into[pair]
    return rows
