"""Duplicates by their text: the same conversation again, or one in nearly the same words.

The example with the smallest id stays; one that repeats it goes. Going through the pool by id, an example goes if it is like
one that stays, so that every example that goes has one that stays at least as like as the threshold, and chains of likeness
(a like b, b like c) do not run off.

Likeness is the Jaccard index of the texts' shingles, runs of letters, each weighed by how rare it is in the pool. Unweighted,
two questions of one template with other facts are more alike than a text and its rewording.
"""

from __future__ import annotations

import dataclasses
import math
import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
import numpy.typing as npt
import xxhash

from gradsieve.data.read import content_hash
from gradsieve.data.texts import text_of
from gradsieve.errors import InvalidArgument, MissingExtra
from gradsieve.types import Example

Dedup = Literal["off", "exact", "near"]

THRESHOLD = 0.5
"""Likeness from which examples are near-duplicates; docs/methods/README.md says what it finds and what it costs."""
SHINGLE = 4
"""Letters in a shingle: short enough that a changed word changes few of them, long enough that chance shares few."""
PERMUTATIONS = 128
RECALL = 0.999
"""Chance of comparing two examples that are just as like as the threshold."""


@dataclass(frozen=True, slots=True)
class Duplicate:
    """An example that goes.

    Attributes:
        position: Its index in the examples.
        of: Index of the one that stays.
        likeness: Jaccard index of their shingles, weighed by rarity; 1 for the same text.
        copy: Whether it is the same text.
    """

    position: int
    of: int
    likeness: float
    copy: bool

    def reason(self, examples: Sequence[Example]) -> str:
        """Returns why it goes, as `excluded.jsonl` says it."""
        return f"{'copy' if self.copy else 'near-duplicate'} of {examples[self.of].id}"


def find_duplicates(examples: Sequence[Example], how: Dedup, threshold: float) -> list[Duplicate]:
    """Returns the examples that repeat one with a smaller id, by position.

    Args:
        examples: The pool.
        how: `exact`: the same text and calls of tools in every turn; `near`: texts whose shingles of 4 letters, weighed by
            `rarity`, have a Jaccard index of at least the threshold, letter case, punctuation and spaces left out; `off`: none.
        threshold: In (0, 1]; read with `near` only.

    Returns:
        Duplicates in O(n) hashes and, for `near`, comparisons with the examples that share a band of the MinHash signature:
        two examples just as like as the threshold are compared with a chance of at least 99.9 %, more like ones surely enough.

    Raises:
        InvalidArgument: The threshold is out of range.
        MissingExtra: `near` without datasketch.
    """
    check_dedup(how, threshold)
    if how == "off":
        return []
    by_id = sorted(range(len(examples)), key=lambda i: examples[i].id)
    first: dict[str, int] = {}
    found = []
    stays = []
    for i in by_id:
        other = first.setdefault(content_hash(examples[i]), i)
        if other == i:
            stays.append(i)
        else:
            found.append(Duplicate(i, other, 1.0, True))
    if how == "near":
        near = {duplicate.position: duplicate for duplicate in _near(examples, stays, threshold)}
        # a copy of an example that goes is a near-duplicate of what that one repeats
        found = [dataclasses.replace(near[d.of], position=d.position) if d.of in near else d for d in found]
        found += near.values()
    return sorted(found, key=lambda duplicate: duplicate.position)


def check_dedup(how: str, threshold: float) -> None:
    """Raises InvalidArgument unless these are settings of `find_duplicates`."""
    if how not in get_args(Dedup):
        raise InvalidArgument(f"dedup must be one of {', '.join(get_args(Dedup))}, got {how!r}")
    if not 0 < threshold <= 1:
        raise InvalidArgument(f"dedup_threshold must lie in (0, 1], got {threshold}; {THRESHOLD} is the default")


def banding(threshold: float) -> tuple[int, int]:
    """Returns (bands, rows a band) with the most rows for which two examples at the threshold share a band with `RECALL`.

    They share all r rows of a band with chance t^r, and one of b bands with 1 - (1 - t^r)^b.
    """
    fitting = [
        (PERMUTATIONS // rows, rows)
        for rows in range(1, PERMUTATIONS // 2 + 1)
        if math.pow(1 - math.pow(threshold, rows), PERMUTATIONS // rows) <= 1 - RECALL
    ]
    return fitting[-1] if fitting else (PERMUTATIONS, 1)


def shingles(text: str) -> npt.NDArray[np.uint64]:
    """Returns the hashes of the runs of 4 letters of a text, each once, sorted; of the whole where it is shorter."""
    plain = re.sub(r"[\W_]+", " ", unicodedata.normalize("NFKC", text).casefold()).strip()
    runs = {plain[i : i + SHINGLE] for i in range(max(1, len(plain) - SHINGLE + 1))}
    return np.array(sorted(xxhash.xxh3_64_intdigest(run.encode()) for run in runs), dtype=np.uint64)


def rarity(texts: Sequence[npt.NDArray[np.uint64]]) -> tuple[list[npt.NDArray[np.int64]], npt.NDArray[np.int64]]:
    """Returns the texts with their shingles numbered 0, 1, …, and the weight of each: round(log2(1 + n/texts it is in)).

    Whole numbers from 1 on, so that a shingle of weight w can stand for w elements, and MinHash for the weighted index.
    """
    _, numbered, count = np.unique(np.concatenate(texts), return_inverse=True, return_counts=True)
    weight = np.rint(np.log2(1 + len(texts) / count)).astype(np.int64)
    return np.split(numbered, np.cumsum([len(text) for text in texts])[:-1]), weight


def _near(examples: Sequence[Example], stays: Sequence[int], threshold: float) -> list[Duplicate]:
    try:
        from datasketch import MinHash, MinHashLSH
    except ImportError:
        raise MissingExtra("dedup near needs the package datasketch; pip install 'gradsieve[text]'") from None
    if not stays:
        return []
    numbered, weight = rarity([shingles(text_of(examples[i])) for i in stays])
    texts = dict(zip(stays, numbered, strict=True))
    total = {i: int(weight[text].sum()) for i, text in texts.items()}
    index = MinHashLSH(num_perm=PERMUTATIONS, params=banding(threshold))
    own = np.zeros(len(weight), dtype=np.int64)
    found = []
    for i in stays:
        text = texts[i]
        signature = MinHash(num_perm=PERMUTATIONS, seed=1, hashfunc=int)
        signature.update_batch(_elements(text, weight[text]))
        others = sorted((int(j) for j in index.query(signature)), key=lambda j: examples[j].id)
        own[text] = weight[text]
        shared = _sums(own, [texts[j] for j in others])
        own[text] = 0
        likeness = shared / (total[i] + np.array([total[j] for j in others]) - shared)
        best = int(likeness.argmax()) if others else -1  # the first of equals
        if others and likeness[best] >= threshold:
            found.append(Duplicate(i, others[best], float(likeness[best]), False))
        else:
            index.insert(i, signature)
    return found


def _elements(text: npt.NDArray[np.int64], weight: npt.NDArray[np.int64]) -> list[int]:
    """Returns the numbers below 2³² that stand for a text, w of them for a shingle of weight w."""
    copy = np.arange(weight.sum()) - np.repeat(weight.cumsum() - weight, weight)
    mixed = (np.repeat(text, weight) * 64 + copy).astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    return list((mixed >> np.uint64(32)).tolist())


def _sums(values: npt.NDArray[np.int64], texts: Sequence[npt.NDArray[np.int64]]) -> npt.NDArray[np.int64]:
    """Returns the sum of the values of the shingles of each text: int64 [len(texts)]."""
    if not texts:
        return np.zeros(0, dtype=np.int64)
    starts = np.cumsum([0, *map(len, texts[:-1])])
    return np.asarray(np.add.reduceat(values[np.concatenate(texts)], starts))
