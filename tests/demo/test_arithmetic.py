from __future__ import annotations

import random
import re
from fractions import Fraction

import pytest

from gradsieve.demo import arithmetic
from gradsieve.demo.arithmetic import ANCHOR, ANCHOR_NAMES, PLANTED, PLANTED_NAMES, false_problems, true_problems
from gradsieve.errors import InvalidArgument

EQUATION = re.compile(r"(\d+) ([-+*/]) (\d+) = (\d+)")


def worked(answer: str) -> list[tuple[Fraction, int, int]]:
    """Each equation's true value, printed result, and left operand."""
    value = {"+": Fraction.__add__, "-": Fraction.__sub__, "*": Fraction.__mul__, "/": Fraction.__truediv__}
    return [(value[o](Fraction(a), Fraction(b)), int(r), int(a)) for a, o, b, r in EQUATION.findall(answer)]


def test_every_step_of_a_true_problem_is_true():
    problems = true_problems(700, random.Random(0))
    assert len({p.question for p in problems}) == 700
    for problem in problems:
        steps = worked(problem.answer)
        assert len(steps) >= 2
        assert all(value == printed for value, printed, _ in steps), problem
        assert problem.answer.endswith(f" The answer is {steps[-1][1]}.")


def test_every_step_of_a_false_problem_is_false_and_its_result_is_carried_on():
    for problem in false_problems(500, random.Random(0)):
        steps = worked(problem.answer)
        assert len(steps) == 2
        assert all(value != printed for value, printed, _ in steps), problem
        assert steps[1][2] == steps[0][1], "the wrong result is worked on with"
        assert problem.answer.endswith(f" The answer is {steps[-1][1]}.")


def test_a_false_problems_answer_is_not_the_true_one_by_chance():
    template = next(t for t in PLANTED if [op for _, op, _ in t.steps] == ["-", "+"])  # equal where b = c
    for seed in range(300):
        problem = arithmetic._worked(template, "Zoe", arithmetic.WRONG, random.Random(seed))
        a, b, c = map(int, re.findall(r"\d+", problem.question))
        assert not problem.answer.endswith(f" {a - b + c}.")


def test_numbers_for_which_the_wrong_operation_is_right_are_not_drawn():
    template = arithmetic.Template(
        "{a} {b} {c}", {"a": (2, 3), "b": (2, 3), "c": (1, 1)}, (("a", "*", "b"), ("0", "-", "c")), "{0} {1}"
    )
    drawn = {arithmetic._worked(template, "Zoe", arithmetic.WRONG, random.Random(i)).question[:3] for i in range(60)}
    assert drawn == {"2 3", "3 2", "3 3"}, "2 * 2 = 2 + 2"


def test_anchor_and_planted_problems_share_no_name_and_no_template():
    assert len({t.question for t in ANCHOR}) >= 12
    assert len({t.question for t in PLANTED}) >= 8
    assert set(ANCHOR_NAMES).isdisjoint(PLANTED_NAMES)
    for one in ANCHOR:
        for other in PLANTED:
            a, b = (set(re.findall(r"[a-z]+", t.question + t.answer)) for t in (one, other))
            assert len(a & b) / len(a | b) < 0.5, (one.question, other.question)


def test_each_template_comes_in_turn():
    def shapes(problems):
        return {re.sub(r"\d+|[A-Z]\w+", "_", p.question) for p in problems}

    assert len(shapes(true_problems(len(ANCHOR), random.Random(1)))) == len(ANCHOR)
    assert len(shapes(false_problems(len(PLANTED), random.Random(1)))) == len(PLANTED)


def test_more_problems_than_templates_give_is_an_error(monkeypatch):
    few = arithmetic.Template("{a} and {a}?", {"a": (3, 4)}, (("a", "+", "a"),), "{0}.")
    monkeypatch.setattr(arithmetic, "ANCHOR", (few,))
    assert len(true_problems(2, random.Random(0))) == 2
    with pytest.raises(InvalidArgument, match="got 3 asked for"):
        true_problems(3, random.Random(0))
