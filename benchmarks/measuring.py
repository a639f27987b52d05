"""Rows of a benchmark, and how they are timed: in turn, in one process, each divided by a base row of the same turn."""

from __future__ import annotations

import math
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

Run = Callable[[], object]


@dataclass
class Row:
    """One way to do it, and what was measured.

    Attributes:
        name: What the table says.
        run: Does all batches once.
        around: Opened before and closed after each run, outside the clock (hooks on the model).
        check: Returns the largest relative error, where the row claims to be exact.
        seconds: One per turn.
        peak_mib: The allocator's peak above what was held before.
        error: What `check` found.
    """

    name: str
    run: Run
    around: Callable[[], AbstractContextManager[object]] = nullcontext
    check: Callable[[], float] | None = None
    seconds: list[float] = field(default_factory=list)
    peak_mib: float = math.nan
    error: float | None = None


def clock(device: str) -> float:
    """Processor time of all threads on a CPU, wall time elsewhere; seconds."""
    if device.startswith("cuda"):
        torch.cuda.synchronize()
        return time.perf_counter()
    return time.process_time() if device == "cpu" else time.perf_counter()


@contextmanager
def quiet() -> Iterator[None]:
    """Silences what native code writes to standard error."""
    sys.stderr.flush()
    saved, sink = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(sink, 2)
        yield
    finally:
        os.dup2(saved, 2)
        os.close(sink)
        os.close(saved)


def peak_mib(run: Run, device: str) -> float:
    """The allocator's peak while `run` runs, above what was held before."""
    if device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    with quiet(), torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        run()
    events: Any = profile.profiler.kineto_results.events()
    held = most = 0
    for event in sorted((e for e in events if e.name() == "[memory]"), key=lambda e: e.start_ns()):
        held += event.nbytes()
        most = max(most, held)
    return most / 2**20


def measure(rows: Sequence[Row], repeats: int, device: str) -> None:
    """Runs all rows in turn: once to warm up (and for memory and errors), then `repeats` times on the clock."""
    for row in rows:
        with row.around():
            row.peak_mib = peak_mib(row.run, device)
        if row.check:
            row.error = row.check()
    for turn in range(repeats):
        for row in rows:
            with row.around():
                start = clock(device)
                row.run()
                row.seconds.append(clock(device) - start)
        print(f"turn {turn + 1} of {repeats}: {rows[0].name} {rows[0].seconds[-1]:.2f} s", file=sys.stderr)


def over(row: Row, base: Row) -> float:
    """The median of a row's times over another's of the same turn."""
    return statistics.median(mine / theirs for mine, theirs in zip(row.seconds, base.seconds, strict=True))


def machine(device: str) -> dict[str, Any]:
    """What the figures depend on."""
    name = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        name = next((line.split(":")[1].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line), name)
    if device.startswith("cuda"):
        name = torch.cuda.get_device_name(device)
    return {"processor": name, "system": platform.platform(), "threads": torch.get_num_threads(), "device": device}


def versions(*packages: str) -> dict[str, str]:
    """Versions of Python and the named packages, where they are installed."""
    from importlib import metadata

    found = {"python": platform.python_version()}
    for package in packages:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found
