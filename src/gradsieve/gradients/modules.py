"""Small modules with a rule of their own: their parameters' per-example gradients by running them again.

Normalisation layers (RMSNorm with weight w or 1 + w, LayerNorm), routers of experts, DoRA's magnitudes: what they compute
depends on the architecture, but running one again for each example is cheap and needs no knowledge of it. It is right where
an example's output depends on that example's input alone, which is tried before it is trusted.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, vjp, vmap

from gradsieve.gradients.readings import Call


def is_norm(module: nn.Module) -> bool:
    """Says whether a module normalises vectors, so that all examples can be run again at once."""
    return "norm" in type(module).__name__.lower() and all(parameter.ndim == 1 for parameter in module.parameters())


def gradients(call: Call, names: Sequence[str], rows: int) -> list[Tensor]:
    """Returns the per-example gradients of a module's own parameters, [B, …] each.

    Args:
        call: A call with its arguments and the gradients of its outputs.
        names: The parameters' names in the module.
        rows: Examples B.
    """
    module = call.module
    parameters = {name: module.get_parameter(name).detach() for name in names}
    (args, kwargs) = call.arguments
    if is_norm(module) and len(args) == 1 and not kwargs and len(args[0]) == rows:
        found = vmap(lambda x, b: _pull(module, parameters, (x,), {}, {0: b}))(args[0].detach(), call.gradients[0])
        return [found[name] for name in names]
    each = []
    for z in range(rows):
        own = {i: part_of(b, z, rows) for i, b in call.gradients.items()}
        each.append(_pull(module, parameters, *_arguments_of(args, kwargs, z, rows), own))
    return [torch.stack([one[name] for one in each]) for name in names]


def is_separable(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Any, rows: int) -> bool:
    """Says whether every example's output follows from that example's input alone, on the batch at hand."""
    outputs = tensors_of(output)
    for z in range(rows):
        own = tensors_of(module.forward(*_arguments_of(args, kwargs, z, rows)[0], **_arguments_of(args, kwargs, z, rows)[1]))
        for i, whole in outputs.items():
            part = part_of(whole, z, rows)
            if i not in own or own[i].shape != part.shape or not torch.allclose(own[i], part, rtol=1e-3, atol=1e-4):
                return False
    return True


def tensors_of(output: Any) -> dict[int, Tensor]:
    """Returns the floating-point tensors of a module's output by their place."""
    items = output if isinstance(output, tuple) else (output,)
    return {i: item for i, item in enumerate(items) if isinstance(item, Tensor) and item.is_floating_point()}


def part_of(x: Tensor, z: int, rows: int) -> Tensor:
    """Returns one example's part of a tensor [B, …] or [B·T, …], with the batch dimension kept."""
    each = len(x) // rows
    return x[z * each : (z + 1) * each]


def _pull(
    module: nn.Module,
    parameters: Mapping[str, Tensor],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    output_gradients: Mapping[int, Tensor],
) -> dict[str, Tensor]:
    def run(values: Mapping[str, Tensor]) -> list[Tensor]:
        outputs = tensors_of(functional_call(module, dict(values), args, dict(kwargs)))
        return [outputs[i] for i in output_gradients]

    pull: Any = vjp(run, dict(parameters))[1]
    found: dict[str, Tensor] = pull([b.detach() for b in output_gradients.values()])[0]
    return found


def _arguments_of(
    args: tuple[Any, ...], kwargs: Mapping[str, Any], z: int, rows: int
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    def own(value: Any) -> Any:
        if isinstance(value, Tensor) and value.ndim and not isinstance(value, nn.Parameter) and len(value) % rows == 0:
            return part_of(value.detach(), z, rows)
        return value

    return tuple(own(value) for value in args), {key: own(value) for key, value in kwargs.items()}
