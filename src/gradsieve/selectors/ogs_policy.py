"""PPO-Lagrangian with a permutation-equivariant policy (Eq. OGS-7).

PPO: Schulman et al. (2017), arXiv:1707.06347; its Lagrangian form: Ray, Achiam & Amodei (2019), "Benchmarking safe
exploration in deep reinforcement learning"; invalid actions masked as in Huang & Ontañón (2020), arXiv:2006.14171.

Rewards and costs are counted in the units of `ogs_simulator.observe`, so that λ, its rate and the learning rate mean the
same for every pool; `λ·reward_scale/ε` is λ in the units of Eq. OGS-6.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from gradsieve.selectors.ogs_simulator import (
    CLUSTER_FEATURES,
    OVERALL_FEATURES,
    Observation,
    Simulator,
    advance,
    begin,
    observe,
    outlook,
)

MULTIPLIERS = (1.0, 0.0, 0.25, 0.5, 0.7, 0.85, 1.2, 1.5, 2.0, 4.0)
"""After each round the policy is tried greedily at λ times these; the first moves λ."""


class ClusterNet(nn.Module):
    """One number per cluster, or one per episode, from sets of clusters (Zaheer et al. 2017, arXiv:1703.06114).

    Every cluster goes through the same layers; what the others hold enters through their mean only. So renaming clusters
    renames the output, and the same weights serve any number of clusters.
    """

    def __init__(self, hidden: int, rng: torch.Generator, gain: float) -> None:
        super().__init__()
        self.embed = _linear(CLUSTER_FEATURES + OVERALL_FEATURES, hidden, 2**0.5, rng)
        self.mix = _linear(2 * hidden, hidden, 2**0.5, rng)
        self.out = _linear(hidden, 1, gain, rng)

    def forward(self, seen: Observation) -> Tensor:
        """Returns float32 [E, K]."""
        overall = seen.overall[:, None].expand(-1, seen.clusters.shape[1], -1)
        h = torch.tanh(self.embed(torch.cat([seen.clusters, overall], dim=2)))
        context = _masked_mean(h, seen.mask)[:, None].expand_as(h)
        out: Tensor = self.out(torch.tanh(self.mix(torch.cat([h, context], dim=2))))[..., 0]
        return out


def _linear(inputs: int, outputs: int, gain: float, rng: torch.Generator) -> nn.Linear:
    layer: nn.Linear = nn.utils.skip_init(nn.Linear, inputs, outputs)  # its own start would draw from the global generator
    nn.init.orthogonal_(layer.weight, gain, generator=rng)
    nn.init.zeros_(layer.bias)
    return layer


def _masked_mean(values: Tensor, mask: Tensor) -> Tensor:
    """Returns the mean over clusters in the mask (0 where there are none): [E, …] from [E, K, …]."""
    weight = mask.to(values.dtype) / mask.sum(1, keepdim=True).clamp(min=1)
    return (weight.view(*weight.shape, *[1] * (values.ndim - 2)) * values).sum(1)


class Actor(nn.Module):
    """The policy: a logit per cluster; clusters that cannot be drawn from have none."""

    def __init__(self, hidden: int, rng: torch.Generator) -> None:
        super().__init__()
        self.net = ClusterNet(hidden, rng, gain=0.01)

    def forward(self, seen: Observation) -> Tensor:
        """Returns log-probabilities float32 [E, K], -inf where masked; over all clusters where an episode is over."""
        logits: Tensor = self.net(seen)
        return logits.masked_fill(~seen.mask & seen.mask.any(1, keepdim=True), -torch.inf).log_softmax(1)


class Critic(nn.Module):
    """Expected sum of what is still to come (of the reward, or of the cost)."""

    def __init__(self, hidden: int, rng: torch.Generator) -> None:
        super().__init__()
        self.net = ClusterNet(hidden, rng, gain=1.0)

    def forward(self, seen: Observation) -> Tensor:
        """Returns float32 [E]."""
        return _masked_mean(self.net(seen), seen.mask)


@dataclass(frozen=True)
class PPO:
    """How the policy is trained.

    Attributes:
        updates: Rounds of sampling and improving.
        episodes: Episodes sampled a round.
        learning_rate: Of Adam at the start; it falls linearly to 0.
        multiplier_rate: η of Eq. OGS-7, for costs counted in ε and rewards counted in `Simulator.reward_scale`.
        clip: Largest change of a probability's ratio that is rewarded.
        gae: λ of generalised advantage estimation; γ is 1.
        entropy: Weight of the policy's entropy.
        epochs: Passes over the sampled steps a round.
        minibatch: Steps of one gradient, about; a pass over fewer takes one gradient.
        hidden: Width of the layers.
        max_grad_norm: Longer gradients of actor and critics together are shortened to this.
    """

    updates: int = 40
    episodes: int = 16
    learning_rate: float = 1e-2
    multiplier_rate: float = 0.1
    clip: float = 0.2
    gae: float = 0.95
    entropy: float = 0.01
    epochs: int = 4
    minibatch: int = 256
    hidden: int = 32
    max_grad_norm: float = 0.5


@dataclass(frozen=True, eq=False)
class Run:
    """One greedy episode.

    Attributes:
        multiplier: λ as the policy saw it.
        clusters: In the order of drawing.
        rewards: Of each draw.
        costs: Of each draw.
    """

    multiplier: float
    clusters: tuple[int, ...]
    rewards: tuple[float, ...]
    costs: tuple[float, ...]

    @property
    def total(self) -> tuple[float, float]:
        """Reward and cost of the episode."""
        return sum(self.rewards), sum(self.costs)


@dataclass(frozen=True, eq=False)
class Trained:
    """A frozen policy.

    Attributes:
        actor: The policy after its best round.
        run: What it does greedily, with the λ it is frozen at.
        best: Number of that round.
        history: Per round: `lambda` (in the units of reward and cost), the mean `reward/sampled` and `cost/sampled`, and
            `reward/greedy` and `cost/greedy`.
    """

    actor: Actor
    run: Run
    best: int
    history: dict[str, list[float]]


def train(sim: Simulator, ppo: PPO, rng: torch.Generator) -> Trained:
    """Learns a policy for max J_r subject to J_c ≤ ε (Eq. OGS-7).

    λ starts at 0 and moves by plain SGD, λ ← max(0, λ + η(Ĵ_c - ε)). **[choice]** Ĵ_c is the cost of the greedy episode
    that follows each round, not the mean of the sampled ones: the policy emits greedily, and the greedy episode may break a
    bound that the sampled ones keep. Ĵ_c counts as 2ε at most, so that the first, untrained rounds do not throw λ far off.
    **[choice]** As λ is part of what the policy sees, each round also tries the policy greedily at the other `MULTIPLIERS`; the
    frozen policy is the best of all these: the largest reward within the bound, or the smallest cost if none keeps it.

    The result depends on simulator, settings and `rng` alone: it runs on one thread.
    """
    with _one_thread():
        actor = Actor(ppo.hidden, rng)
        critics = nn.ModuleList([Critic(ppo.hidden, rng), Critic(ppo.hidden, rng)])
        optimizer = torch.optim.Adam([*actor.parameters(), *critics.parameters()], lr=ppo.learning_rate, eps=1e-5)
        multiplier, unit = 0.0, sim.reward_scale / sim.epsilon
        history: dict[str, list[float]] = {
            k: [] for k in ("lambda", "reward/sampled", "cost/sampled", "reward/greedy", "cost/greedy")
        }
        best: Trained | None = None
        for update in range(ppo.updates):
            optimizer.param_groups[0]["lr"] = ppo.learning_rate * (1 - update / ppo.updates)
            batch = _collect(sim, actor, critics, ppo, multiplier, rng)
            _improve(actor, critics, optimizer, batch, ppo, multiplier, rng)
            runs = play(sim, actor, multiplier * torch.tensor(MULTIPLIERS, dtype=torch.float64))
            reward, cost = runs[0].total
            for name, value in zip(history, (multiplier * unit, *batch.means, reward, cost), strict=True):
                history[name].append(value)
            for run in runs:
                if best is None or standing(run.total, sim.epsilon) > standing(best.run.total, sim.epsilon):
                    best = Trained(copy.deepcopy(actor), run, update, history)
            multiplier = max(0.0, multiplier + ppo.multiplier_rate * min(cost / sim.epsilon - 1, 1.0))
        assert best is not None
        return best


def standing(outcome: tuple[float, float], epsilon: float) -> tuple[bool, float]:
    """Returns the place of a reward and a cost, the larger the better: within the bound by reward, beyond it by least cost."""
    reward, cost = outcome
    return (True, reward) if cost <= epsilon else (False, -cost)


def play(sim: Simulator, actor: Actor, multipliers: Tensor) -> list[Run]:
    """Returns one greedy episode per λ: always the most probable cluster, of equals the one with the smallest id.

    Args:
        sim: The world; any number of clusters.
        actor: The policy.
        multipliers: float64 [E], λ as the policy sees it.
    """
    state = begin(sim, len(multipliers))
    clusters, gains, alive = [], [], []
    with torch.no_grad():
        while True:
            ahead = outlook(sim, state)
            seen = observe(sim, state, ahead, multipliers)
            if not seen.mask.any():
                break
            action = actor(seen).argmax(1)
            state = advance(sim, state, action, ahead)
            clusters.append(action)
            gains.append(state.last)
            alive.append(seen.mask.any(1))
    C, G, A = torch.stack(clusters), torch.stack(gains), torch.stack(alive)
    return [
        Run(float(m), *(tuple(x[A[:, e]].tolist()) for x in (C[:, e], G[:, 0, e], G[:, 1, e])))
        for e, m in enumerate(multipliers)
    ]


@dataclass(frozen=True, eq=False)
class _Batch:
    """S steps of sampled episodes and what they led to.

    Attributes:
        seen: What the policy saw.
        action: int64 [S].
        log_prob: float32 [S], of the action when it was sampled.
        advantage: float32 [2, S], of reward and cost.
        target: float32 [2, S], what the critics should have said.
        means: Mean reward and cost of the episodes.
    """

    seen: Observation
    action: Tensor
    log_prob: Tensor
    advantage: Tensor
    target: Tensor
    means: tuple[float, float]


def _collect(sim: Simulator, actor: Actor, critics: nn.ModuleList, ppo: PPO, multiplier: float, rng: torch.Generator) -> _Batch:
    """Samples episodes and estimates advantages by GAE (Schulman et al. 2015, arXiv:1506.02438) with γ = 1.

    Episodes may differ in length. One that is over adds steps with reward, cost and values of exactly 0 until all are;
    these are dropped, and before that they give the last real step the right advantage: nothing comes after it.
    """
    state = begin(sim, ppo.episodes)
    views, actions, log_probs, values, gains = [], [], [], [], []
    with torch.no_grad():
        while True:
            ahead = outlook(sim, state)
            seen = observe(sim, state, ahead, torch.full_like(state.spent, multiplier))
            if not seen.mask.any():
                break
            log_p = actor(seen)
            noise = torch.rand(log_p.shape, generator=rng, dtype=torch.float64)
            action = (log_p - torch.log(-torch.log(noise))).argmax(1)  # Gumbel's way to sample from log_p
            state = advance(sim, state, action, ahead)
            views.append(seen)
            actions.append(action)
            log_probs.append(log_p.gather(1, action[:, None])[:, 0])
            values.append(torch.stack([critic(seen) for critic in critics]))
            gains.append((state.last / sim.units).float())
    advantage, later = torch.zeros_like(gains[-1]), torch.zeros_like(gains[-1])
    advantages = []
    for gain, value in zip(reversed(gains), reversed(values), strict=True):
        advantage = gain + later - value + ppo.gae * advantage
        later = value
        advantages.append(advantage)
    seen = Observation(*(torch.cat([getattr(v, name) for v in views]) for name in ("clusters", "overall", "mask")))
    alive = seen.mask.any(1)
    A, V = (torch.cat(x, dim=1)[:, alive] for x in (advantages[::-1], values))
    reward, cost = state.total.mean(1).tolist()
    return _Batch(seen.select(alive), torch.cat(actions)[alive], torch.cat(log_probs)[alive], A, A + V, (reward, cost))


def _improve(
    actor: Actor,
    critics: nn.ModuleList,
    optimizer: torch.optim.Optimizer,
    batch: _Batch,
    ppo: PPO,
    multiplier: float,
    rng: torch.Generator,
) -> None:
    """Takes PPO's clipped steps on the combined advantage (A_r - λA_c)/(1 + λ)."""
    advantage = (batch.advantage[0] - multiplier * batch.advantage[1]) / (1 + multiplier)
    advantage = (advantage - advantage.mean()) / (advantage.std(correction=0) + 1e-8)
    parts = max(1, round(len(advantage) / ppo.minibatch))
    for _ in range(ppo.epochs):
        for index in torch.randperm(len(advantage), generator=rng).tensor_split(parts):
            seen, A = batch.seen.select(index), advantage[index]
            log_p = actor(seen)
            ratio = (log_p.gather(1, batch.action[index, None])[:, 0] - batch.log_prob[index]).exp()
            gain = torch.minimum(ratio * A, ratio.clamp(1 - ppo.clip, 1 + ppo.clip) * A).mean()
            entropy = -(log_p.exp() * log_p.masked_fill(~seen.mask, 0.0)).sum(1).mean()
            values = torch.stack([critic(seen) for critic in critics])
            error = (values - batch.target[:, index]).square().mean(1).sum()
            optimizer.zero_grad()
            (-gain - ppo.entropy * entropy + 0.5 * error).backward()
            nn.utils.clip_grad_norm_(optimizer.param_groups[0]["params"], ppo.max_grad_norm)
            optimizer.step()


@contextmanager
def _one_thread() -> Iterator[None]:
    """Runs torch on one thread: these matrices are small, and a sum split over threads may round differently."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
