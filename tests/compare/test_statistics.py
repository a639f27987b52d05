"""The bootstrap against one written from its definition, its coverage on data whose truth is known, and Pareto by hand."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from gradsieve.compare.statistics import Draws, estimate, front, half_width, replicates, tally
from gradsieve.errors import InvalidArgument


def bootstrap_naive(table: np.ndarray, seeds: np.ndarray, items: np.ndarray) -> list[float]:
    """Eq. BOOT and STRETCH with loops: every draw written out as a list of seeds and items."""
    s_count, i_count = table.shape
    means = []
    for drawn_seeds, drawn_items in zip(seeds, items, strict=True):
        rows = [s for s in range(s_count) for _ in range(int(drawn_seeds[s]))]
        columns = [i for i in range(i_count) for _ in range(int(drawn_items[i]))]
        means.append(sum(table[s, i] for s in rows for i in columns) / (len(rows) * len(columns)))
    if s_count == 1:
        return means
    grand = table.mean()
    m_s = i_count * sum((table[s].mean() - grand) ** 2 for s in range(s_count)) / (s_count - 1)
    m_i = s_count * sum((table[:, i].mean() - grand) ** 2 for i in range(i_count)) / (i_count - 1)
    rest = [table[s, i] - table[s].mean() - table[:, i].mean() + grand for s in range(s_count) for i in range(i_count)]
    m_e = sum(x**2 for x in rest) / ((s_count - 1) * (i_count - 1))
    top = max(m_s + m_i - m_e, m_s, m_i)
    freedom = top**2 / (m_s**2 / (s_count - 1) + m_i**2 / (i_count - 1) + m_e**2 / ((s_count - 1) * (i_count - 1)))
    freedom = max(freedom, s_count - 1) if s_count < i_count else max(freedom, i_count - 1)
    wide = stats.t.ppf(0.975, freedom) * math.sqrt(top / (s_count * i_count))
    center = sum(means) / len(means)
    spread = math.sqrt(sum((m - center) ** 2 for m in means) / len(means))
    return [grand + (m - grand) * wide / (stats.norm.ppf(0.975) * spread) for m in means]


@pytest.mark.parametrize(("seeds", "items"), [(1, 7), (2, 5), (3, 12), (5, 4)])
@pytest.mark.parametrize("apart", [(0.0, 0.0), (2.0, 0.0), (0.0, 2.0), (2.0, 2.0)])
def test_the_bootstrap_is_the_one_written_with_loops(seeds: int, items: int, apart: tuple[float, float]) -> None:
    rng = np.random.default_rng(seeds)
    table = rng.normal(0.3, 1, (seeds, items)) + rng.normal(0, apart[0], (seeds, 1)) + rng.normal(0, apart[1], (1, items))
    draws = Draws.of(seeds, 60)
    counts = draws.items("x", items)
    slow = bootstrap_naive(table, draws.seeds, counts)
    assert replicates(table, draws, counts) == pytest.approx(slow)
    found = estimate(table, draws, counts)
    assert (found.low, found.high) == pytest.approx(tuple(np.quantile(slow, [0.025, 0.975])))
    assert found.mean == pytest.approx(table.mean())
    assert (found.seeds, found.items) == (seeds, items)


def test_draws_take_as_many_as_there_are_and_do_not_change() -> None:
    draws = Draws.of(3, 50, seed=4)
    assert (draws.seeds.sum(1) == 3).all()
    counts = draws.items("law", 10)
    assert (counts.sum(1) == 10).all()
    assert (counts == Draws.of(3, 50, seed=4).items("law", 10)).all()
    assert (counts != draws.items("math", 10)).any()
    assert (draws.seeds != Draws.of(3, 50, seed=5).seeds).any()


def coverage(seeds: int, items: int, sd_seeds: float, sd_items: float, sd_rest: float, trials: int = 400) -> float:
    rng = np.random.default_rng(0)
    draws = Draws.of(seeds, 300)
    counts = draws.items("x", items)
    hits = 0
    for _ in range(trials):
        of_seeds, of_items = rng.normal(0, sd_seeds, (seeds, 1)), rng.normal(0, sd_items, (1, items))
        found = estimate(of_seeds + of_items + rng.normal(0, sd_rest, (seeds, items)), draws, counts)
        hits += found.low <= 0 <= found.high
    return hits / trials


@pytest.mark.parametrize("sd", [(1, 1, 1), (0.02, 1, 1), (0.1, 1, 1)], ids=["seeds rule", "items rule", "both"])
def test_intervals_of_three_seeds_hold_the_truth_about_as_often_as_they_say(sd: tuple[float, float, float]) -> None:
    assert 0.90 <= coverage(3, 40, *sd) <= 0.985


def test_few_items_leave_an_interval_of_a_sensible_width() -> None:
    rng = np.random.default_rng(0)
    wide = [half_width(rng.normal(0, 1, (3, 4))) for _ in range(500)]
    assert max(wide) < 5  # without a least ν a hundredth of them was above 10¹⁰
    draws = Draws.of(3, 200)
    found = estimate(np.eye(3), draws, draws.items("x", 3))  # neither seeds nor items differ in their means
    assert (found.low < 0 < found.high, found.verdict) == (True, "tie")
    assert half_width(np.eye(3)) == pytest.approx(stats.t.ppf(0.975, 4) * math.sqrt(0.5 / 9))


def test_a_plain_bootstrap_of_three_seeds_would_miss_the_truth_far_too_often() -> None:
    rng = np.random.default_rng(0)
    draws = Draws.of(3, 300).seeds / 3
    hits = 0
    for _ in range(400):
        low, high = np.quantile(draws @ rng.normal(0, 1, 3), [0.025, 0.975])
        hits += low <= 0 <= high
    assert hits / 400 < 0.82


def test_an_interval_of_one_seed_is_not_judged() -> None:
    draws = Draws.of(1, 200)
    found = estimate(np.full((1, 9), 5.0) + np.arange(9) / 10, draws, draws.items("x", 9))
    assert found.low > 0
    assert found.verdict == "unjudged"


def test_nothing_is_better_whose_interval_holds_zero() -> None:
    draws = Draws.of(3, 500)
    counts = draws.items("x", 30)
    noise = np.random.default_rng(0).normal(0, 1, (3, 30))
    noise -= noise.mean()
    verdicts = {
        name: estimate(noise + shift, draws, counts).verdict for name, shift in {"a": 2.0, "b": 0.05, "c": -2.0}.items()
    }
    assert verdicts == {"a": "win", "b": "tie", "c": "loss"}
    assert tally(list(verdicts.values())) == {"win": 1, "tie": 1, "loss": 1, "unjudged": 0}


def test_equal_differences_everywhere_have_an_interval_without_width() -> None:
    draws = Draws.of(3, 100)
    found = estimate(np.full((3, 6), 0.25), draws, draws.items("x", 6))
    assert (found.low, found.high) == pytest.approx((0.25, 0.25))
    assert found.verdict == "win"
    assert half_width(np.zeros((2, 3))) == 0


def test_values_that_are_missing_and_draws_of_others_are_refused() -> None:
    draws = Draws.of(2, 100)
    counts = draws.items("x", 3)
    with pytest.raises(InvalidArgument, match="table must be finite"):
        estimate(np.array([[1.0, np.nan, 2.0], [1.0, 1.0, 1.0]]), draws, counts)
    with pytest.raises(InvalidArgument, match="draws must be of 3 seeds and 3 items"):
        estimate(np.ones((3, 3)), draws, counts)
    with pytest.raises(InvalidArgument, match="seeds must be at least 1"):
        Draws.of(0, 10)


def test_the_front_by_hand() -> None:
    gain = np.array([0.0, 3.0, 2.0, 3.0, 1.0])
    forgetting = np.array([0.0, 2.0, 1.0, 3.0, 1.0])
    assert front(gain, forgetting).tolist() == [True, True, True, False, False]
    assert front(np.stack([gain, -gain]), np.stack([forgetting, forgetting])).tolist() == [
        [True, True, True, False, False],
        [True, False, False, False, False],
    ]


@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4)), min_size=1, max_size=8))
def test_the_front_is_what_nobody_beats(points: list[tuple[int, int]]) -> None:
    gain, forgetting = (np.array(v, dtype=float) for v in zip(*points, strict=True))
    slow = [not any(g >= a and f <= b and (g, f) != (a, b) for g, f in points) for a, b in points]
    assert front(gain, forgetting).tolist() == slow
