"""OGS without a policy: utility traded against the risk of forgetting, by one multiplier or by a filter."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from gradsieve.errors import InvalidArgument
from gradsieve.selectors.directions import Directions, marginal_relevance
from gradsieve.selectors.ogs_anchor import Normalize, anchor_column, anchor_cosine, anchor_notes, categories
from gradsieve.selectors.ogs_threshold import PRECISION, TOLERANCE, exchange, trade, within
from gradsieve.selectors.ogs_utility import centrality, centred, nearest_targets
from gradsieve.selectors.ranking import (
    Stratify,
    best_first,
    check_stratify,
    exact_mean,
    id_order,
    length_check,
    pay,
    percentile,
    quantile_strata,
    spread,
)
from gradsieve.selectors.reading import check_choice, cosines, matching, reference_notes, require, zero_note
from gradsieve.selectors.round_robin import Similar, take_turns
from gradsieve.types import Budget, Gradients, Problem, Selection

Against = Literal["contrast", "plain", "both", "categories"]
Utility = Literal["mean", "nearest", "hidden", "each"]
Form = Literal["top", "filter"]
BoundOf = Literal["percentile", "mean"]
Draw = Literal["random", "diversity", "utility"]
Risk = Literal["conflict", "overlap"]

TURNS_PRECISION = 1e-4
"""How near, relative to λ, the bisection comes to it where targets take turns: each λ tried sorts all their lists anew."""


@dataclass(frozen=True)
class OGSStatic:
    """Picks examples whose gradient points to the target and leaves general abilities where they are.

    Utility a(z) = cos(g_z, g_target) (Eq. OGS-5). Risk is |cos(g_z, r)| (1 - Orth of Eq. OGS-2) or max(0, -cos(g_z, r)) (Eq.
    OGS-3), the largest over the references r; of contrasts (Eq. OGS-10) always the second. With first-order gain and risk the
    constrained problem of OGS (2026, arXiv:2602.06359) has a threshold rule as its solution: the top k by a(z) - λ·risk(z), λ
    the smallest that brings the mean risk of the chosen within its bound (Eq. OGS-8). All cosines come from exact products,
    never from sketches.

    If λ is 0 the anchor changed nothing, and a note says so; if even the least risky examples miss the bound they are chosen,
    and a note gives the mean risk they reach. Examples with a zero gradient have no direction; they get no score, are
    not picked, and a note says so.

    Attributes:
        against: What stands for the abilities to keep. "plain": the mean gradient of all anchor examples; "contrast": every
            mean difference between right and wrong copies of the same examples that was measured (of anchor categories, and
            of the target if there is one), which cancels format and topic; "both"; "categories": the mean gradient of each
            category by itself, so that the worst counts (Eq. OGS-4).
        normalize: How the mean of "plain" and "both" is taken: "none"; "example": of unit gradients, so that no long gradient
            rules; "category": of the categories' unit means, so that no large category does (Eq. OGS-1).
        risk: How the mean of the anchor, or of a category, counts. "overlap": |cos|, what moves the model there at all, for
            better or for worse (Eq. OGS-2): the divergence from the untouched model does not ask for the sign, and nearly
            every chat example agrees with that mean; "conflict": max(0, -cos), what raises the loss there to first order
            (Eq. OGS-3). A contrast counts by conflict: to agree with what is right is no risk.
        utility: "mean": the exact cosine to the target's mean gradient; "nearest": the mean cosine to the `neighbours` targets
            nearest in direction, after the pool's mean direction was taken out of both sides; it sees topics that the mean
            of a mixed target averages away, and reads sketches; "hidden": the same of last hidden states in place of gradients,
            which tell what a text is about better, and nothing of what training on it does; "each": every target in its turn
            takes the example with the largest cosine to it minus λ times risk, as `rds` does by hidden states and without risk,
            so that the choice is as mixed as the target; it reads sketches, and is not stratified.
        neighbours: Targets that count with utility "nearest" or "hidden", at least 1; all of them where there are fewer.
        form: "top" takes the best by utility minus λ times risk; "filter" drops the riskiest and draws from the rest.
        bound: With form "top", how risky the chosen may be on average, in percent of `bound_of`, from 0 to 100.
        bound_of: "percentile": the mean risk of the chosen must not exceed the `bound`-th percentile of the pool's risks;
            "mean": it must not exceed `bound` percent of the pool's mean risk (100 is: no riskier than a random draw).
        drop: With form "filter", the percentage of the pool to drop, the riskiest first, from 0 to below 100. An example with
            risk 0 is never dropped.
        draw: With form "filter", how to choose from what is left. "random": uniformly; "utility": the largest first;
            "diversity": greedily by half the cosine to the pool's mean direction minus half the largest cosine to what is
            already chosen (maximal marginal relevance, on sketches).
        center: Take the pool's mean direction μ, which carries chat format and topic, out of both sides of utility: the partial
            cosine (a - q·q_t) / √((1 - q²)(1 - q_t²)) with q = cos(g_z, μ) and q_t = cos(g_target, μ). a is exact, q and the
            length of μ come from sketches.
        stratify: "length" takes short and long completions in proportion to what may be chosen, because a cosine to a mean
            tends to prefer short answers; "none" leaves it to the score. Not for draw "diversity".
        bins: Number of length strata of equal size, at least 2; read with stratify "length" only.
    """

    against: Against = "plain"
    normalize: Normalize = "none"
    risk: Risk = "overlap"
    utility: Utility = "mean"
    neighbours: int = 5
    form: Form = "top"
    bound: float = 50.0
    bound_of: BoundOf = "percentile"
    drop: float = 10.0
    draw: Draw = "random"
    center: bool = False
    stratify: Stratify = "none"
    bins: int = 10

    title: ClassVar[str] = "OGS (static)"
    picks_by: ClassVar[str] = (
        "agreement of an example's gradient with the target, held against how far it moves general abilities"
    )
    reads: ClassVar[str] = "target and anchor cosines (exact)"
    cost: ClassVar[str] = "O(n log n); draw diversity O(ndk) at most; center O(nd); utility nearest, hidden or each O(nmd)"
    source: ClassVar[str] = "OGS, arXiv:2602.06359, without its policy"

    def __post_init__(self) -> None:
        check_choice("against", self.against, Against)
        check_choice("normalize", self.normalize, Normalize)
        check_choice("risk", self.risk, Risk)
        check_choice("utility", self.utility, Utility)
        check_choice("form", self.form, Form)
        check_choice("bound_of", self.bound_of, BoundOf)
        check_choice("draw", self.draw, Draw)
        check_stratify(self.stratify, self.bins)
        if not 0 <= self.bound <= 100:
            raise InvalidArgument(f"bound must lie in [0, 100] percent, got {self.bound}")
        if not 0 <= self.drop < 100:
            raise InvalidArgument(f"drop must lie in [0, 100) percent, got {self.drop}; 0 keeps the whole pool")
        if self.neighbours < 1:
            raise InvalidArgument(f"neighbours must be at least 1, got {self.neighbours}")
        if self.normalize != "none" and self.against not in ("plain", "both"):
            raise InvalidArgument(
                f"normalize must be none with against {self.against}, got {self.normalize}; use against plain"
            )
        if self.center and self.utility != "mean":
            raise InvalidArgument(
                f"center must be off with utility {self.utility}, which takes the pool's mean direction out itself"
            )
        if self.utility == "each" and self._ranks_by_utility and self.stratify != "none":
            raise InvalidArgument("stratify must be none with utility each, got length; use utility mean")
        if self.stratify == "length" and self.form == "filter" and self.draw == "diversity":
            raise InvalidArgument("stratify must be none with draw diversity, got length; draw at random or by utility")

    @property
    def needs(self) -> frozenset[str]:
        """The norm and the products behind utility and risk; sketches to centre or to draw by diversity."""
        names = {"norm"}
        if self._ranks_by_utility and self.utility in ("nearest", "each"):
            names |= {"sketch", "targets"}
        elif self._ranks_by_utility and self.utility == "hidden":
            names |= {"hidden", "hidden/targets"}
        elif self._ranks_by_utility:
            names |= {"dot/target"} | ({"sketch"} if self.center else set())
        if self.against in ("contrast", "both"):
            names.add("dot/contrast/anchor:*")
        if self.against in ("plain", "both"):
            names.add(anchor_column(self.normalize))
        if self.against == "categories":
            names.add("dot/anchor:*")
        if self.form == "filter" and self.draw == "diversity":
            names.add("sketch")
        if self.stratify == "length":
            names.add("completion_tokens")
        return frozenset(names)

    @property
    def _ranks_by_utility(self) -> bool:
        return self.form == "top" or self.draw == "utility"

    def select(self, problem: Problem, budget: Budget, rng: torch.Generator) -> Selection:
        """Returns the chosen, best first; scores are a - λ·risk ("top"), utility ("filter" by utility) or -risk.

        The trace holds `utility` and `risk` of every candidate (`overlap` where a mean counts so), their means, the references
        behind them and, for "top", the bound, λ (None where the order is by risk first) and (λ, mean risk, mean utility) for
        every λ tried; `gap` bounds by how much the summed utility can fall short of the optimum. With utility "each" the
        utility is the largest cosine to any target, there is no `gap`, and the trace says for how many of the targets something
        was taken. `rng` is used by draw "random" only.
        """
        pool = problem.candidates
        references = self._risk_references(pool)
        require(problem, self.needs | {f"dot/{name}" for name in references}, "ogs-static", budget)
        directions = Directions.of(pool) if "sketch" in self.needs else None
        zero = pool.columns["norm"] == 0
        zero = zero if directions is None else zero | directions.zero
        states = Directions.of(pool, "hidden") if "hidden" in self.needs else None
        zero = zero if states is None else zero | states.zero
        notes = zero_note(pool, zero, "ogs-static")
        targets = self._target_directions(problem)
        if targets is not None:
            what = "hidden state" if self.utility == "hidden" else "gradient"
            notes += zero_note(targets.gradients, targets.zero, "ogs-static", "targets", what)

        similar = None
        if self.utility == "each" and directions is not None and targets is not None:
            similar = Similar(directions, targets, keep=True)

        means = self.against == "categories"
        risks = [self._risk_of(cosines(pool, name), mean=means) for name in references]
        if self.against in ("plain", "both"):
            risks.append(self._risk_of(anchor_cosine(problem, self.normalize), mean=True))
            references = [*references, *_behind(pool, self.normalize)]
        risk = torch.stack(risks).amax(0)
        scores = {"risk": risk.where(~zero, torch.nan)}
        if self._ranks_by_utility:
            utility = self._utility(pool, states or directions, targets) if similar is None else similar.best()
            scores["utility"] = utility.where(~zero, torch.nan)
            references = ["target", *references] if self.utility == "mean" else references
        shown = {"overlap" if name == "risk" and self._overlaps else name: values for name, values in scores.items()}
        correlation, length_notes = length_check(shown, pool)
        notes += reference_notes(problem, references) + anchor_notes(problem, references)
        notes += zero_risk_note(scores["risk"], self.against, None if self._overlaps else "--risk overlap") + length_notes

        if self.form == "top":
            chosen = self._top(scores, similar, pool, budget)
        else:
            chosen = self._filter(scores, directions, similar, pool, budget, rng)
        trace: dict[str, Any] = {name: values.tolist() for name, values in shown.items()}
        trace |= {f"mean_{name}": exact_mean(values[chosen.rows]) for name, values in scores.items()}
        trace |= {f"pool_mean_{name}": exact_mean(values) for name, values in scores.items()}
        trace |= {"references": references, "length_correlation": correlation, **chosen.trace}
        return Selection(chosen.rows, chosen.weights, chosen.scores, trace, (*notes, *chosen.notes), per_row=tuple(shown))

    def _risk_references(self, pool: Gradients) -> list[str]:
        """The references that count one by one; the anchor's mean is not among them."""
        if self.against == "categories":
            return categories(pool)
        if self.against == "plain":
            return []
        return [name.removeprefix("dot/") for name in matching(pool, "dot/contrast/*")]

    def _risk_of(self, cosine: Tensor, mean: bool) -> Tensor:
        """The risk that one reference sees, a mean or a contrast."""
        return cosine.abs() if mean and self._overlaps else (-cosine).clamp(min=0)

    @property
    def _overlaps(self) -> bool:
        return self.risk == "overlap" and self.against != "contrast"

    def _target_directions(self, problem: Problem) -> Directions | None:
        """The targets one by one, where the nearest of them count."""
        if not self._ranks_by_utility or self.utility == "mean" or problem.targets is None:
            return None
        return Directions.of(problem.targets, "hidden" if self.utility == "hidden" else None)

    def _utility(self, pool: Gradients, directions: Directions | None, targets: Directions | None) -> Tensor:
        if directions is not None and targets is not None:
            return nearest_targets(directions, targets, self.neighbours)
        utility = cosines(pool, "target")
        return centred(utility, directions) if self.center and directions is not None else utility

    def _strata(self, pool: Gradients, by_id: Tensor) -> Tensor:
        if self.stratify == "length":
            return quantile_strata(pool.columns["completion_tokens"], self.bins, by_id)
        return torch.zeros(len(pool.ids), dtype=torch.long)

    def _top(self, scores: Mapping[str, Tensor], similar: Similar | None, pool: Gradients, budget: Budget) -> Selection:
        utility, risk = scores["utility"], scores["risk"]
        by_id = id_order(pool.ids)
        strata = self._strata(pool, by_id)
        bound = percentile(risk, self.bound) if self.bound_of == "percentile" else self.bound / 100 * exact_mean(risk)

        def payable(order: Tensor) -> Tensor:
            return within(order, pool, budget, risk, bound)

        takers: dict[float, Tensor] = {}

        def order_at(penalty: float) -> Tensor:
            if similar is not None:
                turns = take_turns(similar, budget, penalty * risk)
                takers[penalty] = turns.taker
                return turns.rows
            return spread(best_first(utility - penalty * risk, safest), strata)

        safest = best_first(-risk, by_id)
        safe = spread(best_first(-risk, best_first(utility, safest)), strata)
        precision = PRECISION if similar is None else TURNS_PRECISION
        found = trade(order_at, utility, risk, bound, safe, lambda order: budget.take(payable(order), pool), precision)
        rows, shortfall = pay(payable(found.order), pool, budget)
        final, gap = -risk, None
        if found.penalty is not None:
            final = utility - found.penalty * risk
        if found.penalty and budget.tokens is None and similar is None:
            dual = final[rows].sum() + found.penalty * bound * len(rows)
            rows = exchange(rows, budget.take(found.riskier, pool), safest, risk, strata, bound)
            order = best_first(final, by_id)
            rows = spread(order[torch.isin(order, rows)], strata)
            gap = max(0.0, (dual - utility[rows].sum()).item())
        notes = self._penalty_notes(found.penalty, exact_mean(risk[rows]), bound)
        trace: dict[str, Any] = {"bound": bound, "lambda": found.penalty, "gap": gap}
        trace["path"] = [list(step) for step in sorted(found.path)]
        if similar is not None and found.penalty is not None:
            trace |= {"targets_served": len(takers[found.penalty].unique()), "targets": len(similar.targets)}
        return Selection(rows, torch.ones(len(rows), dtype=torch.float64), final, trace, (*notes, *shortfall))

    def _penalty_notes(self, penalty: float | None, mean_risk: float, bound: float) -> list[str]:
        of = "percentile {:g} of the pool's risks" if self.bound_of == "percentile" else "{:g}% of the pool's mean risk"
        limit = f"the bound {bound:.4g} ({of.format(self.bound)})"
        if penalty is None and mean_risk > bound + TOLERANCE:
            return [
                f"infeasible: the least risky examples that fill the budget have mean risk {mean_risk:.4g}, above {limit}, "
                "and are chosen; raise --bound or lower the budget"
            ]
        if penalty is None:
            return [
                f"{limit} leaves no room: examples are chosen by risk first and utility second; raise --bound to use utility"
            ]
        if penalty > 0:
            return []
        conflict_of_mean = self.against in ("plain", "categories") and not self._overlaps
        cures = ["--risk overlap", "--against contrast", "--form filter"] if conflict_of_mean else ["--form filter"]
        return [
            f"λ not binding: the examples of largest utility have a mean risk of {mean_risk:.4g}, within {limit}, so the "
            f"anchor did not change the choice; to let it, use {', '.join(cures)} or a lower --bound"
        ]

    def _filter(
        self,
        scores: Mapping[str, Tensor],
        directions: Directions | None,
        similar: Similar | None,
        pool: Gradients,
        budget: Budget,
        rng: torch.Generator,
    ) -> Selection:
        risk, by_id = scores["risk"], id_order(pool.ids)
        riskiest = best_first(risk, by_id)
        asked = math.floor(self.drop / 100 * len(riskiest) + 1e-9)
        dropped = riskiest[:asked][risk[riskiest[:asked]] > 0]
        keep = ~risk.isnan()
        keep[dropped] = False
        kept = by_id[keep[by_id]]
        notes, final = [], -risk
        if len(dropped) < asked:
            notes.append(
                f"drop {self.drop:g}% means {asked} examples, but only {len(dropped)} have any risk; these were dropped"
            )
        if self.draw == "diversity" and directions is not None:
            order, _ = marginal_relevance(directions, centrality(directions) / 2, 0.5, kept, budget)
        elif self.draw == "utility":
            final = scores["utility"].where(keep, torch.nan)
            order = best_first(final, by_id) if similar is None else take_turns(similar, budget, final * 0).rows
        else:
            order = kept[torch.randperm(len(kept), generator=rng)]
        rows, shortfall = pay(spread(order, self._strata(pool, by_id)), pool, budget)
        trace = {"dropped": sorted(dropped.tolist()), "threshold": risk[dropped].min().item() if len(dropped) else None}
        return Selection(rows, torch.ones(len(rows), dtype=torch.float64), final, trace, (*notes, *shortfall))


def _behind(pool: Gradients, normalize: Normalize) -> list[str]:
    """The references that the anchor's mean is made of."""
    return categories(pool) if normalize == "category" else [anchor_column(normalize).removeprefix("dot/")]


def zero_risk_note(risk: Tensor, against: str, overlap: str | None) -> list[str]:
    """Returns a note where more than 9 candidates of 10 have no risk, with what may help.

    Args:
        risk: float64 [n], NaN where a row has none.
        against: The references behind it.
        overlap: What lets agreement with a mean count too, a flag or a method; None where it counts already.
    """
    known = risk[~risk.isnan()]
    share = int((known == 0).sum()) / len(known)
    if not share > 0.9:
        return []
    cures = [f"use {overlap}"] if overlap and against != "contrast" else []
    if against in ("contrast", "both"):
        cures.append("give wrong copies that fail in other ways (--corrupted FILE)")
    else:
        cures.append("--against contrast" if cures else "use --against contrast")
    return [f"risk is zero for {share:.0%} of the candidates, so it tells few of them apart; {' or '.join(cures)}"]
