"""Faults planted in the demo's pool: what a good selection should leave out.

    swapped             a term with the definition of another one, of another branch of medicine
    off-domain          a sound text about a craft, a trade or Python
    near-duplicate      a sound row of the pool once more, in other words
    false-arithmetic    a word problem worked with wrong operations

None is made the way a contrast is made (data/corrupt.py): definitions are passed around a ring here, and pairs of answers of
like length change places there; operations are wrong here, and printed numbers are changed there.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

from gradsieve.demo import arithmetic, offdomain
from gradsieve.demo.terms import Term
from gradsieve.demo.wording import ask, frame, reword
from gradsieve.errors import InvalidArgument

CLEAN = "clean"
SHARES = {"swapped": 0.08, "off-domain": 0.07, "near-duplicate": 0.07, "false-arithmetic": 0.08}


@dataclass(frozen=True, slots=True)
class Sound:
    """A sound row before it becomes an example, with the numbers of its wording and framing."""

    term: Term
    question: str
    answer: str
    wording: int
    framing: int


def sound(term: Term, rng: random.Random) -> Sound:
    """Returns a question for the term and its definition as the answer."""
    question, wording = ask(term.inline, term.name, rng)
    answer, framing = frame(term.name, term.definition, rng)
    return Sound(term, question, answer, wording, framing)


def swapped(terms: Sequence[Term], rng: random.Random) -> list[tuple[str, str]]:
    """Returns (question, answer) rows in which every term has another one's definition, from another branch.

    The terms are sorted by branch and every definition is passed on by the size of the largest branch, which leads out of
    every branch as long as none holds more than half of the terms.

    Args:
        terms: Each of exactly one branch; no branch with more than half of them.
        rng: Order within a branch, wordings and framings.
    """
    ring = sorted(rng.sample(terms, len(terms)), key=lambda term: sorted(term.branches))
    largest = max(sum(other.branches == term.branches for other in ring) for term in ring)
    rows = []
    for place, term in enumerate(ring):
        giver = ring[(place + largest) % len(ring)]
        if not term.branches.isdisjoint(giver.branches):
            raise AssertionError(f"{term.id} would get its definition from its own branch, from {giver.id}")
        question, _ = ask(term.inline, term.name, rng)
        answer, _ = frame(term.name, giver.definition, rng)
        rows.append((question, answer))
    return rows


def off_domain(count: int, rng: random.Random) -> list[tuple[str, str]]:
    """Returns (question, answer) rows, half about crafts and trades and half about Python, all of different things.

    Raises:
        InvalidArgument: There are fewer texts than asked for.
    """
    words, functions = offdomain.glosses(), offdomain.python_summaries()
    if count > len(words) + len(functions):
        raise InvalidArgument(f"off-domain rows must be at most {len(words) + len(functions)}, got {count}; lower examples")
    about_words = min(max((count + 1) // 2, count - len(functions)), len(words))
    rows = []
    for word, meaning in rng.sample(words, about_words):
        heading = word[0].upper() + word[1:]
        rows.append((ask(word, heading, rng, general=True)[0], frame(heading, meaning, rng)[0]))
    for name, summary in rng.sample(functions, count - about_words):
        rows.append((offdomain.python_question(name, rng), summary))
    return rows


def near_duplicates(rows: Sequence[Sound], count: int, rng: random.Random) -> list[tuple[str, str]]:
    """Returns `count` of the sound rows with another question wording, another framing, and synonyms where there are any."""
    copies = []
    for row in rng.sample(rows, count):
        question, _ = ask(row.term.inline, row.term.name, rng, other_than=row.wording)
        answer, _ = frame(row.term.name, reword(row.term.definition, rng), rng, other_than=row.framing)
        copies.append((question, answer))
    return copies


def false_arithmetic(count: int, rng: random.Random) -> list[tuple[str, str]]:
    """Returns `count` word problems in which every equation is false."""
    return [(problem.question, problem.answer) for problem in arithmetic.false_problems(count, rng)]
