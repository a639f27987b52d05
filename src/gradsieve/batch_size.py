"""`--batch-tokens auto`: a good batch size for this model on this machine, found by trying real batches.

Larger batches cost less per token until the device is busy; from there on they only cost memory. Sizes are doubled until
that gains nothing, and the smallest that is nearly as fast as the fastest is taken. A row depends on the size by rounding only.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence

import torch

from gradsieve.compute import token_batches
from gradsieve.data import Tokens
from gradsieve.gradients.engine import GradientEngine
from gradsieve.gradients.fitting import ran_out_of_memory, release, too_large
from gradsieve.gradients.settings import Batch

SMALLEST = 256  # tokens
GAIN = 1.05  # a doubling that gains less is the last
ENOUGH = 2.0  # seconds: a trial that took as long is not repeated


def try_sizes(engine: GradientEngine, tokens: Sequence[Tokens], most: int, device: str) -> dict[int, float]:
    """Returns the tokens per second of every batch size that was tried, in tokens.

    It ends with a size that is hardly faster than the one before, that would be larger than `most` or the examples at hand,
    or that does not fit in memory: such a size is not among them. Where the first does not fit, it is halved until one does.

    Args:
        engine: The engine, open.
        tokens: Examples, longest first; a trial takes those at the front, which need the most memory, and those in the middle.
        most: The largest size worth a try: a unit's tokens, which batches never cross.
        device: Where.

    Raises:
        MemoryLimit: A single example does not fit.
    """
    rates: dict[int, float] = {}
    middle, longest = tokens[len(tokens) // 2 :], len(tokens[0].input_ids)
    size, most = SMALLEST, min(most, sum(len(t.input_ids) for t in middle))
    while not rates or (size <= most and not is_flat(rates)):
        try:
            rates[size] = _rate(engine, [next(token_batches(part, size, device)) for part in (tokens, middle)], device)
        except (RuntimeError, MemoryError) as error:
            if not ran_out_of_memory(error):
                raise
            if rates:
                break
            if size <= longest:
                raise too_large(longest, error) from None
            most = size - 1
        if rates:
            size *= 2
        else:
            release(torch.device(device))
            size //= 2
    release(torch.device(device))
    return rates


def is_flat(rates: Mapping[int, float]) -> bool:
    """Says whether the last doubling gained less than `GAIN`."""
    speeds = list(rates.values())
    return len(speeds) > 1 and speeds[-1] < GAIN * speeds[-2]


def best_size(rates: Mapping[int, float]) -> int:
    """Returns the smallest size whose speed is within `GAIN` of the fastest."""
    fastest = max(rates.values())
    return min(size for size, rate in rates.items() if rate * GAIN >= fastest)


def describe(rates: Mapping[int, float]) -> str:
    """Returns what the user is told of the trial."""
    curve = ", ".join(f"{rate:.0f} at {size}" for size, rate in rates.items())
    return f"--batch-tokens auto took {best_size(rates)}; tokens per second by batch size: {curve}"


def _rate(engine: GradientEngine, given: Sequence[tuple[Batch, int]], device: str) -> float:
    """Returns tokens per second, from the faster of two runs unless the first was long enough."""
    seconds = float("inf")
    for _ in range(2):
        start = time.perf_counter()
        for batch, _tokens in given:
            engine.block(batch)
        torch.get_device_module(torch.device(device)).synchronize()
        first, seconds = seconds, min(seconds, time.perf_counter() - start)
        if first == float("inf") and seconds > ENOUGH:
            break
    return sum(count for _, count in given) / seconds
