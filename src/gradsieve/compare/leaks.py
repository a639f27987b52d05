"""Leaks: examples that stand on two sides of a wall that a comparison rests on.

Tests must share nothing with what is trained on or chosen by; the target and the anchor steer the choice, so the pool must not
hold them. Three kinds:

    same      the conversation, word for word
    near      at least `threshold` of the word triples of both texts together are in both (Jaccard index, prompt and answer)
    answer    the same of the answers alone, where both have at least `SHORTEST` triples: a question asked in other words

The search is exact: the small sides (tests, target, anchor) are indexed by word triple and the pool is run past the index, so
that memory is that of the small sides and no pair is missed, as MinHash would miss some at its threshold.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import xxhash

from gradsieve.data import content_hash
from gradsieve.errors import InvalidArgument
from gradsieve.types import Example

Kind = Literal["same", "near", "answer"]
WORDS = 3
SHORTEST = 12
_SHOWN = 8
_WORD = re.compile(r"[\u3040-\u30ff\u3400-\u9fff]|[^\W_\u3040-\u30ff\u3400-\u9fff]+")  # a Chinese letter is a word


@dataclass(frozen=True, slots=True)
class Leak:
    """Two examples that must not be on both sides.

    Attributes:
        kind: See the module.
        similarity: Jaccard index, 1 for `same`.
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
        likeness = "the same as" if self.kind == "same" else f"{self.similarity:.0%} like"
        what = "its answer is " if self.kind == "answer" else ""
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
    found: list[Leak] = []
    for place, name in enumerate(names):
        for other in names[place + 1 :]:
            if name not in tests and sides[name] and sides[other]:
                found += _between(name, sides[name], other, _Index.of(sides[other]), threshold)
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
    """Returns hashes of all runs of three words of a text, without case and punctuation; of shorter texts the text itself."""
    words = _WORD.findall(text.casefold())
    runs = [" ".join(words[i : i + WORDS]) for i in range(len(words) - WORDS + 1)] or [" ".join(words)]
    return frozenset(xxhash.xxh3_64_intdigest(run.encode()) for run in runs)


def _texts(example: Example) -> tuple[str, str]:
    """Returns prompt and answer as one text, and the answer alone."""
    contents = [str(turn.get("content") or "") for turn in example.messages]
    return "\n".join(contents), contents[-1]


@dataclass(frozen=True, eq=False)
class _Index:
    """One side by content hash and by word triple, of whole texts and of answers."""

    examples: Sequence[Example]
    same: Mapping[str, int]
    whole: _Postings
    answers: _Postings

    @classmethod
    def of(cls, examples: Sequence[Example]) -> _Index:
        texts = [_texts(example) for example in examples]
        same: dict[str, int] = {}
        for i, example in enumerate(examples):
            same.setdefault(content_hash(example), i)
        return cls(
            examples,
            same,
            _Postings.of([triples(whole) for whole, _ in texts]),
            _Postings.of([triples(own) for _, own in texts]),
        )


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


def _between(name: str, examples: Sequence[Example], other: str, index: _Index, threshold: float) -> Iterator[Leak]:
    for example in examples:
        found = _likest(example, index, threshold)
        if found is not None:
            kind, at, similarity = found
            partner = index.examples[at]
            yield Leak(kind, similarity, name, example.id, example.origin, other, partner.id, partner.origin)


def _likest(example: Example, index: _Index, threshold: float) -> tuple[Kind, int, float] | None:
    at = index.same.get(content_hash(example))
    if at is not None:
        return "same", at, 1.0
    whole, answer = _texts(example)
    near = index.whole.likest(triples(whole))
    if near is not None and near[1] >= threshold:
        return "near", *near
    alone = index.answers.likest(triples(answer), SHORTEST)
    return ("answer", *alone) if alone is not None and alone[1] >= threshold else None
