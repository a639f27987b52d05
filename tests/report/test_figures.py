from __future__ import annotations

import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from gradsieve.report import figures
from gradsieve.report.figures import Floats

reals = st.floats(-1e12, 1e12).map(lambda v: 0.0 if abs(v) < 1e-9 else v)


def points(path: str) -> list[tuple[float, float]]:
    """The coordinates of a path of absolute moves and lines."""
    return [(float(x), float(y)) for x, y in re.findall(r"[ML](-?[\d.]+) (-?[\d.]+)", path)]


@given(arrays(np.float64, st.integers(1, 40), elements=reals))
def test_an_axis_holds_every_value_and_its_ticks(values: Floats) -> None:
    axis = figures.axis(values)
    places = axis.place(values)
    assert (places >= -1e-9).all()
    assert (places <= 1 + 1e-9).all()
    assert 1 <= len(axis.ticks) <= 12
    assert all(-1e-6 <= p <= 1 + 1e-6 for p in axis.place(axis.ticks))
    assert list(axis.ticks) == sorted(axis.ticks)
    order = np.argsort(values, kind="stable")
    assert (np.diff(places[order]) >= -1e-9).all()


@given(st.floats(1e-6, 1e6), st.integers(0, 100))
def test_tick_labels_differ(width: float, start: int) -> None:
    axis = figures.axis(np.array([start * width, (start + 1) * width]))
    assert len(set(axis.texts)) == len(axis.texts) >= 2


def test_ticks_by_hand() -> None:
    axis = figures.axis(np.array([0.0, 0.5, 1.0]), pad=0)
    assert axis.texts == ("0", "0.2", "0.4", "0.6", "0.8", "1.0")
    assert axis.marks()[1] == ("20.00", "0.2")
    assert figures.axis(np.array([-3.0, 0.1, 3.0]), pad=0).texts == ("−3", "−2", "−1", "0", "1", "2", "3")


def test_whole_numbers_get_whole_ticks() -> None:
    assert figures.axis(np.array([1.0, 2.0, 3.0]), pad=0).texts == ("1", "2", "3")


def test_ticks_far_from_zero_are_told_apart() -> None:
    assert figures.axis(np.array([1.0e7, 1.01e7]), pad=0).texts[:3] == ("1.000×10⁷", "1.002×10⁷", "1.004×10⁷")
    assert figures.axis(np.array([0.0, 5e-5]), pad=0).texts == ("0", "1×10⁻⁵", "2×10⁻⁵", "3×10⁻⁵", "4×10⁻⁵", "5×10⁻⁵")


def test_a_skewed_positive_column_gets_a_logarithmic_axis_and_others_do_not() -> None:
    skewed = np.array([1.0, 2.0, 3.0, 100.0])
    assert figures.axis(skewed).log
    assert not figures.axis(skewed, allow_log=False).log
    assert not figures.axis(np.r_[0.0, skewed]).log
    assert not figures.axis(np.array([10.0, 10.0, 110.0])).log  # 11 times the median, but 11 times the smallest only
    assert not figures.axis(np.array([1.0, 20.0, 100.0])).log  # 100 times the smallest, but 5 times the median only
    axis = figures.axis(skewed, pad=0)
    assert axis.place([1.0, 10.0, 100.0, 0.0, -1.0]) == pytest.approx([0.0, 0.5, 1.0, np.nan, np.nan], nan_ok=True)
    assert axis.texts == ("1", "3", "10", "30", "100")


def test_a_single_value_lies_in_the_middle() -> None:
    assert figures.axis(np.array([5.0, 5.0])).place(5.0) == pytest.approx(0.5)
    assert figures.axis(np.array([0.0])).place(0.0) == pytest.approx(0.5)


def test_dots_and_lines_leave_out_what_has_no_place() -> None:
    x, y = np.array([0.0, 0.5, np.nan, 1.0]), np.array([0.0, 0.25, 0.5, 1.0])
    assert figures.dots(x, y) == "M0 1000h0M500 750h0M1000 0h0"
    assert figures.line(x, y) == "M0 1000L500 750M1000 0"
    assert figures.area(np.array([0.0, 1.0]), np.array([0.5, 1.0])) == "M0 1000L0 500L1000 0L1000 1000Z"


def enclosed(path: str) -> float:
    """Area of the rectangles under the outlines of a path, by the shoelace formula, in units of the figure."""
    total = 0.0
    for run in path.split("M")[1:]:
        corners = points("M" + run)
        total += sum(x0 * y1 - x1 * y0 for (x0, y0), (x1, y1) in zip(corners, corners[1:] + corners[:1], strict=True)) / 2
    return abs(total) / figures.SIDE**2


@settings(max_examples=40)
@given(arrays(np.float64, st.integers(3, 60), elements=st.floats(-50, 50).map(lambda v: round(v, 3))), st.integers(1, 3))
def test_histogram_outlines_enclose_all_of_the_pool_and_all_of_the_selection(values: Floats, every: int) -> None:
    chosen = np.arange(len(values)) % every == 0
    h = figures.histogram(values, chosen)
    assert h is not None
    if not h.x.log:  # bins of equal width: the share of each is its height in units of the tallest
        width = next(abs(b[0] - a[0]) for a, b in zip(points(h.pool), points(h.pool)[1:], strict=False) if a[0] != b[0])
        for path in (h.pool, h.chosen):
            assert enclosed(path) * h.tallest == pytest.approx(width / figures.SIDE, rel=0.03)


def test_histogram_by_hand() -> None:
    values, chosen = np.array([1.0, 1.0, 2.0, 4.0, np.nan]), np.array([True, False, False, False, True])
    h = figures.histogram(values, chosen)
    assert h is not None
    # Bins 0.5-1.5, …, 3.5-4.5; the pool has shares 1/2, 1/4, 0, 1/4; the selection all in the first.
    assert h.tallest == 1.0
    assert points(h.pool) == [(0, 1000), (0, 500), (250, 500), (250, 750), (500, 750), (500, 1000)] + [
        (750, 1000),
        (750, 750),
        (1000, 750),
        (1000, 1000),
    ]
    assert points(h.chosen) == [(0, 1000), (0, 0), (250, 0), (250, 1000)]
    assert h.pool_median == "250.0"
    assert h.chosen_median == "125.0"


def test_histogram_without_values_or_without_a_selection() -> None:
    none = np.zeros(3, dtype=bool)
    assert figures.histogram(np.full(3, np.nan), none) is None
    h = figures.histogram(np.arange(3.0), none)
    assert h is not None
    assert h.chosen == ""
    assert h.chosen_median is None


def test_a_straight_line_is_cut_at_the_frame() -> None:
    unit = figures.Axis(0.0, 1.0, False, (), ())
    assert figures.straight((1.0, 1.0, 0.5), unit, unit) == "M0 500L500 1000"
    assert figures.straight((0.0, 2.0, 1.0), unit, unit) == "M0 500L1000 500"
    assert figures.straight((2.0, 0.0, 1.0), unit, unit) == "M500 1000L500 0"
    assert figures.straight((1.0, 1.0, 5.0), unit, unit) == ""
    assert figures.straight((1.0, 1.0, 0.5), figures.Axis(0.1, 1.0, True, (), ()), unit) == ""
    shifted = figures.Axis(-1.0, 3.0, False, (), ())
    assert figures.straight((1.0, 1.0, 2.0), shifted, shifted) == "M0 0L1000 1000"


def test_a_density_is_scaled_and_its_band_and_marks_are_placed() -> None:
    grid = np.array([0.0, 5.0, 10.0])
    c = figures.curve(grid, np.array([0.0, 2.0, 1.0]), np.array([2.5, 5.0]), np.array([5.0, np.nan, 5.0, 10.0]))
    assert points(c.outline)[2] == (500, pytest.approx(1000 - 1000 / 1.05, abs=0.1))
    assert c.band == ("250.0", "250.0")
    assert c.ticks == "M500.0 1000v-60M1000.0 1000v-60"
    assert figures.curve(grid, np.ones(3), None, np.empty(0)).band is None


def test_steps_share_a_panel_and_long_ones_are_thinned_to_a_stated_step() -> None:
    panel = figures.steps("reward", {"a": np.array([1.0, np.nan, 3.0]), "b": np.array([2.0, 4.0]), "none": np.full(3, np.nan)})
    assert panel is not None
    assert [name for name, _ in panel.lines] == ["a", "b"]
    assert panel.lines[0][1].count("M") == 2
    assert panel.lines[1][1].count("L") == 1
    assert panel.ends == ((1.0, 3.0), (2.0, 4.0))
    assert panel.every == 1
    assert figures.steps("none", {"": np.array([np.nan, 1.0])}) is None
    long = figures.steps("long", {"": np.arange(5000.0)})
    assert long is not None
    assert long.every == 9
    drawn = points(long.lines[0][1])
    assert len(drawn) == 5000 // 9 + 2
    assert drawn[-1][0] == 1000


def test_a_trade_off_is_drawn_with_its_bound_and_the_taken_point() -> None:
    path = np.array([[0.0, 0.2, 0.9], [1.0, 0.1, 0.6], [2.0, 0.0, 0.1]])
    t = figures.trade_off(path, path[1], 0.15)
    assert t.path.count("L") == 2
    assert t.taken == figures.dots(t.x.place([0.1]), t.y.place([0.6]))
    assert t.bound == f"{1000 * float(t.x.place(0.15)):.1f}"
    alone = figures.trade_off(path, None, None)
    assert alone.taken == ""
    assert alone.bound is None
