"""One layer's per-example gradient from its input a [B, T, d_in] and output gradient b [B, T, d_out]: G_z = Σ_t b_t a_tᵀ.

Every function here is plain algebra on tensors; which is called when is decided by counting multiplications (`choose_way`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from gradsieve.gradients.statistics import Statistics

TILE_FLOATS = 1 << 20  # a product of this many numbers stays in a core's second-level cache, or nearly so
PRODUCT_FLOATS = 1 << 23  # the products of one layer are made for as many examples at once as stay below this
GRAM_SHARE = 0.75  # of the multiplications of x xᵀ, what its bands were measured to take
EXTREMES_SHARE = 0.3  # of all multiplications, what finding the largest and smallest entry was measured to take
EXTREMES_CALLS = 4e6  # multiplications in the time that the calls for it take per example

Memory = Callable[[tuple[int, ...], torch.dtype], Tensor]
"""Gives reused memory of a shape, valid until the next call."""


@dataclass(frozen=True, slots=True)
class Way:
    """How a layer's quantities are taken.

    Attributes:
        products: Whether the G_z are formed. Otherwise norms come from Gram matrices over T, and products with a
            reference R from a Rᵀ.
        sketch_products: Whether PᵀG_zQ starts from G_z; otherwise from Pᵀb and aQ.
    """

    products: bool
    sketch_products: bool


@lru_cache(maxsize=4096)
def choose_way(
    length: int,
    d_out: int,
    d_in: int,
    sharers: int,
    *,
    sides: tuple[tuple[int, int], ...],
    norm: bool,
    extremes: bool,
    references: int,
    half: bool,
) -> Way:
    """Returns the cheaper way, by multiplications per example.

    Args:
        length: T.
        d_out: Rows of G.
        d_in: Columns of G.
        sharers: Layers that read this input, and split the work on it.
        sides: (k_out, k_in) of every sketch that is taken.
        norm: Whether ‖G_z‖ is wanted.
        extremes: Whether the largest and smallest entries are wanted; otherwise a part of G_z gives them.
        references: Directions to multiply with.
        half: Whether the products run in half precision. To write and read one entry of G_z was measured to cost as much as
            about 30 multiplications in float32 and 400 in bfloat16, whose multiplications are so much faster.
    """
    entries = d_out * d_in
    sketch = sum(length * (k_out * d_out + k_in * d_in / sharers) for k_out, k_in in sides)
    sketch_of_products = sum(k_in * (entries + k_out * d_out) for k_out, k_in in sides)
    products = (length + (400 if half else 30)) * entries + min(sketch, sketch_of_products)
    around = GRAM_SHARE * length**2 * (d_out + d_in / sharers) * norm + references * length * entries + sketch
    around += (EXTREMES_SHARE * length * entries + EXTREMES_CALLS) * extremes
    needed = norm or extremes or references > 0 or len(sides) > 0
    chosen = needed and products < around
    return Way(chosen, chosen and sketch_of_products < sketch)


def product_tiles(a: Tensor, b: Tensor, memory: Memory) -> Iterator[tuple[slice, slice, Tensor]]:
    """Yields (examples, output rows, their part of G [b, rows, d_in]), each valid until the next.

    On a processor a tile stays in the cache while everything is taken from it; one product of one example's is faster there
    than a batch of smaller ones.
    """
    B, d_out, d_in = len(a), b.shape[2], a.shape[2]
    most = TILE_FLOATS if a.device.type == "cpu" else PRODUCT_FLOATS
    together = max(1, min(B, most // (d_out * d_in)))
    rows = min(d_out, max(64, most // (together * d_in) // 16 * 16))
    for first in range(0, B, together):
        examples = slice(first, min(first + together, B))
        for begin in range(0, d_out, rows):
            part = slice(begin, min(begin + rows, d_out))
            G = memory((examples.stop - first, part.stop - begin, d_in), a.dtype)
            if together == 1:
                torch.mm(b[first, :, part].T, a[first], out=G[0])
            else:
                torch.bmm(b[examples, :, part].mT, a[examples], out=G)
            yield examples, part, G


def squared_norm(G: Tensor) -> Tensor:
    """Returns the sum of squares per example of G [B, …, d]: float64 [B].

    Row by row in the products' precision, then in float64: a norm over all of a large G at once loses digits.
    """
    rows: Tensor = torch.linalg.vector_norm(G.flatten(1, -2), dim=2)
    return rows.double().square().sum(1)


def gram(x: Tensor) -> list[Tensor]:
    """Returns x xᵀ per example without most of what symmetry repeats: bands of at most a quarter of the rows.

    Each band [B, rows, columns] ends with its square on the diagonal: 5/8 of the multiplications, 0.7 to 0.8 of the time.

    Args:
        x: [B, T, d].
    """
    rows = 16 * -(-x.shape[1] // 64)
    return [torch.bmm(x[:, first : first + rows], x[:, : first + rows].mT) for first in range(0, x.shape[1], rows)]


def doubled(bands: list[Tensor]) -> list[Tensor]:
    """Returns the bands of `gram` with what stands before their squares times two, in place: it stands for both its sides."""
    for band in bands:
        band[:, :, : band.shape[2] - band.shape[1]] *= 2
    return bands


def squared_norm_by_gram(bands: list[Tensor], b: Tensor) -> Tensor:
    """Returns ‖G_z‖² = Σ_{t,t'} (a_t·a_t')(b_t·b_t') without forming G; float64 [B].

    Args:
        bands: a aᵀ as `gram` gives it, `doubled`.
        b: Output gradient [B, T, d_out].
    """
    dtype = torch.promote_types(b.dtype, torch.float32)
    rows = [other.to(dtype).mul_(mine).sum(2) for mine, other in zip(bands, gram(b), strict=True)]
    return torch.cat(rows, 1).sum(1, dtype=torch.float64)


def extremes(G: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the smallest and the largest entry per example of G [B, …], [B] each."""
    if len(G) > 16:
        rows = G.flatten(1, -2)
        return rows.amin(2).amin(1), rows.amax(2).amax(1)
    pairs = [example.aminmax() for example in G]  # with dim= this is five times slower
    return torch.stack([pair[0] for pair in pairs]), torch.stack([pair[1] for pair in pairs])


def dots(G: Tensor, references: Tensor) -> Tensor:
    """Returns the products of G [B, n, d] with every reference [r, n, d]: float64 [B, r]."""
    return (G.flatten(1) @ references.flatten(1).T).double()


def dots_around(a: Tensor, b: Tensor, references: Tensor) -> Tensor:
    """Returns <G_z, R> = Σ_t b_tᵀ R a_t for every reference [r, d_out, d_in] without forming G; float64 [B, r]."""
    return torch.stack([(torch.matmul(a, R.T.to(a.dtype)).mul_(b)).sum(2).sum(1, dtype=torch.float64) for R in references], 1)


def sketch_of(G: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """Returns leftᵀ G right [B, k_out, k_in] of G [B, n, d], left [n, k_out], right [d, k_in], the narrow side first."""
    return torch.matmul(left.T, torch.matmul(G, right))


def embedding_rows(ids: Tensor, b: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the non-zero rows of the embedding's per-example gradients: Σ of b over equal tokens of one example.

    Args:
        ids: Token ids [B, T].
        b: Gradient at the embedding's output [B, T, D].

    Returns:
        example int64 [u], token int64 [u], and the row gradient [u, D] of each distinct (example, token).
    """
    B, T = ids.shape
    span = int(ids.max()) + 1
    key = ids + torch.arange(B, device=ids.device)[:, None] * span
    distinct, inverse = key.flatten().unique(return_inverse=True)
    rows = b.new_zeros(len(distinct), b.shape[-1], dtype=torch.promote_types(b.dtype, torch.float32))
    rows.index_add_(0, inverse, b.reshape(B * T, -1).to(rows.dtype))
    return distinct // span, distinct % span, rows


def row_statistics(example: Tensor, rows: Tensor, batch: int, shape: tuple[int, int]) -> Statistics:
    """Returns the statistics of gradients of which only some rows are not zero; the zeros count.

    Args:
        example: Owner of each row, int64 [u].
        rows: The non-zero rows [u, D].
        batch: Examples B.
        shape: The whole gradient's shape, (V, D).
    """
    own = Statistics(batch, shape[0] * shape[1], rows.device)
    own.squares.index_add_(0, example, torch.linalg.vector_norm(rows, dim=1).double().square())
    own.total.index_add_(0, example, rows.sum(1).double())
    own.largest.zero_().scatter_reduce_(0, example, rows.amax(1).double(), "amax")
    own.smallest.zero_().scatter_reduce_(0, example, rows.amin(1).double(), "amin")
    full = torch.bincount(example, minlength=batch) == shape[0]
    for z in full.nonzero()[:, 0].tolist():  # every row was met: no zeros beside them
        own.largest[z], own.smallest[z] = rows[example == z].max(), rows[example == z].min()
    return own
