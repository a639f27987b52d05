"""What an OGS selection says of itself: the numbers for the report, and the sentences the user must read."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from gradsieve.selectors.ogs_policy import Trained, standing
from gradsieve.selectors.ogs_simulator import Simulator

Prediction = tuple[float, float]
"""Reward and cost of a subset in the simulator."""

PER_ROW = ("utility", "risk", "draw")
"""Entries of the trace with a number per row."""

RULES = {"threshold": "at the same bound", "ogs-static": "with its own bound"}


def trace(
    sim: Simulator,
    trained: Trained,
    predicted: dict[str, Prediction],
    parts: list[Tensor],
    columns: dict[str, Tensor],
    general: list[bool],
) -> dict[str, Any]:
    """Returns the numbers for the report.

    Args:
        sim: The world.
        trained: The policy.
        predicted: What the simulator says of each subset.
        parts: The rows that were chosen, draw by draw.
        columns: `utility`, `anchor_cosine`, `risk`: float64 [n].
        general: Per cluster whether it holds replay examples.
    """
    draw = torch.full_like(columns["utility"], torch.nan)
    for number, rows in enumerate(parts, 1):
        draw[rows] = number
    chosen = int((~draw.isnan()).sum())
    clusters = [
        {"replay": is_general, "rows": len(members), "drawn": int((~draw[members].isnan()).sum())}
        | {name: float(values[members].mean()) for name, values in columns.items()}
        for members, is_general in zip(sim.draws.rows, general, strict=True)
    ]
    run = trained.run
    return {
        "utility": columns["utility"].tolist(),
        "risk": columns["risk"].tolist(),
        "training": dict(trained.history),
        "draw": [None if math.isnan(number) else int(number) for number in draw.tolist()],
        "steps": {
            "cluster": list(run.clusters),
            "reward": list(run.rewards),
            "cost": list(run.costs),
            "examples": [len(rows) for rows in parts],
        },
        "clusters": clusters,
        "simulated": {name: {"reward": reward, "cost": cost} for name, (reward, cost) in predicted.items()},
        "replay_share": sum(c["drawn"] for c in clusters if c["replay"]) / chosen if chosen else 0.0,
        "best_round": trained.best,
        "policy_lambda": trained.run.multiplier * sim.reward_scale / sim.epsilon,
        "epsilon": sim.epsilon,
        "batch": sim.draws.batch,
    }


def cluster_notes(clusters: int, general_clusters: int, general: list[bool]) -> list[str]:
    """Returns a note for each kind of cluster of which fewer were found than asked for.

    Args:
        clusters: Domain clusters asked for.
        general_clusters: Replay clusters asked for, if there are replay examples.
        general: Per cluster found whether it holds replay examples.
    """
    notes = []
    for name, asked, found in (
        ("clusters", clusters, len(general) - sum(general)),
        ("general_clusters", general_clusters, sum(general)),
    ):
        if 0 < found < asked:
            notes.append(
                f"{name}: {found} were found where {asked} were asked for: a sample of the rows has no more directions"
            )
    return notes


def policy_notes(constraint: str, epsilon: float, trained: Trained, predicted: dict[str, Prediction]) -> list[str]:
    """Returns what must be said of the bound, and of the threshold rules that the policy did not beat.

    Args:
        constraint: The cost's name.
        epsilon: Its bound.
        trained: The policy.
        predicted: What the simulator says of each subset, `ogs` and `RULES` among them.
    """
    notes, (reward, cost) = [], predicted["ogs"]
    if cost > epsilon:
        notes.append(
            f"bound not met: the chosen have a simulated {constraint} cost of {cost:.4g}, above epsilon {epsilon:.4g}; raise "
            "--epsilon, lower the budget, or add replay examples"
        )
    elif trained.run.multiplier == 0:
        notes.append(
            f"λ not binding: the best policy keeps epsilon {epsilon:.4g} ({constraint}) with λ = 0, at a cost of {cost:.4g}, "
            "so the bound did not shape the choice; to let it: a lower --epsilon"
        )
    for name, what in RULES.items():
        if not standing(predicted["ogs"], epsilon) > standing(predicted[name], epsilon):
            notes.append(
                f"the policy did not beat the threshold rule {what} ({name}) in the simulator: reward {reward:.4g} at cost "
                f"{cost:.4g}, the rule {predicted[name][0]:.4g} at {predicted[name][1]:.4g}, epsilon {epsilon:.4g}; "
                "raise --updates, or use ogs-static"
            )
    return notes


def navigator_notes(constraint: str, epsilon: float, measured: dict[str, Prediction], gain: float) -> list[str]:
    """Returns what must be said of the episodes on the Navigator.

    Args:
        constraint: The cost's name.
        epsilon: Its bound.
        measured: Reward and cost of `ogs`, `threshold` and `random`.
        gain: Factor between the first-order gain that was simulated and the one that was seen.
    """
    notes, (reward, cost) = [], measured["ogs"]
    if not gain > 0:
        notes.append(
            "nothing that the simulator took for a gain was one on the Navigator, so the policy was not refined; check the "
            "target, or lower --navigator-rate"
        )
    if cost > epsilon:
        notes.append(
            f"bound not met on the Navigator: a measured {constraint} cost of {cost:.4g}, above epsilon {epsilon:.4g}; "
            "lower the budget or --navigator-rate, add replay examples, or raise --epsilon"
        )
    for name in ("threshold", "random"):
        if not standing(measured["ogs"], epsilon) > standing(measured[name], epsilon):
            notes.append(
                f"on the Navigator the policy did not beat {name}: reward {reward:.4g} at cost {cost:.4g}, {name} "
                f"{measured[name][0]:.4g} at {measured[name][1]:.4g}, epsilon {epsilon:.4g}"
            )
    return notes
