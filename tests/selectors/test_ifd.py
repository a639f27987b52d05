"""IFD by hand, and what its ceiling leaves out."""

from __future__ import annotations

import math

import pytest
import torch

from gradsieve.errors import InvalidArgument
from gradsieve.selectors.ifd import IFD
from gradsieve.types import ArrayGradients, Budget, Problem


def run(method, loss, alone, budget):
    columns = {"loss": torch.tensor(loss), "loss/alone": torch.tensor(alone)}
    pool = ArrayGradients([chr(97 + i) for i in range(len(loss))], torch.empty(len(loss), 0), columns)
    return method.select(Problem(pool), Budget.parse(budget), torch.Generator())


def test_the_question_that_helps_least_but_helps_comes_first():
    selection = run(IFD(), [1.0, 0.5, 3.0, 1.8, 2.0], [2.0, 2.0, 2.0, 2.0, 2.0], 3)
    assert selection.rows.tolist() == [4, 3, 0]  # 1.0 is at the ceiling, 1.5 above it
    assert selection.scores.nan_to_num(-1).tolist() == pytest.approx([0.5, 0.25, -1, 0.9, 1.0])
    assert "1 of 5 examples have a ratio above 1" in selection.notes[0]


def test_without_a_ceiling_all_may_be_chosen_and_with_a_low_one_the_shortfall_is_stated():
    assert run(IFD(ceiling=math.inf), [1.0, 3.0], [2.0, 2.0], 1).rows.tolist() == [1]
    few = run(IFD(ceiling=0.4), [1.0, 0.5], [2.0, 2.0], 2)
    assert few.rows.tolist() == [1]
    assert "1 examples are chosen of the 2" in few.notes[-1]


def test_an_answer_that_costs_nothing_alone_is_refused():
    with pytest.raises(InvalidArgument, match=r"'loss/alone' must be above 0, got 0\.0 for 'b'"):
        run(IFD(), [1.0, 1.0], [1.0, 0.0], 1)
    with pytest.raises(InvalidArgument, match="ceiling must be above 0, got 0"):
        IFD(ceiling=0)
