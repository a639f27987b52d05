"""What the engine is compared with: the floor, a training step, a loop with batch size 1; and the model and batches of all."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from gradsieve.compute import BATCH_TOKENS
from gradsieve.gradients.directions import References, UnitDirection
from gradsieve.gradients.engine import GradientEngine
from gradsieve.gradients.parameters import choose_parameters
from gradsieve.gradients.settings import Batch, EngineSettings
from gradsieve.gradients.wide import mean_sketch, wide_settings
from measuring import Run

EVERYTHING = "linear,embedding,lm-head"


# -- model and data ----------------------------------------------------------------------------------------------------


def load(source: str, layers: int | None, dtype: torch.dtype, device: str) -> Any:
    """The model, in training mode; `demo` is the demo's, `layers` keeps only the first so many."""
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    if source == "demo":
        from gradsieve.demo.model import demo_model_dir

        source = str(demo_model_dir())
    model = AutoModelForCausalLM.from_pretrained(source, dtype=dtype, **({"num_hidden_layers": layers} if layers else {}))
    return model.to(device).train()


def draw_batches(shape: str, vocabulary: int, device: str) -> list[Batch]:
    """Batches of random tokens: `8x128` is 8 examples of 128 tokens; `lognormal` 24 sorted examples of mean length 149."""
    rng = torch.Generator().manual_seed(0)
    if shape == "lognormal":
        drawn = (torch.randn(24, generator=rng) * 0.7 + math.log(149) - 0.7**2 / 2).exp()
        lengths = sorted(int(x) for x in drawn.clamp(16, 512))
    else:
        count, length = (int(part) for part in shape.split("x"))
        lengths = [length] * count
    batches, members = [], list[int]()
    for length in lengths:
        if members and length * (len(members) + 1) > max(BATCH_TOKENS, lengths[0]):
            batches.append(fill(members, vocabulary, rng, device))
            members = []
        members.append(length)
    return [*batches, fill(members, vocabulary, rng, device)]


def fill(lengths: Sequence[int], vocabulary: int, rng: torch.Generator, device: str) -> Batch:
    """One batch of random tokens, padded on the right; the first half of each example is prompt."""
    ids = torch.zeros(len(lengths), max(lengths), dtype=torch.int64)
    labels = torch.full_like(ids, -100)
    for z, length in enumerate(lengths):
        ids[z, :length] = torch.randint(5, vocabulary, (length,), generator=rng)
        labels[z, length // 2 : length] = ids[z, length // 2 : length]
    return Batch(ids.to(device), labels.to(device))


def examples_of(batches: Sequence[Batch]) -> list[Batch]:
    """Every example on its own, without padding."""
    singles = []
    for batch in batches:
        for ids, labels in zip(batch.input_ids, batch.labels, strict=True):
            length = int((labels != -100).nonzero()[-1]) + 1
            singles.append(Batch(ids[None, :length], labels[None, :length]))
    return singles


def lora_of(model: Any) -> Any:
    """The model with adapters on every linear layer, B away from its zero start."""
    from peft import LoraConfig, get_peft_model

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        adapted = get_peft_model(copy.deepcopy(model), LoraConfig(r=16, lora_alpha=32, target_modules="all-linear"))
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.02)
    return adapted


def reference_batches(model: Any) -> list[Batch]:
    """What the reference directions are mean gradients of: two short random examples each."""
    rng = torch.Generator().manual_seed(2)
    vocabulary, device = model.get_output_embeddings().weight.shape[0], str(model.device)
    return [fill([32, 32], vocabulary, rng, device) for _ in range(4)]


def draw_references(model: Any) -> tuple[References, References]:
    """One, and four reference directions over the linear layers."""
    with GradientEngine(model, EngineSettings("linear")) as engine:
        means = {f"r{i}": engine.mean_gradient([batch]) for i, batch in enumerate(reference_batches(model))}
    stack = References.stack(means)
    first = {name: tensor[:1] for name, tensor in stack.tensors.items()}
    return References(("r0",), first, {"r0": stack.facts["r0"]}), stack


def draw_wide_references(model: Any) -> References:
    """The four as wide sketches, for where full gradients do not fit."""
    settings = wide_settings(EngineSettings("linear"))
    with GradientEngine(model, settings) as engine:
        means = {f"r{i}": mean_sketch([engine.block(batch)]) for i, batch in enumerate(reference_batches(model))}
    return References.of_units({name: UnitDirection.of(name, mean) for name, mean in means.items()}, settings.sketch)


# -- the ways ----------------------------------------------------------------------------------------------------------


def floor(model: Any, batch: Batch) -> None:
    """Forward and activation-only backward: no weight gradients, no logits of prompt positions."""
    model.requires_grad_(False)
    hook = model.get_input_embeddings().register_forward_hook(lambda module, args, output: output.requires_grad_(True))
    hidden = model.base_model(input_ids=batch.input_ids, use_cache=False)[0]
    hook.remove()
    example, position = (batch.labels[:, 1:] != -100).nonzero(as_tuple=True)
    target = batch.labels[:, 1:][example, position]
    gradient = torch.zeros_like(hidden)
    weight = model.get_output_embeddings().weight
    for first in range(0, len(target), 256):
        run = slice(first, first + 256)
        logits = hidden.detach()[example[run], position[run]] @ weight.T
        for part, right in zip(logits.split(8), target[run].split(8), strict=True):  # eight rows stay in the cache
            error = part.float().log_softmax(1).exp_() if part.dtype == torch.bfloat16 else part.log_softmax(1).exp_()
            part.copy_(error.scatter_add_(1, right[:, None], torch.full_like(error[:, :1], -1)))
        gradient[example[run], position[run]] = logits @ weight
    hidden.backward(gradient)


def plain_step(model: Any, batch: Batch) -> None:
    """An ordinary training step without its optimizer."""
    model(input_ids=batch.input_ids, labels=batch.labels, use_cache=False).loss.backward()
    model.zero_grad(set_to_none=True)


def less_style(model: Any, singles: Sequence[Batch], dim: int = 1024) -> None:
    """One full gradient per example, then a projection as cheap as can be: one pass over it."""
    weights = list({id(site.parameter): site.parameter for site in choose_parameters(model, EVERYTHING)}.values())
    signs = torch.randint(0, 2, (max(w.numel() for w in weights) // dim + 1,), device=weights[0].device)
    signs = signs.to(weights[0].dtype).mul_(2).sub_(1)
    for single in singles:
        model(input_ids=single.input_ids, labels=single.labels, use_cache=False).loss.backward()
        sketch = torch.zeros(dim, dtype=weights[0].dtype, device=weights[0].device)
        for w in weights:
            assert w.grad is not None
            whole = w.numel() // dim
            sketch += signs[:whole] @ w.grad.flatten()[: whole * dim].view(whole, dim)
        model.zero_grad(set_to_none=True)


def all_batches(step: Callable[[Batch], object], batches: Sequence[Batch]) -> Run:
    """All batches, one after the other."""

    def run() -> None:
        for batch in batches:
            step(batch)

    return run


def trainable(run: Run, module: nn.Module, adapters: bool = False) -> Run:
    """Makes the parameters trainable first: other rows leave them frozen."""

    def prepared() -> None:
        for name, parameter in module.named_parameters():
            parameter.requires_grad_(not adapters or "lora_" in name)
        run()

    return prepared
