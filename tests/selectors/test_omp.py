"""The pursuit against a plain one with scipy's non-negative least squares, and against the published solver's rule."""

from __future__ import annotations

import functools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import nnls

from gradsieve.selectors.dense import squared_norms
from gradsieve.selectors.omp import _Pursuit, match_gradient
from gradsieve.selectors.refit import Support


def nnls_omp_naive(G, b, k, ridge):
    """GRAD-MATCH's pursuit as it is written: the largest product with the residual, then all weights anew under w ≥ 0."""
    rows, w, r = [], np.zeros(0), b
    while len(rows) < k:
        c = G @ r
        c[rows] = -np.inf
        best = int(np.argmax(c))
        if c[best] <= 1e-9 * np.linalg.norm(G[best]) * np.linalg.norm(r):
            break
        rows.append(best)
        A = np.vstack([G[rows].T, math.sqrt(ridge) * np.eye(len(rows))])
        w = nnls(A, np.concatenate([b, np.zeros(len(rows))]))[0]
        r = b - G[rows].T @ w
    return rows, w


def nnls_omp_refilling_naive(G, b, k, ridge, price=None, purse=0.0, per=0.5):
    """The same, but rows whose weight reaches zero leave, and free their place for another; gives the picks too.

    With prices, of those that fit the one with the largest product over price^per.
    """
    rows, w, r, picks = [], np.zeros(0), b, []
    while len(rows) < k:
        c = G @ r
        c[rows] = -np.inf
        if price is not None:
            c = np.where(price <= purse - price[rows].sum(), c * (price.min() / price) ** per, -np.inf)
            if not np.isfinite(c.max()):
                break
        best = int(
            np.argmax(c >= c.max() - 1e-9 * np.linalg.norm(G, axis=1).max() * np.linalg.norm(r))
        )  # equal rows: the first
        if c[best] <= 1e-5 * np.linalg.norm(G[best]) * np.linalg.norm(r):
            break
        picks.append(best)
        rows.append(best)
        A = np.vstack([G[rows].T, math.sqrt(ridge) * np.eye(len(rows))])
        w = nnls(A, np.concatenate([b, np.zeros(len(rows))]))[0]
        rows, w = [row for row, weight in zip(rows, w, strict=True) if weight > 0], w[w > 0]
        r = b - G[rows].T @ w
    return rows, w, picks


def published_naive(G, b, k, ridge, refit, tolerance=1e-4):
    """The published solver: k rounds that take the best row and refit; the weight of the first row is not regularised.

    It gives up when the best row is one it has.
    """
    rows, w, r = [], np.zeros(0), b
    for _ in range(k):
        if np.linalg.norm(r) < tolerance * np.linalg.norm(b):
            break
        best = int(np.argmax(G @ r))
        if best in rows:
            break
        rows, w = refit(G, b, [*rows, best], ridge)
        r = b - G[rows].T @ w
    return rows, w


def dropping(G, b, rows, ridge):
    """The published solver's rule: solve without a sign, then drop the most negative weight and solve again."""
    w = np.array([G[rows[-1]] @ b / (G[rows[-1]] @ G[rows[-1]])])  # of one row alone, which is the first
    while len(rows) > 1:
        A = G[rows]
        w = np.linalg.lstsq(A @ A.T + ridge * np.eye(len(rows)), A @ b, rcond=None)[0]
        if w.min() >= 0:
            break
        rows.pop(int(np.argmin(w)))
        w = np.array([max(0.0, G[rows[0]] @ b / (G[rows[0]] @ G[rows[0]] + ridge))])
    return rows, w


def keeping(G, b, rows, ridge):
    """The published solver's other rule: rows never leave, and weights w ≥ 0 make ‖(AA' + ridge·I) w - A b‖ small."""
    A = G[rows]
    if len(rows) == 1:
        return rows, np.array([A[0] @ b / (A[0] @ A[0])])
    return rows, nnls(A @ A.T + ridge * np.eye(len(rows)), A @ b)[0]


def objective(G, b, rows, w, ridge):
    return math.sqrt(np.square(b - G[list(rows)].T @ w).sum() + ridge * np.square(w).sum())


def instance(seed):
    """Rows with a shared direction, in topics, some of them repeated; a vector that some topics explain in part."""
    rng = np.random.default_rng(seed)
    n, d = int(rng.integers(10, 250)), int(rng.integers(4, 60))
    topics = rng.normal(size=(4, d))
    G = rng.normal(size=(n, d)) + topics[rng.integers(4, size=n)] * rng.uniform(0, 2) + rng.normal(size=d) * rng.uniform(0, 1)
    G *= np.exp(0.3 * rng.normal(size=(n, 1)))
    G[rng.integers(n, size=n // 10)] = G[0]
    b = G[: n // 3].mean(0) + rng.normal(size=d) * rng.uniform(0, 1.5)
    return G.astype(np.float32).astype(np.float64), b, int(rng.integers(1, min(n, 2 * d)))


def solve(G, b, k, ridge, **settings):
    return match_gradient(torch.tensor(G).float(), torch.tensor(b), k, ridge=ridge, **settings)


@functools.cache
def ours_on_all(share, exchange):
    found = []
    for seed in range(100):
        G, b, k = instance(seed)
        ridge = share * np.square(G).sum(1).mean()
        ours = solve(G, b, k, ridge, exchange=exchange)
        found.append(objective(G, b, ours.rows.tolist(), ours.weights.numpy(), ridge))
    return found


def compare(share, twin, exchange=False):
    """Yields our objective over the twin's on the 100 instances; float32 gradients resolve 1e-6 of b."""
    for seed, value in enumerate(ours_on_all(share, exchange)):
        G, b, k = instance(seed)
        ridge = share * np.square(G).sum(1).mean()
        floor = 1e-6 * np.linalg.norm(b)
        yield (value + floor) / (objective(G, b, *twin(G, b, k, ridge), ridge) + floor)


@pytest.mark.parametrize("exchange", [False, True])
@pytest.mark.parametrize("share", [0.0, 0.5])
def test_it_is_within_one_percent_of_scipys_on_100_instances(share, exchange):
    assert max(compare(share, nnls_omp_naive, exchange=exchange)) < 1.01


@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 1.0])
def test_it_is_never_worse_than_the_published_rules_on_100_instances(share):
    for refit in (dropping, keeping):
        assert max(compare(share, functools.partial(published_naive, refit=refit), exchange=True)) < 1 + 1e-6


@pytest.mark.parametrize("refit", [dropping, keeping])
def test_at_a_tenth_of_the_ridge_the_published_rules_are_better_on_one_instance(refit):
    ratios = sorted(compare(0.1, functools.partial(published_naive, refit=refit), exchange=True))
    assert ratios[-2] < 1 + 1e-6
    assert 1.013 < ratios[-1] < 1.015


def test_without_exchange_the_published_rule_skips_the_first_ridge_with_luck_on_one_instance():
    ratios = sorted(compare(0.5, functools.partial(published_naive, refit=dropping)))
    assert ratios[-2] < 1 + 1e-6
    assert 1.01 < ratios[-1] < 1.02


def test_exchange_only_ever_lowers_the_objective():
    for share, low, high in ((0.0, 0.06, 0.08), (0.5, 0.009, 0.011)):
        plain, better = (ours_on_all(share, exchange) for exchange in (False, True))
        assert all(b <= p + 1e-9 for p, b in zip(plain, better, strict=True))
        assert sum(b < 0.999 * p for p, b in zip(plain, better, strict=True)) > 20
        assert low < np.mean([1 - b / p if p > 1e-6 else 0.0 for p, b in zip(plain, better, strict=True)]) < high


@pytest.mark.parametrize("ridge", [0.0, 1.0])
def test_the_gain_of_an_exchange_is_that_of_solving_without_the_one_and_with_the_other(ridge):
    rng = np.random.default_rng(0)
    A, F, b = rng.normal(size=(5, 12)), rng.normal(size=(7, 12)), rng.normal(size=12)

    def least(rows):
        w = np.linalg.solve(rows @ rows.T + ridge * np.eye(len(rows)), rows @ b)
        return w, np.square(b - rows.T @ w).sum() + ridge * np.square(w).sum()

    support = Support(12, ridge, 9)
    for i, row in enumerate(torch.tensor(A)):
        support.append(i, row, torch.tensor(b))
    w, value = least(A)
    gains = support.exchange_gains(torch.tensor(F), torch.tensor(F @ (b - A.T @ w)), torch.tensor(w))
    for out in range(5):
        for into in range(7):
            after = least(np.vstack([np.delete(A, out, 0), F[into]]))[1]
            assert float(gains[out, into]) == pytest.approx(value - after)


def test_a_place_that_an_exchange_leaves_free_is_filled():
    left = 0
    for seed in range(200):
        rng = np.random.default_rng(seed)
        G, b = rng.normal(size=(60, 12)).astype(np.float32).astype(np.float64), rng.normal(size=12)
        k, ridge = int(rng.choice([5, 10])), float(rng.choice([0.0, 0.05, 0.5])) * 12
        found = solve(G, b, k, ridge, exchange=True)
        if found.stop == "limit":
            assert len(found.rows) == k, seed
            left += len(found.picks) - found.exchanged > len(found.rows)
    assert left > 10  # rows did leave


def test_where_the_best_exchange_breaks_a_sign_another_is_tried(monkeypatch):
    G, b, k = instance(115)  # of 150 instances the only one
    tried = solve(G, b, k, 0.0, exchange=True).objective
    monkeypatch.setattr("gradsieve.selectors.omp.EXCHANGE_TRIES", 1)
    assert tried < 0.9 * solve(G, b, k, 0.0, exchange=True).objective


def test_there_are_no_more_exchanges_than_rows(monkeypatch):
    monkeypatch.setattr("gradsieve.selectors.omp.EXCHANGED", 1e-9)
    exchanged = []
    for seed in range(60):
        rng = np.random.default_rng(seed)
        G = rng.normal(size=(200, 30))
        exchanged.append(solve(G, rng.normal(size=30), 3, 0.0, exchange=True).exchanged)
    assert max(exchanged) == 3


def test_an_exchange_takes_the_first_of_equal_rows():
    exchanged = 0
    for seed in range(60):
        rng = np.random.default_rng(seed)
        G = np.repeat(rng.normal(size=(60, 12)), 3, axis=0).astype(np.float32).astype(np.float64)
        found = solve(G, rng.normal(size=12), 6, 0.0, exchange=True)
        assert not (found.rows % 3).any(), seed
        exchanged += found.exchanged
    assert exchanged > 60


def test_the_arrays_grow_by_half_and_never_beyond_the_limit():
    support = Support(200, 1.0, 70)
    rows, b = torch.randn(70, 200, generator=torch.Generator().manual_seed(0)).double(), torch.ones(200).double()
    for i, row in enumerate(rows):
        support.append(i, row, b)
        assert len(support._A) == len(support._K) == len(support._Q) <= max(16, 1.5 * (i + 1))
    assert len(support._A) == 70
    weights = torch.linalg.solve(rows @ rows.T + torch.eye(70), rows @ b)
    kept = support.exchange_gains(rows[:1], torch.zeros(1).double(), weights)
    assert kept.shape == (70, 1)
    assert torch.allclose(support._Q.T @ support._Q @ support._h, weights)


def test_an_exchange_by_hand():
    # the row most like b is taken first and leaves nothing that fits; the pair that makes b exactly does not hold it
    G, b = np.array([[1.0, 1.0, 0.3], [1.0, 0.0, 0.0], [0.0, 1.0, 0.0]]), np.array([1.0, 1.0, 0.0])
    plain, better = (solve(G, b, 2, 0.0, exchange=exchange) for exchange in (False, True))
    assert sorted(plain.rows.tolist()) != [1, 2]
    assert sorted(better.rows.tolist()) == [1, 2]
    assert better.weights.tolist() == pytest.approx([1, 1])
    assert better.exchanged == 1
    assert better.error[-1] == pytest.approx(0, abs=1e-7)
    assert len(better.picks) == len(better.error)


def test_an_exchange_keeps_within_the_purse():
    G, b = np.array([[1.0, 1.0, 0.3], [1.0, 0.0, 0.0], [0.0, 1.0, 0.0]]), np.array([1.0, 1.0, 0.0])
    dear = solve(G, b, 2, 0.0, exchange=True, price=torch.tensor([1.0, 1.0, 5.0]).double(), purse=5.0)
    assert dear.exchanged == 0
    assert 2 not in dear.rows.tolist()


def test_its_picks_and_weights_are_those_of_a_pursuit_that_solves_every_refit_from_scratch():
    lost = 0
    for seed in range(100):
        G, b, k = instance(seed)
        ours = solve(G, b, k, 1.0)
        rows, w, picks = nnls_omp_refilling_naive(G, b, k, 1.0)
        assert ours.picks == picks, seed
        assert ours.rows.tolist() == rows
        assert np.allclose(ours.weights, w, rtol=1e-5)
        lost += len(picks) - len(rows)
    assert lost > 100


@pytest.mark.parametrize("ridge", [0.0, 3.0])
@pytest.mark.parametrize("seed", range(4))
def test_drafting_changes_no_pick(ridge, seed):
    torch.manual_seed(seed)
    G = torch.randn(600, 24) + 0.5 * torch.randn(24)
    b = torch.randn(24, dtype=torch.float64)
    plain = match_gradient(G, b, 40, ridge=ridge, shortlist=600)
    for shortlist in (1, 5, 60):
        drafted = match_gradient(G, b, 40, ridge=ridge, shortlist=shortlist)
        assert drafted.picks == plain.picks
        assert torch.equal(drafted.rows, plain.rows)
        assert torch.allclose(drafted.weights, plain.weights, rtol=1e-6)
        assert drafted.stop == plain.stop
        assert np.allclose(drafted.error, plain.error, rtol=1e-6, atol=1e-9)


def test_a_draft_that_was_wrong_is_taken_back_with_its_drops_and_its_stop():
    lost = 0
    for seed in range(12):
        torch.manual_seed(seed)
        G = torch.randn(400, 12) + 0.5 * torch.randn(12)
        b = G[:40].double().mean(0) + 0.5 * torch.randn(12)
        plain = match_gradient(G, b, 12, ridge=0.0, shortlist=400)
        drafted = match_gradient(G, b, 12, ridge=0.0, shortlist=4)
        assert drafted.picks == plain.picks
        assert drafted.rows.tolist() == plain.rows.tolist()
        assert drafted.error == pytest.approx(plain.error, abs=1e-9)
        lost += len(plain.picks) - len(plain.rows)
    assert lost > 0


def test_right_drafts_are_kept(monkeypatch):
    taken_back = []
    monkeypatch.setattr(_Pursuit, "_take_back", lambda self, j: taken_back.append(j))
    torch.manual_seed(0)
    G, b = torch.randn(300, 20) + 1, torch.ones(20, dtype=torch.float64)
    for ridge in (0.0, 100.0):
        match_gradient(G, b, 30, ridge=ridge, shortlist=299)
    assert not taken_back


def test_products_that_differ_by_rounding_are_ties():
    G = torch.tensor([[1.0, 0.0], [1.0000001, 0.0], [0.5, 0.0]])
    assert match_gradient(G, torch.tensor([1.0, 0.0], dtype=torch.float64), 1, ridge=1.0).rows.tolist() == [0]


def test_a_case_solved_by_hand():
    # b = (3, 1); the first pick is (2, 0) with product 6; its weight is 6/4, what is left is (0, 1); then (0, 1) with weight 1
    G = torch.tensor([[0.0, 1.0], [-2.0, 0.0], [2.0, 0.0], [1.0, 1.0]])
    found = match_gradient(G, torch.tensor([3.0, 1.0], dtype=torch.float64), 2, ridge=0.0)
    assert found.rows.tolist() == [2, 0]
    assert found.weights.tolist() == pytest.approx([1.5, 1.0])
    assert found.error == pytest.approx([1 / math.sqrt(10), 0.0])


def test_the_ridge_shrinks_a_weight_as_the_normal_equation_says():
    found = match_gradient(torch.tensor([[2.0, 0.0]]), torch.tensor([3.0, 1.0], dtype=torch.float64), 1, ridge=2.0)
    assert found.weights.tolist() == pytest.approx([6 / (4 + 2)])


def test_a_row_that_others_replace_loses_its_weight_and_its_place():
    # (1.2, 1.2) is taken first; (1, 0) and (0, 1) then explain b = (2, 1) without it
    G = torch.tensor([[1.2, 1.2], [1.9, -0.3], [0.0, 1.0]])
    b = torch.tensor([2.0, 1.0], dtype=torch.float64)
    found = match_gradient(G, b, 2, ridge=0.0)
    rows, w = nnls_omp_naive(G.double().numpy(), b.numpy(), 3, 0.0)
    assert len(found.rows) == 2
    assert found.error[-1] <= np.linalg.norm(b.numpy() - G.double().numpy()[rows].T @ w) + 1e-9
    assert found.weights.min() > 0


def test_nothing_aligned_gives_nothing():
    found = match_gradient(torch.tensor([[-1.0, 0.0], [0.0, 1.0]]), torch.tensor([1.0, 0.0], dtype=torch.float64), 2, ridge=0.5)
    assert found.rows.tolist() == []
    assert found.stop == "unaligned"


def test_without_a_ridge_a_repeated_row_is_taken_once():
    G = torch.tensor([[1.0, 2.0, 0.5]]).repeat(5, 1)
    found = match_gradient(G, torch.tensor([1.0, 1.0, 1.0], dtype=torch.float64), 5, ridge=0.0)
    assert found.rows.tolist() == [0]
    assert found.stop == "unaligned"


def test_with_a_ridge_repeated_rows_share_the_weight():
    G = torch.tensor([[1.0, 2.0, 0.5]]).repeat(3, 1)
    found = match_gradient(G, torch.tensor([1.0, 1.0, 1.0], dtype=torch.float64), 3, ridge=1.0)
    assert found.rows.tolist() == [0, 1, 2]
    assert found.weights.tolist() == pytest.approx([3.5 / (3 * 5.25 + 1)] * 3)


def test_it_ends_when_the_tolerance_is_met():
    G = torch.eye(4) * torch.tensor([[4.0], [3.0], [2.0], [1.0]])
    b = torch.tensor([4.0, 3.0, 2.0, 1e-3], dtype=torch.float64)
    assert match_gradient(G, b, 4, ridge=0.0, tolerance=1e-2).rows.tolist() == [0, 1, 2]
    assert match_gradient(G, b, 4, ridge=0.0, tolerance=1e-2).stop == "matched"
    assert len(match_gradient(G, b, 4, ridge=0.0).rows) == 4


def priced(seed):
    """An instance whose rows have prices, and a purse that pays for some of them."""
    G, b, _ = instance(seed)
    rng = np.random.default_rng(1000 + seed)
    price = np.exp(rng.normal(4.8, rng.uniform(0.3, 1.0), size=len(G))).round() + 1
    return G, b, price, float(np.sort(price)[: len(G) // 2].sum() * rng.uniform(0.1, 1))


@pytest.mark.parametrize("per_price", [False, True])
@pytest.mark.parametrize("shortlist", [8, 10_000])
def test_with_prices_its_picks_are_those_of_a_plain_pursuit_among_what_still_fits(shortlist, per_price):
    for seed in range(40):
        G, b, price, purse = priced(seed)
        ridge = 0.3 * np.square(G).sum(1).mean()
        paid = {"price": torch.tensor(price), "purse": purse, "per_price": per_price}
        ours = solve(G, b, len(G), ridge, shortlist=shortlist, **paid)
        rows, w, picks = nnls_omp_refilling_naive(G, b, len(G), ridge, price, purse, 0.5 if per_price else 0.0)
        assert ours.picks == picks, seed
        assert ours.rows.tolist() == rows
        assert np.allclose(ours.weights, w, rtol=1e-5)
        assert price[rows].sum() <= purse
        assert ours.objective == pytest.approx(objective(G, b, rows, w, ridge) ** 2)


def test_equal_prices_change_no_pick():
    for seed in range(10):
        G, b, k = instance(seed)
        price = torch.full((len(G),), 7.0, dtype=torch.float64)
        for per_price in (False, True):
            paid = solve(G, b, len(G), 1.0, price=price, purse=7.0 * k + 3, per_price=per_price)
            assert paid.picks == solve(G, b, k, 1.0).picks


@pytest.mark.parametrize(("shrink", "low", "high", "lost"), [(0.0, 0.93, 0.945, 1), (1.0, 0.995, 0.999, 11)])
def test_by_product_and_by_squared_product_per_price_each_win_somewhere(shrink, low, high, lost):
    # with shrink 1 gradients are the shorter the longer the text, so that the largest products are those of short ones anyway
    roots = []
    for seed in range(60):
        G, b, price, purse = priced(seed)
        G = G * (np.median(price) / price[:, None]) ** shrink
        b = G[: len(G) // 3].mean(0)
        ridge = 0.5 * np.square(G).sum(1).mean()
        paid = {"price": torch.tensor(price), "purse": purse, "exchange": True}
        roots.append([math.sqrt(solve(G, b, len(G), ridge, per_price=rule, **paid).objective) for rule in (False, True)])
    product, ratio = np.array(roots).T
    assert low < np.exp(np.log(np.minimum(product, ratio) / product).mean()) < high
    assert abs((product < (1 - 1e-6) * ratio).sum() - lost) <= 1


@pytest.mark.parametrize("shortlist", [2, 100])
def test_it_passes_over_what_the_rest_of_the_purse_does_not_pay_for(shortlist):
    G = torch.eye(6) * torch.tensor([[6.0], [5.0], [4.0], [3.0], [2.0], [1.0]])
    b, price = torch.ones(6, dtype=torch.float64), torch.tensor([5.0, 5.0, 5.0, 100.0, 5.0, 25.0], dtype=torch.float64)
    found = match_gradient(G, b, 6, ridge=0.0, price=price, purse=22.0, shortlist=shortlist)
    assert found.rows.tolist() == [0, 1, 2, 4]
    assert (found.stop, found.refused) == ("spent", 3)


def test_what_an_exchange_saves_is_spent():
    more = 0
    for seed in range(60):
        G, b, price, purse = priced(seed)
        ridge = 0.1 * np.square(G).sum(1).mean()
        plain, better = (solve(G, b, len(G), ridge, price=torch.tensor(price), purse=purse, exchange=e) for e in (False, True))
        left = purse - price[better.rows].sum()
        r = b - better.weights.numpy() @ G[better.rows]
        others = np.setdiff1d(np.flatnonzero(price <= left), better.rows.numpy())
        assert left >= 0
        assert better.stop != "spent" or (G[others] @ r <= 1e-4 * np.linalg.norm(G[others], axis=1) * np.linalg.norm(r)).all()
        assert objective(G, b, better.rows.tolist(), better.weights.numpy(), ridge) <= objective(
            G, b, plain.rows.tolist(), plain.weights.numpy(), ridge
        ) * (1 + 1e-9)
        more += len(better.rows) > len(plain.rows)
    assert more > 3


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 12), st.sampled_from([0.0, 0.3]), st.sampled_from([0.01, 1.0, 300.0]))
def test_the_weights_are_optimal_for_the_rows_and_the_objective_falls(seed, k, ridge, scale):
    torch.manual_seed(seed)
    G = torch.randn(30, 8) * scale
    G[3], G[7] = 0.0, G[5]
    b = torch.randn(8, dtype=torch.float64) * scale
    found = match_gradient(G, b, k, ridge=ridge * scale**2)
    A = G[found.rows].double()
    slope = A @ (b - found.weights @ A) - ridge * scale**2 * found.weights
    assert (found.weights > 0).all()
    assert slope.abs().max() < 1e-7 * scale**2 if len(A) else True
    assert 3 not in found.rows
    assert len(found.rows) <= k
    if found.stop == "unaligned":  # optimal over all rows
        r = b - found.weights @ A
        assert ((G.double() @ r)[[i for i in range(30) if i not in found.rows]] <= 2e-5 * scale**2 * 30).all()
    squares = squared_norms(G)
    assert torch.allclose(squares, G.double().square().sum(1))
