"""Whether what was chosen points one way: then steps add up, and a rate that suited a mixed choice is too high."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from gradsieve.types import Gradients

MOST_ROWS = 4096  # of the pool and of the chosen each; a mean over pairs is known to a hundredth long before
TIMES, MORE = 2.0, 0.05


@dataclass(frozen=True, slots=True)
class Alignment:
    """The mean cosine of two different examples' gradients, estimated on sketches.

    Attributes:
        pool: Of two of the pool.
        chosen: Of two of the chosen.
    """

    pool: float
    chosen: float

    @property
    def one_way(self) -> bool:
        """Whether the chosen are at least twice as alike as the pool, by more than chance does to a small choice."""
        return self.chosen >= TIMES * self.pool and self.chosen - self.pool >= MORE

    def __str__(self) -> str:
        return (
            f"the chosen point one way: two of their gradients have a mean cosine of {self.chosen:.2f}, two of the pool's "
            f"{self.pool:.2f}; steps add up, and what else the target holds may be missing: look at what was chosen, let every "
            "target take in its turn (ogs-static --utility each, rds), or halve the learning rate"
        )


def alignment(candidates: Gradients, chosen: Tensor, seed: int) -> Alignment | None:
    """Returns how alike the chosen rows' gradients are; None without sketches, or where fewer than two were chosen.

    Args:
        candidates: The pool; of several checkpoints the first counts.
        chosen: Rows, int64 [k].
        seed: Of the draw of `MOST_ROWS` rows, where there are more.
    """
    if not candidates.dim or len(chosen) < 2:
        return None
    rng = torch.Generator().manual_seed(seed)
    sides = (torch.arange(len(candidates.ids)), chosen)
    drawn = (rows[torch.randperm(len(rows), generator=rng)[:MOST_ROWS]].sort().values for rows in sides)
    return Alignment(*(mean_cosine(candidates.rows(rows)) for rows in drawn))


def mean_cosine(sketches: Tensor) -> float:
    """Returns the mean cosine of two different rows of [n, d], n at least 2; a row of zeros has none with any."""
    unit = torch.nn.functional.normalize(sketches.double(), dim=1)
    n = len(unit)
    return float((unit.sum(0).square().sum() - unit.square().sum()) / (n * (n - 1)))
