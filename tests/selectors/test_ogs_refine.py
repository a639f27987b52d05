"""Refinement on a live world whose truth is known: losses that are exactly the simulated ones with other factors."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from gymnasium.utils.env_checker import check_env
from torch import Tensor

from gradsieve.errors import InvalidArgument
from gradsieve.selectors import ogs as module
from gradsieve.selectors.ogs import OGS
from gradsieve.selectors.ogs_account import navigator_notes
from gradsieve.selectors.ogs_environment import OGSEnvironment
from gradsieve.selectors.ogs_refine import Episode, Scales, drive, fit, parts, scaled
from gradsieve.selectors.ogs_simulator import advance, begin, outlook, total
from gradsieve.types import ArrayGradients, Budget, Cost, Problem

QUICK: dict[str, Any] = {"clusters": 4, "updates": 6, "episodes": 6, "batch": 3, "fidelity": "navigator", "measurements": 4}


class World:
    """L(δ) = L(0) - α <ḡ, δ> + ½ β δᵀFδ on whole sets of rows, with factors of its own and no tables of draws."""

    def __init__(self, ogs: OGS, problem: Problem, budget: Budget, truth: Scales) -> None:
        world = module._world(replace(ogs, fidelity="quadratic"), problem, budget, torch.Generator().manual_seed(0))
        domain, anchor = world.surfaces
        self.surfaces = domain.scaled(truth.gain, truth.saturation), anchor.scaled(truth.rise, truth.harm)
        self.directions, self.simulator = world.directions, world.simulator
        self.rows: list[Tensor] = []
        self.resets = 0
        self.asked: list[Cost] = []

    def reset(self) -> None:
        self.rows, self.resets = [], self.resets + 1

    def step(self, rows: Tensor) -> None:
        self.rows.append(rows)

    def losses(self, cost: Cost) -> tuple[float, float]:
        self.asked.append(cost)
        reward, harm = total(self.surfaces, self.directions, torch.cat(self.rows)) if self.rows else (0.0, 0.0)
        return 2.0 * (1 - reward), harm if cost == "kl" else 3.0 * (1 + harm)


def run(problem: Problem, truth: Scales, budget: str = "24", **settings: Any) -> tuple[Any, World]:
    method = OGS(**QUICK | settings)
    world = World(method, problem, Budget.parse(budget), truth)
    problem = replace(problem, navigator=world)
    return method.select(problem, Budget.parse(budget), torch.Generator().manual_seed(0)), world


def test_parts_add_up_to_what_the_simulator_says_step_by_step(make_problem):
    method = OGS(clusters=4, batch=3, constraint="loss")
    sim = module._world(method, make_problem(80), Budget.parse("24"), torch.Generator().manual_seed(0)).simulator
    clusters, state, sums = [0, 1, 1, 3, 0], begin(sim, 1), []
    for cluster in clusters:
        state = advance(sim, state, torch.tensor([cluster]), outlook(sim, state))
        sums.append(state.total[:, 0])
    P = parts(sim, clusters)
    assert torch.allclose(torch.stack([P[:, 0] - P[:, 1], P[:, 2] + P[:, 3]], dim=1), torch.stack(sums))
    assert torch.allclose(P[1, 0], sim.rates[0, 0, 0] + sim.rates[0, 1, 0])
    assert torch.allclose(P[0, 3], 0.5 * sim.anchor[0, 0].square().sum())
    factors = Scales(2.0, 3.0, 0.5, 0.25)
    expected = P * torch.tensor([2.0, 3.0, 0.5, 0.25], dtype=torch.float64)
    assert torch.allclose(parts(scaled(sim, factors), clusters), expected)


@pytest.mark.parametrize("truth", [Scales(0.5, 2.0, 1.5, 0.25), Scales(1.0, 0.0, 0.0, 4.0)])
def test_the_factors_are_recovered_from_what_is_measured(truth, make_problem):
    selection, world = run(make_problem(90), truth, constraint="loss")
    for name in ("gain", "saturation", "rise", "harm"):
        assert selection.trace["scales"][name] == pytest.approx(getattr(truth, name), rel=1e-3, abs=1e-6)
    lines = selection.trace["navigator"]
    assert lines["reward/simulated, scaled"] == pytest.approx(lines["reward/measured"], abs=1e-6)
    assert lines["cost/simulated, scaled"] == pytest.approx(lines["cost/measured"], abs=1e-6)
    assert lines["reward/simulated, as made"] != pytest.approx(lines["reward/measured"], rel=1e-2)
    assert set(world.asked) == {"loss"}
    assert world.resets == 4  # two rounds, the threshold rule, a random draw
    measured, simulated = selection.trace["measured"], selection.trace["simulated"]
    for name in ("ogs", "threshold"):
        assert measured[name] == pytest.approx(simulated[name], abs=1e-6)


def test_kl_is_an_absolute_cost_with_one_factor(make_problem):
    selection, world = run(make_problem(90), Scales(1.0, 1.0, 1.0, 0.3), constraint="kl")
    assert selection.trace["scales"]["harm"] == pytest.approx(0.3, rel=1e-6)
    assert selection.trace["scales"]["rise"] == 1  # the simulated KL has no first-order part
    assert set(world.asked) == {"kl"}


def test_a_policy_that_broke_the_real_bound_is_trained_again_until_it_keeps_it(make_problem):
    problem = make_problem(120)
    made = OGS(**QUICK | {"fidelity": "quadratic", "updates": 20}).select(
        replace(problem), Budget.parse("24"), torch.Generator().manual_seed(0)
    )
    epsilon = 1.5 * made.trace["simulated"]["ogs"]["cost"]  # does not bind …
    selection, _ = run(problem, Scales(harm=2.0), epsilon=epsilon, updates=20)  # … until the true KL is seen
    rounds = list(selection.trace["navigator_rounds"].values())
    assert rounds[0]["cost, measured"] > epsilon
    assert rounds[1]["cost, measured"] <= epsilon
    assert selection.trace["measured"]["ogs"]["cost"] == pytest.approx(rounds[1]["cost, measured"])
    assert not any("bound not met on the Navigator" in note for note in selection.notes)
    one, _ = run(problem, Scales(harm=2.0), epsilon=epsilon, updates=20, rounds=1)
    assert any("bound not met on the Navigator" in note for note in one.notes)


def test_a_world_without_gain_is_named_and_ends_the_rounds(make_problem):
    selection, world = run(make_problem(60), Scales(gain=-1.0), rounds=3)
    assert selection.trace["scales"]["gain"] == 0
    assert world.resets == 3  # one round, then the two comparisons
    assert any("nothing that the simulator took for a gain was one" in note for note in selection.notes)


def test_the_rows_on_the_navigator_are_those_that_are_chosen(make_problem):
    problem = make_problem(90)
    tokens = problem.candidates.columns["tokens"]
    selection, _ = run(problem, Scales(), budget="900tok", rounds=1)
    played: list[Tensor] = []
    again = World(OGS(**QUICK), problem, Budget.parse("900tok"), Scales())
    again.step = played.append  # type: ignore[method-assign]
    OGS(**QUICK | {"rounds": 1}).select(
        replace(problem, navigator=again), Budget.parse("900tok"), torch.Generator().manual_seed(0)
    )
    first = torch.cat(played)[: len(selection.rows)]
    assert first.tolist() == selection.rows.tolist()
    assert tokens[selection.rows].sum() <= 900


def test_an_episode_is_measured_at_even_places_and_always_at_its_end():
    class Countdown:
        left = 10.0

        def reset(self) -> None:
            self.left = 10.0

        def step(self, rows: Tensor) -> None:
            self.left -= len(rows)

        def losses(self, cost: Cost) -> tuple[float, float]:
            return self.left, 20 - self.left

    batches = [torch.zeros(size, dtype=torch.int64) for size in (1, 1, 2, 1, 1, 1, 2)]
    episode = drive(Countdown(), batches, "loss", 3)
    assert episode.at == (2, 5, 7)
    assert episode.reward == pytest.approx((0.2, 0.6, 0.9))
    assert episode.cost == pytest.approx((0.2, 0.6, 0.9))
    end = drive(Countdown(), batches, "kl", 1)
    assert (end.at, end.reward, end.cost) == ((7,), (0.9,), (9.0,))
    assert drive(Countdown(), batches, "kl", 99).at == (1, 2, 3, 4, 5, 6, 7)

    class Flat(Countdown):
        def losses(self, cost: Cost) -> tuple[float, float]:
            return 0.0, 1.0

    with pytest.raises(InvalidArgument, match="losses must be above 0 at the start, got 0 "):
        drive(Flat(), batches, "kl", 1)
    with pytest.raises(InvalidArgument, match="an episode on the Navigator must have a step, got none"):
        drive(Countdown(), [], "kl", 1)


def test_factors_are_never_negative():
    table = torch.tensor([[1.0, 0.5, 0.0, 0.2], [2.0, 2.0, 0.0, 0.8]], dtype=torch.float64)
    scales = fit([(table, Episode((1, 2), (0.8, 2.9), (-0.1, -0.3)))])
    assert scales.saturation == 0
    assert scales.gain == pytest.approx((0.8 + 2 * 2.9) / 5)
    assert scales.harm == 0
    assert scales.rise == 1


def test_what_beat_the_policy_on_the_navigator_is_named():
    measured = {"ogs": (1.0, 0.5), "threshold": (1.1, 0.5), "random": (0.5, 0.1)}
    (note,) = navigator_notes("kl", 1.0, measured, 1.0)
    assert "did not beat threshold" in note
    assert navigator_notes("kl", 1.0, measured | {"threshold": (1.1, 1.5)}, 1.0) == []


def test_what_cannot_be_measured_is_refused():
    with pytest.raises(InvalidArgument, match="which measures no risk"):
        OGS(fidelity="navigator", constraint="risk")
    with pytest.raises(InvalidArgument, match="got key; use navigator"):
        OGS(constraint="key")
    for name in ("rounds", "measurements"):
        with pytest.raises(InvalidArgument, match=f"{name} must be at least 1"):
            OGS(**{name: 0})


def test_without_a_live_model_it_says_so(make_problem):
    problem = make_problem(40)
    with pytest.raises(InvalidArgument, match="ogs needs a live model"):
        OGS(fidelity="navigator").select(problem, Budget.parse("6"), torch.Generator())
    assert isinstance(problem.candidates, ArrayGradients)


def live_environment(problem: Problem, truth: Scales, budget: str, **settings: Any) -> tuple[OGSEnvironment, World]:
    method = OGS(**QUICK | {"constraint": "loss"} | settings)
    world = World(method, problem, Budget.parse(budget), truth)
    rng = torch.Generator().manual_seed(0)
    return method.environment(replace(problem, navigator=world), Budget.parse(budget), rng), world


def test_the_environment_on_a_navigator_gives_what_is_measured_and_gymnasium_accepts_it(make_problem):
    truth = Scales(0.5, 2.0, 1.5, 0.25)
    env, world = live_environment(make_problem(90), truth, "23", batch=4)
    check_env(env, skip_render_check=True)
    (_, info), clusters, gains = env.reset(), [], []
    assert world.rows == []
    while info["action_mask"].any():
        clusters.append(int(np.flatnonzero(info["action_mask"])[len(clusters) % info["action_mask"].sum()]))
        seen, reward, _, _, info = env.step(np.int64(clusters[-1]))
        assert env.observation_space.contains(seen)
        gains.append((reward, info["cost"]))
    drawn = torch.cat(world.rows)
    assert len(drawn) == len(drawn.unique()) == 23  # the last draw is cut where the budget ends
    assert [len(rows) for rows in world.rows] == [4, 4, 4, 4, 4, 3]
    supply = {c: iter(env.simulator.draws.rows[c].split(4)) for c in range(4)}
    assert drawn.tolist() == torch.cat([next(supply[c]) for c in clusters])[:23].tolist()
    assert np.sum(gains, axis=0) == pytest.approx(total(world.surfaces, world.directions, drawn))
    first = total(world.surfaces, world.directions, world.rows[0])
    assert gains[0] == pytest.approx(first)
    simulated = outlook(env.simulator, begin(env.simulator, 1))[:, 0, clusters[0]].tolist()
    assert gains[0] != pytest.approx(simulated, rel=0.05)
    assert seen["overall"][0] == pytest.approx(bounded(sum(reward for reward, _ in gains) / env.simulator.reward_scale))
    seen, _ = env.reset()
    assert seen["overall"][0] == 0
    assert world.rows == []


def bounded(x: float) -> float:
    return x / (1 + abs(x))


def test_a_draw_that_nothing_is_left_for_takes_no_step(make_problem):
    problem = make_problem(40)
    problem.candidates.columns["tokens"] = torch.full((40,), 100.0, dtype=torch.float64)
    env, world = live_environment(problem, Scales(), "250tok", batch=1)
    env.reset()
    costs = []
    for cluster in (0, 0, 1):
        _, reward, over, _, info = env.step(np.int64(cluster))
        costs.append((reward, info["cost"]))
    assert over
    assert len(world.rows) == 2
    assert costs[2] == (0, 0) != costs[1]


def test_the_environment_on_a_navigator_must_be_begun_and_have_one(make_problem):
    env, _ = live_environment(make_problem(40), Scales(), "8")
    with pytest.raises(InvalidArgument, match="must be reset before its first step"):
        env.step(np.int64(0))
    with pytest.raises(InvalidArgument, match="ogs needs a live model"):
        OGS(fidelity="navigator").environment(make_problem(40), Budget.parse("6"), torch.Generator())
