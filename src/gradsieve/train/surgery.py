"""Gradient surgery: what is done, while training, to a step's gradient that opposes the gradient of an anchor.

A gradient is a list of tensors, one per trained parameter; products and norms are those of the whole list, in float64.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from gradsieve.train.recipe import Surgery

Gradient = Sequence[Tensor]


def dot(a: Gradient, b: Gradient) -> Tensor:
    """Returns <a, b>, float64 []."""
    return torch.stack([(x * y).sum(dtype=torch.float64) for x, y in zip(a, b, strict=True)]).sum()


def agem(gradient: Gradient, anchor: Gradient) -> list[Tensor]:
    """Returns the nearest gradient that does not oppose the anchor's.

        g - (<g, r> / <r, r>) r   where <g, r> < 0, else g

    A-GEM: Chaudhry et al. (2019), arXiv:1812.00420, Eq. 11. To first order a step along it raises no mean anchor loss.

    Args:
        gradient: g, of the step's batch.
        anchor: r, of the anchor examples.
    """
    product = dot(gradient, anchor)
    return _minus(gradient, product / dot(anchor, anchor), anchor) if product < 0 else list(gradient)


def pcgrad(gradient: Gradient, anchor: Gradient) -> list[Tensor]:
    """Returns the sum of both gradients, each freed of its part that opposes the other.

        (g - (<g, r> / <r, r>) r) + (r - (<g, r> / <g, g>) g)   where <g, r> < 0, else g + r

    PCGrad: Yu et al. (2020), arXiv:2001.06782, Alg. 1, for two tasks: the anchor is learned too, not only protected.

    Args:
        gradient: g, of the step's batch.
        anchor: r, of the anchor examples.
    """
    product = dot(gradient, anchor)
    if product >= 0:
        return [g + r for g, r in zip(gradient, anchor, strict=True)]
    freed = _minus(gradient, product / dot(anchor, anchor), anchor)
    return [x + y for x, y in zip(freed, _minus(anchor, product / dot(gradient, gradient), gradient), strict=True)]


OPERATIONS: Mapping[Surgery, Callable[[Gradient, Gradient], list[Tensor]]] = {"agem": agem, "pcgrad": pcgrad}


def _minus(a: Gradient, scale: Tensor, b: Gradient) -> list[Tensor]:
    return [x - scale.to(x.dtype) * y for x, y in zip(a, b, strict=True)]
