"""Fused experts: the layers of a mixture-of-experts model whose experts share one 3-D weight, [E, d_out, d_in].

transformers has several ways to run them, none of which shows what each expert read. While the engine is open it runs them
here: tokens sorted by expert, one product per expert, the same numbers. An expert's gradient at an example is Σ b aᵀ over the
example's tokens that were routed to it; the E gradients stacked are the gradient of the weight, [E·d_out, d_in].
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from gradsieve.errors import ModelError
from gradsieve.gradients.readings import Routing

Watch = Callable[[str, Tensor, Tensor, Routing], Tensor]
"""(parameter, input [S, d_in], output [S, d_out], routing) → the output to go on with"""


def run(module: Any, hidden: Tensor, index: Tensor, scores: Tensor, rows: int, watch: Watch) -> Tensor:
    """Returns a fused experts layer's output, showing `watch` every product on the way.

    Args:
        module: The layer.
        hidden: Tokens [B·T, D], example by example.
        index: Experts of each token, int64 [B·T, K].
        scores: Their weights, [B·T, K].
        rows: Examples B.
        watch: Called after the product with each weight.
    """
    if module._is_expert_parallel or len(index) % rows:
        raise ModelError(
            f"{type(module).__name__} must see every token of the batch on one device, got {len(index)} of {rows} examples; "
            "load the model without expert parallelism"
        )
    tokens, K = index.shape
    expert, order = index.flatten().sort(stable=True)
    token = order // K
    routing = Routing(token // (tokens // rows), torch.bincount(expert, minlength=module.num_experts).tolist())
    first = "gate_up_proj" if module.has_gate else "up_proj"
    x = _linear(module, first, hidden.reshape(tokens, -1)[token], routing, watch)
    x = _linear(module, "down_proj", module._apply_gate(x) if module.has_gate else module.act_fn(x), routing, watch)
    if getattr(module, "has_post_expert_norm", False):
        x = module.post_expert_norm(x)
    x = x * scores.flatten()[order, None]
    back = torch.empty_like(order)
    back[order] = torch.arange(len(order), device=order.device)
    return x[back].view(tokens, K, -1).sum(1).to(hidden.dtype).view_as(hidden)


def _linear(module: Any, name: str, x: Tensor, routing: Routing, watch: Watch) -> Tensor:
    weight = getattr(module, name)
    bias = getattr(module, f"{name}_bias") if module.has_bias else None
    parts = []
    for e, rows in enumerate(x.split(routing.counts)):
        if len(rows):
            W = weight[e].T if module.is_transposed else weight[e]
            parts.append(nn.functional.linear(rows, W, None if bias is None else bias[e]))
    return watch(name, x, torch.cat(parts), routing)


def padded(rows: Tensor, example: Tensor, counts: Tensor) -> Tensor:
    """Returns one expert's rows [S_e, d] by example, [B, T_e, d], filled with zeros.

    Args:
        rows: In ascending order of example.
        example: int64 [S_e].
        counts: Rows per example, int64 [B].
    """
    starts = counts.cumsum(0) - counts
    place = torch.arange(len(rows), device=rows.device) - starts[example]
    out = rows.new_zeros(len(counts), int(counts.max()), rows.shape[1])
    out[example, place] = rows
    return out
