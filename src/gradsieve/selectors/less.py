"""LESS: similarity to the target in gradient space, over warm-up checkpoints."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from gradsieve.errors import InvalidArgument
from gradsieve.selectors.directions import Directions, on_grid
from gradsieve.selectors.ranking import best_first, id_order, length_check, pay
from gradsieve.selectors.reading import check_warmup, require, zero_note
from gradsieve.types import Budget, Gradients, Problem, Selection, Warmup


@dataclass(frozen=True)
class LESS:
    """Picks the examples whose gradients resemble those of the target, summed over the checkpoints of a warm-up.

    score(z) = max over target groups of the mean over v in the group of Σ_c η_c cos(g_z(θ_c), g_v(θ_c)); the k largest are
    chosen (Xia et al. 2024, arXiv:2402.04333). Cosines come from sketches, as in the paper, and are off by about 1/√d. Groups
    are the values of the targets' `group` column; without one all targets are one group.

    The candidates' gradients are Adam's direction, the targets' plain ones, over the adapters that a warm-up on part of the
    pool leaves after each of its passes; η is the mean learning rate of the pass.

    An example with a zero gradient at any checkpoint gets no score, is not picked, and a note says so; such a target is
    left out of its group's mean, with a note.

    Attributes:
        rates: The learning rate η of each checkpoint, above 0, in the order of the checkpoints; they are scaled to sum to 1.
            Empty: those of the warm-up, or all equal where there was none.
        warmup_share: Share of the pool on which adapters are trained before gradients are taken, in [0, 1]; 0 takes plain
            gradients of candidates and targets at the model as it is. Above 0 it needs the extra `train`.
        warmup_epochs: Passes over that part, at least 1; gradients are taken after each.
        less_form: Take Adam's direction as the authors' code has it, for parity: ε inside the root, no bias correction.
    """

    rates: tuple[float, ...] = ()
    warmup_share: float = 0.05
    warmup_epochs: int = 4
    less_form: bool = False

    title: ClassVar[str] = "LESS"
    picks_by: ClassVar[str] = "how much an example's gradient resembles those of the target examples"
    reads: ClassVar[str] = "gradients of pool and target (sketch)"
    cost: ClassVar[str] = "a warm-up and c times the gradients; O((n + m) d c)"
    source: ClassVar[str] = "Xia et al. 2024, arXiv:2402.04333"

    def __post_init__(self) -> None:
        if not all(0 < rate < math.inf for rate in self.rates):
            raise InvalidArgument(f"rates must all be above 0 and finite, got {self.rates}")
        check_warmup(self.warmup_share, self.warmup_epochs)
        if self.less_form and not self.warmup_share:
            raise InvalidArgument("less_form must go with a warm-up, got warmup_share 0; leave it out")

    @property
    def warmup(self) -> Warmup | None:
        """Adapters on part of the pool, and Adam's direction after every pass."""
        if not self.warmup_share:
            return None
        form: Literal["adam", "less"] = "less" if self.less_form else "adam"
        return Warmup(self.warmup_share, self.warmup_epochs, checkpoints="all", candidates=form)

    @property
    def needs(self) -> frozenset[str]:
        """Sketches of the candidates and the targets."""
        return frozenset({"sketch", "targets"})

    def select(self, problem: Problem, budget: Budget, rng: torch.Generator) -> Selection:
        """Returns the examples most like a target group first; O((n + m) d c). `rng` is not used.

        The trace holds, per group, how many of the chosen it is the best match of.
        """
        require(problem, self.needs, "less", budget)
        pool, targets = problem.candidates, problem.targets
        assert targets is not None  # by require
        shares = self._shares(pool.checkpoints, problem.rates)
        if list(targets.checkpoints) != list(pool.checkpoints):
            raise InvalidArgument(
                f"the targets must have the candidates' checkpoints {', '.join(pool.checkpoints)}, "
                f"got {', '.join(targets.checkpoints)}; extract one of them again"
            )
        group, names = _groups(targets, problem.groups)
        similarity = torch.zeros(len(pool.ids), len(names), dtype=torch.float64)
        zero, zero_targets = torch.zeros(len(pool.ids), dtype=torch.bool), torch.zeros(len(targets.ids), dtype=torch.bool)
        for checkpoint, share in shares.items():
            means, without = _group_means(Directions.of(targets, checkpoint), group, names)
            candidates = Directions.of(pool, checkpoint)
            similarity += share * candidates.products(means)
            zero |= candidates.zero
            zero_targets |= without
            del candidates  # or the next checkpoint's sketches would be held beside these
        notes = zero_note(pool, zero, "less") + zero_note(targets, zero_targets, "less", "targets")
        best = similarity.max(1)
        scores = best.values.where(~zero, torch.nan)
        rows, shortfall = pay(best_first(scores, id_order(pool.ids)), pool, budget)
        correlation, length_notes = length_check({"score": scores}, pool)
        served = best.indices[rows].bincount(minlength=len(names)).tolist()
        trace = {
            "checkpoints": list(shares),
            "shares": list(shares.values()),
            "chosen_per_group": dict(zip(names, served, strict=True)),
            "length_correlation": correlation,
        }
        weights = torch.ones(len(rows), dtype=torch.float64)
        return Selection(rows, weights, scores, trace, (*notes, *length_notes, *shortfall))

    def _shares(self, checkpoints: Sequence[str], known: Mapping[str, float]) -> dict[str, float]:
        """Returns η of every checkpoint, scaled to sum to 1."""
        if not self.rates and known and set(known) != set(checkpoints):
            there = ", ".join(checkpoints)
            raise InvalidArgument(
                f"Problem.rates must have the checkpoints {there}, got {', '.join(known)}; give one rate for each"
            )
        rates = self.rates or tuple(known.get(name, 1.0) for name in checkpoints)
        if len(rates) != len(checkpoints):
            raise InvalidArgument(
                f"rates must have one value per checkpoint ({len(checkpoints)}: {', '.join(checkpoints)}), got {len(rates)}"
            )
        return {name: rate / math.fsum(rates) for name, rate in zip(checkpoints, rates, strict=True)}


def _groups(targets: Gradients, known: Sequence[str]) -> tuple[Tensor, list[str]]:
    """Returns the group of each target as an index (int64 [m]) into the names of the groups that have a target."""
    if "group" not in targets.columns:
        return torch.zeros(len(targets.ids), dtype=torch.long), ["target"]
    values, index = targets.columns["group"].unique(return_inverse=True)
    if not (values == values.round()).all():
        raise InvalidArgument(f"column 'group' of the targets must hold whole numbers, got {values.tolist()[:5]}")
    numbers = [int(value) for value in values.tolist()]
    if known and not 0 <= numbers[0] <= numbers[-1] < len(known):
        raise InvalidArgument(f"column 'group' of the targets must lie in [0, {len(known)}) (Problem.groups), got {numbers}")
    return index, [known[number] if known else str(number) for number in numbers]


def _group_means(targets: Directions, group: Tensor, names: Sequence[str]) -> tuple[Tensor, Tensor]:
    """Returns the mean unit row of every group as columns on the grid, float64 [d, q], and which targets are zero, bool [m]."""
    sums = torch.zeros(len(names), targets.gradients.dim, dtype=torch.float64)
    for index, U in targets.blocks():
        sums.index_add_(0, group[index], U)
    size = group[~targets.zero].bincount(minlength=len(names))
    if (size == 0).any():
        empty = names[int((size == 0).nonzero()[0])]
        raise InvalidArgument(f"less needs a target with a direction in every group, got only zero gradients in {empty!r}")
    return on_grid(sums / size[:, None]).T, targets.zero
