from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from gradsieve.data import Tokens
from gradsieve.evaluate import TestSet
from gradsieve.evaluate.completion import Completion
from gradsieve.evaluate.keys import NUMBER, final_number, marks
from gradsieve.types import Example


@pytest.fixture
def marked(tokenizer: Any) -> Callable[..., list[tuple[str, str]]]:
    """What the number tokens and the key tokens of each item write."""

    def of(rows: list[Example], **fields: Any) -> list[tuple[str, str]]:
        test = TestSet.of("t", "general", rows, tokenizer, **fields)
        found = marks([Completion.of(t, tokenizer) for t in test.tokens], worked=test.kind == "worked")
        texts, at = [], 0
        for tokens in test.tokens:
            ids = tokens.labels[tokens.labels >= 0]
            parts = []
            for mark in (found.number, found.key):
                parts.append(tokenizer.decode(ids[mark[at : at + len(ids)].numpy()]))
            texts.append((parts[0], parts[1]))
            at += len(ids)
        assert at == len(found.number) == len(found.key)
        return texts

    return of


def test_the_final_number_of_a_worked_answer_bears_it(marked: Any, questions: list[Example]) -> None:
    assert marked(questions) == [("2355", "5"), ("8684848", "48"), ("10001515001500", "1,500"), ("15001014901490", "1,490")]


def test_the_whole_of_a_fraction_bears_a_worked_answer(marked: Any, example: Any) -> None:
    rows = [example("a", "?", r"= 3, so \boxed{\frac{3}{4}}"), example("b", "?", "= 6/8 = 3/4"), example("c", "?", "= 3:4")]
    assert [key for _, key in marked(rows, kind="worked")] == [r"\frac{3}{4}", "3/4", ""]


def test_rare_words_that_the_prompt_lacks_bear_a_plain_answer(marked: Any, facts: list[Example]) -> None:
    # "the" is said by three of four answers, its own prompt says "tulips", "come", "from"; 测血 is a pair.
    # The second "paracetamol" repeats the first.
    assert [key for _, key in marked(facts)] == [
        "steppe",
        "usualremedyparacetamolandcheap",
        "应当限制钠盐的摄入并监测血",
        "",
    ]


def test_a_word_is_rare_up_to_a_twentieth_of_the_answers(marked: Any, example: Any) -> None:
    rows = [example(str(i), "Say", "alpha" if i < 2 else "beta" if i < 5 else "gamma") for i in range(40)]
    found = [key for _, key in marked(rows)]
    assert found[:6] == ["alpha", "alpha", "", "", "", ""]
    assert [key for _, key in marked(rows[:1] + rows[2:4])] == ["alpha", "", ""], "one answer of a small set"


def test_only_the_last_turn_bears_the_answer_and_earlier_turns_count_as_said(marked: Any) -> None:
    turns = ("Where?", "In Peru."), ("And then?", "From Peru to Chile.")
    messages = tuple({"role": r, "content": t} for pair in turns for r, t in zip(("user", "assistant"), pair, strict=True))
    assert marked([Example("a", messages, b"{}", "x")]) == [("", "FromChile")]


def test_no_key_is_marked_where_a_worked_answer_was_cut_off_before_its_number(marked: Any, example: Any) -> None:
    rows = [example("a", "?", "So it is = 12 ####12"), example("b", "?", "So we see = 12, and therefore = 34")]
    for max_length in (41, 42):  # the newline after the end of turn is no part of the answer
        assert marked(rows, max_length=max_length) == [("1212", "12"), ("12", "")]
    assert marked(rows, max_length=40)[0] == ("1212", ""), "it might have gone on"


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("3*3=9 times\n#### 540", "540"),
        ("#### $70,000 or so, not 3", "70,000"),
        ("It is -4.", "-4"),
        ("80-5", "5"),
        ("makes 1.25", "1.25"),
        ("答案是12。", "12"),
        ("H2O", None),
        ("#### none, so 7", "7"),
        ("7 #### none", "7"),
        ("0 or .5", ".5"),
        ("1,2345", None),
        ("", None),
        ("so it is 3/4.", "3/4"),
        ("#### 3 / 4 of 12", "3 / 4"),
        ("#### -1 3/4", "-1 3/4"),
        (r"is $\boxed{\frac{1}{4}}$", r"\frac{1}{4}"),
        (r"\boxed{2\dfrac{-1}{4}}", r"2\dfrac{-1}{4}"),
        (r"\boxed{\tfrac34}", r"\tfrac34"),
        ("Step 2: 3/4", "3/4"),
        ("3:4", None),
        ("3 : 4", None),
        ("12:30", None),
        ("#### 3\uff1a4", None),
        ("1/2/2024", None),
        ("1/0", None),
        ("0,5 kg", None),
        ("x/2", None),
        ("2^5", None),
        (r"\boxed{2\sqrt{3}}", None),
        (r"#### 2\sqrt{3}", None),
        (r"\boxed{\frac{x}{4}}", None),
        (r"#### \frac{1}{2x}", None),
        ("v 1.2.3", None),
    ],
)
def test_the_final_number_of(text: str, number: str | None) -> None:
    found = final_number(text)
    assert (found and text[found.start : found.end]) == number


def test_versions_hold_no_second_number() -> None:
    assert [m.group() for m in NUMBER.finditer("v1.2.3 and 1.2.3")] == ["1.2"]


def test_all_tokens_of_a_character_that_several_write_touch_it(tokenizer: Any, example: Any) -> None:
    test = TestSet.of("t", "general", [example("a", "?", "xé 血压")], tokenizer, kind="text")
    # ids of letters are single bytes: x, two of é, space, three each, end of turn
    assert marks([Completion.of(t, tokenizer) for t in test.tokens], worked=test.kind == "worked").key.tolist() == [
        False
    ] * 4 + [True] * 6 + [False]


def test_words_of_a_vocabulary_with_longer_tokens() -> None:
    """A token that writes a space and a word, or the end of one word and the start of the next, counts for either."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    pieces = ["<|end|>", "<unk>", "▁a", "▁bitter", "▁pill", "s12", "3", "▁", ":", "?"]
    inner = Tokenizer(models.WordLevel(vocab={p: i for i, p in enumerate(pieces)}, unk_token="<unk>"))
    inner.decoder = decoders.Metaspace()
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<|end|>")
    ids = np.array([9, 2, 3, 4, 5, 0, 6, 0], dtype=np.int32)
    labels = np.where(np.arange(8) > 0, ids, -100).astype(np.int32)
    item = Completion.of(Tokens(ids, labels, False), fast)
    found = marks([item], worked=False)
    assert item.text == "a bitter pills123"
    assert found.number.tolist() == [False, False, False, True, False, True, False], "a special token writes nothing"
    assert found.key.tolist() == [False, True, True, True, False, False, False]
