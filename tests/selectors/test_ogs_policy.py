"""The policy: what its form guarantees, its parts against naive twins, and that it learns what the optimum is.

Where the budget divides into whole draws, the total of an episode depends on how many draws each cluster gave, not on their
order: trying all such counts gives the true optimum.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor

from gradsieve.selectors import ogs_policy
from gradsieve.selectors.directions import Directions
from gradsieve.selectors.ogs_draws import arrange, threshold_scores
from gradsieve.selectors.ogs_policy import PPO, Actor, Critic, play, train
from gradsieve.selectors.ogs_simulator import (
    Observation,
    Simulator,
    Surface,
    advance,
    available,
    begin,
    observe,
    outlook,
    total,
)
from gradsieve.types import ArrayGradients

BATCH = 4


def normal(rng: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=rng, dtype=torch.float64)


def build(
    G: Tensor, labels: Tensor, targets: Tensor, anchors: Tensor, budget: int, epsilon: float, pace: float, bend: bool
) -> tuple[Simulator, Any]:
    """Returns a simulator of given clusters, and what it takes to evaluate any subset: surfaces, directions and scores.

    A row adds `pace` times its unit gradient. The cost is KL where there is curvature, else the anchor's loss.
    """
    parts = [ArrayGradients.from_matrix(H, references={"mean": H.mean(0)}) for H in (G, targets, anchors)]
    cosine = [(G @ H.mean(0)) / G.norm(dim=1) / H.mean(0).norm() for H in (targets, anchors)]
    directions, rows = Directions.of(parts[0]), torch.arange(len(G))
    surfaces = (
        Surface.loss(parts[1], cosine[0]).scaled(pace, pace**2 * bend),
        Surface.loss(parts[2], cosine[1]).scaled(pace * (not bend), pace**2 * bend),
    )
    slopes = surfaces[1].rate if not bend else torch.zeros(len(G), dtype=torch.float64)
    scores, _ = threshold_scores(cosine[0], slopes, epsilon, rows, lambda order: order[:budget])
    features = (1 - cosine[1].abs(), (-cosine[1]).clamp(min=0), cosine[0], torch.ones(len(G), dtype=torch.float64))
    order = scores.argsort(descending=True, stable=True)
    draws = arrange(labels, order, rows, torch.ones(len(G), dtype=torch.float64), features, BATCH, float(budget))
    return Simulator.of(draws, surfaces, directions, epsilon), (surfaces, directions, cosine[0], order[:budget])


def linear(seed: int, clusters: int = 5, budget: int = 120, n: int = 600) -> tuple[Simulator, Any]:
    """Useful rows conflict with the anchor: first-order reward and cost, bound half-way between the least and the greediest."""
    rng = torch.Generator().manual_seed(seed)
    topics, use = normal(rng, clusters, 12), torch.rand(clusters, generator=rng, dtype=torch.float64)
    labels = torch.randint(clusters, (n,), generator=rng)
    G = 0.3 * topics[labels] + 0.1 * normal(rng, n, 12)
    G[:, 0], G[:, 1] = use[labels] + 0.3 * normal(rng, n), -use[labels] - 0.3 * normal(rng, n).abs()
    targets, anchors = torch.eye(12, dtype=torch.float64)[[0]], torch.eye(12, dtype=torch.float64)[[1]]
    U = G / G.norm(dim=1, keepdim=True)
    greedy, least = -0.1 * U[U[:, 0].argsort(descending=True)[:budget], 1].sum(), -0.1 * U[U[:, 1].argsort()[-budget:], 1].sum()
    return build(G, labels, targets, anchors, budget, float(greedy + least) / 2, pace=0.1, bend=False)


def curved(seed: int, budget: int = 80, n: int = 400) -> tuple[Simulator, Any]:
    """Where a threshold on single rows must fail, by construction.

    Cluster 0 has the largest utility, but all in one direction, in which there is soon nothing more to learn. Cluster 1 is
    nearly as useful and, like 0, orthogonal to the anchor's mean (risk 0), but every row moves the anchor a little along
    one direction. Clusters 2 and 3 are less useful, each in a direction of its own, and harmless. Cluster 4 is harmless noise.
    """
    rng = torch.Generator().manual_seed(seed)
    e = torch.eye(12, dtype=torch.float64)
    weights = torch.tensor([1.0, 0.9, 0.7, 0.6], dtype=torch.float64)
    targets = weights[:, None] * e[:4]
    anchors = torch.stack([0.2 * e[5] + 0.6 * e[4], 0.2 * e[5] - 0.6 * e[4]])
    labels = torch.randint(5, (n,), generator=rng)
    centres = torch.stack([e[0], e[1] + 0.5 * e[4], e[2], e[3], e[8]])
    G = centres[labels] + 0.05 * normal(rng, n, 12) * (torch.arange(12) > 5)
    return build(G, labels, targets, anchors, budget, epsilon=0.005, pace=0.02, bend=True)


def every_count(sim: Simulator) -> Iterator[tuple[int, ...]]:
    steps = round(sim.draws.budget) // BATCH
    limits = [int((row == BATCH).sum()) for row in sim.draws.size]
    for counts in product(*(range(min(limit, steps) + 1) for limit in limits[:-1])):
        if 0 <= steps - sum(counts) <= limits[-1]:
            yield (*counts, steps - sum(counts))


def optimum(sim: Simulator) -> float:
    """The largest reward of any counts of draws that keep the bound: brute force over all of them."""
    counts = torch.tensor(list(every_count(sim)))
    first, at, away = torch.zeros(2, len(counts)).double(), 0.0, 0.0
    for c in range(counts.shape[1]):
        zero = torch.zeros(1, dtype=torch.float64)
        first += torch.stack([torch.cat([zero, rates[c].cumsum(0)])[counts[:, c]] for rates in sim.rates])
        at, away = (
            so_far + torch.cat([torch.zeros(1, t.shape[2]).double(), t[c].cumsum(0)])[counts[:, c]]
            for so_far, t in ((at, sim.domain), (away, sim.anchor))
        )
    reward, cost = first[0] - 0.5 * at.square().sum(1), first[1] + 0.5 * away.square().sum(1)
    return float(reward[cost <= sim.epsilon].max())


@pytest.fixture
def hard() -> tuple[Simulator, Any]:
    return curved(0)


def some_views(sim: Simulator, episodes: int = 6, steps: int = 4) -> Observation:
    rng, state = torch.Generator().manual_seed(3), begin(sim, episodes)
    for _ in range(steps):
        action = torch.multinomial(available(sim, state).double(), 1, generator=rng)[:, 0]
        state = advance(sim, state, action, outlook(sim, state))
    return observe(sim, state, outlook(sim, state), torch.full((episodes,), 0.4))


def test_renaming_clusters_renames_the_probabilities_and_leaves_the_values(hard):
    rng = torch.Generator().manual_seed(0)
    actor, critic, seen = Actor(16, rng), Critic(16, rng), some_views(hard[0])
    seen.mask[0, 2] = False
    p = torch.tensor([3, 0, 4, 1, 2])
    renamed = Observation(seen.clusters[:, p], seen.overall, seen.mask[:, p])
    assert torch.allclose(actor(renamed), actor(seen)[:, p], atol=1e-6)
    assert torch.allclose(critic(renamed), critic(seen), atol=1e-6)
    assert actor(seen)[0, 2] == -torch.inf
    assert torch.allclose(actor(seen).exp().sum(1), torch.ones(6))


def renamed(sim: Simulator, p: Tensor) -> Simulator:
    """The same world, whose cluster i was cluster p[i]."""
    draws = sim.draws
    J = draws.size.shape[1]
    place = p.argsort()
    index = torch.where(draws.index >= 0, place[draws.index // J] * J + draws.index % J, draws.index)
    rows = tuple(draws.rows[c] for c in p.tolist())
    draws = replace(draws, rows=rows, index=index, size=draws.size[p], price=draws.price[p], left=draws.left[p])
    return replace(sim, draws=draws, rates=sim.rates[:, p], domain=sim.domain[p], anchor=sim.anchor[p])


@pytest.mark.parametrize("world", [linear, curved])
def test_renaming_clusters_does_not_change_what_a_trained_policy_chooses(world):
    sim, p = world(0)[0], torch.tensor([3, 0, 4, 1, 2])
    trained = train(sim, PPO(updates=5), torch.Generator().manual_seed(0))
    (again,) = play(renamed(sim, p), trained.actor, torch.tensor([trained.run.multiplier]).double())
    assert len(set(trained.run.clusters)) > 1
    assert tuple(p[list(again.clusters)].tolist()) == trained.run.clusters
    assert again.total == pytest.approx(trained.run.total)


def test_labels_of_clusters_carry_no_information_through_training():
    rng = torch.Generator().manual_seed(0)
    G, labels = normal(rng, 90, 12), torch.randint(4, (90,), generator=rng)
    targets, anchors = normal(rng, 3, 12), normal(rng, 3, 12)
    names = torch.tensor([17, 2, 9, 5])
    runs = []
    for own in (labels, names[labels]):
        sim, _ = build(G, own, targets, anchors, 24, epsilon=1.0, pace=0.05, bend=True)
        run = train(sim, PPO(updates=2), torch.Generator().manual_seed(0)).run
        supply = [iter(rows.split(BATCH)) for rows in sim.draws.rows]
        runs.append(torch.cat([next(supply[c]) for c in run.clusters]).tolist())
    assert runs[0] == runs[1]


def test_a_cluster_that_cannot_be_drawn_from_does_not_matter(hard):
    rng = torch.Generator().manual_seed(0)
    actor, critic, seen = Actor(16, rng), Critic(16, rng), some_views(hard[0])
    seen.mask[:, 1] = False
    changed = Observation(seen.clusters.clone(), seen.overall, seen.mask)
    changed.clusters[:, 1] = 0.9
    assert torch.equal(actor(changed), actor(seen))
    assert torch.equal(critic(changed), critic(seen))


def test_sampling_follows_the_policy():
    sim, _ = linear(0)
    actor = Actor(16, torch.Generator().manual_seed(0))
    actor.net.out.weight.data *= 1000
    rng = torch.Generator().manual_seed(1)
    critics = torch.nn.ModuleList([Critic(16, rng), Critic(16, rng)])
    batch = ogs_policy._collect(sim, actor, critics, PPO(episodes=4000), 0.0, rng)
    first = batch.action[:4000].bincount(minlength=5) / 4000
    state = begin(sim, 1)
    expected = actor(observe(sim, state, outlook(sim, state), torch.zeros(1))).exp()[0].detach()
    assert expected.max() > 0.3
    assert torch.allclose(first, expected, atol=0.03)


def gae_naive(gains: list[float], values: list[float], decay: float) -> list[float]:
    """Σ_l decay^l (gain_{t+l} + V_{t+l+1} - V_{t+l}), with V = 0 after the end (Schulman et al. 2015, eq. 16, γ = 1)."""
    deltas = [g + later - v for g, v, later in zip(gains, values, [*values[1:], 0.0], strict=True)]
    return [sum(decay**j * d for j, d in enumerate(deltas[t:])) for t in range(len(deltas))]


def test_advantages_are_gae_also_for_episodes_of_different_length():
    sim, _ = linear(1, n=131)  # clusters end in parts of a batch, so that episodes take different numbers of steps
    rng = torch.Generator().manual_seed(0)
    actor, critics = Actor(8, rng), torch.nn.ModuleList([Critic(8, rng), Critic(8, rng)])
    batch = ogs_policy._collect(sim, actor, critics, PPO(episodes=5), 0.0, torch.Generator().manual_seed(4))
    noise = torch.Generator().manual_seed(4)
    state, trails = begin(sim, 5), [[] for _ in range(5)]
    while (mask := available(sim, state)).any():
        seen = observe(sim, state, outlook(sim, state), torch.zeros(5))
        gumbel = -torch.log(-torch.log(torch.rand(mask.shape, generator=noise, dtype=torch.float64)))
        action = (actor(seen) + gumbel).argmax(1)
        state = advance(sim, state, action, outlook(sim, state))
        gain = state.last / torch.tensor([[sim.reward_scale], [sim.epsilon]])
        values = [critic(seen).tolist() for critic in critics]
        for e in mask.any(1).nonzero().flatten().tolist():
            trails[e].append((float(gain[0, e]), float(gain[1, e]), values[0][e], values[1][e]))
    lengths = [len(trail) for trail in trails]
    assert len(set(lengths)) > 1
    for which in (0, 1):
        expected = [gae_naive([s[which] for s in t], [s[2 + which] for s in t], 0.95) for t in trails]
        in_time = [expected[e][t] for t in range(max(lengths)) for e in range(5) if t < lengths[e]]
        assert torch.allclose(batch.advantage[which], torch.tensor(in_time), atol=1e-5)
    assert batch.means == pytest.approx(state.total.mean(1).tolist())


def ratios_after_improving(sim: Simulator, multiplier: float, clip: float) -> list[float]:
    """Returns how much more probable actions 2, 3 and others became where 2 earns reward and 3 causes cost."""
    rng = torch.Generator().manual_seed(0)
    actor, critics = Actor(16, rng), torch.nn.ModuleList([Critic(16, rng), Critic(16, rng)])
    ppo = PPO(episodes=16, epochs=30, minibatch=10**6, entropy=0.0, clip=clip)
    batch = ogs_policy._collect(sim, actor, critics, ppo, multiplier, rng)
    batch.advantage[:] = torch.stack([(batch.action == 2).float(), (batch.action == 3).float()])
    before = actor(batch.seen).gather(1, batch.action[:, None])[:, 0].detach()
    optimizer = torch.optim.Adam([*actor.parameters(), *critics.parameters()], lr=1e-2)
    ogs_policy._improve(actor, critics, optimizer, batch, ppo, multiplier, rng)
    ratio = (actor(batch.seen).gather(1, batch.action[:, None])[:, 0].detach() - before).exp()
    return [float(ratio[where].mean()) for where in (batch.action == 2, batch.action == 3, (batch.action - 2.5).abs() > 1)]


def test_an_update_follows_the_combined_advantage(hard):
    two, three, others = ratios_after_improving(hard[0], multiplier=0.0, clip=0.2)
    assert two > 1.2
    assert max(three, others) < 1
    assert three > 0.9 * others  # at λ = 0 the cost does not matter …
    two, three, others = ratios_after_improving(hard[0], multiplier=1.0, clip=0.2)
    assert two > 1.2 * others > 1.2**2 * three  # … at λ = 1 it does


def test_an_update_is_clipped(hard):
    clipped, free = (ratios_after_improving(hard[0], 0.0, clip)[0] for clip in (0.05, 10.0))
    assert 1.05 < clipped < 0.8 * free


@pytest.mark.parametrize("seed", range(2))  # ten: benchmarks/ogs.py
def test_on_a_linear_world_it_reaches_the_threshold_optimum_within_the_bound(seed):
    sim, (surfaces, directions, _, best) = linear(seed)
    rule = total(surfaces, directions, best)  # Eq. OGS-8 in this world: optimal up to one row
    greedy = float(-surfaces[0].rate.sort().values[:120].sum())
    trained = train(sim, PPO(updates=20), torch.Generator().manual_seed(seed))
    reward, cost = trained.run.total
    assert rule[1] == pytest.approx(sim.epsilon, rel=0.05)  # the bound binds …
    assert rule[0] < 0.97 * greedy  # … and costs reward
    assert reward >= 0.97 * rule[0]
    assert 0.9 * sim.epsilon <= cost <= sim.epsilon
    assert max(trained.history["lambda"]) > 0


@pytest.mark.parametrize("seed", range(2))
def test_where_gains_saturate_and_conflicts_add_up_it_beats_every_threshold_and_comes_near_the_optimum(seed):
    sim, (surfaces, directions, utility, _) = curved(seed)
    trained = train(sim, PPO(updates=20), torch.Generator().manual_seed(seed))
    reward, cost = trained.run.total
    assert cost <= sim.epsilon
    assert reward >= 0.95 * optimum(sim)
    assert (surfaces[1].cosine.abs() < 0.02).all()  # risk is zero but for noise, so that λ changes nothing but noise
    for penalty in (0.0, 1.0, 10.0):
        by_score = (utility - penalty * (-surfaces[1].cosine).clamp(min=0)).argsort(descending=True)[:80]
        rule_reward, rule_cost = total(surfaces, directions, by_score)
        assert reward > 1.05 * rule_reward or rule_cost > sim.epsilon
    assert total(surfaces, directions, utility.argsort(descending=True)[:80])[0] < 0.9 * reward


def test_a_policy_trained_on_five_clusters_runs_on_three_and_nine():
    trained = train(linear(0)[0], PPO(updates=20), torch.Generator().manual_seed(0))
    untrained = Actor(PPO.hidden, torch.Generator().manual_seed(0))
    for clusters in (3, 9):
        sim, (surfaces, directions, _, best) = linear(7, clusters=clusters)
        free = replace(sim, epsilon=1e9)
        gain = play(free, trained.actor, torch.zeros(1))[0].total[0]
        assert gain > 0.9 * total(surfaces, directions, best)[0]
        assert gain > play(free, untrained, torch.zeros(1))[0].total[0]


@pytest.mark.parametrize("tightness", [1.0, 3.0])
def test_the_multiplier_follows_the_greedy_cost_by_plain_sgd(tightness):
    sim, _ = linear(0)
    sim = replace(sim, epsilon=sim.epsilon / tightness)
    rate = 0.3
    trained = train(sim, PPO(updates=6, multiplier_rate=rate), torch.Generator().manual_seed(0))
    unit = sim.reward_scale / sim.epsilon
    expected = 0.0
    for value, cost in zip(trained.history["lambda"], trained.history["cost/greedy"], strict=True):
        assert value == pytest.approx(expected * unit)
        expected = max(0.0, expected + rate * min(cost / sim.epsilon - 1, 1.0))
    assert expected > 0
    assert (max(trained.history["cost/greedy"]) > 2 * sim.epsilon) == (tightness > 1)  # where it counts as 2 ε


def test_the_frozen_policy_is_that_of_the_best_round_and_can_be_run_again():
    sim, _ = linear(2)
    trained = train(sim, PPO(updates=10), torch.Generator().manual_seed(0))
    rounds = zip(trained.history["reward/greedy"], trained.history["cost/greedy"], strict=True)
    assert trained.run.total[0] >= max((reward for reward, cost in rounds if cost <= sim.epsilon), default=0)
    assert trained.run.total[1] <= sim.epsilon
    (again,) = play(sim, trained.actor, torch.tensor([trained.run.multiplier]).double())
    assert again.clusters == trained.run.clusters
    assert again.total == pytest.approx(trained.run.total)
    assert len({len(values) for values in trained.history.values()}) == 1
    impossible = train(replace(sim, epsilon=1e-4), PPO(updates=3), torch.Generator().manual_seed(0))
    assert sim.epsilon > impossible.run.total[1] > 1e-4
    assert impossible.run.total[1] <= min(impossible.history["cost/greedy"])


def test_training_depends_on_its_generator_alone_and_leaves_the_rest_as_it_was():
    sim, _ = linear(0)
    torch.manual_seed(1)
    torch.set_num_threads(2)
    a = train(sim, PPO(updates=3), torch.Generator().manual_seed(5))
    assert torch.get_num_threads() == 2
    torch.set_num_threads(1)
    state = torch.get_rng_state()
    b = train(sim, PPO(updates=3), torch.Generator().manual_seed(5))
    assert torch.equal(torch.get_rng_state(), state)
    assert a.history == b.history
    assert a.run.clusters == b.run.clusters
    assert all(torch.equal(p, q) for p, q in zip(a.actor.parameters(), b.actor.parameters(), strict=True))
    assert a.history != train(sim, PPO(updates=3), torch.Generator().manual_seed(6)).history
