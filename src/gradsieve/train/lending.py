"""A model is lent to a run: how it is given back as it was."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn


@dataclass(frozen=True, eq=False)
class Before:
    """A model as it was handed in, so that it can be put back, but for the weights of full tuning."""

    model: Any
    modes: Sequence[tuple[nn.Module, bool]]
    checkpoints: bool
    requires: Mapping[str, bool]
    configs: Sequence[tuple[Any, Mapping[str, Any]]]
    attributes: Mapping[str, Any]
    hooks: Mapping[nn.Module, frozenset[int]]

    @classmethod
    def of(cls, model: Any) -> Before:
        """Returns what to put back."""
        return cls(
            model,
            [(module, module.training) for module in model.modules()],
            _checkpoints_activations(model),
            {name: parameter.requires_grad for name, parameter in model.named_parameters()},
            [(part, copy.deepcopy(vars(part))) for part in (model.config, model.generation_config) if part is not None],
            dict(vars(model)),
            {module: frozenset(module._forward_hooks) for module in model.modules()},
        )

    def strip(self) -> None:
        """Takes off what the trainer puts on a model beside adapters: its own forward, tags, checkpointing, hooks."""
        if _checkpoints_activations(self.model) and not self.checkpoints:
            getattr(self.model, "activation_checkpointing_disable", self.model.gradient_checkpointing_disable)()
        for module, known in self.hooks.items():
            for number in set(module._forward_hooks) - known:
                del module._forward_hooks[number]
        for name in set(vars(self.model)) - set(self.attributes) - {"peft_config"}:
            delattr(self.model, name)
        if "forward" in self.attributes:
            self.model.forward = self.attributes["forward"]
        for part, values in self.configs:
            vars(part).update(values)

    def restore(self) -> nn.Module:
        """Takes everything off and returns the model."""
        _take_off_adapters(self.model)
        self.strip()
        for name, parameter in self.model.named_parameters():
            parameter.requires_grad_(self.requires[name])
            parameter.grad = None
        for module, training in self.modes:
            module.training = training
        return self.model  # type: ignore[no-any-return]


def _checkpoints_activations(model: Any) -> bool:
    """transformers renames the property in its version 6, and warns of the old name before that."""
    kind = type(model)
    name = "is_activation_checkpointing" if hasattr(kind, "is_activation_checkpointing") else "is_gradient_checkpointing"
    return bool(getattr(model, name))


def _take_off_adapters(model: Any) -> None:
    """Puts each adapted layer's own layer back in its place."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    for name, module in list(model.named_modules()):
        if isinstance(module, BaseTunerLayer):
            parent, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(parent), leaf, module.get_base_layer())
    if hasattr(model, "peft_config"):
        del model.peft_config
