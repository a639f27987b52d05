"""Which tokens bear the answer: where forgetting shows that a mean over all tokens hides.

For every completion token two marks, flat in the order of `gradsieve.evaluate.likelihood`:

    number   it writes a digit, anywhere in the completion
    key      set kind `worked`: it writes the final number of the last labelled turn: the number after the last `####`, else
             the last number there is; none where the item was cut off at the maximum length.
             other kinds: it writes a rare word of the last labelled turn, the first time the turn says it.

A word is a run of at least three letters, whatever its case; in runs of Chinese or Japanese characters every pair of
neighbours is one. It is rare if at most `max(1, n // 20)` of the set's n answers say it, and if the item's own prompt does
not: what is copied, and what all answers have (function words, stock phrases), needs no knowledge. Which words are rare
follows from the set alone, not from any model, so that all models are held to the same tokens.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from gradsieve.data import IGNORE, Tokens
from gradsieve.evaluate.sets import TestSet

RARE_SHARE = 20  # a word is rare in at most one of this many answers
CJK = r"\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
_WORD = re.compile(rf"[^\W\d_{CJK}]{{3,}}")
_PAIR = re.compile(rf"(?=([{CJK}]{{2}}))")
# No part of a word (H2O) or of a version (1.2.3); a minus only where no number stands before it.
NUMBER = re.compile(r"(?<![A-Za-z0-9_])(?<!\d\.)-?(?:\d+(?:,\d{3}(?!\d))*(?:\.\d+)?|\.\d+)")

Span = tuple[int, int]


@dataclass(frozen=True, eq=False)
class Marks:
    """Marks bool [N] per completion token of a set; see the module."""

    number: Tensor
    key: Tensor


def marks(test: TestSet, tokenizer: Any) -> Marks:
    """Returns the marks of a set's completion tokens; O(T²) characters decoded per item of T completion tokens."""
    items = [_Completion.of(tokens, tokenizer) for tokens in test.tokens]
    if test.kind == "worked":
        ends = [None if item.cut else final_number(item.last) for item in items]
        spans = [[end] if end else [] for end in ends]
    else:
        spans = _rare_words([item.last for item in items], [item.prompt for item in items])
    numbers = [item.touching(_digits(item.text)) for item in items]
    keys = [item.touching((a + item.start, b + item.start) for a, b in found) for item, found in zip(items, spans, strict=True)]
    return Marks(torch.from_numpy(np.concatenate(numbers)), torch.from_numpy(np.concatenate(keys)))


def final_number(text: str) -> Span | None:
    """Returns where the final number of an answer stands: the first after the last `####`, else the last; None without one."""
    mark = text.rfind("####")
    after = NUMBER.search(text, mark + 4) if mark >= 0 else None
    found = after or next(reversed(list(NUMBER.finditer(text))), None)
    return found.span() if found else None


def words(text: str) -> Iterator[tuple[str, Span]]:
    """Yields a text's words, case folded, and where they stand."""
    for match in _WORD.finditer(text):
        yield match.group().casefold(), match.span()
    for match in _PAIR.finditer(text):
        yield match.group(1), match.span(1)


def _rare_words(answers: Sequence[str], prompts: Sequence[str]) -> list[list[Span]]:
    """Returns where each answer says a rare word for the first time."""
    found = [list(words(answer)) for answer in answers]
    said_by = Counter(word for item in found for word in {word for word, _ in item})
    most = max(1, len(answers) // RARE_SHARE)
    spans: list[list[Span]] = []
    for item, prompt in zip(found, prompts, strict=True):
        seen = {word for word, _ in words(prompt)}
        spans.append([])
        for word, span in item:
            if said_by[word] <= most and word not in seen:
                spans[-1].append(span)
            seen.add(word)
    return spans


def _digits(text: str) -> list[Span]:
    return [match.span() for match in re.finditer(r"\d+", text)]


@dataclass(frozen=True, eq=False)
class _Completion:
    """An item's completion, as text and by token.

    Attributes:
        text: Its labelled turns, one after the other, without special tokens.
        start: Where the last labelled turn starts in the text.
        prompt: What stands before that turn.
        cut: Whether it ends because the maximum length was reached.
        first, end: Per completion token, the first character it writes and the one after its last, int64 [N]; a token
            that begins a character others finish has that character, a special token none.
    """

    text: str
    start: int
    prompt: str
    cut: bool
    first: NDArray[np.int64]
    end: NDArray[np.int64]

    @classmethod
    def of(cls, tokens: Tokens, tokenizer: Any) -> _Completion:
        """Returns the completion of an item."""
        places = np.flatnonzero(tokens.labels[1:] != IGNORE) + 1
        runs = np.split(places, np.flatnonzero(np.diff(places) > 1) + 1)
        text, first, end = "", [], []
        for run in runs:
            start = len(text)
            written, a, b = _characters(tokens.input_ids[run].tolist(), tokenizer)
            text += written
            first.append(a + start)
            end.append(b + start)
        prompt = _decode(tokens.input_ids[: runs[-1][0]].tolist(), tokenizer)
        cut = tokens.truncated and places[-1] == len(tokens.labels) - 1 and tokens.labels[-1] not in tokenizer.all_special_ids
        return cls(text, start, prompt, bool(cut), np.concatenate(first), np.concatenate(end))

    @property
    def last(self) -> str:
        """The last labelled turn."""
        return self.text[self.start :]

    def touching(self, spans: Iterable[Span]) -> NDArray[np.bool_]:
        """Returns per completion token whether it writes a character of the spans."""
        inside = np.zeros(len(self.text) + 1, dtype=np.int64)
        for a, b in spans:
            inside[a + 1 : b + 1] = 1
        before = inside.cumsum()
        return before[self.end] > before[self.first]


def _characters(ids: list[int], tokenizer: Any) -> tuple[str, NDArray[np.int64], NDArray[np.int64]]:
    """Returns the text of token ids and the characters [first, end) that each of them writes."""
    text = _decode(ids, tokenizer)
    special = set(tokenizer.all_special_ids)
    first, end, done = [], [], 0
    for i, token in enumerate(ids):
        known = _common(_decode(ids[: i + 1], tokenizer), text)
        first.append(done)
        end.append(done if token in special else min(max(known, done + 1), len(text)))
        done = max(known, done)
    return text, np.array(first, dtype=np.int64), np.array(end, dtype=np.int64)


def _decode(ids: list[int], tokenizer: Any) -> str:
    return str(tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))


def _common(a: str, b: str) -> int:
    """Returns how many characters two texts have in common at their start."""
    if b.startswith(a):
        return len(a)
    return next((i for i, (left, right) in enumerate(zip(a, b, strict=False)) if left != right), min(len(a), len(b)))
