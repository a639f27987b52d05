"""What selecting costs: seconds and peak memory of every method, and the two solvers beside what others use.

    python benchmarks/selection.py                          every method but embedding and ogs (benchmarks/ogs.py
                                                            measures that), 10,000 and 100,000 x 1024, 1 % chosen
    python benchmarks/selection.py --rows 1000000           a larger pool
    python benchmarks/selection.py --methods g2is gradmatch some of them; "ogs-static utility=each" with a setting
    python benchmarks/selection.py --solvers                matching pursuit beside scikit-learn's, the gradient walk beside a
                                                            plain one
    python benchmarks/selection.py --simulate 10000000      PGM on a pool that is drawn anew in each pass and held nowhere
    python benchmarks/selection.py --json FILE              the same table for machines

Each line runs in a process of its own, on one thread unless `--threads` says otherwise, with sketches in a store on disk
(written beforehand, below `--folder`, and left there). `cpu` is CPU time, `wall` includes waiting for other processes; memory
is the process's peak, pages of the store that it has mapped among it, and what of it was there before the method began
(Python, torch, ids and columns). Gradients are drawn: 50 topics, a shared direction, noise; the target is eight topics.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from gradsieve.types import ArrayGradients, Budget, Problem, Reference

GROUPS = ("embedding", "lm_head")
TOPICS, OF_TARGET, TARGETS = 50, 8, 200


def main() -> None:
    arguments = _arguments()
    os.environ["GRADSIEVE_BENCHMARK"] = str(arguments.folder)
    if arguments.one:
        torch.set_num_threads(arguments.threads)
        print(json.dumps(ONE[arguments.one[0]](*arguments.one[1:])))
        return
    lines = []
    jobs = SOLVERS if arguments.solvers else _methods(arguments)
    print(f"{'what':44}{'n':>9}{'d':>6}{'k':>7}{'cpu s':>9}{'wall s':>9}{'peak MB':>9}{'before':>9}  notes")
    for job in jobs:
        line = _measure([str(part) for part in job], arguments.threads)
        lines.append(line)
        numbers = f"{line['n']:>9}{line['d']:>6}{line['k']:>7}{line['cpu']:>9.2f}{line['wall']:>9.2f}"
        print(f"{line['what']:44}{numbers}{line['peak']:>9.0f}{line['before']:>9.0f}  {line['notes']}", flush=True)
    if arguments.json:
        Path(arguments.json).write_text(json.dumps(lines, indent=1) + "\n")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="*", help="names of methods (default: all)")
    parser.add_argument("--rows", nargs="*", type=int, default=[10_000, 100_000], help="candidates n")
    parser.add_argument("--dim", type=int, default=1024, help="sketch size d")
    parser.add_argument("--budget", default="1%", help="what to choose (default: 1%%)")
    parser.add_argument("--solvers", action="store_true", help="measure the solvers beside others instead of the methods")
    parser.add_argument("--simulate", type=int, help="PGM on a drawn pool of so many examples x 64 instead of the methods")
    parser.add_argument("--folder", default=os.environ.get("GRADSIEVE_BENCHMARK", "/tmp/gradsieve-benchmark"), type=Path)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", help="write the table to this file too")
    parser.add_argument("--one", nargs="*", help=argparse.SUPPRESS)
    return parser.parse_args()


def _methods(arguments: argparse.Namespace) -> list[tuple[object, ...]]:
    from gradsieve.selectors import SELECTORS

    if arguments.simulate:
        return [("simulation", arguments.simulate, 64, parts) for parts in (64, 16)]
    every = [*(name for name in SELECTORS if name not in ("embedding", "ogs")), "ogs-static utility=each bound=20"]
    names = arguments.methods or every
    for n in arguments.rows:
        _measure(["writing", str(n), str(arguments.dim)], arguments.threads)
    return [("method", name, n, arguments.dim, arguments.budget) for name in names for n in arguments.rows]


def _measure(job: list[str], threads: int) -> dict[str, Any]:
    command = [sys.executable, __file__, "--threads", str(threads), "--one", *job]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{' '.join(job)} failed:\n{done.stderr}")
    return json.loads(done.stdout)  # type: ignore[no-any-return]


def timed(what: str, n: int, d: int, run: Callable[[], tuple[int, str]]) -> dict[str, Any]:
    """Runs it once; it returns the number of rows it chose and a remark."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    wall, cpu = time.perf_counter(), time.process_time()
    k, notes = run()
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    facts = {"what": what, "n": n, "d": d, "k": k, "cpu": cpu, "wall": wall, "peak": peak, "before": before}
    return facts | {"notes": notes}


# -- problems ----------------------------------------------------------------------------------------------------------


def gradients(n: int, d: int, topics: Tensor, shared: Tensor, of: int, rng: torch.Generator) -> Tensor:
    """Returns drawn gradients in the first `of` topics, noise of norm 1 among it: float16 [n, d], made in blocks."""
    G = torch.empty(n, d, dtype=torch.float16)
    for rows in torch.arange(n).split(10_000):
        strength = 0.5 + torch.rand(len(rows), 1, generator=rng)
        topic = topics[torch.randint(of, (len(rows),), generator=rng)]
        G[rows] = ((torch.randn(len(rows), d, generator=rng) + 0.6 * strength * topic + 0.4 * shared) / d**0.5).half()
    return G


def problem_of(n: int, d: int, shared_by_all: float = 1.0) -> Problem:
    """Returns a problem with every column that a method reads; products with references are those of the sketches."""
    rng = torch.Generator().manual_seed(0)
    topics, shared = torch.randn(TOPICS, d, generator=rng), shared_by_all * torch.randn(d, generator=rng)
    pool, target, anchor = (
        gradients(count, d, topics, shared, of, rng) for count, of in ((n, TOPICS), (TARGETS, OF_TARGET), (TARGETS, TOPICS))
    )
    half = TARGETS // 2
    wrong = gradients(TARGETS, d, torch.randn(TOPICS, d, generator=rng), shared, TOPICS, rng).float().mean(0)
    means = {"target": target.float().mean(0), "anchor": anchor.float().mean(0)}
    means |= {"anchor:a": anchor[:half].float().mean(0), "anchor:b": anchor[half:].float().mean(0)}
    means |= {f"contrast/{name}": means[name] - wrong for name in ("target", "anchor:a", "anchor:b")}
    pool_of, targets, anchors = (
        _part(name, G, means, rng) for name, G in (("pool", pool), ("target", target), ("anchor", anchor))
    )
    return Problem(
        pool_of, targets, anchors, references={name: Reference(float(r.norm()), TARGETS, 0.9) for name, r in means.items()}
    )


def _part(name: str, G: Tensor, means: dict[str, Tensor], rng: torch.Generator) -> ArrayGradients:
    n = len(G)
    R = torch.stack([r / r.norm() for r in means.values()])
    dots = torch.cat([block.float() @ R.T for block in G.split(10_000)])
    columns = {f"dot/{reference}": dots[:, i] for i, reference in enumerate(means)}
    columns["norm"] = torch.cat([block.float().norm(dim=1) for block in G.split(10_000)])
    for group in GROUPS:
        for statistic in ("norm", "max", "sd"):
            columns[f"{statistic}/{group}"] = torch.randn(n, generator=rng).exp()
        columns[f"min/{group}"], columns[f"mean/{group}"] = -columns[f"max/{group}"], torch.zeros(n)
    completion = torch.randint(10, 300, (n,), generator=rng)
    columns |= {"completion_tokens": completion, "tokens": completion + 40, "loss": torch.rand(n, generator=rng) * 3}
    columns |= {"loss/alone": columns["loss"] + torch.rand(n, generator=rng), "bm25/target": torch.rand(n, generator=rng)}
    columns["meta/rating"] = columns["bm25/target"]
    return ArrayGradients([f"{name}-{i:07d}" for i in torch.randperm(n, generator=rng).tolist()], G, columns)


def writing(n: str, d: str) -> dict[str, Any]:
    """Writes the problem to stores, a shard for 8192 rows."""
    from gradsieve.store import GradientStore, Manifest

    def run() -> tuple[int, str]:
        folder = _folder(int(n), int(d))
        if (folder / "done.json").exists():
            return 0, "there already"
        problem = problem_of(int(n), int(d))
        parts = {"pool": problem.candidates, "target": problem.targets, "anchor": problem.anchors}
        for role, part in parts.items():
            assert part is not None
            store = GradientStore(folder / role, Manifest({"benchmark": [role, n, d]}))
            keys = _keys(len(part.ids))
            for unit in store.plan(keys, lambda new: [part.tolist() for part in torch.tensor(new).split(8192)]):
                own = torch.tensor([int.from_bytes(key, "big") for key in unit.keys])
                hidden = {"hidden": part.rows(own)[:, :576]}
                columns = {name: column[own] for name, column in part.columns.items()}
                store.commit(unit, {"base": part.rows(own), **hidden}, columns)
        facts = {name: [r.norm, r.count, r.signal_share] for name, r in problem.references.items()}
        ids = {role: list(part.ids) for role, part in parts.items() if part is not None}
        (folder / "done.json").write_text(json.dumps({"references": facts, "ids": ids}))
        return int(n), "written"

    return timed("writing", int(n), int(d), run)


def stored(n: int, d: int) -> Problem:
    """Returns the problem that `writing` wrote, its sketches on disk."""
    from gradsieve.store import GradientStore

    folder = _folder(n, d)
    done = json.loads((folder / "done.json").read_text())
    views = {role: GradientStore.open(folder / role).view(ids, _keys(len(ids))) for role, ids in done["ids"].items()}
    return Problem(
        views["pool"],
        views["target"],
        views["anchor"],
        references={name: Reference(*facts) for name, facts in done["references"].items()},
    )


def _folder(n: int, d: int) -> Path:
    folder = Path(os.environ["GRADSIEVE_BENCHMARK"]) / f"{n}x{d}"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _keys(n: int) -> list[bytes]:
    return [i.to_bytes(16, "big") for i in range(n)]


class Drawn:
    """Gradients that are drawn anew whenever they are read: topics, a shared direction, noise."""

    checkpoints, representations = ("base",), ()
    columns: Mapping[str, Tensor] = {}

    def __init__(self, n: int, d: int, seed: int) -> None:
        self.ids = [f"{(i * 7919) % n:08d}" for i in range(n)]
        self.dim, self._seed = d, seed
        rng = torch.Generator().manual_seed(0)
        self._topics, self._shared = torch.randn(TOPICS, d, generator=rng), torch.randn(d, generator=rng)

    def blocks(self, checkpoint: str | None = None) -> Iterator[tuple[Tensor, Tensor]]:
        for first in range(0, len(self.ids), 65_536):
            rows = torch.arange(first, min(first + 65_536, len(self.ids)))
            rng = torch.Generator().manual_seed(self._seed * 1_000_003 + first)
            yield rows, gradients(len(rows), self.dim, self._topics, self._shared, TOPICS, rng).float()

    def rows(self, index: Tensor, checkpoint: str | None = None) -> Tensor:
        found = torch.empty(len(index), self.dim)
        for rows, block in self.blocks():
            mine = (index >= rows[0]) & (index <= rows[-1])
            found[mine] = block[index[mine] - rows[0]]
        return found


def simulation(n: str, d: str, parts: str) -> dict[str, Any]:
    """PGM at a size that no memory holds: every pass draws the pool anew."""
    from gradsieve.selectors.pgm import PGM

    problem = Problem(Drawn(int(n), int(d), 1), Drawn(TARGETS, int(d), 2))

    def run() -> tuple[int, str]:
        method = PGM(partitions=int(parts), batch=8)
        selection = method.select(problem, Budget.parse("0.1%"), torch.Generator().manual_seed(0))
        return len(selection.rows), f"error {selection.trace['error_by_partitions'][int(parts)]:.4f}"

    return timed(f"PGM, {parts} parts, drawn", int(n), int(d), run)


def method(name: str, n: str, d: str, budget: str) -> dict[str, Any]:
    from gradsieve.selectors import SELECTORS

    kind, *settings = name.split()
    values = {key: yaml.safe_load(value) for key, value in (setting.split("=") for setting in settings)}
    problem, selector = stored(int(n), int(d)), SELECTORS[kind](**values)

    def run() -> tuple[int, str]:
        selection = selector.select(problem, Budget.parse(budget), torch.Generator().manual_seed(0))
        return len(selection.rows), ""

    return timed(name, int(n), int(d), run)


# -- solvers -----------------------------------------------------------------------------------------------------------


def pursuit(who: str, n: str, d: str, k: str) -> dict[str, Any]:
    """Orthogonal matching pursuit of the target's mean gradient; scikit-learn's has no sign constraint and no ridge."""
    problem = problem_of(int(n), int(d))
    assert problem.targets is not None
    G = problem.candidates.rows(torch.arange(int(n)))
    b = problem.targets.rows(torch.arange(TARGETS)).double().mean(0)

    def ours() -> tuple[int, str]:
        from gradsieve.selectors.omp import match_gradient

        found = match_gradient(G, b, int(k), ridge=0.0)
        return len(found.rows), f"error {found.error[-1]:.4f}, {len(found.picks) - len(found.rows)} dropped"

    def theirs() -> tuple[int, str]:
        import numpy as np
        from sklearn.linear_model import orthogonal_mp

        w = orthogonal_mp(X, y, n_nonzero_coefs=int(k))
        return int((w != 0).sum()), f"error {np.linalg.norm(X @ w - y) / np.linalg.norm(y):.4f}, {int((w < 0).sum())} negative"

    if who == "ours":
        return timed("matching pursuit, w ≥ 0", int(n), int(d), ours)
    X, y = G.numpy().T, b.numpy()
    X, y = (X.astype("float64"), y) if who == "float64" else (X, y.astype("float32"))
    return timed(f"scikit-learn orthogonal_mp, {who}", int(n), int(d), theirs)


def gradient_walk(who: str, n: str, d: str, k: str, shared: str, explained: str) -> dict[str, Any]:
    """The walk of G2IS with the graph given: the lists of the rows that it visits are made beforehand.

    With a direction shared by all candidates, or a budget split over many components, few conflict and the nearest neighbour
    fits. Without one, and with all of the budget on one component, the walk falls back to all candidates and gets stuck.
    """
    from gradsieve.selectors.directions import Directions
    from gradsieve.selectors.g2is import core_knowledge, largest_remainder
    from gradsieve.selectors.g2is_walk import walk
    from gradsieve.selectors.graph import lists_on_demand
    from gradsieve.selectors.ranking import id_order

    problem = problem_of(int(n), int(d), float(shared))
    assert problem.targets is not None
    pool = problem.candidates
    directions, by_id = Directions.of(pool), id_order(pool.ids)
    V, share = core_knowledge(problem.targets.rows(torch.arange(TARGETS)), "aligned", float(explained))
    products, budgets = directions.products(V.T), largest_remainder(int(k), share)
    made, lists = lists_on_demand(directions, by_id, 100), {}

    def given(row: int) -> Any:
        if row not in lists:
            lists[row] = torch.cat([*made(row)])
        return iter((lists[row],))

    def ours() -> list[int]:
        price = torch.ones(int(n), dtype=torch.float64)
        done = walk(directions, products, budgets, given, by_id, delta=0.8, price=price)
        how.update(v for component in done for v in component.via)
        return [row for component in done for row in component.rows]

    how: Counter[str] = Counter()
    expected = ours()
    found = f"{how['walk']} by the graph, {how['fallback']} by falling back, {len(budgets)} components"
    if who == "plain":
        U, P = directions.rows(torch.arange(int(n))).numpy(), products.numpy()
    rows: list[int] = []

    def measured() -> tuple[int, str]:
        rows.extend(ours() if who == "ours" else plain_walk(U, V.numpy(), P, budgets, given))
        return len(rows), found + ("" if rows == expected else ", OTHER ROWS than ours")

    name = "gradient walk" if who == "ours" else "gradient walk as published, in numpy"
    return timed(name, int(n), int(d), measured)


def plain_walk(U: Any, K: Any, products: Any, budgets: list[int], neighbours: Any) -> list[int]:
    """Eq. G2IS-3 with numpy, each constraint from scratch for each candidate, and all n sorted whenever the walk is stuck."""
    import numpy as np

    used, picks = np.zeros(len(U), dtype=bool), []
    for k, along, budget in zip(K, products.T, budgets, strict=True):
        chosen: list[int] = []
        total = np.zeros(U.shape[1])
        while len(chosen) < budget:
            before = abs(total @ k) / max(np.linalg.norm(total), 1e-10)

            def fits(j: int, chosen: list[int] = chosen, total: Any = total, k: Any = k, before: float = before) -> bool:
                if used[j] or (chosen and (U[chosen] @ U[j] < 0).any()):
                    return False
                after = total + U[j]
                return bool(abs(after @ k) / np.linalg.norm(after) >= 0.8 * before - 1e-9)

            found = None
            if chosen:
                found = next((int(j) for j in next(neighbours(chosen[-1])).tolist() if fits(j)), None)
            if found is None:
                order = np.argsort(-np.where(used, -np.inf, along), kind="stable")
                found = next((int(j) for j in order if fits(int(j))), None)
            if found is None:
                break
            chosen.append(found)
            used[found] = True
            total = total + U[found]
        picks += chosen
    return picks


ONE: dict[str, Callable[..., dict[str, Any]]] = {
    "method": method,
    "writing": writing,
    "simulation": simulation,
    "pursuit": pursuit,
    "walk": gradient_walk,
}
SOLVERS: list[tuple[object, ...]] = [
    ("pursuit", "ours", 100_000, 1024, 1000),
    ("pursuit", "ours", 100_000, 1024, 300),
    ("pursuit", "float32", 100_000, 1024, 300),
    ("pursuit", "float64", 100_000, 1024, 300),
    ("pursuit", "ours", 10_000, 1024, 300),
    ("pursuit", "float32", 10_000, 1024, 300),
    ("walk", "ours", 100_000, 1024, 1000, 1.0, 0.5),
    ("walk", "ours", 100_000, 1024, 1000, 0.0, 0.01),
    ("walk", "ours", 10_000, 1024, 300, 1.0, 0.5),
    ("walk", "plain", 10_000, 1024, 300, 1.0, 0.5),
    ("walk", "ours", 10_000, 1024, 300, 0.0, 0.01),
    ("walk", "plain", 10_000, 1024, 300, 0.0, 0.01),
    ("walk", "plain", 100_000, 1024, 1000, 0.0, 0.01),
]

if __name__ == "__main__":
    main()
