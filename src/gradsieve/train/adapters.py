"""LoRA adapters as every run here has them: on all linear layers but the LM head."""

from __future__ import annotations

from typing import Any

from torch import nn


def lora_config(model: nn.Module, rank: int, alpha: float, dropout: float = 0.0) -> Any:
    """Returns peft's settings of the adapters of a model.

    Args:
        model: Gets the adapters; tells whether its layers keep their weights transposed (GPT-2).
        rank: Of the adapters.
        alpha: Their scale: updates are multiplied by alpha / rank.
        dropout: Before the adapters.
    """
    from peft import LoraConfig
    from transformers.pytorch_utils import Conv1D

    return LoraConfig(
        task_type="CAUSAL_LM",
        r=rank,
        lora_alpha=alpha,
        lora_dropout=dropout,
        target_modules="all-linear",
        fan_in_fan_out=any(isinstance(module, Conv1D) for module in model.modules()),
    )
