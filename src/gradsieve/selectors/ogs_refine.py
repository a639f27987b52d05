"""Real episodes beside simulated ones: the third fidelity of the OGS environment.

The policy's batches are played on a live Navigator, losses are measured on the way, and the simulator is scaled to what was
seen, so that the Navigator's true change is met (Eq. OGS-9): with F_t and Q_t the first- and second-order parts of the
simulated gain after t draws, measured gain ≈ α F_t - β Q_t with α, β ≥ 0 by least squares; likewise for the cost. **[choice]**
What is re-measured is the losses along the episode, not every gradient: the directions stay those of the start, their pace is
corrected. Then the policy is trained again in the scaled simulator. Of all policies that were played the best measured one is
kept.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from gradsieve.errors import InvalidArgument
from gradsieve.selectors.ogs_policy import PPO, Trained, standing, train
from gradsieve.selectors.ogs_simulator import Simulator, advance, begin, outlook
from gradsieve.types import Cost, Navigator


@dataclass(frozen=True, eq=False)
class Episode:
    """What happened to the Navigator on the way.

    Attributes:
        at: Draws after which it was measured, ascending; the last is the number of draws.
        reward: Relative fall of L_dom since the start, at each of them.
        cost: What L_gen has risen by since the start: nats per token for `kl`, else relative.
    """

    at: tuple[int, ...]
    reward: tuple[float, ...]
    cost: tuple[float, ...]

    @property
    def total(self) -> tuple[float, float]:
        """Reward and cost at the end."""
        return self.reward[-1], self.cost[-1]


@dataclass(frozen=True, slots=True)
class Scales:
    """Factors on the simulated first- and second-order parts of reward and cost: all 1 is the simulator as it was made."""

    gain: float = 1.0
    saturation: float = 1.0
    rise: float = 1.0
    harm: float = 1.0


@dataclass(frozen=True, eq=False)
class Refined:
    """The outcome of `refine`.

    Attributes:
        simulator: Scaled to what was measured.
        trained: The policy that did best on the Navigator.
        scales: Of the simulator, against the one that was given.
        rounds: Per policy played: its run in the simulator it was trained in, and on the Navigator.
        best: Number of the round that is kept.
    """

    simulator: Simulator
    trained: Trained
    scales: Scales
    rounds: tuple[tuple[Trained, Episode], ...]
    best: int


@dataclass(frozen=True, eq=False)
class Start:
    """A Navigator at the start of an episode, and its losses there.

    Attributes:
        navigator: It goes on from here.
        cost: What L_gen is.
        domain: L_dom at the start.
        general: L_gen at the start.
    """

    navigator: Navigator
    cost: Cost
    domain: float
    general: float

    @classmethod
    def of(cls, navigator: Navigator, cost: Cost) -> Start:
        """Resets the Navigator and measures it.

        Raises:
            InvalidArgument: A loss is not above 0, so that nothing can be relative to it.
        """
        navigator.reset()
        domain, general = navigator.losses(cost)
        if not domain > 0 or (cost != "kl" and not general > 0):
            raise InvalidArgument(
                f"the Navigator's losses must be above 0 at the start, got {domain:.4g} (target) and {general:.4g} "
                f"(anchor, {cost})"
            )
        return cls(navigator, cost, domain, general)

    def since(self) -> tuple[float, float]:
        """Returns Σ reward and Σ cost since the start (Eq. OGS-6), measured now; `kl` is absolute."""
        domain, general = self.navigator.losses(self.cost)
        unit = 1.0 if self.cost == "kl" else self.general
        return (self.domain - domain) / self.domain, (general - self.general) / unit


def drive(navigator: Navigator, batches: Sequence[Tensor], cost: Cost, points: int) -> Episode:
    """Plays batches on the Navigator from its start, measuring at `points` places spread over the episode.

    Args:
        navigator: Reset first.
        batches: int64 rows of each step.
        cost: What L_gen is.
        points: At least 1: the end; at most the number of batches count.

    Raises:
        InvalidArgument: There is no batch; or a loss at the start is not above 0, so that nothing can be relative to it.
    """
    if not batches:
        raise InvalidArgument(
            "an episode on the Navigator must have a step, got none: its first row is above the budget; raise it"
        )
    start = Start.of(navigator, cost)
    steps = len(batches)
    at = sorted({max(1, round(steps * (i + 1) / points)) for i in range(points)})
    rewards, costs = [], []
    for step, rows in enumerate(batches, 1):
        navigator.step(rows)
        if step in at:
            reward, harm = start.since()
            rewards.append(reward)
            costs.append(harm)
    return Episode(tuple(at), tuple(rewards), tuple(costs))


def parts(sim: Simulator, clusters: Sequence[int]) -> Tensor:
    """Returns the simulated F_t and Q_t of gain and cost after every draw: float64 [T, 4] as in `Scales`."""
    state, rows = begin(sim, 1), []
    for cluster in clusters:
        state = advance(sim, state, torch.tensor([cluster]), outlook(sim, state))
        saturation, harm = (0.5 * float(at.square().sum()) for at in (state.domain, state.anchor))
        gain, cost = state.total[:, 0].tolist()
        rows.append([gain + saturation, saturation, cost - harm, harm])
    return torch.tensor(rows, dtype=torch.float64)


def fit(seen: Sequence[tuple[Tensor, Episode]]) -> Scales:
    """Returns the factors ≥ 0 with which simulated parts come nearest to what was measured, in least squares.

    A part that the simulator does not have keeps the factor 1.

    Args:
        seen: Per episode the `parts` of its draws and what was measured.
    """
    from scipy.optimize import nnls

    P = torch.cat([table[torch.tensor(episode.at) - 1] for table, episode in seen])
    reward = torch.tensor([r for _, episode in seen for r in episode.reward], dtype=torch.float64)
    cost = torch.tensor([c for _, episode in seen for c in episode.cost], dtype=torch.float64)
    factors = [1.0] * 4
    for columns, signs, target in (((0, 1), (1.0, -1.0), reward), ((2, 3), (1.0, 1.0), cost)):
        size = P[:, columns].abs().max()
        there = [(c, s) for c, s in zip(columns, signs, strict=True) if P[:, c].abs().max() > 1e-9 * size]  # not rounding
        if there:
            A = torch.stack([s * P[:, c] for c, s in there], dim=1)
            scale = A.square().sum(0).sqrt()  # parts may differ by orders of magnitude
            solution, _ = nnls((A / scale).numpy(), target.numpy())
            for (c, _), value in zip(there, (torch.from_numpy(solution) / scale).tolist(), strict=True):
                factors[c] = value
    return Scales(*factors)


def scaled(sim: Simulator, scales: Scales) -> Simulator:
    """Returns the simulator with its parts multiplied."""
    first = torch.tensor([scales.gain, scales.rise], dtype=torch.float64)[:, None, None]
    return replace(
        sim, rates=sim.rates * first, domain=sim.domain * scales.saturation**0.5, anchor=sim.anchor * scales.harm**0.5
    )


def refine(
    sim: Simulator,
    trained: Trained,
    navigator: Navigator,
    cost: Cost,
    ppo: PPO,
    rng: torch.Generator,
    batches: Callable[[Sequence[int]], Sequence[Tensor]],
    *,
    rounds: int,
    points: int,
) -> Refined:
    """Plays the policy on the Navigator, scales the simulator to it, trains the policy again: `rounds` times.

    Args:
        sim: As it was made.
        trained: A policy trained in it.
        navigator: A live model.
        cost: What L_gen is.
        ppo: How the policy is trained again.
        rng: For that.
        batches: Gives the rows of every draw of an episode, those that the budget pays for.
        rounds: Policies played, at least 1.
        points: Measurements of an episode.
    """
    seen: list[tuple[Tensor, Episode]] = []
    played: list[tuple[Trained, Episode]] = []
    current, scales = sim, Scales()
    for number in range(rounds):
        clusters = trained.run.clusters
        episode = drive(navigator, batches(clusters), cost, points)
        seen.append((parts(sim, clusters)[: episode.at[-1]], episode))
        played.append((trained, episode))
        scales = fit(seen)
        current = scaled(sim, scales)
        if not scales.gain > 0:
            break  # nothing that the simulator knows led to a gain: training again would be blind
        if number + 1 < rounds:
            trained = train(current, ppo, rng)
    best = max(range(len(played)), key=lambda i: standing(played[i][1].total, sim.epsilon))
    return Refined(current, played[best][0], scales, tuple(played), best)


def account(refined: Refined, sim: Simulator) -> dict[str, Any]:
    """Returns the numbers for the report: what the simulator said, as it was made and scaled, beside what was measured.

    Args:
        refined: The outcome.
        sim: The simulator as it was made.
    """
    trained, episode = refined.rounds[refined.best]
    at = torch.tensor(episode.at) - 1
    lines: dict[str, list[float]] = {"reward/measured": list(episode.reward), "cost/measured": list(episode.cost)}
    for name, world in (("as made", sim), ("scaled", refined.simulator)):
        P = parts(world, trained.run.clusters)[at]
        lines[f"reward/simulated, {name}"] = (P[:, 0] - P[:, 1]).tolist()
        lines[f"cost/simulated, {name}"] = (P[:, 2] + P[:, 3]).tolist()
    return {
        "navigator": lines,
        "measured_after": list(episode.at),
        "navigator_rounds": {
            f"round {i}": {
                "reward, simulated": run.run.total[0],
                "reward, measured": own.total[0],
                "cost, simulated": run.run.total[1],
                "cost, measured": own.total[1],
            }
            for i, (run, own) in enumerate(refined.rounds, 1)
        },
        "scales": {
            "gain": refined.scales.gain,
            "saturation": refined.scales.saturation,
            "rise": refined.scales.rise,
            "harm": refined.scales.harm,
        },
    }
