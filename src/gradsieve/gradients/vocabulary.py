"""Exact statistics of one example's LM-head gradient G = eᵀh [V, D] that never hold it.

The norm comes from a Gram matrix over the example's positions, or for long ones from the products, tile by tile. The extremes
come from few rows: |G_vd| ≤ Σ_t |e_tv| max_d|h_td|, and all but a few hundred tokens of the vocabulary have a bound below an
entry that was already found.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from gradsieve.gradients.head import Errors

FIRST_ROWS = 256  # rows with the largest bounds, looked at first
ROWS_AT_ONCE = 4096


def squared_norm_and_total(h: Tensor, errors: Errors, tiles: Iterable[slice]) -> tuple[Tensor, Tensor]:
    """Returns (‖G‖², Σ G), float64 scalars.

    Args:
        h: Weighted hidden states [T, D].
        errors: The example's errors by part of the vocabulary.
        tiles: Ranges that make up the vocabulary.
    """
    T, D = h.shape
    gram = h.new_zeros(T, T, dtype=torch.promote_types(h.dtype, torch.float32))
    squares, sums = h.new_zeros((), dtype=torch.float64), h.new_zeros(T, dtype=torch.float64)
    for part in tiles:
        e = errors(part)
        if T < D:
            gram += e @ e.T
        else:  # products of so many positions are cheaper than their Gram matrix
            squares += torch.linalg.vector_norm(e.T @ h, dim=1).double().square().sum()
        sums += e.sum(1)
    squares += (gram * (h @ h.T)).sum(1).sum(dtype=torch.float64)
    return squares, sums @ h.sum(1).double()


def extremes(h: Tensor, errors: Errors, tiles: Iterable[slice]) -> tuple[Tensor, Tensor]:
    """Returns the smallest and the largest entry of G, scalars."""
    reach = h.abs().amax(1)[None]
    bound = torch.cat([(reach @ errors(part).abs())[0] for part in tiles]).float()
    first = bound.topk(min(FIRST_ROWS, len(bound))).indices
    smallest, largest = (errors(first).T @ h).aminmax()
    # An entry beyond both extremes found so far needs a bound beyond the nearer one; the bound itself is rounded.
    margin = 1 + 8 * torch.finfo(h.dtype).eps
    rest = bound * margin > torch.minimum(largest, -smallest)
    rest[first] = False
    for rows in rest.nonzero()[:, 0].split(ROWS_AT_ONCE) if rest.any() else ():
        low, high = (errors(rows).T @ h).aminmax()
        smallest, largest = torch.minimum(smallest, low), torch.maximum(largest, high)
    return smallest, largest
