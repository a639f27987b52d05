"""Examples as the model will see them: tokens and labels, and a hash of both."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import xxhash

from gradsieve.data.template import IGNORE, Excluded, Tokens, tokenize
from gradsieve.errors import InvalidArgument
from gradsieve.types import Example


@dataclass(frozen=True, eq=False)
class TokenSet:
    """A set of examples as the model will see them.

    Attributes:
        name: Its role: `pool`, `target`, `anchor`, …
        examples: All of them, as read.
        kept: Positions of the usable ones.
        tokens: Tokens and labels of the usable ones.
        keys: Hash of tokens and labels of each usable one, 16 bytes: examples with equal keys have equal gradients.
        excluded: The others, with the reason.
        notes: What the user should know about the template.
    """

    name: str
    examples: Sequence[Example]
    kept: list[int]
    tokens: list[Tokens]
    keys: list[bytes]
    excluded: list[Excluded]
    notes: tuple[str, ...] = ()

    @classmethod
    def of(
        cls, name: str, examples: Sequence[Example], tokenizer: Any, *, max_length: int, chat_template: str | None = None
    ) -> TokenSet:
        """Returns the examples tokenised with the model's template and a loss on assistant turns only."""
        done = tokenize(examples, tokenizer, max_length=max_length, chat_template=chat_template)
        keys = [_key(tokens) for tokens in done.tokens]
        return cls(name, examples, done.kept, done.tokens, keys, done.excluded, done.notes)

    @property
    def ids(self) -> list[str]:
        """Ids of the usable examples."""
        return [self.examples[i].id for i in self.kept]

    @property
    def lengths(self) -> list[int]:
        """Tokens per usable example."""
        return [len(tokens.input_ids) for tokens in self.tokens]

    def require_usable(self, least: int = 1) -> None:
        """Raises InvalidArgument unless at least `least` examples are usable."""
        if len(self.kept) < least:
            why = f"; the first: {self.excluded[0].reason}" if self.excluded else ""
            raise InvalidArgument(f"{self.name} must hold at least {least} usable examples, got {len(self.kept)}{why}")

    def remarks(self, max_length: int) -> list[str]:
        """Returns what the user must know of examples left out or cut; the pool's exclusions have a file of their own."""
        remarks = list(self.notes)
        if self.excluded and self.name != "pool":
            remarks.append(
                f"{len(self.excluded)} of {len(self.examples)} examples of the {self.name} could not be used; the first, "
                f"{self.excluded[0].id}: {self.excluded[0].reason}"
            )
        if cut := sum(tokens.truncated for tokens in self.tokens):
            remarks.append(
                f"{cut} of {len(self.examples)} examples of the {self.name} are longer than {max_length} tokens and were cut "
                "at the end; raise --max-length to keep them whole"
            )
        return remarks

    def restricted(self, name: str, positions: Sequence[int]) -> TokenSet:
        """Returns the usable examples at `positions` (into `kept`) as a set of their own."""
        return TokenSet(
            name,
            self.examples,
            [self.kept[i] for i in positions],
            [self.tokens[i] for i in positions],
            [self.keys[i] for i in positions],
            [],
        )

    def without(self, reasons: Mapping[int, str]) -> TokenSet:
        """Returns the set with some usable examples (positions into `kept`) excluded for a reason."""
        rest = [i for i in range(len(self.kept)) if i not in reasons]
        gone = [Excluded(self.kept[i], self.examples[self.kept[i]].id, reason) for i, reason in reasons.items()]
        excluded = sorted([*self.excluded, *gone], key=lambda e: e.position)
        return replace(self.restricted(self.name, rest), excluded=excluded, notes=self.notes)

    def alone(self) -> TokenSet:
        """Returns the usable examples without their prompts: the first token of each, then its completion with loss on it."""
        short = []
        for tokens in self.tokens:
            said = 1 + np.flatnonzero(tokens.labels[1:] != IGNORE)
            ids = tokens.input_ids[np.concatenate([[0], said])]
            short.append(Tokens(ids, np.concatenate([[IGNORE], ids[1:]]).astype(ids.dtype), tokens.truncated))
        return TokenSet(f"{self.name}'s answers alone", self.examples, self.kept, short, [_key(t) for t in short], [])

    def digest(self) -> str:
        """Returns a hash of the set, whatever its order."""
        return xxhash.xxh3_128_hexdigest(b"".join(sorted(self.keys)))


def _key(tokens: Tokens) -> bytes:
    ids, labels = np.asarray(tokens.input_ids, np.int32), np.asarray(tokens.labels, np.int32)
    return xxhash.xxh3_128_digest(ids.tobytes() + labels.tobytes())
