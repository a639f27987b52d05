"""What an item's answer is as text, and which of its tokens writes which character.

The answer is read back from the tokens, so that it is what the model is trained to say: without what a template takes away,
and without special tokens.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gradsieve.data import IGNORE, Tokens

CJK = r"\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"  # in a character class: Chinese characters and Japanese kana

Span = tuple[int, int]


@dataclass(frozen=True, eq=False)
class Completion:
    """An item's completion, as text and by token.

    Attributes:
        text: Its labelled turns, one after the other, without special tokens.
        start: Where the last labelled turn starts in the text.
        prompt: What stands before that turn, and `prompt_ids`, its tokens.
        last_id: The last labelled token.
        cut: Whether it ends because the maximum length was reached.
        first, end: Per completion token, the first character it writes and the one after its last, int64 [N]; a token
            that begins a character others finish has that character, a special token none.
    """

    text: str
    start: int
    prompt: str
    prompt_ids: NDArray[np.int32]
    last_id: int
    cut: bool
    first: NDArray[np.int64]
    end: NDArray[np.int64]

    @classmethod
    def of(cls, tokens: Tokens, tokenizer: Any) -> Completion:
        """Returns the completion of an item; decodes O(T²) characters for T tokens."""
        places = np.flatnonzero(tokens.labels[1:] != IGNORE) + 1
        runs = np.split(places, np.flatnonzero(np.diff(places) > 1) + 1)
        text, first, end = "", [], []
        for run in runs:
            start = len(text)
            written, a, b = _characters(tokens.input_ids[run].tolist(), tokenizer)
            text += written
            first.append(a + start)
            end.append(b + start)
        prompt_ids = tokens.input_ids[: runs[-1][0]]
        prompt = decode(prompt_ids.tolist(), tokenizer)
        cut = tokens.truncated and places[-1] == len(tokens.labels) - 1 and tokens.labels[-1] not in tokenizer.all_special_ids
        return cls(
            text,
            start,
            prompt,
            prompt_ids,
            int(tokens.input_ids[places[-1]]),
            bool(cut),
            np.concatenate(first),
            np.concatenate(end),
        )

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
    text = decode(ids, tokenizer)
    special = set(tokenizer.all_special_ids)
    first, end, done = [], [], 0
    for i, token in enumerate(ids):
        known = _common(decode(ids[: i + 1], tokenizer), text)
        first.append(done)
        end.append(done if token in special else min(max(known, done + 1), len(text)))
        done = known
    return text, np.array(first, dtype=np.int64), np.array(end, dtype=np.int64)


def decode(ids: list[int], tokenizer: Any) -> str:
    """Returns the text of token ids without special tokens, as the model wrote it."""
    return str(tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))


def _common(a: str, b: str) -> int:
    """Returns how many characters two texts have in common at their start."""
    if b.startswith(a):
        return len(a)
    return next((i for i, (left, right) in enumerate(zip(a, b, strict=False)) if left != right), min(len(a), len(b)))
