"""Curiosity against a plain greedy search and against the best subset."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gradsieve.errors import InvalidArgument
from gradsieve.selectors.curiosity import Curiosity, most_informative
from gradsieve.types import ArrayGradients, Budget, Problem


def run(method, problem, budget):
    return method.select(problem, Budget.parse(budget), torch.Generator())


def problem_of(G, T, ids=None, **columns):
    G, T = torch.as_tensor(G, dtype=torch.float32), torch.as_tensor(T, dtype=torch.float32)
    ids = ids or [f"{i:03d}" for i in range(len(G))]
    return Problem(ArrayGradients(ids, G, columns), ArrayGradients([f"t{i}" for i in range(len(T))], T))


def value(X, noise):
    """log det(I + Σ x x'/σ²), from scratch."""
    return float(torch.logdet(torch.eye(X.shape[1], dtype=torch.float64) + X.T @ X / noise))


def greedy_naive(X, noise, k, price=None, purse=0.0, per_price=False):
    chosen = []
    for _ in range(k):
        left = purse - sum(price[i] for i in chosen) if price else 0.0
        open_ = [i for i in range(len(X)) if i not in chosen and (not price or price[i] <= left)]
        gains = {i: value(X[[*chosen, i]], noise) - value(X[chosen], noise) for i in open_}
        if not open_ or max(gains.values()) < 1e-9:
            break
        chosen.append(max(open_, key=lambda i: (round(gains[i] / (price[i] if per_price else 1), 10), -i)))
    return chosen


def prices_of(seed, n):
    rng = torch.Generator().manual_seed(100 + seed)
    return (torch.randn(n, generator=rng).mul(1.2).exp() * 20).ceil().double()


def rows_of(seed, n, r):
    rng = torch.Generator().manual_seed(seed)
    X = torch.randn(n, r, generator=rng, dtype=torch.float64) * torch.tensor([3.0, 1.0, 0.3, 0.1, 1.0][:r], dtype=torch.float64)
    X[n // 2] = X[0]
    return X


@pytest.mark.parametrize("noise", [0.01, 1.0, 30.0])
def test_lazy_gains_give_the_greedy_choice_and_its_value(noise):
    for seed in range(12):
        X = rows_of(seed, 40, 1 + seed % 5)
        found = most_informative(X, noise, 15)
        assert found.rows.tolist() == greedy_naive(X, noise, 15)
        assert found.values == pytest.approx([value(X[found.rows[: t + 1]], noise) for t in range(15)])
        assert found.by == "gain"


def test_with_prices_it_is_the_better_of_the_plain_greedy_choices_by_gain_and_by_gain_per_price():
    won = []
    for seed in range(40):
        X, price = rows_of(seed, 30, 1 + seed % 5), prices_of(seed, 30)
        purse = float(price.sum() * (0.05 + 0.01 * seed))
        twins = {
            by: greedy_naive(X, 1.0, 30, price.tolist(), purse, per_price)
            for by, per_price in (("gain", False), ("gain per token", True))
        }
        reached = {by: value(X[rows], 1.0) for by, rows in twins.items()}
        found = most_informative(X, 1.0, 30, price, purse)
        assert found.rows.tolist() == twins[found.by]
        assert found.values[-1] == pytest.approx(max(reached.values()))
        assert price[found.rows].sum() <= purse
        won.append(found.by)
    assert 0 < won.count("gain") < 20


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 4), st.sampled_from([0.05, 1.0, 20.0]))
def test_it_reaches_63_percent_of_the_best_subset(seed, k, noise):
    X = rows_of(seed, 9, 3)
    values = most_informative(X, noise, k).values
    best = max(value(X[list(subset)], noise) for subset in itertools.combinations(range(9), k))
    assert (1 - 1 / math.e) * best <= values[-1] <= best + 1e-9


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10_000), st.floats(0.05, 0.9), st.sampled_from([0.05, 1.0, 20.0]))
def test_with_prices_it_reaches_40_percent_of_the_best_subset_that_can_be_paid_for(seed, share, noise):
    X, price = rows_of(seed, 9, 3), prices_of(seed, 9)
    purse = max(float(price.min()), share * float(price.sum()))
    subsets = itertools.chain.from_iterable(itertools.combinations(range(9), k) for k in range(1, 10))
    best = max(value(X[list(subset)], noise) for subset in subsets if price[list(subset)].sum() <= purse)
    assert 0.405 * best <= most_informative(X, noise, 9, price, purse).values[-1] <= best + 1e-9


def test_where_either_rule_alone_fails_the_other_is_kept():
    # a short row with a little gain, and a long one that tells a thousand times as much and fits alone
    X = torch.tensor([[0.1, 0.0], [10.0, 0.0]], dtype=torch.float64)
    long = most_informative(X, 1.0, 2, torch.tensor([1.0, 20_000.0]).double(), 20_000.0)
    assert (long.rows.tolist(), long.by) == ([1], "gain")
    # ten short rows in ten directions, and a long one that tells a little more than each of them
    X = torch.eye(11, dtype=torch.float64)
    X[10] *= 1.1
    short = most_informative(X, 1.0, 11, torch.tensor([10.0] * 10 + [100.0]).double(), 100.0)
    assert (short.rows.tolist(), short.by) == (list(range(10)), "gain per token")


def test_many_rows_are_searched_as_few_are():
    X = rows_of(3, 3000, 5)
    chosen = []
    for pick in most_informative(X, 0.5, 6).rows.tolist():
        M = torch.eye(5, dtype=torch.float64) + X[chosen].T @ X[chosen] / 0.5
        gains = torch.einsum("ni,ij,nj->n", X, M.inverse(), X)
        gains[chosen] = 0
        assert gains[pick] == pytest.approx(float(gains.max()))
        chosen.append(pick)


def test_a_case_solved_by_hand():
    # the target spans both axes; the rows along the first axis are copies, so the second pick turns to the other axis
    problem = problem_of([[2.0, 0.0], [5.0, 0.0], [0.0, 1.0]], [[1.0, 0.0], [0.0, 0.9]])
    selection = run(Curiosity(noise=0.5), problem, 3)  # mean ‖x‖² is 1, σ² = 1/2
    assert selection.rows.tolist() == [0, 2, 1]
    assert selection.trace["information"] == pytest.approx([math.log(3), 2 * math.log(3), math.log(3) + math.log(5)], abs=1e-6)
    assert selection.scores.tolist() == pytest.approx([math.log(3)] * 3, abs=1e-6)
    assert selection.trace["directions"] == 2
    assert selection.trace["energy"] == pytest.approx(1)


def test_noise_is_a_share_of_the_mean_square_in_the_targets_directions():
    selection = run(Curiosity(noise=0.4), problem_of([[1.0, 1.0], [2.0, 0.0]], [[1.0, 0.0]]), 1)  # ‖x‖² is 1/2 and 1
    assert selection.scores.tolist() == pytest.approx([math.log(1 + 0.5 / 0.3), math.log(1 + 1 / 0.3)], abs=1e-6)
    assert selection.trace["information"] == pytest.approx([math.log(1 + 1 / 0.3)], abs=1e-6)


def test_only_the_targets_directions_count():
    G = [[1.0, 0.0, 3.0], [1.0, 0.0, 0.0], [0.0, 0.0, 1.0]]
    selection = run(Curiosity(), problem_of(G, [[1.0, 0.0, 0.0]]), 3)
    assert selection.rows.tolist() == [1, 0]
    assert selection.scores[2] == 0
    assert "after 2 examples no other tells anything about the target's 1 directions" in selection.notes
    assert any("2 examples are chosen of the 3" in note for note in selection.notes)


def test_a_lower_rank_looks_at_the_strongest_directions_only():
    T = [[1.0, 0.1], [1.0, -0.1], [0.0, 1.0]]
    G = [[0.0, 1.0], [0.9, 0.1], [1.0, 0.0]]
    one, two = (run(Curiosity(rank=rank, noise=0.01), problem_of(G, T), 2) for rank in (1, 2))
    assert one.trace["directions"] == 1
    assert 0 not in one.rows
    assert one.trace["energy"] < two.trace["energy"] == pytest.approx(1)
    assert 0 in two.rows


def test_more_noise_repeats_the_strong_direction_longer():
    torch.manual_seed(0)
    G = torch.cat([torch.randn(30, 4) * 0.1 + torch.tensor([1.0, 0, 0, 0]), torch.randn(30, 4)])
    T = torch.eye(4)
    few, much = (run(Curiosity(noise=noise), problem_of(G, T), 20).trace["information"][-1] for noise in (0.01, 10.0))
    assert few > much
    rows = run(Curiosity(noise=1e-3), problem_of(G, T), 8).rows
    assert (rows >= 30).sum() >= 4


def test_picks_against_the_target_are_noted():
    selection = run(Curiosity(), problem_of([[-1.0, 0.2], [-1.0, 0.1], [0.1, 0.1]], [[1.0, 0.0]]), 2)
    assert selection.trace["against_target"] == 1
    assert selection.trace["mean_cosine"] < -0.9
    assert "100% of the picks point against the target's mean gradient: information does not know signs" in selection.notes
    fine = run(Curiosity(), problem_of([[1.0, 0.2], [1.0, 0.1]], [[1.0, 0.0]]), 2)
    assert fine.notes == ()


def test_a_zero_target_is_left_out_with_a_note():
    selection = run(Curiosity(), problem_of([[1.0, 0.2]], [[1.0, 0.0], [0.0, 0.0]]), 1)
    assert any("1 of 2 targets have a zero gradient" in note and "t1" in note for note in selection.notes)


def test_a_token_budget_passes_over_what_does_not_fit_and_says_which_rule_it_kept():
    G = [[1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.6, 0.3, 0.5]]
    problem = problem_of(G, [[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]], tokens=torch.tensor([10.0, 90.0, 10.0]))
    selection = run(Curiosity(), problem, "50tok")
    assert selection.rows.tolist() == [0, 2]
    assert "spend 20 of the budget's 50 tokens" in selection.notes[-1]
    assert not any("tells anything" in note for note in selection.notes)
    assert len(selection.trace["information"]) == 2
    assert selection.trace["by"] == "gain"
    both = run(Curiosity(), problem, "100tok")
    assert both.rows.tolist() == [0, 1]


def test_a_pool_orthogonal_to_the_target_is_refused():
    with pytest.raises(InvalidArgument, match="curiosity needs candidates that are not orthogonal to the target, got none; "):
        run(Curiosity(), problem_of([[0.0, 1.0]], [[1.0, 0.0]]), 1)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"rank": 0}, "rank must be at least 1, got 0; "),
        ({"noise": 0.0}, "noise must be above 0 and finite, got 0.0; "),
        ({"noise": math.inf}, "noise must be above 0 and finite, got inf; "),
    ],
)
def test_settings_that_break_a_rule_are_refused(wrong, message):
    with pytest.raises(InvalidArgument, match=message):
        Curiosity(**wrong)
