"""OGS: a policy learns in a simulator from which cluster to draw, so that the domain is learned and little is forgotten."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar, Literal

import torch
from torch import Tensor

from gradsieve.errors import InvalidArgument
from gradsieve.selectors.clusters import cluster
from gradsieve.selectors.directions import Directions
from gradsieve.selectors.ogs_account import PER_ROW, cluster_notes, navigator_notes, policy_notes, trace
from gradsieve.selectors.ogs_anchor import Normalize, anchor_cosine, anchor_notes, subspace_orth
from gradsieve.selectors.ogs_draws import arrange, threshold_scores
from gradsieve.selectors.ogs_policy import PPO, train
from gradsieve.selectors.ogs_refine import account, drive, refine
from gradsieve.selectors.ogs_simulator import Simulator, Surface, totals, unit_sums
from gradsieve.selectors.ogs_static import Against, OGSStatic, zero_risk_note
from gradsieve.selectors.ranking import best_first, id_order, length_check, pay, percentile
from gradsieve.selectors.reading import check_choice, cosines, reference_notes, require, zero_note
from gradsieve.types import Budget, Gradients, Problem, Selection

if TYPE_CHECKING:
    from gradsieve.selectors.ogs_environment import OGSEnvironment

Constraint = Literal["kl", "loss", "key", "risk"]
Fidelity = Literal["quadratic", "linear", "navigator"]
Order = Literal["score", "random"]

HORIZON = 64
"""Steps of an episode, about, where the batch is not given."""

EPSILON = {"kl": 0.1, "loss": 0.01, "key": 0.01}

ENERGY = 0.9
"""Share of the category means' squared length that the subspace of Eq. OGS-4 holds."""


@dataclass(frozen=True)
class OGS:
    """Learns a policy that draws batches from clusters of the pool, to gain on the target within a bound on forgetting.

    Orthogonal Gradient Selection (2026, arXiv:2602.06359). The pool is clustered by gradient direction. In a simulator of
    the losses of target and anchor (Eq. OGS-9) PPO-Lagrangian (Eq. OGS-7) trains a policy whose action is the cluster that
    gives the next batch; its reward is the fall of the target's loss, its cost the harm to the anchor, bounded by
    `epsilon`. The frozen policy then runs greedily and emits an ordered subset. Threshold rules (Eq. OGS-8) are compared
    with it in the same simulator.

    Where the paper leaves it open: a cluster gives its rows in a fixed order (`order`); the policy also sees what the simulator
    expects of each cluster's next batch; λ follows the cost of the greedy episode. A column `replay` (1 for replay
    examples, 0 for others) gives replay examples clusters of their own. The simulator knows gradients at the start of
    training only: it ranks subsets, it does not measure them.

    Attributes:
        clusters: Clusters of domain examples, at least 1.
        general_clusters: Clusters of replay examples, at least 1; read only if there are any.
        constraint: What is bounded. "kl": KL divergence to the base model on the anchor, as ½ δᵀFδ, in nats (Eq. OGS-11);
            "loss": the relative rise of the anchor's mean loss (Eq. OGS-6); "key": of the loss of its answer-bearing tokens,
            simulated like "loss" and then scaled to what the Navigator shows; "risk": the mean risk of the chosen (Eq.
            OGS-8), each weighted by what it costs of the budget.
        epsilon: The bound, above 0. By default 0.1 nats for "kl", 0.01 for "loss", the pool's median risk for "risk".
        fidelity: "quadratic" lets gains saturate and small conflicts add up; "linear" has no curvature, and then a
            threshold rule is optimal. "kl" is all curvature and needs another. "navigator": the quadratic one, scaled to what
            a live model shows when it is trained on the policy's draws; half of the anchor is then held out to measure on.
        against: References behind the risk, as in ogs-static: "plain" (the mean of the anchor), "contrast", "both",
            "categories" (then Orth is the one to the subspace of their means, Eq. OGS-4).
        normalize: How the mean of "plain" is taken, as in ogs-static: "none", "example", "category". The simulator's anchor
            loss is the plain one.
        order: Which rows a cluster gives first. "score": those of largest utility - λ·cost, to first order in the cost
            where the most useful examples of the pool would lead, with the λ that keeps the pool's best within `epsilon`;
            "random".
        batch: Examples of a step, at least 1. By default a 64th of the budget, rounded up.
        step: Length η of a step whose examples all agree, in weights. By default the one with which the most useful
            examples of the pool, as many as the budget allows, end at the lowest target loss on their way: a run trained to
            its end.
        updates: Rounds of training the policy, at least 1.
        episodes: Episodes sampled in a round, at least 1.
        learning_rate: Of Adam for policy and critics, above 0; it falls linearly to 0.
        rounds: With fidelity "navigator", policies that are trained and played on the Navigator, at least 1.
        measurements: With fidelity "navigator", how often the losses are measured in an episode, at least 1.
        multiplier_rate: How fast λ moves, at least 0: at r, a greedy episode of cost 2·epsilon or more raises the price of one
            epsilon by r times the reward of an episode at the pace of its best first draw.
    """

    clusters: int = 12
    general_clusters: int = 2
    constraint: Constraint = "kl"
    epsilon: float | None = None
    fidelity: Fidelity = "quadratic"
    against: Against = "plain"
    normalize: Normalize = "none"
    order: Order = "score"
    batch: int | None = None
    step: float | None = None
    updates: int = PPO.updates
    episodes: int = PPO.episodes
    learning_rate: float = PPO.learning_rate
    rounds: int = 2
    measurements: int = 8
    multiplier_rate: float = PPO.multiplier_rate

    replays: ClassVar[bool] = True  # reads the column `replay`

    title: ClassVar[str] = "OGS"
    picks_by: ClassVar[str] = "a policy that learnt in a simulator what lowers the target's loss and harms the anchor little"
    reads: ClassVar[str] = "sketches; target and anchor cosines (exact)"
    cost: ClassVar[str] = "O(ndK), the store read once (7 times above 2 GiB); 64 · updates · episodes steps of O(Km)"
    source: ClassVar[str] = "OGS, arXiv:2602.06359"

    def __post_init__(self) -> None:
        check_choice("constraint", self.constraint, Constraint)
        check_choice("fidelity", self.fidelity, Fidelity)
        check_choice("against", self.against, Against)
        check_choice("order", self.order, Order)
        _ = self._rule  # refuses what does not go together
        for name in ("clusters", "general_clusters", "batch", "updates", "episodes", "rounds", "measurements"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise InvalidArgument(f"{name} must be at least 1, got {value}")
        for name in ("epsilon", "step", "learning_rate"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise InvalidArgument(f"{name} must be above 0 and finite, got {value}")
        if not 0 <= self.multiplier_rate < math.inf:
            raise InvalidArgument(f"multiplier_rate must be at least 0 and finite, got {self.multiplier_rate}")
        if self.constraint == "key" and self.fidelity != "navigator":
            raise InvalidArgument(f"constraint must be kl, loss or risk with fidelity {self.fidelity}, got key; use navigator")
        if self.constraint == "risk" and self.fidelity == "navigator":
            raise InvalidArgument(
                "constraint must be kl, loss or key with fidelity navigator, which measures no risk, got risk"
            )
        if self.constraint == "kl" and self.fidelity == "linear":
            raise InvalidArgument("constraint must be loss or risk with fidelity linear, which has no KL, got kl")

    @property
    def _rule(self) -> OGSStatic:
        """The threshold rule with the same references: risk comes from it, and it is compared with."""
        return OGSStatic(against=self.against, normalize=self.normalize, risk="conflict")

    @property
    def needs(self) -> frozenset[str]:
        """Sketches of pool, target and anchor, and the norm, loss and exact products of the pool."""
        live = {"navigator"} if self.fidelity == "navigator" else set()
        return self._rule.needs | {"sketch", "targets", "anchors", "loss", "dot/anchor"} | live

    def select(self, problem: Problem, budget: Budget, rng: torch.Generator) -> Selection:
        """Returns the examples in the order in which the greedy policy draws them; scores are those of `order`.

        The trace holds λ, rewards and costs per round of training (`training`), cluster, reward, cost and examples per draw of
        the emitted episode (`steps`), the draw that took each candidate (`draw`: the batches), each cluster (`clusters`), what
        the simulator predicts for the policy, two threshold rules and a random draw at the same budget (`simulated`), `utility`
        and `risk` of every candidate, and what was resolved (`epsilon`, `batch`, `step`, …).
        """
        world = _world(self, problem, budget, rng)
        ppo = PPO(self.updates, self.episodes, self.learning_rate, self.multiplier_rate)
        trained = train(world.simulator, ppo, rng)
        pool, by_id, batch = problem.candidates, id_order(problem.candidates.ids), world.simulator.draws.batch
        surfaces, refined = world.surfaces, None

        def emitted(clusters: Sequence[int]) -> tuple[Tensor, list[Tensor]]:
            """Returns the rows in the order of the draws, and per draw those that are paid for."""
            supply = [iter(rows.split(batch)) for rows in world.simulator.draws.rows]
            drawn = [next(supply[c]) for c in clusters]
            if budget.tokens is not None:  # what is left pays for rows further down the cluster that was drawn last
                drawn[-1] = torch.cat([drawn[-1], *supply[clusters[-1]]])
            order = torch.cat(drawn)
            paid = budget.take(order, pool)
            return order, [part[torch.isin(part, paid)] for part in drawn]

        if problem.navigator is not None and self.fidelity == "navigator" and self.constraint != "risk":
            refined = refine(
                world.simulator, trained, problem.navigator, self.constraint, ppo, rng,
                lambda clusters: [part for part in emitted(clusters)[1] if len(part)],
                rounds=self.rounds, points=self.measurements,
            )  # fmt: skip
            trained, s = refined.trained, refined.scales
            surfaces = surfaces[0].scaled(s.gain, s.saturation), surfaces[1].scaled(s.rise, s.harm)
        order, parts = emitted(trained.run.clusters)
        rows, notes = pay(order, pool, budget)
        eligible = by_id[~world.scores[by_id].isnan()]
        subsets = {
            "ogs": rows,
            "threshold": budget.take(best_first(world.scores, by_id), pool),
            "ogs-static": world.rule.rows,
            "random": budget.take(eligible[torch.randperm(len(eligible), generator=rng)], pool),
        }
        predicted = dict(zip(subsets, totals(surfaces, world.directions, list(subsets.values())), strict=True))
        facts = trace(world.simulator, trained, predicted, parts, world.columns, world.general)
        facts |= {"step": world.step, "order_lambda": world.penalty, "constraint": self.constraint}
        facts |= {"references": world.references, "length_correlation": world.length_correlation}
        said = policy_notes(self.constraint, world.simulator.epsilon, trained, predicted)
        if refined is not None and problem.navigator is not None and self.constraint != "risk":
            measured = {"ogs": refined.rounds[refined.best][1].total}
            for name in ("threshold", "random"):
                measured[name] = drive(problem.navigator, subsets[name].split(batch), self.constraint, 1).total
            facts |= account(refined, world.simulator)
            facts["measured"] = {name: {"reward": r, "cost": c} for name, (r, c) in measured.items()}
            said += navigator_notes(self.constraint, world.simulator.epsilon, measured, refined.scales.gain)
        weights = torch.ones(len(rows), dtype=torch.float64)
        return Selection(rows, weights, world.scores, facts, (*world.notes, *said, *notes), per_row=PER_ROW)

    def navigator_passes(self, episode: float, target: float, held_out: float) -> float:
        """Returns what the Navigator takes with fidelity "navigator", in token passes (`gradsieve.overhead`), at most.

        Args:
            episode: Tokens of an episode: what the budget pays for.
            target: Of the target's examples.
            held_out: Of the anchor's that forgetting is measured on; KL asks the base model for them too.
        """
        measured = self.rounds * (1 + self.measurements) + 2 * 2  # the two rules that are compared: at start and end
        passed = target + held_out * (2 if self.constraint == "kl" else 1)
        return (self.rounds + 2) * episode + measured * passed / 2

    def environment(self, problem: Problem, budget: Budget, rng: torch.Generator) -> OGSEnvironment:
        """Returns the world as a `gymnasium.Env`: the simulator, or with fidelity "navigator" the live model of the problem."""
        from gradsieve.selectors.ogs_environment import Live, OGSEnvironment

        simulator, live = _world(self, problem, budget, rng).simulator, None
        if problem.navigator is not None and self.fidelity == "navigator" and self.constraint != "risk":
            live = Live(problem.navigator, self.constraint, lambda rows: budget.take(rows, problem.candidates))
        return OGSEnvironment(simulator, live=live)


@dataclass(frozen=True, eq=False)
class _World:
    """All that is fixed before the policy is trained.

    Attributes:
        simulator: Where it is trained.
        surfaces: The relative domain loss, and the cost.
        directions: Unit sketches of the pool.
        columns: `utility`, `anchor_cosine` and `risk`: float64 [n] each.
        rule: What ogs-static chooses.
        references: Names of all that utility, Orth, risk and the simulated losses rest on.
        length_correlation: Of utility, risk and scores.
        scores: float64 [n], the order in which clusters give their rows (if by score).
        penalty: λ in these scores, None where they are the cost alone.
        step: η.
        general: Per cluster whether it holds replay examples.
        notes: What the user must read about pool and references.
    """

    simulator: Simulator
    surfaces: tuple[Surface, Surface]
    directions: Directions
    columns: dict[str, Tensor]
    rule: Selection
    references: list[str]
    length_correlation: dict[str, float]
    scores: Tensor
    penalty: float | None
    step: float
    general: list[bool]
    notes: list[str]


def _world(ogs: OGS, problem: Problem, budget: Budget, rng: torch.Generator) -> _World:
    require(problem, ogs.needs, "ogs", budget)
    assert problem.targets is not None
    assert problem.anchors is not None
    pool, by_id = problem.candidates, id_order(problem.candidates.ids)
    utility, keep = cosines(pool, "target"), cosines(pool, "anchor")
    notes = zero_note(pool, utility.isnan(), "ogs")
    rule = ogs._rule.select(problem, budget, rng)
    risk = torch.tensor(rule.trace["risk"], dtype=torch.float64)
    epsilon = _epsilon(ogs, risk)
    references = sorted({"target", "anchor", *rule.trace["references"]})
    notes += reference_notes(problem, references) + anchor_notes(problem, references)
    notes += zero_risk_note(risk, ogs.against, "ogs-static with --risk overlap")

    group = _groups(pool, utility.isnan())
    directions = Directions.of(pool)
    labels = cluster(directions, group, (ogs.clusters, ogs.general_clusters), rng)
    price, limit, batch = _prices(pool, budget, ogs.batch)

    useful = budget.take(best_first(utility, by_id), pool)
    if not len(useful):
        raise InvalidArgument(f"budget must pay for a candidate whose gradient is not zero, got {budget}; raise it")
    members = torch.full_like(group, -1).index_fill(0, useful, 0)
    sums = unit_sums(directions, members, 1)
    losses = Surface.loss(problem.targets, utility), Surface.loss(problem.anchors, keep)
    step = ogs.step
    if step is None:
        pace, said = _pace(*losses[0].table(sums, members, useful))
        step, notes = batch * pace, notes + said
    surfaces = _surfaces(ogs, problem, losses, risk * price / limit, step / batch)

    at = surfaces[1].table(sums, members, useful)[1][0]
    bound = epsilon + 0.5 * float(at.square().sum())  # cost(δ) ≤ ε, linearised where the most useful rows lead
    slopes = surfaces[1].slopes(at, directions)
    scores, penalty = threshold_scores(utility, slopes, bound, by_id, lambda order: budget.take(order, pool))
    order = best_first(scores, by_id)
    if ogs.order == "random":
        members_by_id = by_id[labels[by_id] >= 0]
        order = members_by_id[torch.randperm(len(members_by_id), generator=rng)]
    correlation, length_notes = length_check({"utility": utility, "risk": risk, "score": scores}, pool)
    notes += length_notes
    features = (_orth(ogs, problem), risk, utility, pool.columns["loss"])
    draws = arrange(labels, order, by_id, price, features, batch, limit)
    general = [bool(group[rows[0]] == 1) for rows in draws.rows]
    notes += cluster_notes(ogs.clusters, ogs.general_clusters, general)
    said = [*notes, *zero_risk_note(risk, ogs.against, "--risk overlap")]  # the rule's words for it
    notes += [f"ogs-static, for comparison: {note}" for note in rule.notes if note not in said]
    simulator = Simulator.of(draws, surfaces, directions, epsilon)
    columns = {"utility": utility, "anchor_cosine": keep, "risk": risk}
    return _World(
        simulator, surfaces, directions, columns, rule, references, correlation, scores, penalty, step, general, notes
    )


def _orth(ogs: OGS, problem: Problem) -> Tensor:
    """Returns Orth (Eq. OGS-2, OGS-4) as the policy sees it: float64 [n], to the anchor in the form that `against` has it."""
    if ogs.against == "categories":
        return subspace_orth(problem, ENERGY)[0]
    return 1 - anchor_cosine(problem, ogs.normalize).abs()


def _epsilon(ogs: OGS, risk: Tensor) -> float:
    if ogs.epsilon is not None:
        return ogs.epsilon
    if ogs.constraint != "risk":
        return EPSILON[ogs.constraint]
    median = percentile(risk, 50)
    if not median > 0:
        raise InvalidArgument("epsilon must be above 0, got the pool's median risk of 0; give --epsilon or --against contrast")
    return median


def _groups(pool: Gradients, left_out: Tensor) -> Tensor:
    """Returns 1 for replay rows, 0 for others, -1 for rows left out: int64 [n]."""
    replay = pool.columns.get("replay", torch.zeros(len(pool.ids), dtype=torch.float64))
    wrong = (replay != 0) & (replay != 1)
    if wrong.any():
        raise InvalidArgument(f"column 'replay' must be 0 or 1, got {replay[wrong][0].item()}; mark replay rows with 1")
    return replay.long().masked_fill(left_out, -1)


def _prices(pool: Gradients, budget: Budget, batch: int | None) -> tuple[Tensor, float, int]:
    """Returns what each row costs (float64 [n]), what may be spent, and the rows of a step."""
    if budget.tokens is None:
        price, limit = torch.ones(len(pool.ids), dtype=torch.float64), float(budget.limit(pool))
    else:
        price, limit = pool.columns["tokens"], float(budget.tokens)
    return price, limit, batch if batch is not None else math.ceil(limit / float(price.mean()) / HORIZON)


def _pace(fall: Tensor, at: Tensor) -> tuple[float, list[str]]:
    """Returns the η/b at which rows with this `Surface.table` end at the lowest loss on their way, and a note if they climb."""
    bend = float(at.square().sum())
    if not (fall != 0 and bend > 0):
        raise InvalidArgument("step must be given, got a simulated target loss that no candidate changes; pass --step")
    if fall < 0:
        return float(-fall) / bend, []
    return float(fall) / bend, [
        "together the most useful examples within the budget raise the simulated target loss: this pool does not teach the "
        "target; give another pool, a smaller budget, or check the target"
    ]


def _surfaces(
    ogs: OGS, problem: Problem, losses: tuple[Surface, Surface], risk: Tensor, pace: float
) -> tuple[Surface, Surface]:
    """Returns the relative domain loss, and the cost.

    Args:
        ogs: The settings.
        problem: Gives the losses before training.
        losses: Of target and anchor, for rows that add their unit gradient.
        risk: float64 [n], what each row adds to the mean risk of the chosen.
        pace: η/b: rows add that much of their unit gradient.
    """
    bend = pace**2 if ogs.fidelity != "linear" else 0.0
    start = _mean_loss(problem.targets, "targets")
    domain, anchor = losses[0].scaled(pace / start, bend / start), losses[1]
    if ogs.constraint == "kl":
        return domain, anchor.scaled(0.0, bend)
    if ogs.constraint == "risk":
        return domain, replace(anchor.scaled(0.0, 0.0), rate=risk)
    start = _mean_loss(problem.anchors, "anchors")
    return domain, anchor.scaled(pace / start, bend / start)


def _mean_loss(gradients: Gradients | None, name: str) -> float:
    if gradients is None or "loss" not in gradients.columns:
        raise InvalidArgument(
            f"ogs needs the column 'loss' of the {name}, got none; extract them again, or add it to the columns"
        )
    loss = float(gradients.columns["loss"].mean())
    if not 0 < loss < math.inf:
        raise InvalidArgument(f"the mean loss of the {name} must be above 0 and finite, got {loss}; give other examples")
    return loss
