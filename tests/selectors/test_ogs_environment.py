"""The gymnasium form of the simulator: gymnasium's own checker, masks, and another library's agent."""

from __future__ import annotations

import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch
from gymnasium.utils.env_checker import check_env

from gradsieve.errors import InvalidArgument
from gradsieve.selectors.ogs import OGS
from gradsieve.selectors.ogs_environment import OGSEnvironment
from gradsieve.selectors.ogs_policy import PPO, train
from gradsieve.selectors.ogs_simulator import advance, begin, outlook
from gradsieve.types import Budget


def environment(make_problem, **settings) -> OGSEnvironment:
    method = OGS(**{"clusters": 5, "batch": 3} | settings)
    return method.environment(make_problem(120, d=24, m=12), Budget(examples=48), torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    "settings", [{}, {"fidelity": "linear", "constraint": "loss"}, {"constraint": "risk", "against": "both", "epsilon": 0.01}]
)
def test_gymnasium_accepts_it(settings, make_problem):
    check_env(environment(make_problem, **settings), skip_render_check=True)


def test_it_plays_what_the_simulator_plays(make_problem):
    env = environment(make_problem)
    seen, info = env.reset(seed=3)
    assert env.observation_space.contains(seen)
    assert info["action_mask"].all()
    state, rng, over, gains = begin(env.simulator, 1), np.random.default_rng(0), False, []
    while not over:
        action = rng.choice(np.flatnonzero(env.action_masks()))
        seen, reward, over, cut, info = env.step(action)
        ahead = outlook(env.simulator, state)
        state = advance(env.simulator, state, torch.tensor([action]), ahead)
        assert (reward, info["cost"]) == tuple(state.last[:, 0].tolist())
        assert env.observation_space.contains(seen)
        assert not cut
        gains.append((reward, info["cost"]))
    assert not info["action_mask"].any()
    assert np.sum(gains, axis=0) == pytest.approx(state.total[:, 0].tolist())
    with pytest.raises(InvalidArgument, match="action must be a cluster that has rows left"):
        env.step(action)
    first, _ = env.reset()
    assert first["overall"][5] == 0


def test_an_exhausted_cluster_is_masked_and_refused(make_problem):
    env = environment(make_problem)
    env.reset()
    smallest = min(range(5), key=lambda c: len(env.simulator.draws.rows[c]))
    while env.action_masks()[smallest]:
        env.step(np.int64(smallest))
    assert env.action_masks().sum() == 4
    with pytest.raises(InvalidArgument, match=f"got {smallest}"):
        env.step(np.int64(smallest))


def test_without_a_bound_it_does_not_fall_behind_maskable_ppo_at_equal_steps(make_problem):
    sb3 = pytest.importorskip("sb3_contrib")
    env = environment(make_problem)
    free = OGSEnvironment(replace(env.simulator, epsilon=1e9))
    updates, episodes, steps = 8, 8, 17
    trained = train(free.simulator, PPO(updates=updates, episodes=episodes), torch.Generator().manual_seed(0))
    assert not any(trained.history["lambda"])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # sb3's and its dependencies' own
        agent = sb3.MaskablePPO(
            "MultiInputPolicy", free, n_steps=episodes * steps, batch_size=68, gamma=1.0, ent_coef=0.01, seed=0, device="cpu"
        )
        agent.learn(updates * episodes * steps)
    seen, _ = free.reset()
    reward, over = 0.0, False
    while not over:
        action, _ = agent.predict(seen, action_masks=free.action_masks(), deterministic=True)
        seen, gain, over, _, _ = free.step(action)
        reward += gain
    assert trained.run.total[0] >= 0.99 * reward
