"""A `Page` → everything the template prints, as plain values."""

from __future__ import annotations

import shlex
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import PurePath
from typing import Any
from urllib.parse import quote

import numpy as np
import numpy.typing as npt

from gradsieve.report import facts, figures, pictures, summary, wording
from gradsieve.report.figures import Floats
from gradsieve.report.page import Page

POINT_TEXT_BYTES = 1_200_000  # for the texts of the scatter's points together
LONG_TEXT = 20_000  # characters of one text in the lists of examples
EXCERPT = 360  # characters shown before "show all"
MOST_EXCLUDED = 200  # listed by id
MOST_GROUPS = 40  # listed by name
_HISTOGRAMS = ("tokens", "loss", "norm", "score", "utility", "cos/target", "risk", "overlap", "conflict")
_BESIDE_TEXT = ("utility", "cos/target", "risk", "overlap", "conflict", "score", "tokens", "loss", "norm")


def content(page: Page) -> dict[str, Any]:
    """Returns the template's variables by name, `page` excepted."""
    values = facts.row_values(page)
    lists = facts.examples(page)
    groups = facts.groups(page)
    length = next((values[name] for name in ("tokens", "completion_tokens") if name in values), None)
    scored = "score" in values
    return {
        "headline": summary.headline(page),
        "sentences": summary.sentences(page, values),
        "numbers": summary.five_numbers(page, values),
        "notes": tuple(dict.fromkeys([*page.notes, *page.selection.notes])),
        "scatter": _scatter(page, values, lists),
        "groups": groups[:MOST_GROUPS],
        "groups_left": groups[MOST_GROUPS:],
        "histograms": _histograms(values, page.chosen),
        "columns": [(wording.label(name), facts.compare(name, v, page.chosen)) for name, v in values.items()],
        "length_correlation": facts.rank_correlation(values["score"], length) if length is not None and scored else None,
        "scored": scored,
        "figures": _figures(page),
        "recorded": facts.recorded(page),
        "tables": ({"reference directions": known} if (known := facts.reliability(page)) else {}) | facts.tables(page),
        "lists": {name: [_item(page, values, row) for row in getattr(lists, name)] for name in lists.__slots__},
        "weights": _weights(page),
        "reasons": Counter(facts.kind_of_reason(reason) for _, reason in page.excluded).most_common(),
        "repeated": facts.repeated(page),
        "most_excluded": MOST_EXCLUDED,
        "long_text": LONG_TEXT,
        "cost": _cost(page),
        "links": [
            ("/".join([".", *map(_quoted, (*PurePath(page.folder).parts, name))]), name, what) for name, what in page.files
        ],
        "run_json": shlex.quote(str(PurePath(page.folder) / "run.json")),
    }


def _quoted(name: str) -> str:
    return quote(name, safe="", errors="replace")


def _figures(page: Page) -> dict[str, Any]:
    curve, trade = facts.curve_data(page), facts.trade_off(page)
    panels = [figures.steps(name, series) for name, series in facts.step_panels(page).items()]
    return {
        "curve": figures.curve(*curve) if curve else None,
        "trade_off": figures.trade_off(*trade) if trade else None,
        "taken": trade[1].tolist() if trade and trade[1] is not None else None,
        "bound": trade[2] if trade else None,
        "steps": [panel for panel in panels if panel is not None],
        "walk": pictures.walk(page.selection.trace),
        "bars": pictures.bars(page.selection.trace),
    }


def _telling(names: Sequence[str], values: Mapping[str, Floats]) -> list[str]:
    """Returns the names there are, without cosines that repeat the method's utility and risk unless they are an axis."""
    repeated, start = {"cos/target": "utility", "conflict": "risk"}, facts.axes(values) or ()
    return [name for name in names if name in values and (repeated.get(name) not in values or name in start)]


def _histograms(values: Mapping[str, Floats], chosen: npt.NDArray[np.bool_]) -> list[dict[str, Any]]:
    drawn = []
    for name in _telling(_HISTOGRAMS, values):
        shape = figures.histogram(values[name], chosen)
        if shape:
            drawn.append({"label": wording.label(name), "shape": shape, "of": facts.compare(name, values[name], chosen)})
    return drawn


def _weights(page: Page) -> dict[str, float] | None:
    w = page.weights
    if not len(w) or w.min() == w.max():
        return None
    return {"low": float(w.min()), "high": float(w.max()), "effective": float(w.sum() ** 2 / (w**2).sum())}


def _cost(page: Page) -> dict[str, Any]:
    def total(numbers: list[Any]) -> Any:
        known = [v for v in numbers if v is not None]
        return sum(known) if known else None

    longest = max((s.wall_seconds or 0.0 for s in page.stages), default=0.0)
    return {
        "stages": [(s, f"{100 * (s.wall_seconds or 0.0) / longest:.2f}" if longest else "0") for s in page.stages],
        "wall": total([s.wall_seconds for s in page.stages]),
        "cpu": total([s.cpu_seconds for s in page.stages]),
        "bytes": total([s.bytes for s in page.stages]),
    }


def _item(page: Page, values: Mapping[str, Floats], row: int) -> dict[str, Any]:
    """Returns an example as the lists print it."""
    place = int(page.places[row])
    names = _telling(_BESIDE_TEXT, values)
    return {
        "id": page.ids[row],
        "place": place,
        "weight": float(page.weights[place - 1]) if place and _weights(page) else None,
        "group": page.groups[row] if page.groups is not None else None,
        "prompt": _text(page.prompts[row]),
        "completion": _text(page.completions[row]),
        "values": [(wording.label(name).name, float(values[name][row])) for name in names],
    }


def _text(text: str) -> dict[str, Any]:
    """Returns a text for the lists: its beginning, the whole where that is not all (up to `LONG_TEXT`), its length."""
    long = len(text) > EXCERPT + 80
    return {"begin": text[:EXCERPT] + "…" if long else text, "whole": text[:LONG_TEXT] if long else None, "length": len(text)}


def _scatter(page: Page, values: Mapping[str, Floats], lists: facts.Examples) -> dict[str, Any] | None:
    """Returns the scatter's figure and the data behind it, or None where fewer than two columns vary."""
    start = facts.axes(values)
    if start is None:
        return None
    listed = np.array([row for name in lists.__slots__ for row in getattr(lists, name)], dtype=np.int64)
    rows = facts.sample(page, listed)
    axes = {name: figures.axis(values[name]) for name in facts.varied(values)}
    x, y = (axes[name].place(values[name]) for name in start)
    chosen = page.chosen
    seen = np.isfinite(x) & np.isfinite(y)
    drawn = rows[seen[rows]]
    opened = next((int(row) for row in (*page.order[np.isin(page.order, drawn)], *drawn)), None)
    border = facts.boundary(page, *(values[name] for name in start))
    limit = text_limit([text for row in rows for text in (page.prompts[row], page.completions[row])], POINT_TEXT_BYTES)
    return {
        "data": _points(page, values, axes, rows, limit) | {"start": start},
        "x": axes[start[0]],
        "y": axes[start[1]],
        "names": {name: wording.label(name) for name in axes},
        "start": start,
        "others": figures.dots(x[drawn][~chosen[drawn]], y[drawn][~chosen[drawn]]),
        "chosen": figures.dots(x[drawn][chosen[drawn]], y[drawn][chosen[drawn]]),
        "border": figures.straight(border, axes[start[0]], axes[start[1]]) if border else "",
        "drawn": len(rows),
        "drawn_chosen": int(chosen[rows].sum()),
        "unplaced": len(rows) - len(drawn),
        "text_limit": limit,
        "opened": None if opened is None else _item(page, values, opened) | {"index": int(np.searchsorted(rows, opened))},
        "opened_at": "" if opened is None else figures.dots(x[[opened]], y[[opened]]),
        "quartiles": [(wording.label(name), facts.compare(name, values[name], chosen)) for name in start],
    }


def text_limit(texts: Sequence[str], budget: int) -> int | None:
    """Returns the most characters per text with which all texts fit the budget; None where whole ones do.

    The budget is in bytes of UTF-8 with `<`, `>` and `&` written as escapes of six bytes.
    """

    def cost(limit: int) -> int:
        cut = [text[:limit] for text in texts]
        escapes = sum(text.count(character) for text in cut for character in "<>&")
        return sum(len(text.encode("utf-8", "replace")) for text in cut) + 5 * escapes

    low, high = 0, max(map(len, texts), default=0)
    if cost(high) <= budget:
        return None
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if cost(middle) <= budget else (low, middle)
    return low


def _points(
    page: Page, values: Mapping[str, Floats], axes: Mapping[str, figures.Axis], rows: npt.NDArray[np.int64], limit: int | None
) -> dict[str, Any]:
    """Returns what the script needs: the axes with their ticks, and the drawn rows, one list per field."""
    places, weights = page.places, page.weights
    shown = _telling(_BESIDE_TEXT, values)

    def short(texts: Sequence[str]) -> list[str]:
        cut = [texts[row] if limit is None or len(texts[row]) <= limit else texts[row][:limit] + "…" for row in rows]
        return [wording.visible(text) for text in cut]

    def rounded(v: Floats) -> list[float | None]:
        return [float(f"{x:.5g}") if np.isfinite(x) else None for x in v[rows].tolist()]

    labels = [None if page.groups is None else page.groups[row] for row in rows]
    return {
        "axes": {
            name: {
                "name": wording.label(name).name,
                "gloss": wording.label(name).gloss,
                "log": a.log,
                "low": a.low,
                "high": a.high,
            }
            | {"marks": a.marks()}
            for name, a in axes.items()
        },
        "columns": {name: rounded(values[name]) for name in dict.fromkeys([*axes, *shown])},
        "shown": [[name, wording.label(name).name] for name in shown],
        "id": [wording.visible(page.ids[row]) for row in rows],
        "prompt": short(page.prompts),
        "completion": short(page.completions),
        "cut": [0 if limit is None else max(len(page.prompts[r]), len(page.completions[r])) > limit for r in rows],
        "group": [None if name is None else wording.visible(name) for name in labels],
        "groups": [wording.visible(g.name) for g in facts.groups(page) if g.name is not None],
        "place": places[rows].tolist(),
        "weight": [float(f"{weights[places[row] - 1]:.5g}") if places[row] else 0 for row in rows] if _weights(page) else None,
        "count": len(page.order),
    }
