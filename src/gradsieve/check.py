"""`gradsieve extract … --check N`: are the numbers in the store those of N random examples' own backward passes?

What is compared is what was stored, rounding to float16 included, with float64 loops over single examples. References are
measured again, in float64: one after another where all do not fit at once.
"""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from gradsieve.clock import Progress, silent
from gradsieve.compute import ComputeSettings, with_form
from gradsieve.data import TokenSet
from gradsieve.errors import InvalidArgument
from gradsieve.gradients.loop import Loop, Truth
from gradsieve.models import ModelSource
from gradsieve.references import Source, measure_references
from gradsieve.types import Gradients

TOLERANCES = {torch.float64: (1e-6, 1e-3), torch.float32: (1e-3, 2e-3), torch.bfloat16: (5e-2, 5e-2)}
"""By compute type: of columns, and of sketches, which are stored in float16."""
WIDE_TOLERANCE = 2e-2  # of products with references that are wide sketches


@dataclass(frozen=True, slots=True)
class Compared:
    """One quantity over all examples that were compared.

    Attributes:
        name: `sketch`, or the column's name.
        error: The largest error: of a norm or loss relative to it, of products and sketches to ‖g‖ (so that of a product is the
            error of a cosine), of extremes to the largest entry, of mean and sd to the root mean square; absolute where
            that is zero, infinite where one side is no number.
        tolerance: What it may be.
        worst: Id of the example with the largest error.
    """

    name: str
    error: float
    tolerance: float
    worst: str

    @property
    def passed(self) -> bool:
        """Whether the error is within the tolerance."""
        return self.error <= self.tolerance


def check(
    stored: Gradients,
    count: int,
    pool: TokenSet,
    source: ModelSource,
    compute: ComputeSettings,
    references: Mapping[str, Source],
    seed: int,
    progress: Progress = silent,
) -> list[Compared]:
    """Compares `count` random rows of a store with float64 loops.

    Args:
        stored: The rows.
        count: How many of them to compare.
        pool: The examples behind the rows.
        source: The model; it is loaded once more, in float64, on the CPU, or once for each reference.
        compute: How the rows were made; float64 references that take more than its `reference_memory` are measured and
            compared one after another.
        references: The examples behind the references.
        seed: Of the choice of rows.
        progress: Is told of tokens done.

    Raises:
        InvalidArgument: There are fewer rows, or they are of Adam's direction.
    """
    n = len(stored.ids)
    if not 1 <= count <= n:
        raise InvalidArgument(f"check must lie in [1, {n}] (the usable examples), got {count}")
    if compute.engine.direction != "sgd":
        raise InvalidArgument(f"check must be of plain gradients, got direction {compute.engine.direction}; extract those")
    rows = torch.randperm(n, generator=torch.Generator().manual_seed(seed))[:count]
    wide = dataclasses.replace(compute, dtype=torch.float64, device="cpu")
    at_once = with_form(source, wide, len(references)).form == "exact"
    parts = [references] if at_once else [{name: one} for name, one in references.items()]
    place = {id: position for position, id in enumerate(pool.ids)}
    columns, sketches = stored.columns, stored.rows(rows)
    worst: dict[str, tuple[float, str]] = {}
    picked = [pool.tokens[place[stored.ids[row]]] for row in rows.tolist()]
    done, total = 0, len(parts) * sum(len(tokens.input_ids) for tokens in picked)
    for part in parts:
        loop = _loop(source, dataclasses.replace(wide, form="exact"), part, progress)
        for i, (row, tokens) in enumerate(zip(rows.tolist(), picked, strict=True)):
            id = stored.ids[row]
            truth = loop.example(tokens.input_ids.tolist(), tokens.labels.tolist())
            stored_row = {name: float(column[row]) for name, column in columns.items()}
            for name, error in errors_of(truth, sketches[i], stored_row).items():
                worst[name] = max(worst.get(name, (-1.0, id)), (error, id))
            done += len(tokens.input_ids)
            progress("check", done, total)
        del loop  # and with it a model, before the next is loaded
    found = [Compared(name, error, _tolerance(name, compute), id) for name, (error, id) in worst.items()]
    return sorted(found, key=lambda one: ("/" in one.name, one.name.partition("/")[2], one.name))


def _loop(source: ModelSource, compute: ComputeSettings, references: Mapping[str, Source], progress: Progress) -> Loop:
    """Returns the loop over single examples, with a model of its own, which it changes."""
    model = source.load(torch.float64, "cpu") if source.live is None else copy.deepcopy(source.live).double().cpu()
    directions = measure_references(model, compute, references, progress)
    tensors = {name: {key: t[i] for key, t in directions.tensors.items()} for i, name in enumerate(directions.names)}
    return Loop(model, compute.engine, tensors)


def errors_of(truth: Truth, sketch: Tensor, columns: Mapping[str, float]) -> dict[str, float]:
    """Returns the errors of one example's sketch and of the columns that both sides have, see `Compared.error`."""
    errors = {"sketch": float((sketch.double() - truth.sketch).norm()) / (truth.columns["norm"] or 1.0)}
    for name in truth.columns.keys() & columns.keys():
        errors[name] = abs(columns[name] - truth.columns[name]) / (truth.scales[name] or 1.0)
    return {name: math.inf if math.isnan(error) else error for name, error in errors.items()}


def _tolerance(name: str, compute: ComputeSettings) -> float:
    if name.startswith("dot/") and compute.form == "wide sketch":
        return WIDE_TOLERANCE
    columns, sketches = TOLERANCES[compute.dtype]
    return sketches if name == "sketch" else columns
