"""The sketches of a set of examples as one matrix, for methods that pass over them many times."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from gradsieve.errors import InvalidArgument
from gradsieve.types import Gradients


def dense(gradients: Gradients, order: Tensor) -> Tensor:
    """Returns the sketches at the first checkpoint, in this order of rows: float32 [n, d], 4nd bytes.

    Methods load the pool in the order of its ids: then the first of equal rows is the one with the smallest id, and no
    result can depend on the order in which the pool or its blocks came.

    Args:
        gradients: n rows.
        order: Every row once: int64 [n].

    Raises:
        InvalidArgument: A sketch is not finite.
    """
    place = torch.empty_like(order)
    place[order] = torch.arange(len(order))
    G = torch.empty((len(order), gradients.dim), dtype=torch.float32)
    for rows, sketch in finite_blocks(gradients):
        G[place[rows]] = sketch
    return G


def mean_gradient(gradients: Gradients) -> Tensor:
    """Returns the mean sketch at the first checkpoint, summed in float64 block by block: float64 [d]."""
    total = torch.zeros(gradients.dim, dtype=torch.float64)
    for _, sketch in finite_blocks(gradients):
        total += sketch.double().sum(0)
    return total / len(gradients.ids)


def finite_blocks(gradients: Gradients) -> Iterator[tuple[Tensor, Tensor]]:
    """Yields the blocks at the first checkpoint; raises InvalidArgument at a sketch that is not finite."""
    for rows, sketch in gradients.blocks():
        finite = sketch.isfinite().all(1)
        if not finite.all():
            row = int(rows[~finite][0])
            raise InvalidArgument(f"the sketch of {gradients.ids[row]!r} must be finite; extract it again")
        yield rows, sketch


def squared_norms(G: Tensor) -> Tensor:
    """Returns ‖g‖² of every row of G [n, d], summed in float64: float64 [n]."""
    return torch.cat([part.double().square().sum(1) for part in G.split(4096)])
