"""GRAD-MATCH: few examples whose weighted mean gradient is the gradient one wants to follow."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from gradsieve.errors import InvalidArgument
from gradsieve.selectors.dense import mean_gradient, rows_of
from gradsieve.selectors.omp import Match, match_gradient
from gradsieve.selectors.ranking import id_order, length_check
from gradsieve.selectors.reading import check_choice, require, zero_note
from gradsieve.types import Budget, Gradients, Problem, Selection

Matched = Literal["target", "pool"]


@dataclass(frozen=True)
class GradMatch:
    """Picks and weights examples so that their weighted mean gradient is close to the mean gradient of target or pool.

    min over w ≥ 0 with at most k positive entries of ‖Σ_i w_i g_i - b‖² + λ‖w‖², by orthogonal matching pursuit with a
    non-negative refit after every pick (Killamsetty et al. 2021, arXiv:2103.00123, Alg. 2). Examples are in the order in
    which they were picked. A selection ends below its budget when no other example's gradient has a positive product with
    what is left to match; a note says so, and nothing is filled up. With `lam` 0 at most d examples can have weight, and
    copies of a chosen example never do; above 0 weight is spread over similar examples.

    Departs from the paper: b is the mean gradient and not the sum, which divides all weights by the number of examples in
    the mean and changes nothing else; the weights given are k·w, so that (1/k) Σ weight·g ≈ b and a weight of 1 is
    ordinary; λ is given as a share; examples whose weight falls to zero free their place for another, and the paper's code
    fills what is left of the budget with random examples; at the end examples are exchanged (`exchange`). For a budget in
    tokens two sets are made among the examples that still fit, by product and by squared product per token, and the one that
    matches better is kept.

    Gradients are those of the first checkpoint, as sketches. Memory is 4nd bytes for them if that is at most 1 GB (0.4 GB for
    100,000 x 1024), else they are read anew for every few dozen steps; 400n for products, 16s² + 8sd
    for the refit, s at most 1.5k, and half as much again while that grows.

    Attributes:
        match: Whose mean gradient is matched: "target", the examples of the ability you want, or "pool", all candidates
            (a summary of the pool).
        lam: λ ≥ 0 as a share of the candidates' mean squared gradient norm. More of it spreads the weight over more examples.
        tolerance: Ends when ‖Σ w g - b‖ is at most this share of ‖b‖, in [0, 1).
        exchange: Whether, once the budget is spent, examples are exchanged for others as long as that lowers the objective by
            a thousandth or more.
    """

    match: Matched = "target"
    lam: float = 0.5
    tolerance: float = 1e-4
    exchange: bool = True

    title: ClassVar[str] = "GRAD-MATCH"
    picks_by: ClassVar[str] = "how well the weighted sum of the chosen gradients matches the gradient to be matched"
    reads: ClassVar[str] = "gradients of pool and target (sketch)"
    cost: ClassVar[str] = "O(n d k + k² d)"
    source: ClassVar[str] = "Killamsetty et al. 2021, arXiv:2103.00123"

    def __post_init__(self) -> None:
        check_match(self.match, self.lam, self.tolerance)

    @property
    def needs(self) -> frozenset[str]:
        """Sketches of the candidates and, to match them, of the targets."""
        return frozenset({"sketch", "targets"} if self.match == "target" else {"sketch"})

    def select(self, problem: Problem, budget: Budget, rng: torch.Generator) -> Selection:
        """Returns the examples in the order in which they were picked; O(n d k + k² d). `rng` is not used.

        The scores are <g, b>/‖b‖, by which the first example is picked. The trace holds by what they were picked, the error
        ‖Σ w g - b‖/‖b‖ after every step, how many examples lost their weight again, how many of these to an exchange, and Σ w.
        """
        require(problem, self.needs, "gradmatch", budget)
        pool = problem.candidates
        by_id = id_order(pool.ids)
        G = rows_of(pool, by_id)
        squares = G.squares
        zero = torch.zeros(len(by_id), dtype=torch.bool)
        zero[by_id] = squares == 0
        notes = zero_note(pool, zero, "gradmatch")
        b = wanted_gradient(problem, self.match, "gradmatch")
        price = None if budget.tokens is None else pool.columns["tokens"][by_id]
        limit, purse = budget.limit(pool), math.inf if budget.tokens is None else budget.tokens
        ridge = self.lam * float(squares[squares > 0].mean())

        def matched(per_price: bool) -> Match:
            return match_gradient(
                G, b, limit, ridge=ridge, tolerance=self.tolerance, price=price, purse=purse, per_price=per_price,
                exchange=self.exchange,
            )  # fmt: skip

        found, by = matched(False), "product"
        if price is not None and (other := matched(True)).objective < found.objective:
            found, by = other, "squared product per token"
        scores = torch.full((len(by_id),), torch.nan, dtype=torch.float64)
        for block, sketch in pool.blocks():
            scores[block] = sketch.double() @ (b / b.norm())
        scores[zero] = torch.nan
        correlation, length_notes = length_check({"score": scores}, pool)
        trace = {
            "match": self.match,
            "by": by,
            "error": found.error,
            "dropped": len(found.picks) - len(found.rows),
            "exchanged": found.exchanged,
            "weight_sum": float(found.weights.sum()),
            "length_correlation": correlation,
        }
        rows, k = by_id[found.rows], len(found.rows)
        notes += [*length_notes, *shortfall(found, rows, by_id, pool, budget, self.tolerance)]
        return Selection(rows, found.weights * k, scores, trace, tuple(notes))


def check_match(match: str, lam: float, tolerance: float) -> None:
    """Raises InvalidArgument unless these are settings of GRAD-MATCH."""
    check_choice("match", match, Matched)
    if not 0 <= lam < math.inf:
        raise InvalidArgument(f"lam must be at least 0 and finite, got {lam}; 0.5 is the paper's")
    if not 0 <= tolerance < 1:
        raise InvalidArgument(f"tolerance must lie in [0, 1), got {tolerance}; 0.0001 is the default")


def wanted_gradient(problem: Problem, match: str, method: str) -> Tensor:
    """Returns the mean gradient of the targets or of the pool: float64 [d].

    Raises:
        InvalidArgument: It is zero, or a sketch is not finite.
    """
    whose = problem.targets if match == "target" else problem.candidates
    assert whose is not None  # by require
    b = mean_gradient(whose)
    if not b.norm() > 0:
        raise InvalidArgument(f"{method} needs a mean gradient of the {match} to match, got zero; give other examples")
    return b


def shortfall(found: Match, rows: Tensor, by_id: Tensor, pool: Gradients, budget: Budget, tolerance: float) -> list[str]:
    """Returns a note with the cause if the rows found do not use the budget, else none."""
    limit, tokens, spent = budget.limit(pool), budget.tokens, 0
    if tokens is not None:
        spent = int(pool.columns["tokens"][rows].sum())
    if (len(rows) == limit) if tokens is None else (spent >= 0.95 * tokens):
        return []
    if found.stop == "spent":
        row = int(by_id[found.refused])
        cause = (
            f"no other that would help is as short as what is left; the one that would most, {pool.ids[row]!r}, has "
            f"{int(pool.columns['tokens'][row])} tokens"
        )
    else:
        cause = {
            "limit": "what is left pays for no other",
            "unaligned": "no other example's gradient has a positive product with what is left to match",
            "matched": f"they match the gradient to {tolerance:g} of its length",
            "stalled": "they match the gradient as well as rounding allows",
        }[found.stop]
    head = f"{len(rows)} examples are chosen of the {limit} the budget asks for"
    if tokens is not None:
        head = f"the chosen {len(rows)} examples spend {spent} of the budget's {tokens} tokens"
    error = found.error[-1] if found.error else 1.0
    return [f"{head}: {cause}; {error:.2%} of the gradient's length is left unmatched"]
