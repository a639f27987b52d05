"""Every method in every study: gain and drift beside those of a random draw of the same size, from what is committed.

    python studies/scoreboard.py studies/results/*

A row per method, its settings where they are not its defaults, and budget; a column per study. A cell has the gain over random
(nats per token) and, behind the stroke, how much further the model moved than random moved it (divergence, nats per token).
**Bold**: the 95 % interval over items and seeds leaves 0 out. Only what has the seeds to be judged. `full` is held against the
first budget of random.
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gradsieve.compare.config import BASE, FULL, RANDOM
from gradsieve.pipeline import find_method
from gradsieve.selectors import SELECTORS
from gradsieve.types import Budget


def label(cell: Mapping[str, Any]) -> str:
    """Returns the method and what of its settings and its recipe is not the default today."""
    if cell["arm"] == FULL:
        return FULL
    defaults = dataclasses.asdict(find_method(cell["method"])[1])  # type: ignore[call-overload]
    own = {name: value for name, value in cell["settings"].items() if name in defaults and value != defaults[name]}
    if own.get("against") == "contrast":  # which counts by conflict, whatever `risk` says
        own.pop("risk", None)
    own |= {name: value for name, value in cell["own_recipe"].items() if name != "order"}
    said = (
        f"{name.replace('_', ' ')} {value:g}" if isinstance(value, float) else f"{name} {value}" for name, value in own.items()
    )
    return ", ".join([f"`{cell['method']}`", *said])


def scores(results: Path) -> dict[tuple[str, str], str]:
    """Returns a study's cells of the table by label and budget; of equal methods of several names the first."""
    pairs = list(csv.DictReader((results / "pairs.csv").read_text(encoding="utf-8").splitlines()))
    views = list(dict.fromkeys(row["view"] for row in pairs))
    if len(views) > 1:
        raise SystemExit(f"{results} must be a comparison in one view, got {', '.join(views)}; compare in each by itself")
    cells = [json.loads(line) for line in (results / "results.jsonl").read_text(encoding="utf-8").splitlines()]
    labels = {(cell["arm"], cell["budget"] or ""): label(cell) for cell in cells if cell["arm"] != BASE}
    first = next((budget for arm, budget in labels if arm == RANDOM), "")
    found: dict[tuple[str, str], str] = {}
    for row in pairs:
        if row["verdict_gain"] == "unjudged":
            continue
        for one, other, sign in ((row["arm"], row["other"], 1), (row["other"], row["arm"], -1)):
            arm, _, budget = one.partition(" ")
            if other == f"{RANDOM} {budget or first}":
                more = _number(sign, row["minus_gain"], row["verdict_gain"])
                further = _number(-sign, row["minus_keeping"], row["verdict_keeping"])
                found.setdefault((labels[arm, budget], budget), f"{more} / {further}")
    return found


def _number(sign: int, value: str, verdict: str) -> str:
    """Returns a number as the table writes it; a dash where a study has none."""
    if not value:
        return "–"
    written = f"{sign * float(value):+.3f}".replace("-", "−")
    return f"**{written}**" if verdict in ("win", "loss") else written


def _size(budget: str) -> tuple[float, ...]:
    """Returns what budgets are sorted by: shares before tokens before examples, the largest first."""
    if not budget:
        return ()
    found = Budget.parse(budget)
    return -(found.share or 0), -(found.tokens or 0), -(found.examples or 0)


def table(folders: list[Path]) -> list[list[str]]:
    """Returns the table row by row, the head first."""
    columns = {folder.name: scores(folder) for folder in folders}
    columns = {name: own for name, own in columns.items() if own}
    order = [FULL, *(f"`{name}`" for name in SELECTORS)]
    rows = dict.fromkeys(key for own in columns.values() for key in own)
    ranked = sorted(rows, key=lambda key: (order.index(key[0].partition(",")[0]), key[0], _size(key[1])))
    body = [[name, budget or "–", *(own.get((name, budget), "") for own in columns.values())] for name, budget in ranked]
    return [["method", "budget", *columns], ["---"] * (2 + len(columns)), *body]


def main() -> None:
    """Prints the table as Markdown."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, nargs="+", help="folders of comparisons")
    for row in table(parser.parse_args().results):
        print(f"| {' | '.join(row)} |")


if __name__ == "__main__":
    main()
