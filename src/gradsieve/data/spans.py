"""Where the assistant's words are in a rendered conversation, for any chat template.

The span of an assistant turn is what the model has to produce in that turn: from the end of the generation prompt to the end
of the end-of-turn token. The header (`<|im_start|>assistant\\n`) is not in it, nor is what the template writes after the
end-of-turn token (a newline, or one more end-of-sequence token after that).

Templates with generation markers say where it is (`marked_spans`). For the others `find_spans` asks the template itself:

1. Render the conversation; then again with two private-use characters around every assistant content. If the second text is
   the first one once those characters are taken out, they show exactly where the contents are, whatever the template trims.
2. A turn starts where the rendering of the turns before it, with generation prompt, ends: what the model sees at inference.
   Where that is no prefix of the text (the template writes older turns differently once newer ones are there), the turn
   starts after the last copy of the header before its content, or at its content.
3. A turn ends with the added tokens that follow its content with at most white space between, or with its content if there
   are none. Inside a conversation these might belong to the next turn's header: they count as far as the last turn
   ends alike, or the conversation cut off after the turn has them as well.

Where a content cannot be located (tool calls), the turn lies between the renderings of the conversation cut off before and
after it, if those are where they should be. Otherwise `SpanError`: there is never a guess.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

Message = Mapping[str, Any]
Render = Callable[[Sequence[Message], bool], str]
"""(turns, generation prompt or not) → text"""

CHANGED = "the chat template leaves out part of the assistant's text (such as reasoning), so it is not trained on"
HEADERLESS = "the generation prompt is not part of the rendered conversation, so labels start at the content"
ENDLESS = "the end of an inner assistant turn cannot be told from what follows, so only its content is labelled"
UNENDED = "the chat template writes (or marks) no end-of-turn token, so the model is not trained to stop"

_TRIMS: tuple[Callable[[str], str], ...] = (str, str.strip, str.rstrip)
_CHANCE = 16  # characters that the text before a kept part may by chance share with the dropped part


class SpanError(Exception):
    """The assistant's words cannot be told from the rest; the message says why."""


@dataclass(frozen=True, slots=True)
class Spans:
    """A rendered conversation.

    Attributes:
        text: All of it.
        spans: [start, end) in characters, ascending, one or more per assistant turn that is trained on.
        remarks: Sentences about what is not as one would expect.
    """

    text: str
    spans: tuple[tuple[int, int], ...]
    remarks: frozenset[str] = frozenset()


class _Content(NamedTuple):
    """Where a turn's content is in the text.

    Attributes:
        start: Its first character that the template keeps; None if that is not known.
        end: After its last character.
        whole: Whether the template keeps the content's beginning.
    """

    start: int | None
    end: int
    whole: bool


class AddedTokens(NamedTuple):
    """A tokenizer's added tokens, those that are white space left out.

    Attributes:
        texts: Their texts.
        pattern: Matches one of them, the longest that fits.
    """

    texts: tuple[str, ...]
    pattern: re.Pattern[str]

    @classmethod
    def of(cls, texts: Iterable[str]) -> AddedTokens:
        longest_first = tuple(sorted((text for text in texts if text.strip()), key=len, reverse=True))
        return cls(longest_first, re.compile("|".join(map(re.escape, longest_first)) or "(?!)"))


def trained(turn: Message) -> bool:
    """Returns whether the turn carries loss: an assistant turn whose `weight` is not 0."""
    return bool(turn["role"] == "assistant" and turn.get("weight", 1) != 0)


# --- templates with generation markers ----------------------------------------------------------------------------------


def marked_spans(turns: Sequence[Message], text: str, marked: Sequence[tuple[int, int]], tokens: AddedTokens) -> Spans:
    """Returns the spans of a conversation whose template marks them with `{% generation %}`.

    The markers are believed, with two exceptions: white space after an end-of-turn token is cut off, and markers that do not
    enclose the assistant's text in order are refused (inside Jinja macros and `set` blocks they are known to be wrong).

    Args:
        turns: The conversation.
        text: Its rendering.
        marked: [start, end) of each marked block in `text`, in order.
        tokens: The tokenizer's added tokens.

    Raises:
        SpanError: The markers contradict the conversation.
    """
    assistants = [turn for turn in turns if turn["role"] == "assistant"]
    if len(marked) != len(assistants) and not all(map(trained, assistants)):
        raise SpanError(
            f"the template marks {len(marked)} blocks for {len(assistants)} assistant turns, so none can be left out"
        )
    blocks = [_without_blank_end(text, start, end, tokens) for start, end in marked]
    pieces = [text[start:end] for start, end in marked]
    spans: list[tuple[int, int]] = []
    remarks = set[str]()
    used = 0
    for turn in assistants:
        last = next((k for k in range(used, len(blocks)) if _ends_content(pieces[k], turn, tokens)), None)
        if last is None:
            raise SpanError("the template's generation markers do not enclose the assistant's text")
        following = last + 1
        while following < len(blocks) and pieces[following].strip() in ("", *tokens.texts):
            following += 1  # an end-of-turn token in a block of its own
        if trained(turn):
            spans.extend((start, end) for start, end, _ in blocks[used:following])
            if not any(closed for _, _, closed in blocks[last:following]):
                remarks.add(UNENDED)
        used = following
    spans.extend((start, end) for start, end, _ in blocks[used:])  # after the last content, such as tool calls
    return Spans(text, tuple(spans), frozenset(remarks))


def _ends_content(piece: str, turn: Message, tokens: AddedTokens) -> bool:
    """Returns whether a marked block holds the end of the turn's content."""
    words = (turn["content"] or "").split()
    if not words:
        return True
    _, found, rest = piece.rpartition(words[-1][-32:])
    rest = tokens.pattern.sub("", rest).strip()
    return bool(found) and (rest not in turn["content"] or not rest)


def _without_blank_end(text: str, start: int, end: int, tokens: AddedTokens) -> tuple[int, int, bool]:
    """Returns a marked block without white space after its last token, and whether a token ends it."""
    stripped = text[start:end].rstrip()
    closed = stripped.endswith(tokens.texts)
    return start, start + len(stripped) if closed else end, closed


# --- templates without ---------------------------------------------------------------------------------------------------


def find_spans(turns: Sequence[Message], render: Render, tokens: AddedTokens) -> Spans:
    """Returns the spans of a conversation whose template has no generation markers.

    Costs 2 + (assistant turns) renderings, a few more where the template is unusual.

    Args:
        turns: The conversation.
        render: The chat template; may raise anything.
        tokens: The tokenizer's added tokens.

    Raises:
        SpanError: The spans cannot be told.
    """
    text = render(turns, False)
    contents = _locate_contents(turns, text, render)
    last = contents.get(len(turns) - 1)
    ending = None if last is None else text[last.end : _last_end(text, last.end, tokens)]
    spans: list[tuple[int, int]] = []
    remarks = {UNENDED} if ending == "" else set[str]()
    before = 0
    for i, turn in enumerate(turns):
        if turn["role"] != "assistant":
            continue
        content = contents.get(i)
        start, start_remark = _start(turns, i, text, content, before, render)
        if content is None:
            end, end_remark = _end_by_cutting(turns, i, text, start, tokens, render), None
        else:
            end, end_remark = _end(turns, i, text, content.end, ending, tokens, render)
        if not before <= start <= (end if content is None else content.end) <= end:
            raise SpanError(f"the chat template renders turn {i} at an unexpected place")
        if trained(turn):
            spans.append((start, end))
            changed = None if content is None or content.whole else CHANGED
            remarks.update(remark for remark in (start_remark, end_remark, changed) if remark)
        before = end
    return Spans(text, tuple(spans), frozenset(remarks))


def _try_render(turns: Sequence[Message], generation_prompt: bool, render: Render) -> str | None:
    """Returns the rendering of a part of the conversation, or None where the template refuses it."""
    try:
        return render(turns, generation_prompt) if turns else None
    except Exception:
        return None


def _locate_contents(turns: Sequence[Message], text: str, render: Render) -> dict[int, _Content]:
    """Returns where the contents of the assistant turns without tool calls are, or nothing if that cannot be proven."""
    plain = [i for i, turn in enumerate(turns) if turn["role"] == "assistant" and not turn.get("tool_calls")]
    opening, closing = _absent_characters(text)

    def prove(marked_contents: Mapping[int, str]) -> str | None:
        marked_turns = [{**turn, "content": marked_contents.get(i, turn["content"])} for i, turn in enumerate(turns)]
        marked = _try_render(marked_turns, False, render)
        return marked if marked and marked.replace(opening, "").replace(closing, "") == text else None

    # Templates may trim contents, and may look at how they begin (`<think>`), which an opening mark would hide.
    for mark, trim in itertools.product((opening, ""), _TRIMS):
        given = {i: trim(turns[i]["content"]) for i in plain}
        marked = prove({i: f"{mark}{content}{closing}" for i, content in given.items()})
        if marked is None or marked.count(closing) != len(plain):
            continue
        contents = dict(zip(plain, _read_marks(marked, opening, closing), strict=True))
        for i, content in contents.items():
            if content.start is None:
                contents[i] = _locate_kept_part(i, given[i], content.end, text, opening, prove)
        return contents
    return {}


def _absent_characters(text: str) -> tuple[str, str]:
    """Returns two private-use characters that do not occur in the text."""
    absent = (chr(code) for code in range(0xF0000, 0xFFFFE) if chr(code) not in text)
    return next(absent), next(absent)


def _read_marks(marked: str, opening: str, closing: str) -> list[_Content]:
    contents: list[_Content] = []
    start: int | None = None
    for count, mark in enumerate(re.finditer(f"[{opening}{closing}]", marked)):
        position = mark.start() - count
        if mark.group() == opening:
            start = position
        else:
            contents.append(_Content(start, position, start is not None))
            start = None
    return contents


def _locate_kept_part(
    i: int, content: str, end: int, text: str, opening: str, prove: Callable[[Mapping[int, str]], str | None]
) -> _Content:
    """Returns where the part of a content is whose beginning the template drops (`content.split("</think>")[-1]`).

    What is kept is at most the longest suffix of the content that stands before `end`. By chance the text before the kept
    part may end like the dropped part (`</think>`): the first place where a mark survives is where it starts.
    """
    length = next((k for k in range(len(content)) if text[end - k - 1 : end - k] != content[-k - 1]), len(content))
    first = len(content) - length
    for dropped in range(first, min(first + _CHANCE, len(content))):
        marked = prove({i: f"{content[:dropped]}{opening}{content[dropped:]}"})
        if marked is not None and marked.find(opening) == end - (len(content) - dropped):
            return _Content(end - (len(content) - dropped), end, not content[:dropped].strip())
    return _Content(None, end, False)


def _start(
    turns: Sequence[Message], i: int, text: str, content: _Content | None, before: int, render: Render
) -> tuple[int, str | None]:
    """Returns where the words of turn `i` start, and a remark; `before` is the end of the assistant turn before it."""
    known = None if content is None else content.start
    prompt = _try_render(turns[:i], True, render)
    if prompt is not None and text.startswith(prompt):
        inserted = text[len(prompt) : known]
        if known is not None and not inserted.strip():
            return len(prompt), None
        if prompt != _try_render(turns[:i], False, render):
            return len(prompt), None  # the model has to produce what is inserted, such as an empty `<think>` block
        # The template wrote no generation prompt: what it inserts before the content is the header.
        if known is not None:
            return known, HEADERLESS
        header = _plain_header(turns[:i], prompt, render)
        if header is not None and text.startswith(header, len(prompt)):
            return len(prompt) + len(header), None
        raise SpanError(f"the chat template has no generation prompt, and turn {i} no text that shows where its header ends")
    if known is None:
        raise SpanError(f"the chat template renders turn {i}, or what comes before it, differently once later turns are there")
    history = _try_render(turns[:i], False, render)
    if prompt is not None and history is not None and prompt.startswith(history) and prompt != history:
        header = prompt[len(history) :]
        found = text.rfind(header, before, known)
        if found >= 0:
            return found + len(header), None
    return known, HEADERLESS


def _plain_header(turns: Sequence[Message], history: str, render: Render) -> str | None:
    """Returns what a template without generation prompt writes before the text of a plain assistant turn."""
    mark, _ = _absent_characters(history)
    probe = _try_render([*turns, {"role": "assistant", "content": mark}], False, render)
    if probe is None or not probe.startswith(history) or mark not in probe:
        return None
    header = probe[len(history) : probe.index(mark)]
    return header if header.strip() else ""


def _token_ends(text: str, position: int, tokens: AddedTokens) -> list[int]:
    """Returns the ends of the unbroken run of added tokens after `position` and white space."""
    while text[position : position + 1].isspace():
        position += 1
    ends = []
    while match := tokens.pattern.match(text, position):
        position = match.end()
        ends.append(position)
    return ends


def _last_end(text: str, content_end: int, tokens: AddedTokens) -> int:
    """Returns where the last turn ends: after its added tokens, else after whatever text the template writes."""
    ends = _token_ends(text, content_end, tokens)
    return ends[-1] if ends else max(content_end, len(text.rstrip()))


def _end(
    turns: Sequence[Message],
    i: int,
    text: str,
    content_end: int,
    ending: str | None,
    tokens: AddedTokens,
    render: Render,
) -> tuple[int, str | None]:
    """Returns where turn `i` ends, and a remark; `ending` is what follows the content of the last turn."""
    if ending is not None and text.startswith(ending, content_end):
        return content_end + len(ending), None
    cut = _try_render(turns[: i + 1], False, render)
    for end in reversed(_token_ends(text, content_end, tokens)):
        if cut is not None and (cut.startswith(text[:end]) or cut.rstrip().endswith(text[content_end:end])):
            return end, None
    return content_end, ENDLESS


def _end_by_cutting(turns: Sequence[Message], i: int, text: str, start: int, tokens: AddedTokens, render: Render) -> int:
    """Returns where a turn ends whose content could not be located, from the conversation cut off after it."""
    turn = turns[i]
    cut = text if i == len(turns) - 1 else _try_render(turns[: i + 1], False, render)
    if cut is None:
        raise SpanError(f"the chat template refuses the conversation cut off after turn {i}")
    cut = cut.rstrip()
    # In the middle of a conversation the turn may have lost its beginning (an empty `<think>` block), never its end.
    tail = next((cut[k:] for k in range(start, len(cut)) if text.startswith(cut[k:], start)), "")
    said = tokens.pattern.sub(" ", tail)
    words = _called(turn["tool_calls"]) if turn.get("tool_calls") else [turn["content"].strip()]
    if not all(re.search(rf"(?<!\w){re.escape(word)}(?!\w)", said) for word in words):
        raise SpanError(f"the chat template leaves out turn {i}, or renders it differently once later turns are there")
    return start + len(tail)


def _called(tool_calls: Sequence[Mapping[str, Any]]) -> Collection[str]:
    """Returns the names of the functions an assistant turn calls."""
    functions = [call.get("function", call) for call in tool_calls]
    return [str(function.get("name", "")) for function in functions]
