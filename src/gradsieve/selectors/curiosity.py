"""Curiosity: the examples that together tell most about the target's directions."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from gradsieve.errors import InvalidArgument
from gradsieve.selectors.dense import dense
from gradsieve.selectors.directions import Directions, on_grid, unit_rows
from gradsieve.selectors.ranking import id_order, length_check, pay
from gradsieve.selectors.reading import require, zero_note
from gradsieve.types import Budget, Problem, Selection

NOTHING = 1e-12
"""Gain below which an example tells nothing: its gradient is orthogonal to all of the target's directions."""


@dataclass(frozen=True)
class Curiosity:
    """Picks examples greedily by how much each still tells about the target's directions in gradient space.

    max over subsets B of f(B) = log det(I + σ⁻² Σ_{z in B} x_z x_z'), x_z = V'ĝ_z the unit gradient in the target's r main
    directions V: the information that noisy observations along the x_z give about a direction's effect. f is monotone and
    submodular, so the greedy choice reaches at least 1 - 1/e = 63 % of the best subset's (Nemhauser et al. 1978). For a budget
    in tokens two choices are made among the examples that still fit, by gain per token and by gain, and the more informative
    one is kept (Leskovec et al. 2007): at least 40 % of the best (Tang et al. 2021, arXiv:2008.05391).

    The first picks point along the directions, later ones fill those that are least covered. The name is that of Domain
    Curiosity (Arndt et al. 2021), whose question, which data tell most about a domain, is put to a fixed pool here; the method
    is not that paper's.

    f does not know signs: a gradient against the target tells as much as one for it. The trace has the share of picks against
    the target's mean, and a note says when it is above a quarter.

    Gradients are those of the first checkpoint, as sketches. Memory is 8nr bytes, beside unit sketches of 4nd bytes if these
    are below 2 GB.

    Attributes:
        rank: Most directions of the target, r, at least 1; as many as its examples span if that is less.
        noise: σ² as a share of the candidates' mean ‖x‖², above 0. The larger, the longer picks repeat the strongest
            direction before the others get their turn.
    """

    rank: int = 16
    noise: float = 0.1

    title: ClassVar[str] = "Curiosity"
    picks_by: ClassVar[str] = "how much new information about the target's directions each further example brings"
    reads: ClassVar[str] = "gradients of pool and target (sketch)"
    cost: ClassVar[str] = "O(n d r + k n) and lazy gains of O(r²)"
    source: ClassVar[str] = "greedy log det, Nemhauser et al. 1978; named after Arndt et al. 2021"

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise InvalidArgument(f"rank must be at least 1, got {self.rank}; 16 is the default")
        if not 0 < self.noise < math.inf:
            raise InvalidArgument(f"noise must be above 0 and finite, got {self.noise}; 0.1 is the default")

    @property
    def needs(self) -> frozenset[str]:
        """Sketches of the candidates and the targets."""
        return frozenset({"sketch", "targets"})

    def select(self, problem: Problem, budget: Budget, rng: torch.Generator) -> Selection:
        """Returns the examples in the order in which they were picked. `rng` is not used.

        The scores are the information an example gives alone. The trace holds f after every pick, by what the picks were
        made, the number of directions and the share of the targets' squared length in them, and how the picks stand to the
        target's mean.
        """
        require(problem, self.needs, "curiosity", budget)
        pool, targets = problem.candidates, problem.targets
        assert targets is not None  # by require
        directions = Directions.of(pool)
        notes = zero_note(pool, directions.zero, "curiosity")
        T = unit_rows(dense(targets, id_order(targets.ids)))
        notes += zero_note(targets, (T == 0).all(1)[_rank(id_order(targets.ids))], "curiosity", "targets")
        V, energy = _main_directions(T, self.rank)
        X = directions.products(V.T)
        squares = X.square().sum(1)
        mean = squares[~directions.zero].mean().item()
        if not mean > 0:
            raise InvalidArgument("curiosity needs candidates that are not orthogonal to the target, got none; add others")
        by_id = id_order(pool.ids)
        among = by_id[~directions.zero[by_id]]
        price = None if budget.tokens is None else pool.columns["tokens"][among]
        found = most_informative(X[among], self.noise * mean, min(budget.limit(pool), len(among)), price, budget.tokens or 0)
        scores = torch.log1p(squares / (self.noise * mean)).where(~directions.zero, torch.nan)
        rows, shortfall = pay(among[found.rows], pool, budget)
        if shortfall and found.exhausted:
            notes.append(f"after {len(rows)} examples no other tells anything about the target's {len(V)} directions")
        center = T.mean(0)
        cosine = None
        if center.norm() > 0:
            cosine = torch.cat([directions.rows(part) @ on_grid(center / center.norm()) for part in rows.split(4096)])
        against = float((cosine < 0).double().mean()) if cosine is not None else None
        if against is not None and against > 0.25:
            notes.append(
                f"{against:.0%} of the picks point against the target's mean gradient: information does not know signs"
            )
        correlation, length_notes = length_check({"score": scores}, pool)
        trace = {
            "information": found.values,
            "by": found.by,
            "directions": len(V),
            "energy": energy,
            "mean_cosine": float(cosine.mean()) if cosine is not None else None,
            "against_target": against,
            "length_correlation": correlation,
        }
        weights = torch.ones(len(rows), dtype=torch.float64)
        return Selection(rows, weights, scores, trace, (*notes, *length_notes, *shortfall))


@dataclass(frozen=True, eq=False)
class Choice:
    """Rows in the order in which they were picked, int64 [k]; the value of f after each; and by what they were picked.

    `exhausted` tells that it ended because no other row that can be paid for has a gain.
    """

    rows: Tensor
    values: list[float]
    by: Literal["gain", "gain per token"]
    exhausted: bool

    @property
    def value(self) -> float:
        return self.values[-1] if self.values else 0.0


def most_informative(X: Tensor, noise: float, limit: int, price: Tensor | None = None, purse: float = 0.0) -> Choice:
    """Returns the greedy choice for f = log det(I + Σ x x'/σ²); with prices the better of those by gain and by gain per price.

    Either rule alone can be arbitrarily bad with prices, the better of the two is not (Leskovec et al. 2007, KDD, Thm. 3).

    Args:
        X: float64 [n, r]; earlier rows win ties.
        noise: σ² > 0.
        limit: Most rows to take.
        price: What each row costs, above 0: float64 [n].
        purse: What the rows may cost together, if they have prices; a row that what is left does not pay for is passed over.

    Returns:
        At most `limit` rows, less if no other row has a gain.
    """
    if price is None:
        return _greedy(X, noise, limit, torch.zeros(len(X), dtype=torch.float64), 0.0, None)
    plain, ratio = (_greedy(X, noise, limit, price, purse, per) for per in (None, price))
    return ratio if ratio.value > plain.value else plain


def _greedy(X: Tensor, noise: float, limit: int, price: Tensor, purse: float, per: Tensor | None) -> Choice:
    """Returns the greedy choice by gain, or by gain per `per` [n], among the rows that can still be paid for.

    With M = I + Σ x x'/σ² the gain of a row is log(1 + x'M⁻¹x/σ²). It only falls as rows are taken, so its last known value is
    an upper bound, and only rows whose bound reaches the top are computed anew (Minoux 1978). M⁻¹ follows Sherman and Morrison.
    """
    n, r = X.shape
    worth = torch.ones(n, dtype=torch.float64) if per is None else 1 / per
    inverse = torch.eye(r, dtype=torch.float64)
    gain = torch.log1p(X.square().sum(1) / noise)
    bound = gain * worth
    seen = torch.zeros(n, dtype=torch.long)
    picks: list[int] = []
    values: list[float] = []
    exhausted = False
    while len(picks) < limit:
        width, t = 64, len(picks)
        dear = price > purse
        bound[dear], seen[dear] = -torch.inf, limit  # for good: the purse only shrinks
        while seen[top := int(bound.argmax())] < t:  # argmax returns the first of equals
            stale = torch.cat([bound.topk(min(width, n)).indices, torch.tensor([top])]).unique()
            stale = stale[seen[stale] < t]
            gain[stale] = torch.log1p(_forms(X[stale], inverse) / noise)
            bound[stale] = gain[stale] * worth[stale]
            seen[stale] = t
            width *= 2
        if bound[top] == -torch.inf or not gain[top] > NOTHING:
            exhausted = bool(bound[top] > -torch.inf)
            break
        picks.append(top)
        values.append((values[-1] if values else 0.0) + float(gain[top]))
        purse -= float(price[top])
        u = inverse @ X[top]
        inverse -= torch.outer(u, u) / (noise + float(X[top] @ u))
        bound[top], seen[top] = -torch.inf, limit
    rows = torch.tensor(picks, dtype=torch.long)
    return Choice(rows, values, "gain" if per is None else "gain per token", exhausted)


def _forms(X: Tensor, A: Tensor) -> Tensor:
    """Returns x'Ax of every row: float64 [b]. Each row is summed alike, so that equal rows have equal bits."""
    parts = [(x[:, :, None] * x[:, None, :] * A).flatten(1).sum(1) for x in X.split(256)]
    return torch.cat(parts)


def _main_directions(T: Tensor, rank: int) -> tuple[Tensor, float]:
    """Returns the right singular vectors of T with the largest singular values, on the grid, and their share of Σσ².

    Args:
        T: Unit rows, float64 [m, d].
        rank: Most of them.
    """
    _, s, V = torch.linalg.svd(T, full_matrices=False)
    count = min(rank, int((s > 1e-6 * s[0]).sum()))
    return on_grid(V[:count]), float(s[:count].square().sum() / s.square().sum())


def _rank(order: Tensor) -> Tensor:
    rank = torch.empty_like(order)
    rank[order] = torch.arange(len(order))
    return rank
