"""Non-negative orthogonal matching pursuit: few rows of a matrix whose weighted sum is a given vector.

The solver of GRAD-MATCH and PGM; it knows matrices only.

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
from torch.nn import functional

from gradsieve.selectors.dense import DenseRows, Rows

ALIGNED = 1e-5
"""Smallest cosine with the residual that counts as positive; float32 products are good to about 1e-7."""
DEPENDENT = 1e-10
"""Share of a row's squared norm outside the span of the chosen rows below which it repeats them."""
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
        self._support = _Support(G.width, ridge, limit)
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
        if self.stop == "spent" or len(self._last.rows) < self._limit:
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


class _Support:
    """The rows A [t, d] that have weight, K = AA' + ridge·I, h = A b, and the inverse Q of K's Cholesky factor: Q K Q' = I.

    With Q at hand a step needs matrix-vector products only. Everything is float64 and lies in the leading part of arrays
    that grow by half when they are full, up to `limit` rows.
    """

    def __init__(self, d: int, ridge: float, limit: int) -> None:
        self.rows: list[int] = []
        self._ridge, self._limit = ridge, limit
        self._A = torch.zeros(16, d, dtype=torch.float64)
        self._K = torch.zeros(16, 16, dtype=torch.float64)
        self._Q = torch.zeros(16, 16, dtype=torch.float64)
        self._h = torch.zeros(16, dtype=torch.float64)

    def append(self, row: int, g: Tensor, b: Tensor) -> bool:
        """Adds a row in O(t(t + d)); returns False, and adds nothing, if it lies in the span of the others."""
        t = len(self.rows)
        if t == len(self._A):
            self._grow()
        k, own = self._A[:t] @ g, float(g.square().sum())
        l = self._Q[:t, :t] @ k
        pivot = own + self._ridge - float(l.square().sum())
        if not pivot > DEPENDENT * own:
            return False
        self._A[t], self._h[t] = g, g @ b
        self._K[t, :t], self._K[:t, t], self._K[t, t] = k, k, own + self._ridge
        self._Q[t, :t], self._Q[t, t] = -(l @ self._Q[:t, :t]) / math.sqrt(pivot), 1 / math.sqrt(pivot)
        self.rows.append(row)
        return True

    def refit(self, weights: Tensor) -> Tensor:
        """Returns the weights w ≥ 0 with the least ‖A'w - b‖² + ridge·‖w‖², and drops the rows for which they are zero.

        Args:
            weights: The weights of all rows but the last, positive, and the least squares solution for them: float64 [t - 1].
        """
        w = torch.cat([weights, weights.new_zeros(1)])
        q = self._Q[len(w) - 1, : len(w)]
        return self._towards(w, w + (q @ self._h[: len(w)]) * q)  # K⁻¹h = Q'Qh, of which all but the last's share was there

    def exchange_gains(self, F: Tensor, c: Tensor, weights: Tensor) -> Tensor:
        """Returns by how much ‖A'w - b‖² + ridge·‖w‖² falls if a row leaves and another comes: float64 [t, q]; signs left free.

        With k = A f, u = K⁻¹k and s = ‖f‖² + ridge - k'u, row f brings c²/s and moves the weights to w - (c/s) u; the diagonal
        of the inverse grows by u²/s, and row i leaves at the cost of its new weight squared over its entry there.

        Args:
            F: The rows that may come: float64 [q, d].
            c: Their products with the residual: float64 [q].
            weights: The least squares solution: float64 [t].
        """
        t = len(self.rows)
        Q, own = self._Q[:t, :t], F.square().sum(1)
        k = self._A[:t] @ F.T
        u = Q.T @ (Q @ k)
        s = own + self._ridge - (k * u).sum(0)
        c, s = c.where(s > DEPENDENT * own, 0.0), s.where(s > DEPENDENT * own, 1.0)
        moved = weights[:, None] - (c / s) * u
        return c.square() / s - moved.square() / (Q.square().sum(0)[:, None] + u.square() / s)

    def exchange(self, out: int, row: int, g: Tensor, b: Tensor, weights: Tensor) -> Tensor | None:
        """Drops the row at place `out`, adds another, and returns the weights; None if the new one depends on the others."""
        leaves = torch.zeros(len(self.rows), dtype=torch.bool)
        leaves[out] = True
        self._drop(leaves)
        if not self.append(row, g, b):
            return None
        w = torch.cat([weights[~leaves], weights.new_zeros(1)])
        Q = self._Q[: len(w), : len(w)]
        return self._towards(w, Q.T @ (Q @ self._h[: len(w)]))

    def _towards(self, w: Tensor, z: Tensor) -> Tensor:
        """Returns the weights ≥ 0 that the inner loop of Lawson and Hanson reaches from w ≥ 0, z the solution without signs."""
        while (z <= 0).any():
            reach = torch.where(z <= 0, w / (w - z), math.inf)  # how far from w towards z each weight stays ≥ 0
            w = w + reach.min() * (z - w)
            drop = reach <= reach.min()
            self._drop(drop)
            w = w[~drop]
            Q = self._Q[: len(w), : len(w)]
            z = Q.T @ (Q @ self._h[: len(w)])
        return z

    def combine(self, weights: Tensor) -> Tensor:
        """Returns A'w: float64 [d]."""
        return weights @ self._A[: len(self.rows)]

    def restore(self, rows: list[int], G: Rows, b: Tensor) -> None:
        """Makes `rows` the rows: the ones that they begin with alike stay, the others are factored again."""
        same = 0
        while same < min(len(rows), len(self.rows)) and rows[same] == self.rows[same]:
            same += 1
        t = len(rows)
        while t > len(self._A):
            self._grow()
        self.rows = list(rows)
        self._A[same:t] = G.take(torch.tensor(rows[same:], dtype=torch.long)).double()
        self._h[same:t] = self._A[same:t] @ b
        self._K[:t, same:t] = self._A[:t] @ self._A[same:t].T
        self._K[same:t, :same] = self._K[:same, same:t].T
        self._K[range(same, t), range(same, t)] += self._ridge
        self._factor(same)

    def _drop(self, drop: Tensor) -> None:
        kept, first = (~drop).nonzero().flatten(), int(drop.int().argmax())
        s = len(kept)
        self._A[:s], self._h[:s] = self._A[kept], self._h[kept]
        self._K[:s, :s] = self._K[kept][:, kept]
        self.rows = [self.rows[i] for i in kept.tolist()]
        self._factor(first)

    def _factor(self, first: int) -> None:
        """Computes Q from row `first` on: with K = [[·, K21'], [K21, K22]] and L21 = K21 Q11', L22 L22' = K22 - L21 L21'."""
        t = len(self.rows)
        Q11, K21 = self._Q[:first, :first], self._K[first:t, :first]
        L21 = K21 @ Q11.T
        L22 = torch.linalg.cholesky(self._K[first:t, first:t] - L21 @ L21.T)
        Q22 = torch.linalg.solve_triangular(L22, torch.eye(t - first, dtype=torch.float64), upper=False)
        self._Q[first:t, first:t] = Q22
        self._Q[first:t, :first] = -Q22 @ L21 @ Q11

    def _grow(self) -> None:
        t = len(self._A)
        more = max(1, min(t // 2, self._limit - t))
        self._A, self._h = functional.pad(self._A, (0, 0, 0, more)), functional.pad(self._h, (0, more))
        self._K = functional.pad(self._K, (0, more, 0, more))  # one after the other: only one is there twice
        self._Q = functional.pad(self._Q, (0, more, 0, more))
