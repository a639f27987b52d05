"""The sketches of a set of examples as one matrix, for methods that pass over them many times: in memory, or read anew."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from gradsieve.errors import InvalidArgument
from gradsieve.types import Gradients

DENSE_BYTES = 1 << 30
"""Sketches of at most this size (as float32) are held in memory; larger ones are read again in each pass."""


class Rows(Protocol):
    """The rows of a matrix [n, d], of which a solver needs products and a few at a time.

    Attributes:
        width: d.
        squares: ‖g‖² of every row, float64 [n].
    """

    @property
    def width(self) -> int: ...
    @property
    def squares(self) -> Tensor: ...

    def take(self, index: Tensor) -> Tensor:
        """Returns the rows in `index` (int64 [k]), in that order: float32 [k, d]."""
        ...

    def products(self, R: Tensor) -> Tensor:
        """Returns the product of every row with each vector of R [q, d]: float32 [q, n]."""
        ...


@dataclass(frozen=True, eq=False)
class DenseRows:
    """`Rows` of a matrix in memory, float32 [n, d]."""

    G: Tensor
    squares: Tensor

    @classmethod
    def of(cls, G: Tensor) -> DenseRows:
        """Returns the rows of G."""
        return cls(G, squared_norms(G))

    @property
    def width(self) -> int:
        return self.G.shape[1]

    def take(self, index: Tensor) -> Tensor:
        return self.G[index]

    def products(self, R: Tensor) -> Tensor:
        return (self.G @ R.float().T).T.contiguous()


@dataclass(frozen=True, eq=False)
class StreamedRows:
    """`Rows` of sketches that are read block by block in each pass; row i is the gradients' row order[i].

    Attributes:
        gradients: Where they come from.
        order: int64 [n].
        place: Its inverse.
        squares: ‖g‖² of every row.
    """

    gradients: Gradients
    order: Tensor
    place: Tensor
    squares: Tensor

    @classmethod
    def of(cls, gradients: Gradients, order: Tensor) -> StreamedRows:
        """Reads all sketches once; raises InvalidArgument at one that is not finite."""
        place = torch.empty_like(order)
        place[order] = torch.arange(len(order))
        squares = torch.empty(len(order), dtype=torch.float64)
        for rows, sketch in finite_blocks(gradients):
            squares[place[rows]] = squared_norms(sketch)
        return cls(gradients, order, place, squares)

    @property
    def width(self) -> int:
        return self.gradients.dim

    def take(self, index: Tensor) -> Tensor:
        return self.gradients.rows(self.order[index])

    def products(self, R: Tensor) -> Tensor:
        P = torch.empty(len(self.order), len(R))
        right = R.float().T
        for rows, sketch in self.gradients.blocks():
            P[self.place[rows]] = sketch @ right
        return P.T.contiguous()


def rows_of(gradients: Gradients, order: Tensor) -> Rows:
    """Returns the sketches at the first checkpoint in this order, in memory if they are at most `DENSE_BYTES`.

    Raises:
        InvalidArgument: A sketch is not finite.
    """
    if 4 * len(order) * gradients.dim <= DENSE_BYTES:
        return DenseRows.of(dense(gradients, order))
    return StreamedRows.of(gradients, order)


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
