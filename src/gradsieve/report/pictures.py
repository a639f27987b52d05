"""Two pictures of what a method did: the steps of a walk in a plane, and bars that compare ways to choose."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from gradsieve.report.figures import SIDE, Axis, Floats, axis, dots, line

MOST_STEPS = 1500  # drawn of a walk, over all parts
PARTS = "abcd"  # parts of a walk with a colour of their own; further ones share one


@dataclass(frozen=True, slots=True)
class Part:
    """One part of a walk.

    Attributes:
        name: Its number, from 1.
        style: Class of its lines, one of `PARTS` or `rest`.
        path: Line through its picks, in order.
        picks: Dots of its picks.
        start: Dot of the first.
        count: How many picks it has.
    """

    name: str
    style: str
    path: str
    picks: str
    start: str
    count: int


@dataclass(frozen=True, slots=True)
class Walk:
    """A walk over the pool, in a plane.

    Attributes:
        x: Axis to the right.
        y: Axis upwards.
        others: Dots of the sample of the pool.
        parts: Its parts in order.
        target: Cross at the target's place, empty where it has none.
        sampled: How many dots there are of the pool.
        drawn: How many picks are drawn.
    """

    x: Axis
    y: Axis
    others: str
    parts: tuple[Part, ...]
    target: str
    sampled: int
    drawn: int


def walk(trace: Mapping[str, Any]) -> Walk | None:
    """Returns the picture of a trace's `walk` (component per step) and `layout` (places in a plane); None without them."""
    layout, steps = trace.get("layout"), trace.get("walk")
    if not isinstance(layout, Mapping) or not isinstance(steps, Mapping):
        return None
    picks, sample, target = (_places(layout.get(name)) for name in ("picks", "sample", "target"))
    component = np.asarray(steps.get("component", ()), dtype=np.int64)
    if not len(picks) or len(component) != len(picks):
        return None
    x, y = (axis(np.concatenate([picks, sample, target])[:, i], pad=0.05, allow_log=False, count=4) for i in (0, 1))

    def placed(points: Floats) -> tuple[Floats, Floats]:
        return x.place(points[:, 0]), y.place(points[:, 1])

    numbers = np.unique(component)
    most = max(1, MOST_STEPS // len(numbers))
    parts = []
    for place, number in enumerate(numbers.tolist()):
        own = picks[component == number]
        u, v = placed(own[:most])
        style = PARTS[place] if place < len(PARTS) else "rest"
        parts.append(Part(str(number + 1), style, line(u, v), dots(u, v), dots(u[:1], v[:1]), len(own)))
    drawn = sum(min(part.count, most) for part in parts)
    return Walk(x, y, dots(*placed(sample)), tuple(parts), _cross(*placed(target)), len(sample), drawn)


def _places(value: object) -> Floats:
    """Returns points [p, 2]; none for anything else."""
    try:
        points: npt.NDArray[np.float64] = np.asarray(value, dtype=np.float64)
    except (TypeError, ValueError):
        return np.empty((0, 2))
    points = points[None] if points.shape == (2,) else points
    return points if points.ndim == 2 and points.shape[1] == 2 else np.empty((0, 2))


def _cross(u: Floats, v: Floats, arm: int = 22) -> str:
    return "".join(
        f"M{SIDE * a - arm:.1f} {SIDE * (1 - b):.1f}h{2 * arm}m{-arm} {-arm}v{2 * arm}" for a, b in zip(u, v, strict=True)
    )


@dataclass(frozen=True, slots=True)
class Bars:
    """Numbers of at least 0 side by side.

    Attributes:
        name: The panel's name.
        rows: Each bar's name, value and length in per cent of the longest; the first stands for the choice itself.
    """

    name: str
    rows: tuple[tuple[str, float, str], ...]


def bars(trace: Mapping[str, Any]) -> list[Bars]:
    """Returns the panels of a trace's `bars`: mapping PANEL: mapping BAR: number; those with a number below 0 are left out."""
    entry = trace.get("bars")
    panels = []
    for name, values in entry.items() if isinstance(entry, Mapping) else ():
        known = {str(key): float(v) for key, v in values.items() if v is not None and np.isfinite(v)}
        if known and min(known.values()) >= 0:
            longest = max(known.values()) or 1.0
            panels.append(Bars(str(name), tuple((key, v, f"{100 * v / longest:.2f}") for key, v in known.items())))
    return panels
