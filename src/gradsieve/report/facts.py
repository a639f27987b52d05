"""A `Page` → what there is to say about it: comparisons, groups, examples, the sample to draw."""

from __future__ import annotations

import random
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from gradsieve.report.figures import Floats
from gradsieve.report.page import Page

_REPEATS = re.compile(r"(copy|near-duplicate) of (.+)", re.DOTALL)  # the reasons that the filter for duplicates gives
MOST_POINTS = 3000  # drawn in the scatter
_FIRST = ("utility", "risk", "overlap", "conflict", "cos/target", "score", "tokens", "completion_tokens", "loss", "norm")
_OWN_FIGURE = frozenset({"density", "band", "path", "steps", "walk", "layout", "bars"})


def _numbers(value: object) -> Floats | None:
    """Returns a plain list (or array) of numbers as float64, None for anything else; None entries become NaN."""
    if isinstance(value, (str, bytes, Mapping)) or not hasattr(value, "__len__"):
        return None
    try:
        array = np.asarray(value, dtype=np.float64)
    except (TypeError, ValueError):
        return None
    return array if array.ndim == 1 else None


def kind_of_reason(reason: str) -> str:
    """Returns the reason for leaving an example out, the same for all that repeat another one, whichever that is."""
    match = _REPEATS.match(reason)
    return f"{match[1]} of another example" if match else reason


def repeated(page: Page) -> list[tuple[str, list[str]]]:
    """Returns the examples that others repeat, each with the ids of those, the most repeated first."""
    groups: dict[str, list[str]] = {}
    for id, reason in page.excluded:
        if match := _REPEATS.match(reason):
            groups.setdefault(match[2], []).append(id)
    return sorted(((id, sorted(others)) for id, others in groups.items()), key=lambda group: (-len(group[1]), group[0]))


def row_values(page: Page) -> dict[str, Floats]:
    """Returns every number there is per row, float64 [n] by name, the telling ones first.

    These are the scores, the columns, the entries of the trace that the method says have one number per row (they win over a
    column of the same name), and what follows from exact products: `cos/R` and `conflict`. A column without any finite value
    is left in.
    """
    values = {name: column.cpu().double().numpy() for name, column in page.columns.items()}
    scores = page.selection.scores.cpu().double().numpy()
    if np.isfinite(scores).any():
        values["score"] = scores
    for name in page.selection.per_row:
        values[name] = np.array(page.selection.trace[name], dtype=np.float64)
    if "norm" in values:
        norm = np.where(values["norm"] > 0, values["norm"], np.nan)
        for name in [name for name in values if name.startswith("dot/")]:
            values.setdefault("cos/" + name.removeprefix("dot/"), values[name] / norm)
        if "cos/anchor" in values:
            values.setdefault("conflict", -values["cos/anchor"])
    first = [name for name in _FIRST if name in values]
    return {name: values[name] for name in first + [name for name in values if name not in _FIRST]}


def varied(values: Mapping[str, Floats]) -> list[str]:
    """Returns the columns with at least two different finite values: those worth an axis."""
    finite = {name: v[np.isfinite(v)] for name, v in values.items()}
    return [name for name, v in finite.items() if len(v) and v.min() < v.max()]


def axes(values: Mapping[str, Floats]) -> tuple[str, str] | None:
    """Returns the columns to open the scatter with, x and y: utility and conflict, else the two most telling ones.

    Risk is zero wherever nothing conflicts; where that is so for more than 9 rows of 10, the signed conflict shows more.
    """
    names = varied(values)
    x = next((name for name in ("utility", "cos/target") if name in names), None)
    y: str | None = next((name for name in ("overlap", "risk") if name in names), None)
    if "conflict" in names and (y is None or np.mean(values[y] > 0) < 0.1):
        y = "conflict"
    if x and y:
        return x, y
    telling: tuple[str, ...] = ("score", "tokens", "completion_tokens", "loss", "norm")
    rest = [name for name in telling if name in names]
    rest += [name for name in names if name not in rest]
    if len(rest) < 2:
        return None
    return (rest[1], rest[0]) if rest[0] == "score" else (rest[0], rest[1])


def sample(page: Page, keep: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Returns the rows to draw, ascending: all of them up to `MOST_POINTS`, else a sample drawn with the run's seed.

    The sample has `keep` and, of the rest, up to half chosen rows, so that a small selection stays visible.
    """
    n = len(page.ids)
    if n <= MOST_POINTS:
        return np.arange(n)
    draw = random.Random(page.seed)
    chosen = page.chosen
    kept = np.zeros(n, dtype=bool)
    kept[keep] = True
    free_chosen, free_rest = np.flatnonzero(chosen & ~kept), np.flatnonzero(~chosen & ~kept)
    room = MOST_POINTS - int(kept.sum())
    take = min(len(free_chosen), max(room // 2, room - len(free_rest)))
    drawn = draw.sample(free_chosen.tolist(), take) + draw.sample(free_rest.tolist(), min(len(free_rest), room - take))
    return np.sort(np.r_[np.flatnonzero(kept), np.array(drawn, dtype=np.int64)])


@dataclass(frozen=True, slots=True)
class Comparison:
    """One column in the pool and in the selection.

    Attributes:
        name: The column.
        pool: Its quartiles (25, 50, 75 %) in the pool, NaN where it has no value, and
        chosen: in the selection.
        missing: Rows of the pool without a value.
    """

    name: str
    pool: tuple[float, float, float]
    chosen: tuple[float, float, float]
    missing: int

    @property
    def differs(self) -> int:
        """1 or -1 where the median moved up or down by over a quarter of the pool's interquartile range, else 0."""
        shift = self.chosen[1] - self.pool[1]
        return int(np.sign(shift)) if abs(shift) > 0.25 * (self.pool[2] - self.pool[0]) else 0


def compare(name: str, values: Floats, chosen: npt.NDArray[np.bool_]) -> Comparison:
    """Returns the column's quartiles before and after."""

    def quartiles(v: Floats) -> tuple[float, float, float]:
        if not len(v):
            return (np.nan, np.nan, np.nan)
        a, b, c = np.quantile(v, [0.25, 0.5, 0.75])
        return float(a), float(b), float(c)

    finite = np.isfinite(values)
    return Comparison(name, quartiles(values[finite]), quartiles(values[finite & chosen]), int((~finite).sum()))


def rank_correlation(a: Floats, b: Floats) -> float:
    """Returns Spearman's correlation of two columns over the rows where both are finite; NaN where one is constant."""
    both = np.isfinite(a) & np.isfinite(b)
    ranks = []
    for v in (a[both], b[both]):
        _, inverse, count = np.unique(v, return_inverse=True, return_counts=True)
        rank = (np.cumsum(count) - (count - 1) / 2)[inverse]
        ranks.append(rank - rank.mean() if len(rank) else rank)
    scale = np.sqrt((ranks[0] ** 2).sum() * (ranks[1] ** 2).sum())
    return float((ranks[0] * ranks[1]).sum() / scale) if scale > 0 else float("nan")


@dataclass(frozen=True, slots=True)
class Group:
    """A label's part of the pool and of the selection.

    Attributes:
        name: The label, None for rows without one.
        pool: Its rows in the pool, and
        pool_share: their share of it.
        chosen: Its rows in the selection, and
        chosen_share: their share of it, NaN where nothing was chosen.
    """

    name: str | None
    pool: int
    pool_share: float
    chosen: int
    chosen_share: float


def groups(page: Page) -> list[Group]:
    """Returns the groups, the largest first (then by name; rows without a label last); none where the page has no labels."""
    if page.groups is None:
        return []
    pool = Counter(page.groups)
    chosen = Counter(page.groups[row] for row in page.order)
    n, k = len(page.ids), len(page.order)
    names = sorted(pool, key=lambda name: (name is None, -pool[name], name or ""))
    return [Group(name, pool[name], pool[name] / n, chosen[name], chosen[name] / k if k else float("nan")) for name in names]


@dataclass(frozen=True, slots=True)
class Examples:
    """Rows worth reading; no row is in two of the lists.

    Attributes:
        best: First of the selection.
        last_in: Last of the selection, in its order.
        first_out: Not chosen, with the highest scores; empty where the method gives none.
        worst: Not chosen, with the lowest scores, the lowest first; empty where the method gives none.
    """

    best: tuple[int, ...]
    last_in: tuple[int, ...]
    first_out: tuple[int, ...]
    worst: tuple[int, ...]


def examples(page: Page, count: int = 4) -> Examples:
    """Returns `count` best, half as many on either side of the border, and `count` worst rows; ties by id."""
    order = page.order.tolist()
    best, rest = order[:count], order[count:]
    last_in = rest[max(0, len(rest) - count // 2) :]
    scores = page.selection.scores.cpu().double().numpy()
    out = sorted(np.flatnonzero(~page.chosen & np.isfinite(scores)).tolist(), key=lambda row: (-scores[row], page.ids[row]))
    first_out, low = out[: count // 2], out[count // 2 :]
    return Examples(tuple(best), tuple(last_in), tuple(first_out), tuple(low[max(0, len(low) - count) :][::-1]))


def boundary(page: Page, x: Floats, y: Floats) -> tuple[float, float, float] | None:
    """Returns (a, b, c) of the line `a x + b y = c` that parts chosen from not chosen, where the method's score is one.

    That is so for a score that is linear in the two axes and a selection of the highest scores: both are verified, with
    tolerance 1e-6 of the scores' range. None otherwise.
    """
    scores, chosen = page.selection.scores.cpu().double().numpy(), page.chosen
    seen = np.isfinite(scores) & np.isfinite(x) & np.isfinite(y)
    if seen.sum() < 4 or not (chosen & seen).any() or not (~chosen & seen).any() or not (seen | ~chosen).all():
        return None
    X, s = np.c_[x, y, np.ones(len(x))][seen], scores[seen]
    tolerance = 1e-6 * float(s.max() - s.min())
    (a, b, offset), _, rank, _ = np.linalg.lstsq(X, s, rcond=None)
    lowest_in, highest_out = float(scores[chosen].min()), float(scores[seen & ~chosen].max())
    if rank < 3 or tolerance == 0 or np.abs(X @ [a, b, offset] - s).max() > tolerance or lowest_in < highest_out - tolerance:
        return None
    return float(a), float(b), (lowest_in + highest_out) / 2 - float(offset)


def curve_data(page: Page) -> tuple[Floats, Floats, Floats | None, Floats] | None:
    """Returns grid, density, band or None, and the chosen rows' values on it (empty where unknown); None without a curve."""
    trace = page.selection.trace
    curve = trace.get("density")
    if not isinstance(curve, Mapping):
        return None
    grid, density = _numbers(curve.get("grid")), _numbers(curve.get("values"))
    if grid is None or density is None or len(grid) != len(density) or len(grid) < 2 or not np.nanmax(density) > 0:
        return None
    band, at = _numbers(trace.get("band")), row_values(page).get("gradient_score")
    marks = at[page.order] if at is not None else np.empty(0)
    return grid, density, band if band is not None and len(band) == 2 else None, marks


def trade_off(page: Page) -> tuple[Floats, Floats | None, float | None] | None:
    """Returns the tried (λ, mean risk, mean utility) [m, 3] by λ, the one that was taken [3] or None, and the bound or None.

    None without a path of at least two different points.
    """
    trace = page.selection.trace
    try:
        path = np.asarray(trace.get("path"), dtype=np.float64)
    except (TypeError, ValueError):
        return None
    if path.ndim != 2 or path.shape[1] != 3:
        return None
    path = np.unique(path[np.isfinite(path).all(1)], axis=0)
    if len(np.unique(path[:, 1:], axis=0)) < 2:
        return None
    penalty, bound = trace.get("lambda"), trace.get("bound")
    taken = path[path[:, 0] == penalty] if isinstance(penalty, (int, float)) else path[:0]
    return path, taken[0] if len(taken) else None, float(bound) if isinstance(bound, (int, float)) else None


def step_panels(page: Page) -> dict[str, dict[str, Floats]]:
    """Returns the numbers per step by panel and line; a line that is alone in its panel may be called `""`."""
    panels: dict[str, dict[str, Floats]] = {}
    for name, mapping in page.selection.trace.items():
        if name in page.selection.per_row:
            continue
        if name not in _OWN_FIGURE and _is_per_step(mapping):
            panels[name] = {"": np.array(mapping, dtype=np.float64)}
            continue
        if not isinstance(mapping, Mapping) or name in _OWN_FIGURE - {"steps"}:
            continue
        for key, entry in mapping.items():
            array = _numbers(entry)
            if array is not None:
                panel, _, line = str(key).partition("/")
                panels.setdefault(panel if name == "steps" else f"{name}: {panel}", {})[line] = array
    return panels


def _is_per_step(entry: object) -> bool:
    """Says whether an entry holds values per step, None where a step has none: whole numbers are rows or counts."""
    return (
        isinstance(entry, (list, tuple))
        and all(v is None or isinstance(v, float) for v in entry)
        and (not entry or any(v is not None for v in entry))
    )


def _is_single(value: object) -> bool:
    return value is None or isinstance(value, (bool, int, float, str))


def reliability(page: Page) -> tuple[list[str], list[tuple[str, list[object]]]] | None:
    """Returns the table of the reference directions, as `tables` does, or None without any."""
    columns = ["examples", "signal share", "rank correlation of its halves"]
    rows: list[tuple[str, list[object]]] = [
        (name, [fact.count, fact.signal_share, fact.split_half]) for name, fact in sorted(page.references.items())
    ]
    return (columns, rows) if rows else None


def tables(page: Page) -> dict[str, tuple[list[str], list[tuple[str, list[object]]]]]:
    """Returns the tables of the trace by name: the columns' names, and each row's name and values (None where it has none)."""
    found: dict[str, tuple[list[str], list[tuple[str, list[object]]]]] = {}
    for name, entry in page.selection.trace.items():
        rows: list[tuple[str, object]] = []
        if isinstance(entry, Mapping) and name not in _OWN_FIGURE:
            rows = [(str(key), row) for key, row in entry.items()]
        elif isinstance(entry, (list, tuple)):
            rows = [(str(number), row) for number, row in enumerate(entry, 1)]
        mappings = [(key, row) for key, row in rows if isinstance(row, Mapping) and row and all(map(_is_single, row.values()))]
        if mappings and len(mappings) == len(rows):
            columns = list(dict.fromkeys(str(column) for _, row in mappings for column in row))
            found[name] = columns, [(key, [row.get(column) for column in columns]) for key, row in mappings]
    return found


def recorded(page: Page) -> dict[str, object]:
    """Returns the single numbers and texts of the trace; those of a mapping are called `NAME: KEY`."""
    kept: dict[str, object] = {}
    for name, v in page.selection.trace.items():
        if _is_single(v) or (isinstance(v, (list, tuple)) and 0 < len(v) <= 12 and all(isinstance(x, str) for x in v)):
            kept[name] = v
        elif isinstance(v, Mapping) and name not in _OWN_FIGURE:
            kept |= {f"{name}: {key}": x for key, x in v.items() if _is_single(x)}
    return kept
