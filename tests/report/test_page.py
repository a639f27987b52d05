from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from gradsieve.errors import InvalidArgument
from gradsieve.report import Page
from gradsieve.types import Selection


def selection(rows: list[int], weights: int | None = None, scores: int = 6) -> Selection:
    count = len(rows) if weights is None else weights
    return Selection(torch.tensor(rows, dtype=torch.int64), torch.ones(count, dtype=torch.float64), torch.zeros(scores))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ids": []}, "ids must name at least one example"),
        ({"sources": ()}, "sources must name at least the pool"),
        ({"prompts": ["a"]}, "prompts must have 6 entries .*, got 1"),
        ({"completions": ["a"] * 7}, "completions must have 6 entries .*, got 7"),
        ({"columns": {"loss": torch.zeros(5)}}, "column 'loss' must have 6 entries .*, got 5"),
        ({"groups": ["x"]}, "groups must have 6 entries .*, got 1"),
        ({"selection": selection([1], scores=4)}, "selection.scores must have 6 entries .*, got 4"),
        ({"selection": selection([1, 2], weights=1)}, r"selection.weights must have 2 entries .*, got 1"),
        ({"selection": selection([1, 6])}, r"selection.rows must lie in \[0, 6\), got 1 to 6"),
        ({"selection": selection([-1, 2])}, r"selection.rows must lie in \[0, 6\), got -1 to 2"),
        ({"selection": selection([1, 2, 1])}, "selection.rows must be unique, got 1 repeated"),
    ],
)
def test_a_page_refuses_what_does_not_fit_together(
    small_page: Callable[..., Page], changes: dict[str, object], message: str
) -> None:
    with pytest.raises(InvalidArgument, match=message):
        small_page(**changes)


def test_places_count_the_selection_from_one(small_page: Callable[..., Page]) -> None:
    page = small_page()
    assert page.places.tolist() == [0, 2, 0, 0, 1, 0]
    assert page.chosen.tolist() == [False, True, False, False, True, False]
