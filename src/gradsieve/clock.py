"""What a run costs, stage by stage, and how far it is."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Protocol


class Progress(Protocol):
    """Is told how far a stage is; the command line draws a bar from it."""

    def __call__(self, stage: str, done: int, total: int) -> None:
        """Reports that `done` of `total` tokens of a stage are done."""
        ...


def silent(stage: str, done: int, total: int) -> None:
    """A `Progress` that shows nothing."""


@dataclass(frozen=True, slots=True)
class Cost:
    """One stage's cost: seconds on the clock, processor seconds over all threads, bytes written."""

    stage: str
    wall_seconds: float
    cpu_seconds: float
    bytes: int = 0


@dataclass
class Clock:
    """Collects the cost of stages."""

    costs: list[Cost] = field(default_factory=list)

    @contextmanager
    def stage(self, name: str) -> Iterator[list[int]]:
        """Times a stage; what the caller appends to the list counts as bytes written."""
        written: list[int] = []
        wall, cpu = time.perf_counter(), time.process_time()
        try:
            yield written
        finally:
            self.costs.append(Cost(name, time.perf_counter() - wall, time.process_time() - cpu, sum(written)))
