"""Pools of which a third is of the domain, out of those that prepare.py wrote: for methods that never ask for the domain.

    python studies/mixed_pool.py --data DATA --domain medicine

Writes DATA/mixed/DOMAIN/pool-SEED.jsonl, as many rows as DATA/DOMAIN/pool-SEED.jsonl has, a third of each domain's pool of that
seed, in random order. Faults stay in; `planted` of a row of another domain is `off-domain`, whatever else is wrong. Rows
planted as such in a domain's own pool are left out, and so is what is (nearly) a row of target, anchor or tests.
"""

from __future__ import annotations

import argparse
import random
from collections import Counter
from pathlib import Path

from prepare import ABILITIES, DOMAINS, Row, apart, read, unasked, write


def main() -> None:
    """Writes the pools of one domain, one per seed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder that prepare.py wrote")
    parser.add_argument("--domain", required=True, choices=DOMAINS)
    options = parser.parse_args()
    folder = options.data / options.domain
    walls = {name: read(folder / f"{name}.jsonl") for name in ("target", "test")}
    walls |= {name: read(options.data / f"{name}.jsonl") for name in ("anchor", *ABILITIES)}
    for path in sorted(folder.glob("pool-*.jsonl")):
        pools = {domain: unasked(apart(read(options.data / domain / path.name), walls), walls) for domain in DOMAINS}
        rows = mixed(pools, options.domain, len(read(path)), random.Random(f"mixed/{options.domain}/{path.stem}"))
        write(options.data / "mixed" / options.domain / path.name, rows)
        print(f"{path.name}: {dict(Counter(row['planted'] for row in rows))}")


def mixed(pools: dict[str, list[Row]], domain: str, count: int, rng: random.Random) -> list[Row]:
    """Returns `count` rows, a third of each pool (`domain` has what does not divide), those of other domains marked as such."""
    part = count // len(pools)
    chosen: list[Row] = []
    for name, rows in pools.items():
        wanted = count - (len(pools) - 1) * part if name == domain else part
        own = [row for row in rows if row["planted"] != "off-domain"]
        if len(own) < wanted:
            raise SystemExit(f"the pool of {name} must have {wanted} rows of its own, got {len(own)}; prepare larger pools")
        chosen += [row if name == domain else {**row, "planted": "off-domain"} for row in rng.sample(own, wanted)]
    rng.shuffle(chosen)
    return chosen


if __name__ == "__main__":
    main()
