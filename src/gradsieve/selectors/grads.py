"""GrADS: the region of the gradients where most of the pool lies, spread out by content."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from gradsieve.errors import InvalidArgument
from gradsieve.selectors.density import density, silverman
from gradsieve.selectors.directions import Directions, marginal_relevance
from gradsieve.selectors.grads_ablation import ablation
from gradsieve.selectors.ranking import (
    best_first,
    deviation,
    exact_mean,
    id_order,
    length_check,
    pay,
    quantile_strata,
    spread,
)
from gradsieve.selectors.reading import check_choice, require, zero_note
from gradsieve.types import Budget, Gradients, Problem, Selection, Warmup

Prefer = Literal["density", "proportional", "stratified", "magnitude"]

NORMS = ("norm/embedding", "norm/lm_head")
STATISTICS = ("max/embedding", "min/embedding", "mean/embedding", "sd/embedding", "max/lm_head", "min/lm_head", "sd/lm_head")


@dataclass(frozen=True)
class GrADS:
    """Picks examples with typical gradient norms that differ from the pool and from one another.

    The gradient score of an example is s = (z(log‖G^E‖) + z(log‖G^H‖)) / 2, with the norms of its gradients at the input
    embedding and the LM head, standardised over the pool (Eq. GRADS-1, GRADS-2). Rows are taken greedily by the weighted
    sum of three factors in [0, 1] (Eq. GRADS-5): how much `prefer` likes s; diversity, one minus the mean cosine to the pool
    (Eq. GRADS-3); novelty, one minus the largest cosine to what is already chosen, where a negative cosine counts as 0
    (Eq. GRADS-4). The first two are scaled to [0, 1] over the pool; cosines come from sketches.
    Source: GrADS, 2025, arXiv:2511.08620.

    As in the paper, the model is first fine-tuned on the whole pool for an epoch (the probe); the model that is trained on the
    selection later is another one.

    Departs from the paper: every example is scored at the end of that epoch, so that its place in it does not matter (but with
    `online`); how the signals make one score is our choice. Of the paper's four statistics (maximum, minimum,
    mean, standard deviation) none decides here, because the norm fixes the standard deviation and the mean at the LM head is
    exactly zero (a softmax error sums to zero over the vocabulary). Norms are largely a measure of length: see the notes.

    Examples with a zero norm have no logarithm, and with a zero sketch no direction; they get no score, are not picked,
    and a note says so.

    Attributes:
        prefer: How s is judged. "density": by its kernel density over the pool (Silverman's bandwidth), so that typical
            examples come first; "proportional": by a draw without replacement with probability proportional to that density;
            "stratified": by a draw with equal shares of every quantile bin of s; "magnitude": by s itself, largest first.
        score_weight: Weight of that judgement, at least 0.
        diversity_weight: Weight of diversity, at least 0.
        novelty_weight: Weight of novelty, at least 0. With this and `diversity_weight` at 0 no sketches are needed.
        bins: Number of quantile bins, at least 2; read with prefer "stratified" only.
        probe_epochs: Epochs of fine-tuning on the pool before gradients are taken, at least 0; 0 takes them at the model as it
            is given. 1 and more need the extra `train`.
        probe: What the probe trains: "lora" or "full".
        online: Whether each example's gradient is recorded within the last epoch of the probe, just before the step that trains
            on it, in place of after it; weights differ from step to step then.
        statistics: Also read the element-wise maximum, minimum, mean and standard deviation of both gradients and report them
            for pool and chosen (they cost extra time to extract); without it, those that are there are reported.
    """

    prefer: Prefer = "density"
    score_weight: float = 1.0
    diversity_weight: float = 0.25
    novelty_weight: float = 0.25
    bins: int = 10
    probe_epochs: int = 1
    probe: Literal["lora", "full"] = "lora"
    online: bool = False
    statistics: bool = False

    title: ClassVar[str] = "GrADS"
    picks_by: ClassVar[str] = (
        "how typical an example's embedding and head gradients are, how far it is from the pool's mean, "
        "and how little it resembles what is already chosen"
    )
    reads: ClassVar[str] = "embedding and LM-head norms (exact), sketch"
    cost: ClassVar[str] = "an epoch of training; O(ndk) at most; density O(n²), O(n) above 10,000"
    source: ClassVar[str] = "GrADS, arXiv:2511.08620"

    def __post_init__(self) -> None:
        check_choice("prefer", self.prefer, Prefer)
        weights = {name: getattr(self, name) for name in ("score_weight", "diversity_weight", "novelty_weight")}
        for name, weight in weights.items():
            if not 0 <= weight < math.inf:
                raise InvalidArgument(f"{name} must be at least 0 and finite, got {weight}")
        if not any(weights.values()):
            raise InvalidArgument("score_weight, diversity_weight, novelty_weight must not all be 0, got 0 for each")
        if self.bins < 2:
            raise InvalidArgument(f"bins must be at least 2, got {self.bins}")
        check_choice("probe", self.probe, Literal["lora", "full"])
        if self.probe_epochs < 0:
            raise InvalidArgument(f"probe_epochs must be at least 0, got {self.probe_epochs}; 0 is no probe")
        if self.online and not self.probe_epochs:
            raise InvalidArgument("probe_epochs must be at least 1 with online, got 0; online records while the probe trains")

    @property
    def warmup(self) -> Warmup | None:
        """The preliminary epoch on the whole pool."""
        if not self.probe_epochs:
            return None
        where: Literal["last", "online"] = "online" if self.online else "last"
        return Warmup(1.0, self.probe_epochs, self.probe, where, without="--probe-epochs 0")

    @property
    def needs(self) -> frozenset[str]:
        """Both norms; sketches unless diversity and novelty have weight 0; the other statistics on request."""
        sketch = {"sketch"} if self.diversity_weight or self.novelty_weight else set()
        return frozenset({*NORMS, *sketch, *(STATISTICS if self.statistics else ())})

    def select(self, problem: Problem, budget: Budget, rng: torch.Generator) -> Selection:
        """Returns the examples in the order they were taken; scores are the first two factors, weighted.

        The trace holds s of every candidate, its density and statistics over the pool, the range of s that was chosen, the
        three factors of every pick, and what each factor alone would choose among a sample. `rng` is used by prefer
        "proportional" and "stratified" only.
        """
        require(problem, self.needs, "grads", budget)
        pool = problem.candidates
        n = len(pool.ids)
        zero = (pool.columns[NORMS[0]] == 0) | (pool.columns[NORMS[1]] == 0)
        directions = Directions.of(pool) if "sketch" in self.needs else None
        if directions is not None:
            zero = zero | directions.zero
        notes = zero_note(pool, zero, "grads")
        by_id = id_order(pool.ids)
        rows = by_id[~zero[by_id]]

        score, same = gradient_score(pool, rows)
        notes += [f"{name} is the same for all candidates, so it says nothing here" for name in same]
        bandwidth = silverman(score[rows])
        first = _scatter(n, rows, self._judgement(score[rows], bandwidth, rng))
        diversity = _scatter(n, rows, torch.zeros(len(rows)))
        if directions is not None:
            diversity[rows] = _unit_range(1 - directions.products(directions.mean[:, None])[rows, 0])
        scores = self.score_weight * first + self.diversity_weight * diversity
        if directions is not None and self.novelty_weight:
            order, nearest = marginal_relevance(directions, scores, self.novelty_weight, rows, budget)
        else:
            order = best_first(scores, rows)
            nearest = torch.full((len(order),), torch.nan, dtype=torch.float64)  # not measured
        chosen, shortfall = pay(order, pool, budget)

        correlation, length_notes = length_check({"gradient score": score, "score": scores}, pool)
        factors = {"score": first[chosen], "diversity": diversity[chosen], "novelty": 1 - nearest[: len(chosen)]}
        trace = _trace(score, rows, chosen, bandwidth) | {
            "picks": {name: values.tolist() for name, values in factors.items()},
            "statistics": _statistics(pool, rows, chosen),
            "length_correlation": correlation,
        }
        if directions is not None:
            factors_weight = self.score_weight, self.diversity_weight, self.novelty_weight
            trace |= ablation(directions, first, diversity, factors_weight, rows, budget.limit(pool) / n)
        weights = torch.ones(len(chosen), dtype=torch.float64)
        said = (*notes, *length_notes, *shortfall)
        return Selection(chosen, weights, scores, trace, said, per_row=("gradient_score",))

    def _judgement(self, s: Tensor, bandwidth: float, rng: torch.Generator) -> Tensor:
        """Returns the first factor in [0, 1]: float64 [r], rows by id."""
        if self.prefer == "magnitude":
            return _unit_range(s)
        if self.prefer == "stratified":
            drawn = torch.randperm(len(s), generator=rng)
            return _by_place(spread(drawn, quantile_strata(s, self.bins, torch.arange(len(s)))))
        p = density(s, s, bandwidth)
        if self.prefer == "density":
            return _unit_range(p)
        # The largest log(uniform)/p are a draw without replacement with probability ∝ p (Efraimidis & Spirakis 2006).
        keys = torch.rand(len(s), generator=rng, dtype=torch.float64).log() / p
        return _by_place(keys.argsort(descending=True, stable=True))


def gradient_score(pool: Gradients, rows: Tensor) -> tuple[Tensor, list[str]]:
    """Returns s (Eq. GRADS-2), float64 [n], NaN but in `rows`, and the names of the norms that are the same for all of them.

    Args:
        pool: Its norms must be positive in these rows.
        rows: The rows to standardise over, by id: int64 [r].
    """
    s = torch.zeros(len(rows), dtype=torch.float64)
    same = []
    for name in NORMS:
        u = pool.columns[name][rows].log()
        if (u == u[0]).all():
            same.append(name)
        else:
            s += (u - exact_mean(u)) / deviation(u) / 2
    return _scatter(len(pool.ids), rows, s), same


def _scatter(n: int, rows: Tensor, values: Tensor) -> Tensor:
    """Returns the values at their rows and NaN elsewhere: float64 [n]."""
    scattered = torch.full((n,), torch.nan, dtype=torch.float64)
    scattered[rows] = values.double()
    return scattered


def _trace(score: Tensor, rows: Tensor, chosen: Tensor, bandwidth: float) -> dict[str, Any]:
    s = score[rows]
    grid = torch.linspace(s.min().item() - 3 * bandwidth, s.max().item() + 3 * bandwidth, 200, dtype=torch.float64)
    curve = {"bandwidth": bandwidth, "grid": grid.tolist(), "values": density(s, grid, bandwidth).tolist()}
    pool = {"max": s.max().item(), "min": s.min().item(), "mean": exact_mean(s), "sd": deviation(s)}
    band = [score[chosen].min().item(), score[chosen].max().item()] if len(chosen) else []
    return {"gradient_score": score.tolist(), "pool": pool, "density": curve, "band": band}


def _statistics(pool: Gradients, rows: Tensor, chosen: Tensor) -> dict[str, dict[str, float]]:
    there = [name for name in (*NORMS, *STATISTICS) if name in pool.columns]
    return {
        name: {"pool": exact_mean(pool.columns[name][rows]), "chosen": exact_mean(pool.columns[name][chosen])} for name in there
    }


def _unit_range(values: Tensor) -> Tensor:
    """Returns the values moved and scaled to [0, 1]; 0 for all if they are equal, which decides nothing."""
    width = values.max() - values.min()
    return (values - values.min()) / width if width > 0 else torch.zeros_like(values)


def _by_place(order: Tensor) -> Tensor:
    """Returns 1 for the first of the order down to 0 for the last."""
    places = torch.empty(len(order), dtype=torch.float64)
    places[order] = torch.linspace(1, 0, len(order), dtype=torch.float64)
    return places
