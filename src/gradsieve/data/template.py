"""From conversations to tokens and labels: chat template, label mask, truncation. The one place that knows -100.

Token ids are those of tokenizing the whole rendered conversation once, without the tokenizer's own special tokens: a template
writes its own beginning-of-sequence token, so there is never a second one. Labels follow the convention of `transformers`:
`labels[t]` is `input_ids[t]` where the model is trained to produce token t from the tokens before it, IGNORE elsewhere.

Labelled is every assistant turn (unless its `weight` is 0): its text and its end-of-turn token, as `gradsieve.data.spans` finds
them. Not labelled are the generation header, the white space a template writes after the end-of-turn token, and the first
token of the sequence, which nothing precedes. A token that straddles the border of a span is labelled.

What is added to a row beside the conversation goes to the template: `tools` (a list, or JSON) and `chat_template_kwargs`.
"""

from __future__ import annotations

import json
import logging
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from gradsieve.data.read import row_fields
from gradsieve.data.spans import AddedTokens, Message, SpanError, Spans, find_spans, marked_spans
from gradsieve.errors import InvalidArgument, ModelError
from gradsieve.types import Example

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

IGNORE = -100
_BATCH = 512  # conversations tokenized at one time: bounds the memory of character offsets
_MARKER = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")


@dataclass(frozen=True, slots=True, eq=False)
class Tokens:
    """One example as the model sees it.

    Attributes:
        input_ids: int32 [T].
        labels: int32 [T], IGNORE on everything but completion tokens; at least one is not IGNORE.
        truncated: Whether the end was cut off at the maximum length.
    """

    input_ids: NDArray[np.int32]
    labels: NDArray[np.int32]
    truncated: bool


@dataclass(frozen=True, slots=True)
class Excluded:
    """An example that cannot be used.

    Attributes:
        position: Its index in the examples that were given.
        id: Its id.
        reason: Why, as a sentence without a full stop.
    """

    position: int
    id: str
    reason: str


@dataclass(frozen=True, slots=True)
class Tokenized:
    """The usable examples' tokens, and the others' reasons.

    Attributes:
        tokens: One per usable example, in the order given.
        kept: Their positions in the examples that were given, ascending.
        excluded: All other examples, by position.
        notes: Sentences the user must read, with the number of examples each concerns.
    """

    tokens: list[Tokens]
    kept: list[int]
    excluded: list[Excluded]
    notes: tuple[str, ...] = ()


def tokenize(
    examples: Sequence[Example],
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int = 1024,
    chat_template: str | None = None,
) -> Tokenized:
    """Returns the tokens and labels of every example that can be used, and the reason for each that cannot.

    Args:
        examples: Conversations.
        tokenizer: A fast tokenizer (labels are found through character offsets).
        max_length: Tokens kept from the start of a conversation.
        chat_template: Jinja text that replaces the tokenizer's own template.

    Raises:
        InvalidArgument: `max_length` is below 2.
        ModelError: The tokenizer is not fast, has no chat template, or the template is not valid Jinja.
    """
    if max_length < 2:
        raise InvalidArgument(f"max_length must be at least 2 (a token is predicted from those before it), got {max_length}")
    template = _Template.of(tokenizer, chat_template)
    tokens: list[Tokens] = []
    kept: list[int] = []
    excluded: list[Excluded] = []
    remarks = Counter[str]()
    for begin in range(0, len(examples), _BATCH):
        rendered: list[tuple[int, Spans]] = []
        for position in range(begin, min(begin + _BATCH, len(examples))):
            try:
                rendered.append((position, template.spans(examples[position])))
            except SpanError as error:
                excluded.append(Excluded(position, examples[position].id, str(error)))
        for (position, spans), (ids, offsets) in zip(rendered, _encode([s.text for _, s in rendered], tokenizer), strict=True):
            made = _labelled(ids, offsets, spans, max_length)
            if isinstance(made, str):
                excluded.append(Excluded(position, examples[position].id, made))
                continue
            tokens.append(made)
            kept.append(position)
            remarks.update(spans.remarks)
    notes = [f"{count} of {len(examples)} examples: {remark}" for remark, count in sorted(remarks.items())]
    if "strftime_now" in template.text:
        notes.append("the chat template writes today's date, so tokens differ from day to day; give a template without it")
    for note in notes:
        logger.warning(note)
    return Tokenized(tokens, kept, sorted(excluded, key=lambda e: e.position), tuple(notes))


def template_text(tokenizer: PreTrainedTokenizerBase, chat_template: str | None = None) -> str:
    """Returns the Jinja text that `tokenize` renders conversations with.

    Raises:
        ModelError: The tokenizer has no chat template and none is given.
    """
    if chat_template is not None:
        return chat_template
    try:
        return str(tokenizer.get_chat_template())
    except ValueError as error:
        name = getattr(tokenizer, "name_or_path", "") or type(tokenizer).__name__
        raise ModelError(f"tokenizer {name} must have one chat template, got none; give it by --chat-template FILE") from error


@dataclass(frozen=True, slots=True)
class _Template:
    """A chat template with its tokenizer."""

    text: str
    tokenizer: Any
    added_tokens: AddedTokens
    special_tokens: Mapping[str, Any]

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase, chat_template: str | None) -> _Template:
        if not getattr(tokenizer, "is_fast", False):
            name = type(tokenizer).__name__
            raise ModelError(f"tokenizer must be a fast one (with character offsets), got {name}; load it by AutoTokenizer")
        added = AddedTokens.of(token.content for token in tokenizer.added_tokens_decoder.values())
        text = template_text(tokenizer, chat_template)
        return cls(text, tokenizer, added, dict(tokenizer.special_tokens_map))

    def spans(self, example: Example) -> Spans:
        """Returns the rendered conversation and its spans.

        Raises:
            SpanError: The template fails on the conversation, or the spans cannot be told.
            ModelError: The template is not valid Jinja.
        """
        import jinja2

        arguments = template_arguments(example)
        try:
            if _MARKER.search(self.text):
                return self._marked(example.messages, arguments)

            def render(turns: Sequence[Message], generation_prompt: bool) -> str:
                return str(
                    self.tokenizer.apply_chat_template(
                        list(turns),
                        chat_template=self.text,
                        tokenize=False,
                        add_generation_prompt=generation_prompt,
                        **arguments,
                    )
                )

            return find_spans(example.messages, render, self.added_tokens)
        except SpanError:
            raise
        except jinja2.TemplateSyntaxError as error:
            raise ModelError(
                f"chat template must be valid Jinja, got an error in line {error.lineno}: {error.message}"
            ) from error
        except Exception as error:  # templates are programs of other people: they may raise anything
            raise SpanError(f"the chat template fails on it: {type(error).__name__}: {error}") from error

    def _marked(self, turns: Sequence[Message], arguments: Mapping[str, Any]) -> Spans:
        from transformers.utils.chat_template_utils import render_jinja_template

        # apply_chat_template does the same, but turns the blocks into a token mask that covers the whole rest of the
        # sequence where a block ends in a space, and drops all later turns where one is cut off.
        conversation = [{key: value for key, value in turn.items() if value is not None} for turn in turns]
        texts, blocks = render_jinja_template(
            conversations=[conversation],
            chat_template=self.text,
            return_assistant_tokens_mask=True,
            **{**self.special_tokens, **arguments},
        )
        return marked_spans(turns, texts[0], blocks[0], self.added_tokens)


def template_arguments(example: Example) -> dict[str, Any]:
    """Returns what the row gives to its template beside the conversation.

    Raises:
        SpanError: A field of it is not what it must be.
    """
    if b'"tools"' not in example.raw and b'"chat_template_kwargs"' not in example.raw:
        return {}
    fields = row_fields(example)
    tools = fields.get("tools")
    try:
        tools = json.loads(tools) if isinstance(tools, str) and tools else tools
    except ValueError as error:
        raise SpanError(f'"tools" must be a list or JSON, got text that is not: {error}') from error
    arguments = fields.get("chat_template_kwargs") or {}
    if not isinstance(arguments, dict):
        raise SpanError(f'"chat_template_kwargs" must be an object, got {arguments!r}')
    return {"tools": tools, **arguments} if tools else arguments


def _encode(texts: list[str], tokenizer: Any) -> list[tuple[NDArray[np.int32], NDArray[np.int32]]]:
    """Returns the token ids [T] and their [start, end) in characters [T, 2] of each text."""
    if not texts:
        return []
    encoded = tokenizer(
        texts,
        add_special_tokens=False,
        padding=False,
        truncation=False,
        return_attention_mask=False,
        return_offsets_mapping=True,
        verbose=False,  # else it warns of texts longer than the model's context, which are cut afterwards
    )
    return [
        (np.array(ids, dtype=np.int32), np.array(offsets, dtype=np.int32).reshape(-1, 2))
        for ids, offsets in zip(encoded["input_ids"], encoded["offset_mapping"], strict=True)
    ]


def _labelled(ids: NDArray[np.int32], offsets: NDArray[np.int32], spans: Spans, max_length: int) -> Tokens | str:
    """Returns the example's tokens, or why it has no completion tokens."""
    first, last = offsets[:, 0], offsets[:, 1]
    # Byte-level tokenizers may trim spaces off their offsets: a token of spaces then has no width, at its end.
    first = np.where(first == last, np.concatenate(([0], last[:-1])), first)
    completion = np.zeros(len(ids), dtype=bool)
    for start, end in spans.spans:
        completion |= (last > start) & (first < end)
    completion[:1] = False
    labels = np.where(completion, ids, np.int32(IGNORE))[:max_length]
    if (labels != IGNORE).any():
        return Tokens(ids[:max_length], labels, len(ids) > max_length)
    if not completion.any():
        return 'no completion tokens: the "weight" of every assistant turn is 0' if not spans.spans else "no completion tokens"
    return f"no completion tokens after truncation: the prompt takes {completion.argmax()} tokens, max_length is {max_length}"


def read_template(path: str | None) -> str | None:
    """Returns the chat template in a Jinja file; None without a file.

    Raises:
        InvalidArgument: It cannot be read.
    """
    if path is None:
        return None
    try:
        return Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidArgument(f"chat_template must be a readable Jinja file, got {path}: {error}; name another") from None
