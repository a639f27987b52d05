"""Metadata: the examples with the largest value of a number that comes with them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch

from gradsieve.errors import InvalidArgument
from gradsieve.selectors.ranking import best_first, id_order, length_check, pay
from gradsieve.selectors.reading import check_choice, require
from gradsieve.types import Budget, Problem, Selection

Prefer = Literal["high", "low"]


@dataclass(frozen=True)
class Metadata:
    """Picks the examples with the highest value of a number that is known about them, such as a rating or a citation count.

    The quality marks that come with a corpus (journal impact factor, citations, stars) as a selection rule (Laï-king & Paroubek
    2024, arXiv:2409.02725). It reads the column `meta/NAME` of the candidates, which whoever makes the `Problem` supplies.

    Attributes:
        column: NAME.
        prefer: "high" picks the largest values first, "low" the smallest.
    """

    column: str
    prefer: Prefer = "high"

    title: ClassVar[str] = "Metadata"
    picks_by: ClassVar[str] = "a number that comes with the examples"
    reads: ClassVar[str] = "a number that comes with the examples (meta/NAME)"
    cost: ClassVar[str] = "O(n log n)"
    source: ClassVar[str] = "Laï-king & Paroubek 2024, arXiv:2409.02725"

    def __post_init__(self) -> None:
        if not self.column or set(self.column) & set("*?["):
            raise InvalidArgument(f"column must name one number of the examples, got {self.column!r}; write for example rating")
        check_choice("prefer", self.prefer, Prefer)

    @property
    def needs(self) -> frozenset[str]:
        """The column."""
        return frozenset({f"meta/{self.column}"})

    def select(self, problem: Problem, budget: Budget, rng: torch.Generator) -> Selection:
        """Returns the examples by the column, which is the score (minus it for "low"). `rng` is not used."""
        require(problem, self.needs, "metadata", budget)
        pool = problem.candidates
        values = pool.columns[f"meta/{self.column}"]
        scores = values.clone() if self.prefer == "high" else -values
        rows, shortfall = pay(best_first(scores, id_order(pool.ids)), pool, budget)
        correlation, length_notes = length_check({"score": scores}, pool)
        mean = float(values[rows].mean()) if len(rows) else None
        trace = {"mean": mean, "pool_mean": float(values.mean()), "length_correlation": correlation}
        return Selection(rows, torch.ones(len(rows), dtype=torch.float64), scores, trace, (*length_notes, *shortfall))
