"""Uniformly random selection: the baseline that no comparison may lack."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from gradsieve.selectors.ranking import Stratify, check_stratify, id_order, pay, quantile_strata, spread
from gradsieve.selectors.reading import require
from gradsieve.types import Budget, Problem, Selection


@dataclass(frozen=True)
class Random:
    """Draws uniformly without replacement; reads no gradient and loads no model.

    The draw depends on the seed and the set of ids only, not on the order of the pool.

    Attributes:
        stratify: "none" draws from the pool as a whole; "length" gives the subset the pool's distribution of sequence
            lengths, so that a comparison with another method is not one of long with short examples.
        bins: Number of length strata of equal size, at least 2; read with stratify "length" only.
    """

    stratify: Stratify = "none"
    bins: int = 10

    title: ClassVar[str] = "Random"
    picks_by: ClassVar[str] = "chance alone"
    reads: ClassVar[str] = "nothing (tokens, if stratified)"
    cost: ClassVar[str] = "O(n log n)"
    source: ClassVar[str] = "baseline"

    def __post_init__(self) -> None:
        check_stratify(self.stratify, self.bins)

    @property
    def needs(self) -> frozenset[str]:
        """The `tokens` column if stratified, else nothing."""
        return frozenset({"tokens"} if self.stratify == "length" else ())

    def select(self, problem: Problem, budget: Budget, rng: torch.Generator) -> Selection:
        """Returns a uniform draw in the order it was drawn, with weights 1 and scores NaN; O(n log n)."""
        require(problem, self.needs, "random", budget)
        pool = problem.candidates
        n = len(pool.ids)
        by_id = id_order(pool.ids)
        order = by_id[torch.randperm(n, generator=rng)]
        if self.stratify == "length":
            order = spread(order, quantile_strata(pool.columns["tokens"], self.bins, by_id))
        rows, notes = pay(order, pool, budget)
        scores = torch.full((n,), torch.nan, dtype=torch.float64)
        return Selection(rows, torch.ones(len(rows), dtype=torch.float64), scores, notes=tuple(notes))
