"""Perplexity: the examples whose loss lies in the middle of the pool's."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from gradsieve.errors import InvalidArgument
from gradsieve.selectors.ranking import best_first, id_order, length_check, pay
from gradsieve.selectors.reading import require
from gradsieve.types import Budget, Problem, Selection


@dataclass(frozen=True)
class Perplexity:
    """Picks the examples whose perplexity is nearest a quantile of the pool's, by default the median.

    The lowest perplexities are of text the model knows, the highest of noise; between them lies what it can learn (Marion et
    al. 2023, arXiv:2309.04564, which prunes pretraining data). Perplexity is exp(loss), the loss in nats per completion token,
    so the loss gives the same order. The band is as wide as the budget.

    Departs from the paper: perplexity is that of the completion given the prompt, under the model to be trained itself.

    Attributes:
        centre: Quantile of the loss in [0, 1]: 0 picks the lowest, 0.5 the middle, 1 the highest.
    """

    centre: float = 0.5

    title: ClassVar[str] = "Perplexity"
    picks_by: ClassVar[str] = "how surprising the model finds the answer, from the middle of the pool outwards"
    reads: ClassVar[str] = "loss"
    cost: ClassVar[str] = "O(n log n)"
    source: ClassVar[str] = "Marion et al. 2023, arXiv:2309.04564"

    def __post_init__(self) -> None:
        if not 0 <= self.centre <= 1:
            raise InvalidArgument(f"centre must lie in [0, 1], got {self.centre}; 0.5 is the middle")

    @property
    def needs(self) -> frozenset[str]:
        """The loss."""
        return frozenset({"loss"})

    def select(self, problem: Problem, budget: Budget, rng: torch.Generator) -> Selection:
        """Returns the examples by the distance of their quantile from `centre`, which is minus the score. `rng` is not used.

        The trace holds the range of losses chosen, and the pool's.
        """
        require(problem, self.needs, "perplexity", budget)
        pool = problem.candidates
        loss, n = pool.columns["loss"], len(pool.ids)
        ascending = loss.sort().values
        middle = (torch.searchsorted(ascending, loss) + torch.searchsorted(ascending, loss, side="right")) / 2
        scores = -(middle.double() - self.centre * n).abs() / n
        rows, shortfall = pay(best_first(scores, id_order(pool.ids)), pool, budget)
        correlation, length_notes = length_check({"loss": loss, "score": scores}, pool)
        trace = {
            "chosen_loss": [float(loss[rows].min()), float(loss[rows].max())] if len(rows) else None,
            "pool_loss": [float(ascending[0]), float(ascending[-1])],
            "length_correlation": correlation,
        }
        return Selection(rows, torch.ones(len(rows), dtype=torch.float64), scores, trace, (*length_notes, *shortfall))
