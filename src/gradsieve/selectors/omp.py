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

from gradsieve.selectors.dense import squared_norms

ALIGNED = 1e-5
"""Smallest cosine with the residual that counts as positive; float32 products are good to about 1e-7."""
DEPENDENT = 1e-10
"""Share of a row's squared norm outside the span of the chosen rows below which it repeats them."""
TIE = 1e-6
"""Products that differ by less, as a share of the largest ‖g‖‖r‖, are equal: the first row wins."""
SHORTLIST = 2048
DRAFT = 32

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
            with the residual (then w is optimal over all rows); the next row costs more than is left of the purse; or
            rounding keeps the objective from falling.
        refused: The row that the purse could not pay for, or -1.
    """

    rows: Tensor
    weights: Tensor
    error: list[float]
    picks: list[int]
    stop: Stop
    refused: int = -1


def match_gradient(
    G: Tensor,
    b: Tensor,
    limit: int,
    *,
    ridge: float,
    tolerance: float = 0.0,
    price: Tensor | None = None,
    purse: float = math.inf,
    shortlist: int = SHORTLIST,
) -> Match:
    """Returns at most `limit` rows of G with weights w ≥ 0 that make ‖G'w - b‖² + ridge·‖w‖² small.

    Orthogonal matching pursuit (Killamsetty et al. 2021, arXiv:2103.00123, Alg. 2): take the row with the largest product
    with the residual, fit the weights of all rows taken again under w ≥ 0, repeat. The refit is the inner loop of Lawson and
    Hanson's non-negative least squares, started from the weights before, so that the objective falls at every step: a row
    whose weight reaches zero leaves, its place is free, and it may be taken again.

    Args:
        G: float32 [n, d]; earlier rows win ties.
        b: The vector to match, float64 [d], not zero.
        limit: Most rows with positive weight, ≥ 1.
        ridge: ≥ 0, in squared gradient norms. At 0 no more than d rows can have weight.
        tolerance: Ends when ‖G'w - b‖ / ‖b‖ is at most this.
        price: Cost of each row, float64 [n]; the rows with weight may cost `purse` together.
        purse: See `price`.
        shortlist: Rows to draft on; it changes the time, not the result. From n on nothing is drafted.

    Returns:
        The match, in O(nd + t(t + d)) for the t-th step. Beside G it keeps 8(2t² + td) bytes for t rows with weight, and
        256n for the products of a draft.
    """
    pursuit = _Pursuit(G, b, limit, ridge, tolerance, price, purse)
    few, F = torch.zeros(0, dtype=torch.long), G[:0]
    length = DRAFT // 4
    c = G @ b.float()
    while pursuit.stop is None:
        pursuit.decide(c)
        if not pursuit.block:
            break
        if shortlist < len(G):
            few = c.topk(shortlist).indices.sort().values
            F = G[few]
            pursuit.draft(few, F, length)
        C = (G @ torch.stack([step.residual for step in pursuit.block]).float().T).T.contiguous()
        kept = pursuit.verify(C)
        c = C[kept]
        length = min(2 * (kept + 1), DRAFT)
    return pursuit.result()


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
        self, G: Tensor, b: Tensor, limit: int, ridge: float, tolerance: float, price: Tensor | None, purse: float
    ) -> None:
        self._G, self._b, self._limit, self._ridge, self._tolerance = G, b, limit, ridge, tolerance
        self._price, self._purse = price, purse
        self._length = float(b.norm())
        self._largest = float(squared_norms(G).max().sqrt())
        self._support = _Support(G.shape[1], ridge)
        self._taken = torch.zeros(len(G), dtype=torch.bool)
        self._last = _Step(-1, [], torch.zeros(0, dtype=torch.float64), b, self._length**2)
        self._picks: list[int] = []
        self._error: list[float] = []
        self._refused = -1
        self.block: list[_Step] = []
        self.stop: Stop | None = None

    def decide(self, c: Tensor) -> None:
        """Takes the next row by the products of all rows with the residual, or stops.

        Args:
            c: float32 [n].
        """
        pick = self._best(c.masked_fill(self._taken, -math.inf))
        if not self._aligned(pick):
            self.stop = "unaligned"
        elif not self._affords(pick):
            self.stop, self._refused = "spent", pick
        else:
            self._take(pick)

    def draft(self, few: Tensor, F: Tensor, length: int) -> None:
        """Takes up to `length` further rows by the products of a shortlist; ends early where a stop would be due.

        Args:
            few: The rows of the shortlist, ascending: int64 [s].
            F: Their gradients: float32 [s, d].
            length: Most steps.
        """
        while self.stop is None and len(self.block) <= length:
            c = (F @ self._last.residual.float()).masked_fill(self._taken[few], -math.inf)
            pick = int(few[self._best(c)])
            if not self._aligned(pick) or not self._affords(pick):
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
            if self._best(c, step.residual) != following.pick:
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
        return Match(rows, self._last.weights, self._error, self._picks, self.stop, self._refused)

    def _best(self, c: Tensor, residual: Tensor | None = None) -> int:
        r = self._last.residual if residual is None else residual
        return int((c >= c.max() - TIE * self._largest * float(r.norm())).int().argmax())

    def _aligned(self, pick: int) -> bool:
        g, r = self._G[pick].double(), self._last.residual
        return not self._taken[pick] and float(g @ r) > ALIGNED * float(g.norm() * r.norm())

    def _affords(self, pick: int) -> bool:
        return self._price is None or float(self._price[[*self._last.rows, pick]].sum()) <= self._purse

    def _take(self, pick: int) -> None:
        last, support = self._last, self._support
        if not support.append(pick, self._G[pick].double(), self._b):
            self.stop = "stalled"
            return
        weights = support.refit(last.weights)
        residual = self._b - support.combine(weights)
        objective = float(residual.square().sum() + self._ridge * weights.square().sum())
        self._to(_Step(pick, list(support.rows), weights, residual, objective))
        self.block.append(self._last)
        if not objective < last.objective - 1e-13 * self._length**2:
            self.stop = "stalled"
        elif float(residual.norm()) <= self._tolerance * self._length:
            self.stop = "matched"
        elif len(support.rows) >= self._limit:
            self.stop = "limit"

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
    that double when they are full.
    """

    def __init__(self, d: int, ridge: float) -> None:
        self.rows: list[int] = []
        self._ridge = ridge
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
        z = w + (q @ self._h[: len(w)]) * q  # K⁻¹h = Q'Qh, of which all but the last row's share was there
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

    def restore(self, rows: list[int], G: Tensor, b: Tensor) -> None:
        """Makes `rows` the rows: the ones that they begin with alike stay, the others are factored again."""
        same = 0
        while same < min(len(rows), len(self.rows)) and rows[same] == self.rows[same]:
            same += 1
        t = len(rows)
        while t > len(self._A):
            self._grow()
        self.rows = list(rows)
        self._A[same:t] = G[rows[same:]].double()
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
        self._A, self._h = (torch.cat([x, torch.zeros_like(x)]) for x in (self._A, self._h))
        self._K, self._Q = (torch.block_diag(x, torch.zeros(t, t, dtype=torch.float64)) for x in (self._K, self._Q))
