"""The inner problem of a pursuit: the weights ≥ 0 of the rows it holds, refitted when one comes, leaves or is exchanged."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional

from gradsieve.selectors.dense import Rows

DEPENDENT = 1e-10
"""Share of a row's squared norm outside the span of the chosen rows below which it repeats them."""


class Support:
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
