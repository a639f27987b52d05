"""Does the simulator foresee the Navigator? `python benchmarks/ogs_navigator.py [--model demo] [--pool 120] [--subsets 24]`.

Random subsets of the demo's pool are trained on, from the same start each time; the KL divergence to the base model on the
anchor's held-out half and the target's loss are measured, and compared with what the simulator (Eq. OGS-9, OGS-11) says of the
same rows, to first order for the loss. A third of the subsets are uniform draws of equal size, a third of any size up to that,
a third of few clusters of the pool. Prints one line a subset, then the correlations.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import gradsieve as gs
from gradsieve.data import TokenSet
from gradsieve.demo import demo_set
from gradsieve.job import Job
from gradsieve.models import find_model, resolve_dtype
from gradsieve.navigation import make_navigator, split_anchor
from gradsieve.pipeline import extract
from gradsieve.selectors.clusters import cluster
from gradsieve.selectors.directions import Directions
from gradsieve.selectors.ogs_refine import drive
from gradsieve.selectors.ogs_simulator import Surface, total
from gradsieve.selectors.ranking import spearman
from gradsieve.selectors.reading import cosines
from gradsieve.train.navigator import NavigatorSettings

BATCH = 4


def subsets(directions: Directions, size: int, count: int, rng: torch.Generator) -> list[tuple[str, Tensor]]:
    """Returns (kind, rows), the kinds by turns."""
    n = len(directions.zero)
    labels = cluster(directions, torch.zeros(n, dtype=torch.int64), (6,), rng)
    drawn = []
    for i in range(count):
        kind = ("equal size", "any size", "few clusters")[i % 3]
        among, k = torch.arange(n), size
        if kind == "any size":
            k = BATCH + int(torch.randint(size - BATCH, (1,), generator=rng))
        elif kind == "few clusters":
            few = torch.randperm(int(labels.max()) + 1, generator=rng)[:2]
            among = torch.isin(labels, few).nonzero()[:, 0]
        drawn.append((kind, among[torch.randperm(len(among), generator=rng)[:k]]))
    return drawn


def pearson(a: Tensor, b: Tensor) -> float:
    return float(torch.corrcoef(torch.stack([a, b]))[0, 1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--pool", type=int, default=120)
    parser.add_argument("--subsets", type=int, default=24)
    parser.add_argument("--size", type=int, default=32)
    parser.add_argument("--anchors", type=int, default=60)
    parser.add_argument("--targets", type=int, default=24)
    parser.add_argument("--learning-rate", type=float, default=2e-4)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "auto"])
    parser.add_argument("--out", type=Path, default=Path("navigator-study"))
    arguments = parser.parse_args()
    out: Path = arguments.out
    out.mkdir(parents=True, exist_ok=True)
    source = find_model(arguments.model)
    anchor = demo_set("anchor")
    sets = {
        "pool": demo_set("pool", f"demo:{arguments.pool}"),
        "target": demo_set("target", f"demo:{arguments.targets}"),
        "anchor": anchor[:: max(1, len(anchor) // arguments.anchors)],
    }
    tokens = {role: TokenSet.of(role, part, source.tokenizer, max_length=256) for role, part in sets.items()}
    reference, held_out = split_anchor(tokens["anchor"])
    kept = {role: part.examples for role, part in tokens.items()}
    kept["anchor"] = [reference.examples[i] for i in reference.kept]
    files: dict[str, Any] = {}
    for role, examples in kept.items():
        file = out / f"{role}.jsonl"
        file.write_bytes(b"".join(example.raw + b"\n" for example in examples))
        files[role] = (str(file),)
    needs: dict[str, Any] = {"model": arguments.model, "store": str(out / "store"), "max_length": 256, "dtype": arguments.dtype}
    extraction = extract(Job(**needs, **files))
    problem, dtype = extraction.problem, extraction.job.dtype
    pool = problem.candidates
    assert problem.targets is not None
    assert problem.anchors is not None
    directions = Directions.of(pool)
    surfaces = (
        Surface.loss(problem.targets, cosines(pool, "target")).scaled(1.0, 0.0),
        Surface.loss(problem.anchors, cosines(pool, "anchor")).scaled(0.0, 1.0),
    )
    model = source.load(resolve_dtype(dtype, "cpu"), "cpu")
    place = dict(zip(tokens["pool"].ids, tokens["pool"].tokens, strict=True))
    settings = NavigatorSettings(learning_rate=arguments.learning_rate)
    rows, kinds = [], []
    with make_navigator(
        model, [place[id] for id in pool.ids], tokens["target"], held_out, source.tokenizer, settings
    ) as navigator:
        for kind, chosen in subsets(directions, arguments.size, arguments.subsets, torch.Generator().manual_seed(0)):
            episode = drive(navigator, chosen.split(BATCH), "kl", 1)
            simulated = total(surfaces, directions, chosen)
            rows.append([simulated[1], episode.cost[-1], simulated[0], episode.reward[-1]])
            kinds.append(kind)
            print(f"{kind:13} {len(chosen):3d} rows  KL {episode.cost[-1]:.5f} (simulated {simulated[1]:.4g})", flush=True)
    table = torch.tensor(rows, dtype=torch.float64)
    for kind in (*dict.fromkeys(kinds), "all"):
        some = table[[kind in (own, "all") for own in kinds]]
        pairs = (some[:, 0], some[:, 1]), (some[:, 2], some[:, 3])
        kl, gain = (f"{spearman(a, b):.2f} (Pearson {pearson(a, b):.2f})" for a, b in pairs)
        print(f"{kind}: {len(some)} subsets, rank correlation of simulated and measured KL {kl}, of the target's gain {gain}")
    print(f"gradsieve {gs.__version__}, {dtype}, learning rate {arguments.learning_rate}, {BATCH} examples a step")


if __name__ == "__main__":
    main()
