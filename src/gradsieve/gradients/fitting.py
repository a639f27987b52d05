"""Batches that do not fit in memory are halved and tried again, and it is said so; the numbers stay what they were."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from typing import TypeVar

import torch

from gradsieve.errors import MemoryLimit
from gradsieve.gradients.settings import Batch, Block

log = logging.getLogger(__name__)
Say = Callable[[str], None]
Made = TypeVar("Made")
SIGNS = ("out of memory", "can't allocate memory", "not enough memory")  # CUDA and MPS; the CPU's allocator, on two systems


def ran_out_of_memory(error: BaseException) -> bool:
    """Says whether an error means that memory could not be allocated, on any device."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(sign in str(error).lower() for sign in SIGNS)


class Fitting:
    """Runs batches through an engine, in parts where they do not fit.

    Once a batch has failed, later ones of more than half its size are halved before they are tried.

    Args:
        run: Makes a block of a batch, such as `GradientEngine.block`; must leave nothing behind where it fails.
        say: Is told of every failure.

    Attributes:
        most: Padded tokens that later batches may have; None while all have fitted.
    """

    def __init__(self, run: Callable[[Batch], Block], say: Say = log.warning) -> None:
        self._run, self._say = run, say
        self.most: int | None = None

    def blocks(self, batch: Batch) -> Iterator[Block]:
        """Yields the blocks of a batch, in its order: one, or those of its parts.

        Raises:
            MemoryLimit: A single example does not fit.
        """
        waiting = [batch]
        while waiting:
            part = waiting.pop()
            rows, length = part.input_ids.shape
            if rows > 1 and self.most is not None and rows * length > self.most:
                waiting += reversed(halves(part))
                continue
            block = self._attempt(part)
            if block is not None:
                yield block
                continue
            release(part.input_ids.device)
            waiting += reversed(halves(part))
            self.most = rows * length // 2
            self._say(
                f"a batch of {rows} x {length} tokens did not fit in memory and was split; --batch-tokens {self.most} would "
                "have saved the attempt"
            )

    def _attempt(self, batch: Batch) -> Block | None:
        """Returns a batch's block, or None where it ran out of memory: the traceback, and all it holds, ends here."""
        try:
            return self._run(batch)
        except (RuntimeError, MemoryError) as error:
            if not ran_out_of_memory(error):
                raise
            rows, length = batch.input_ids.shape
            if rows == 1:
                raise too_large(length, error) from None
            return None


def restarted(
    run: Callable[[int], Made], batch_tokens: int, longest: int, device: torch.device, say: Say = log.warning
) -> Made:
    """Returns what `run` makes with batches of at most so many tokens, beginning anew with half as many where they do not fit.

    Args:
        run: Called with a batch size in tokens.
        batch_tokens: The size to begin with.
        longest: Tokens of the longest example: it is a batch of its own whatever the size.
        device: Whose cache is to be emptied.
        say: Is told of every failure.

    Raises:
        MemoryLimit: It does not fit with single examples.
    """
    while True:
        try:
            return run(batch_tokens)
        except (RuntimeError, MemoryError) as error:
            if not ran_out_of_memory(error):
                raise
            if batch_tokens <= longest:
                raise too_large(longest, error) from None
        release(device)
        batch_tokens //= 2
        say(f"batches of the references did not fit in memory; they were begun anew with {batch_tokens} tokens each")


def halves(batch: Batch) -> list[Batch]:
    """Returns the first and the second half of a batch of at least 2 examples."""
    half = len(batch.input_ids) // 2
    whole = (batch.input_ids, batch.labels, batch.scale, batch.position_ids, batch.lengths)
    parts: tuple[slice, slice] = slice(None, half), slice(half, None)
    return [Batch(*(x if x is None else x[part] for x in whole)) for part in parts]  # type: ignore[arg-type]


def release(device: torch.device) -> None:
    """Gives back what a failed attempt has left in the device's cache."""
    empty = getattr(torch.get_device_module(device), "empty_cache", None)
    if empty is not None:
        empty()


def too_large(length: int, error: BaseException) -> MemoryLimit:
    """Returns the error of a single example that does not fit."""
    first = str(error).strip().partition("\n")[0]
    return MemoryLimit(
        f"one example of {length} tokens must fit in memory beside the model, got: {first}; lower --max-length, choose fewer "
        "--params (last:N, lora), switch --checkpointing on, or use --dtype bfloat16"
    )
