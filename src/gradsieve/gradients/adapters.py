"""Plain LoRA layers, run in fewer steps: y = W x + s B A x in two products that need no memory between them.

PEFT makes B A x, its multiple by s and the sum one after the other, each as large as the layer's output; while the engine is
open the last product is added to the first as it is made. The factor s goes into A x, which is so much smaller.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True, slots=True)
class Adapter:
    """The parts of a layer y = W x + bias + s B A x.

    Attributes:
        base: W and its bias.
        down: A.
        up: B.
        scaling: s.
    """

    base: nn.Linear
    down: nn.Linear
    up: nn.Linear
    scaling: float

    @classmethod
    def of(cls, module: Any) -> Adapter | None:
        """Returns the parts of a LoRA layer that does nothing else, or None for any other module."""
        if (type(module).__module__, type(module).__name__) != ("peft.tuners.lora.layer", "Linear"):
            return None
        names = [name for name in module.active_adapters if name in module.lora_A]
        if module.merged or module.disable_adapters or len(names) != 1 or names[0] in module.lora_variant:
            return None
        (name,) = names
        base, down, up = module.base_layer, module.lora_A[name], module.lora_B[name]
        plain = type(base) is nn.Linear and down.bias is None and up.bias is None
        same = len({part.weight.dtype for part in (base, down, up)}) == 1
        return cls(base, down, up, module.scaling[name]) if plain and same else None

    def output(self, x: Tensor, scaled: Tensor) -> Tensor:
        """Returns y from x [..., d_in] and s A x [..., r]."""
        y: Tensor = _Sum.apply(x, scaled, self.base.weight, self.base.bias, self.up.weight)
        return y


class _Sum(torch.autograd.Function):
    """x Wᵀ + bias + u Bᵀ, with gradients for x and u only."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, u: Tensor, W: Tensor, bias: Tensor | None, B: Tensor) -> Tensor:
        ctx.save_for_backward(W, B)
        y = nn.functional.linear(x, W, bias)
        y.view(-1, y.shape[-1]).addmm_(u.reshape(-1, u.shape[-1]), B.T)
        return y

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, None]:
        W, B = ctx.saved_tensors
        needs_x, needs_u = ctx.needs_input_grad[:2]
        return gradient @ W if needs_x else None, gradient @ B if needs_u else None, None, None, None
