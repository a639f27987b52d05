"""Units and batches: examples sorted by length, cut by token cost, so that almost nothing is padding.

A unit is what one process computes, commits and retries; a batch is what fits through the model at once. Both follow from
the lengths and the settings alone, so that every machine makes the same ones, and batches never cross a unit.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from gradsieve.errors import InvalidArgument


def plan_units(lengths: Sequence[int], keys: Sequence[bytes], unit_tokens: int) -> list[np.ndarray]:
    """Returns the units: index arrays int64 into `lengths`, longest examples first, each of about `unit_tokens` tokens.

    Args:
        lengths: Tokens per example.
        keys: A hash per example; equal lengths are ordered by it, so that the order of the input does not matter.
        unit_tokens: A unit is closed once it holds this many.
    """
    if unit_tokens < 1:
        raise InvalidArgument(f"unit_tokens must be at least 1, got {unit_tokens}")
    order = np.array(sorted(range(len(lengths)), key=lambda i: (-lengths[i], keys[i])), dtype=np.int64)
    totals = np.cumsum([lengths[i] for i in order])
    unit = (np.maximum(totals, 1) - 1) // unit_tokens  # the unit in which an example's last token falls
    cuts = np.flatnonzero(np.diff(unit)) + 1
    return np.split(order, cuts) if len(order) else []


def batches(lengths: Sequence[int], batch_tokens: int) -> Iterator[slice]:
    """Yields runs of examples (in the given order, longest first) whose padded size stays within `batch_tokens`.

    An example longer than `batch_tokens` is a batch of its own.
    """
    start = 0
    while start < len(lengths):
        count = max(1, batch_tokens // max(1, lengths[start]))
        yield slice(start, min(start + count, len(lengths)))
        start += count


def pad(rows: Sequence[np.ndarray], value: int) -> Tensor:
    """Returns the rows as one int64 matrix [B, T], padded on the right with `value`."""
    matrix = np.full((len(rows), max(len(row) for row in rows)), value, dtype=np.int64)
    for target, row in zip(matrix, rows, strict=True):
        target[: len(row)] = row
    return torch.from_numpy(matrix)
