"""One layer's per-example gradient from its input a [B, T, d_in] and output gradient b [B, T, d_out]: G_z = Σ_t b_t a_tᵀ.

Every function here is plain algebra on tensors; which is called when is the engine's business.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.func import functional_call, vjp, vmap

from gradsieve.gradients.statistics import Statistics

TILE_FLOATS = 1 << 19  # a product of this many numbers stays in a core's second-level cache


class Memory(Protocol):
    """Gives reused memory of a shape."""

    def buffer(self, shape: tuple[int, int, int], dtype: torch.dtype) -> Tensor: ...


def product(a: Tensor, b: Tensor, memory: Memory) -> Tensor:
    """Returns the per-example gradients themselves, [B, d_out, d_in], valid until the next call with this memory."""
    return torch.bmm(b.mT, a, out=memory.buffer((len(a), b.shape[2], a.shape[2]), a.dtype)).to(
        torch.promote_types(a.dtype, torch.float32)
    )


def squared_norm_by_gram(a_gram: Tensor, b: Tensor) -> Tensor:
    """Returns ‖G_z‖² = Σ_{t,t'} (a_t·a_t')(b_t·b_t') without forming G; float64 [B].

    Args:
        a_gram: a aᵀ, [B, T, T]; layers that share an input share it.
        b: Output gradient [B, T, d_out].
    """
    return (a_gram * torch.bmm(b, b.transpose(1, 2))).sum((1, 2), dtype=torch.float64)


def gram_is_cheaper(length: int, d_out: int, d_in: int, sharers: int = 1) -> bool:
    """Says whether Gram matrices over T need fewer multiplications than G; `sharers` layers split the input's Gram."""
    return length * (d_out + d_in / sharers) < d_out * d_in


def squared_norm(G: Tensor) -> Tensor:
    """Returns the sum of squares per example of G [B, …]: float64 [B]; rows are summed first, which keeps float32 digits."""
    flat = G.reshape(len(G), -1)
    width = G.shape[-1]
    return flat.square().view(len(G), -1, width).sum(2).sum(1, dtype=torch.float64)


def embedding_rows(ids: Tensor, b: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the non-zero rows of the embedding's per-example gradients: Σ of b over equal tokens of one example.

    Args:
        ids: Token ids [B, T].
        b: Gradient at the embedding's output [B, T, D].

    Returns:
        example int64 [u], token int64 [u], and the row gradient [u, D] of each distinct (example, token).
    """
    B, T = ids.shape
    key = ids + torch.arange(B, device=ids.device)[:, None] * (int(ids.max()) + 1)
    distinct, inverse = key.flatten().unique(return_inverse=True)
    rows = b.new_zeros(len(distinct), b.shape[-1], dtype=torch.promote_types(b.dtype, torch.float32))
    rows.index_add_(0, inverse, b.reshape(B * T, -1).to(rows.dtype))
    span = int(ids.max()) + 1
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
    own.squares.index_add_(0, example, rows.square().sum(1, dtype=torch.float64))
    own.total.index_add_(0, example, rows.sum(1, dtype=torch.float64))
    own.largest.zero_().scatter_reduce_(0, example, rows.amax(1).double(), "amax")
    own.smallest.zero_().scatter_reduce_(0, example, rows.amin(1).double(), "amin")
    full = torch.bincount(example, minlength=batch) == shape[0]
    if full.any():  # every row was met: no zeros beside them
        for z in full.nonzero()[:, 0].tolist():
            own.largest[z], own.smallest[z] = rows[example == z].max(), rows[example == z].min()
    return own


def extremes(G: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the smallest and the largest entry per example of G [B, d_out, d_in], [B] each."""
    return G.flatten(1).aminmax(dim=1)


def module_gradients(module: nn.Module, names: list[str], a: Tensor, b: Tensor) -> list[Tensor]:
    """Returns the per-example gradients of a small module's own vectors, [B, n] each, by running it again per example.

    For layers whose rule depends on the architecture (RMSNorm with weight w or 1 + w, LayerNorm): vmap over vjp.

    Args:
        module: A normalisation layer.
        names: Its parameters' names.
        a: Input [B, …].
        b: Output gradient [B, …].
    """
    parameters = {name: module.get_parameter(name).detach() for name in names}

    def one(x: Tensor, gradient: Tensor) -> dict[str, Tensor]:
        pull: Any = vjp(lambda values: functional_call(module, values, (x,)), parameters)[1]
        gradients: dict[str, Tensor] = pull(gradient)[0]
        return gradients

    result = vmap(one)(a.detach(), b)
    return [result[name] for name in names]
