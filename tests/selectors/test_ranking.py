import numpy as np
import pytest
import scipy.stats
import torch
from hypothesis import given
from hypothesis import strategies as st

from gradsieve.selectors.ranking import (
    best_first,
    deviation,
    exact_mean,
    id_order,
    length_check,
    pay,
    percentile,
    quantile_strata,
    spearman,
    split_half,
    spread,
)
from gradsieve.types import ArrayGradients, Budget

numbers = st.lists(st.floats(-5, 5, allow_subnormal=False).map(lambda x: round(x, 1)), min_size=2, max_size=30)


def pool(tokens):
    return ArrayGradients([f"{i}" for i in range(len(tokens))], torch.ones(len(tokens), 1), {"tokens": torch.tensor(tokens)})


def test_equal_scores_come_by_id_and_rows_without_a_score_do_not_come():
    by_id = id_order(["d", "b", "c", "a", "e"])
    assert by_id.tolist() == [3, 1, 2, 0, 4]
    assert best_first(torch.tensor([1.0, 1.0, 7.0, 1.0, torch.nan]), by_id).tolist() == [2, 3, 1, 0]


def test_strata_have_equal_size_and_ascend():
    strata = quantile_strata(torch.tensor([5.0, 1.0, 1.0, 9.0, 3.0, 1.0]), 3, torch.tensor([5, 4, 3, 2, 1, 0]))
    assert strata.tolist() == [2, 1, 0, 2, 1, 0]  # of the three 1.0 rows the first two by id are 5 and 2


def test_spread_by_hand():
    # Strata of 4 and 2 rows: places 1/8, 3/8, 5/8, 7/8 and 1/4, 3/4.
    order, strata = torch.tensor([0, 1, 2, 3, 4, 5]), torch.tensor([0, 0, 0, 0, 1, 1])
    assert spread(order, strata).tolist() == [0, 4, 1, 2, 5, 3]
    assert spread(order.flip(0), strata).tolist() == [3, 5, 2, 1, 4, 0]
    # Strata of 5 and 1 rows: the single row belongs in the middle, after the larger stratum's row of the same place.
    assert spread(order, torch.tensor([0, 0, 0, 0, 0, 1])).tolist() == [0, 1, 2, 5, 3, 4]


@given(st.lists(st.integers(0, 4), min_size=1, max_size=40), st.randoms(use_true_random=False))
def test_every_prefix_of_a_spread_order_is_proportional_and_keeps_the_order_within_strata(labels, random):
    strata = torch.tensor(labels)
    order = list(range(len(labels)))
    random.shuffle(order)
    result = spread(torch.tensor(order), strata).tolist()
    assert sorted(result) == sorted(order)
    for stratum in set(labels):
        assert [r for r in result if labels[r] == stratum] == [r for r in order if labels[r] == stratum]
        for k in range(len(result) + 1):
            share = k * labels.count(stratum) / len(labels)
            # Webster can stray from the quota by more than one only with many strata of very unequal size
            assert abs(sum(labels[r] == stratum for r in result[:k]) - share) < 2


def test_how_many_rows_a_stratum_gets_does_not_depend_on_the_order():
    strata = torch.arange(12) % 4
    for seed in range(20):
        order = torch.randperm(12, generator=torch.Generator().manual_seed(seed))
        assert sorted(strata[spread(order, strata)[:6]].tolist()) == [0, 0, 1, 1, 2, 3]


@pytest.mark.parametrize(
    ("budget", "order", "rows", "note"),
    [
        ("2", [2, 0, 1], [2, 0], None),
        ("3", [2, 0], [2, 0], "2 examples are chosen of the 3 the budget asks for"),
        ("30tok", [2, 0], [2, 0], None),
        ("60tok", [2, 0], [2, 0], "spend 30 of the budget's 60 tokens: no other eligible example is short enough"),
        ("40tok", [2, 3, 1], [2, 1], None),
        ("45tok", [3, 2, 1, 0], [3, 0], "spend 40 of the budget's 45 tokens: the shortest of the others has 20"),
        ("15tok", [3], [], "the chosen 0 examples spend 0 of the budget's 15 tokens: the shortest of the others has 30"),
    ],
)
def test_the_budget_is_spent_in_the_order_and_a_shortfall_is_noted(budget, order, rows, note):
    got, notes = pay(torch.tensor(order), pool([10, 20, 20, 30]), Budget.parse(budget))
    assert got.tolist() == rows
    assert len(notes) == (note is not None)
    assert note is None or note in notes[0]


def test_a_mean_does_not_depend_on_the_order():
    x = torch.tensor([1e16, 1.0, -1e16, torch.nan, 1.0], dtype=torch.float64)
    assert exact_mean(x) == exact_mean(x.flip(0)) == 0.5
    assert np.isnan(exact_mean(x[:0]))
    assert deviation(torch.tensor([1.0, 3.0])) == 1.0


@given(numbers, st.floats(0, 100))
def test_percentiles_are_numpys(values, q):
    x = torch.tensor([*values, torch.nan], dtype=torch.float64)
    assert percentile(x, q) == pytest.approx(np.percentile(values, q), abs=1e-12)


@given(numbers, st.data())
def test_rank_correlation_is_scipys(values, data):
    others = data.draw(st.lists(st.integers(0, 5), min_size=len(values), max_size=len(values)))
    rho = spearman(torch.tensor(values), torch.tensor(others))
    if len(set(values)) == 1 or len(set(others)) == 1:
        assert np.isnan(rho)
    else:
        assert rho == pytest.approx(scipy.stats.spearmanr(values, others).statistic, abs=1e-12)


def test_a_score_that_follows_length_is_called_out():
    length = torch.arange(10)
    g = ArrayGradients([str(i) for i in range(10)], torch.ones(10, 1), {"completion_tokens": length})
    mixed = torch.tensor([3.0, 1, 4, 1, 5, 9, 2, 6, 5, torch.nan]) * torch.tensor([1, -1] * 5)
    rho, notes = length_check({"utility": -length.double().exp(), "other": mixed}, g)
    assert rho["utility"] == pytest.approx(-1)
    assert abs(rho["other"]) < 0.5
    assert len(notes) == 1
    assert "utility is largely a measure of length" in notes[0]
    assert "-1.00" in notes[0]
    assert length_check({"utility": length.double()}, pool([1] * 10)) == ({}, [])
    over, under = [1.0, 0, 4, 3, 7, 9, 8, 2, 6, 5], [0.0, 3, 6, 1, 9, 2, 8, 4, 5, 7]  # ρ 0.515 and 0.491
    assert [len(length_check({"utility": torch.tensor(score)}, g)[1]) for score in (over, under)] == [1, 0]


def test_halves_that_share_a_direction_rank_alike_and_halves_of_noise_do_not():
    rng = torch.Generator().manual_seed(0)
    G, signal = torch.randn(200, 32, generator=rng), torch.randn(32, generator=rng)
    noise = torch.randn(3, 2, 32, generator=rng)
    halves = {"clear": signal + 0.1 * noise, "rough": signal + noise, "noise": noise}
    candidates = ArrayGradients([f"{i}" for i in range(200)], G, {})
    found = split_half(candidates, halves)
    unit = torch.nn.functional.normalize(G, dim=1)
    for name, sides in halves.items():
        naive = [scipy.stats.spearmanr((unit @ a).numpy(), (unit @ b).numpy()).statistic for a, b in sides]
        assert found[name] == pytest.approx(np.mean(naive), abs=1e-6)
    assert found["clear"] > 0.95 > found["rough"] > 0.3 > abs(found["noise"])
