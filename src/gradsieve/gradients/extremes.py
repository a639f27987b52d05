"""The largest and the smallest entry of per-example gradients G = Σ_t b_t a_tᵀ, from a small part of G.

|G_ij| ≤ ‖b_i‖‖a_j‖ over the T positions (Cauchy-Schwarz). The few outputs and inputs with the largest norms nearly always
hold entries that rule almost all others out: what remains are the pairs whose bound reaches beyond the nearer extreme found so
far, and with both sides sorted by their norms these lie in a staircase, which is multiplied in a few bands.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

FIRST = 64  # rows and columns with the largest norms, looked at first
SAVED = 1 << 13  # entries that a band of its own must save: about what one more product costs to call
WHOLE = 0.6  # from this share of G on, all of it costs no more: nothing has to be picked
PIECE = 1 << 20  # entries of one product
SMALLEST = 1e-17  # above what the squares of a column lose when they are too small for float32


@dataclass(frozen=True, slots=True)
class Ranked:
    """The columns of x [B, T, d], ranked by their norms over T.

    Attributes:
        x: The tensor.
        norms: Descending, float32 or better [B, d].
        order: Which column stands at each rank, int64 [B, d].
    """

    x: Tensor
    norms: Tensor
    order: Tensor

    @classmethod
    def of(cls, x: Tensor) -> Ranked:
        """Returns the ranks of x; a column that is not finite comes first."""
        dtype = torch.promote_types(x.dtype, torch.float32)
        squares = [one.to(dtype).square().sum(0) for one in x]  # example by example, in the cache
        return cls(x, *torch.stack(squares).sqrt_().add_(SMALLEST).sort(dim=1, descending=True))

    def first(self, count: int) -> Tensor:
        """Returns the columns of the highest ranks, [B, T, count]."""
        order = self.order[:, None, :count]
        return self.x.gather(2, order.expand(-1, self.x.shape[1], -1))


def smallest_and_largest(a: Ranked, b: Ranked) -> tuple[Tensor, Tensor]:
    """Returns the smallest and the largest entry of every G, [B] each: exact up to the rounding of the products.

    Args:
        a: Inputs [B, T, d_in].
        b: Output gradients [B, T, d_out].
    """
    top = torch.bmm(b.first(FIRST).mT, a.first(FIRST)).flatten(1)
    smallest, largest = top.amin(1), top.amax(1)
    # An entry beyond both extremes found so far needs a bound beyond the nearer one; bound and products are rounded.
    margin = 1 + 8 * torch.finfo(a.x.dtype).eps
    needed = torch.minimum(largest, -smallest).to(a.norms.dtype) / margin
    edges = _edges(b.norms.shape[1])
    # how many a.norms lie above needed / b.norms, where the latter are descending
    widths: list[list[int]] = torch.searchsorted(-a.norms, -needed[:, None] / b.norms[:, edges[:-1]]).tolist()
    lows, highs = list(smallest), list(largest)
    for z, steps in enumerate(widths):
        for part in _parts(a, b, z, _bands(edges, steps)):
            low, high = part.aminmax()
            lows[z], highs[z] = torch.minimum(lows[z], low), torch.maximum(highs[z], high)
    return torch.stack(lows), torch.stack(highs)


def _parts(a: Ranked, b: Ranked, z: int, bands: Sequence[tuple[slice, int]]) -> Iterator[Tensor]:
    """Yields the parts of one example's G that the bands ask for, in products of bounded size."""
    d_out, d_in = b.norms.shape[1], a.norms.shape[1]
    whole = sum((rows.stop - rows.start) * width for rows, width in bands) > WHOLE * d_out * d_in
    for rows, width in [(slice(0, d_out), d_in)] if whole else bands:
        inputs = a.x[z] if whole else a.x[z].index_select(1, a.order[z, :width])
        outputs = b.x[z] if whole else b.x[z].index_select(1, b.order[z, rows])
        for some in outputs.split(max(1, PIECE // width), 1):
            yield some.T @ inputs


def _edges(count: int) -> list[int]:
    """Returns where bands may begin and end: 0, powers of two and the middles between them, `count`."""
    steps = [0, *(FIRST // 4 * part << power for power in range(32) for part in (2, 3))]
    return [*(step for step in steps if step < count), count]


def _bands(edges: list[int], widths: list[int]) -> list[tuple[slice, int]]:
    """Returns (rows, columns) of the products that cover a staircase: `widths` columns from each edge to the next.

    Neighbours become one band where that adds few entries; the corner that was looked at first is left out where it is all.
    """
    bands: list[tuple[slice, int]] = []
    for (begin, end), width in zip(pairwise(edges), widths, strict=True):
        if width == 0:
            break
        last = bands[-1] if bands else None
        if last is not None and (last[1] - width) * (end - begin) < SAVED:
            bands[-1] = slice(last[0].start, end), last[1]
        else:
            bands.append((slice(begin, end), width))
    return [(rows, width) for rows, width in bands if rows.stop > FIRST or width > FIRST]
