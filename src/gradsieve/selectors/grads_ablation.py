"""What each of GrADS' three factors chooses when it stands alone, beside all of them together."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from gradsieve.selectors.directions import Directions, marginal_relevance
from gradsieve.selectors.ranking import exact_mean, percentile
from gradsieve.types import Budget

CANDIDATES = 2000
"""Candidates among which the factors are compared, evenly spaced by id: the comparison costs the same for any pool."""
PICKS = 500
"""Picks, evenly spaced in their order, whose nearest other pick is looked for."""


def ablation(
    directions: Directions, first: Tensor, diversity: Tensor, weights: tuple[float, float, float], rows: Tensor, share: float
) -> dict[str, Any]:
    """Returns what is chosen by all factors and by each alone, among up to `CANDIDATES` of the rows.

    Args:
        directions: Unit sketches of the pool.
        first: What `prefer` makes of the gradient score, float64 [n].
        diversity: float64 [n].
        weights: Of score, diversity and novelty.
        rows: The rows one may choose from, by id: int64 [r].
        share: Of the candidates that is chosen, in (0, 1].

    Returns:
        `bars`: one panel per quantity, one bar per way to choose (the choice itself first, the candidates last);
        `ablation`: how many candidates and picks that is about. O(c d k) at most, c candidates.
    """
    among = rows[torch.linspace(0, len(rows) - 1, min(len(rows), CANDIDATES)).round().long()]
    budget = Budget(examples=max(1, round(share * len(among))))
    ways = {
        "all three": weights,
        "score alone": (1.0, 0.0, 0.0),
        "diversity alone": (0.0, 1.0, 0.0),
        "novelty alone": (0.0, 0.0, 1.0),
    }
    chosen: dict[str, Tensor] = {}
    for name, (of_score, of_diversity, of_novelty) in ways.items():
        relevance = of_score * first + of_diversity * diversity
        chosen[name] = marginal_relevance(directions, relevance, of_novelty, among, budget)[0]
    chosen["the candidates"] = among
    whole = set(chosen["all three"].tolist())
    panels: dict[str, Mapping[str, float]] = {
        "Score factor, mean": {name: exact_mean(first[own]) for name, own in chosen.items()},
        "Diversity factor, mean": {name: exact_mean(diversity[own]) for name, own in chosen.items()},
        "Novelty of the set": {name: set_novelty(directions, own) for name, own in chosen.items()},
        "Share that all three chose too": {
            name: len(whole & set(own.tolist())) / len(own) for name, own in chosen.items() if name != "the candidates"
        },
    }
    tokens = directions.gradients.columns.get("completion_tokens")
    if tokens is not None:
        panels["Answer length, median tokens"] = {name: percentile(tokens[own], 50) for name, own in chosen.items()}
    return {"bars": panels, "ablation": {"candidates": len(among), "picks": len(whole)}}


def set_novelty(directions: Directions, rows: Tensor) -> float:
    """Returns one minus the mean over up to `PICKS` of the rows of max(0, largest cosine to another of them); 1 for one row."""
    if len(rows) < 2:
        return 1.0
    asked = torch.linspace(0, len(rows) - 1, min(len(rows), PICKS)).round().long()
    nearest = torch.zeros(len(asked), dtype=torch.float64)
    U = directions.rows(rows[asked])
    for places in torch.arange(len(rows)).split(4096):
        C = U @ directions.rows(rows[places]).T
        C[asked[:, None] == places] = 0.0
        nearest = nearest.maximum(C.amax(1))
    return 1 - exact_mean(nearest)
