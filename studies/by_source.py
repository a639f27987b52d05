"""Which of the test's sources each arm taught: gain over random on the items of each publisher by itself.

    python studies/by_source.py --data DATA/law --results studies/results/law-20pct --budget 20%

A target that is mostly of one source asks for that source, and a choice that follows it teaches the others less: a mean over a
test of several sources holds both. Fall of the loss, nats per token, with 95 % intervals over seeds and that publisher's items
(gradsieve.compare.statistics); **bold** where they leave 0 out. Arms of fewer than three seeds and sources of
fewer than five items are left out.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np

from gradsieve.compare.records import read_items
from gradsieve.compare.statistics import JUDGED, Draws, estimate
from prepare import publisher

RESAMPLES = 4000
FEWEST = 5


def losses(results: Path, cells: dict[str, dict[int, str]], arm: str, test: str) -> dict[int, np.ndarray]:
    """Returns an arm's loss of every item of a test by seed."""
    files = {seed: results / "cells" / cell / "items.parquet" for seed, cell in cells[arm].items()}
    return {seed: read_items(file).values[test]["loss"] for seed, file in files.items()}


def main() -> None:
    """Prints the table as Markdown."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="a domain's folder that prepare.py wrote")
    parser.add_argument("--results", type=Path, required=True, help="a comparison's folder")
    parser.add_argument("--budget", default="20%")
    options = parser.parse_args()
    cells: dict[str, dict[int, str]] = {}
    for line in (options.results / "results.jsonl").read_text(encoding="utf-8").splitlines():
        cell = json.loads(line)
        if cell["seed"] is not None and cell["budget"] in (None, options.budget):
            cells.setdefault(cell["arm"], {})[cell["seed"]] = cell["cell"]
    test, rows = options.data.name, [json.loads(line) for line in (options.data / "test.jsonl").open(encoding="utf-8")]
    of = {row["id"]: publisher(row) for row in rows}
    items = list(read_items(options.results / "cells" / "base" / "items.parquet").items[test])
    sources = sorted({of[item] for item in items}, key=lambda source: -sum(of[item] == source for item in items))
    chance = losses(options.results, cells, "random", test)
    sources = [source for source in sources if sum(of[item] == source for item in items) >= FEWEST]
    print("| arm |" + "".join(f" {source} ({sum(of[item] == source for item in items)} items) |" for source in sources))
    print("| --- |" + " --- |" * len(sources))
    for arm in cells:
        own = losses(options.results, cells, arm, test)
        seeds = sorted(own.keys() & chance.keys())
        if arm == "random" or len(seeds) < JUDGED:
            continue
        draws = Draws.of(len(seeds), RESAMPLES)
        shown = []
        for source in sources:
            mine = np.array([of[item] == source for item in items])
            table = np.stack([(chance[seed] - own[seed])[mine] for seed in seeds])
            found = estimate(table, draws, draws.items(source, int(mine.sum())))
            text = f"{found.mean:+.3f} [{found.low:+.3f}, {found.high:+.3f}]".replace("-", "−")
            shown.append(f"**{text}**" if found.verdict in ("win", "loss") else text)
        print(f"| {arm} | {' | '.join(shown)} |")


if __name__ == "__main__":
    main()
