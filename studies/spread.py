"""How near one another the gradients are that the arms of a study chose, and whether they left a source out.

    python studies/spread.py --data DATA/law --results studies/results/law-adapted --store RUNS/law-adapted/stores/KEY/pool

The mean cosine of two chosen examples' sketches: the larger it is, the further their steps add up in one direction, and the
less there is of anything else. And the share of the rows that are of the source that most of the target is of. Means over
seeds; what the whole pool, the target and the tests have stands above.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from pathlib import Path
from statistics import mean
from typing import Any

import torch

from gradsieve.alignment import mean_cosine
from gradsieve.data import TokenSet, read_examples
from gradsieve.models import find_model
from gradsieve.store import GradientStore
from prepare import publisher


def read(path: Path) -> dict[str, dict[str, Any]]:
    """Returns the rows of a file by id."""
    return {row["id"]: row for row in map(json.loads, path.read_text(encoding="utf-8").splitlines())}


def share(rows: list[dict[str, Any]], name: str) -> float:
    """Returns the share of the rows that are of one publisher."""
    return sum(publisher(row) == name for row in rows) / len(rows)


def main() -> None:
    """Prints the table as Markdown."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="a domain's folder that prepare.py wrote")
    parser.add_argument("--results", type=Path, required=True, help="a comparison's folder")
    parser.add_argument("--store", type=Path, required=True, help="the pool's part of a store of gradients of its pools")
    parser.add_argument("--budget", default="20%")
    parser.add_argument("--model", default="demo", help="the model the gradients are of, for its tokenizer")
    parser.add_argument("--max-length", type=int, default=256)
    options = parser.parse_args()
    store, tokenizer = GradientStore.open(options.store), find_model(options.model).tokenizer
    target, test = (list(read(options.data / f"{name}.jsonl").values()) for name in ("target", "test"))
    main_source = Counter(map(publisher, target)).most_common(1)[0][0]
    cosines: dict[str, list[float]] = {"pool": []}
    shares: dict[str, list[float]] = {"pool": [], "target": [share(target, main_source)], "test": [share(test, main_source)]}
    seeds: set[int] = set()
    for line in (options.results / "results.jsonl").read_text().splitlines():
        cell = json.loads(line)
        if cell["budget"] != options.budget:
            continue
        path = options.data / f"pool-{cell['seed']}.jsonl"
        rows = read(path)
        tokens = TokenSet.of("pool", read_examples(path).examples, tokenizer, max_length=options.max_length)
        view = store.view(tokens.ids, tokens.keys)
        places = {id: place for place, id in enumerate(view.ids)}
        chosen = json.loads((options.results / "cells" / cell["cell"] / "selection.json").read_text())["ids"]
        sides = {cell["arm"]: chosen} | ({} if cell["seed"] in seeds else {"pool": list(places)})
        seeds.add(cell["seed"])
        for name, ids in sides.items():
            cosines.setdefault(name, []).append(mean_cosine(view.rows(torch.tensor([places[id] for id in ids]))))
            shares.setdefault(name, []).append(share([rows[id] for id in ids], main_source))
    for row in (["rows", "mean cosine of two", f"of {main_source}"], ["---"] * 3):
        print(f"| {' | '.join(row)} |")
    for name in shares:
        cosine = f"{mean(cosines[name]):.3f}" if name in cosines else "–"
        print(f"| {name} | {cosine} | {mean(shares[name]):.0%} |")


if __name__ == "__main__":
    main()
