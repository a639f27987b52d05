from random import Random

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gradsieve.errors import InvalidArgument
from gradsieve.types import ArrayGradients, Budget, Selection


@given(st.floats(1e-9, 100, allow_nan=False))
def test_a_budget_survives_being_written(percent: float) -> None:
    budget = Budget(share=percent / 100)
    assert Budget.parse(str(budget)).share == pytest.approx(budget.share, rel=1e-11)


@pytest.mark.parametrize(
    ("text", "written"), [("5%", "5%"), ("12.5%", "12.5%"), ("500", "500"), ("1_000tok", "1000tok"), ("100%", "100%")]
)
def test_a_budget_is_written_as_it_was_read(text: str, written: str) -> None:
    assert str(Budget.parse(text)) == written


@pytest.mark.parametrize("text", ["0", "-3", "5.5", "ten", "101%", "0%", "0tok", ""])
def test_a_budget_that_means_nothing_is_refused(text: str) -> None:
    with pytest.raises(InvalidArgument, match="budget must"):
        Budget.parse(text)


def test_a_share_of_whole_examples_is_not_rounded_below_them() -> None:
    pool = ArrayGradients([str(i) for i in range(100)], torch.ones(100, 1))
    assert all(Budget.parse(f"{share}%").limit(pool) == share for share in range(1, 101))


def test_a_budget_never_pays_for_more_than_it_has() -> None:
    pool = ArrayGradients(["a", "b", "c"], torch.zeros(3, 2), {"tokens": torch.tensor([4.0, 3.0, 5.0])})
    order = torch.tensor([2, 1, 0])
    assert Budget.parse("2").take(order, pool).tolist() == [2, 1]
    assert Budget.parse("67%").take(order, pool).tolist() == [2, 1]
    assert Budget.parse("8tok").take(order, pool).tolist() == [2, 1]
    assert Budget.parse("7tok").take(order, pool).tolist() == [2]
    assert Budget.parse("7tok").take(torch.tensor([0, 2, 1]), pool).tolist() == [0, 1]
    for text in ("4", "13tok", "2tok", "20%"):
        with pytest.raises(InvalidArgument, match="budget must"):
            Budget.parse(text).take(order, pool)


@given(st.lists(st.integers(1, 9), min_size=1, max_size=12), st.integers(1, 60), st.randoms(use_true_random=False))
def test_tokens_buy_every_row_that_what_is_left_pays_for(prices: list[int], tokens: int, random: Random) -> None:
    pool = ArrayGradients([str(i) for i in range(len(prices))], torch.zeros(len(prices), 2), {"tokens": torch.tensor(prices)})
    budget = Budget(tokens=min(max(tokens, min(prices)), sum(prices)))
    assert budget.tokens is not None
    order = random.sample(range(len(prices)), len(prices))
    taken, left = [], budget.tokens
    for row in order:
        if prices[row] <= left:
            taken.append(row)
            left -= prices[row]
    assert budget.take(torch.tensor(order), pool).tolist() == taken


def test_a_matrix_becomes_gradients_with_unit_references() -> None:
    G, r = torch.tensor([[3.0, 4.0], [0.0, 2.0]]), torch.tensor([0.0, 10.0])
    pool = ArrayGradients.from_matrix(G, references={"anchor": r})
    assert pool.columns["norm"].tolist() == [5.0, 2.0]
    assert pool.columns["dot/anchor"].tolist() == [4.0, 2.0]
    with pytest.raises(InvalidArgument, match="positive norm"):
        ArrayGradients.from_matrix(G, references={"anchor": torch.zeros(2)})
    with pytest.raises(InvalidArgument, match="ids must be unique"):
        ArrayGradients(["a", "a"], G)


def test_what_is_said_to_be_per_row_has_a_number_per_row() -> None:
    trace = {"fine": [0.5, None, 1], "short": [0.5, 1.0], "text": ["a", "b", "c"], "table": {"a": 1, "b": 2, "c": 3}}
    common = (torch.tensor([2]), torch.ones(1), torch.zeros(3), trace)
    assert Selection(*common, per_row=("fine",)).per_row == ("fine",)
    for name in ("short", "text", "table", "missing"):
        with pytest.raises(InvalidArgument, match=rf"per_row must name lists of 3 numbers .*, got '{name}'"):
            Selection(*common, per_row=(name,))
