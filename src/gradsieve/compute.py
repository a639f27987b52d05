"""How gradients are computed: what is taken, in which type, where, in batches of what size."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch

from gradsieve.data import IGNORE, Tokens
from gradsieve.data.batches import batches, pad
from gradsieve.errors import InvalidArgument
from gradsieve.gradients.parameters import chosen_size
from gradsieve.gradients.settings import Batch, EngineSettings
from gradsieve.gradients.wide import DIM
from gradsieve.models import ModelSource

Form = Literal["exact", "wide sketch"]
REFERENCE_MEMORY = 8192  # MiB
BATCH_TOKENS = 1024


@dataclass(frozen=True, slots=True)
class ComputeSettings:
    """How gradients are computed.

    Attributes:
        engine: What is taken from each example.
        dtype: Compute type.
        device: Where.
        max_length: Tokens per example, the rest is cut off at the end.
        batch_tokens: Padded tokens in one batch; changes a row by rounding only, so it is no part of a store's fingerprint.
        unit_tokens: Tokens in one shard.
        checkpointing: Whether activations are made again in the backward pass in place of being kept; likewise.
        reference_memory: MiB that full gradients of the references may take; above it they are wide sketches.
        form: Which of the two they are, see `with_form`.
    """

    engine: EngineSettings
    dtype: torch.dtype
    device: str
    max_length: int
    batch_tokens: int = BATCH_TOKENS
    unit_tokens: int = 8192
    checkpointing: bool = False
    reference_memory: int = REFERENCE_MEMORY
    form: Form = "exact"

    def __post_init__(self) -> None:
        for name, least in (("batch_tokens", 1), ("unit_tokens", 1), ("max_length", 1), ("reference_memory", 0)):
            if getattr(self, name) < least:
                raise InvalidArgument(f"{name} must be at least {least}, got {getattr(self, name)}")


def with_form(model: ModelSource, compute: ComputeSettings, count: int) -> ComputeSettings:
    """Returns the settings with products with `count` references exact where their full gradients fit, else by wide sketches.

    It is decided from the model's shapes alone, before it is loaded and the same on every machine.
    """
    fits = not count or _reference_bytes(model, compute, count) <= compute.reference_memory << 20
    return replace(compute, form="exact" if fits else "wide sketch")


def _reference_bytes(model: ModelSource, compute: ComputeSettings, count: int) -> int:
    return chosen_size(model.skeleton(), compute.engine.params) * compute.dtype.itemsize * count


def form_note(model: ModelSource, compute: ComputeSettings, count: int) -> str:
    """Returns what the user must know where references are wide sketches."""
    size = _reference_bytes(model, compute, count)
    return (
        f"the full gradients of {count} references take {size >> 20} MiB, more than --reference-memory "
        f"{compute.reference_memory}: products with them are estimated from sketches of {DIM} numbers"
    )


def token_batches(tokens: Sequence[Tokens], batch_tokens: int, device: str) -> Iterator[tuple[Batch, int]]:
    """Yields batches of examples that stand longest first, each with its number of tokens without padding."""
    lengths = [len(t.input_ids) for t in tokens]
    for run in batches(lengths, batch_tokens):
        ids, labels = pad([t.input_ids for t in tokens[run]], 0), pad([t.labels for t in tokens[run]], IGNORE)
        yield Batch(ids.to(device), labels.to(device), lengths=torch.tensor(lengths[run], device=device)), sum(lengths[run])
