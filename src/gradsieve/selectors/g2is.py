"""G2IS: a walk over the gradient graph along the directions of the target's core knowledge."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from gradsieve.errors import InvalidArgument
from gradsieve.selectors.dense import dense
from gradsieve.selectors.directions import Directions, on_grid
from gradsieve.selectors.g2is_walk import START_AMONG, Component, Shortfall, walk
from gradsieve.selectors.graph import VISITS, Neighbours, exact_graph, faiss_lists, follow, lists_on_demand
from gradsieve.selectors.ranking import id_order, length_check
from gradsieve.selectors.reading import check_choice, check_warmup, require, zero_note
from gradsieve.types import Budget, Gradients, Problem, Selection, Warmup

Mode = Literal["aligned", "paper"]
Graph = Literal["auto", "exact", "faiss"]
EXACT_UP_TO = 100_000
"""Candidates up to which graph "auto" finds neighbours exactly."""
LAYOUT = 500
"""Candidates beside the chosen ones in the picture of the walk, and the rows its plane is fitted to."""


@dataclass(frozen=True)
class G2IS:
    """Walks from example to similar example along each direction of the target's core knowledge.

    The principal directions of the target's gradients are its core knowledge; each gets a share of the budget by the variance
    it explains. For each, the walk starts at the candidate that points most along it and goes on to the nearest neighbour of
    the last pick whose gradient conflicts with no pick (product ≥ 0) and keeps the sum of the picks along the direction
    (Zhao et al. 2025, arXiv:2502.11062, ACL 2025; Eqs. G2IS-1 to G2IS-3). Where none is left the selection ends below its
    budget, and a note says which constraint ended which component.

    Departs from the paper: the directions are by default those of the uncentred gradients, each turned towards the target's
    mean (`mode`); the graph has the nearest neighbours only (`neighbours`), then all candidates in the order of the direction;
    candidates with a zero gradient are left out; equal ones are taken in the order of their ids; token budgets.

    Gradients are mixed, as the title says: Adam's direction for the candidates and the plain gradient for the targets, over the
    adapters that a warm-up on part of the pool leaves (`warmup_share`); those of the first checkpoint, as sketches. Memory is
    4nd bytes for these (0.4 GB for 100,000 x 1024; above 2 GB they are read again for every pick), 8n per direction,
    4n·neighbours where more than n/8 examples are asked for, and 2nd with faiss (2 GB for a million x 1024).

    Attributes:
        mode: "aligned": directions of the uncentred gradients, oriented towards the target's mean, so that picks help the
            target. "paper": directions of the centred gradients with an arbitrary sign, as in the authors' code; where the
            targets share a direction its picks are as often against the target as for it.
        explained: Share of the variance (for "aligned": of the squared length) that the directions explain, in (0, 1].
        delta: δ in [0, 1]: the cosine of the sum of the picks to its direction may fall to this share of itself in one step.
        neighbours: Neighbours of an example in the graph, at least 0; 0 for all, as in the paper.
        graph: How neighbours are found: "exact"; "faiss", approximately, for pools above 10,000 (extra `ann`); "auto": exact up
            to 100,000 candidates (and where all neighbours are asked for), with faiss above.
        on_shortfall: What happens to the budget a direction cannot use: "stop" leaves it unused, as in the paper,
            "next-component" passes it on to the next one.
        compare_modes: Whether the walk is taken in the other mode too, so that the mean cosine of its picks to the target can
            be read beside that of the chosen; it takes the time of a second walk.
        warmup_share: Share of the pool on which adapters are trained before gradients are taken, in [0, 1]; 0 takes plain
            gradients of candidates and targets at the model as it is. Above 0 it needs the extra `train`.
        warmup_epochs: Passes over that part, at least 1.
    """

    mode: Mode = "aligned"
    explained: float = 0.5
    delta: float = 0.8
    neighbours: int = 100
    graph: Graph = "auto"
    on_shortfall: Shortfall = "stop"
    compare_modes: bool = True
    warmup_share: float = 0.05
    warmup_epochs: int = 4

    title: ClassVar[str] = "G2IS"
    picks_by: ClassVar[str] = "a walk over the graph of similar gradients, along the main directions of the target"
    reads: ClassVar[str] = "gradients of pool and target (sketch)"
    cost: ClassVar[str] = "a warm-up; O(n d (k + v) + v n log n), v directions"
    source: ClassVar[str] = "Zhao et al. 2025, arXiv:2502.11062"

    def __post_init__(self) -> None:
        check_choice("mode", self.mode, Mode)
        check_choice("graph", self.graph, Graph)
        check_choice("on_shortfall", self.on_shortfall, Shortfall)
        if not 0 < self.explained <= 1:
            raise InvalidArgument(f"explained must lie in (0, 1], got {self.explained}; 0.5 is the paper's")
        if not 0 <= self.delta <= 1:
            raise InvalidArgument(f"delta must lie in [0, 1], got {self.delta}; 0.8 is the paper's")
        if self.neighbours < 0:
            raise InvalidArgument(f"neighbours must be at least 0, got {self.neighbours}; 0 stands for all")
        if self.graph == "faiss" and not self.neighbours:
            raise InvalidArgument("neighbours must be at least 1 with graph faiss, got 0; write graph exact for all of them")
        check_warmup(self.warmup_share, self.warmup_epochs)

    @property
    def warmup(self) -> Warmup | None:
        """Adapters on part of the pool, and Adam's direction at the end."""
        if not self.warmup_share:
            return None
        return Warmup(self.warmup_share, self.warmup_epochs, candidates="adam")

    @property
    def needs(self) -> frozenset[str]:
        """Sketches of the candidates and the targets."""
        return frozenset({"sketch", "targets"})

    def select(self, problem: Problem, budget: Budget, rng: torch.Generator) -> Selection:
        """Returns the picks of the first component in the order of its walk, then those of the next. `rng` serves the trace.

        The scores are the largest product of an example's direction with one of the core knowledge. The trace holds each
        component (share of the variance, budget, picks, why it ended, its cosine to the target's mean), the walk (row,
        component, step, and how each was found: start, walk or fallback), the mean cosine to the target's mean gradient of
        the picks in either mode and of the pool, and a plane to draw the walk in.
        """
        require(problem, self.needs, "g2is", budget)
        pool, targets = problem.candidates, problem.targets
        assert targets is not None  # by require
        by_id = id_order(pool.ids)
        directions = Directions.of(pool)
        notes = zero_note(pool, directions.zero, "g2is")
        T = dense(targets, id_order(targets.ids))
        neighbours, graph = self._neighbours(directions, by_id, budget.limit(pool))
        chosen = self._walked(self.mode, T, directions, neighbours, by_id, budget)
        mean = T.double().mean(0)
        mean /= mean.norm() if mean.norm() > 0 else 1.0
        cosine = directions.products(on_grid(mean)[:, None])[:, 0]
        scores = chosen.products.amax(1).where(~directions.zero, torch.nan)
        correlation, length_notes = length_check({"score": scores}, pool)
        modes = {self.mode: _towards(cosine, chosen.rows, len(chosen.done))}
        trace: dict[str, Any] = {
            "mode": self.mode,
            "graph": graph,
            "components": [
                _component(*facts, mean) for facts in zip(chosen.done, chosen.variance.tolist(), chosen.V, strict=True)
            ],
            "walk": _path(chosen.done),
            "mean_cosine": float(cosine[chosen.rows].mean()) if len(chosen.rows) else None,
            "pool_mean_cosine": float(cosine[~directions.zero].mean()),
            "layout": _layout(directions, chosen.rows, mean, by_id, rng),
            "length_correlation": correlation,
        }
        if self.compare_modes:
            other: Mode = "paper" if self.mode == "aligned" else "aligned"
            try:
                beside = self._walked(other, T, directions, neighbours, by_id, budget)
                modes[other] = _towards(cosine, beside.rows, len(beside.done))
            except InvalidArgument as error:  # the target has no directions in that mode
                trace[f"mode {other}"] = str(error)
        trace["modes"] = modes | {"pool": _towards(cosine, (~directions.zero).nonzero()[:, 0], None)}
        notes += [*_cosine_notes(self.mode, trace), *length_notes, *_shortfall(chosen.done, budget, pool, chosen.rows)]
        weights = torch.ones(len(chosen.rows), dtype=torch.float64)
        return Selection(chosen.rows, weights, scores, trace, tuple(notes))

    def _walked(
        self, mode: Mode, T: Tensor, directions: Directions, neighbours: Neighbours, by_id: Tensor, budget: Budget
    ) -> _Walked:
        """Returns the walk along the directions of the targets' gradients T (float [m, d]) in one mode."""
        pool = directions.gradients
        V, variance = core_knowledge(T, mode, self.explained)
        products = directions.products(V.T)
        done = walk(
            directions,
            products,
            _budgets(budget, pool, variance),
            neighbours,
            by_id,
            delta=self.delta,
            price=torch.ones(len(by_id), dtype=torch.float64) if budget.tokens is None else pool.columns["tokens"],
            on_shortfall=self.on_shortfall,
        )
        rows = torch.tensor([row for component in done for row in component.rows], dtype=torch.long)
        return _Walked(V, variance, products, done, rows)

    def _neighbours(self, directions: Directions, by_id: Tensor, limit: int) -> tuple[Neighbours, str]:
        """Returns the graph, and in words how it was made."""
        n = len(by_id)
        if self.graph == "faiss" or (self.graph == "auto" and n > EXACT_UP_TO and self.neighbours):
            return faiss_lists(directions, by_id, self.neighbours), "faiss"
        visits = limit * (2 if self.compare_modes else 1)
        if self.neighbours and visits * VISITS > n > 1 and directions.cache is not None:
            return follow(exact_graph(directions, by_id, min(self.neighbours, n - 1))), "exact, of all candidates"
        return lists_on_demand(directions, by_id, self.neighbours), "exact, of the visited candidates"


@dataclass(frozen=True, eq=False)
class _Walked:
    """The directions of core knowledge V [v, d] with their shares [v] and products [n, v], and what the walk did with them."""

    V: Tensor
    variance: Tensor
    products: Tensor
    done: list[Component]
    rows: Tensor


def core_knowledge(T: Tensor, mode: Mode, explained: float) -> tuple[Tensor, Tensor]:
    """Returns the principal directions of the target's gradients, by descending variance, and their shares of it.

    As many as explain more than `explained` (Eq. G2IS-2). "paper": of the centred gradients; the largest entry of each is
    positive, as scikit-learn's PCA has it. "aligned": of the gradients as they are, with the mean product ≥ 0.

    Args:
        T: float [m, d].
        mode: See above.
        explained: In (0, 1].

    Returns:
        float64 [v, d] on the grid of `directions`, rows of length 1; and float64 [v], summing to 1.

    Raises:
        InvalidArgument: The gradients have no variance (or, for "aligned", are all zero).
    """
    T = T.double()
    mean = T.mean(0)
    _, s, V = torch.linalg.svd(T - mean if mode == "paper" else T, full_matrices=False)
    if not s[0] > 1e-9 * T.norm():
        raise InvalidArgument(
            "g2is needs targets with a gradient that is not zero, got zero for all; give other examples"
            if mode == "aligned"
            else "g2is in mode paper needs targets that differ, got no variance; give more of them, or use mode aligned"
        )
    ratio = s.square() / s.square().sum()
    count = int(torch.searchsorted(ratio.cumsum(0), explained, side="right")) + 1
    count = min(count, int((s > 1e-9 * s[0]).sum()))
    V, ratio = V[:count], ratio[:count]
    largest = V.gather(1, V.abs().argmax(1, keepdim=True))
    V = V * largest.sign()
    if mode == "aligned":
        V = torch.where(((V @ mean) < 0)[:, None], -V, V)
    return on_grid(V), ratio / ratio.sum()


def largest_remainder(total: int, shares: Tensor) -> list[int]:
    """Returns whole numbers that sum to `total`, by the largest-remainder rule; the first of equal remainders is served."""
    exact = total * shares
    parts = (exact + 1e-9).floor()
    served = (exact - parts).argsort(descending=True, stable=True)[: total - int(parts.sum())]
    parts[served] += 1
    return [int(part) for part in parts.tolist()]


def _budgets(budget: Budget, pool: Gradients, shares: Tensor) -> Sequence[float]:
    if budget.tokens is not None:
        return [float(part) for part in (budget.tokens * shares).tolist()]
    return largest_remainder(budget.limit(pool), shares)


def _component(done: Component, share: float, v: Tensor, mean: Tensor) -> dict[str, Any]:
    return {
        "variance": share,
        "budget": done.budget,
        "picks": len(done.rows),
        "stop": done.stop,
        "conflicts": done.conflicts,
        "inconsistent": done.inconsistent,
        "cosine_to_target": float(v @ mean),
    }


def _towards(cosine: Tensor, rows: Tensor, components: int | None) -> dict[str, float | int | None]:
    """Returns how these rows stand to the target's mean: one line of the table of modes."""
    own = cosine[rows]
    mean, against = (float(own.mean()), float((own < 0).double().mean())) if len(rows) else (None, None)
    return {"rows": len(rows), "components": components, "mean_cosine_to_target": mean, "share_against_it": against}


def _path(done: Sequence[Component]) -> dict[str, list[Any]]:
    steps = [(row, c, j, how) for c, x in enumerate(done) for j, (row, how) in enumerate(zip(x.rows, x.via, strict=True))]
    return {name: [step[i] for step in steps] for i, name in enumerate(("row", "component", "step", "via"))}


def _layout(directions: Directions, rows: Tensor, mean: Tensor, by_id: Tensor, rng: torch.Generator) -> dict[str, Any]:
    """Returns places of picks, target and a sample of the pool, in the plane of the sample's two main directions."""
    sample = by_id[~directions.zero[by_id]]
    sample = sample[torch.randperm(len(sample), generator=rng)[:LAYOUT]]
    U = directions.rows(sample)
    center = U.mean(0)
    plane = torch.linalg.svd(U - center, full_matrices=False).Vh[:2]
    plane = plane * plane.gather(1, plane.abs().argmax(1, keepdim=True)).sign()

    def places(X: Tensor) -> list[list[float]]:
        return ((X - center) @ plane.T).tolist()  # type: ignore[no-any-return]

    picks = [place for part in rows.split(4096) for place in places(directions.rows(part))]
    return {"picks": picks, "sample_rows": sample.tolist(), "sample": places(U), "target": places(mean[None])[0]}


def _cosine_notes(mode: str, trace: dict[str, Any]) -> list[str]:
    mean, whole = trace["mean_cosine"], trace["pool_mean_cosine"]
    if mean is None or mean >= whole:
        return []
    cure = "; use mode aligned" if mode == "paper" else ""
    return [
        f"the picks are less like the target than the pool is: their mean cosine to it is {mean:.3f}, the pool's "
        f"{whole:.3f}{cure}"
    ]


def _shortfall(done: Sequence[Component], budget: Budget, pool: Gradients, rows: Tensor) -> list[str]:
    """Returns a note with the cause for each component that did not use its budget, if the whole budget is not used."""
    limit, what = budget.limit(pool), "examples"
    head = f"{len(rows)} examples are chosen of the {limit} the budget asks for"
    if budget.tokens is None and len(rows) == limit:
        return []
    if budget.tokens is not None:
        spent = int(pool.columns["tokens"][rows].sum())
        if spent >= 0.95 * budget.tokens:
            return []
        what = "tokens"
        head = f"the chosen {len(rows)} examples spend {spent} of the budget's {budget.tokens} tokens"
    causes = [
        f"component {c} ended after {len(x.rows)} examples of a budget of {x.budget:.0f} {what}: {_cause(x)}"
        for c, x in enumerate(done, 1)
        if x.stop != "budget"
    ]
    shown = "; ".join(causes[:3]) + (f"; and {len(causes) - 3} more components, see the trace" if len(causes) > 3 else "")
    return [f"{head}. {shown}"]


def _cause(component: Component) -> str:
    if component.stop == "exhausted":
        return "no candidate is left"
    if component.stop == "start":
        return f"each of the {START_AMONG} candidates furthest along its direction is chosen already, and it starts at no other"
    if component.stop == "price":
        return f"each of the {component.dear} candidates left has more tokens than remain"
    dear = f"{component.dear} have more tokens than remain, " if component.dear else ""
    return (
        f"of the candidates left {dear}{component.conflicts} conflict with one of its picks and "
        f"{component.inconsistent} would turn their sum too far from its direction"
    )
