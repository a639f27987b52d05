"""Leaks: examples that stand on two sides of a wall that a comparison rests on.

Tests must share nothing with what is trained on or chosen by; the target and the anchor steer the choice, so the pool must not
hold them. Four kinds:

    same      the conversation, word for word
    near      at least `threshold` of the word triples of both texts together are in both (Jaccard index, prompt and answer)
    answer    the same of the answers alone, where both have at least `SHORTEST` triples: a question asked in other words
    prompt    all turns but the answer, word for word, where they have at least `ASKED` words and no other example of the other
              side begins so: a question answered in other words. What several examples begin with is a form, not a question

Case, punctuation, spaces and compatibility forms do not count. Not found: translations, other spellings (traditional for
simplified characters, accents), and a test's text inside a much longer one. With the default of 0.8, a changed word costs three
triples: of forty words one may differ, hardly two.

Documents of tasks of lm-evaluation-harness count as tests where the task is a local YAML file, worded as the task words them:
what a template adds to a short question makes it less like the bare one. A note names the tasks that were not looked at.

The search is exact: the small sides (tests, target, anchor) are indexed by word triple and the pool is run past the indexes
once, so that memory is that of the small sides and no pair is missed. `gradsieve.data.dedup` is another search: within one
large set this one costs the square of its size, so that it has MinHash there, which may miss a pair just at its threshold, and
runs of letters, which find misspelt copies. A duplicate missed there is a wasted step; a leak missed here is a wrong result.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import xxhash

from gradsieve.data import content_hash
from gradsieve.data.texts import text_of, words
from gradsieve.errors import InvalidArgument
from gradsieve.types import Example

Kind = Literal["same", "near", "answer", "prompt"]
WORDS = 3
SHORTEST = 12
ASKED = 3
_SHOWN = 8


@dataclass(frozen=True, slots=True)
class Leak:
    """Two examples that must not be on both sides.

    Attributes:
        kind: See the module.
        similarity: Jaccard index, 1 for `same` and `prompt`.
        side: The set that would lose its example: `pool`, `target`, `anchor`.
        id: Of that example, and
        origin: where it stands.
        other_side: The set it must not share with.
        other_id: Of the example there, and
        other_origin: where that stands.
    """

    kind: Kind
    similarity: float
    side: str
    id: str
    origin: str
    other_side: str
    other_id: str
    other_origin: str

    def __str__(self) -> str:
        likeness = f"{self.similarity:.0%} like" if self.kind in ("near", "answer") else "the same as"
        what = {"answer": "its answer is ", "prompt": "its prompt is "}.get(self.kind, "")
        return (
            f"{self.side} {self.origin} ({self.id}): {what}{likeness} {self.other_side} {self.other_origin} ({self.other_id})"
        )


def find_leaks(sides: Mapping[str, Sequence[Example]], tests: Sequence[str], threshold: float = 0.8) -> list[Leak]:
    """Returns every leak between the sides, each example of a side with its likest partner on each other side.

    Args:
        sides: Examples by the name of their side, from the one that loses an example to the one that keeps it: `pool`,
            `target`, `anchor`, tests.
        tests: Which of them are tests; those are not compared with each other.
        threshold: Jaccard index, in (0, 1].

    Raises:
        InvalidArgument: The threshold is outside its range.
    """
    if not 0 < threshold <= 1:
        raise InvalidArgument(f"threshold must lie in (0, 1], got {threshold}")
    names = list(sides)
    indexes = {name: _Index.of(sides[name]) for name in names[1:] if sides[name]}
    found: list[Leak] = []
    for place, name in enumerate(names):
        others = {other: indexes[other] for other in names[place + 1 :] if other in indexes}
        if name not in tests and others:
            found += _between(name, sides[name], others, threshold)
    return found


def without_leaks(sides: Mapping[str, Sequence[Example]], leaks: Sequence[Leak]) -> dict[str, list[Example]]:
    """Returns the sides without the examples that leak; the side named first in a leak loses its example."""
    gone = {(leak.side, leak.id) for leak in leaks}
    return {name: [example for example in side if (name, example.id) not in gone] for name, side in sides.items()}


def refuse(leaks: Sequence[Leak]) -> None:
    """Raises InvalidArgument with the leaks listed, if there are any."""
    if not leaks:
        return
    shown = "; ".join(str(leak) for leak in leaks[:_SHOWN])
    more = f"; and {len(leaks) - _SHOWN} more" if len(leaks) > _SHOWN else ""
    raise InvalidArgument(
        f"pool, target, anchor and tests must not share examples, got {len(leaks)} that do: {shown}{more}; remove them from "
        "the files, or run with --drop-leaks"
    )


def triples(text: str) -> frozenset[int]:
    """Returns hashes of all runs of three words of a text (`gradsieve.data.texts.words`); of shorter texts the text itself."""
    found = words(text)
    runs = [" ".join(found[i : i + WORDS]) for i in range(len(found) - WORDS + 1)] or [" ".join(found)]
    return frozenset(xxhash.xxh3_64_intdigest(run.encode()) for run in runs)


@dataclass(frozen=True, slots=True)
class _Content:
    """What an example is compared by: the hash of its conversation, the triples of its turns and of its answer, its prompt."""

    hash: str
    whole: frozenset[int]
    answer: frozenset[int]
    prompt: tuple[str, ...]

    @classmethod
    def of(cls, example: Example) -> _Content:
        *asked, answer = [str(turn.get("content") or "") for turn in example.messages]
        return cls(content_hash(example), triples(text_of(example)), triples(answer), tuple(words("\n".join(asked))))


@dataclass(frozen=True, eq=False)
class _Index:
    """One side by content hash, by word triple of whole texts and of answers, and by the prompts that one example alone has."""

    examples: Sequence[Example]
    same: Mapping[str, int]
    whole: _Postings
    answers: _Postings
    prompts: Mapping[tuple[str, ...], int]

    @classmethod
    def of(cls, examples: Sequence[Example]) -> _Index:
        contents = [_Content.of(example) for example in examples]
        same: dict[str, int] = {}
        for i, content in enumerate(contents):
            same.setdefault(content.hash, i)
        whole, answers = ([getattr(content, part) for content in contents] for part in ("whole", "answer"))
        often = Counter(content.prompt for content in contents)
        prompts = {c.prompt: i for i, c in enumerate(contents) if len(c.prompt) >= ASKED and often[c.prompt] == 1}
        return cls(examples, same, _Postings.of(whole), _Postings.of(answers), prompts)


@dataclass(frozen=True, eq=False)
class _Postings:
    """Which texts hold a word triple."""

    of_triple: Mapping[int, np.ndarray]
    sizes: np.ndarray

    @classmethod
    def of(cls, sets: Sequence[frozenset[int]]) -> _Postings:
        lists: dict[int, list[int]] = {}
        for i, one in enumerate(sets):
            for triple in one:
                lists.setdefault(triple, []).append(i)
        arrays = {triple: np.array(members, dtype=np.int64) for triple, members in lists.items()}
        return cls(arrays, np.array([len(one) for one in sets]))

    def likest(self, text: frozenset[int], least: int = 0) -> tuple[int, float] | None:
        """Returns the text with the largest Jaccard index to this one, the first of equals, and the index; None without any.

        Texts of fewer than `least` triples do not count.
        """
        if len(text) < least:
            return None
        members = [self.of_triple[triple] for triple in text if triple in self.of_triple]
        if not members:
            return None
        shared = np.bincount(np.concatenate(members), minlength=len(self.sizes))
        index = np.where(self.sizes >= least, shared / (len(text) + self.sizes - shared), 0.0)
        best = int(index.argmax())
        return best, float(index[best])


def _between(name: str, examples: Sequence[Example], others: Mapping[str, _Index], threshold: float) -> Iterator[Leak]:
    for example in examples:
        content = _Content.of(example)
        for other, index in others.items():
            found = _likest(content, index, threshold)
            if found is not None:
                kind, at, similarity = found
                partner = index.examples[at]
                yield Leak(kind, similarity, name, example.id, example.origin, other, partner.id, partner.origin)


def _likest(content: _Content, index: _Index, threshold: float) -> tuple[Kind, int, float] | None:
    at = index.same.get(content.hash)
    if at is not None:
        return "same", at, 1.0
    near = index.whole.likest(content.whole)
    if near is not None and near[1] >= threshold:
        return "near", *near
    alone = index.answers.likest(content.answer, SHORTEST)
    if alone is not None and alone[1] >= threshold:
        return "answer", *alone
    asked = index.prompts.get(content.prompt)
    return None if asked is None else ("prompt", asked, 1.0)
