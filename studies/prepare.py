"""Data of the studies: pools with planted faults, targets, an anchor, tests, out of public question-answer sets.

    python studies/prepare.py --source SETS --out DATA

SETS holds DOMAIN.train.jsonl.gz and DOMAIN.test.jsonl.gz with rows {id, prompt, completion, topic?, source, license, kind?} for
the domains medicine, law and finance and the general abilities general and math. DATA gets

    anchor.jsonl             150 rows of general and 150 of math, train parts, `category` says which
    general.jsonl, math.jsonl    their test parts
    DOMAIN/test.jsonl        the test part
           target.jsonl      96 rows of the train part, of topics that no pool has, less those that a test asks too
           small-SEED.jsonl  the first 150 rows of the pool, for smoke.yaml
           pool-SEED.jsonl   1,000 other rows of the train part and 250 faults, less the same; `planted` says which row is what
    facts.json               what is in each file, and what was left out

Faults, none made the way a contrast is made (there: numbers become others, answers of like length change places, negation):

    swapped           80   an answer is passed on to a prompt of another topic, around a ring
    off-domain        70   sound rows of the two other domains
    near-duplicate    50   a sound row of the pool again: another question, the last sentence cut or the first two exchanged
    false-arithmetic  25   worked problems with another operation in every equation, results recomputed
    mixed-numbers     25   a sound row with at least two different numbers, each in the place of the next

Nothing in a pool is the same as or nearly the same as anything in target, anchor or tests (gradsieve.compare.leaks). Rows of
kind `crossref`, which define a term by another law, stay in pools and are kept out of targets and tests. Ids tell nothing.
"""

from __future__ import annotations

import argparse
import gzip
import json
import random
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import xxhash

from gradsieve.compare.leaks import find_leaks
from gradsieve.types import Example

Row = dict[str, Any]
DOMAINS = ("medicine", "law", "finance")
ABILITIES = ("general", "math")
SOUND, TARGET, ANCHOR = 1000, 96, 150
FAULTS = {"swapped": 80, "off-domain": 70, "near-duplicate": 50, "false-arithmetic": 25, "mixed-numbers": 25}
NEAR = 0.8
SMALL = 150
LONGEST = 1000
"""Characters of prompt and completion together: about 250 tokens, so that the studies' 256 cut next to nothing."""


def main() -> None:
    """Writes the data of all domains."""
    parser = argparse.ArgumentParser(description="Data of the studies: pools with planted faults, targets, anchor, tests.")
    parser.add_argument("--source", type=Path, required=True, help="folder with DOMAIN.train.jsonl.gz and DOMAIN.test.jsonl.gz")
    parser.add_argument("--out", type=Path, required=True, help="folder to write to")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="one pool per seed")
    parser.add_argument("--scale", type=float, default=1.0, help="size of the pools and their faults, relative to those above")
    parser.add_argument("--target", type=int, default=TARGET, help="rows of each target")
    parser.add_argument("--anchor", type=int, default=ANCHOR, help="rows of the anchor per ability")
    arguments = parser.parse_args()
    prepare(
        arguments.source,
        arguments.out,
        arguments.seeds,
        {
            **{kind: round(count * arguments.scale) for kind, count in {"sound": SOUND, **FAULTS}.items()},
            "target": arguments.target,
            "anchor": arguments.anchor,
        },
    )


def prepare(source: Path, out: Path, seeds: Sequence[int], sizes: Mapping[str, int] | None = None) -> None:
    """Writes everything; `sizes` may set `sound`, `target`, `anchor` and the counts of faults."""
    size = {"sound": SOUND, "target": TARGET, "anchor": ANCHOR, **FAULTS, **(sizes or {})}
    parts = {
        name: {part: read(source / f"{name}.{part}.jsonl.gz") for part in ("train", "test")} for name in (*DOMAINS, *ABILITIES)
    }
    tests = {name: [row for row in part["test"] if row.get("kind") != "crossref"] for name, part in parts.items()}
    walls: dict[str, Sequence[Row]] = {f"test {name}": rows for name, rows in tests.items()}
    facts: dict[str, Any] = {}
    anchor = []
    for name in ABILITIES:
        rows = apart(parts[name]["train"], walls)
        drawn = random.Random(f"anchor/{name}").sample(rows, size["anchor"])
        anchor += [{**row, "category": name} for row in drawn]
        write(out / f"{name}.jsonl", tests[name])
    write(out / "anchor.jsonl", anchor)
    walls |= {"anchor": anchor}
    sound_math = apart(parts["math"]["train"], walls)
    for domain in DOMAINS:
        train = apart(parts[domain]["train"], walls)
        drawn = draw_target(train, size["target"], random.Random(f"target/{domain}"))
        target = unasked(drawn, walls)
        topics = {topic(row) for row in drawn}
        pool = apart([row for row in train if topic(row) not in topics], walls | {"target": drawn})
        others = [
            row for other in DOMAINS if other != domain for row in apart(parts[other]["train"], walls | {"target": drawn})
        ]
        write(out / domain / "test.jsonl", tests[domain])
        write(out / domain / "target.jsonl", target)
        facts[domain] = {"train": len(parts[domain]["train"]), "usable": len(pool), "target": len(target)}
        for seed in seeds:
            rows = make_pool(pool, others, sound_math, size, random.Random(f"{domain}/{seed}"))
            rows = unasked(apart(rows, walls | {"target": drawn}), walls | {"target": target})
            write(out / domain / f"pool-{seed}.jsonl", rows)
            write(out / domain / f"small-{seed}.jsonl", rows[:SMALL])
            kinds = [row["planted"] for row in rows]
            facts[domain][f"pool-{seed}"] = {kind: kinds.count(kind) for kind in ("clean", *FAULTS)}
    (out / "facts.json").write_text(json.dumps(facts, indent=1) + "\n")


def make_pool(
    sound: Sequence[Row], others: Sequence[Row], math: Sequence[Row], size: Mapping[str, int], rng: random.Random
) -> list[Row]:
    """Returns a pool in random order, `planted` naming the kind of each row."""
    drawn = rng.sample(sound, size["sound"] + size["swapped"] + size["mixed-numbers"] * 8)
    clean, rest = drawn[: size["sound"]], drawn[size["sound"] :]
    planted: dict[str, list[Row]] = {
        "clean": [dict(row) for row in clean],
        "swapped": swapped(rest[: size["swapped"]]),
        "off-domain": rng.sample(others, size["off-domain"]),
        "near-duplicate": first(size["near-duplicate"], (near_duplicate(row, rng) for row in rng.sample(clean, len(clean)))),
        "false-arithmetic": first(size["false-arithmetic"], map(false_arithmetic, rng.sample(math, len(math)))),
        "mixed-numbers": first(size["mixed-numbers"], map(mixed_numbers, [*rest[size["swapped"] :], *clean])),
    }
    for kind, rows in planted.items():
        if len(rows) < size.get(kind, len(rows)):
            raise SystemExit(f"{kind} must have {size[kind]} rows, got {len(rows)}; give larger sets")
    rows = [{**row, "planted": kind} for kind, made in planted.items() for row in made]
    rng.shuffle(rows)
    return [{**row, "id": identity(row, place), "source_id": row["id"]} for place, row in enumerate(rows)]


# -- faults -------------------------------------------------------------------------------------------------------------


def swapped(rows: Sequence[Row]) -> list[Row]:
    """Returns the rows with each answer passed on by the size of the largest topic, so that none stays in its own."""
    ring = sorted(rows, key=lambda row: (topic(row), row["id"]))
    sizes = [sum(topic(other) == topic(row) for other in ring) for row in ring]
    step = max(sizes, default=0)
    if 2 * step > len(ring):
        raise SystemExit(f"swapped rows must have no topic with more than half of them, got one with {step} of {len(ring)}")
    return [{**row, "completion": ring[(place + step) % len(ring)]["completion"]} for place, row in enumerate(ring)]


ASKED = (
    (re.compile(r"^What (?:is|are) (?!the )(?:\(are\) )?(.+?)\s*\?+$"), ("Explain what {x} means.", "Tell me about {x}.")),
    (re.compile(r'^Define "(.+?)" as used in (.+)\.$'), ('What does "{x}" mean in {y}?', 'In {y}, how is "{x}" defined?')),
    (re.compile(r'^In (.+?), what does "(.+?)" mean\?$'), ('Define "{y}" as used in {x}.', 'Explain "{y}" in {x}.')),
)


def near_duplicate(row: Row, rng: random.Random) -> Row | None:
    """Returns the row with another question and an answer changed in its order or end; None where that is one sentence."""
    sentences = re.split(r"(?<=[.!?])\s+", row["completion"].strip())
    if len(sentences) < 2:
        return None
    if len(sentences) > 2 and rng.random() < 0.5:
        answer = " ".join(sentences[:-1])
    else:
        answer = " ".join([sentences[1], sentences[0], *sentences[2:]])
    return {**row, "prompt": reworded(row["prompt"], rng), "completion": answer}


def reworded(prompt: str, rng: random.Random) -> str:
    """Returns a question in other words."""
    for pattern, forms in ASKED:
        found = pattern.match(prompt)
        if found:
            x, y = (*found.groups(), "")[:2]
            return rng.choice(forms).format(x=x, y=y)
    lead = rng.choice(("Please answer this question: ", "I would like to know: ", "Could you tell me this? "))
    return lead + prompt


OPERATIONS: Mapping[str, Callable[[float, float], float]] = {
    "+": lambda a, b: abs(a - b),
    "-": lambda a, b: a + b,
    "*": lambda a, b: a + b,
    "x": lambda a, b: a + b,
    "/": lambda a, b: a * b,
}
NUMBER = r"\$?(\d+(?:\.\d+)?)"
EQUATION = re.compile(rf"{NUMBER} *([-+*x/]) *{NUMBER} *= *\$?\d+(?:\.\d+)?(?![\d.]*\d)")


def false_arithmetic(row: Row) -> Row | None:
    """Returns a worked problem with every equation of two numbers worked with another operation; None where there is none."""
    last: list[str] = []

    def wrong(match: re.Match[str]) -> str:
        a, sign, b = match.groups()
        last[:] = [f"{OPERATIONS[sign](float(a), float(b)):g}"]
        return f"{a}{sign}{b} = {last[0]}"

    text, count = EQUATION.subn(wrong, row["completion"])
    if not count or text == row["completion"]:
        return None
    return {**row, "completion": re.sub(r"#### .*$", f"#### {last[0]}", text)}


DIGITS = re.compile(r"(?<![\w.])\d+(?:,\d{3})*(?:\.\d+)?(?!\w)")


def mixed_numbers(row: Row) -> Row | None:
    """Returns the row with each number of its answer in the place of the next different one; None with fewer than two."""
    found = list(dict.fromkeys(DIGITS.findall(row["completion"])))
    if len(found) < 2:
        return None
    following = dict(zip(found, [*found[1:], found[0]], strict=True))
    return {**row, "completion": DIGITS.sub(lambda match: following[match.group()], row["completion"])}


# -- rows ---------------------------------------------------------------------------------------------------------------


def read(path: Path) -> list[Row]:
    """Returns the rows of a set that are short enough."""
    with gzip.open(path, "rt", encoding="utf-8") if path.suffix == ".gz" else path.open(encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    return [row for row in rows if len(row["prompt"]) + len(row["completion"]) <= LONGEST]


def write(path: Path, rows: Sequence[Row]) -> None:
    """Writes rows as JSON lines."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def topic(row: Row) -> str:
    """Returns what must not be on both sides: a disease, an act, a chapter."""
    return str(row.get("topic") or row["id"])


def publisher(row: Row) -> str:
    """Returns who published a row's text."""
    return str(row["source"]).split("/")[0].split()[0]


def draw_target(rows: Sequence[Row], count: int, rng: random.Random) -> list[Row]:
    """Returns rows of random topics, at most four of each."""
    by_topic: dict[str, list[Row]] = {}
    for row in rows:
        if row.get("kind") != "crossref":
            by_topic.setdefault(topic(row), []).append(row)
    chosen: list[Row] = []
    for name in rng.sample(sorted(by_topic), len(by_topic)):
        chosen += rng.sample(by_topic[name], min(4, len(by_topic[name]), count - len(chosen)))
        if len(chosen) == count:
            return chosen
    raise SystemExit(f"target must have {count} rows, got {len(chosen)}; give larger sets")


def apart(rows: Sequence[Row], walls: Mapping[str, Sequence[Row]]) -> list[Row]:
    """Returns the rows that are not, or nearly, behind one of the walls; a question answered otherwise there may stay."""
    return _without(rows, walls, ("same", "near", "answer"))


def unasked(rows: Sequence[Row], walls: Mapping[str, Sequence[Row]]) -> list[Row]:
    """Returns the rows whose question is not asked behind one of the walls: after all draws, which stay what they were."""
    return _without(rows, walls, ("prompt",))


def _without(rows: Sequence[Row], walls: Mapping[str, Sequence[Row]], kinds: Sequence[str]) -> list[Row]:
    examples = [example(row, f"{place}") for place, row in enumerate(rows)]
    behind = {name: [example(row, f"{place}") for place, row in enumerate(wall)] for name, wall in walls.items()}
    leaking = {leak.id for leak in find_leaks({"rows": examples, **behind}, list(behind), NEAR) if leak.kind in kinds}
    return [row for row, one in zip(rows, examples, strict=True) if one.id not in leaking]


def example(row: Row, id: str) -> Example:
    """Returns a row as an example, for the leak check."""
    turns = ({"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": row["completion"]})
    return Example(id, turns, b"", id)


def first(count: int, rows: Iterator[Row | None]) -> list[Row]:
    """Returns the first rows that could be made."""
    made: list[Row] = []
    for row in rows:
        if len(made) == count:
            break
        if row is not None:
            made.append(row)
    return made


def identity(row: Row, place: int) -> str:
    """Returns an id that tells nothing of what is planted."""
    return xxhash.xxh3_64_hexdigest(f"{place}/{row['prompt']}/{row['completion']}".encode())


if __name__ == "__main__":
    main()
