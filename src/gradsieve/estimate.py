"""What a selection will take, before it is run: the same job on a small part of the data, timed and scaled by tokens.

Of a warm-up, what its steps take is scaled: its start and its checkpoints are those of any pool.
"""

from __future__ import annotations

import math
import resource
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from gradsieve.clock import Cost, Progress, silent
from gradsieve.data import TokenSet
from gradsieve.job import Job
from gradsieve.pipeline import find_method
from gradsieve.run import Run
from gradsieve.types import Warmup
from gradsieve.warmup import part_size

ONCE = ("reading", "tokens", "loading the model", "trying batch sizes", "warm-up")
"""Stages that an estimate goes through in full; of a warm-up, the steps are scaled."""


@dataclass(frozen=True, slots=True)
class Forecast:
    """One stage of the job.

    Attributes:
        stage: Its name.
        seconds: On the clock, in full.
        measured: Seconds of the part that was run.
        bytes: Written in full.
    """

    stage: str
    seconds: float
    measured: float
    bytes: int


@dataclass(frozen=True, eq=False)
class Estimate:
    """What a job will take.

    Attributes:
        stages: In order; choosing and the report are not among them.
        sets: Usable examples and their tokens by role.
        memory: Bytes that this process held at most while it measured, the model and all references included.
        share: Part of all tokens that was run.
        notes: What the user must know beside.
    """

    stages: tuple[Forecast, ...]
    sets: Mapping[str, tuple[int, int]]
    memory: int
    share: float
    notes: tuple[str, ...]

    @property
    def seconds(self) -> float:
        """Of all stages."""
        return sum(stage.seconds for stage in self.stages)

    @property
    def bytes(self) -> int:
        """Written to disk."""
        return sum(stage.bytes for stage in self.stages)


@dataclass(eq=False)
class _Thinner:
    """Takes a part of every set that stands for the whole, and keeps count of both.

    Within each category the examples are taken at even steps through their lengths, the longest among them, so that the part
    has the lengths of the whole and meets the largest batch.
    """

    tokens: int
    whole: dict[str, tuple[int, int]] = field(default_factory=dict)
    part: dict[str, tuple[int, int]] = field(default_factory=dict)

    def __call__(self, examples: TokenSet) -> TokenSet:
        lengths, name = examples.lengths, examples.name
        groups: dict[str | None, list[int]] = defaultdict(list)
        for position in sorted(range(len(lengths)), key=lambda i: (-lengths[i], examples.keys[i])):
            groups[examples.examples[examples.kept[position]].category].append(position)
        step = max(1, math.floor(sum(lengths) / self.tokens))
        least = 6  # of each category, so that its contrast can be made
        taken = [position for own in groups.values() for position in own[:: min(step, max(1, len(own) // least))]]
        thin = examples.restricted(name, sorted(taken))
        self.whole[name] = len(lengths), sum(lengths)
        self.part[name] = len(thin.lengths), sum(thin.lengths)
        return thin


@dataclass(eq=False)
class _Steps:
    """Passes on how far a job is, and times the steps of its warm-up.

    Attributes:
        steps: Seconds and tokens of each.
    """

    progress: Progress
    steps: list[tuple[float, int]] = field(default_factory=list)
    _before: tuple[float, int] = field(default=(0.0, 0), init=False)

    def __call__(self, stage: str, done: int, total: int) -> None:
        if stage == "warm-up":  # is told before and after each step
            now = time.perf_counter()
            if done > self._before[1]:
                self.steps.append((now - self._before[0], done - self._before[1]))
            self._before = now, done
        self.progress(stage, done, total)

    def more(self, ratio: float) -> float:
        """Returns the seconds that so many times as many tokens take beside these; the first step also starts things up."""
        steady = self.steps[1:] or self.steps
        each = sum(seconds for seconds, _ in steady) / sum(tokens for _, tokens in steady)
        return each * (ratio - 1) * sum(tokens for _, tokens in self.steps)


def estimate(
    method: str, job: Job, settings: Mapping[str, Any] | None = None, *, tokens: int = 1500, progress: Progress = silent
) -> Estimate:
    """Runs the job on about `tokens` tokens of each set in a temporary folder, and scales what each stage took.

    Gradients that a store holds already are not looked for: the estimate is that of a job from nothing.

    Args:
        method: A name of `SELECTORS` or `package.module:Class`.
        job: What to choose from, with which model.
        settings: The method's.
        tokens: Of each set; more takes longer and says it better.
        progress: Is told how far long stages are.

    Raises:
        GradsieveError: Whatever the user can mend, as the job itself would.
    """
    name, selector = find_method(method, settings)
    thinner, steps = _Thinner(tokens), _Steps(progress)
    warmup: Warmup | None = getattr(selector, "warmup", None)

    def thin(examples: TokenSet) -> TokenSet:
        part = thinner(examples)
        if warmup is not None and examples.name == "pool":  # as many of the part as of the whole, if it has them: whole batches
            run.warmup = replace(warmup, share=_trained(warmup, thinner)[1] / len(part.lengths))
        return part

    with tempfile.TemporaryDirectory(prefix="gradsieve-estimate-") as folder:
        small = replace(job, store=str(Path(folder) / "store"))
        run = Run.of(small, name, selector, None, steps)
        run.thin = thin
        run.problem({"pool": job.pool, "target": job.target, "anchor": job.anchor}, job.model, None)
        costs = list(run.clock.costs)
        notes = [note for note in run.notes if not note.startswith("gradients were taken after")]
    if (held := thinner.whole["pool"][0] * job.dim * 4) > 2**30:
        notes.append(f"methods that hold all sketches of the pool at once need {held / 2**30:.1f} GiB more for them")
    ratios = _ratios(thinner)
    stages = [_scaled(cost, ratios) for cost in costs]
    if warmup is not None and steps.steps:
        whole, part = _trained(warmup, thinner)
        more = steps.more(whole / part * ratios["pool"] * thinner.part["pool"][0] / thinner.whole["pool"][0])
        stages = [replace(one, seconds=one.measured + more) if one.stage == "warm-up" else one for one in stages]
    share = sum(t for _, t in thinner.part.values()) / sum(t for _, t in thinner.whole.values())
    return Estimate(tuple(stages), dict(thinner.whole), _peak(), share, tuple(notes))


def _trained(warmup: Warmup, thinner: _Thinner) -> tuple[int, int]:
    """Returns how many examples a warm-up trains on, and on how many it was measured."""
    whole = part_size(warmup.share, thinner.whole["pool"][0])
    return whole, min(whole, thinner.part["pool"][0])


def _ratios(thinner: _Thinner) -> dict[str, float]:
    """Returns how many times as many tokens each set has in full; `references` stands for all sets but the pool."""
    ratios = {role: thinner.whole[role][1] / thinner.part[role][1] for role in thinner.whole}
    others = [role for role in thinner.whole if role != "pool"]
    if others:
        ratios["references"] = sum(thinner.whole[r][1] for r in others) / sum(thinner.part[r][1] for r in others)
    return ratios


def _scaled(cost: Cost, ratios: Mapping[str, float]) -> Forecast:
    ratio = 1.0
    if not cost.stage.startswith(ONCE):
        # what is of no set of its own goes with the pool
        ratio = next((value for role, value in ratios.items() if role != "pool" and role in cost.stage), ratios["pool"])
    return Forecast(cost.stage, cost.wall_seconds * ratio, cost.wall_seconds, round(cost.bytes * ratio))


def _peak() -> int:
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
