"""How long a comparison will take, before it is run and while it runs."""

from __future__ import annotations

import dataclasses
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gradsieve.compare.cells import Cell
from gradsieve.compare.config import BASE, FULL, Config
from gradsieve.compare.material import Material
from gradsieve.compare.subsets import Subset, reads_store
from gradsieve.compare.training import keep, make_job, work
from gradsieve.types import Budget

if TYPE_CHECKING:
    from gradsieve.compare.run import Comparison

STEPS = 2
GRADIENTS_PER_TRAINING = 1.0
"""Taking an example's gradient costs about what training on it once does."""


@dataclass(frozen=True, slots=True)
class Speed:
    """What things take on this machine.

    Attributes:
        train: Seconds per token of training.
        examine: Seconds of evaluation and generation of one model.
        examined_base: The same of the untouched model, which needs no KL.
    """

    train: float
    examine: float
    examined_base: float

    @classmethod
    def of_finished(cls, records: Sequence[Mapping[str, Any]]) -> Speed:
        """Returns the mean of finished cells; zeros where there are none."""
        own = [record for record in records if "same_as" not in record]
        trained = [record for record in own if record["training"]]
        tokens = sum(record["training"]["tokens"] for record in trained)
        spent = sum(record["seconds"]["train"] - record["training"]["surgery_seconds"] for record in trained)
        base = _mean([_examined(record) for record in own if not record["training"]])
        examine = _mean([_examined(record) for record in trained]) if trained else 2 * base
        return cls(spent / tokens if tokens else 0.0, examine, base)


def _examined(record: Mapping[str, Any]) -> float:
    return float(record["seconds"]["evaluate"] + record["seconds"]["generate"])


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else 0.0


def predicted(material: Material, cell: Cell, config: Config, speed: Speed) -> float:
    """Returns about how many seconds a cell takes, its selection and gradients not counted."""
    if cell.arm == BASE:
        return speed.examined_base
    return speed.train * training_tokens(material, cell, config) + speed.examine


def training_tokens(material: Material, cell: Cell, config: Config) -> int:
    """Returns about how many tokens a cell trains on: of examples of mean length, as many as the budget allows."""
    assert cell.seed is not None
    pool = material.trainable(cell.seed).pool
    count = _count(cell, len(pool.ids), sum(pool.lengths) / len(pool.lengths))
    by_length = sorted(range(len(pool.ids)), key=lambda i: (pool.lengths[i], pool.ids[i]))
    ids = [pool.ids[by_length[(2 * i + 1) * len(by_length) // (2 * count)]] for i in range(count)]
    return make_job(material, cell, config.arm(cell.arm), Subset(tuple(ids), (1.0,) * count)).trained_tokens


def _count(cell: Cell, pool: int, mean: float) -> int:
    if cell.budget is None:
        return pool
    budget = Budget.parse(cell.budget)
    if budget.tokens is not None:
        return max(1, min(pool, round(budget.tokens / mean)))
    return min(pool, budget.examples or max(1, int((budget.share or 1.0) * pool + 1e-9)))


@dataclass(frozen=True, slots=True)
class Forecast:
    """What is to be done and about how long it takes.

    Attributes:
        cells: Every cell, whether it is finished, and its seconds.
        gradients: Seconds of all gradients, those that are there not counted.
        measured_in: Seconds that the measurement took.
    """

    cells: Sequence[tuple[Cell, bool, float]]
    gradients: float
    measured_in: float

    @property
    def total(self) -> float:
        """Seconds of everything that is not finished."""
        return self.gradients + sum(seconds for _, done, seconds in self.cells if not done)


def forecast(comparison: Comparison) -> Forecast:
    """Measures two training steps and an evaluation of a few items, and returns what follows for every cell.

    Nothing is written to the comparison's folder. What finished cells took counts in place of the measurement.
    """
    started = time.perf_counter()
    done = {one.cell: one.record for one in comparison.finished()}
    known = Speed.of_finished(list(done.values()))
    speed = known if known.train > 0 else _measured(comparison)
    material, config = comparison.material, comparison.config
    cells = [(cell, cell in done, predicted(material, cell, config, speed)) for cell in comparison.cells]
    gradients = 0.0
    if any(reads_store(arm) for arm in config.arms):
        seen = {id(material.trainable(seed)): material.trainable(seed) for seed in config.seeds}
        tokens = sum(sum(one.pool.lengths) for one in seen.values())
        there = any((comparison.study / "stores").glob("*/whole"))
        gradients = 0.0 if there else GRADIENTS_PER_TRAINING * speed.train * tokens
    return Forecast(cells, gradients, time.perf_counter() - started)


def _measured(comparison: Comparison) -> Speed:
    """Trains two steps and evaluates the first items of each test."""
    material, config = comparison.material, comparison.config
    seed = config.seeds[0]
    cell = Cell(FULL, None, seed, "equal_steps")
    pool = material.trainable(seed).pool
    job = make_job(material, cell, config.arm(FULL), Subset(tuple(pool.ids), (1.0,) * len(pool.ids)))
    assert job.recipe is not None
    few = dataclasses.replace(job, recipe=dataclasses.replace(job.recipe, steps=STEPS, epochs=None))
    share = {test.name: min(len(test.tokens), 8) for test in material.tests}
    part = dataclasses.replace(material, tests=[test.first(share[test.name]) for test in material.tests])
    model = material.source.load(material.dtype, material.device)
    with tempfile.TemporaryDirectory() as folder:
        base = keep(model, part)
        outcome, _ = work(model, base, part, few, Path(folder) / "training")
    scale = _tokens(material.tests) / _tokens(part.tests)
    examine = outcome.seconds["evaluate"] * scale + outcome.seconds["generate"]
    return Speed(outcome.seconds["train"] / few.trained_tokens, examine, examine / 2)


def _tokens(tests: Sequence[Any]) -> int:
    return sum(len(tokens.input_ids) for test in tests for tokens in test.tokens)
