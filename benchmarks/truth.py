"""How exact the engine is: its numbers on short examples against one float64 `backward()` each."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch

from gradsieve.check import errors_of
from gradsieve.gradients.directions import References
from gradsieve.gradients.engine import GradientEngine
from gradsieve.gradients.loop import Loop
from ways import fill


class Truth:
    """Short random examples, and a float64 copy of the model on the processor."""

    def __init__(self, model: Any, lengths: Sequence[int]) -> None:
        rng = torch.Generator().manual_seed(1)
        self.examples = [fill([length], model.config.vocab_size, rng, str(model.device)) for length in lengths]
        self.twin = copy.deepcopy(model).cpu().double()


def largest_error(engine: GradientEngine, references: References | None, truth: Truth) -> float:
    """The largest error of an engine's sketches and columns, each against the scale that `gradsieve extract --check` has."""
    directions = references or References()
    units = {
        name: {key: tensor[i].cpu().double() for key, tensor in directions.tensors.items()}
        for i, name in enumerate(directions.names)
    }
    loop = Loop(copy.deepcopy(truth.twin), engine.settings, units)  # it changes the model it is given
    with engine:
        blocks = [engine.block(single) for single in truth.examples]
    errors: list[float] = []
    for single, block in zip(truth.examples, blocks, strict=True):
        true = loop.example(single.input_ids[0].tolist(), single.labels[0].tolist())
        columns = {name: float(column[0]) for name, column in block.columns.items()}
        errors += errors_of(true, block.sketch[0].cpu(), columns).values()
    return max(errors)
