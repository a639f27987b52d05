"""A target that has its sources in the proportions of the tests, from the topics of the target that is there.

    python studies/even_target.py --source SETS --data DATA --domain law

prepare.py draws a target by topic, at most four rows of each, so that a source of few large topics is short in it: of law's
92 % are statutes, of the tests 69 %. This writes DATA/DOMAIN/target-even.jsonl, as many rows of the same topics, which no pool
has, apart from pools, tests and anchor; the pools stay as they are.
"""

from __future__ import annotations

import argparse
import random
from collections import Counter
from pathlib import Path

from prepare import Row, apart, publisher, read, topic, unasked, write


def main() -> None:
    """Writes the target of one domain."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", type=Path, required=True, help="folder with DOMAIN.train.jsonl.gz")
    parser.add_argument("--data", type=Path, required=True, help="folder that prepare.py wrote")
    parser.add_argument("--domain", required=True)
    options = parser.parse_args()
    folder = options.data / options.domain
    target, tests = read(folder / "target.jsonl"), read(folder / "test.jsonl")
    walls = {path.name: read(path) for path in sorted(folder.glob("pool-*.jsonl"))}
    walls |= {"tests": tests, "anchor": read(options.data / "anchor.jsonl")}
    topics = {topic(row) for row in target}
    train = [row for row in read(options.source / f"{options.domain}.train.jsonl.gz") if topic(row) in topics]
    usable = unasked(apart([row for row in train if row.get("kind") != "crossref"], walls), walls)
    rows = even(usable, Counter(map(publisher, tests)), len(target), random.Random(f"even target/{options.domain}"))
    write(folder / "target-even.jsonl", rows)
    print(f"{options.domain}: {dict(Counter(map(publisher, rows)))}, before {dict(Counter(map(publisher, target)))}")


def even(rows: list[Row], tests: Counter[str], count: int, rng: random.Random) -> list[Row]:
    """Returns rows of each publisher in the proportions of the tests, by largest remainders."""
    exact = {name: count * tests[name] / tests.total() for name in sorted(tests)}
    share = {name: int(value) for name, value in exact.items()}
    for name in sorted(exact, key=lambda name: share[name] - exact[name])[: count - sum(share.values())]:
        share[name] += 1
    chosen: list[Row] = []
    for name, wanted in share.items():
        own = [row for row in rows if publisher(row) == name]
        if len(own) < wanted:
            raise SystemExit(f"{name} must have {wanted} usable rows in the target's topics, got {len(own)}; ask for fewer")
        chosen += rng.sample(own, wanted)
    rng.shuffle(chosen)
    return chosen


if __name__ == "__main__":
    main()
