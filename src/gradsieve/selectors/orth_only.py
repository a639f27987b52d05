"""Orthogonality to the anchor alone: the ablation of OGS."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch

from gradsieve.errors import InvalidArgument
from gradsieve.selectors.ogs_anchor import Normalize, anchor_column, anchor_cosine, anchor_notes, categories, subspace_orth
from gradsieve.selectors.ranking import best_first, id_order, length_check, pay
from gradsieve.selectors.reading import check_choice, reference_notes, require, zero_note
from gradsieve.types import Budget, Problem, Selection

Space = Literal["mean", "categories"]


@dataclass(frozen=True)
class OrthOnly:
    """Picks the examples whose gradient is most nearly orthogonal to the anchor, whatever they teach: an ablation.

    The k largest Orth(z) = 1 - |cos(g_z, g_anchor)| (Eq. OGS-2; OGS, 2026, arXiv:2602.06359). Nothing in this score knows the
    target, and an example that teaches little of anything is nearly orthogonal to everything: independent re-implementations
    of OGS found that the rule favours bland examples and loses the domain gain in three settings of four, and in our own probe
    it did worse than a random draw. It is here to show what the utility of `ogs-static` adds, not to be trained on.

    Examples with a zero gradient have no direction; they get no score, are not picked, and a note says so.

    Attributes:
        space: What to be orthogonal to. "mean": the anchor's mean gradient (Eq. OGS-2); "categories": the subspace that the
            unit mean gradients of its categories span (Eq. OGS-4).
        normalize: With space "mean", how the mean is taken: of gradients as they are ("none"), of unit gradients ("example"),
            of the categories' unit means ("category") (Eq. OGS-1).
        energy: With space "categories", the share of the category means' squared length that the subspace must hold, above 0,
            at most 1.
    """

    space: Space = "mean"
    normalize: Normalize = "none"
    energy: float = 0.9

    title: ClassVar[str] = "Orth only"
    picks_by: ClassVar[str] = "how nearly orthogonal an example's gradient is to that of the anchor"
    reads: ClassVar[str] = "anchor cosine (exact)"
    cost: ClassVar[str] = "O(n log n)"
    source: ClassVar[str] = "ablation of OGS, arXiv:2602.06359"

    def __post_init__(self) -> None:
        check_choice("space", self.space, Space)
        check_choice("normalize", self.normalize, Normalize)
        if not 0 < self.energy <= 1:
            raise InvalidArgument(f"energy must lie in (0, 1], got {self.energy}")
        if self.space == "categories" and self.normalize != "none":
            raise InvalidArgument(f"normalize must be none with space categories, got {self.normalize}; use space mean")

    @property
    def needs(self) -> frozenset[str]:
        """The norm and the products with the anchor's mean gradient, or with those of its categories."""
        return frozenset({"norm", "dot/anchor:*" if self.space == "categories" else anchor_column(self.normalize)})

    def select(self, problem: Problem, budget: Budget, rng: torch.Generator) -> Selection:
        """Returns the most orthogonal examples first; O(n log n). `rng` is not used."""
        require(problem, self.needs, "orth-only", budget)
        pool = problem.candidates
        by_category = self.space == "categories" or self.normalize == "category"
        references = categories(pool) if by_category else [anchor_column(self.normalize).removeprefix("dot/")]
        if self.space == "categories":
            orth, rank = subspace_orth(problem, self.energy)
        else:
            orth, rank = 1 - anchor_cosine(problem, self.normalize).abs(), 1
        notes = zero_note(pool, orth.isnan(), "orth-only")
        notes += reference_notes(problem, references) + anchor_notes(problem, references)
        rows, shortfall = pay(best_first(orth, id_order(pool.ids)), pool, budget)
        correlation, length_notes = length_check({"orth": orth}, pool)
        trace = {"orth": orth.tolist(), "rank": rank, "length_correlation": correlation}
        weights = torch.ones(len(rows), dtype=torch.float64)
        return Selection(rows, weights, orth, trace, tuple(notes + length_notes + shortfall), per_row=("orth",))
