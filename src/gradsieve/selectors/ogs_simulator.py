"""The world in which the OGS policy learns: what a draw does to the domain loss and to the cost, many episodes at a time.

Training moves the weights by -δ. With u_i = g_i/‖g_i‖ the unit gradient of row i, b rows to a step and η the length of a step
whose rows all agree (Eq. OGS-9; unit rows **[choice]**: a gradient's norm is mostly a length meter, and OGS-5 and OGS-3 are
then exactly the first-order reward and cost):

    δ = Σ_{i drawn} (η/b) u_i       L(δ) = L(0) - <ḡ, δ> + ½ δᵀFδ       F = (1/m) Σ_j ĝ_j ĝ_jᵀ       KL(δ) = ½ δᵀFδ

ĝ_j are the m sketches of the target (the anchor), ḡ is their mean. A step need not touch d numbers, and this changes no result:

*   F = RᵀR with R = Ĝ/√m, or its triangular factor if m > d. So δ acts through s = Rδ only: r = min(m, d) numbers.
*   A draw is the same set of rows in every episode, and at most about budget/b draws of a cluster can happen. The unit rows
    of each draw are summed once, in one pass over the store, and the sums [K·J, d] are multiplied by R. s is then a sum of
    rows of the table [K, J, r], and the change that a draw makes takes one product of length r.

One step of one episode costs O(K r), and memory O(n + K·J·d): nothing of size n × d or n × m exists.

The sketch's error matters most for the products with ḡ. Those are known exactly (columns `dot/…`), so every unit row is moved
along ḡ until it has the right one: u'_i = u_i + (‖ḡ‖ cos_i - <ḡ, u_i>) ḡ/‖ḡ‖².
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from gradsieve.errors import InvalidArgument
from gradsieve.selectors.dense import dense
from gradsieve.selectors.directions import Directions, on_grid
from gradsieve.selectors.ogs_draws import Draws, grouped_sum
from gradsieve.selectors.ranking import id_order
from gradsieve.types import Gradients

CLUSTER_FEATURES = 12
OVERALL_FEATURES = 6


@dataclass(frozen=True, eq=False)
class Surface:
    """A quantity that training changes by Σ_i rate_i + ½ ‖Σ_i R u'_i‖² once the rows i were drawn.

    Attributes:
        rate: float64 [n], first-order change per row.
        root: float64 [r, d], R; r = 0 where the quantity has no curvature.
        mean: float64 [d], ḡ.
        cosine: float64 [n], the exact cosine of every row with ḡ.
    """

    rate: Tensor
    root: Tensor
    mean: Tensor
    cosine: Tensor

    @classmethod
    def loss(cls, gradients: Gradients, cosine: Tensor) -> Surface:
        """Returns the change of these examples' mean loss when every row drawn adds u_i to δ (Eq. OGS-9).

        Raises:
            InvalidArgument: The mean gradient of the examples is zero, or a sketch is not finite.
        """
        G = dense(gradients, id_order(gradients.ids)).double()
        mean, root = G.mean(0), G / len(G) ** 0.5
        norm = mean.square().sum().sqrt()
        if not norm > 0:
            raise InvalidArgument("the mean gradient of target and anchor must not be zero, got zero; give other examples")
        if len(root) > root.shape[1]:
            root = torch.linalg.qr(root, mode="r").R
        return cls(-norm * cosine, root, mean, cosine)

    def scaled(self, slope: float, curvature: float) -> Surface:
        """Returns the surface with its rates times `slope` and its second-order part times `curvature` ≥ 0."""
        root = self.root * curvature**0.5 if curvature > 0 else self.root[:0]
        return Surface(self.rate * slope, root, self.mean, self.cosine)

    def table(self, sums: Tensor, labels: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Returns Σ rate [q] and R Σ u' [q, r] over q sets of rows.

        Args:
            sums: float64 [q, d], Σ u of each set.
            labels: int64 [n], the set of each of `rows`.
            rows: The members of all sets, in the order in which to add.
        """
        norm = self.mean.square().sum().sqrt()
        exact = norm * grouped_sum(self.cosine, labels, rows, len(sums))
        slip = (exact - sums @ self.mean) / norm**2
        at = sums @ self.root.T + slip[:, None] * (self.root @ self.mean)
        return grouped_sum(self.rate, labels, rows, len(sums)), at

    def slopes(self, at: Tensor, directions: Directions) -> Tensor:
        """Returns what one more row changes, to first order, where R Σ u' is `at` [r]: float64 [n], in one pass."""
        if not at.any():
            return self.rate
        norm = self.mean.square().sum().sqrt()
        bend = self.root.T @ at
        V = torch.stack([bend / bend.square().sum().sqrt(), self.mean / norm], dim=1)
        along_bend, along_mean = directions.products(on_grid(V)).unbind(1)
        return self.rate + bend.square().sum().sqrt() * along_bend + (self.cosine - along_mean) * (bend @ self.mean) / norm


def unit_sums(directions: Directions, labels: Tensor, count: int) -> Tensor:
    """Returns the sums of the unit sketches of each label (int64 [n], -1 for none), in one pass: float64 [count, d]."""
    sums = torch.zeros(count, directions.gradients.dim, dtype=torch.float64)
    for rows, U in directions.blocks():
        inside = labels[rows] >= 0
        sums.index_add_(0, labels[rows[inside]], U[inside])
    return sums


def total(surfaces: tuple[Surface, Surface], directions: Directions, rows: Tensor) -> tuple[float, float]:
    """Returns the reward and the cost (Eq. OGS-6) of training on these rows, in the simulator; one pass.

    Args:
        surfaces: The relative domain loss, and the cost.
        directions: Unit sketches of the pool.
        rows: int64 [k].
    """
    return totals(surfaces, directions, [rows])[0]


def totals(surfaces: tuple[Surface, Surface], directions: Directions, subsets: Sequence[Tensor]) -> list[tuple[float, float]]:
    """Returns `total` of every subset, in one pass for all of them."""
    n = len(directions.zero)
    inside = torch.zeros(n, len(subsets), dtype=torch.float64)
    for number, rows in enumerate(subsets):
        inside[rows, number] = 1
    sums = torch.zeros(len(subsets), directions.gradients.dim, dtype=torch.float64)
    for block, U in directions.blocks():
        sums += inside[block].T @ U  # exact: entries are multiples of 2^-24
    one, found = torch.zeros(n, dtype=torch.int64), []
    for rows, own in zip(subsets, sums.split(1), strict=True):
        (fall, at), (rise, away) = (surface.table(own, one, rows) for surface in surfaces)
        found.append((float(-fall - 0.5 * at.square().sum()), float(rise + 0.5 * away.square().sum())))
    return found


@dataclass(frozen=True, eq=False)
class Simulator:
    """Reward and cost along every sequence of draws.

    Attributes:
        draws: What can be drawn.
        rates: float64 [2, K, J], the first-order reward and cost of each draw.
        domain: float64 [K, J, r], what each draw adds to s of the relative domain loss.
        anchor: float64 [K, J, r'], what each draw adds to s of the cost.
        epsilon: Bound on the cost of an episode, above 0.
    """

    draws: Draws
    rates: Tensor
    domain: Tensor
    anchor: Tensor
    epsilon: float

    @classmethod
    def of(cls, draws: Draws, surfaces: tuple[Surface, Surface], directions: Directions, epsilon: float) -> Simulator:
        """Returns the simulator of these draws; reads the sketches once.

        Args:
            draws: What can be drawn.
            surfaces: The relative domain loss, and the cost.
            directions: Unit sketches of the pool.
            epsilon: Bound on the cost of an episode, above 0.
        """
        shape = draws.size.shape
        rows = torch.cat(draws.rows)
        rows = rows[draws.index[rows] >= 0]
        sums = unit_sums(directions, draws.index, shape.numel())
        (fall, at), (rise, away) = (surface.table(sums, draws.index, rows) for surface in surfaces)
        return cls(draws, torch.stack([-fall, rise]).view(2, *shape), at.view(*shape, -1), away.view(*shape, -1), epsilon)

    @cached_property
    def reward_scale(self) -> float:
        """Reward of an episode at the pace of its best first draw: the unit in which the policy counts rewards."""
        best = float(outlook(self, begin(self, 1))[0].abs().max())
        return (best if best > 0 else 1.0) * self.draws.steps

    @property
    def units(self) -> Tensor:
        """Units in which the policy counts reward and cost: float64 [2, 1]."""
        return torch.tensor([[self.reward_scale], [self.epsilon]], dtype=torch.float64)


@dataclass(frozen=True, eq=False)
class State:
    """E episodes in progress.

    Attributes:
        drawn: int64 [E, K], draws taken from each cluster.
        domain: float64 [E, r], s of the relative domain loss.
        anchor: float64 [E, r'], s of the cost.
        spent: float64 [E], of the budget.
        total: float64 [2, E], Σ reward and Σ cost so far.
        last: float64 [2, E], the last reward and cost.
    """

    drawn: Tensor
    domain: Tensor
    anchor: Tensor
    spent: Tensor
    total: Tensor
    last: Tensor


def begin(sim: Simulator, episodes: int) -> State:
    """Returns that many episodes at their start."""
    domain, anchor = (torch.zeros(episodes, t.shape[2], dtype=torch.float64) for t in (sim.domain, sim.anchor))
    none = torch.zeros(2, episodes, dtype=torch.float64)
    return State(torch.zeros(episodes, len(sim.draws.rows), dtype=torch.int64), domain, anchor, none[0], none, none)


def available(sim: Simulator, state: State) -> Tensor:
    """Returns which clusters can be drawn from: bool [E, K], all False where the episode is over."""
    left = state.drawn < (sim.draws.size > 0).sum(1)
    return left & (state.spent < sim.draws.budget * (1 - 1e-9))[:, None]


def outlook(sim: Simulator, state: State) -> Tensor:
    """Returns the reward and the cost of the next draw from each cluster: float64 [2, E, K], 0 where there is none.

    A draw that costs more than what is left of the budget counts by the share of it that can be paid for.
    """
    index, share = _next(sim, state)
    first = sim.rates.flatten(1)[:, index] * share
    bends = []
    for table, at in ((sim.domain, state.domain), (sim.anchor, state.anchor)):
        X = table.flatten(0, 1)[index]
        bends.append(share * (X @ at[:, :, None])[..., 0] + 0.5 * share.square() * X.square().sum(2))
    return first + torch.stack([-bends[0], bends[1]])


def advance(sim: Simulator, state: State, action: Tensor, ahead: Tensor) -> State:
    """Draws from cluster action[e] in episode e. An episode that is over stays as it is, with `last` zero.

    Args:
        sim: The world.
        state: E episodes.
        action: int64 [E], an available cluster each; anything where the episode is over.
        ahead: `outlook` of this state.
    """
    pick = action[:, None]
    index, share = (v.gather(1, pick)[:, 0] for v in _next(sim, state))
    last = ahead.gather(2, pick.expand(2, -1, 1))[..., 0]
    return State(
        drawn=state.drawn.scatter_add(1, pick, (share > 0).long()[:, None]),
        domain=state.domain + share[:, None] * sim.domain.flatten(0, 1)[index],
        anchor=state.anchor + share[:, None] * sim.anchor.flatten(0, 1)[index],
        spent=state.spent + share * sim.draws.price.flatten()[index],
        total=state.total + last,
        last=last,
    )


def _next(sim: Simulator, state: State) -> tuple[Tensor, Tensor]:
    """Returns the flat index of each cluster's next draw and the share of it that can be paid for (0: no draw): [E, K] each."""
    K, J = sim.draws.size.shape
    index = torch.arange(K) * J + state.drawn.clamp(max=J - 1)  # a cluster at its end has no next draw: share 0
    price = sim.draws.price.flatten()[index]
    rest = (sim.draws.budget - state.spent)[:, None]
    share = (rest / torch.where(price > 0, price, 1.0)).clamp(max=1)
    return index, torch.where(available(sim, state), share, 0.0)


@dataclass(frozen=True, eq=False)
class Observation:
    """What the policy sees of E episodes; every number lies in [-1, 1].

    Attributes:
        clusters: float32 [E, K, 12]: the seven of `Draws.left`, then the simulator's outlook on the next draw: reward and cost
            in the units of the whole episode, and reward, cost and reward - λ·cost relative to the other clusters.
        overall: float32 [E, 6]: reward and cost so far, the last reward and cost, λ, the share of the budget that is spent.
        mask: bool [E, K], the clusters that can be drawn from.
    """

    clusters: Tensor
    overall: Tensor
    mask: Tensor

    def select(self, index: Tensor) -> Observation:
        """Returns the observations of some of the episodes."""
        return Observation(self.clusters[index], self.overall[index], self.mask[index])


def observe(sim: Simulator, state: State, ahead: Tensor, multiplier: Tensor) -> Observation:
    """Returns what the policy sees.

    The losses enter as reward and cost so far (Σr = 1 - L_dom/L_dom(0), Eq. OGS-6). **[choice]** The outlook on
    the next draws is added to it. Nothing has a unit, so that a policy carries over to another pool or model: rewards are
    counted in `reward_scale`, costs in ε, both times the number of steps where they belong to one draw; x/(1 + |x|) bounds
    the rest.

    Args:
        sim: The world.
        state: E episodes.
        ahead: `outlook` of this state.
        multiplier: float64 [E], λ in these units, at least 0.
    """
    mask = available(sim, state)
    left = sim.draws.left[torch.arange(mask.shape[1]), state.drawn]
    pace = ahead * (sim.draws.steps / sim.units[..., None])
    lagrangian = (pace[0] - multiplier[:, None] * pace[1]) / (1 + multiplier[:, None])
    relative = [_relative(values, mask) for values in (*pace, lagrangian)]
    clusters = torch.cat([left, torch.stack([*pace, *relative], dim=2).float()], dim=2)
    spent = state.spent / sim.draws.budget
    last = state.last * (sim.draws.steps / sim.units)
    overall = torch.stack([*(state.total / sim.units), *last, multiplier, spent], dim=1).float()
    return Observation(_bounded(clusters, shares=(3, 6)), _bounded(overall, shares=(5,)), mask)


def _relative(values: Tensor, mask: Tensor) -> Tensor:
    """Returns the values in standard deviations from their mean over the clusters in the mask: [E, K], 0 outside."""
    count = mask.sum(1, keepdim=True).clamp(min=1)
    away = (values - values.where(mask, 0.0).sum(1, keepdim=True) / count).where(mask, 0.0)
    sd = (away.square().sum(1, keepdim=True) / count).sqrt()
    return away / torch.where(sd > 0, sd, 1.0)


def _bounded(x: Tensor, shares: tuple[int, ...]) -> Tensor:
    """Returns x/(1 + |x|), but for the columns that are shares and lie in [0, 1] as they are."""
    out = x / (1 + x.abs())
    out[..., shares] = x[..., shares].clamp(max=1)  # a sum of shares may exceed 1 by rounding
    return out
