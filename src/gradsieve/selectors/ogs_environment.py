"""The OGS simulator as a `gymnasium.Env`, for other people's agents."""

from __future__ import annotations

from typing import Any, cast

import gymnasium
import numpy as np
import numpy.typing as npt
import torch
from gymnasium import spaces

from gradsieve.errors import InvalidArgument
from gradsieve.selectors.ogs_simulator import (
    CLUSTER_FEATURES,
    OVERALL_FEATURES,
    Simulator,
    advance,
    available,
    begin,
    observe,
    outlook,
)

Arrays = dict[str, npt.NDArray[np.float32]]


class OGSEnvironment(gymnasium.Env[Arrays, np.int64]):
    """One episode: draw batches from clusters until the budget is spent; see `ogs_simulator` for what a draw does.

    Observation: `clusters` float32 [K, 12] and `overall` float32 [6] as in `ogs_simulator.Observation`. Action: the cluster
    that gives the next batch; one that is exhausted is an error (`action_masks` says which are not; sb3-contrib asks for it
    by this name).
    Reward: Eq. OGS-6. `info` holds `cost`, and `action_mask` after the step. The world is deterministic: `seed` changes
    nothing.

    Attributes:
        simulator: The world.
        multiplier: λ as the policy sees it; the reward does not contain it.
    """

    def __init__(self, simulator: Simulator, multiplier: float = 0.0) -> None:
        K = len(simulator.draws.rows)
        self.metadata = {"render_modes": []}
        self.simulator, self.multiplier = simulator, multiplier
        self.action_space = spaces.Discrete(K)
        boxes: dict[str, spaces.Space[Any]] = {
            "clusters": spaces.Box(-1.0, 1.0, (K, CLUSTER_FEATURES), np.float32),
            "overall": spaces.Box(-1.0, 1.0, (OVERALL_FEATURES,), np.float32),
        }
        self.observation_space = cast("spaces.Space[Arrays]", spaces.Dict(boxes))
        self._state = begin(simulator, 1)

    def action_masks(self) -> npt.NDArray[np.bool_]:
        """Returns which clusters can be drawn from: bool [K]."""
        return available(self.simulator, self._state)[0].numpy()

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Arrays, dict[str, Any]]:
        """Starts an episode."""
        super().reset(seed=seed)
        self._state = begin(self.simulator, 1)
        return self._observation(), {"action_mask": self.action_masks()}

    def step(self, action: np.int64) -> tuple[Arrays, float, bool, bool, dict[str, Any]]:
        """Draws a batch from a cluster.

        Raises:
            InvalidArgument: The cluster is exhausted, or the episode is over.
        """
        mask = self.action_masks()
        if not mask[action]:
            raise InvalidArgument(f"action must be a cluster that has rows left {np.flatnonzero(mask).tolist()}, got {action}")
        ahead = outlook(self.simulator, self._state)
        self._state = advance(self.simulator, self._state, torch.tensor([int(action)]), ahead)
        reward, cost = self._state.last[:, 0].tolist()
        mask = self.action_masks()
        return self._observation(), reward, not mask.any(), False, {"cost": cost, "action_mask": mask}

    def _observation(self) -> Arrays:
        seen = observe(self.simulator, self._state, outlook(self.simulator, self._state), torch.tensor([self.multiplier]))
        return {"clusters": seen.clusters[0].numpy(), "overall": seen.overall[0].numpy()}
