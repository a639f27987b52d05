from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch

from gradsieve.report import Page, pictures, render
from gradsieve.types import Selection

MakePage = Callable[..., Page]
TRACE: dict[str, Any] = {
    "walk": {"row": [4, 1, 2], "component": [0, 0, 2], "step": [0, 1, 0], "via": ["start", "walk", "start"]},
    "layout": {"picks": [[0.0, 0.0], [1.0, 2.0], [2.0, 1.0]], "sample": [[-1.0, -1.0], [3.0, 3.0]], "target": [1.0, 1.0]},
    "bars": {"novelty": {"all": 0.4, "score alone": 0.2, "nothing": None}, "signed": {"all": -1.0}},
}


def numbers(path: str) -> list[float]:
    return [float(number) for number in re.findall(r"-?[\d.]+", path)]


def traced(small_page: MakePage, trace: dict[str, Any]) -> str:
    selection = Selection(
        torch.tensor([4, 1, 2]), torch.ones(3, dtype=torch.float64), torch.arange(6, dtype=torch.float64), trace
    )
    return render(small_page(selection=selection))


def test_a_walk_has_a_line_per_component_in_the_order_of_its_picks() -> None:
    walk = pictures.walk(TRACE)
    assert walk is not None
    assert [(part.name, part.style, part.count) for part in walk.parts] == [("1", "a", 2), ("3", "b", 1)]
    (x0, y0, x1, y1) = numbers(walk.parts[0].path)
    assert x0 < x1
    assert y0 > y1  # downwards
    assert walk.parts[0].start == walk.parts[0].picks.partition("h0")[0] + "h0"
    assert (walk.sampled, walk.drawn) == (2, 3)
    assert walk.x.place([-1, 3])[0] >= 0
    assert walk.target.count("M") == 1


def test_the_axes_hold_sample_picks_and_target() -> None:
    far = {**TRACE["layout"], "target": [50.0, -50.0]}
    walk = pictures.walk({**TRACE, "layout": far})
    assert walk is not None
    assert walk.x.high >= 50
    assert walk.y.low <= -50


def test_long_walks_are_drawn_in_part(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pictures, "MOST_STEPS", 2)
    walk = pictures.walk(TRACE)
    assert walk is not None
    assert walk.drawn == 2
    assert [part.count for part in walk.parts] == [2, 1]
    assert walk.parts[0].picks.count("h0") == 1


def test_components_beyond_the_fourth_share_a_colour() -> None:
    steps = {"component": list(range(6))}
    walk = pictures.walk({"walk": steps, "layout": {"picks": [[float(i), i % 2] for i in range(6)]}})
    assert walk is not None
    assert [part.style for part in walk.parts] == ["a", "b", "c", "d", "rest", "rest"]
    assert walk.target == walk.others == ""


@pytest.mark.parametrize(
    "trace",
    [
        {},
        {"walk": TRACE["walk"]},
        {"walk": TRACE["walk"], "layout": {"picks": [[0, 0]]}},
        {"walk": {}, "layout": {"picks": []}},
    ],
)
def test_without_both_halves_there_is_no_picture(trace: dict[str, Any]) -> None:
    assert pictures.walk(trace) is None


def test_bars_are_shares_of_the_longest_and_negative_ones_are_left_out() -> None:
    (panel,) = pictures.bars(TRACE)
    assert panel.name == "novelty"
    assert panel.rows == (("all", 0.4, "100.00"), ("score alone", 0.2, "50.00"))
    assert pictures.bars({"bars": {"zero": {"all": 0.0}}})[0].rows == (("all", 0.0, "0.00"),)
    assert pictures.bars({"bars": 3}) == []


def test_the_page_draws_them_and_not_as_steps(small_page: MakePage) -> None:
    page = traced(small_page, TRACE)
    assert ">The walk<" in page
    assert "component 1: 2 picks" in page
    assert "component 3: 1 pick<" in page
    assert 'class="own"><dt><bdi>all</bdi>' in page
    assert "walk: component" not in page
    assert "layout: " not in page


def test_the_page_says_how_much_of_the_walk_is_drawn(small_page: MakePage, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "Drawn: " not in traced(small_page, TRACE)
    monkeypatch.setattr(pictures, "MOST_STEPS", 2)
    assert "Drawn: 2 of 3 picks, the first of each component." in traced(small_page, TRACE)
