from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch

from gradsieve.report import Page, Source, Stage, facts, summary
from gradsieve.types import Selection


def said(page: Page) -> list[str]:
    return summary.sentences(page, facts.row_values(page))


def rows(*chosen: int) -> Selection:
    count = len(chosen)
    scores = torch.full((6,), torch.nan, dtype=torch.float64)
    return Selection(torch.tensor(chosen, dtype=torch.int64), torch.ones(count, dtype=torch.float64), scores)


def test_three_sentences_say_what_and_why(small_page: Callable[..., Page]) -> None:
    sources = (Source("pool", "p.jsonl", 6), Source("target", "t.jsonl", 1), Source("anchor", "a.jsonl", 1200))
    page = small_page(sources=sources)
    assert summary.headline(page) == "Pick chose 2 of 6 examples"
    assert said(page) == [
        "They come from the 6 usable examples of p.jsonl, within a budget of 2, for tiny, measured against 1 target example "
        "and 1,200 anchor examples.",
        "Pick picks by the largest score.",
        "Against the whole pool, the chosen examples score higher (median score 0.85, pool 0.35); in length they are much "
        "like it.",
    ]


def test_the_comparison_names_direction_and_both_numbers(small_page: Callable[..., Page]) -> None:
    columns = {
        "utility": torch.tensor([1.0, 2, 3, 4, 5, 6]),
        "risk": torch.tensor([0.0, 0, 0, 1, 1, 1]),
        "tokens": torch.tensor([60.0, 50, 40, 30, 20, 10]),
    }
    best, worst = small_page(columns=columns, selection=rows(0, 1)), small_page(columns=columns, selection=rows(4, 5))
    assert said(best)[2] == (
        "Against the whole pool, the chosen examples agree less with the target (median utility 1.5, pool 3.5), push against "
        "general knowledge less often (0% of them, 50% of the pool) and are longer (median length 55, pool 35)."
    )
    assert "agree more with the target (median utility 5.5, pool 3.5)" in said(worst)[2]
    assert "more often (100% of them, 50% of the pool) and are shorter" in said(worst)[2]


def test_overlap_is_compared_by_its_median_and_is_no_conflict(small_page: Callable[..., Page]) -> None:
    columns = {
        "utility": torch.tensor([1.0, 2, 3, 4, 5, 6]),
        "overlap": torch.tensor([0.1, 0.1, 0.1, 0.5, 0.5, 0.5]),
        "conflict": torch.tensor([-0.1, 0.1, -0.1, 0.5, -0.5, 0.5]),
    }
    page = small_page(columns=columns, selection=rows(0, 1))
    assert "touch general knowledge less (median overlap 0.1, pool 0.3)" in said(page)[2]
    assert "push against" not in said(page)[2]
    names = [number.name for number in summary.five_numbers(page, facts.row_values(page))]
    assert not any("push against" in name for name in names)
    assert names[:3] == ["examples chosen", "median utility", "median overlap"]


def test_a_selection_of_nothing_or_everything_is_not_compared(small_page: Callable[..., Page]) -> None:
    assert said(small_page(selection=rows()))[2].startswith("Nothing was chosen")
    assert said(small_page(selection=rows(0, 1, 2, 3, 4, 5)))[2].startswith("Everything was chosen")
    assert said(small_page(selection=rows(0), columns={}))[2].startswith("The method read no number")


def test_five_numbers_of_a_full_run(medical_page: Callable[..., Page]) -> None:
    page = medical_page()
    values = facts.row_values(page)
    numbers = summary.five_numbers(page, values)
    assert [n.name for n in numbers] == [
        "examples chosen",
        "tokens to train on",
        "median utility",
        "push against general knowledge",
        "to choose them",
    ]
    tokens, chosen = values["tokens"], page.chosen
    assert numbers[1].value == f"{tokens[chosen].sum():,.0f}"
    assert numbers[2].beside == f"{np.median(values['utility']):.3g} in the pool"
    assert numbers[3].value == f"{np.mean(values['risk'][chosen] > 0):.0%}"
    assert numbers[4].value == "3 min 18 s"


def test_five_numbers_are_filled_from_what_there_is(small_page: Callable[..., Page]) -> None:
    columns = {"loss": torch.arange(6.0), "tokens": torch.ones(6), "norm": torch.arange(6.0)}
    page = small_page(columns=columns, stages=(Stage("select", 2.0, None), Stage("write", None, 1.0)))
    numbers = summary.five_numbers(page, facts.row_values(page))
    assert [(n.name, n.value) for n in numbers] == [
        ("examples chosen", "2"),
        ("tokens to train on", "2"),
        ("median score", "0.85"),
        ("median loss", "2.5"),
        ("to choose them", "2 s"),
    ]
    assert numbers[4].beside == "1 s of processor time"
    bare = small_page(columns={}, selection=rows(0), excluded=(("x", "why"),))
    numbers = summary.five_numbers(bare, {})
    assert [(n.name, n.beside) for n in numbers] == [
        ("example chosen", "of 6, or 17%"),
        ("could not be used", "of 7 that were given"),
    ]
