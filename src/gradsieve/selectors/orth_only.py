"""Orthogonality to the anchor alone: the ablation of OGS."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from gradsieve.selectors.ranking import best_first, id_order, length_check, pay
from gradsieve.selectors.reading import cosines, reference_notes, require, zero_note
from gradsieve.types import Budget, Problem, Selection


@dataclass(frozen=True)
class OrthOnly:
    """Picks the examples whose gradient is most nearly orthogonal to the anchor, whatever they teach: an ablation.

    The k largest Orth(z) = 1 - |cos(g_z, g_anchor)| (Eq. OGS-2; OGS, 2026, arXiv:2602.06359). Nothing in this score knows the
    target, and an example that teaches little of anything is nearly orthogonal to everything: independent re-implementations
    of OGS found that the rule favours bland examples and loses the domain gain in three settings of four, and in our own probe
    it did worse than a random draw. It is here to show what the utility of `ogs-static` adds, not to be trained on.

    Examples with a zero gradient have no direction; they get no score, are not picked, and a note says so.

    Attributes:
        (none): The method has no hyper-parameters.
    """

    title: ClassVar[str] = "Orth only"
    picks_by: ClassVar[str] = "how nearly orthogonal an example's gradient is to that of the anchor"
    reads: ClassVar[str] = "anchor cosine (exact)"
    cost: ClassVar[str] = "O(n log n)"
    source: ClassVar[str] = "ablation of OGS, arXiv:2602.06359"

    @property
    def needs(self) -> frozenset[str]:
        """The norm and the product with the mean anchor gradient."""
        return frozenset({"norm", "dot/anchor"})

    def select(self, problem: Problem, budget: Budget, rng: torch.Generator) -> Selection:
        """Returns the most orthogonal examples first; O(n log n). `rng` is not used."""
        require(problem, self.needs, "orth-only", budget)
        pool = problem.candidates
        orth = 1 - cosines(pool, "anchor").abs()
        notes = zero_note(pool, orth.isnan(), "orth-only") + reference_notes(problem, ["anchor"])
        rows, shortfall = pay(best_first(orth, id_order(pool.ids)), pool, budget)
        correlation, length_notes = length_check({"orth": orth}, pool)
        trace = {"orth": orth.tolist(), "length_correlation": correlation}
        weights = torch.ones(len(rows), dtype=torch.float64)
        return Selection(rows, weights, orth, trace, tuple(notes + length_notes + shortfall))
