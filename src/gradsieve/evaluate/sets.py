"""Test sets: what a model is measured on, and which kind of answer each set holds.

kind      told by                                             key tokens                       generated text is held to
choice    every row has `choices` and `answer`                (as for text)                    bleu, meteor, rouge
worked    at least half of the answers show a worked number   the answer's final number        exact_number
text      everything else                                     rare words that the answer adds  bleu, meteor, rouge
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal, get_args

from gradsieve.data import IGNORE, Excluded, Tokens, row_fields, tokenize
from gradsieve.data.corrupt import mostly_worked
from gradsieve.errors import DataError, InvalidArgument
from gradsieve.types import Example

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Role = Literal["target", "general"]
Kind = Literal["choice", "worked", "text"]


@dataclass(frozen=True, slots=True)
class Options:
    """One multiple-choice item.

    Attributes:
        tokens: The prompt with each option as its answer, in the order of the row's `choices`.
        answer: The index of the right one.
    """

    tokens: tuple[Tokens, ...]
    answer: int


@dataclass(frozen=True, eq=False)
class TestSet:
    """Examples that a model is measured on, never trained on.

    Attributes:
        name: What the set is called in results.
        role: `target`, the wanted ability, or `general`, one that must not be forgotten.
        examples: One per item.
        tokens: The items' ids and labels, in the order of `examples`.
        kind: See the module; None tells it from the content.
        options: Of each item, for kind `choice`.
        excluded: Examples that could not be used, with the reason.
    """

    __test__: ClassVar[bool] = False  # for pytest, which takes any Test… for a test

    name: str
    role: Role
    examples: Sequence[Example]
    tokens: Sequence[Tokens]
    kind: Kind | None = None
    options: Sequence[Options] = ()
    excluded: tuple[Excluded, ...] = ()

    def __post_init__(self) -> None:
        if self.role not in get_args(Role):
            raise InvalidArgument(f"role of test set {self.name} must be target or general, got {self.role!r}")
        if not self.examples or len(self.examples) != len(self.tokens):
            got = f"{len(self.examples)} and {len(self.tokens)}"
            raise InvalidArgument(f"test set {self.name} must hold examples and as many tokens, got {got}")
        for example, tokens in zip(self.examples, self.tokens, strict=True):
            if not (tokens.labels[1:] != IGNORE).any():
                raise InvalidArgument(f"test set {self.name}: {example.id} must have completion tokens, got none; leave it out")
        kind = self.kind or _kind(self.name, self.examples)
        if kind not in get_args(Kind):
            raise InvalidArgument(f"kind of test set {self.name} must be one of {', '.join(get_args(Kind))}, got {kind!r}")
        if len(self.options) != (len(self.examples) if kind == "choice" else 0):
            got = f"{len(self.options)} for {len(self.examples)} items"
            raise InvalidArgument(
                f"options of test set {self.name} (kind {kind}) must be one per item of kind choice, got {got}"
            )
        object.__setattr__(self, "kind", kind)

    @classmethod
    def of(
        cls,
        name: str,
        role: Role,
        examples: Sequence[Example],
        tokenizer: PreTrainedTokenizerBase,
        *,
        kind: Kind | None = None,
        max_length: int = 1024,
        chat_template: str | None = None,
    ) -> TestSet:
        """Returns the test set of these examples, tokenized as for training.

        Args:
            name: What the set is called in results.
            role: `target` or `general`.
            examples: The items; those without completion tokens go to `excluded`.
            tokenizer: A fast tokenizer.
            kind: See the module; None tells it from the content.
            max_length: Tokens kept from the start of a conversation.
            chat_template: Jinja text that replaces the tokenizer's own template.

        Raises:
            DataError: No example can be used, an item's options cannot be told, or some rows have options and some have not.
        """
        tokenized = tokenize(examples, tokenizer, max_length=max_length, chat_template=chat_template)
        if not tokenized.tokens:
            reason = tokenized.excluded[0].reason if tokenized.excluded else "there are no examples"
            raise DataError(f"test set {name}: must hold at least one item that can be used, got none ({reason})")
        kept = [examples[i] for i in tokenized.kept]
        kind = kind or _kind(name, kept)
        options: Sequence[Options] = ()
        if kind == "choice":
            items = [_Item.of(example) for example in kept]
            options = _options(items, tokenizer, max_length=max_length, chat_template=chat_template)
        return cls(name, role, kept, tokenized.tokens, kind, options, tuple(tokenized.excluded))

    def first(self, count: int) -> TestSet:
        """Returns the set of the first `count` items."""
        if not 1 <= count <= len(self.examples):
            raise InvalidArgument(f"count must lie in [1, {len(self.examples)}] (the items of {self.name}), got {count}")
        parts = {name: getattr(self, name)[:count] for name in ("examples", "tokens", "options")}
        return replace(self, **parts)


@dataclass(frozen=True)
class Suite:
    """Test sets that belong together, by unique names."""

    sets: tuple[TestSet, ...]

    def __post_init__(self) -> None:
        names = [test.name for test in self.sets]
        if not names or len(set(names)) < len(names):
            raise InvalidArgument(
                f"a suite must hold test sets of different names, got {', '.join(names) or 'none'}; rename them"
            )

    @classmethod
    def of(
        cls,
        tokenizer: PreTrainedTokenizerBase,
        *,
        target: Mapping[str, Sequence[Example]],
        general: Mapping[str, Sequence[Example]],
        max_length: int = 1024,
        chat_template: str | None = None,
    ) -> Suite:
        """Returns the suite of these examples by name, the target's sets first."""
        roles: tuple[tuple[Role, Mapping[str, Sequence[Example]]], ...] = (("target", target), ("general", general))
        return cls(
            tuple(
                TestSet.of(name, role, examples, tokenizer, max_length=max_length, chat_template=chat_template)
                for role, named in roles
                for name, examples in named.items()
            )
        )

    def __iter__(self) -> Iterator[TestSet]:
        return iter(self.sets)

    def __len__(self) -> int:
        return len(self.sets)

    def of_role(self, role: Role) -> tuple[TestSet, ...]:
        """Returns the sets of one role."""
        return tuple(test for test in self.sets if test.role == role)


def answer_text(example: Example) -> str:
    """Returns what the last turn says; "" where that is no text (a tool call)."""
    content = example.messages[-1].get("content")
    return content if isinstance(content, str) else ""


def _kind(name: str, examples: Sequence[Example]) -> Kind:
    """Returns the kind that the content of a set tells.

    Raises:
        DataError: Some rows have options and some have not.
    """
    asking = [b'"choices"' in example.raw and {"choices", "answer"} <= row_fields(example).keys() for example in examples]
    if all(asking):
        return "choice"
    if any(asking):
        raise DataError(
            f'{examples[asking.index(False)].origin}: must have "choices" and "answer" as other rows of test set {name} do, '
            "got not both; add them, or make the rows without them a test of their own"
        )
    return "worked" if mostly_worked(examples) else "text"


@dataclass(frozen=True, slots=True)
class _Item:
    """A multiple-choice item: its example, its options and the right one's index."""

    example: Example
    choices: list[str]
    answer: int

    @classmethod
    def of(cls, example: Example) -> _Item:
        """Returns the item of a row whose `answer` is an index, a letter (A, B, …) or the text of one of its `choices`."""
        fields = row_fields(example)
        choices, answer = fields.get("choices"), fields.get("answer")
        if isinstance(choices, dict):  # the form of ARC and OpenBookQA: {"text": […], "label": […]}
            labels, choices = choices.get("label"), choices.get("text")
            answer = labels.index(answer) if isinstance(labels, list) and answer in labels else answer
        if not (isinstance(choices, list) and len(choices) > 1 and all(isinstance(c, str) and c.strip() for c in choices)):
            raise DataError(f'{example.origin}: "choices" must be a list of at least two texts, got {str(choices)[:60]}')
        return cls(example, choices, _right(choices, answer, example.origin))

    def copies(self) -> list[Example]:
        """Returns the example with each option as its answer."""
        *prompt, last = self.example.messages
        return [
            Example(
                f"{self.example.id}~option{i}", (*prompt, {**last, "content": choice}), self.example.raw, self.example.origin
            )
            for i, choice in enumerate(self.choices)
        ]


def _right(choices: list[str], answer: Any, origin: str) -> int:
    readings = {answer} if isinstance(answer, int) and not isinstance(answer, bool) else set()
    if isinstance(answer, str):
        readings |= {i for i, choice in enumerate(choices) if choice == answer}
        if re.fullmatch("[A-Za-z]", answer):
            readings.add(ord(answer.upper()) - ord("A"))
    inside = [i for i in readings if 0 <= i < len(choices)]
    if len(inside) != 1:
        rule = f'"answer" must be the index (from 0), the letter or the text of one of the {len(choices)} choices'
        raise DataError(f"{origin}: {rule}, got {json.dumps(answer)}{', which may mean two' if inside else ''}; give the index")
    return inside[0]


def _options(items: Sequence[_Item], tokenizer: PreTrainedTokenizerBase, **settings: Any) -> list[Options]:
    copies = [copy for item in items for copy in item.copies()]
    tokenized = tokenize(copies, tokenizer, **settings)
    for bad in tokenized.excluded:
        raise DataError(
            f"{copies[bad.position].origin}: every option must have completion tokens, got none for {bad.id} ({bad.reason})"
        )
    cut = next((i for i, tokens in enumerate(tokenized.tokens) if tokens.truncated), None)
    if cut is not None:
        cure = "raise max_length or leave the item out"
        raise DataError(f"{copies[cut].origin}: prompt and option must fit into max_length, got {copies[cut].id} cut; {cure}")
    rest = iter(tokenized.tokens)
    return [Options(tuple(next(rest) for _ in item.choices), item.answer) for item in items]
