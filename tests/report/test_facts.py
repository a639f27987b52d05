from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import spearmanr

from gradsieve.report import Page, facts
from gradsieve.report.figures import Floats
from gradsieve.types import Selection


def with_trace(page: Page, trace: dict[str, Any], per_row: tuple[str, ...] = ()) -> Page:
    return dataclasses.replace(page, selection=dataclasses.replace(page.selection, trace=trace, per_row=per_row))


def chosen_by(scores: list[float], rows: list[int]) -> Selection:
    return Selection(torch.tensor(rows), torch.ones(len(rows), dtype=torch.float64), torch.tensor(scores, dtype=torch.float64))


def test_row_values_are_columns_scores_per_row_traces_and_cosines(small_page: Callable[..., Page]) -> None:
    columns = {
        "utility": torch.zeros(6),
        "norm": torch.tensor([0.0, 1, 2, 3, 4, 5]),
        "dot/anchor": torch.tensor([1.0, 1, 1, 3, -4, 0]),
        "note": torch.arange(6.0),
    }
    page = with_trace(
        small_page(columns=columns),
        {"utility": [1, 2, 3, 4, 5, None], "steps": [1] * 6, "other": [1.0] * 6, "words": list("abcdef"), "path": [0.0] * 6},
        ("utility",),
    )
    values = facts.row_values(page)
    assert list(values) == ["utility", "conflict", "score", "norm", "dot/anchor", "note", "cos/anchor"]
    assert values["utility"] == pytest.approx([1, 2, 3, 4, 5, np.nan], nan_ok=True)
    assert values["conflict"] == pytest.approx([np.nan, -1, -0.5, -1, 1, 0], nan_ok=True)


def test_scores_that_are_all_nan_are_no_column(small_page: Callable[..., Page]) -> None:
    assert "score" not in facts.row_values(small_page(selection=chosen_by([np.nan] * 6, [0])))


@pytest.mark.parametrize(
    ("names", "opened"),
    [
        (["utility", "risk", "score", "tokens"], ("utility", "risk")),
        (["cos/target", "conflict", "score"], ("cos/target", "conflict")),
        (["utility", "score", "tokens"], ("tokens", "score")),
        (["loss", "tokens"], ("tokens", "loss")),
        (["max/lm_head", "norm"], ("norm", "max/lm_head")),
        (["score"], None),
        (["same", "score"], None),
        ([], None),
    ],
)
def test_the_scatter_opens_with_utility_and_conflict_or_the_most_telling_pair(
    names: list[str], opened: tuple[str, str] | None
) -> None:
    values = {name: np.zeros(5) if name == "same" else np.arange(5.0) for name in names}
    assert facts.axes(values) == opened


def test_signed_conflict_is_shown_where_risk_is_nearly_always_zero() -> None:
    rare, often = np.r_[np.zeros(19), 1.0], np.r_[np.zeros(10), np.ones(10)]
    others = {"utility": np.arange(20.0), "conflict": np.arange(-19.0, 1.0)}
    assert facts.axes(others | {"risk": rare}) == ("utility", "conflict")
    assert facts.axes(others | {"risk": often}) == ("utility", "risk")
    assert facts.axes({"utility": np.arange(20.0), "risk": rare}) == ("utility", "risk")
    assert facts.axes(others | {"overlap": often + 0.1}) == ("utility", "overlap")


def test_a_small_pool_is_drawn_whole(small_page: Callable[..., Page]) -> None:
    assert facts.sample(small_page(), np.array([0])).tolist() == [0, 1, 2, 3, 4, 5]


@settings(max_examples=8, deadline=None)
@given(st.integers(0, 2**31), st.sampled_from([10, 1400, 1700, 5000]))
def test_a_large_pool_is_sampled_to_the_stated_size(small_page: Callable[..., Page], seed: int, k: int) -> None:
    n = 5000
    scores = torch.arange(n, dtype=torch.float64)
    page = small_page(
        ids=[str(i) for i in range(n)],
        prompts=[""] * n,
        completions=[""] * n,
        columns={},
        seed=seed,
        selection=Selection(torch.arange(k), torch.ones(k, dtype=torch.float64), scores),
    )
    keep = np.array([0, 7, 4999])
    rows = facts.sample(page, keep)
    assert len(rows) == facts.MOST_POINTS
    assert (np.diff(rows) > 0).all()
    assert set(keep) <= set(rows)
    assert abs(int(page.chosen[rows].sum()) - (facts.MOST_POINTS if k == n else min(k, facts.MOST_POINTS // 2))) <= 2
    assert (facts.sample(page, keep) == rows).all()


def test_quartiles_are_those_of_the_finite_values() -> None:
    v = np.array([1.0, 2, 3, 4, 5, np.nan, np.inf])
    c = facts.compare("x", v, np.array([0, 0, 0, 1, 1, 1, 0], dtype=bool))
    assert c.pool == (2.0, 3.0, 4.0)
    assert c.chosen == (4.25, 4.5, 4.75)
    assert c.missing == 2
    assert c.differs == 1
    assert facts.compare("x", -v, np.array([0, 0, 0, 1, 1, 0, 0], dtype=bool)).differs == -1
    assert facts.compare("x", v, np.array([0, 0, 1, 0, 0, 0, 0], dtype=bool)).differs == 0
    assert np.isnan(facts.compare("x", v, np.zeros(7, dtype=bool)).chosen).all()


@given(st.lists(st.tuples(st.integers(-5, 5), st.integers(-5, 5)), min_size=3, max_size=30))
def test_rank_correlation_is_spearmans(pairs: list[tuple[int, int]]) -> None:
    a, b = np.array(pairs, dtype=float).T
    if np.ptp(a) == 0 or np.ptp(b) == 0:
        assert np.isnan(facts.rank_correlation(a, b))
    else:
        assert facts.rank_correlation(np.r_[a, np.nan], np.r_[b, 1.0]) == pytest.approx(spearmanr(a, b).statistic)


def test_groups_are_counted_the_largest_first_and_unlabelled_rows_last(small_page: Callable[..., Page]) -> None:
    page = small_page(groups=["x", "y", None, None, "x", None])
    assert facts.groups(page) == [
        facts.Group("x", 2, 2 / 6, 1, 0.5),
        facts.Group("y", 1, 1 / 6, 1, 0.5),
        facts.Group(None, 3, 0.5, 0, 0.0),
    ]
    assert facts.groups(small_page()) == []


def test_examples_by_hand(small_page: Callable[..., Page]) -> None:
    page = small_page(selection=chosen_by([6, 5, 4, 3, 2, 1], [0, 1, 2]))
    assert facts.examples(page, 2) == facts.Examples(best=(0, 1), last_in=(2,), first_out=(3,), worst=(5, 4))
    tied = small_page(selection=chosen_by([6, 0, 0, 0, 0, 0], [0]), ids=["a", "f", "e", "d", "c", "b"])
    assert facts.examples(tied, 2) == facts.Examples(best=(0,), last_in=(), first_out=(5,), worst=(1, 2))
    unscored = small_page(selection=chosen_by([np.nan] * 6, [3, 1]))
    assert facts.examples(unscored, 4) == facts.Examples(best=(3, 1), last_in=(), first_out=(), worst=())


@given(st.permutations(range(6)), st.integers(0, 6), st.integers(1, 6))
def test_no_example_is_listed_twice(small_page: Callable[..., Page], rows: list[int], k: int, count: int) -> None:
    lists = facts.examples(small_page(selection=chosen_by([3, 1, 2, 5, 4, 0], rows[:k])), count)
    listed = [row for name in lists.__slots__ for row in getattr(lists, name)]
    assert len(listed) == len(set(listed))
    assert set(lists.best) | set(lists.last_in) <= set(rows[:k])
    assert not (set(lists.first_out) | set(lists.worst)) & set(rows[:k])


def plane(x: Floats, y: Floats) -> Floats:
    return 2 * x - 3 * y + 1


def test_the_border_of_a_linear_score_is_a_line(small_page: Callable[..., Page]) -> None:
    x, y = np.array([0.0, 1, 2, 3, 4, 5]), np.array([1.0, 0, 1, 0, 1, 1])
    scores = plane(x, y)  # -2, 3, 2, 7, 6, 8
    page = small_page(selection=chosen_by(scores.tolist(), [5, 3, 4]))
    line = facts.boundary(page, x, y)
    assert line == pytest.approx((2, -3, (6 + 3) / 2 - 1))
    not_top = small_page(selection=chosen_by(scores.tolist(), [5, 3, 0]))
    assert facts.boundary(not_top, x, y) is None
    assert facts.boundary(page, x**2, y) is None
    everything = small_page(selection=chosen_by(scores.tolist(), [5, 3, 4, 0, 1, 2]))
    assert facts.boundary(everything, x, y) is None
    unplaced = np.where(np.arange(6) == 3, np.nan, x)
    assert facts.boundary(page, unplaced, y) is None  # a chosen row without a place: the line would not hold for it


def test_a_curve_needs_a_grid_and_a_density_of_one_length(small_page: Callable[..., Page]) -> None:
    page = small_page()
    assert facts.curve_data(page) is None
    assert facts.curve_data(with_trace(page, {"density": {"grid": [0, 1], "values": [1, 2, 3]}})) is None
    assert facts.curve_data(with_trace(page, {"density": {"grid": [0, 1], "values": [0, 0]}})) is None
    assert facts.curve_data(with_trace(page, {"density": [0, 1]})) is None
    density = {"grid": [0, 1], "values": [1, 2], "bandwidth": 0.3}
    trace = {"density": density, "band": [0, 0.5], "gradient_score": [10.0, 11, 12, 13, 14, 15]}
    traced = with_trace(page, trace, ("gradient_score",))
    found = facts.curve_data(traced)
    assert found is not None
    assert found[2] is not None
    assert found[2].tolist() == [0, 0.5]
    assert found[3].tolist() == [14, 11]
    assert facts.step_panels(traced) == {}
    assert "gradient_score" in facts.row_values(traced)


def test_a_trade_off_needs_two_points_and_marks_the_lambda_taken(small_page: Callable[..., Page]) -> None:
    page = small_page()
    path = [(2.0, 0.0, 0.1), (0.0, 0.2, 0.9), (2.0, 0.0, 0.1)]
    found = facts.trade_off(with_trace(page, {"path": path, "lambda": 2.0, "bound": 0.1}))
    assert found is not None
    assert found[0].tolist() == [[0.0, 0.2, 0.9], [2.0, 0.0, 0.1]]
    assert found[1] is not None
    assert found[1].tolist() == [2.0, 0.0, 0.1]
    assert found[2] == 0.1
    unknown = facts.trade_off(with_trace(page, {"path": path, "lambda": None}))
    assert unknown is not None
    assert unknown[1:] == (None, None)
    for odd in ([], path[:1], [(1, 2)], "abc", [1, 2, 3], {"a": 1}, None):
        assert facts.trade_off(with_trace(page, {"path": odd})) is None


def test_steps_are_read_by_panel_and_line_and_other_entries_are_ignored(small_page: Callable[..., Page]) -> None:
    trace = {
        "steps": {"cost/real": [1, 2], "cost/simulated": [2, 3], "λ": [0, 1, 2], "odd": "text"},
        "training": {"reward": [1, 2], "rounds": 2},
        "dropped": [1, 2, 3],
        "error": [1.0, 0.5, 0.25],
        "broken": [1.0, None, 0.5],
        "unknown": [None, None],
        "of_rows": [0.0] * 6,
        "none": [],
    }
    panels = facts.step_panels(with_trace(small_page(), trace, ("of_rows",)))
    lines = {panel: list(lines) for panel, lines in panels.items()}
    assert lines == {
        "cost": ["real", "simulated"],
        "λ": [""],
        "training: reward": [""],
        "error": [""],
        "broken": [""],
        "none": [""],
    }
    assert panels["error"][""].tolist() == [1.0, 0.5, 0.25]
    assert np.isnan(panels["broken"][""]).tolist() == [False, True, False]
    assert facts.step_panels(with_trace(small_page(), {"steps": [1, 2]})) == {}
    as_many_steps_as_rows = with_trace(small_page(), {"error": [1.0] * 6})
    assert list(facts.step_panels(as_many_steps_as_rows)) == ["error"]
    assert "error" not in facts.row_values(as_many_steps_as_rows)


def test_single_values_of_the_trace_are_recorded(small_page: Callable[..., Page]) -> None:
    trace = {
        "bound": 0.5,
        "form": "top",
        "gap": None,
        "references": ["target", "anchor"],
        "correlation": {"utility": 0.1, "deep": {"a": 1}},
        "dropped": [1, 2],
        "steps": {"λ": 1.0},
    }
    recorded = facts.recorded(with_trace(small_page(), trace))
    assert recorded == {
        "bound": 0.5,
        "form": "top",
        "gap": None,
        "references": ["target", "anchor"],
        "correlation: utility": 0.1,
    }


def test_mappings_and_lists_of_mappings_are_tables(small_page: Callable[..., Page]) -> None:
    trace = {
        "statistics": {"norm": {"pool": 1.0, "chosen": 2.0}, "max": {"pool": 3.0}},
        "clusters": [{"rows": 3, "replay": False}, {"rows": 4, "replay": True}],
        "deep": {"a": {"b": {"c": 1}}},
        "mixed": [{"rows": 3}, 4],
        "empty": {"a": {}},
        "flat": {"a": 1},
        "density": {"a": {"b": 1}},
    }
    page = with_trace(small_page(), trace)
    assert facts.tables(page) == {
        "statistics": (["pool", "chosen"], [("norm", [1.0, 2.0]), ("max", [3.0, None])]),
        "clusters": (["rows", "replay"], [("1", [3, False]), ("2", [4, True])]),
    }
    assert facts.recorded(page) == {"flat: a": 1}
