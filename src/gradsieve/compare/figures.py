"""A summary as figures: SVG documents that stand alone, in colours that read on light and dark paper.

No style sheet, no script, no request: everything is in attributes, so that a page may hold them under the strictest policy.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from xml.sax.saxutils import escape

import numpy as np

from gradsieve.compare.config import BASE, FULL, RANDOM
from gradsieve.compare.labels import place, width
from gradsieve.compare.statistics import Estimate
from gradsieve.compare.summary import Standing, Summary
from gradsieve.compare.units import forgetting_words, gain_words
from gradsieve.report.figures import Axis, axis
from gradsieve.report.wording import duration, visible

INK, RULE, ACCENT = "#77716a", "#c9c3b6", "#2f7fc1"
SHADES, ON_SHADE = ("#edf3f9", "#6aa6d6"), "#1d1b18"  # contrast at least 6.5
COLOURS = ("#1f78b8", "#cf5a00", "#00916c", "#b8578f", "#8f7a00", "#7c6bd6")
"""Of methods, from the palette of Okabe and Ito (2008) for all kinds of colour vision, darkened to be read on light paper."""

SHAPES = ("circle", "square", "triangle", "diamond", "down", "star", "right")
"""Of methods: 7 shapes and 6 colours taken in turn are 42 pairs."""

_SHAPES = {
    "circle": "M-5 0a5 5 0 1 0 10 0a5 5 0 1 0-10 0Z",
    "square": "M-4.4-4.4H4.4V4.4H-4.4Z",
    "triangle": "M0-5.6L5.4 4.4H-5.4Z",
    "diamond": "M0-6.4L6.4 0L0 6.4L-6.4 0Z",
    "down": "M0 5.6L5.4-4.4H-5.4Z",
    "star": "M0-6.6L1.7-2.3L6.3-2L2.7.9L3.9 5.3L0 2.8L-3.9 5.3L-2.7.9L-6.3-2L-1.7-2.3Z",
    "right": "M5.6 0L-4.4 5.4V-5.4Z",
    "hexagon": "M-6 0L-3-5.2H3L6 0L3 5.2H-3Z",
    "plus": "M-2-6H2V-2H6V2H2V6H-2V2H-6V-2H-2Z",
    "cross": "M0-2.8L3.2-6L6-3.2L2.8 0L6 3.2L3.2 6L0 2.8L-3.2 6L-6 3.2L-2.8 0L-6-3.2L-3.2-6Z",
}
WIDTH, HEIGHT, LEFT, BOTTOM, TOP, RIGHT = 720, 440, 64, 52, 28, 16
_FONT = 'font-family="system-ui, sans-serif"'


@dataclass(frozen=True, slots=True)
class Look:
    """How an arm is drawn, in all figures alike."""

    colour: str
    shape: str


BASELINES = {BASE: Look(INK, "hexagon"), FULL: Look(INK, "plus"), RANDOM: Look(INK, "cross")}


def figures(summary: Summary) -> dict[str, str]:
    """Returns every figure as an SVG document, by the name of its file without `.svg`."""
    made: dict[str, str] = {}
    look = looks([one.arm for one in summary.standings])
    gain, metric = gain_words(summary.gain_metric), summary.forgetting_metric
    for view in summary.views():
        own = [standing for standing in summary.standings if standing.view == view]
        if metric:
            made[f"pareto-{view}"] = pareto(own, look, gain, forgetting_words(metric), base=summary.base_on_front[view])
        if any(one.budget for one in own):
            made[f"gain-{view}"] = by_budget(own, look, "gain", gain)
            if metric:
                made[f"forgetting-{view}"] = by_budget(own, look, "forgetting", forgetting_words(metric))
        made[f"cost-{view}"] = costs(own)
    for budget, (names, rows) in summary.overlaps.items():
        if len(names) > 1:
            made[overlap_name(budget)] = overlaps(names, rows)
    return made


def overlap_name(budget: str) -> str:
    """Returns the name of the figure of a budget's subsets."""
    return f"overlap-{budget.replace('%', 'pct')}"


def looks(arms: Sequence[str]) -> dict[str, Look]:
    """Returns how each arm is drawn: methods differ in colour and shape, baselines are grey and differ in shape."""
    methods = [arm for arm in dict.fromkeys(arms) if arm not in BASELINES]
    return BASELINES | {arm: Look(COLOURS[i % len(COLOURS)], SHAPES[i % len(SHAPES)]) for i, arm in enumerate(methods)}


def pareto(standings: Sequence[Standing], look: Mapping[str, Look], above: str, below: str, *, base: bool) -> str:
    """Returns gain against forgetting with both intervals; arms on the front are filled and joined by a line.

    Args:
        standings: Of one view.
        look: How each arm is drawn.
        above: What gain is.
        below: What forgetting is.
        base: Whether the untouched model is on the front.
    """
    there = [(one, one.forgetting) for one in standings if one.forgetting is not None]
    x = _axis([v for _, f in there for v in (f.low, f.high)] + [0.0])
    y = _axis([v for one, _ in there for v in (one.gain.low, one.gain.high)] + [0.0])
    parts = _frame(x, y, below, above)
    front = sorted([(f.mean, one.gain.mean) for one, f in there if one.on_front] + [(0.0, 0.0)] * base)
    line = " ".join(f"{_x(x, f):.1f},{_y(y, g):.1f}" for f, g in front)
    parts.append(f'<polyline points="{line}" fill="none" stroke="{ACCENT}" stroke-width="1.5" stroke-dasharray="5 4"/>')
    points, texts, dots = [(_x(x, 0), _y(y, 0))], [BASE], [_mark(_x(x, 0), _y(y, 0), look[BASE], base)]
    bars = _along([(_x(x, f), _y(y, g)) for f, g in front])
    for one, f in there:
        px, py = _x(x, f.mean), _y(y, one.gain.mean)
        left, right, low, high = _x(x, f.low), _x(x, f.high), _y(y, one.gain.low), _y(y, one.gain.high)
        colour = look[one.arm].colour
        parts.append(_line(left, py, right, py, colour, faint=True) + _line(px, low, px, high, colour, faint=True))
        bars += [(left, py - 1, right, py + 1), (px - 1, high, px + 1, low)]
        dots.append(_mark(px, py, look[one.arm], bool(one.on_front), _described(one)))
        points.append((px, py))
        texts.append(one.label)
    colours = [look[BASE].colour, *(look[one.arm].colour for one, _ in there)]
    frame = (LEFT + 2, TOP, WIDTH - RIGHT, HEIGHT - BOTTOM)
    for found, text, colour in zip(place(points, texts, bars, frame), texts, colours, strict=True):
        if found.leader:
            parts.append(_line(*found.leader, colour, thin=True))
        dots.append(_text(found.box[0], found.box[3] - 3, text, colour))
    return _document([*parts, *dots], "Gain against forgetting")


def by_budget(standings: Sequence[Standing], look: Mapping[str, Look], what: str, title: str) -> str:
    """Returns a quantity over the budgets, one line per arm; what has no budget is a level."""
    budgets = list(dict.fromkeys(one.budget for one in standings if one.budget))
    sizes = {b: float(np.mean([one.examples for one in standings if one.budget == b])) for b in budgets}
    budgets.sort(key=lambda b: sizes[b])
    values = {id(one): _of(one, what) for one in standings}
    found = [v for v in values.values() if v is not None]
    y = _axis([v for e in found for v in (e.low, e.high)] + [0.0])
    room = (WIDTH - LEFT - RIGHT) / len(budgets)
    slots = {b: LEFT + (i + 0.5) * room for i, b in enumerate(budgets)}
    parts = _frame(None, y, "budget: share of the pool, or examples", title)
    parts += [_text(slots[b], HEIGHT - BOTTOM + 18, b, INK, "middle") for b in budgets]
    parts += [_line(slots[b] - room / 2, TOP, slots[b] - room / 2, HEIGHT - BOTTOM, RULE, faint=True) for b in budgets[1:]]
    arms = list(dict.fromkeys(one.arm for one in standings))
    of_budget = {b: [arm for arm in arms if any((one.arm, one.budget) == (arm, b) for one in standings)] for b in budgets}
    for arm in arms:
        own = sorted((one for one in standings if one.arm == arm and one.budget), key=lambda one: sizes[one.budget or ""])
        level = next((one for one in standings if one.arm == arm and not one.budget), None)
        colour = look[arm].colour
        if level is not None and (e := values[id(level)]) is not None:
            parts.append(_line(LEFT, _y(y, e.mean), WIDTH - RIGHT, _y(y, e.mean), colour, dash=True))
            parts.append(_text(WIDTH - RIGHT - 4, _y(y, e.mean) - 5, arm, colour, "end"))
        points = []
        for one in own:
            beside = of_budget[one.budget or ""]
            shift = (beside.index(arm) - (len(beside) - 1) / 2) * min(26.0, room / (len(beside) + 1))
            if (e := values[id(one)]) is not None:
                points.append((slots[one.budget or ""] + shift, e, one))
        path = " ".join(f"{px:.1f},{_y(y, e.mean):.1f}" for px, e, _ in points)
        parts.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="1.2" stroke-opacity="0.5"/>')
        for px, e, one in points:
            parts.append(
                _line(px, _y(y, e.low), px, _y(y, e.high), colour) + _mark(px, _y(y, e.mean), look[arm], True, _described(one))
            )
    marked = [arm for arm in arms if any(one.arm == arm and one.budget for one in standings)]
    return _document([*parts, *_key(marked, look)], title, extra=_key_height(marked))


def costs(standings: Sequence[Standing]) -> str:
    """Returns one bar per arm: seconds of gradients, selection, training, surgery and evaluation of a cell."""
    shades = {"gradients": "#8f6fb5", "select": "#c2611f", "train": "#2f7fc1", "surgery": "#c04a4a", "evaluate": "#9a938a"}
    rows = []
    for one in standings:
        parts = dict(one.seconds)
        parts["train"] -= parts["surgery"]
        rows.append((one.label, {name: parts[name] for name in shades}))
    longest = max((sum(parts.values()) for _, parts in rows), default=1.0) or 1.0
    left, high = _room([label for label, _ in rows]), 20.0
    wide = WIDTH - 90.0 - left
    made = []
    for i, (label, parts) in enumerate(rows):
        at = left
        top = 34 + i * (high + 6)
        made.append(_text(left - 8, top + 14, label, INK, "end"))
        for name, seconds in parts.items():
            width = seconds / longest * wide
            if width > 0:
                title = f"<title>{escape(visible(label))}: {name} {seconds:.1f} s</title>"
                made.append(
                    f'<rect x="{at:.1f}" y="{top}" width="{width:.1f}" height="{high}" fill="{shades[name]}">{title}</rect>'
                )
            at += width
        made.append(_text(at + 6, top + 14, duration(sum(parts.values())), INK))
    for i, (name, shade) in enumerate(shades.items()):
        made.append(
            f'<rect x="{left + i * 105}" y="8" width="10" height="10" fill="{shade}"/>'
            + _text(left + 15 + i * 105, 17, name, INK)
        )
    return _document(made, "Seconds per cell", height=44 + len(rows) * 26)


def overlaps(names: Sequence[str], rows: Sequence[Sequence[float]]) -> str:
    """Returns the Jaccard index of every pair of subsets, darker where more is shared."""
    left = _room(names)
    cell = max(26, min(46, int(WIDTH - left - 10) // max(1, len(names))))
    wide = max(float(WIDTH), left + len(names) * cell + 10)
    made = []
    for i, name in enumerate(names):
        made.append(_text(left - 8, 20 + (i + 0.62) * cell, name, INK, "end"))
        for j, value in enumerate(rows[i]):
            if math.isnan(value):
                continue
            title = f"<title>{escape(visible(name))} and {escape(visible(names[j]))}: {value:.2f}</title>"
            made.append(
                f'<rect x="{left + j * cell}" y="{20 + i * cell}" width="{cell - 2}" height="{cell - 2}" '
                f'fill="{_shade(value)}">{title}</rect>'
            )
            made.append(
                _text(
                    left + (j + 0.5) * cell - 1,
                    20 + (i + 0.62) * cell,
                    f"{value:.2f}".removeprefix("0"),
                    ON_SHADE,
                    "middle",
                    11,
                )
            )
    below = 20 + len(names) * cell + 8
    for j, name in enumerate(names):
        x = left + (j + 0.5) * cell
        made.append(f'<g transform="rotate(-40 {x:.1f} {below})">{_text(x, below, name, INK, "end")}</g>')
    slanted = 0.65 * max(map(width, names), default=0.0)  # sin 40°, and the height of letters
    return _document(made, "Jaccard index of subsets", height=below + max(90, math.ceil(slanted) + 14), wide=wide)


def _shade(share: float) -> str:
    """Returns a colour between the two SHADES. It is opaque, so that ON_SHADE is read on it on light and dark pages."""
    light, dark = ([int(shade[i : i + 2], 16) for i in (1, 3, 5)] for shade in SHADES)
    return "#" + "".join(f"{round(a + share * (b - a)):02x}" for a, b in zip(light, dark, strict=True))


# -- pieces -------------------------------------------------------------------------------------------------------------


def _of(one: Standing, what: str) -> Estimate | None:
    return one.gain if what == "gain" else one.forgetting


def _described(one: Standing) -> str:
    forgetting = (
        f", forgetting {one.forgetting.mean:+.4f} [{one.forgetting.low:+.4f}, {one.forgetting.high:+.4f}]"
        if one.forgetting
        else ""
    )
    return f"{one.label}: gain {one.gain.mean:+.4f} [{one.gain.low:+.4f}, {one.gain.high:+.4f}]{forgetting}"


def _axis(values: Sequence[float]) -> Axis:
    return axis(np.array(values, dtype=np.float64), pad=0.06, allow_log=False)


def _x(x: Axis, value: float) -> float:
    return LEFT + float(x.place(value)) * (WIDTH - LEFT - RIGHT)


def _y(y: Axis, value: float) -> float:
    return HEIGHT - BOTTOM - float(y.place(value)) * (HEIGHT - BOTTOM - TOP)


def _frame(x: Axis | None, y: Axis, below: str, above: str) -> list[str]:
    parts = []
    for value, text in zip(y.ticks, y.texts, strict=True):
        parts.append(
            _line(LEFT, _y(y, value), WIDTH - RIGHT, _y(y, value), RULE, faint=True)
            + _text(LEFT - 8, _y(y, value) + 4, text, INK, "end")
        )
    if x is not None:
        for value, text in zip(x.ticks, x.texts, strict=True):
            parts.append(_line(_x(x, value), TOP, _x(x, value), HEIGHT - BOTTOM, RULE, faint=True))
            parts.append(_text(_x(x, value), HEIGHT - BOTTOM + 18, text, INK, "middle"))
    parts.append(_text(WIDTH - RIGHT, HEIGHT - 10, below, INK, "end") + _text(LEFT, 14, above, INK))
    return parts


def _along(points: Sequence[tuple[float, float]]) -> list[tuple[float, float, float, float]]:
    """Returns small boxes along the line through the points."""
    steps = [(a, b, t) for a, b in pairwise(points) for t in np.linspace(0, 1, math.ceil(math.dist(a, b) / 16) + 1)]
    middles = [(a[0] + t * (b[0] - a[0]), a[1] + t * (b[1] - a[1])) for a, b, t in steps]
    return [(x - 1, y - 1, x + 1, y + 1) for x, y in middles]


def _key(arms: Sequence[str], look: Mapping[str, Look]) -> list[str]:
    columns = _key_columns(arms)
    parts = []
    for i, arm in enumerate(arms):
        x, y = LEFT + 6 + (i % columns) * (WIDTH - LEFT) / columns, HEIGHT + 8 + (i // columns) * 20
        parts.append(_mark(x, y, look[arm], True) + _text(x + 12, y + 4, arm, INK))
    return parts


def _key_height(arms: Sequence[str]) -> int:
    return 20 * math.ceil(len(arms) / _key_columns(arms)) + 8


def _key_columns(arms: Sequence[str]) -> int:
    return max(1, min(4, int((WIDTH - LEFT) / (24 + max(map(width, arms), default=0)))))


def _room(names: Sequence[str]) -> float:
    """Returns how much the names of rows need on the left."""
    return max(150.0, 16 + max(map(width, names), default=0.0))


def _text(x: float, y: float, text: str, colour: str, anchor: str = "start", size: int = 12) -> str:
    look = f'fill="{colour}" {_FONT} font-size="{size}" text-anchor="{anchor}"'
    return f'<text x="{x:.1f}" y="{y:.1f}" {look}>{escape(visible(text))}</text>'


def _line(
    x1: float, y1: float, x2: float, y2: float, colour: str, *, thin: bool = False, dash: bool = False, faint: bool = False
) -> str:
    dashes = ' stroke-dasharray="6 4"' if dash else ""
    wide, opacity = (0.8, 0.7) if thin else (1.2, 0.45) if faint else (1.5, 0.8)
    ends = f'x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"'
    return f'<line {ends} stroke="{colour}" stroke-width="{wide}" stroke-opacity="{opacity}"{dashes}/>'


def _mark(x: float, y: float, look: Look, full: bool, title: str = "") -> str:
    fill = look.colour if full else "none"
    inner = f"<title>{escape(visible(title))}</title>" if title else ""
    drawn = f'd="{_SHAPES[look.shape]}" fill="{fill}" stroke="{look.colour}" stroke-width="1.6"'
    return f'<path transform="translate({x:.1f} {y:.1f})" {drawn}>{inner}</path>'


def _document(parts: Sequence[str], title: str, *, height: int = HEIGHT, extra: int = 0, wide: float = WIDTH) -> str:
    box = f'viewBox="0 0 {wide:g} {height + extra}"'
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" {box} role="img" aria-label="{escape(visible(title), {chr(34): "&quot;"})}">'
    )
    return f"{head}<title>{escape(visible(title))}</title>{''.join(parts)}</svg>\n"
