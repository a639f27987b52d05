"""IFD: how much the question helps the model with the answer."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch

from gradsieve.errors import InvalidArgument
from gradsieve.selectors.ranking import best_first, id_order, length_check, pay
from gradsieve.selectors.reading import require
from gradsieve.types import Budget, Problem, Selection


@dataclass(frozen=True)
class IFD:
    """Picks the examples whose question helps the model least with the answer, but helps.

    Instruction-following difficulty is l(A|Q) / l(A): the loss of the answer after the question over its loss alone (Li et al.
    2024, arXiv:2308.12032). Near 0 the question says it all and there is little to learn; above 1 it misleads, so that answer
    and question do not belong together: such examples are left out. It costs a forward pass over the answers alone beside
    one over the examples.

    Departs from the paper: the answer alone is read after the first token of the sequence (its beginning-of-text or role
    mark), so that both losses are of the same tokens; the answer of a conversation is all its assistant turns in a row.

    Attributes:
        ceiling: Examples above it are left out, above 0; inf keeps all.
    """

    ceiling: float = 1.0

    title: ClassVar[str] = "IFD"
    picks_by: ClassVar[str] = "how little the question helps the model with the answer, as long as it helps"
    reads: ClassVar[str] = "loss, loss of the answer alone"
    cost: ClassVar[str] = "O(n log n)"
    source: ClassVar[str] = "Li et al. 2024, arXiv:2308.12032"

    def __post_init__(self) -> None:
        if not self.ceiling > 0:
            raise InvalidArgument(f"ceiling must be above 0, got {self.ceiling}; 1 is the paper's, inf keeps all")

    @property
    def needs(self) -> frozenset[str]:
        """The loss with the prompt and without."""
        return frozenset({"loss", "loss/alone"})

    def select(self, problem: Problem, budget: Budget, rng: torch.Generator) -> Selection:
        """Returns the examples by descending ratio up to the ceiling, which is the score; NaN above it. `rng` is not used."""
        require(problem, self.needs, "ifd", budget)
        pool = problem.candidates
        loss, alone = pool.columns["loss"], pool.columns["loss/alone"]
        if not (alone > 0).all():
            row = int((~(alone > 0)).nonzero()[0])
            raise InvalidArgument(
                f"column 'loss/alone' must be above 0, got {alone[row].item()} for {pool.ids[row]!r}; extract it again"
            )
        ratio = loss / alone
        scores = ratio.where(ratio <= self.ceiling, torch.nan)
        rows, shortfall = pay(best_first(scores, id_order(pool.ids)), pool, budget)
        correlation, notes = length_check({"score": scores}, pool)
        above = int((ratio > self.ceiling).sum())
        if above and math.isfinite(self.ceiling):
            notes.append(
                f"{above} of {len(ratio)} examples have a ratio above {self.ceiling:g}, where the question does not help with "
                "the answer; left out"
            )
        trace = {
            "mean": float(ratio[rows].mean()) if len(rows) else None,
            "pool_mean": float(ratio.mean()),
            "above": above,
            "length_correlation": correlation,
        }
        return Selection(rows, torch.ones(len(rows), dtype=torch.float64), scores, trace, (*notes, *shortfall))
