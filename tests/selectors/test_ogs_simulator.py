"""Draws and simulator: against explicit displacements and Fisher matrices in d dimensions, and by hand."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from gradsieve.errors import InvalidArgument
from gradsieve.selectors.directions import Directions
from gradsieve.selectors.ogs_draws import Draws, arrange, threshold_scores
from gradsieve.selectors.ogs_simulator import Simulator, State, Surface, advance, available, begin, observe, outlook, total
from gradsieve.selectors.ranking import id_order
from gradsieve.selectors.reading import cosines
from gradsieve.types import ArrayGradients, Budget, Problem

PACE, START = 0.03, (1.7, 2.3)  # η/b, and the losses before training


def world(
    problem: Problem, constraint: str, batch: int = 3, budget: float = 20.0, tokens: bool = False, bend: bool = True
) -> Any:
    """Returns a simulator of four arbitrary clusters, its surfaces and the unit sketches."""
    pool = problem.candidates
    n, by_id = len(pool.ids), id_order(pool.ids)
    utility, keep = cosines(pool, "target"), cosines(pool, "anchor")
    directions = Directions.of(pool)
    price = pool.columns["tokens"] if tokens else torch.ones(n, dtype=torch.float64)
    labels = torch.empty(n, dtype=torch.int64)
    labels[by_id] = torch.arange(n) % 7 % 4
    order = torch.randperm(n, generator=torch.Generator().manual_seed(1))
    features = (1 - keep.abs(), (-keep).clamp(min=0), utility, pool.columns["loss"])
    draws = arrange(labels, order, by_id, price, features, batch, budget)
    curvature = PACE**2 if bend else 0.0
    domain = Surface.loss(problem.targets, utility).scaled(PACE / START[0], curvature / START[0])
    anchor = Surface.loss(problem.anchors, keep)
    anchor = anchor.scaled(0.0, curvature) if constraint == "kl" else anchor.scaled(PACE / START[1], curvature / START[1])
    return Simulator.of(draws, (domain, anchor), directions, epsilon=0.5), (domain, anchor), directions


def losses_naive(problem: Problem, rows: Sequence[int], share: Tensor, constraint: str, bend: bool) -> tuple[float, float]:
    """Eq. OGS-9, OGS-6 and OGS-11 as they are written: a displacement in d dimensions and d × d Fisher matrices.

    Returns:
        1 - L_dom/L_dom(0), and the cost, after training on these rows, each counted by its share.
    """
    pool = problem.candidates
    found = []
    for part, reference in ((problem.targets, "target"), (problem.anchors, "anchor")):
        G = part.rows(torch.arange(len(part.ids))).double()
        mean, F = G.mean(0), G.T @ G / len(G)
        delta = torch.zeros_like(mean)
        for row, weight in zip(rows, share.tolist(), strict=True):
            u = pool.rows(torch.tensor([row]))[0].double()
            u = u / u.norm()
            exact = pool.columns[f"dot/{reference}"][row] / pool.columns["norm"][row]  # what <u, ḡ/‖ḡ‖> should be
            u = u + (exact - u @ mean / mean.norm()) * mean / mean.norm()
            delta += weight * PACE * u
        slope, curve = mean @ delta, 0.5 * delta @ F @ delta * bend
        found.append((float(-slope), float(curve)))
    (slope, curve), (slope_gen, curve_gen) = found
    cost = curve_gen if constraint == "kl" else (slope_gen + curve_gen) / START[1]
    return -(slope + curve) / START[0], cost


def episode(sim: Simulator, clusters: Sequence[int]) -> State:
    state = begin(sim, 1)
    for c in clusters:
        assert available(sim, state)[0, c]
        state = advance(sim, state, torch.tensor([c]), outlook(sim, state))
    return state


@pytest.mark.parametrize("constraint", ["kl", "loss"])
@pytest.mark.parametrize("bend", [True, False])
@pytest.mark.parametrize("seed", [0, 1])
def test_every_step_is_the_explicit_quadratic(seed, bend, constraint, make_problem):
    problem = make_problem(40, seed=seed)
    sim, _, _ = world(problem, constraint, bend=bend)
    state, rows, share, clusters = begin(sim, 1), [], [], (1, 0, 1, 3, 2, 1, 0)
    taken = dict.fromkeys(range(4), 0)
    for c in clusters:
        before = losses_naive(problem, rows, torch.tensor(share), constraint, bend)
        new = sim.draws.rows[c][taken[c] : taken[c] + 3].tolist()
        taken[c] += 3
        part = min(1.0, (20 - len(rows)) / len(new))  # the last draw is cut by the budget
        rows, share = rows + new, share + [part] * len(new)
        after = losses_naive(problem, rows, torch.tensor(share), constraint, bend)
        state = advance(sim, state, torch.tensor([c]), outlook(sim, state))
        assert state.last[:, 0].tolist() == pytest.approx([a - b for a, b in zip(after, before, strict=True)], abs=2e-8)
    assert len(rows) == 21
    assert share[-1] == pytest.approx(2 / 3)
    assert state.spent.item() == pytest.approx(20)
    assert not available(sim, state).any()
    assert state.total[:, 0].tolist() == pytest.approx(after, abs=2e-7)  # Eq. OGS-6 telescopes


@pytest.mark.parametrize("constraint", ["kl", "loss"])
def test_the_total_of_any_rows_is_the_explicit_quadratic(constraint, make_problem):
    problem = make_problem(40)
    _, surfaces, directions = world(problem, constraint)
    rows = torch.tensor([3, 17, 30, 8])
    expected = losses_naive(problem, rows.tolist(), torch.ones(4), constraint, True)
    assert total(surfaces, directions, rows) == pytest.approx(expected, abs=1e-7)


def test_more_targets_than_dimensions_give_the_same_curvature(make_problem):
    problem = make_problem(10, d=4, m=30)
    surface = Surface.loss(problem.targets, cosines(problem.candidates, "target"))
    G = problem.targets.rows(torch.arange(30)).double()
    assert surface.root.shape == (4, 4)
    assert torch.allclose(surface.root.T @ surface.root, G.T @ G / 30)


def test_slopes_are_the_derivative_of_the_cost(make_problem):
    problem = make_problem(25)
    _, (_, cost), directions = world(problem, "loss")
    labels = torch.full((25,), -1)
    labels[[4, 9, 2]] = 0
    sums = torch.stack([directions.rows(torch.tensor([i])).sum(0) for i in range(25)])
    _, each = cost.table(sums, torch.arange(25), torch.arange(25))
    _, at = cost.table(sums[[4, 9, 2]].sum(0, keepdim=True), labels, torch.tensor([4, 9, 2]))
    assert torch.allclose(cost.slopes(at[0], directions), cost.rate + each @ at[0], atol=1e-9)
    assert torch.equal(cost.slopes(torch.zeros_like(at[0]), directions), cost.rate)


@given(seed=st.integers(0, 20), budget=st.integers(1, 400), batch=st.integers(1, 6), data=st.data())
@settings(max_examples=30, deadline=None)
def test_an_episode_spends_the_budget_and_order_does_not_change_the_total(seed, budget, batch, data, make_problem):
    problem = make_problem(18, seed=seed)
    price = problem.candidates.columns["tokens"]
    budget = min(budget, int(price.sum()))
    sim, _, _ = world(problem, "loss", batch=batch, budget=float(budget), tokens=True)
    state, clusters = begin(sim, 1), []
    while (mask := available(sim, state)[0]).any():
        clusters.append(data.draw(st.sampled_from(mask.nonzero().flatten().tolist())))
        state = advance(sim, state, torch.tensor(clusters[-1:]), outlook(sim, state))
    assert state.spent.item() == pytest.approx(budget)
    if sum(float(sim.draws.price[c, : clusters.count(c)].sum()) for c in set(clusters)) == budget:
        assert torch.allclose(episode(sim, sorted(clusters)).total, state.total, atol=1e-9)


def test_many_episodes_at_once_are_the_same_as_one_by_one(make_problem):
    sim, _, _ = world(make_problem(40), "loss", budget=24.0)
    plans = [(0, 0, 1, 2, 3, 0, 1, 2), (3, 2, 1, 0, 3, 2, 1, 1), (1, 1, 2, 2, 0, 0, 3, 3)]
    state = begin(sim, 3)
    for action in torch.tensor(plans).T:
        state = advance(sim, state, action, outlook(sim, state))
    for e, plan in enumerate(plans):
        alone = episode(sim, plan)
        assert torch.allclose(state.total[:, e], alone.total[:, 0], atol=1e-12)
        assert torch.equal(state.drawn[e], alone.drawn[0])


def test_an_episode_that_is_over_stays_as_it_is(make_problem):
    sim, _, _ = world(make_problem(40), "kl", budget=3.0)
    over = episode(sim, (2,))
    after = advance(sim, over, torch.tensor([1]), outlook(sim, over))
    assert torch.equal(after.total, over.total)
    assert torch.equal(after.drawn, over.drawn)
    assert not after.last.any()
    assert not outlook(sim, over).any()


def draws_of(labels: Sequence[int], batch: int, budget: float, price: Sequence[float] | None = None) -> Draws:
    n = len(labels)
    values = torch.arange(n, dtype=torch.float64)
    prices = torch.ones(n, dtype=torch.float64) if price is None else torch.tensor(price, dtype=torch.float64)
    features = (values, torch.where(values > 2, values, 0.0), -values, values.square())
    return arrange(torch.tensor(labels), torch.arange(n), torch.arange(n), prices, features, batch, budget)


def test_seven_rows_by_hand():
    draws = draws_of([5, 5, 2, 5, 5, 2, 5], batch=2, budget=4.0)
    assert [rows.tolist() for rows in draws.rows] == [[0, 1, 3, 4, 6], [2, 5]]
    assert draws.index.tolist() == [0, 0, 2, 1, 1, 2, -1]  # row 6: four rows of its cluster come before it
    assert draws.size.tolist() == [[2, 2], [2, 0]]
    assert draws.steps == 2
    sd = 2.0  # of 0 … 6
    orth, spread, risk, at_risk, utility, _, left = draws.left[0, 1].tolist()  # rows 3, 4, 6 are left of five
    assert orth == pytest.approx((13 / 3 - 3) / sd)
    assert spread == pytest.approx(torch.tensor([3.0, 4.0, 6.0]).std(correction=0).item() / sd)
    assert risk == pytest.approx((13 / 3 - 18 / 7) / torch.tensor([0.0, 0, 0, 3, 4, 5, 6]).std(correction=0).item())
    assert at_risk == 1.0
    assert utility == pytest.approx(-orth)
    assert left == pytest.approx(0.6)
    assert not draws.left[1, 1].any()  # nothing is left


def test_token_prices_decide_how_far_a_cluster_can_be_drawn():
    draws = draws_of([0, 0, 0, 0], batch=1, budget=10.0, price=[6, 3, 2, 9])
    assert draws.index.tolist() == [0, 1, 2, -1]
    assert draws.price.tolist() == [[6, 3, 2]]


def test_the_names_of_clusters_carry_no_information():
    a, b = draws_of([5, 5, 2, 5, 5, 2, 5], 2, 4.0), draws_of([0, 0, 9, 0, 0, 9, 0], 2, 4.0)
    assert torch.equal(a.index, b.index)
    assert torch.equal(a.left, b.left)


def threshold_naive(utility: Tensor, cost: Tensor, bound: float, k: int) -> float:
    """The optimum of the relaxed problem of Eq. OGS-8, by linear programming."""
    from scipy.optimize import linprog

    one = [[1.0] * len(utility)]
    found = linprog(-utility.numpy(), A_ub=cost[None].numpy(), b_ub=[bound], A_eq=one, b_eq=[k], bounds=(0, 1))
    return -found.fun


@pytest.mark.parametrize("seed", range(5))
def test_threshold_scores_solve_the_linear_program_up_to_one_row(seed):
    rng = torch.Generator().manual_seed(seed)
    utility, cost = torch.randn(2, 60, generator=rng, dtype=torch.float64)
    best = utility.argsort(descending=True)[:20]
    bound = float(cost[best].sum()) - 5
    scores, penalty = threshold_scores(utility, cost, bound, torch.arange(60), lambda order: order[:20])
    chosen = scores.argsort(descending=True)[:20]
    optimum = threshold_naive(utility, cost, bound, 20)
    assert penalty > 0
    assert cost[chosen].sum() <= bound
    assert optimum - float(utility.max() - utility.min()) <= utility[chosen].sum() <= optimum + 1e-9
    assert torch.allclose(scores, utility - penalty * cost)


def test_threshold_scores_are_the_utility_where_the_bound_is_slack_and_the_cost_where_it_cannot_be_met():
    utility, cost = torch.tensor([3.0, 2.0, torch.nan, 1.0]).double(), torch.tensor([2.0, 1.0, torch.nan, 1.5]).double()

    def take(order: Tensor) -> Tensor:
        return order[:2]

    slack = threshold_scores(utility, cost, 3.0, torch.arange(4), take)
    assert slack[1] == 0
    assert torch.equal(slack[0].nan_to_num(), utility.nan_to_num())
    scores, penalty = threshold_scores(utility, cost, 2.0, torch.arange(4), take)
    assert penalty is None
    assert scores.nan_to_num(-9).tolist() == [-2, -1, -9, -1.5]


def test_what_the_policy_sees_is_bounded_and_free_of_units(make_problem):
    problem = make_problem(40)
    sim, _, _ = world(problem, "loss")
    clusters = (1, 0, 3)
    seen = [
        observe(s, (state := episode(s, clusters)), outlook(s, state), torch.tensor([0.7]))
        for s in (sim, rescaled(sim, 50.0, 0.02))
    ]
    for a, b in ((seen[0].clusters, seen[1].clusters), (seen[0].overall, seen[1].overall)):
        assert torch.allclose(a, b, atol=1e-5)
        assert a.abs().max() <= 1
    state = episode(sim, clusters)
    reward, cost = state.total[:, 0] / torch.tensor([sim.reward_scale, 0.5])
    expected = [reward / (1 + reward.abs()), cost / (1 + cost.abs())]
    assert seen[0].overall[0, :2].tolist() == pytest.approx([float(v) for v in expected], rel=1e-5)
    assert seen[0].overall[0, 4].item() == pytest.approx(0.7 / 1.7)
    assert seen[0].overall[0, 5].item() == pytest.approx(9 / 20)


def rescaled(sim: Simulator, reward: float, cost: float) -> Simulator:
    factor = torch.tensor([reward, cost])[:, None, None]
    tables = {"domain": sim.domain * reward**0.5, "anchor": sim.anchor * cost**0.5}
    return replace(sim, rates=sim.rates * factor, epsilon=sim.epsilon * cost, **tables)


def test_only_clusters_that_are_left_count_in_the_relative_outlook(make_problem):
    sim, _, _ = world(make_problem(24), "kl", batch=6, budget=24.0)
    state = begin(sim, 1)
    while len(left := available(sim, state)[0].nonzero().flatten()) > 2:
        state = advance(sim, state, left[:1], outlook(sim, state))
    ahead = outlook(sim, state)
    relative = observe(sim, state, ahead, torch.zeros(1)).clusters[0, :, 9]
    two = ahead[0, 0, left]
    expected = (two - two.mean()) / two.std(correction=0)
    assert relative[left].tolist() == pytest.approx((expected / (1 + expected.abs())).tolist(), rel=1e-4)
    assert not relative[[c for c in range(4) if c not in left]].any()


def test_a_mean_gradient_of_zero_is_refused():
    g = ArrayGradients(["a", "b"], torch.tensor([[1.0, 0.0], [-1.0, 0.0]]))
    with pytest.raises(InvalidArgument, match="mean gradient"):
        Surface.loss(g, torch.ones(3))


def test_the_order_of_the_targets_changes_nothing(make_problem):
    targets = make_problem(10, d=16, m=12).targets
    turned = torch.randperm(12, generator=torch.Generator().manual_seed(1))
    other = ArrayGradients([targets.ids[i] for i in turned], targets.rows(turned))
    one, two = (Surface.loss(each, torch.ones(3)) for each in (targets, other))
    assert torch.equal(one.root, two.root)
    assert torch.equal(one.mean, two.mean)


def test_a_sketch_that_is_not_finite_is_refused_by_name():
    g = ArrayGradients(["a", "b"], torch.tensor([[1.0, 0.0], [torch.nan, 0.0]]))
    with pytest.raises(InvalidArgument, match="'b' must be finite"):
        Surface.loss(g, torch.ones(3))


def test_the_reward_scale_is_the_first_pace_kept_up(make_problem: Callable[..., Problem]):
    sim, _, _ = world(make_problem(40), "loss")
    best = max(float(episode(sim, (c,)).total[0, 0].abs()) for c in range(4))
    assert sim.reward_scale == pytest.approx(best * 20 / float(sim.draws.price.sum() / (sim.draws.size > 0).sum()))
    assert Budget(examples=20).examples == sim.draws.budget
