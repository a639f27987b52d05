"""Seeded random projections: a gradient of millions of numbers becomes d of them, and inner products survive in the mean.

A weight gradient G [d_out, d_in] is projected from both sides with sign matrices, PᵀGQ [k_out, k_in]; the sketches of all
parameters are *summed* (independent signs per parameter, so cross terms vanish in the mean) and, where d < k_out k_in, folded
to d numbers by a CountSketch. E<Sg, Sh> = <g, h>; the noise of a cosine is about 1/√d.

That noise has a part that more cells do not help against: ‖GHᵀ‖²/k_out and ‖GᵀH‖²/k_in per matrix. Inputs of a layer point the
same way in all examples (a few activations are a hundred times as large as the others) and output gradients do not, so the
first is the larger by far: k_out is four times k_in.

The widest sketch (d = 65,536, that of references that do not fit) is made of the entries of G itself: entry (i, j) adds to cell
(o + i d_in + j) mod 65,521 with sign s_i t_j, where offset o and signs s, t are the parameter's own. The largest prime below d
keeps two entries of one column out of one cell: with 65,536 they would meet there wherever d_in is a power of two, and a cosine
would be off by 0.2. So the noise of a cosine is 1/√d for gradients of any rank and width.

Every sign comes from a counter-based generator keyed by (seed, name), so that two machines make the same projection without
shipping it, and the entries ±(k_out k_in)^-¼ are exact in binary for 128 x 32.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
import xxhash
from torch import Tensor

from gradsieve.errors import InvalidArgument

Axis = Literal["out", "in"]


def _generator(seed: int, name: str) -> np.random.Generator:
    """Returns the generator of one named matrix: Philox, the same bits on every platform."""
    return np.random.Generator(np.random.Philox(key=xxhash.xxh3_128_intdigest(f"{seed}/{name}".encode())))


def _signs(seed: int, name: str, count: int) -> Tensor:
    """Returns `count` independent signs, float32 ±1."""
    packed = np.frombuffer(_generator(seed, name).bytes((count + 7) // 8), dtype=np.uint8)
    return torch.from_numpy(np.unpackbits(packed, count=count).astype(np.float32)).mul_(2).sub_(1)


LARGEST = 65536
"""The largest size of a sketch, and the one that is made entry by entry."""
PLACES = 65521  # the largest prime below: cells that entries go to


def add_entries(cells: Tensor, G: Tensor, start: int) -> None:
    """Adds the entries of G [b, n], one after the other, to cells [b, d] from `start` on, going round."""
    d, n = cells.shape[1], G.shape[1]
    first = min(d - start, n)
    cells[:, start : start + first] += G[:, :first]
    rounds = (n - first) // d
    if rounds:
        cells += G[:, first : first + rounds * d].unflatten(1, (rounds, d)).sum(1)
    cells[:, : n - first - rounds * d] += G[:, first + rounds * d :]


@dataclass(frozen=True, slots=True)
class SketchPlan:
    """Which projection is meant: with the model's parameter names it fixes every sign.

    Attributes:
        dim: Sketch size d.
        seed: Changes all signs.
    """

    dim: int = 1024
    seed: int = 0

    def __post_init__(self) -> None:
        if not 16 <= self.dim <= LARGEST:
            raise InvalidArgument(f"dim must lie in [16, {LARGEST}], got {self.dim}; 1024 and 4096 are usual")

    @property
    def sides(self) -> tuple[int, int]:
        """(k_out, k_in): 128 x 32, or for d above 4096 the smallest 64m x 16m that holds d."""
        m = 2 if self.dim <= 4096 else 1 + math.isqrt(self.dim - 1) // 32
        return 64 * m, 16 * m

    @property
    def cells(self) -> int:
        """k_out k_in: numbers of a sketch before it is folded to d."""
        return math.prod(self.sides)

    @property
    def entrywise(self) -> bool:
        """Whether matrices are sketched entry by entry, not from both sides."""
        return self.dim == LARGEST

    def offset(self, name: str) -> int:
        """Returns the cell of a matrix's first entry where it is sketched entry by entry."""
        return int(_generator(self.seed, f"{name}/offset").integers(0, PLACES))

    def places(self, name: str, rows: Tensor, columns: int) -> Tensor:
        """Returns the cells of some rows (int64 [n]) of a matrix sketched entry by entry, int64 [n, columns]."""
        return (self.offset(name) + rows[:, None] * columns + torch.arange(columns, device=rows.device)) % PLACES

    def signs(self, name: str, size: int) -> Tensor:
        """Returns the signs of one axis of a matrix that is sketched entry by entry, float32 [size]."""
        return _signs(self.seed, f"{name}/entries", size)

    def projection(self, name: str, axis: Axis, size: int) -> Tensor:
        """Returns the sign matrix of one axis of a matrix, float32 [size, k_axis], entries ±(k_out k_in)^-¼."""
        side = self.sides[axis == "in"]
        return _signs(self.seed, f"{name}/{axis}", size * side).view(size, side) / math.sqrt(math.sqrt(self.cells))

    def vector_buckets(self, name: str, size: int) -> tuple[Tensor, Tensor]:
        """Returns a CountSketch of a parameter vector into the cells: cell int64 [size], sign float32 [size]."""
        cells = _generator(self.seed, f"{name}/cell").integers(0, self.cells, size=size, dtype=np.int64)
        return torch.from_numpy(cells), _signs(self.seed, f"{name}/sign", size)

    def fold(self) -> tuple[Tensor, Tensor]:
        """Returns (order int64, sign float32), both [c·d]: the cells in random order, padded by one more, which is zero.

        Cell order[i·c + j] adds to coordinate i with its sign: a CountSketch whose buckets are equally full, which sums in
        a fixed order on every device.
        """
        cells, share = self.cells, math.ceil(self.cells / self.dim)
        order = np.concatenate([_generator(self.seed, "fold").permutation(cells), np.full(share * self.dim - cells, cells)])
        return torch.from_numpy(order), _signs(self.seed, "fold/sign", len(order))
