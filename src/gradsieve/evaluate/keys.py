"""Which tokens bear the answer: where forgetting shows that a mean over all tokens hides.

For every completion token two marks, flat in the order of `gradsieve.evaluate.likelihood`:

    number   it writes a digit, anywhere in the completion
    key      set kind `worked`: it writes the final number of the last labelled turn: the number after the last `####`, else
             the last number there is, a fraction (3/4, \\frac{3}{4}, 1 3/4) whole; none where the item was cut off at the
             maximum length, or where the number is part of something else (3:4, 2^5, \\sqrt{3}).
             other kinds: it writes a rare word of the last labelled turn, the first time the turn says it.

A word is a run of at least three letters, whatever its case; in runs of Chinese or Japanese characters every pair of
neighbours is one. It is rare if at most `max(1, n // 20)` of the set's n answers say it, and if the item's own prompt does
not: what is copied, and what all answers have (function words, stock phrases), needs no knowledge. Which words are rare
follows from the set alone, not from any model, so that all models are held to the same tokens.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from gradsieve.evaluate.completion import CJK, Completion, Span

RARE_SHARE = 20  # a word is rare in at most one of this many answers
_WORD = re.compile(rf"[^\W\d_{CJK}]{{3,}}")
_PAIR = re.compile(rf"(?=([{CJK}]{{2}}))")
# No part of a word (H2O) or of a version (1.2.3); a minus only where no number stands before it.
_START = r"(?<![A-Za-z0-9_])(?<!\d\.)"
_DIGITS = r"(?:\d+(?:,\d{3}(?!\d))*(?:\.\d+)?|\.\d+)"
NUMBER = re.compile(rf"{_START}-?{_DIGITS}")
_SOLIDUS = "[/\uff0f\u2044]"
_VALUE = re.compile(  # a number, a/b or \frac{a}{b}, and what is whole before one of these
    rf"{_START}(?P<sign>-?)(?:(?P<whole>\d+(?:,\d{{3}}(?!\d))*)(?: (?=\d+{_SOLIDUS}\d)| ?(?=\\[dt]?frac)))?"
    rf"(?:\\[dt]?frac ?(?P<over>\{{ ?-?{_DIGITS} ?\}}|\d) ?(?P<under>\{{ ?{_DIGITS} ?\}}|\d)"
    rf"|(?P<number>{_DIGITS})(?:(?:{_SOLIDUS}| {_SOLIDUS} )(?P<by>{_DIGITS}))?)"
)
# What makes a number part of something that is not read: a ratio, a time, a list, a power, a root, a term over another.
_BEFORE = re.compile(rf"(?:{_SOLIDUS}|\d(?: [:/] |[:\uff1a,])|\^\{{?|\}} ?\{{|\\(?:[dt]?frac|sqrt|[dt]?binom) ?\{{?)$")
_AFTER = re.compile(rf"[.,:\uff1a]?\d| : \d| ?{_SOLIDUS} ?[\d(\\]|\^|\}} ?\{{| ?\\(?:[dt]?frac|sqrt|pi)|[½⅓⅔¼¾]")


@dataclass(frozen=True, eq=False)
class Marks:
    """Marks bool [N] per completion token of a set; see the module."""

    number: Tensor
    key: Tensor


def marks(items: Sequence[Completion], *, worked: bool) -> Marks:
    """Returns the marks of all completion tokens of a set.

    Args:
        items: The set's answers; which words are rare follows from all of them.
        worked: Whether the final number bears the answer; else rare words do.
    """
    if worked:
        ends = [None if item.cut else final_number(item.last) for item in items]
        spans = [[(end.start, end.end)] if end else [] for end in ends]
    else:
        spans = _rare_words([item.last for item in items], [item.prompt for item in items])
    numbers = [item.touching(_digits(item.text)) for item in items]
    keys = [item.touching((a + item.start, b + item.start) for a, b in found) for item, found in zip(items, spans, strict=True)]
    return Marks(torch.from_numpy(np.concatenate(numbers)), torch.from_numpy(np.concatenate(keys)))


class Number(NamedTuple):
    """A number in a text: where it stands, and its value."""

    start: int
    end: int
    value: Fraction


def final_number(text: str) -> Number | None:
    """Returns the final number of an answer: the first after the last `####`, else the last; None without one.

    There is none either where it is part of something that is not read as a value; see the module.
    """
    mark = text.rfind("####")
    after = _VALUE.search(text, mark + 4) if mark >= 0 else None
    found = after or next(reversed(list(_VALUE.finditer(text))), None)
    if found is None or _BEFORE.search(text[max(0, found.start() - 12) : found.start()]) or _AFTER.match(text, found.end()):
        return None
    value = _value(found)
    return None if value is None else Number(*found.span(), value)


def _value(found: re.Match[str]) -> Fraction | None:
    """Returns the value of a match of `_VALUE`; None of a fraction over zero."""
    over, under = found["over"] or found["number"], found["under"] or found["by"] or "1"
    whole, above, below = (Fraction(part.strip("{ }").replace(",", "")) for part in (found["whole"] or "0", over, under))
    return None if below == 0 else (-1 if found["sign"] else 1) * (whole + above / below)


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
