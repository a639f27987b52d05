"""Length: the longest completions, a baseline that is hard to beat, or the shortest."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch

from gradsieve.selectors.ranking import best_first, id_order, pay
from gradsieve.selectors.reading import check_choice, require
from gradsieve.types import Budget, Problem, Selection

Prefer = Literal["long", "short"]


@dataclass(frozen=True)
class Length:
    """Picks the examples with the longest completions, which carry the most to learn from (Zhao et al. 2024, arXiv:2402.04833).

    Many scores follow length; what a method adds shows only beside this one. Compare at equal tokens as well as at equal
    examples.

    Departs from the paper: length is counted in tokens of the model at hand, after truncation.

    Attributes:
        prefer: "long" picks the longest completions first, "short" the shortest.
    """

    prefer: Prefer = "long"

    title: ClassVar[str] = "Length"
    picks_by: ClassVar[str] = "length"
    reads: ClassVar[str] = "completion_tokens"
    cost: ClassVar[str] = "O(n log n)"
    source: ClassVar[str] = "Zhao et al. 2024, arXiv:2402.04833"

    def __post_init__(self) -> None:
        check_choice("prefer", self.prefer, Prefer)

    @property
    def needs(self) -> frozenset[str]:
        """The number of completion tokens."""
        return frozenset({"completion_tokens"})

    def select(self, problem: Problem, budget: Budget, rng: torch.Generator) -> Selection:
        """Returns the examples by length, which is the score (minus it for "short"). `rng` is not used."""
        require(problem, self.needs, "length", budget)
        pool = problem.candidates
        length = pool.columns["completion_tokens"]
        scores = length.clone() if self.prefer == "long" else -length
        rows, shortfall = pay(best_first(scores, id_order(pool.ids)), pool, budget)
        trace = {"mean_length": float(length[rows].mean()) if len(rows) else None, "pool_mean_length": float(length.mean())}
        return Selection(rows, torch.ones(len(rows), dtype=torch.float64), scores, trace, tuple(shortfall))
