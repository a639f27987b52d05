"""RDS+: the examples whose hidden states are nearest to those of the targets, each target in its turn."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from gradsieve.selectors.directions import Directions
from gradsieve.selectors.ranking import length_check, pay
from gradsieve.selectors.reading import require, zero_note
from gradsieve.selectors.round_robin import Similar, take_turns
from gradsieve.types import Budget, Problem, Selection


@dataclass(frozen=True)
class RDS:
    """Lets each target example in turn pick the candidate whose hidden states resemble its own most.

    An example is represented by the mean of the model's last hidden states h_t over all its tokens, later ones weighing more:
    x_z = Σ_t t·h_t / Σ_t t (Muennighoff 2022, arXiv:2202.08904). The targets take turns, and each takes the candidate with the
    largest cosine that no other has taken: RDS+ of Ivison et al. 2025, arXiv:2503.01807. It reads no gradient, so that alone
    it costs a forward pass over pool and target, and beside gradients nothing.

    Departs from the paper: targets take turns in the order of their ids, the example is seen through the model's own chat
    template and cut at `max_length` (the paper: Tulu's and 2048).

    A candidate or target whose representation is zero has no direction, is left out, and a note says so.
    """

    title: ClassVar[str] = "RDS+"
    picks_by: ClassVar[str] = (
        "how much an example's hidden states resemble those of one target example, each target in its turn"
    )
    reads: ClassVar[str] = "last hidden states of pool and target"
    cost: ClassVar[str] = "O(n m D), D the width of the model"
    source: ClassVar[str] = "Ivison et al. 2025, arXiv:2503.01807"

    @property
    def needs(self) -> frozenset[str]:
        """Hidden states of the candidates and the targets."""
        return frozenset({"hidden", "hidden/targets"})

    def select(self, problem: Problem, budget: Budget, rng: torch.Generator) -> Selection:
        """Returns the examples in the order in which they were taken. `rng` is not used.

        The score is the largest cosine to any target. The trace holds the cosine of each pick to the target that took it, and
        for how many of the targets something was taken.
        """
        return nearest_to_targets(problem, budget, "hidden", self.needs, "rds")


def nearest_to_targets(problem: Problem, budget: Budget, representation: str, needs: frozenset[str], method: str) -> Selection:
    """Returns what the targets take in turns by the cosine of a representation; O(n m D)."""
    require(problem, needs, method, budget)
    pool, targets = problem.candidates, problem.targets
    assert targets is not None  # by require
    candidates, wanted = Directions.of(pool, representation), Directions.of(targets, representation)
    of = f"{representation} vector"
    notes = zero_note(pool, candidates.zero, method, of=of) + zero_note(targets, wanted.zero, method, "targets", of)
    similar = Similar(candidates, wanted)
    turns = take_turns(similar, budget)
    best = similar.best()
    rows, shortfall = pay(turns.rows, pool, budget)
    correlation, length_notes = length_check({"score": best}, pool)
    trace = {
        "similarity": turns.similarity[: len(rows)].tolist(),
        "targets_served": len(turns.taker[: len(rows)].unique()),
        "targets": len(similar.targets),
        "length_correlation": correlation,
    }
    weights = torch.ones(len(rows), dtype=torch.float64)
    return Selection(rows, weights, best, trace, (*notes, *length_notes, *shortfall))
