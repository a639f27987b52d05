"""How many rows `--dedup near` leaves out, by threshold: of the demo pool by kind of row, and of any files.

python benchmarks/dedup.py [FILE …] [--rows 2000]
"""

from __future__ import annotations

import argparse
from collections import Counter

from gradsieve.data import read_examples, row_fields
from gradsieve.data.dedup import find_duplicates
from gradsieve.demo import demo_set

THRESHOLDS = (0.4, 0.5, 0.6, 0.7)


def main() -> None:
    """Prints one line per set and threshold."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="*")
    parser.add_argument("--rows", type=int, default=2000, help="of each file, from its beginning")
    arguments = parser.parse_args()
    for seed in range(3):
        pool = demo_set("pool", "demo:400", seed)
        kinds = [str(row_fields(example).get("planted")) for example in pool]
        for threshold in THRESHOLDS:
            pairs = [{kinds[d.position], kinds[d.of]} for d in find_duplicates(pool, "near", threshold)]
            counts = Counter(" and ".join(sorted(pair)) for pair in pairs)
            shown = ", ".join(f"{count} {pair}" for pair, count in counts.most_common())
            print(f"demo, seed {seed}, {threshold}: {len(pairs)} of {len(pool)} go: {shown}", flush=True)
    for file in arguments.files:
        pool = list(read_examples([file]).examples[: arguments.rows])
        for threshold in THRESHOLDS:
            found = find_duplicates(pool, "near", threshold)
            print(f"{file}, {threshold}: {len(found)} of {len(pool)} go ({len(found) / len(pool):.1%})", flush=True)


if __name__ == "__main__":
    main()
