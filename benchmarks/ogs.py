"""What the OGS policy reaches and costs: `python benchmarks/ogs.py [learning] [agents] [speed]` (all three without arguments).

learning    worlds whose optimum is known (those of tests/selectors/test_ogs_policy.py), ten seeds each:
            linear: the threshold rule of Eq. OGS-8 is optimal; curved: brute force over all counts of draws is
agents      the linear worlds without a bound, against sb3-contrib's MaskablePPO at equal steps (needs sb3-contrib)
speed       steps of the quadratic simulator at K = 16, d = 1024, and a whole selection from 100,000 x 1024
"""

from __future__ import annotations

import runpy
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from gradsieve.selectors.ogs import OGS
from gradsieve.selectors.ogs_environment import OGSEnvironment
from gradsieve.selectors.ogs_policy import PPO, train
from gradsieve.selectors.ogs_simulator import Simulator, advance, available, begin, observe, outlook, total
from gradsieve.types import ArrayGradients, Budget, Problem

SEEDS = range(10)


def worlds() -> dict[str, Any]:
    return runpy.run_path(str(Path(__file__).parents[1] / "tests" / "selectors" / "test_ogs_policy.py"))


def learning() -> None:
    made = worlds()
    for kind in ("linear", "curved"):
        print(f"{kind}: seed, reward / optimum, cost / bound, utility top-k's reward / optimum, its cost / bound, CPU s")
        for seed in SEEDS:
            sim, (surfaces, directions, utility, rule) = made[kind](seed)
            best = made["optimum"](sim) if kind == "curved" else total(surfaces, directions, rule)[0]
            start = time.process_time()
            reward, cost = train(sim, PPO(), torch.Generator().manual_seed(seed)).run.total
            spent = time.process_time() - start
            top = utility.argsort(descending=True)[: int(sim.draws.budget)]
            gain, harm = total(surfaces, directions, top)
            policy, top_k = f"{reward / best:.4f}  {cost / sim.epsilon:.3f}", f"{gain / best:.3f}  {harm / sim.epsilon:.2f}"
            print(f"  {seed}  {policy}   {top_k}   {spent:.1f}")


def agents() -> None:
    import sb3_contrib

    made = worlds()
    print("seed, this PPO's reward / MaskablePPO's, at 9,600 steps each, λ = 0")
    for seed in SEEDS:
        env = OGSEnvironment(replace(made["linear"](seed)[0], epsilon=1e9))
        ours = train(env.simulator, PPO(updates=20), torch.Generator().manual_seed(seed)).run.total[0]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            agent = sb3_contrib.MaskablePPO(
                "MultiInputPolicy", env, n_steps=480, batch_size=240, gamma=1.0, ent_coef=0.01, seed=seed, device="cpu"
            )
            agent.learn(9600)
        seen, _ = env.reset()
        theirs, over = 0.0, False
        while not over:
            action, _ = agent.predict(seen, action_masks=env.action_masks(), deterministic=True)
            seen, reward, over, _, _ = env.step(np.int64(action))
            theirs += reward
        print(f"  {seed}  {ours / theirs:.4f}")


def big(n: int, d: int = 1024, m: int = 300) -> Problem:
    rng = torch.Generator().manual_seed(0)
    topics, shared = torch.randn(16, d, generator=rng), torch.randn(d, generator=rng)

    def rows(count: int, strength: float) -> torch.Tensor:
        G = torch.randn(count, d, generator=rng)
        return G.add_(topics[torch.randint(16, (count,), generator=rng)], alpha=strength).add_(shared, alpha=0.3)

    parts = {"candidates": rows(n, 0.7), "targets": rows(m, 1.0), "anchors": rows(m // 2, 0.5)}
    means = {"target": parts["targets"].mean(0), "anchor": parts["anchors"].mean(0)}

    def gradients(G: torch.Tensor) -> ArrayGradients:
        columns = dict(ArrayGradients.from_matrix(G, references=means).columns) | {"loss": torch.full((len(G),), 2.0)}
        return ArrayGradients([f"{i:06d}" for i in range(len(G))], G, columns)

    return Problem(gradients(parts["candidates"]), gradients(parts["targets"]), gradients(parts["anchors"]))


def steps_per_second(sim: Simulator, episodes: int) -> float:
    rng, state, steps, start = torch.Generator().manual_seed(0), begin(sim, episodes), 0, time.perf_counter()
    while (mask := available(sim, state)).any():
        ahead = outlook(sim, state)
        observe(sim, state, ahead, torch.zeros(episodes))
        action = (torch.rand(mask.shape, generator=rng) * mask).argmax(1)
        state = advance(sim, state, action, ahead)
        steps += int(mask.any(1).sum())
    return steps / (time.perf_counter() - start)


def speed() -> None:
    torch.set_num_threads(1)
    problem = big(20_000)
    env = OGS(clusters=16).environment(problem, Budget(examples=1000), torch.Generator().manual_seed(0))
    for episodes in (1, 16, 64, 256):
        rate = steps_per_second(env.simulator, episodes)
        print(f"simulator, quadratic, K = 16, d = 1024, m = 300 + 150, {episodes:3d} episodes at once: {rate:,.0f} steps/s")
    problem = big(100_000)
    start, cpu = time.perf_counter(), time.process_time()
    world = OGS().environment(problem, Budget.parse("5%"), torch.Generator().manual_seed(0))
    built = time.process_time() - cpu
    trained = train(world.simulator, PPO(), torch.Generator().manual_seed(0))
    learnt = time.process_time() - cpu - built
    print(f"100,000 x 1024, budget 5 %: clusters and simulator {built:.1f} s, training {learnt:.1f} s CPU")
    print(f"  wall {time.perf_counter() - start:.1f} s; reward, cost = {trained.run.total}, bound {world.simulator.epsilon}")


PARTS: dict[str, Callable[[], None]] = {"learning": learning, "agents": agents, "speed": speed}

if __name__ == "__main__":
    for part in sys.argv[1:] or PARTS:
        PARTS[part]()
