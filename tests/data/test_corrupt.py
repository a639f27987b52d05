from __future__ import annotations

import json
import re
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gradsieve.data.corrupt import corrupt
from gradsieve.errors import InvalidArgument
from gradsieve.types import Example


def example(id: str, prompt: str, answer: object, category: str | None = None) -> Example:
    messages = ({"role": "user", "content": prompt}, {"role": "assistant", "content": answer})
    return Example(id, messages, b"{}", f"file.jsonl:{id}", category)


def texts(examples: list[Example]) -> list[str]:
    return [e.messages[-1]["content"] for e in examples]


def corrupted(how: str, prompt: str, answer: str, seed: int = 0) -> str | None:
    result = corrupt([example("x", prompt, answer)], how, seed=seed)
    assert result.how == how
    assert len(result.pairs) + len(result.skipped) == 1
    return result.pairs[0][1].messages[-1]["content"] if result.pairs else None


# numbers


@st.composite
def worked_answers(draw):
    """A prompt with three numbers and an answer that works on them in two steps."""
    a, b, c = (draw(st.integers(1, 3000)) for _ in range(3))
    marker = draw(st.sampled_from(["The answer is {}.", "#### {}", "\\boxed{{{}}}", "So {} it is.", "= {} dollars"]))
    grouped = draw(st.booleans())
    show = (lambda n: f"{n:,}") if grouped else str
    answer = f"First {a} * {b} = {show(a * b)}. Then {show(a * b)} + {c} = {show(a * b + c)}. {marker.format(show(a * b + c))}"
    return f"Take {a} times {b} and add {c}.", answer, (a, b, c)


@given(worked_answers(), st.integers(0, 5))
@settings(max_examples=150, deadline=None)
def test_results_and_intermediate_numbers_change_alike_and_operands_of_the_prompt_stay(case, seed):
    prompt, answer, (a, b, c) = case
    changed = corrupted("numbers", prompt, answer, seed)
    number = re.compile(r"\d+(?:,\d{3})*")
    old, new = ([int(x.replace(",", "")) for x in number.findall(text)] for text in (answer, changed))
    assert len(changed) == len(answer), "length must not tell the two apart"
    assert number.sub("#", changed) == number.sub("#", answer), "nothing but numbers changes"
    assert [new[0], new[1]] == [a, b]
    assert new[2] != a * b
    assert new[5] != a * b + c
    assert new[-1] == new[5], "the result is wrong in the same way wherever it is repeated"
    assert new[4] == c
    if a * b not in (a, b, c):
        assert new[3] == new[2], "a wrong intermediate result is carried on"
    assert len(old) == len(new) == 7


@pytest.mark.parametrize(
    ("prompt", "answer", "kept"),
    [
        ("", "42.", ""),
        ("Which is larger, 2 or 5?", "The larger is 5", "The larger is "),
        ("", "1. take 7 eggs\n2. that is all", "1. take _ eggs\n2. that is all"),
        ("", "Step 1: see\nStep 2: so 9", "Step 1: see\nStep 2: so _"),
        ("", "the 2nd of H2O v1.2.3 is 6", "the 2nd of H2O v1.2.3 is _"),
        ("", "\\boxed{-3.50}", "\\boxed{-_.__}"),
        ("It costs 1,234.", "1234 + 1 = 1,235", "1234 + _ = _,___"),
        ("", "007", "0__"),
    ],
)
def test_which_numbers_of_an_answer_change(prompt, answer, kept):
    for seed in range(20):
        changed = corrupted("numbers", prompt, answer, seed)
        assert changed != answer
        if kept:
            assert re.fullmatch(re.escape(kept).replace("_", r"\d") + r"\d?", changed), changed


def test_a_replacement_avoids_the_examples_other_numbers():
    for seed in range(50):
        changed = corrupted("numbers", "12 13 14 15 16", "= 17", seed)
        assert int(changed[2:]) not in range(12, 18)
    for seed in range(50):  # where every digit is used, it still differs from what it replaces
        assert corrupted("numbers", "1 2 3 4 5 6 7 8 9", "= 4", seed) not in {"= 4", "= 0"}


def test_an_example_without_numbers_is_reported_as_skipped():
    wordy, worked = example("a", "q", "No number here."), example("b", "q", "= 4")
    result = corrupt([wordy, worked], "numbers")
    assert result.skipped == [wordy]
    assert [original for original, _ in result.pairs] == [worked]


# exchange

short_texts = st.lists(
    st.tuples(st.sampled_from(["q1", "q2", "q3", "q4", "Q1?"]), st.sampled_from(["a", "b", "c c", "A.", "long answer here"])),
    max_size=14,
)


@given(short_texts, st.integers(0, 3))
@settings(max_examples=200, deadline=None)
def test_exchange_is_a_permutation_that_gives_no_prompt_one_of_its_own_answers(rows, seed):
    examples = [example(str(i), prompt, answer) for i, (prompt, answer) in enumerate(rows)]
    result = corrupt(examples, "exchange", seed=seed)
    originals, copies = [o for o, _ in result.pairs], [c for _, c in result.pairs]
    assert Counter(texts(originals)) == Counter(texts(copies)), "both halves hold the same answers"

    def plain(text: str) -> str:
        return text.lower().strip("?.")

    right = {(plain(prompt), plain(answer)) for prompt, answer in rows}
    for copy in copies:
        assert (plain(copy.messages[0]["content"]), plain(copy.messages[-1]["content"])) not in right
    assert Counter(e.id for e in originals + result.skipped) == Counter(e.id for e in examples)


@given(st.lists(st.sampled_from(["yes", "no", "maybe so", "perhaps not today"]), max_size=25), st.integers(0, 3))
@settings(max_examples=150, deadline=None)
def test_exchange_skips_only_the_surplus_of_an_answer_that_more_than_half_have(answers, seed):
    examples = [example(str(i), f"prompt {i}", answer) for i, answer in enumerate(answers)]
    result = corrupt(examples, "exchange", seed=seed)
    most = max(Counter(answers).values(), default=0)
    assert len(result.skipped) == max(0, 2 * most - len(answers))


def test_exchange_prefers_answers_of_like_length():
    lengths = [20 + i % 3 for i in range(10)] + [300 + i % 3 for i in range(10)]
    examples = [example(str(i), f"prompt {i}", chr(97 + i) * n) for i, n in enumerate(lengths)]
    for original, copy in corrupt(examples, "exchange").pairs:
        assert abs(len(texts([original])[0]) - len(texts([copy])[0])) < 10


def test_exchange_moves_other_places_with_another_seed():
    examples = [example(str(i), f"prompt {i}", f"answer {i:03d}") for i in range(30)]
    first, second = (texts([c for _, c in corrupt(examples, "exchange", seed=s).pairs]) for s in (0, 1))
    assert first != second


# negate


@pytest.mark.parametrize(
    ("answer", "negated"),
    [
        ("The sky is blue.", "The sky is not blue."),
        ("The sky is not blue.", "The sky is blue."),
        ("It isn't so.", "It is so."),
        ("They cannot fly.", "They can fly."),
        ("They can't fly.", "They can fly."),
        ("It won't rain.", "It will rain."),
        ("It has been seen.", "It has not been seen."),
        ("It hasn't been seen.", "It has been seen."),
        ("It has fever and is ill.", "It has fever and is not ill."),
        ("Yes, it is.", "No, it is not."),
        ("No.", "Yes."),
        ("true", "false"),
        ("No tumor is seen in May.", "No tumor is not seen in May."),
        ("A tumor of the skin, in May.", None),
    ],
)
def test_negation_turns_a_statement_round(answer, negated):
    assert corrupted("negate", "q", answer) == negated


# option

CHOICES = "Which?\n(A) red (B) blue\n(C) light green (D) red"


@pytest.mark.parametrize(
    ("prompt", "answer", "possible"),
    [
        (CHOICES, "(A)", {"(B)", "(C)"}),
        (CHOICES, "B", {"A", "C", "D"}),
        (CHOICES, "blue", {"red", "light green"}),
        (
            CHOICES,
            "The answer is (C) light green.",
            {"The answer is (A) red.", "The answer is (B) blue.", "The answer is (D) red."},
        ),
        (
            "Which?\n(A) red (B) blue",
            "It is not (B), so (A) fits because Ann said so. The answer is (A).",
            {"It is not (A), so (B) fits because Ann said so. The answer is (B)."},
        ),
        ("What?\nA. x\nB. y", "Answer: B. y", {"Answer: A. x"}),
        ("See note A) below.\nA) one\nB) two", "A)", {"B)"}),
        (
            CHOICES.replace("(D) red", "(D) dark"),
            "Option (B) is tempting. The answer is (A).",
            {
                "Option (A) is tempting. The answer is (B).",
                "Option (B) is tempting. The answer is (C).",
                "Option (B) is tempting. The answer is (D).",
            },
        ),
        ("Vitamin A. is?\nA) one\nB) two", "B) two, because of one", {"A) one, because of one"}),
        (CHOICES, "The answer is A dog", None),
        (CHOICES, "none of these", None),
        ("Which? red or blue", "(A)", None),
        ("Which?\n(A) red (C) blue", "(A)", None),
        ("Which?\n(A) red (B) Red.", "(A)", None),
    ],
)
def test_another_option_is_declared_right(prompt, answer, possible):
    seen = {corrupted("option", prompt, answer, seed) for seed in range(40)}
    assert seen == (possible or {None})


# all


def test_auto_takes_numbers_from_half_of_the_answers_on():
    worked, dated = "3 * 4 = 12", "It ended in 1945."
    for answers, how in (
        ([worked, worked, dated, "x"], "numbers"),
        ([worked, dated, dated, "x"], "exchange"),
        ([], "exchange"),
    ):
        assert corrupt([example(str(i), f"q{i}", a) for i, a in enumerate(answers)]).how == how
    for answer in ("#### 7", "The answer is 7", "ANSWER: $7", "\\boxed{7}", "<<3+4=7>>", "x = **7**"):
        assert corrupt([example("a", "q", answer)]).how == "numbers"


def test_a_copy_keeps_everything_but_the_last_turns_text():
    messages = (
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "3 + 4?"},
        {"role": "assistant", "content": "= 8"},
        {"role": "user", "content": "Sure?"},
        {"role": "assistant", "content": "Sorry, ü = 7", "name": "tutor"},
    )
    original = Example("id1", messages, b"{}", "f.jsonl:3", "math")
    ((kept, copy),) = corrupt([original], "numbers").pairs
    assert kept is original
    assert (copy.id, copy.origin, copy.category) == ("id1~numbers", "f.jsonl:3~numbers", "math")
    assert copy.messages[:-1] == messages[:-1]
    assert copy.messages[-1]["name"] == "tutor"
    assert re.fullmatch(r"Sorry, ü = [1-689]", copy.messages[-1]["content"])
    assert json.loads(copy.raw) == {"id": "id1~numbers", "messages": [dict(m) for m in copy.messages], "category": "math"}
    assert b"\n" not in copy.raw


@pytest.mark.parametrize("how", ["numbers", "exchange", "negate", "option"])
def test_the_result_does_not_depend_on_the_order_of_the_examples(how):
    rows = [(f"Is it {i}?\n(A) yes (B) no (C) so", f"(B) It is = {i}{i}. " + "x" * (i % 5)) for i in range(12)]
    examples = [example(str(i), prompt, answer) for i, (prompt, answer) in enumerate(rows)]
    forward, backward = corrupt(examples, how, seed=3), corrupt(examples[::-1], how, seed=3)
    assert {c.id: c.raw for _, c in forward.pairs} == {c.id: c.raw for _, c in backward.pairs}
    assert len(forward.pairs) == 12
    assert [o.id for o, _ in backward.pairs] == [str(i) for i in range(11, -1, -1)]
    assert corrupt(examples, how, seed=3) == forward


@pytest.mark.parametrize("how", ["numbers", "exchange", "negate", "option"])
def test_answers_that_are_no_plain_text_are_skipped(how):
    parts = example("a", CHOICES, [{"type": "text", "text": "= 3 is (A)"}])
    empty = example("b", CHOICES, "")
    result = corrupt([parts, empty], how)
    assert (result.pairs, result.skipped) == ([], [parts, empty])


def test_bad_arguments_are_refused():
    with pytest.raises(InvalidArgument, match="corruption must be one of auto, numbers, exchange, negate, option, got 'swap'"):
        corrupt([], "swap")
    with pytest.raises(InvalidArgument, match="unique ids"):
        corrupt([example("a", "q", "1"), example("a", "r", "2")])
