"""BM25: the examples that share most words with the targets."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from gradsieve.selectors.ranking import best_first, id_order, length_check, pay
from gradsieve.selectors.reading import require
from gradsieve.types import Budget, Problem, Selection


@dataclass(frozen=True)
class BM25:
    """Picks the examples whose words match those of the targets, rare words counting more: a baseline that knows no model.

    score(z) = mean over the targets v of BM25(v, z) / max_z' BM25(v, z'), v's words the query and z's the document
    (Robertson & Zaragoza 2009, Lucene's form, k1 = 1.5, b = 0.75). Dividing by the best match gives every target the same
    say, however long it is.

    Departs from the source: BM25 ranks documents for one query; the mean over queries is ours.
    """

    title: ClassVar[str] = "BM25"
    picks_by: ClassVar[str] = "the words it shares with the target examples, rare ones counting more"
    reads: ClassVar[str] = "text of pool and target"
    cost: ClassVar[str] = "O(m n) for the scores, O(n log n)"
    source: ClassVar[str] = "Robertson & Zaragoza 2009"

    @property
    def needs(self) -> frozenset[str]:
        """The score against the target's texts."""
        return frozenset({"bm25/target"})

    def select(self, problem: Problem, budget: Budget, rng: torch.Generator) -> Selection:
        """Returns the examples by descending score. `rng` is not used."""
        require(problem, self.needs, "bm25", budget)
        pool = problem.candidates
        scores = pool.columns["bm25/target"].clone()
        rows, shortfall = pay(best_first(scores, id_order(pool.ids)), pool, budget)
        correlation, notes = length_check({"score": scores}, pool)
        mean = float(scores[rows].mean()) if len(rows) else None
        trace = {"mean": mean, "pool_mean": float(scores.mean()), "length_correlation": correlation}
        return Selection(rows, torch.ones(len(rows), dtype=torch.float64), scores, trace, (*notes, *shortfall))
