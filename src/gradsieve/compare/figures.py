"""A summary as figures: SVG documents that stand alone, in colours that read on light and dark paper.

No style sheet, no script, no request: everything is in attributes, so that a page may hold them under the strictest policy.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from xml.sax.saxutils import escape

import numpy as np

from gradsieve.compare.config import BASE, FULL, RANDOM
from gradsieve.compare.statistics import Estimate
from gradsieve.compare.summary import Standing, Summary
from gradsieve.report.figures import Axis, axis
from gradsieve.report.wording import visible

INK, RULE, ACCENT, QUIET = "#77716a", "#c9c3b6", "#2f7fc1", "#9a938a"
COLOURS = ("#2f7fc1", "#c2611f", "#3d8f5f", "#a04f9d", "#9a7d1c", "#c04a4a", "#4a8f9a", "#7a6bc0", "#7d7d7d", "#b8658a")
WIDTH, HEIGHT, LEFT, BOTTOM, TOP, RIGHT = 720, 400, 64, 52, 24, 16
_FONT = 'font-family="system-ui, sans-serif"'


def figures(summary: Summary) -> dict[str, str]:
    """Returns every figure as an SVG document, by the name of its file without `.svg`."""
    made: dict[str, str] = {}
    for view in summary.views():
        own = [standing for standing in summary.standings if standing.view == view]
        if summary.forgetting_metric:
            made[f"pareto-{view}"] = pareto(summary, own)
        if any(one.budget for one in own):
            made[f"gain-{view}"] = by_budget(own, "gain", f"gain in {summary.gain_metric}")
            if summary.forgetting_metric:
                made[f"forgetting-{view}"] = by_budget(own, "forgetting", f"forgetting in {summary.forgetting_metric}")
        made[f"cost-{view}"] = costs(own)
    for budget, (names, rows) in summary.overlaps.items():
        if len(names) > 1:
            made[f"overlap-{budget.replace('%', 'pct')}"] = overlaps(names, rows)
    return made


def pareto(summary: Summary, standings: Sequence[Standing]) -> str:
    """Returns gain against forgetting with both intervals; arms on the front are filled and joined by a line."""
    there = [(one, one.forgetting) for one in standings if one.forgetting is not None]
    x = _axis([v for _, f in there for v in (f.low, f.high)] + [0.0])
    y = _axis([v for one, _ in there for v in (one.gain.low, one.gain.high)] + [0.0])
    parts = _frame(
        x, y, f"forgetting: {summary.forgetting_metric} of general tests", f"gain: {summary.gain_metric} of target tests"
    )
    front = sorted([(f.mean, one.gain.mean) for one, f in there if one.on_front] + [(0.0, 0.0)])
    line = " ".join(f"{_x(x, f):.1f},{_y(y, g):.1f}" for f, g in front)
    parts.append(f'<polyline points="{line}" fill="none" stroke="{ACCENT}" stroke-width="1.5" stroke-dasharray="5 4"/>')
    parts.append(_dot(_x(x, 0), _y(y, 0), INK, True) + _text(_x(x, 0) + 8, _y(y, 0) + 14, BASE, INK))
    labels = []
    for number, (one, f) in enumerate(there):
        colour = _colour(one.arm, standings)
        px, py = _x(x, f.mean), _y(y, one.gain.mean)
        parts.append(
            _line(_x(x, f.low), py, _x(x, f.high), py, colour)
            + _line(px, _y(y, one.gain.low), px, _y(y, one.gain.high), colour)
        )
        parts.append(_dot(px, py, colour, bool(one.on_front), _described(one)))
        labels.append((px + 8, py - 6 if number % 2 == 0 else py + 14, one.label, colour))
    parts += [_text(px, py, text, colour) for px, py, text, colour in _apart(labels)]
    return _document(parts, "Gain against forgetting")


def by_budget(standings: Sequence[Standing], what: str, title: str) -> str:
    """Returns a quantity over the budgets, one line per arm; full and the untouched model as levels."""
    budgets = list(dict.fromkeys(one.budget for one in standings if one.budget))
    sizes = {b: float(np.mean([one.examples for one in standings if one.budget == b])) for b in budgets}
    budgets.sort(key=lambda b: sizes[b])
    values = {id(one): _of(one, what) for one in standings}
    found = [v for v in values.values() if v is not None]
    y = _axis([v for e in found for v in (e.low, e.high)] + [0.0])
    slots = {b: LEFT + (i + 0.5) * (WIDTH - LEFT - RIGHT) / len(budgets) for i, b in enumerate(budgets)}
    parts = _frame(None, y, "budget", title)
    parts += [_text(slots[b], HEIGHT - BOTTOM + 18, b, INK, "middle") for b in budgets]
    arms = list(dict.fromkeys(one.arm for one in standings))
    spread = min(10.0, (WIDTH - LEFT - RIGHT) / len(budgets) / (len(arms) + 2))
    for place, arm in enumerate(arms):
        own = sorted((one for one in standings if one.arm == arm and one.budget), key=lambda one: sizes[one.budget or ""])
        level = next((one for one in standings if one.arm == arm and not one.budget), None)
        colour = _colour(arm, standings)
        if level is not None and (e := values[id(level)]) is not None:
            parts.append(_line(LEFT, _y(y, e.mean), WIDTH - RIGHT, _y(y, e.mean), colour, dash=True))
            parts.append(_text(WIDTH - RIGHT - 4, _y(y, e.mean) - 5, arm, colour, "end"))
        shift = (place - (len(arms) - 1) / 2) * spread
        points = [(slots[one.budget or ""] + shift, e, one) for one in own if (e := values[id(one)]) is not None]
        path = " ".join(f"{px:.1f},{_y(y, e.mean):.1f}" for px, e, _ in points)
        parts.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="1.2" stroke-opacity="0.5"/>')
        for px, e, one in points:
            parts.append(
                _line(px, _y(y, e.low), px, _y(y, e.high), colour) + _dot(px, _y(y, e.mean), colour, True, _described(one))
            )
    return _document([*parts, *_key(arms, standings)], title, extra=_key_height(arms))


def costs(standings: Sequence[Standing]) -> str:
    """Returns one bar per arm: seconds of gradients, selection, training, surgery and evaluation of a cell."""
    shades = {"gradients": "#8f6fb5", "select": "#c2611f", "train": "#2f7fc1", "surgery": "#c04a4a", "evaluate": "#9a938a"}
    rows = []
    for one in standings:
        parts = dict(one.seconds)
        parts["train"] -= parts["surgery"]
        rows.append((one.label, {name: parts[name] for name in shades}))
    longest = max((sum(parts.values()) for _, parts in rows), default=1.0) or 1.0
    left, high, wide = 150.0, 20.0, WIDTH - 210.0
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
        made.append(_text(at + 6, top + 14, f"{sum(parts.values()):.0f} s", INK))
    for i, (name, shade) in enumerate(shades.items()):
        made.append(
            f'<rect x="{left + i * 105}" y="8" width="10" height="10" fill="{shade}"/>'
            + _text(left + 15 + i * 105, 17, name, INK)
        )
    return _document(made, "Seconds per cell", height=44 + len(rows) * 26)


def overlaps(names: Sequence[str], rows: Sequence[Sequence[float]]) -> str:
    """Returns the Jaccard index of every pair of subsets, darker where more is shared."""
    left, cell = 150, max(26, min(46, (WIDTH - 160) // max(1, len(names))))
    made = []
    for i, name in enumerate(names):
        made.append(_text(left - 8, 20 + (i + 0.62) * cell, name, INK, "end"))
        for j, value in enumerate(rows[i]):
            if math.isnan(value):
                continue
            title = f"<title>{escape(visible(name))} and {escape(visible(names[j]))}: {value:.2f}</title>"
            made.append(
                f'<rect x="{left + j * cell}" y="{20 + i * cell}" width="{cell - 2}" height="{cell - 2}" fill="{ACCENT}" '
                f'fill-opacity="{0.06 + 0.8 * value:.3f}">{title}</rect>'
            )
            made.append(
                _text(
                    left + (j + 0.5) * cell - 1,
                    20 + (i + 0.62) * cell,
                    f"{value:.2f}".removeprefix("0"),
                    "#ffffff" if value > 0.55 else INK,
                    "middle",
                    11,
                )
            )
    below = 20 + len(names) * cell + 8
    for j, name in enumerate(names):
        x = left + (j + 0.5) * cell
        made.append(f'<g transform="rotate(-40 {x:.1f} {below})">{_text(x, below, name, INK, "end")}</g>')
    return _document(made, "Jaccard index of subsets", height=below + 90)


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
            _line(LEFT, _y(y, value), WIDTH - RIGHT, _y(y, value), RULE, thin=True)
            + _text(LEFT - 8, _y(y, value) + 4, text, INK, "end")
        )
    if x is not None:
        for value, text in zip(x.ticks, x.texts, strict=True):
            parts.append(_line(_x(x, value), TOP, _x(x, value), HEIGHT - BOTTOM, RULE, thin=True))
            parts.append(_text(_x(x, value), HEIGHT - BOTTOM + 18, text, INK, "middle"))
    parts.append(_text(WIDTH - RIGHT, HEIGHT - 10, below, INK, "end") + _text(LEFT, 14, above, INK))
    return parts


def _key(arms: Sequence[str], standings: Sequence[Standing]) -> list[str]:
    parts = []
    for i, arm in enumerate(arms):
        x, y = LEFT + (i % 4) * 160, HEIGHT + 8 + (i // 4) * 20
        parts.append(_dot(x, y, _colour(arm, standings), True) + _text(x + 10, y + 4, arm, INK))
    return parts


def _key_height(arms: Sequence[str]) -> int:
    return 20 * math.ceil(len(arms) / 4) + 8


def _colour(arm: str, standings: Sequence[Standing]) -> str:
    if arm in (FULL, RANDOM):
        return {FULL: "#5d5850", RANDOM: QUIET}[arm]
    arms = list(dict.fromkeys(one.arm for one in standings if one.arm not in (FULL, RANDOM)))
    return COLOURS[arms.index(arm) % len(COLOURS)]


def _apart(labels: Sequence[tuple[float, float, str, str]]) -> list[tuple[float, float, str, str]]:
    """Returns the labels moved down where one would lie on another."""
    placed: list[tuple[float, float, str, str]] = []
    for x, y, text, colour in sorted(labels, key=lambda label: (label[1], label[0])):
        width = 6.5 * len(text)
        if x + width > WIDTH - RIGHT:
            x -= width + 16
        while any(abs(y - other[1]) < 12 and x < other[0] + 6.5 * len(other[2]) and other[0] < x + width for other in placed):
            y += 3
        placed.append((x, y, text, colour))
    return placed


def _text(x: float, y: float, text: str, colour: str, anchor: str = "start", size: int = 12) -> str:
    look = f'fill="{colour}" {_FONT} font-size="{size}" text-anchor="{anchor}"'
    return f'<text x="{x:.1f}" y="{y:.1f}" {look}>{escape(visible(text))}</text>'


def _line(x1: float, y1: float, x2: float, y2: float, colour: str, *, thin: bool = False, dash: bool = False) -> str:
    dashes = ' stroke-dasharray="6 4"' if dash else ""
    width, opacity = (1, 0.5) if thin else (1.5, 0.8)
    ends = f'x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"'
    return f'<line {ends} stroke="{colour}" stroke-width="{width}" stroke-opacity="{opacity}"{dashes}/>'


def _dot(x: float, y: float, colour: str, full: bool, title: str = "") -> str:
    fill = f'fill="{colour}"' if full else f'fill="none" stroke="{colour}" stroke-width="2"'
    inner = f"<title>{escape(visible(title))}</title>" if title else ""
    return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{5 if full else 4}" {fill}>{inner}</circle>'


def _document(parts: Sequence[str], title: str, *, height: int = HEIGHT, extra: int = 0) -> str:
    box = f'viewBox="0 0 {WIDTH} {height + extra}"'
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" {box} role="img" aria-label="{escape(visible(title), {chr(34): "&quot;"})}">'
    )
    return f"{head}<title>{escape(visible(title))}</title>{''.join(parts)}</svg>\n"
