"""Non-negative orthogonal matching pursuit: few rows of a matrix whose weighted sum is a given vector.

The solver of GRAD-MATCH and PGM; it knows matrices only. What changes with the rows that have weight is `refit`'s.

A step of matching pursuit needs the largest product of all n rows with the residual, and one matrix-vector product G r is
bound by reading G from memory. So steps are *drafted* on a shortlist, the rows with the largest products at the last
verified step, and *verified* for all rows together: one matrix-matrix product G [r_1 … r_q] costs little more than reading
G once. The draft is kept up to the first step at which another row would have been taken, so the result is that of the
plain algorithm, whatever the shortlist.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from gradsieve.selectors.dense import DenseRows, Rows
from gradsieve.selectors.refit import Support

ALIGNED = 1e-5
"""Smallest cosine with the residual that counts as positive; float32 products are good to about 1e-7."""
TIE = 1e-6
"""Products that differ by less, as a share of the largest ‖g‖‖r‖, are equal: the first row wins."""
SHORTLIST = 2048
DRAFT = 32
EXCHANGED = 1e-3
"""Share of the objective by which an exchange must lower it; what is below is not worth a pass over all rows."""
EXCHANGE_SHORTLIST = 256
EXCHANGE_TRIES = 4

Stop = Literal["limit", "matched", "unaligned", "spent", "stalled"]


@dataclass(frozen=True, eq=False)
class Match:
    """A non-negative combination of rows.

    Attributes:
        rows: The rows with positive weight, in the order in which they were taken: int64 [t].
        weights: Their weights: float64 [t] > 0.
        error: ‖G'w - b‖ / ‖b‖ after each step.
        picks: The row taken at each step; rows that lost their weight again are among them, and may have come back.
        stop: Why it ended: the limit is reached; the error is below the tolerance; no other row has a positive product
            with the residual (then w is optimal over all rows); each row that has one costs more than is left of the purse;
            or rounding keeps the objective from falling.
        refused: For "spent" the row with the largest product, which the purse could not pay for, else -1.
        exchanged: How many rows were exchanged at the end; each exchange is a step in `error` and `picks` too.
        objective: ‖G'w - b‖² + ridge·‖w‖².
    """

    rows: Tensor
    weights: Tensor
    error: list[float]
    picks: list[int]
    stop: Stop
    refused: int = -1
    exchanged: int = 0
    objective: float = math.inf


def match_gradient(
    G: Tensor | Rows,
    b: Tensor,
    limit: int,
    *,
    ridge: float,
    tolerance: float = 0.0,
    price: Tensor | None = None,
    purse: float = math.inf,
    per_price: bool = False,
    shortlist: int = SHORTLIST,
    exchange: bool = False,
) -> Match:
    """Returns at most `limit` rows of G with weights w ≥ 0 that make ‖G'w - b‖² + ridge·‖w‖² small.

    Orthogonal matching pursuit (Killamsetty et al. 2021, arXiv:2103.00123, Alg. 2): take the row with the largest product
    with the residual, fit the weights of all rows taken again under w ≥ 0, repeat. The refit is the inner loop of Lawson and
    Hanson's non-negative least squares, started from the weights before, so that the objective falls at every step: a row
    whose weight reaches zero leaves, its place is free, and it may be taken again. With prices, rows that what is left of the
    purse does not pay for are passed over.

    With `exchange` a pursuit that the limit or the purse ended goes on by exchanging one row for another (Jain et al. 2011,
    "Orthogonal matching pursuit with replacement") as long as that lowers the objective by a thousandth: of the 256 rows with
    the largest products, and of all rows that could leave for each, the pair that lowers it most.

    Args:
        G: float32 [n, d], in memory or streamed; earlier rows win ties.
        b: The vector to match, float64 [d], not zero.
        limit: Most rows with positive weight, ≥ 1.
        ridge: ≥ 0, in squared gradient norms. At 0 no more than d rows can have weight.
        tolerance: Ends when ‖G'w - b‖ / ‖b‖ is at most this.
        price: Cost of each row, above 0, float64 [n]; the rows with weight may cost `purse` together.
        purse: See `price`.
        per_price: Whether the row with the largest squared product per price is taken, not that with the largest product.
        shortlist: Rows to draft on; it changes the time, not the result. From n on nothing is drafted.
        exchange: Whether rows are exchanged at the end.

    Returns:
        The match, in O(nd + t(t + d)) for the t-th step. Beside G it keeps 400n bytes for the products of a draft, and
        8(2s² + sd) for up to t rows with weight, s at most 1.5t and never above `limit`, half as much again while they grow.
    """
    rows: Rows = DenseRows.of(G) if isinstance(G, Tensor) else G
    worth = (price.min() / price).sqrt().float() if price is not None and per_price else None  # at most 1: ties stay ties
    pursuit = _Pursuit(rows, b, limit, ridge, tolerance, price, purse, worth)
    few, F = torch.zeros(0, dtype=torch.long), rows.take(torch.zeros(0, dtype=torch.long))
    length = DRAFT // 4
    c = rows.products(b[None])[0]
    while True:
        while pursuit.stop is None:
            pursuit.decide(c)
            if not pursuit.block:
                break
            if shortlist < len(c):
                few = pursuit.promising(c, shortlist)
                F = rows.take(few)
                pursuit.draft(few, F, length)
            C = rows.products(torch.stack([step.residual for step in pursuit.block]))
            kept = pursuit.verify(C)
            c = C[kept].clone()
            del C
            length = min(2 * (kept + 1), DRAFT)
        if not (exchange and pursuit.stop in ("limit", "spent") and pursuit.exchange(c)):
            return pursuit.result()
        c = rows.products(pursuit.residual[None])[0]
        pursuit.resume()


@dataclass(frozen=True, eq=False)
class _Step:
    """A row taken, and what came of it: the rows with weight, their weights, the residual and the objective."""

    pick: int
    rows: list[int]
    weights: Tensor
    residual: Tensor
    objective: float


class _Pursuit:
    """The steps of a pursuit: those that are settled, and the block of those that wait for their verification.

    Only the first step of a block is decided on the products of all rows.
    """

    def __init__(
        self,
        G: Rows,
        b: Tensor,
        limit: int,
        ridge: float,
        tolerance: float,
        price: Tensor | None,
        purse: float,
        worth: Tensor | None,
    ) -> None:
        self._G, self._b, self._limit, self._ridge, self._tolerance = G, b, limit, ridge, tolerance
        self._price, self._purse, self._worth = price, purse, worth
        self._length = float(b.norm())
        self._largest = float(G.squares.max().sqrt())
        self._support = Support(G.width, ridge, limit)
        self._taken = torch.zeros(len(G.squares), dtype=torch.bool)
        self._last = _Step(-1, [], torch.zeros(0, dtype=torch.float64), b, self._length**2)
        self._picks: list[int] = []
        self._error: list[float] = []
        self._refused = -1
        self._exchanged = 0
        self.block: list[_Step] = []
        self.stop: Stop | None = None

    def decide(self, c: Tensor) -> None:
        """Takes the next row by the products of all rows with the residual, or stops.

        Args:
            c: float32 [n].
        """
        open_ = c.masked_fill(self._taken, -math.inf)
        pick = self._best(self._value(open_, self._last))
        if self._helps(pick):
            self._take(pick)
            return
        best = self._best(open_)
        self.stop, self._refused = ("spent", best) if self._aligned(best) else ("unaligned", -1)

    def promising(self, c: Tensor, count: int) -> Tensor:
        """Returns the rows that are worth most, ascending: int64 [count].

        Args:
            c: Products of all rows with the residual: float32 [n].
            count: How many, below n.
        """
        return self._value(c, self._last).topk(count).indices.sort().values

    def resume(self) -> None:
        """Lets the pursuit go on after an exchange that left something to spend, or a place: a second row may have left."""
        if len(self._last.rows) < self._limit:
            self.stop = None

    def draft(self, few: Tensor, F: Tensor, length: int) -> None:
        """Takes up to `length` further rows by the products of a shortlist; ends early where a stop would be due.

        Args:
            few: The rows of the shortlist, ascending: int64 [s].
            F: Their gradients: float32 [s, d].
            length: Most steps.
        """
        while self.stop is None and len(self.block) <= length:
            c = (F @ self._last.residual.float()).masked_fill(self._taken[few], -math.inf)
            pick = int(few[self._best(self._value(c, self._last, few))])
            if not self._helps(pick):
                return
            self._take(pick)

    def verify(self, C: Tensor) -> int:
        """Settles the steps of the block up to the first that the products of all rows contradict; takes back the others.

        Args:
            C: Products of all rows with the residual after each step of the block: float32 [q, n].

        Returns:
            The number j of the last settled step: C[j] belongs to the residual that is left.
        """
        for j, (step, following) in enumerate(zip(self.block, self.block[1:], strict=False)):
            c = C[j].clone()
            c[step.rows] = -math.inf
            if self._best(self._value(c, step), step.residual) != following.pick:
                self._take_back(j)
                break
        self._picks += [step.pick for step in self.block]
        self._error += [float(step.residual.norm()) / self._length for step in self.block]
        kept = len(self.block) - 1
        self.block = []
        return kept

    def result(self) -> Match:
        """Returns the settled steps."""
        assert self.stop is not None
        rows = torch.tensor(self._last.rows, dtype=torch.long)
        last = self._last
        return Match(rows, last.weights, self._error, self._picks, self.stop, self._refused, self._exchanged, last.objective)

    @property
    def residual(self) -> Tensor:
        """What is left to match, float64 [d]."""
        return self._last.residual

    def exchange(self, c: Tensor) -> bool:
        """Exchanges one row for another where that lowers the objective enough; returns whether it did.

        Args:
            c: Products of all rows with the residual: float32 [n].
        """
        last, support = self._last, self._support
        few = self._aligned_most(c)
        if not len(few) or not len(last.rows) or self._exchanged == self._limit:
            return False
        F = self._G.take(few).double()
        gain = support.exchange_gains(F, F @ last.residual, last.weights)
        if self._price is not None:
            spare = self._purse - float(self._price[last.rows].sum())
            dearer = self._price[few][None, :] - self._price[last.rows][:, None]
            gain = gain.masked_fill(dearer > spare, -math.inf)
        for _ in range(EXCHANGE_TRIES):
            if not gain.max() > EXCHANGED * last.objective:
                break
            into, out = divmod(int((gain >= gain.max() - TIE * last.objective).T.int().argmax()), len(last.rows))
            gain[out, into] = -math.inf
            weights = support.exchange(out, int(few[into]), F[into], self._b, last.weights)
            step = self._step(int(few[into]), weights) if weights is not None else last
            if step.objective < (1 - EXCHANGED) * last.objective:
                self._to(step)
                self._picks.append(step.pick)
                self._error.append(float(step.residual.norm()) / self._length)
                self._exchanged += 1
                return True
            support.restore(last.rows, self._G, self._b)  # with w ≥ 0 it gains less than without
        return False

    def _aligned_most(self, c: Tensor) -> Tensor:
        """Returns the rows that may come in an exchange, of equal products the first: int64 [q], ascending."""
        open_ = c.masked_fill(self._taken | ~(c > 0), -math.inf)
        count = min(EXCHANGE_SHORTLIST, int((open_ > 0).sum()))
        if not count:
            return torch.zeros(0, dtype=torch.long)
        least, tie = float(open_.topk(count).values[-1]), TIE * self._largest * float(self._last.residual.norm())
        above, level = open_ > least + tie, (open_ - least).abs() <= tie
        return torch.cat([above.nonzero(), level.nonzero()[: count - int(above.sum())]]).flatten().sort().values

    def _best(self, c: Tensor, residual: Tensor | None = None) -> int:
        r = self._last.residual if residual is None else residual
        return int((c >= c.max() - TIE * self._largest * float(r.norm())).int().argmax())

    def _aligned(self, pick: int) -> bool:
        g, r = self._row(pick), self._last.residual
        return not self._taken[pick] and float(g @ r) > ALIGNED * float(g.norm() * r.norm())

    def _value(self, c: Tensor, step: _Step, few: Tensor | None = None) -> Tensor:
        """Returns what the products c of all rows, or of a few, are worth after a step: -inf where the purse does not pay."""
        if self._price is None:
            return c
        price = self._price if few is None else self._price[few]
        if self._worth is not None:
            c = c * (self._worth if few is None else self._worth[few])
        return c.masked_fill(price > self._purse - float(self._price[step.rows].sum()), -math.inf)

    def _helps(self, pick: int) -> bool:
        """Returns whether the row can be paid for and reduces what is left to match."""
        paid = self._price is None or float(self._price[[*self._last.rows, pick]].sum()) <= self._purse
        return paid and self._aligned(pick)

    def _take(self, pick: int) -> None:
        last, support = self._last, self._support
        if not support.append(pick, self._row(pick), self._b):
            self.stop = "stalled"
            return
        step = self._step(pick, support.refit(last.weights))
        self._to(step)
        self.block.append(step)
        if not step.objective < last.objective - 1e-13 * self._length**2:
            self.stop = "stalled"
        elif float(step.residual.norm()) <= self._tolerance * self._length:
            self.stop = "matched"
        elif len(support.rows) >= self._limit:
            self.stop = "limit"

    def _step(self, pick: int, weights: Tensor) -> _Step:
        residual = self._b - self._support.combine(weights)
        objective = float(residual.square().sum() + self._ridge * weights.square().sum())
        return _Step(pick, list(self._support.rows), weights, residual, objective)

    def _row(self, row: int) -> Tensor:
        return self._G.take(torch.tensor([row]))[0].double()

    def _take_back(self, j: int) -> None:
        self.block = self.block[: j + 1]
        self.stop = None
        self._to(self.block[-1])
        self._support.restore(self._last.rows, self._G, self._b)

    def _to(self, step: _Step) -> None:
        self._taken[self._last.rows] = False
        self._taken[step.rows] = True
        self._last = step
