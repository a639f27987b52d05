"""How long a comparison will take, before it is run: a short measurement, or what finished cells took."""

from __future__ import annotations

import dataclasses
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gradsieve.compare.cells import Cell, only_cells
from gradsieve.compare.config import FULL
from gradsieve.compare.material import Material
from gradsieve.compare.run import Comparison
from gradsieve.compare.speed import Speed, predicted
from gradsieve.compare.stores import passes_left
from gradsieve.compare.subsets import Subset, navigator_passes_left
from gradsieve.compare.training import keep, make_job, run_task, work

STEPS = 2  # of training, that are timed
DOCUMENTS = 1, 9  # of a task, that are timed: what both take alike is its start


@dataclass(frozen=True, slots=True)
class Forecast:
    """What is to be done and about how long it takes.

    Attributes:
        cells: Every cell, whether it is finished, and its seconds.
        gradients: Seconds of all gradients that are not there yet, of warm-ups before them too.
        navigators: Seconds of training and measuring Navigators for choices that are not made yet.
        measured_in: Seconds that the measurement took.
    """

    cells: Sequence[tuple[Cell, bool, float]]
    gradients: float
    navigators: float
    measured_in: float

    @property
    def total(self) -> float:
        """Seconds of everything that is not finished."""
        return self.gradients + self.navigators + sum(seconds for _, done, seconds in self.cells if not done)


def forecast(comparison: Comparison, only: Sequence[str] = ()) -> Forecast:
    """Measures two training steps and an evaluation of a few items of tests and tasks, and returns what follows for every cell.

    Nothing is written to the comparison's folder. What finished cells took counts in place of the measurement. A token pass
    for gradients or a Navigator (`gradsieve.overhead`) is taken to cost what training on a token does; what else a method does
    to choose is not counted.

    Args:
        comparison: Made ready.
        only: What is asked for beside the untouched model, each ARM or ARM@BUDGET; all by default.

    Raises:
        InvalidArgument: `only` names something else, or the folder holds a cell that was made with other settings.
    """
    started, wanted = time.perf_counter(), only_cells(comparison.config, only)
    comparison.check_finished(wanted)
    done = {one.cell: one.record for one in comparison.finished()}
    known = Speed.of_finished(list(done.values()))
    speed = known if known.train > 0 else _measured(comparison)
    material, config = comparison.material, comparison.config
    cells = [(cell, cell in done, predicted(material, cell, config, speed)) for cell in wanted]
    gradients = speed.train * passes_left(comparison.study, material, {cell.arm for cell in wanted})
    navigators = speed.train * navigator_passes_left(comparison.study, material, wanted)
    return Forecast(cells, gradients, navigators, time.perf_counter() - started)


def _measured(comparison: Comparison) -> Speed:
    """Trains two steps and evaluates the first items of each test and task."""
    material, config = comparison.material, comparison.config
    seed = config.seeds[0]
    cell = Cell(FULL, None, seed, "equal_steps")
    pool = material.trainable(seed).pool
    job = make_job(material, cell, config.arm(FULL), Subset(tuple(pool.ids), (1.0,) * len(pool.ids)))
    assert job.recipe is not None
    few = dataclasses.replace(job, recipe=dataclasses.replace(job.recipe, steps=STEPS, epochs=None))
    share = {test.name: min(len(test.tokens), 8) for test in material.tests}
    part = dataclasses.replace(
        material, config=dataclasses.replace(config, tasks={}), tests=[test.first(share[test.name]) for test in material.tests]
    )
    model = material.source.load(material.dtype, material.device)
    with tempfile.TemporaryDirectory() as folder:
        tasks = sum(_task_seconds(model, name, material) for name in config.tasks)
        base = keep(model, part)
        outcome, _ = work(model, base, part, few, Path(folder) / "training")
    scale = _tokens(material.tests) / _tokens(part.tests)
    examine = outcome.seconds["evaluate"] * scale + outcome.seconds["generate"]
    return Speed(outcome.seconds["train"] / few.trained_tokens, examine + tasks, examine / 2 + tasks)


def _task_seconds(model: Any, name: str, material: Material) -> float:
    """Returns about how long a task takes, from few of its documents."""
    run_task(model, name, material, DOCUMENTS[0])  # imports and fetches what is not counted
    seconds = []
    for count in DOCUMENTS:
        started = time.perf_counter()
        there = run_task(model, name, material, count).documents
        seconds.append(time.perf_counter() - started)
    asked = min(there, material.config.tasks[name].limit or there)
    few, more = (min(count, there) for count in DOCUMENTS)
    each = max(0.0, seconds[1] - seconds[0]) / max(1, more - few)
    return seconds[0] + each * max(0, asked - few)


def _tokens(tests: Sequence[Any]) -> int:
    return sum(len(tokens.input_ids) for test in tests for tokens in test.tokens)
