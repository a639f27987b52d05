"""What a run is asked for: data, model, and how gradients are taken."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from gradsieve.compute import REFERENCE_MEMORY
from gradsieve.data import Format
from gradsieve.data.corrupt import How
from gradsieve.data.dedup import THRESHOLD, Dedup
from gradsieve.errors import InvalidArgument
from gradsieve.models import DType
from gradsieve.types import SEEDS, Example

Data = str | Path | Sequence[str | Path] | Sequence[Example]


@dataclass(frozen=True)
class Job:
    """What to choose from, with which model, and how gradients are taken. The method has its own settings.

    Attributes:
        model: Folder of a causal language model, hub id, or `demo` (SmolLM2-135M-Instruct out of an installed package).
        pool: Files to choose from: JSONL (.gz), JSON, Parquet, Arrow, a saved dataset folder; or `demo`.
        budget: How much to choose: 500 (examples), 5% (of the usable pool) or 200000tok (tokens).
        target: Files with examples of the ability you want; or `demo`.
        anchor: Files with general examples that must not be forgotten, or `demo`. Each names its category in a field; where
            there are several files, those that name none have their file's name as category.
        replay: Files with general examples that ogs may draw too, in clusters of their own.
        navigator: A smaller model of the same family that does the scoring in the place of `model`, which is then only what
            will be trained; `gradsieve transfer` says whether it may.
        navigator_rate: Learning rate of the Navigator's steps, for ogs with fidelity navigator.
        navigator_warmup: Steps on random examples that every episode of the Navigator starts after.
        corrupted: Files with your own wrong copies of anchor or target examples, under the same ids, for contrasts.
        corruption: How wrong copies are made where `corrupted` has none; auto decides per category.
        format: Shape of the examples: messages, prompt-completion, alpaca, sharegpt; auto looks.
        category_field: Field that names the ability an example of anchor or target stands for.
        chat_template: File with a Jinja chat template to use in place of the model's own.
        max_length: Tokens per example; the rest is cut off at the end, as TRL does.
        params: Parameters the gradient is taken over: auto, linear, lora, last:N, lm-head, embedding, vectors, all,
            re:PATTERN, or several with commas.
        dim: Sketch size, numbers per example.
        reduction: Loss of an example: mean or sum over its completion tokens.
        dtype: Compute type; auto is bfloat16 where the hardware has it, else float32.
        device: auto, cpu, cuda, cuda:N.
        batch_tokens: Tokens in one batch, or auto to find a good number by trying; what does not fit in memory is split.
        checkpointing: Make activations again in the backward pass in place of keeping them: less memory, a third more time.
        reference_memory: MiB that full gradients of the references may take; above it, products with them are estimated
            from wide sketches.
        unit_tokens: Tokens in one shard of the store: what a kill can cost at most.
        dedup: Leave out, before anything else, examples of the pool that repeat another one: off; exact (the same text); near
            (nearly the same words). The one with the smallest id stays.
        dedup_threshold: How like near-duplicates are at least: share of runs of 4 letters that they have in common, rare ones
            counting more, in (0, 1].
        seed: Seed of everything random, below 2**32.
        store: Folder for gradients, shared by runs with the same settings; by default `store` inside the output folder, or,
            without one, a folder of the cache (`$GRADSIEVE_CACHE`, `~/.cache/gradsieve`).
        warmup_recipe: YAML file with the recipe of a method's warm-up (batch, learning rate, rank, …); see `gradsieve.train`.
        trust_remote_code: Let the tokenizer run code that comes with it.
    """

    model: str = ""
    pool: tuple[str, ...] = ()
    budget: str = "5%"
    target: tuple[str, ...] = ()
    anchor: tuple[str, ...] = ()
    replay: tuple[str, ...] = ()
    navigator: str | None = None
    navigator_rate: float = 2e-4
    navigator_warmup: int = 0
    corrupted: tuple[str, ...] = ()
    corruption: How = "auto"
    format: Format = "auto"
    category_field: str = "category"
    chat_template: str | None = None
    max_length: int = 1024
    params: str = "auto"
    dim: int = 1024
    reduction: Literal["mean", "sum"] = "mean"
    dtype: DType = "auto"
    device: str = "auto"
    batch_tokens: int | Literal["auto"] = 1024
    checkpointing: bool = False
    reference_memory: int = REFERENCE_MEMORY
    unit_tokens: int = 8192
    dedup: Dedup = "off"
    dedup_threshold: float = THRESHOLD
    seed: int = 0
    store: str | None = None
    warmup_recipe: str | None = None
    trust_remote_code: bool = False

    def __post_init__(self) -> None:
        if not 0 <= self.seed < SEEDS:
            raise InvalidArgument(f"seed must lie in [0, {SEEDS}), got {self.seed}")


def file_names(data: Data) -> tuple[str, ...]:
    """Returns the names of files among what was given.

    Raises:
        InvalidArgument: Something is neither a file nor an `Example`.
    """
    if isinstance(data, str | Path):
        return (str(data),)
    strange = [type(part).__name__ for part in data if not isinstance(part, str | Path | Example)]
    if strange:
        raise InvalidArgument(f"data must be files or gradsieve.Example objects, got {strange[0]}; write rows to a JSONL file")
    return tuple(str(part) for part in data if not isinstance(part, Example))
