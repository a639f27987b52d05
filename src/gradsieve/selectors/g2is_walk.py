"""The gradient walk of G2IS: component by component over the graph, under the no-conflict and the consistency constraint.

Two facts let each step cost little (the published code sorts all n candidates whenever a walk is stuck):

*   Within a component the chosen set only grows. A candidate that conflicts with one of its rows always will, so it is
    struck out for good: from the fallback order too, which is sorted once per component.
*   Consistency compares the sum Σ with and without the candidate. Σ turns with every pick, so a candidate that fails now may
    pass later: it keeps its place in the fallback order and is asked again.

A candidate is brought up to date only when it is asked for: its products with the rows chosen since it was last asked tell
both constraints, as <Σ, g_n> is their sum.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from gradsieve.selectors.directions import Directions
from gradsieve.selectors.graph import Neighbours

ROUNDING = 1e-9
"""Cosines of sums that differ by less are equal."""

START_AMONG = 1000
"""Candidates, used ones included, among which a component finds its start: those furthest along its direction."""

Via = Literal["start", "walk", "fallback"]
Shortfall = Literal["stop", "next-component"]


@dataclass(frozen=True)
class Component:
    """What the walk did for one direction of core knowledge.

    Attributes:
        budget: What it could spend (examples, or tokens), with what was passed on to it.
        rows: Its picks in order.
        via: How each was found.
        stop: Why it ended: "budget" (spent), "exhausted" (no unused candidates), "price" (there are, but each costs more than
            is left), "start" (some cost no more, but none where a start is looked for) or "constraints" (each of those breaks
            one).
        conflicts: For "constraints": unused candidates with a negative product with one of its picks.
        inconsistent: For "constraints": the others, which would turn the sum too far away from the direction.
        dear: For "price" and "constraints": unused candidates that cost more than is left; they are in neither of the above.
    """

    budget: float
    rows: list[int]
    via: list[Via]
    stop: Literal["budget", "exhausted", "price", "start", "constraints"]
    conflicts: int = 0
    inconsistent: int = 0
    dear: int = 0


def walk(
    directions: Directions,
    products: Tensor,
    budgets: Sequence[float],
    neighbours: Neighbours,
    by_id: Tensor,
    *,
    delta: float,
    price: Tensor,
    on_shortfall: Shortfall = "stop",
) -> list[Component]:
    """Returns the picks for each component (Eq. G2IS-3; Zhao et al. 2025, arXiv:2502.11062, Alg. 1).

    Start at the first unused of the `START_AMONG` candidates with the largest <g, k>; then take the first unused neighbour of
    the last pick, or else the first of all unused candidates by descending <g, k>, that has <g, g_s> ≥ 0 for each pick s of
    this component, and |cos(Σ + g, k)| ≥ δ |cos(Σ, k)|. Zero gradients are never taken, and candidates that cost more than is
    left of the component's budget are passed over.

    Args:
        directions: Unit sketches of the pool.
        products: <g, k> of every candidate with every component's direction: float64 [n, v].
        budgets: What each component may spend, float [v].
        neighbours: The graph.
        by_id: Rows in the order of their ids, in which ties break: int64 [n].
        delta: δ in [0, 1].
        price: What each row costs: float64 [n].
        on_shortfall: Whether what a component cannot use because of the constraints is passed on to the next. What is too
            little for any candidate that is left always is.

    Returns:
        One entry per component. O(kd) for a candidate that is asked for, and one sort of n a component.
    """
    used = directions.zero.clone()
    done, left = [], 0.0
    for k, own in zip(products.T, budgets, strict=True):
        budget = own + left
        left = 0.0
        if budget <= 0:
            done.append(Component(budget, [], [], "budget"))
            continue
        done.append(_Walk(directions, k, used, by_id, delta, price, budget).run(neighbours))
        used[done[-1].rows] = True
        if done[-1].stop == "price" or (done[-1].stop in ("start", "constraints") and on_shortfall == "next-component"):
            left = budget - float(price[done[-1].rows].sum())
    return done


@dataclass(eq=False)
class _Walk:
    """One component's walk. `products` are <g, k>; `struck` are rows it can never take: used, zero, or in conflict."""

    directions: Directions
    products: Tensor
    used: Tensor
    by_id: Tensor
    delta: float
    price: Tensor
    budget: float
    rows: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        n = len(self.used)
        self.struck = self.used.clone()
        self.seen = torch.zeros(n, dtype=torch.long)  # how many of the picks are in `dots`
        self.dots = torch.zeros(n, dtype=torch.float64)  # <Σ over these, g_n>
        self.squares = torch.zeros(n, dtype=torch.float64)  # ‖g_n‖² of rows that were asked for: 1 but for rounding
        self.chosen = torch.empty(16, self.directions.gradients.dim, dtype=torch.float64)
        self.sum_square, self.sum_product = 0.0, 0.0  # ‖Σ‖², <Σ, k>
        order = self.by_id[~self.directions.zero[self.by_id]]
        order = order[self.products[order].argsort(descending=True, stable=True)]
        self.left = self.budget
        starts = order[:START_AMONG]
        self.starts = starts[~self.used[starts] & self._paid(starts)]
        self.order = order[~self.used[order]]

    def run(self, neighbours: Neighbours) -> Component:
        via: list[Via] = []
        while self.left > 0:
            pick, how = self._next(neighbours)
            if pick < 0:
                return self._stuck(via)
            self._take(pick)
            via.append(how)
            self.left -= float(self.price[pick])
        return Component(self.budget, self.rows, via, "budget")

    def _paid(self, rows: Tensor) -> Tensor:
        return self.price[rows] <= self.left

    def _next(self, neighbours: Neighbours) -> tuple[int, Via]:
        if not self.rows:
            return (int(self.starts[0]) if len(self.starts) else -1), "start"
        for piece in neighbours(self.rows[-1]):
            pick = self._first(piece)
            if pick >= 0:
                return pick, "walk"
        pick = self._first(self.order)
        self.order = self.order[~self.struck[self.order] & self._paid(self.order)]  # what is left to spend only falls
        return pick, "fallback"

    def _first(self, rows: Tensor) -> int:
        """Returns the first of the rows that keeps both constraints, or -1."""
        for some in _growing(rows):
            some = some[~self.struck[some] & self._paid(some)]
            self._update(some)
            some = some[~self.struck[some] & self._consistent(some)]
            if len(some):
                return int(some[0])
        return -1

    def _update(self, rows: Tensor) -> None:
        """Adds the products with the picks that these rows have not seen, and strikes out those that conflict."""
        t = len(self.rows)
        for start in self.seen[rows].unique().tolist():
            if start == t:
                continue
            for some in rows[self.seen[rows] == start].split(4096):
                U = self.directions.rows(some)
                P = U @ self.chosen[start:t].T
                self.struck[some] |= (P < 0).any(1)
                self.squares[some] = U.square().sum(1)
                self.dots[some] += P.sum(1)
                self.seen[some] = t

    def _consistent(self, rows: Tensor) -> Tensor:
        length = (self.sum_square + 2 * self.dots[rows] + self.squares[rows]).sqrt()
        before = abs(self.sum_product) / math.sqrt(self.sum_square)
        return (self.sum_product + self.products[rows]).abs() / length >= self.delta * before - ROUNDING

    def _take(self, pick: int) -> None:
        self._update(torch.tensor([pick]))
        t = len(self.rows)
        if t == len(self.chosen):
            self.chosen = torch.cat([self.chosen, torch.empty_like(self.chosen)])
        g = self.directions.rows(torch.tensor([pick]))[0]
        self.chosen[t] = g
        self.sum_square += float(2 * self.dots[pick] + g @ g)
        self.sum_product += float(self.products[pick])
        self.rows.append(pick)
        self.struck[pick] = True

    def _stuck(self, via: list[Via]) -> Component:
        unused = ~self.used
        unused[self.rows] = False
        if not unused.any():
            return Component(self.budget, self.rows, via, "exhausted")
        paid = unused & (self.price <= self.left)
        dear = int((unused & ~paid).sum())
        if not paid.any():
            return Component(self.budget, self.rows, via, "price", dear=dear)
        if not self.rows:
            return Component(self.budget, self.rows, via, "start")
        conflicts, inconsistent = int((paid & self.struck).sum()), int((paid & ~self.struck).sum())
        return Component(self.budget, self.rows, via, "constraints", conflicts, inconsistent, dear)


def _growing(rows: Tensor, first: int = 8) -> Iterator[Tensor]:
    """Yields the rows in order, in pieces that grow fourfold: most searches end early."""
    start, size = 0, first
    while start < len(rows):
        yield rows[start : start + size]
        start, size = start + size, min(4 * size, 16_384)
