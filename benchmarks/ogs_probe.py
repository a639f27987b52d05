"""What OGS's scores find, planted faults known: `python benchmarks/ogs_probe.py [--data FOLDER] [--seeds 3] [--size 240]`.

`--target`, `--anchor` and `--max-length` make it smaller. Stores are kept: a second run only prints.

Without --data: the demo's medical pool, target and anchor. With a folder of `medicine.train.jsonl.gz`, `law.…`, `general.…` and
`math.…` (rows with id, prompt, completion, worked steps written `a+b = c`): questions on health, of which some get another
question's answer, some are legal definitions (off-domain), some are worked problems in which one operation is wrong.

Every AUC is the chance that a faulty row scores worse than a sound one. The faults are not made the way the contrasts are:
rings of answers against exchanged pairs of like length, wrong operations against changed numbers.
"""

from __future__ import annotations

import argparse
import gzip
import json
import random
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

import gradsieve as gs
from gradsieve.data import row_fields
from gradsieve.job import Job
from gradsieve.pipeline import extract
from gradsieve.selectors import OGSStatic
from gradsieve.selectors.ranking import spearman
from gradsieve.selectors.reading import cosines
from gradsieve.types import Example

SHARE = 0.1  # of the pool, for each kind of fault


def example(id: str, prompt: str, completion: str, **labels: Any) -> Example:
    messages = ({"role": "user", "content": prompt}, {"role": "assistant", "content": completion})
    raw = json.dumps({"id": id, "messages": list(messages), **labels}, ensure_ascii=False).encode()
    return Example(id, messages, raw, f"probe:{id}", labels.get("category"))


def read(folder: Path, name: str) -> list[dict[str, Any]]:
    with gzip.open(folder / f"{name}.train.jsonl.gz", "rt", encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


STEP = re.compile(r"(?<![\d.])(\d[\d.]*) ?([-+*/x]) ?\$?(\d[\d.]*) ?= ?\$?(\d[\d.]*\d|\d)")


def miscalculated(answer: str, rng: random.Random) -> str | None:
    """Returns a worked answer whose last step of the form `a+b = c` is done by another operation, carried to the final line."""
    steps = list(STEP.finditer(answer))
    if not steps:
        return None
    step = steps[-1]
    a, b, operation, right = float(step[1].rstrip(".")), float(step[3].rstrip(".")), step[2].replace("x", "*"), step[4]
    results = {"+": a + b, "-": a - b, "*": a * b, "/": a / b if b else 0.0}
    wrong = [f"{v:g}" for op, v in results.items() if op != operation and v > 0 and f"{v:g}" != right]
    if not wrong:
        return None
    return re.sub(rf"(?<![\d.]){re.escape(right)}(?![\d.]*\d)", rng.choice(wrong), answer)


def from_folder(folder: Path, size: int, target_size: int, anchor_size: int, seed: int) -> dict[str, list[Example]]:
    """Returns pool, target and anchor; no topic of the target is in the pool."""
    rng = random.Random(seed)
    rows = {name: read(folder, name) for name in ("medicine", "law", "general", "math")}
    for part in rows.values():
        rng.shuffle(part)
    medicine = rows["medicine"]
    topics = sorted({str(row.get("topic")) for row in medicine})
    rng.shuffle(topics)
    held_out = set(topics[: len(topics) // 4])
    target = [row for row in medicine if str(row.get("topic")) in held_out][:target_size]
    sound = [row for row in medicine if str(row.get("topic")) not in held_out][:size]
    count = int(SHARE * size)
    swapped, clean = sound[:count], sound[count : size - 2 * count]
    answers = [row["completion"] for row in swapped]
    kinds = [("clean", row["prompt"], row["completion"]) for row in clean]
    kinds += [("swapped", row["prompt"], answers[(i + 1) % count]) for i, row in enumerate(swapped)]
    kinds += [("off-domain", row["prompt"], row["completion"]) for row in rows["law"][:count]]
    wrong = [(row["prompt"], miscalculated(row["completion"], rng)) for row in rows["math"][300:]]
    false = [("false-arithmetic", prompt, answer) for prompt, answer in wrong if answer is not None]
    kinds += false[:count]
    right = [("right-arithmetic", row["prompt"], row["completion"]) for row in rows["math"][200 : 200 + count]]
    kinds += right
    rng.shuffle(kinds)
    anchor = [
        example(f"math-{i}", r["prompt"], r["completion"], category="arithmetic")
        for i, r in enumerate(rows["math"][: anchor_size // 2])
    ]
    anchor += [
        example(f"gen-{i}", r["prompt"], r["completion"], category="knowledge")
        for i, r in enumerate(rows["general"][: anchor_size // 2])
    ]
    return {
        "pool": [example(f"pool-{i}", prompt, answer, planted=kind) for i, (kind, prompt, answer) in enumerate(kinds)],
        "target": [example(f"target-{i}", row["prompt"], row["completion"]) for i, row in enumerate(target)],
        "anchor": anchor,
    }


def from_demo(size: int, target_size: int, anchor_size: int, seed: int) -> dict[str, list[Example]]:
    from gradsieve.demo.arithmetic import true_problems
    from gradsieve.demo.pool import demo_anchor, demo_pool, demo_target

    right = [
        example(f"right-{i}", p.question, p.answer, planted="right-arithmetic")
        for i, p in enumerate(true_problems(int(SHARE * size), random.Random(f"right/{seed}")))
    ]
    both = demo_anchor(seed)
    anchor = [
        e for category in ("arithmetic", "knowledge") for e in [e for e in both if e.category == category][: anchor_size // 2]
    ]
    return {"pool": [*demo_pool(size, seed), *right], "target": demo_target(seed, target_size), "anchor": anchor}


def write(path: Path, examples: Sequence[Example]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"".join(e.raw + b"\n" for e in examples))
    return path


def auc(suspect: torch.Tensor, faulty: torch.Tensor, sound: torch.Tensor) -> float:
    """Returns the chance that a faulty row has the larger `suspect`, ties counted half."""
    a, b = suspect[faulty][:, None], suspect[sound][None]
    return float(((a > b).double() + 0.5 * (a == b).double()).mean())


def scores(problem: gs.Problem) -> dict[str, torch.Tensor]:
    """Returns every score, larger where a row is more suspect."""
    pool = problem.candidates
    names = [name.removeprefix("dot/") for name in sorted(pool.columns) if name.startswith("dot/") and name != "dot/target"]
    found = {f"conflict with {name}": -cosines(pool, name) for name in names}
    budget, rng = gs.Budget.parse("1"), torch.Generator()
    utilities: dict[str, dict[str, Any]] = {"mean, centred": {"center": True}}
    utilities |= {name: {"utility": name} for name in ("mean", "nearest", "hidden")}
    for label, settings in utilities.items():
        trace = OGSStatic(against="plain", **settings).select(problem, budget, rng).trace
        found[f"utility: {label}"] = -torch.tensor(trace["utility"], dtype=torch.float64)
    found["answer length"] = pool.columns["completion_tokens"]
    return found


def report(problem: gs.Problem, kinds: Sequence[str]) -> dict[tuple[str, str], float]:
    where = {kind: torch.tensor([own == kind for own in kinds]) for kind in set(kinds)}
    length = problem.candidates.columns["completion_tokens"]
    table = {}
    for name, suspect in scores(problem).items():
        for kind in ("swapped", "off-domain", "false-arithmetic"):
            table[name, kind] = auc(suspect, where[kind], where["clean"])
        table[name, "false/right arithmetic"] = auc(suspect, where["false-arithmetic"], where["right-arithmetic"])
        table[name, "rank corr. with length"] = spearman(suspect, length)
    return table


def bound(problem: gs.Problem, epsilon: float) -> None:
    """Prints how λ moved while a policy was trained under this bound on the simulated KL divergence, and where it ended."""
    trace = gs.OGS(epsilon=epsilon).select(problem, gs.Budget.parse("20%"), torch.Generator().manual_seed(0)).trace
    path = " ".join(f"{value:.2g}" for value in trace["training"]["lambda"][::5])
    ends = ", ".join(
        f"{name} {r:.4f} at {c:.4f}" for name, (r, c) in ((n, tuple(v.values())) for n, v in trace["simulated"].items())
    )
    print(f"    ogs, kl bounded by {epsilon:g} nats: λ in every fifth round {path}; simulated gain at cost: {ends}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--size", type=int, default=240)
    parser.add_argument("--target", type=int, default=48)
    parser.add_argument("--anchor", type=int, default=120, help="half of it arithmetic, half knowledge")
    parser.add_argument("--max-length", type=int, default=256)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "auto"])
    parser.add_argument(
        "--epsilon", type=float, nargs="*", default=[], help="bounds to train a policy of ogs under, budget 20%%"
    )
    parser.add_argument("--store", default="probe-store")
    arguments = parser.parse_args()
    tables = []
    for seed in range(arguments.seeds):
        sizes = arguments.size, arguments.target, arguments.anchor
        data = from_folder(arguments.data, *sizes, seed) if arguments.data else from_demo(*sizes, seed)
        store = Path(arguments.store) / f"{arguments.data.name if arguments.data else 'demo'}-{seed}"
        files: dict[str, Any] = {
            role: (str(write(store.parent / f"{store.name}.{role}.jsonl", part)),) for role, part in data.items()
        }
        problem = extract(
            Job(
                model=arguments.model,
                store=str(store),
                max_length=arguments.max_length,
                dtype=arguments.dtype,
                seed=seed,
                **files,
            )
        ).problem
        kinds = {e.id: row_fields(e)["planted"] for e in data["pool"]}
        tables.append(report(problem, [kinds[id] for id in problem.candidates.ids]))
        print(f"seed {seed}: {len(problem.candidates.ids)} rows; signal share and split-half rank correlation:")
        for name, fact in problem.references.items():
            print(f"    {name:28} {fact.signal_share:5.2f} {fact.split_half or float('nan'):5.2f}", flush=True)
        for epsilon in arguments.epsilon:
            bound(problem, epsilon)
    columns = list(dict.fromkeys(kind for _, kind in tables[0]))
    print("AUC, mean of the data seeds (smallest … largest)")
    for name in dict.fromkeys(name for name, _ in tables[0]):
        cells = []
        for column in columns:
            values = [table[name, column] for table in tables]
            cells.append(f"{column} {sum(values) / len(values):.2f} ({min(values):.2f} … {max(values):.2f})")
        print(f"{name:36}", "  ".join(cells))


if __name__ == "__main__":
    main()
