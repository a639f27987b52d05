"""Where the labels of points go: beside their point, and where that is taken, further off with a line to it."""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
Box = tuple[float, float, float, float]
"""Left, top, right, bottom."""

HIGH, DOT = 14.0, 7.0
_FAR = (9, 16, 26, 40, 56, 74, 94, 116, 140, 168, 200, 240, 290)
_LONGEST = 13  # a longer way to the point has a line
_STEPS = np.linspace(0, 1, 24)[:, None]
# What a place costs, in units of distance to the point: on a label or a dot (never, if it can be helped), on a bar, and what
# its line runs over.
_ON_LABEL, _ON_BAR, _LINE_ON_LABEL, _LINE_ON_DOT, _LINE_ON_BAR = 10_000.0, 9.0, 90.0, 60.0, 1.0


@dataclass(frozen=True, slots=True)
class Placed:
    """Where a label went.

    Attributes:
        box: Of its text.
        leader: From the point's edge to the label: x1, y1, x2, y2; None where it stands beside its point.
    """

    box: Box
    leader: tuple[float, float, float, float] | None


def width(text: str) -> float:
    """Returns about how wide a text of 12 px is, rather too wide than too narrow."""
    return sum(12.5 if unicodedata.east_asian_width(c) in "WF" else 7.2 for c in text)


def place(points: Sequence[tuple[float, float]], texts: Sequence[str], bars: Sequence[Box], frame: Box) -> list[Placed]:
    """Returns a place for each point's label within the frame: over no dot, over no other label, over few bars.

    Each label takes the cheapest of its candidates given where the others are, a few times over; the same input gives the
    same places.

    Args:
        points: Centres of the dots.
        texts: Their labels.
        bars: Thin boxes that a label should rather not lie on, such as error bars.
        frame: What all labels must lie in.
    """
    dots = np.array([(x - DOT, y - DOT, x + DOT, y + DOT) for x, y in points]).reshape(-1, 4)
    thin = np.array(bars, dtype=np.float64).reshape(-1, 4)
    choices = [_candidates(x, y, width(text), frame) for (x, y), text in zip(points, texts, strict=True)]
    taken: list[Placed | None] = [None] * len(points)
    for _ in range(4):
        before = list(taken)
        for i, (x, y) in enumerate(points):
            others = [one for j, one in enumerate(taken) if one is not None and j != i]
            ends = [_line_ends((x, y), box) for box in choices[i]]
            costs = _costs(np.array(choices[i]), np.array(ends), np.delete(dots, i, 0), dots[i : i + 1], thin, others)
            best = int(costs.argmin())
            x1, y1, x2, y2 = ends[best]
            leader = (x1, y1, x2, y2) if math.dist((x, y), (x2, y2)) > _LONGEST else None
            taken[i] = Placed(choices[i][best], leader)
        if taken == before:
            break
    return [one for one in taken if one is not None]


def _candidates(x: float, y: float, wide: float, frame: Box) -> list[Box]:
    left, top, right, bottom = frame
    found = []
    for distance in _FAR:
        for angle in np.arange(0, 2 * math.pi, math.pi / 12):
            dx, dy = math.cos(angle), math.sin(angle)
            a = x + dx * distance + (dx - 1) * wide / 2
            b = y + dy * distance + (dy - 1) * HIGH / 2
            a, b = min(max(a, left), max(left, right - wide)), min(max(b, top), bottom - HIGH)
            found.append((a, b, a + wide, b + HIGH))
    return found


def _line_ends(point: tuple[float, float], box: Box) -> tuple[float, float, float, float]:
    """Returns the line from the edge of a dot to the nearest point of a box."""
    x, y = point
    u, v = min(max(x, box[0]), box[2]), min(max(y, box[1]), box[3])
    share = min(1.0, (DOT - 1) / (math.dist(point, (u, v)) or 1.0))
    return x + (u - x) * share, y + (v - y) * share, u, v


def _costs(boxes: Floats, ends: Floats, dots: Floats, own: Floats, bars: Floats, others: Sequence[Placed]) -> Floats:
    """Returns what each candidate costs, [C]."""
    labels = np.array([one.box for one in others]).reshape(-1, 4) + (-5, -1, 5, 1)
    leaders = np.array([one.leader for one in others if one.leader]).reshape(-1, 4)
    lines = ends[:, None, :2] + _STEPS * (ends[:, None, 2:] - ends[:, None, :2])
    length = np.hypot(ends[:, 2] - ends[:, 0], ends[:, 3] - ends[:, 1])
    running = (leaders[:, None, :2] + _STEPS * (leaders[:, None, 2:] - leaders[:, None, :2])).reshape(-1, 2)
    cost = length + _ON_LABEL * (_met(boxes, labels) + _met(boxes, dots) + _met(boxes, own)) + _ON_BAR * _met(boxes, bars)
    cost += (
        _LINE_ON_LABEL * _run_over(lines, labels)
        + _LINE_ON_DOT * _run_over(lines, dots)
        + _LINE_ON_BAR * _run_over(lines, bars)
    )
    covered = (running[None, :, 0] > boxes[:, None, 0]) & (running[None, :, 0] < boxes[:, None, 2])
    covered &= (running[None, :, 1] > boxes[:, None, 1]) & (running[None, :, 1] < boxes[:, None, 3])
    return np.asarray(cost + _LINE_ON_LABEL * covered.any(1) + _LINE_ON_LABEL * _crossings(ends, leaders))


def _met(boxes: Floats, others: Floats) -> npt.NDArray[np.int64]:
    """Returns how many of the others each box overlaps, [C]."""
    a, b = boxes[:, None], others[None]
    over = (a[..., 0] < b[..., 2]) & (b[..., 0] < a[..., 2]) & (a[..., 1] < b[..., 3]) & (b[..., 1] < a[..., 3])
    return np.asarray(over.sum(1))


def _run_over(lines: Floats, boxes: Floats) -> npt.NDArray[np.int64]:
    """Returns how many boxes each line [C, steps, 2] runs over, [C]."""
    x, y = lines[:, :, None, 0], lines[:, :, None, 1]
    return np.asarray(((x > boxes[:, 0]) & (x < boxes[:, 2]) & (y > boxes[:, 1]) & (y < boxes[:, 3])).any(1).sum(1))


def _crossings(lines: Floats, others: Floats) -> npt.NDArray[np.int64]:
    """Returns how many of the other lines each line crosses, [C]."""
    a, b = lines[:, None, :2], lines[:, None, 2:]
    c, d = others[None, :, :2], others[None, :, 2:]

    def side(p: Floats, q: Floats, r: Floats) -> Floats:
        return np.sign((q[..., 0] - p[..., 0]) * (r[..., 1] - p[..., 1]) - (q[..., 1] - p[..., 1]) * (r[..., 0] - p[..., 0]))

    return np.asarray(((side(a, b, c) != side(a, b, d)) & (side(c, d, a) != side(c, d, b))).sum(1))
