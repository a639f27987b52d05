"""Which planted faults the arms of a study chose, and how long its examples are, from what is committed and the data.

    python studies/faults.py --data DATA/medicine --results studies/results/medicine-small --budget 20%

One row per arm: the number chosen of each kind that `prepare.py` planted, and trained tokens per example, means over its seeds.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from pathlib import Path

KINDS = ("clean", "swapped", "off-domain", "near-duplicate", "false-arithmetic", "mixed-numbers")


def table(data: Path, results: Path, budget: str) -> list[list[str]]:
    """Returns arm, seeds, a mean number of each of `KINDS`, and tokens per trained example, arm by arm."""
    planted: dict[int, dict[str, str]] = {}
    counts: dict[str, Counter[str]] = {}
    lengths: dict[str, list[float]] = {}
    for line in (results / "results.jsonl").read_text().splitlines():
        cell = json.loads(line)
        if cell["budget"] != budget:
            continue
        seed, arm = cell["seed"], cell["arm"]
        if seed not in planted:
            rows = map(json.loads, (data / f"pool-{seed}.jsonl").read_text().splitlines())
            planted[seed] = {row["id"]: row["planted"] for row in rows}
        chosen = json.loads((results / "cells" / cell["cell"] / "selection.json").read_text())["ids"]
        counts.setdefault(arm, Counter()).update(planted[seed][id] for id in chosen)
        lengths.setdefault(arm, []).append(cell["training"]["tokens"] / (cell["training"]["epochs"] * len(chosen)))
    return [
        [arm, str(len(own)), *(f"{counts[arm][kind] / len(own):.1f}" for kind in KINDS), f"{sum(own) / len(own):.0f}"]
        for arm, own in lengths.items()
    ]


def main() -> None:
    """Prints the table as Markdown."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="a domain's folder that prepare.py wrote")
    parser.add_argument("--results", type=Path, required=True, help="a comparison's folder")
    parser.add_argument("--budget", default="20%")
    options = parser.parse_args()
    for row in (["arm", "seeds", *KINDS, "tokens"], ["---"] * 9, *table(options.data, options.results, options.budget)):
        print(f"| {' | '.join(row)} |")


if __name__ == "__main__":
    main()
