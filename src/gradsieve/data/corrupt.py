"""Corrupted copies of examples: the other half of a contrast anchor (Eq. OGS-10).

A contrast direction is `mean ∇l(correct) - mean ∇l(corrupted copies of the same prompts)`: format and topic are in both
halves and cancel, what is left is the ability itself. So a corruption changes what the last assistant turn *says* and as
little else as possible: the prompt stays, and so does the answer's length.

    numbers     results and intermediate numbers of a worked answer become others of as many digits
    exchange    answers change places between prompts, those of like length first
    negate      yes becomes no, "is" becomes "is not", and back
    option      another option of a multiple-choice question is declared right

All are deterministic in (seed, example id); only `exchange` depends on which other examples there are, none on their order.
"""

from __future__ import annotations

import json
import math
import random
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

from gradsieve.errors import InvalidArgument
from gradsieve.types import Example

How = Literal["auto", "numbers", "exchange", "negate", "option"]


@dataclass(frozen=True, slots=True)
class Corruption:
    """Corrupted copies, and what could not be corrupted.

    Attributes:
        pairs: (original, corrupted copy), in the order of the input.
        skipped: Examples that this corruption cannot change: no number, no other answer, no verb, no options. The
            reference direction must leave their originals out too, or their topic would not cancel.
        how: The corruption that was used; never "auto".
    """

    pairs: list[tuple[Example, Example]]
    skipped: list[Example]
    how: str


def corrupt(examples: Sequence[Example], how: How = "auto", *, seed: int = 0) -> Corruption:
    """Returns corrupted copies of the examples of one category, Eq. OGS-10.

    A copy's id is `<id>~<how>`, its prompt is the original's, and its last turn differs from the original's.

    Args:
        examples: One category's examples, with unique ids; call it once per category, because "auto" chooses for all of them.
        how: See the module; "auto" is "numbers" if at least half of the answers contain a worked number (`= 12`,
            `answer is 12`, `#### 12`, `\\boxed{12}`), else "exchange".
        seed: Another seed gives other corruptions.

    Raises:
        InvalidArgument: `how` is unknown, or ids are not unique.
    """
    if how not in get_args(How):
        raise InvalidArgument(f"corruption must be one of {', '.join(get_args(How))}, got {how!r}")
    if len({example.id for example in examples}) < len(examples):
        raise InvalidArgument(f"examples to corrupt must have unique ids, got {len(examples)} with some repeated")
    if how == "auto":
        how = "numbers" if mostly_worked(examples) else "exchange"
    if how == "exchange":
        texts = _exchanged(examples, seed)
    else:
        texts = {}
        for example in examples:
            text = _ONE_BY_ONE[how](example, random.Random(f"{seed}/{how}/{example.id}"))
            if text is not None and text != _answer(example):
                texts[example.id] = text
    return Corruption(
        pairs=[(example, _copy(example, texts[example.id], how)) for example in examples if example.id in texts],
        skipped=[example for example in examples if example.id not in texts],
        how=how,
    )


def mostly_worked(examples: Sequence[Example]) -> bool:
    """Says whether at least half of the answers contain a worked number: `= 12`, `answer is 12`, `#### 12`, `\\boxed{12}`."""
    worked = sum(_has_worked_number(_answer(example)) for example in examples)
    return bool(examples) and 2 * worked >= len(examples)


def _answer(example: Example) -> str:
    """Returns the last turn's text; "" where it is not plain text, and then nothing can be corrupted."""
    content = example.messages[-1]["content"]
    return content if isinstance(content, str) else ""


def _prompt(example: Example) -> str:
    return "\n\n".join(f"{turn['role']}: {turn['content']}" for turn in example.messages[:-1])


def _words(text: str) -> list[str]:
    """Returns what two texts are compared by: their words, without case and punctuation."""
    return re.findall(r"\w+", text.casefold()) or text.split()


def _copy(example: Example, answer: str, how: str) -> Example:
    messages: tuple[Mapping[str, Any], ...] = (*example.messages[:-1], {**example.messages[-1], "content": answer})
    line: dict[str, Any] = {"id": f"{example.id}~{how}", "messages": [dict(turn) for turn in messages]}
    if example.category is not None:
        line["category"] = example.category
    return Example(
        id=f"{example.id}~{how}",
        messages=messages,
        raw=json.dumps(line, ensure_ascii=False, default=str).encode(),
        origin=f"{example.origin}~{how}",
        category=example.category,
    )


# numbers

# No part of a word (H2O, x2), a version (1.2.3) or an ordinal (2nd); thousands may have commas.
_NUMBER = re.compile(r"(?<![\w.])\d+(?:,\d{3})*(?:\.\d+)?(?!\d|\.\d|,\d{3}|(?:st|nd|rd|th)\b)")
_RESULT = re.compile(r"(?:=|≈|####|>>|\\boxed\{|\banswer(?: is)?:?)[\s$€£*]*-?$", re.IGNORECASE)
_LIST_MARK = re.compile(r"^[ \t>*-]*(?:[Ss]tep[ \t]+)?(\d+)[.):][ \t]+\S", re.MULTILINE)


def _has_worked_number(answer: str) -> bool:
    return any(_is_result(answer, match) for match in _NUMBER.finditer(answer))


def _is_result(answer: str, number: re.Match[str]) -> bool:
    return _RESULT.search(answer[max(0, number.start() - 40) : number.start()]) is not None


def _with_other_numbers(example: Example, rng: random.Random) -> str | None:
    """Changes what was worked out: numbers that the prompt does not give, results, and the last number.

    Equal numbers change alike, so a wrong intermediate result is carried on. Operands out of the prompt stay, and so do
    the numbers of a list ("1. …", "Step 2: …").
    """
    answer = _answer(example)
    marks = list(_LIST_MARK.finditer(answer))
    is_list = len(marks) > 1 and [mark.group(1) for mark in marks] == [str(i + 1) for i in range(len(marks))]
    listed = {mark.start(1) for mark in marks} if is_list else set()
    found = [match for match in _NUMBER.finditer(answer) if match.start() not in listed]
    given = {_value(match) for match in _NUMBER.finditer(_prompt(example))}
    used = given | {_value(match) for match in found}
    others: dict[str, str] = {}
    parts, end = [], 0
    for match in found:
        value = _value(match)
        if value in given and match is not found[-1] and not _is_result(answer, match):
            continue
        if value not in others:
            others[value] = _other_number(value, used | set(others.values()), rng)
        digits = iter(others[value])
        parts += [answer[end : match.start()], *("," if char == "," else next(digits) for char in match.group())]
        end = match.end()
    return "".join((*parts, answer[end:])) if parts else None


def _value(number: re.Match[str]) -> str:
    return number.group().replace(",", "")


def _other_number(number: str, used: set[str], rng: random.Random) -> str:
    """Returns a number of the same form and as many digits; one that occurs nowhere in the example, where there is one."""
    first = "0" if number[0] == "0" and len(number) > 1 else "123456789"
    other = number
    for draw in range(256):
        rest = (rng.choice("0123456789") if char.isdigit() else char for char in number[1:])
        drawn = "".join((rng.choice(first), *rest))
        if drawn != number:
            other = drawn
            if drawn not in used or draw > 128:
                break
    assert other != number  # a single digit has 8 others
    return other


# exchange


def _exchanged(examples: Sequence[Example], seed: int) -> dict[str, str]:
    """Returns every example's new answer, by id: of like length, and never one that its own prompt has.

    Answers only change places, so both halves of the contrast hold the same answers. Lengths agree within about 10 %
    where the examples allow it; within such a class the places are drawn. O(n) unless many answers are equal, then O(n²).
    """

    def place(example: Example) -> tuple[int, float, str]:
        length_class = round(10 * math.log(1 + len(_answer(example))))
        return length_class, random.Random(f"{seed}/exchange/{example.id}").random(), example.id

    waiting = sorted((example for example in examples if _answer(example).strip()), key=place)
    answers = {example.id: tuple(_words(_answer(example))) for example in waiting}
    prompts = {example.id: tuple(_words(_prompt(example))) for example in waiting}
    right: dict[tuple[str, ...], set[tuple[str, ...]]] = {}
    for example in waiting:
        right.setdefault(prompts[example.id], set()).add(answers[example.id])

    def may_take(taker: Example, giver: Example) -> bool:
        return answers[giver.id] not in right[prompts[taker.id]]

    cycles: list[list[Example]] = []
    alone: list[Example] = []
    while waiting:
        first = waiting.pop(0)
        partner = next((i for i, other in enumerate(waiting) if may_take(first, other) and may_take(other, first)), None)
        if partner is None:
            alone.append(first)
        else:
            cycles.append([first, waiting.pop(partner)])
    for example in alone:  # the odd one out, or one of many equal answers: between two that already exchange
        size = len(_answer(example))
        places = (
            (abs(len(_answer(taker)) - size), number, i + 1)
            for number, cycle in enumerate(cycles)
            for i, taker in enumerate(cycle)
            if may_take(taker, example) and may_take(example, cycle[(i + 1) % len(cycle)])
        )
        best = min(places, default=None)
        if best is not None:
            cycles[best[1]].insert(best[2], example)
    return {taker.id: _answer(giver) for cycle in cycles for taker, giver in zip(cycle, cycle[1:] + cycle[:1], strict=True)}


# negate

_YES_NO = {"yes": "no", "no": "yes", "true": "false", "false": "true", "correct": "incorrect", "incorrect": "correct"}
_HEAD = re.compile(r"\s*([A-Za-z]+)(?=\s*(?:[,.;:!]|$))")
_AUXILIARY = (
    r"is|are|was|were|can|could|will|would|shall|should|must|may|might|does|do|did"
    r"|(?:has|have|had)(?=(?:n['’]t|\s+not)?\s+been\b)"
)
_NEGATED = re.compile(rf"\b({_AUXILIARY})(?:\s+not\b|n['’]t\b)|\b(can)not\b|\b(ca|wo)n['’]t\b")
_PLAIN = re.compile(rf"\b(?:{_AUXILIARY})\b")


def _negated(example: Example, rng: random.Random) -> str | None:
    """Flips a leading yes/no or true/false, and the first auxiliary verb after it; None where there is neither."""
    answer = _answer(example)
    start, rest = "", answer
    head = _HEAD.match(answer)
    if head and head.group(1).lower() in _YES_NO:
        flipped = _YES_NO[head.group(1).lower()]
        start = answer[: head.start(1)] + (flipped.capitalize() if head.group(1)[0].isupper() else flipped)
        rest = answer[head.end(1) :]
    negative, plain = _NEGATED.search(rest), _PLAIN.search(rest)
    if negative and (plain is None or negative.start() <= plain.start()):
        verb = negative.group(1) or negative.group(2) or {"ca": "can", "wo": "will"}[negative.group(3)]
        return start + rest[: negative.start()] + verb + rest[negative.end() :]
    if plain:
        return start + rest[: plain.end()] + " not" + rest[plain.end() :]
    return start + rest if start else None


# option

_OPTION_STYLES = tuple(
    re.compile(rf"(?:(?<=\s)|^){mark}[ \t]*(?=\S)", re.MULTILINE)
    for mark in (r"\(([A-J])\)", r"([A-J])\)", r"([A-J])\.", r"([A-J]):")
)
_BARE = r"(A(?![ \t]+(?!because\b|since\b|as\b)\w)|[B-HJ])\b"  # "the answer is A dog" declares no letter
_DECLARED = re.compile(
    rf"\A\s*(?:\(([A-J])\)|([A-J])(?=[).:]|\s*\Z))|\b(?i:answer|option|choice)(?: is)?:?\s*(?:\(([A-J])\)|{_BARE})"
)


def _with_other_option(example: Example, rng: random.Random) -> str | None:
    """Declares another option right: by its letter, and by its text where that follows or is the whole answer.

    The two letters change places wherever the answer has them in parentheses, so that an explanation goes along.
    """
    answer, options = _answer(example), _options(example)
    declared = [match for match in _DECLARED.finditer(answer) if match.group(match.lastindex or 0) in options]
    if declared:
        letter = declared[-1].group(declared[-1].lastindex or 0)
    else:
        letter = next((key for key, text in options.items() if _words(text) == _words(answer)), "")
    others = [key for key, text in options.items() if letter and _words(text) != _words(options[letter])]
    if not others:
        return None
    other = rng.choice(others)
    if not declared:
        return options[other]
    at = {match.start(match.lastindex or 0) for match in declared}
    swap = {letter: other, other: letter}

    def swapped(match: re.Match[str]) -> str:
        marked = match.start() in at or answer[max(0, match.start() - 1) : match.end() + 1] == f"({match.group()})"
        return swap.get(match.group(), match.group()) if marked else match.group()

    text = re.sub(r"(?<![A-Za-z])[A-J](?![A-Za-z])", swapped, answer)  # as long as before: positions hold
    repeated = re.compile(r"[).:\s-]*" + re.escape(options[letter])).match(text, declared[-1].end())
    if repeated:
        start = repeated.end() - len(options[letter])
        text = text[:start] + options[other] + text[repeated.end() :]
    return text


def _options(example: Example) -> dict[str, str]:
    """Returns the options of the last question by letter: the last run A, B, … in one style; empty if there is none."""
    asked = next((turn["content"] for turn in reversed(example.messages[:-1]) if turn["role"] == "user"), "")
    for style in _OPTION_STYLES if isinstance(asked, str) else ():
        marks = list(style.finditer(asked))
        first = max((i for i, mark in enumerate(marks) if mark.group(1) == "A"), default=len(marks))
        marks = marks[first:]
        if len(marks) > 1 and [mark.group(1) for mark in marks] == list("ABCDEFGHIJ"[: len(marks)]):
            ends = [mark.start() for mark in marks[1:]] + [len(asked)]
            return {mark.group(1): asked[mark.end() : end].strip() for mark, end in zip(marks, ends, strict=True)}
    return {}


_ONE_BY_ONE: Mapping[str, Callable[[Example, random.Random], str | None]] = {
    "numbers": _with_other_numbers,
    "negate": _negated,
    "option": _with_other_option,
}
