from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from gradsieve.errors import DataError, InvalidArgument
from gradsieve.evaluate import Suite, TestSet
from gradsieve.types import Example


@pytest.fixture
def item(example: Any) -> Any:
    def of(id: str, answer: Any, choices: Any = ("red", "blue", "dark green")) -> Example:
        return example(id, f"Which colour has {id}?", "red", choices=choices, answer=answer)

    return of


def test_the_kind_is_told_by_the_content(questions: Any, facts: Any, item: Any, tokenizer: Any) -> None:
    def kind(rows: list[Example]) -> str | None:
        return TestSet.of("t", "target", rows, tokenizer).kind

    assert kind(questions) == "worked"
    assert kind(questions + facts) == "worked"
    assert kind(questions[1:] + facts) == "text"
    assert kind([item("a", 0), item("b", 2)]) == "choice"
    assert TestSet.of("t", "target", questions, tokenizer, kind="text").kind == "text"


def test_a_row_without_options_among_those_that_have_them_is_named(facts: Any, item: Any, example: Any, tokenizer: Any) -> None:
    half = example("half", "Which?", "red", choices=["red", "blue"])
    for rows, name in (([item("a", 0), *facts], "0"), ([item("a", 0), half, item("b", 1)], "half")):
        with pytest.raises(
            DataError, match=rf'^test.jsonl:{name}: must have "choices" and "answer" as other rows of test set t'
        ):
            TestSet.of("t", "target", rows, tokenizer)
    assert TestSet.of("t", "target", [item("a", 0), *facts], tokenizer, kind="text").kind == "text"


def test_options_are_the_prompt_with_each_choice(item: Any, tokenizer: Any) -> None:
    test = TestSet.of("t", "target", [item("a", 2), item("b", "B")], tokenizer)
    assert [option.answer for option in test.options] == [2, 1]
    texts = [tokenizer.decode(tokens.input_ids) for tokens in test.options[0].tokens]
    start = "<|im_start|>user\nWhich colour has a?<|im_end|>\n<|im_start|>assistant\n"
    assert texts == [f"{start}{choice}<|im_end|>\n" for choice in ("red", "blue", "dark green")]
    labelled = test.options[1].tokens[2]
    assert tokenizer.decode(labelled.input_ids[labelled.labels >= 0]) == "dark green<|im_end|>"


@pytest.mark.parametrize(
    ("answer", "choices", "right"),
    [
        (1, ["a b", "c d"], 1),
        ("B", ["x", "y"], 1),
        ("b", ["x", "y"], 1),
        ("c d", ["a b", "c d"], 1),
        ("A", ["A", "B"], 0),
        ("2", ["1", "2"], 1),
        ("C", {"text": ["x", "y"], "label": ["A", "C"]}, 1),
        ("2", {"text": ["x", "y"], "label": ["1", "2"]}, 1),
    ],
)
def test_the_right_answer_may_be_an_index_a_letter_a_label_or_a_text(
    answer: Any, choices: Any, right: int, item: Any, tokenizer: Any
) -> None:
    assert TestSet.of("t", "target", [item("a", answer, choices)], tokenizer).options[0].answer == right


@pytest.mark.parametrize(
    ("answer", "choices", "message"),
    [
        (3, ["x", "y", "z"], "index .from 0., the letter or the text of one of the 3 choices, got 3"),
        (-1, ["x", "y"], "got -1"),
        ("1", ["x", "y"], 'got "1"'),
        ("A", ["B", "A"], 'got "A", which may mean two; give the index'),
        (True, ["x", "y"], "got true"),
        (None, ["x", "y"], "got null"),
        ("nothing", ["x", "y"], 'got "nothing"'),
        (0, ["x"], "at least two texts"),
        (0, ["x", " "], "at least two texts"),
        (0, "xy", "at least two texts"),
    ],
)
def test_an_item_whose_answer_cannot_be_told_is_named(
    answer: Any, choices: Any, message: str, item: Any, tokenizer: Any
) -> None:
    with pytest.raises(DataError, match=rf"^test.jsonl:a: .*{message}"):
        TestSet.of("t", "target", [item("a", answer, choices)], tokenizer)


def test_an_option_that_does_not_fit_is_named(item: Any, tokenizer: Any) -> None:
    with pytest.raises(DataError, match="prompt and option must fit into max_length, got a~option1 cut"):
        TestSet.of("t", "target", [item("a", 0, ["x", "y" * 100])], tokenizer, max_length=100)


def test_unusable_examples_are_kept_with_their_reason(questions: Any, example: Any, tokenizer: Any) -> None:
    test = TestSet.of("t", "general", [example("long", "?" * 200, "x"), *questions], tokenizer, max_length=200)
    assert [e.id for e in test.examples] == [q.id for q in questions]
    assert [(e.position, e.id) for e in test.excluded] == [(0, "long")]
    with pytest.raises(DataError, match=r"test set t: must hold at least one item that can be used, got none .no completion"):
        TestSet.of("t", "general", [example("long", "?" * 200, "x")], tokenizer, max_length=200)


def test_the_first_items(item: Any, tokenizer: Any) -> None:
    test = TestSet.of("t", "target", [item(str(i), i % 2) for i in range(4)], tokenizer)
    part = test.first(2)
    assert [e.id for e in part.examples] == ["0", "1"]
    assert part.tokens == test.tokens[:2]
    assert part.options == test.options[:2]
    for count in (0, 5):
        with pytest.raises(InvalidArgument, match=r"count must lie in \[1, 4\]"):
            test.first(count)


def test_sets_that_do_not_fit_together_are_refused(questions: Any, tokenizer: Any, item: Any) -> None:
    test = TestSet.of("t", "target", questions, tokenizer)
    with pytest.raises(InvalidArgument, match="as many tokens, got 4 and 3"):
        replace(test, tokens=test.tokens[:3])
    with pytest.raises(InvalidArgument, match="target or general, got 'dev'"):
        replace(test, role="dev")
    with pytest.raises(InvalidArgument, match="kind of test set t must be one of"):
        replace(test, kind="sum")
    with pytest.raises(InvalidArgument, match="one per item of kind choice, got 0 for 4"):
        replace(test, kind="choice")
    unlabelled = replace(test.tokens[1], labels=test.tokens[1].labels * 0 - 100)
    with pytest.raises(InvalidArgument, match="1 must have completion tokens"):
        replace(test, tokens=[test.tokens[0], unlabelled, *test.tokens[2:]])


def test_a_suite_has_the_target_first_and_names_of_its_own(questions: Any, facts: Any, tokenizer: Any) -> None:
    suite = Suite.of(tokenizer, target={"medicine": facts}, general={"math": questions, "facts": facts})
    assert [test.name for test in suite] == ["medicine", "math", "facts"]
    assert [test.name for test in suite.of_role("general")] == ["math", "facts"]
    assert len(suite) == 3
    with pytest.raises(InvalidArgument, match="different names, got math, math"):
        Suite((suite.sets[1], suite.sets[1]))
    with pytest.raises(InvalidArgument, match="different names, got none"):
        Suite(())
