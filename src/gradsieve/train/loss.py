"""The loss that is trained on: the one whose gradients are taken by default, each example's mean over its completion tokens."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from gradsieve.data import IGNORE


def example_losses(model: Any, input_ids: Tensor, attention_mask: Tensor, labels: Tensor) -> Tensor:
    """Returns the mean negative log-likelihood of each example's completion tokens, [B] in float32 (float64 for such a model).

        l(z) = -(1/T_z) sum_t log p(y_t | y_<t)

    The LM head is applied to the T_z supervised positions only: logits of other positions are never made.

    Args:
        model: A causal language model of transformers, plain, with adapters, or wrapped for several processes.
        input_ids: int64 [B, T], padded on the right.
        attention_mask: 1 on tokens, 0 on padding, [B, T].
        labels: int64 [B, T], IGNORE where nothing is learned; each row has at least one other after its first token.
    """
    supervised = torch.zeros_like(labels, dtype=torch.bool)
    supervised[:, :-1] = labels[:, 1:] != IGNORE  # position t predicts token t + 1

    def only_supervised(_: Any, hidden: tuple[Tensor]) -> tuple[Tensor]:
        return (hidden[0][supervised],)

    inner = model.module if hasattr(model, "module") else model
    hook = inner.get_output_embeddings().register_forward_pre_hook(only_supervised)
    try:
        logits = model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).logits
    finally:
        hook.remove()
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    losses = torch.nn.functional.cross_entropy(logits, labels[:, 1:][supervised[:, :-1]], reduction="none")
    rows = supervised.nonzero()[:, 0]
    return losses.new_zeros(len(labels)).index_add(0, rows, losses) / supervised.sum(1)
