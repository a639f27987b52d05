"""Running exact statistics of per-example gradients: norm, mean, standard deviation, extremes, products with references.

One `Statistics` holds one group of parameters for one batch of B examples; layers are added as they are met.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


class Statistics:
    """Sums over the entries of each example's gradient; float64 [B] each, extremes in the gradient's own precision.

    Attributes:
        squares: Σ g².
        total: Σ g.
        largest, smallest: Extreme entries.
        count: Entries per example, zeros included.
    """

    def __init__(self, batch: int, count: int, device: torch.device) -> None:
        self.squares = torch.zeros(batch, dtype=torch.float64, device=device)
        self.total = torch.zeros(batch, dtype=torch.float64, device=device)
        self.largest = torch.full((batch,), -torch.inf, dtype=torch.float64, device=device)
        self.smallest = torch.full((batch,), torch.inf, dtype=torch.float64, device=device)
        self.count = count

    def extend(self, smallest: Tensor, largest: Tensor, rows: int | slice | Tensor = slice(None)) -> None:
        """Takes in further entries' extremes, [B] or one per row of `rows`."""
        self.smallest[rows] = torch.minimum(self.smallest[rows], smallest.double())
        self.largest[rows] = torch.maximum(self.largest[rows], largest.double())

    def merge(self, other: Statistics, row: int | slice = slice(None)) -> None:
        """Takes in another group's sums: of the whole batch, or of the one example at `row` (its count: that group's)."""
        self.squares[row] += other.squares if isinstance(row, slice) else other.squares[0]
        self.total[row] += other.total if isinstance(row, slice) else other.total[0]
        self.extend(
            *((other.smallest, other.largest) if isinstance(row, slice) else (other.smallest[0], other.largest[0])), row
        )

    def columns(self, names: Sequence[str], group: str) -> dict[str, Tensor]:
        """Returns the statistics called `norm`, `mean`, `sd`, `max`, `min` as `name/group` columns, float64 [B]."""
        mean = self.total / self.count
        values = {
            "norm": self.squares.sqrt(),
            "mean": mean,
            # the mean is far below the root mean square for every layer, so the difference keeps its digits
            "sd": (self.squares / self.count - mean.square()).clamp_min(0).sqrt(),
            "max": self.largest,
            "min": self.smallest,
        }
        return {f"{name}/{group}" if group else name: values[name] for name in names}
