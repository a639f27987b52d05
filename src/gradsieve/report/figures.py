"""Numbers → the coordinates of a figure: axes, dots, steps, lines.

Every figure is drawn on a square of 1000 x 1000 units, y downwards, which the page stretches to the room there is. Ticks
and labels are placed in shares of the axis, so that text is never stretched. Nothing here knows HTML.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from gradsieve.report import wording

Floats = npt.NDArray[np.float64]
SIDE = 1000
LONGEST_LINE = 600  # points of a line; more would be drawn within one pixel


@dataclass(frozen=True, slots=True)
class Axis:
    """A linear or logarithmic axis.

    Attributes:
        low: Value at its start.
        high: Value at its end, above `low`.
        log: Whether it is logarithmic; then `low` is positive.
        ticks: Values with a label, ascending, and
        texts: their labels.
    """

    low: float
    high: float
    log: bool
    ticks: tuple[float, ...]
    texts: tuple[str, ...]

    def place(self, values: npt.ArrayLike) -> Floats:
        """Returns where the values lie: 0 at the start, 1 at the end, NaN where they cannot be placed."""
        v = np.asarray(values, dtype=np.float64)
        if not self.log:
            return np.asarray((v - self.low) / (self.high - self.low))
        logs = np.log(v, out=np.full(v.shape, np.nan), where=v > 0)
        return np.asarray((logs - math.log(self.low)) / math.log(self.high / self.low))

    def marks(self) -> list[tuple[str, str]]:
        """Returns each tick's place in per cent of the axis and its label."""
        return [(f"{100 * p:.2f}", text) for p, text in zip(self.place(self.ticks), self.texts, strict=True)]


def axis(values: Floats, *, pad: float = 0.04, allow_log: bool = True, count: int = 5) -> Axis:
    """Returns an axis that holds all finite values.

    It is logarithmic where all of them are positive and the largest is more than 10 times the median and 30 times the
    smallest, because a linear one would squeeze most of them into its first tenth.

    Args:
        values: Any shape; at least one must be finite.
        pad: Room beyond the extremes, as a share of the range.
        allow_log: False keeps the axis linear.
        count: About how many ticks.
    """
    v = values[np.isfinite(values)]
    low, high = float(v.min()), float(v.max())
    if allow_log and low > 0 and high > 10 * float(np.median(v)) and high > 30 * low:
        room = (high / low) ** pad
        low, high = low / room, high * room
        ticks = _log_ticks(low, high)
        return Axis(low, high, True, tuple(ticks), tuple(wording.number(t) for t in ticks))
    # A range of a few rounding errors is one value: ticks would repeat, and places lose their digits.
    if high - low <= 1e-9 * max(abs(low), abs(high)):
        room = abs(low) / 2 or 0.5
        low, high = low - room, high + room
    else:
        room = pad * (high - low)
        low, high = low - room, high + room
    step = _nice_step((high - low) / count)
    if (v == np.round(v)).all():
        step = max(step, 1.0)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    ticks = [i * step for i in range(first, last + 1)]
    return Axis(low, high, False, tuple(ticks), tuple(_tick_texts(ticks, step)))


def _nice_step(raw: float) -> float:
    power: float = 10.0 ** math.floor(math.log10(raw))
    return next((m * power for m, most in ((1, 2**0.5), (2, 10**0.5), (5, 50**0.5)) if raw <= most * power), 10 * power)


def _log_ticks(low: float, high: float) -> list[float]:
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    wide = math.log10(high / low) > 3
    ticks = [m * 10.0**e for e in decades for m in ((1,) if wide else (1, 3)) if low <= m * 10.0**e <= high]
    return ticks[:: math.ceil(len(ticks) / 7)] or [low]


def _tick_texts(ticks: Sequence[float], step: float) -> list[str]:
    """Returns the labels with as many digits as it takes to tell them apart; very large and small ones share a power of ten."""
    largest = max(map(abs, ticks))
    power = 0 if largest == 0 or 1e-3 <= largest < 1e7 else math.floor(math.log10(largest) + 1e-9)
    digits = max(0, power - math.floor(math.log10(step) + 1e-9))
    times = f"×10{wording.superscript(power)}" if power else ""
    return [f"{t / 10.0**power:,.{digits}f}{times}".replace("-", "−") if abs(t) > step / 2 else "0" for t in ticks]


def _pairs(x: Floats, y: Floats) -> list[str]:
    return [f"{SIDE * a:.1f} {SIDE * (1 - b):.1f}".replace(".0 ", " ").removesuffix(".0") for a, b in zip(x, y, strict=True)]


def dots(x: Floats, y: Floats) -> str:
    """Returns a path of zero-length lines, which round line caps make into dots; points with NaN are left out."""
    seen = np.isfinite(x) & np.isfinite(y)
    return "".join(f"M{pair}h0" for pair in _pairs(x[seen], y[seen]))


def line(x: Floats, y: Floats) -> str:
    """Returns the path through the points in order, broken where one is NaN."""
    seen = np.isfinite(x) & np.isfinite(y)
    path, pen_down = [], False
    for pair, ok in zip(_pairs(np.where(seen, x, 0), np.where(seen, y, 0)), seen, strict=True):
        if ok:
            path.append(("L" if pen_down else "M") + pair)
        pen_down = bool(ok)
    return "".join(path)


def straight(coefficients: tuple[float, float, float], x: Axis, y: Axis) -> str:
    """Returns the part of the line `a x + b y = c` inside the figure; empty where it has none or an axis is logarithmic."""
    if x.log or y.log:
        return ""
    a, b, c = coefficients
    c -= a * x.low + b * y.low
    a, b = a * (x.high - x.low), b * (y.high - y.low)
    ends = [(u, (c - a * u) / b) for u in (0.0, 1.0) if b] + [((c - b * v) / a, v) for v in (0.0, 1.0) if a]
    inside = sorted({(u, v) for u, v in ends if -1e-9 <= u <= 1 + 1e-9 and -1e-9 <= v <= 1 + 1e-9})
    if len(inside) < 2:
        return ""
    u, v = np.array([inside[0], inside[-1]]).T
    return line(u, v)


def area(x: Floats, y: Floats) -> str:
    """Returns the closed path between the points and the bottom."""
    if not len(x):
        return ""
    return line(np.r_[x[0], x, x[-1]], np.r_[0.0, y, 0.0]) + "Z"


@dataclass(frozen=True, slots=True)
class Histogram:
    """A column's distribution in the pool and in the selection, on the same bins.

    Attributes:
        x: Its axis.
        pool: Path around the pool's bins.
        chosen: Path around the selection's bins; empty where nothing was chosen.
        tallest: Largest share of one bin, which the figure's height stands for.
        pool_median: The pool's median in units of the figure, and
        chosen_median: the selection's, None where it has none.
    """

    x: Axis
    pool: str
    chosen: str
    tallest: float
    pool_median: str
    chosen_median: str | None


def histogram(values: Floats, chosen: npt.NDArray[np.bool_], *, bins: int = 24) -> Histogram | None:
    """Returns the distribution of the finite values, or None where the column has none.

    Bins have equal width on the axis; a column of whole numbers gets whole-numbered bins. Heights are shares of the pool
    and of the selection, so that the two can be compared whatever their sizes.
    """
    finite = np.isfinite(values)
    if not finite.any():
        return None
    pool, part = values[finite], values[finite & chosen]
    x = axis(pool, pad=0.0)
    if x.log:
        edges = np.geomspace(x.low, x.high, bins + 1)
        edges[0], edges[-1] = x.low, x.high
    elif (pool == np.round(pool)).all() and pool.max() > pool.min():
        width = math.ceil((pool.max() - pool.min() + 1) / bins)
        edges = np.arange(pool.min() - 0.5, pool.max() + width, width)
        x = axis(edges, pad=0.0, allow_log=False)
    else:
        edges = np.linspace(x.low, x.high, bins + 1)
    shares = [np.histogram(v, edges)[0] / max(len(v), 1) for v in (pool, part)]
    tallest = float(max(s.max() for s in shares))
    places = x.place(edges)
    pool_outline, chosen_outline = (_outlines(places, share / tallest) for share in shares)

    def unit(v: Floats) -> str:
        return f"{SIDE * float(x.place(np.median(v))):.1f}"

    return Histogram(
        x=x,
        pool=pool_outline,
        chosen=chosen_outline if len(part) else "",
        tallest=tallest,
        pool_median=unit(pool),
        chosen_median=unit(part) if len(part) else None,
    )


def _outlines(places: Floats, heights: Floats) -> str:
    """Returns the path around each run of bins that hold something, so that empty bins are not underlined."""
    edges = np.flatnonzero(np.diff(np.r_[0.0, heights > 0, 0.0]))
    runs = []
    for start, end in zip(edges[::2], edges[1::2], strict=True):
        top = np.r_[0.0, np.repeat(heights[start:end], 2), 0.0]
        runs.append(line(np.repeat(places[start : end + 1], 2), top))
    return "".join(runs)


@dataclass(frozen=True, slots=True)
class Curve:
    """A density over a grid.

    Attributes:
        x: Axis of the grid.
        outline: Path of the area under the curve.
        band: Start and width of the shaded stretch in units of the figure, or None.
        ticks: Path of the chosen rows' marks along the bottom, empty where their place is not known.
    """

    x: Axis
    outline: str
    band: tuple[str, str] | None
    ticks: str


def curve(grid: Floats, density: Floats, band: Floats | None, marks: Floats) -> Curve:
    """Returns the density's figure; `marks` are values on the grid to be marked under it."""
    x = axis(grid, pad=0.0, allow_log=False)
    height = density / (1.05 * np.nanmax(density))
    shade = None
    if band is not None:
        start, end = np.clip(x.place(band), 0, 1) * SIDE
        shade = (f"{start:.1f}", f"{max(end - start, 1.0):.1f}")
    places = x.place(marks[np.isfinite(marks)]) * SIDE
    ticks = "".join(f"M{p:.1f} {SIDE}v-60" for p in np.unique(places.round(1)) if 0 <= p <= SIDE)
    return Curve(x, area(x.place(grid), height), shade, ticks)


@dataclass(frozen=True, slots=True)
class TradeOff:
    """Mean utility against mean risk along λ.

    Attributes:
        x: Axis of the mean risk.
        y: Axis of the mean utility.
        path: Line through the λ tried, in order.
        tried: Dots on it.
        taken: Dot of the λ that was taken, empty where none is marked.
        bound: Place of the bound in units of the figure, or None where it lies outside.
    """

    x: Axis
    y: Axis
    path: str
    tried: str
    taken: str
    bound: str | None


def trade_off(path: Floats, taken: Floats | None, bound: float | None) -> TradeOff:
    """Returns the trade-off curve of (λ, mean risk, mean utility) [m, 3] with the one taken [3] and the bound on the risk."""
    _, risk, utility = path.T
    x = axis(risk if bound is None else np.r_[risk, bound], allow_log=False)
    y = axis(utility, pad=0.08, allow_log=False, count=4)
    u, v = x.place(risk), y.place(utility)
    mark = dots(x.place(taken[1:2]), y.place(taken[2:])) if taken is not None else ""
    return TradeOff(x, y, line(u, v), dots(u, v), mark, None if bound is None else f"{SIDE * float(x.place(bound)):.1f}")


@dataclass(frozen=True, slots=True)
class Steps:
    """Numbers per step, one or more lines in a panel.

    Attributes:
        name: The panel's name.
        x: Axis of the steps, from 1.
        y: Axis of the values.
        lines: Each line's name and path.
        ends: Each line's first and last finite value.
        every: Only every so-manieth step is drawn.
    """

    name: str
    x: Axis
    y: Axis
    lines: tuple[tuple[str, str], ...]
    ends: tuple[tuple[float, float], ...]
    every: int


def steps(name: str, series: Mapping[str, Floats]) -> Steps | None:
    """Returns the panel of the lines in `series` (values per step by line name), or None where none has two finite values."""
    series = {key: v for key, v in series.items() if np.isfinite(v).sum() >= 2}
    if not series:
        return None
    longest = max(map(len, series.values()))
    every = math.ceil(longest / LONGEST_LINE)
    x = axis(np.array([1.0, longest]), pad=0.0, allow_log=False, count=4)
    y = axis(np.concatenate(list(series.values())), pad=0.06, count=4)
    lines, ends = [], []
    for key, v in series.items():
        kept = np.unique(np.r_[np.arange(0, len(v), every), len(v) - 1])
        lines.append((key, line(x.place(kept + 1.0), y.place(v[kept]))))
        finite = v[np.isfinite(v)]
        ends.append((float(finite[0]), float(finite[-1])))
    return Steps(name, x, y, tuple(lines), tuple(ends), every)
