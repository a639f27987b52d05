"""The OGS environment as a `gymnasium.Env`, for other people's agents: simulated, or on a live Navigator."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, cast

import gymnasium
import numpy as np
import numpy.typing as npt
import torch
from gymnasium import spaces

from gradsieve.errors import InvalidArgument
from gradsieve.selectors.ogs_refine import Start
from gradsieve.selectors.ogs_simulator import (
    CLUSTER_FEATURES,
    OVERALL_FEATURES,
    Simulator,
    State,
    advance,
    available,
    begin,
    observe,
    outlook,
)
from gradsieve.types import Cost, Navigator

Arrays = dict[str, npt.NDArray[np.float32]]


@dataclass(frozen=True, eq=False)
class Live:
    """What takes the steps and is measured in the place of the simulated losses.

    Attributes:
        navigator: A live model.
        cost: What L_gen is.
        pay: Returns the rows, of those drawn so far in this order, that the budget pays for.
    """

    navigator: Navigator
    cost: Cost
    pay: Callable[[torch.Tensor], torch.Tensor]


class OGSEnvironment(gymnasium.Env[Arrays, np.int64]):
    """One episode: draw batches from clusters until the budget is spent; see `ogs_simulator` for what a draw does.

    Observation: `clusters` float32 [K, 12] and `overall` float32 [6] as in `ogs_simulator.Observation`. Action: the cluster
    that gives the next batch; one that is exhausted is an error (`action_masks` says which are not; sb3-contrib asks for it
    by this name).
    Reward: Eq. OGS-6. `info` holds `cost`, and `action_mask` after the step. The world is deterministic: `seed` changes
    nothing.

    With `live` a step is an optimizer step of the Navigator on the rows of the draw, and reward, cost and what the observation
    says of them are measured on it. What a cluster's next draw would do stays the simulator's guess: to know it would take
    K steps. A draw of which the budget pays for no row takes no step.

    Attributes:
        simulator: The world.
        multiplier: λ as the policy sees it; the reward does not contain it.
        live: What is trained and measured; None where all is simulated.
    """

    def __init__(self, simulator: Simulator, multiplier: float = 0.0, live: Live | None = None) -> None:
        K = len(simulator.draws.rows)
        self.metadata = {"render_modes": []}
        self.simulator, self.multiplier, self.live = simulator, multiplier, live
        self.action_space = spaces.Discrete(K)
        boxes: dict[str, spaces.Space[Any]] = {
            "clusters": spaces.Box(-1.0, 1.0, (K, CLUSTER_FEATURES), np.float32),
            "overall": spaces.Box(-1.0, 1.0, (OVERALL_FEATURES,), np.float32),
        }
        self.observation_space = cast("spaces.Space[Arrays]", spaces.Dict(boxes))
        self._state = begin(simulator, 1)
        self._start: Start | None = None
        self._drawn = torch.empty(0, dtype=torch.int64)

    def action_masks(self) -> npt.NDArray[np.bool_]:
        """Returns which clusters can be drawn from: bool [K]."""
        return available(self.simulator, self._state)[0].numpy()

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Arrays, dict[str, Any]]:
        """Starts an episode."""
        super().reset(seed=seed)
        self._state = begin(self.simulator, 1)
        self._drawn = self._drawn[:0]
        if self.live is not None:
            self._start = Start.of(self.live.navigator, self.live.cost)
        return self._observation(), {"action_mask": self.action_masks()}

    def step(self, action: np.int64) -> tuple[Arrays, float, bool, bool, dict[str, Any]]:
        """Draws a batch from a cluster.

        Raises:
            InvalidArgument: The cluster is exhausted, or the episode is over.
        """
        mask = self.action_masks()
        if not mask[action]:
            raise InvalidArgument(f"action must be a cluster that has rows left {np.flatnonzero(mask).tolist()}, got {action}")
        before, ahead = self._state, outlook(self.simulator, self._state)
        self._state = advance(self.simulator, before, torch.tensor([int(action)]), ahead)
        if self.live is not None:
            total = self._taken(self.live, before, int(action))
            self._state = replace(self._state, total=total, last=total - before.total)
        reward, cost = self._state.last[:, 0].tolist()
        mask = self.action_masks()
        return self._observation(), reward, not mask.any(), False, {"cost": cost, "action_mask": mask}

    def _taken(self, live: Live, before: State, cluster: int) -> torch.Tensor:
        """Takes the step of a draw on the Navigator; returns reward and cost since the start: float64 [2, 1]."""
        if self._start is None:
            raise InvalidArgument("an environment must be reset before its first step, got none; call reset()")
        paid = len(live.pay(self._drawn))
        draws = self.simulator.draws
        self._drawn = torch.cat([self._drawn, draws.rows[cluster].split(draws.batch)[int(before.drawn[0, cluster])]])
        new = live.pay(self._drawn)[paid:]
        if not len(new):
            return before.total
        live.navigator.step(new)
        return torch.tensor(self._start.since(), dtype=torch.float64)[:, None]

    def _observation(self) -> Arrays:
        seen = observe(self.simulator, self._state, outlook(self.simulator, self._state), torch.tensor([self.multiplier]))
        return {"clusters": seen.clusters[0].numpy(), "overall": seen.overall[0].numpy()}
