"""Which examples each optimizer step sees: drawn up before the first step, from the recipe and the numbers of examples alone.

Rows of a plan count through the data, then the replay examples, then the anchor: one numbering for all three.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

import torch

from gradsieve.errors import InvalidArgument
from gradsieve.train.recipe import Recipe


@dataclass(frozen=True, slots=True)
class Step:
    """One optimizer step.

    Attributes:
        rows: Examples it trains on: first those of the data, then those replayed.
        anchors: Anchor examples whose gradient the surgery protects.
        epoch: Passes over the data that are complete after it, as a fraction.
    """

    rows: tuple[int, ...]
    anchors: tuple[int, ...]
    epoch: float


def make_plan(recipe: Recipe, data: int, replay: int = 0, anchors: int = 0) -> list[Step]:
    """Returns all steps of a run.

    By epochs, each pass ends with a batch of what is left; by steps, every batch is full and runs across the ends of passes.
    Replayed and anchor examples are drawn without replacement until all had their turn, then anew.

    Args:
        recipe: Batch, length, order, shares and seed.
        data: Examples to train on, at least 1.
        replay: Examples to replay.
        anchors: Anchor examples.

    Raises:
        InvalidArgument: The recipe draws from a set without examples.
    """
    seeds = torch.randint(2**62, (3,), generator=torch.Generator().manual_seed(recipe.seed)).tolist()
    rows = _endless(range(data), seeds[0], shuffled=recipe.order == "shuffled")
    replayed = _endless(range(data, data + replay), seeds[1])
    anchored = _endless(range(data + replay, data + replay + anchors), seeds[2])
    per_step = (recipe.anchor_batch or recipe.batch) if recipe.surgery != "none" else 0
    plan, seen = [], 0
    for own in _sizes(recipe, data):
        seen += own
        mixed = round(own * recipe.replayed / (recipe.batch - recipe.replayed))
        mine = _take(rows, own, "data") + _take(replayed, mixed, "replay")
        plan.append(Step(mine, _take(anchored, per_step, "anchors"), seen / data))
    return plan


def epoch_ends(plan: Sequence[Step]) -> list[int]:
    """Returns the numbers (from 1) of the steps after which a pass over the data has become complete, and of the last step."""
    ends, complete = [], 0
    for number, step in enumerate(plan, 1):
        if math.floor(step.epoch + 1e-9) > complete or number == len(plan):
            complete = math.floor(step.epoch + 1e-9)
            ends.append(number)
    return ends


def micro_batches(rows: Sequence[int], lengths: Sequence[int], size: int) -> list[tuple[int, ...]]:
    """Returns the rows cut into groups of at most `size`, longest first, so that little is padding.

    The sum over a step does not depend on the cut.
    """
    ordered = sorted(rows, key=lambda row: (-lengths[row], row))
    return [tuple(ordered[i : i + size]) for i in range(0, len(ordered), size)]


def _sizes(recipe: Recipe, data: int) -> Iterator[int]:
    """Yields the number of examples of the data in each step."""
    own = recipe.batch - recipe.replayed
    if recipe.passes is None:
        assert recipe.steps is not None
        yield from (own for _ in range(recipe.steps))
        return
    for _ in range(recipe.passes):
        yield from (min(own, data - start) for start in range(0, data, own))


def _endless(rows: range, seed: int, shuffled: bool = True) -> Iterator[int]:
    """Yields the rows pass after pass, in a new order each time if shuffled."""
    generator = torch.Generator().manual_seed(seed)
    while rows:
        order = torch.randperm(len(rows), generator=generator).tolist() if shuffled else range(len(rows))
        yield from (rows[i] for i in order)


def _take(rows: Iterator[int], count: int, name: str) -> tuple[int, ...]:
    taken = tuple(islice(rows, count))
    if len(taken) < count:
        raise InvalidArgument(f"{name} must be at least 1 where the recipe draws {count} for a step, got 0; change the recipe")
    return taken
