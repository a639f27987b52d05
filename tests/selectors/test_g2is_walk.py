"""G2IS's walk against the published one, written out plainly, and step by step by hand."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
import torch
from sklearn.decomposition import PCA

from gradsieve.selectors import g2is_walk
from gradsieve.selectors.directions import Directions, on_grid, unit_rows
from gradsieve.selectors.g2is import G2IS
from gradsieve.selectors.g2is_walk import walk
from gradsieve.selectors.graph import follow
from gradsieve.selectors.ranking import id_order
from gradsieve.types import ArrayGradients

from .test_g2is import problem_of, remainder_naive, run


def graph_naive(U, ids, width):
    def near(i):
        return sorted((j for j in range(len(U)) if j != i), key=lambda j: (-float(U[i] @ U[j]), ids[j]))

    return [near(i)[: width or None] for i in range(len(U))]


def walk_naive(U, K, budgets, graph, ids, delta, seen=None, among=1000, price=None):
    """Eq. G2IS-3 as it is written: every constraint from scratch for every candidate; the fallback sorts all n anew.

    With prices, candidates that cost more than what is left are not there, and what is too little for any goes to the next.
    """
    n, used, picks, passed_on = len(U), set(), [], 0
    price = price or [1] * n

    def cosine(total, k):
        length = np.linalg.norm(total)
        return abs(total @ k) / length if length > 1e-10 else 0.0

    for k, own in zip(K, budgets, strict=True):
        budget, passed_on = own + passed_on, 0
        if budget <= 0:
            continue
        along = [float(u @ k) for u in U]
        left = budget

        def best_first(along=along):
            return [i for i in sorted(range(n), key=lambda i: (-along[i], ids[i])) if i not in used]

        top = [i for i in sorted(range(n), key=lambda i: (-along[i], ids[i]))[:among] if i not in used and price[i] <= left]
        if best_first() and min(price[i] for i in best_first()) > left:
            passed_on = left
            continue
        if not top:
            if seen is not None:
                why = "start" if best_first() else "exhausted"
                seen[why] = seen.get(why, 0) + 1
            continue
        chosen, total = [top[0]], U[top[0]].copy()
        used.add(top[0])
        left -= price[top[0]]
        while left > 0:
            if best_first() and min(price[i] for i in best_first()) > left:
                passed_on = left
                break
            old = cosine(total, k)

            def fits(j, chosen=chosen, total=total, old=old, k=k, left=left):
                if price[j] > left:
                    return False
                no_conflict = all(U[j] @ U[s] >= 0 for s in chosen)
                return no_conflict and cosine(total + U[j], k) >= delta * old - 1e-9

            found = next((j for j in graph[chosen[-1]] if j not in used and fits(j)), None)
            how = "walk"
            if found is None:
                found, how = next((j for j in best_first() if fits(j)), None), "fallback"
            if seen is not None:
                seen[how if found is not None else "stuck"] += 1
            if found is None:
                break
            chosen.append(found)
            used.add(found)
            left -= price[found]
            total = total + U[found]
        picks += chosen
    return picks


def instance(seed):
    """Small problems in which everything happens: shared directions, copies, exact right angles, opposed groups."""
    rng = np.random.default_rng(seed)
    n, d, m = int(rng.integers(5, 45)), int(rng.integers(2, 9)), int(rng.integers(3, 9))
    G = rng.normal(size=(n, d)) + rng.uniform(0, 3) * rng.normal(size=d)
    if seed % 3 == 0:
        G = rng.integers(-2, 3, size=(n, d)).astype(float)  # many equal rows and exact zeros among their products
        G[~G.any(1)] = 1.0
    if seed % 4 == 1:
        G[rng.integers(n, size=n // 2)] = G[0]
    T = rng.normal(size=(m, d)) + rng.uniform(0, 2) * rng.normal(size=d)
    ids = [f"{i:03d}" for i in rng.permutation(n)]
    budget = int(rng.integers(1, n + 1))
    return G, T, ids, budget, float(rng.choice([0.3, 0.5, 0.9])), int(rng.choice([0, 1, 3, 10]))


def walked(G, K, budgets, ids=None, width=0, **options):
    candidates = ArrayGradients(ids or [f"{i:03d}" for i in range(len(G))], torch.tensor(G, dtype=torch.float32))
    directions, by_id = Directions.of(candidates), id_order(candidates.ids)
    graph = torch.tensor(graph_naive(unit_rows(candidates.sketch).numpy(), candidates.ids, width), dtype=torch.int32)
    options = {"delta": 0.8, "price": torch.ones(len(G), dtype=torch.float64)} | options
    products = directions.products(torch.tensor(K, dtype=torch.float64).T)
    return walk(directions, products, budgets, follow(graph.reshape(len(G), -1)), by_id, **options)


def test_paper_mode_chooses_the_same_rows_in_the_same_order_as_the_published_walk_on_200_instances():
    seen = {"walk": 0, "fallback": 0, "stuck": 0}
    short = 0
    for seed in range(200):
        G, T, ids, budget, explained, width = instance(seed)
        problem = problem_of(G, T, ids)
        U = unit_rows(problem.candidates.sketch).numpy()
        pca = PCA(n_components=explained, svd_solver="full").fit(problem.targets.sketch.double().numpy())
        K = on_grid(torch.tensor(pca.components_)).numpy()
        shares = pca.explained_variance_ratio_ / pca.explained_variance_ratio_.sum()
        expected = walk_naive(U, K, remainder_naive(budget, shares), graph_naive(U, ids, width), ids, 0.8, seen)
        selection = run(G2IS("paper", explained, 0.8, width, compare_modes=False), problem, budget)
        assert selection.rows.tolist() == expected, seed
        assert bool(selection.notes and "budget asks for" in " ".join(selection.notes)) == (len(expected) < budget)
        short += len(expected) < budget
    assert min(seen.values()) > 50
    assert 20 < short < 180


@pytest.mark.parametrize("delta", [0.0, 0.8, 1.0])
def test_with_prices_the_walk_is_the_published_one_among_what_still_fits(delta):
    ended = Counter()
    for seed in range(60):
        G, _, ids, _, _, width = instance(seed + 2000)
        rng = np.random.default_rng(seed)
        K = unit_rows(torch.tensor(rng.normal(size=(3, G.shape[1])))).numpy()
        price = np.ceil(np.exp(rng.normal(3, 1, size=len(G))))
        budgets = (price.sum() * rng.uniform(0, 0.3, size=3)).tolist()
        done = walked(G.tolist(), K.tolist(), budgets, ids, width, delta=delta, price=torch.tensor(price))
        U = unit_rows(torch.tensor(G, dtype=torch.float32)).numpy()
        expected = walk_naive(U, K, budgets, graph_naive(U, ids, width), ids, delta, price=price.tolist())
        assert [row for component in done for row in component.rows] == expected, seed
        assert all(price[component.rows].sum() <= component.budget for component in done)
        ended.update(component.stop for component in done)
    assert ended["price"] > 10
    assert delta == 0 or ended["constraints"] > 10


@pytest.mark.parametrize("delta", [0.0, 0.5, 0.8, 0.97, 1.0])
def test_the_walk_is_the_published_one_for_any_directions_budgets_and_strictness(delta):
    seen = {"walk": 0, "fallback": 0, "stuck": 0}
    for seed in range(40):
        G, _, ids, _, _, width = instance(seed + 1000)
        rng = np.random.default_rng(seed)
        candidates = ArrayGradients(ids, torch.tensor(G, dtype=torch.float32))
        directions, by_id = Directions.of(candidates), id_order(ids)
        K = unit_rows(torch.tensor(rng.normal(size=(3, G.shape[1]))))
        budgets = rng.integers(0, len(G), size=3).tolist()
        U = unit_rows(candidates.sketch).numpy()
        graph = graph_naive(U, ids, width)
        done = walk(
            directions,
            directions.products(K.T),
            budgets,
            follow(torch.tensor(graph, dtype=torch.int32).reshape(len(G), -1)),
            by_id,
            delta=delta,
            price=torch.ones(len(G), dtype=torch.float64),
        )
        expected = walk_naive(U, K.numpy(), budgets, graph, ids, delta, seen)
        assert [row for component in done for row in component.rows] == expected, seed
    assert min(seen["walk"], seen["stuck"]) > 10
    if delta == 0:
        assert seen["exhausted"] >= 3


@pytest.mark.parametrize("among", [1, 3, 8])
def test_a_component_starts_among_the_candidates_furthest_along_its_direction_and_nowhere_else(among, monkeypatch):
    monkeypatch.setattr(g2is_walk, "START_AMONG", among)
    seen = {"walk": 0, "fallback": 0, "stuck": 0, "start": 0}
    for seed in range(40):
        G, T, ids, budget, _, width = instance(seed + 2000)
        K = on_grid(torch.tensor(PCA(n_components=0.9, svd_solver="full").fit(T.astype(np.float32).astype(float)).components_))
        K = torch.cat([K, K])  # the second walk along a direction finds the best candidates used
        U = unit_rows(torch.tensor(G, dtype=torch.float32)).numpy()
        graph, budgets = graph_naive(U, ids, width), [max(1, budget // 3)] * len(K)
        directions = Directions.of(ArrayGradients(ids, torch.tensor(G, dtype=torch.float32)))
        done = walk(
            directions,
            directions.products(K.T),
            budgets,
            follow(torch.tensor(graph, dtype=torch.int32).reshape(len(G), -1)),
            id_order(ids),
            delta=0.8,
            price=torch.ones(len(G), dtype=torch.float64),
        )
        before = seen["start"]
        expected = walk_naive(U, K.numpy(), budgets, graph, ids, 0.8, seen, among)
        assert [row for component in done for row in component.rows] == expected, seed
        assert sum(component.stop == "start" for component in done) == seen["start"] - before
    assert seen["start"] > 5


def test_consistency_alone_can_stop_a_component():
    # (0, 1) does not conflict with (1, 0), but turns the sum to cosine .71 < .8
    (component,) = walked([[1.0, 0.0], [0.0, 1.0]], [[1.0, 0.0]], [2])
    assert component.rows == [0]
    assert (component.stop, component.conflicts, component.inconsistent) == ("constraints", 0, 1)
    (free,) = walked([[1.0, 0.0], [0.0, 1.0]], [[1.0, 0.0]], [2], delta=0.7)
    assert free.rows == [0, 1]


def test_a_candidate_that_was_inconsistent_is_asked_again_by_the_walk_when_the_sum_has_turned():
    # row 1 is nearest to row 0 but turns the sum to cosine .32 < .8·.6; after rows 2 and 3 it turns it from .72 to .59
    G = [[0.6, 0.8, 0.0], [0.0, 0.98, 0.2], [0.59, -0.1, 0.8], [0.59, -0.1, 0.79]]
    (component,) = walked(G, [[1.0, 0.0, 0.0]], [4])
    assert component.rows == [0, 3, 2, 1]
    assert component.via == ["start", "walk", "walk", "walk"]


def test_a_candidate_that_was_inconsistent_keeps_its_place_in_the_fallback_order():
    # each row has one neighbour in the graph; the fallback asks row 1 first: cosine .21 < .8·.3, but from row 2 on .22 ≥ .8·.27
    G = [[0.3, 0.954, 0.0], [0.11, 0.994, 0.0], [0.09, 0.0, 0.996]]
    (component,) = walked(G, [[1.0, 0.0, 0.0]], [3], width=1)
    assert component.rows == [0, 2, 1]
    assert component.via == ["start", "fallback", "fallback"]


def test_a_candidate_that_is_first_in_the_fallback_order_is_asked_until_it_fits():
    # row 1 has the largest product left from the first step on, and turns the sum too far until all others are taken
    G = [[-0.8, 0.0, 1.7], [0.0, 0.6, 0.6], [-0.9, 0.6, 0.5], [0.5, 2.1, 2.6], [-1.3, 0.3, 2.1]]
    (component,) = walked(G, [[1.0, 0.0, 0.0]], [5], width=1)
    assert component.rows == [3, 0, 4, 2, 1]


def test_a_conflict_holds_for_its_component_only():
    G = [[1.0, 0.0], [-0.5, 1.0], [0.9, 0.1]]
    done = walked(G, [[1.0, 0.0], [0.0, 1.0]], [3, 1])
    assert done[0].rows == [0, 2]
    assert done[0].conflicts == 1
    assert done[1].rows == [1]


def test_used_candidates_are_not_taken_again_and_an_empty_pool_ends_a_component():
    done = walked([[1.0, 0.0], [0.9, 0.1]], [[1.0, 0.0], [1.0, 0.0]], [2, 2])
    assert [component.rows for component in done] == [[0, 1], []]
    assert [component.stop for component in done] == ["budget", "exhausted"]


@pytest.mark.parametrize(("on_shortfall", "rows"), [("stop", [1]), ("next-component", [1, 2, 3])])
def test_what_a_component_cannot_use_stays_unused_or_goes_to_the_next(on_shortfall, rows):
    G = [[1.0, 0.0], [-0.5, 1.0], [-0.4, 1.0], [-0.3, 1.0]]
    done = walked(G, [[1.0, 0.0], [-0.5, 1.0]], [3, 1], on_shortfall=on_shortfall)
    assert done[0].rows == [0]
    assert done[1].rows == rows


def test_equal_candidates_are_taken_in_the_order_of_their_ids():
    (component,) = walked([[1.0, 0.5]] * 4, [[1.0, 0.0]], [4], ids=["d", "b", "a", "c"])
    assert component.rows == [2, 1, 3, 0]


def test_a_token_budget_passes_what_is_too_little_to_the_next_component():
    # two components of equal share; the first pays for one example of 60 of its 100 tokens, the next has 140 for two
    price = torch.tensor([60.0, 60.0, 60.0, 60.0], dtype=torch.float64)
    G = [[1.0, 0.1], [1.0, 0.2], [0.1, 1.0], [0.2, 1.0]]
    done = walked(G, [[1.0, 0.0], [0.0, 1.0]], [100.0, 100.0], price=price)
    assert [component.rows for component in done] == [[0], [2, 3]]
    assert (done[0].stop, done[0].dear) == ("price", 3)
    assert done[1].budget == 140


def test_a_walk_passes_over_what_the_rest_of_its_tokens_does_not_pay_for():
    # the start and the nearest neighbour are too dear at 50; a dear one stays unused for good, a later component may take it
    price = torch.tensor([60.0, 20.0, 40.0, 20.0, 5.0], dtype=torch.float64)
    G = [[1.0, 0.0], [1.0, 0.1], [1.0, 0.12], [1.0, 0.3], [-1.0, -0.3]]
    (done,) = walked(G, [[1.0, 0.0]], [50.0], price=price)
    assert done.rows == [1, 3]
    assert (done.stop, done.conflicts, done.inconsistent, done.dear) == ("constraints", 1, 0, 2)
    first, second = walked(G, [[1.0, 0.0], [1.0, 0.0]], [50.0, 60.0], price=price)
    assert (first.rows, second.rows[0]) == ([1, 3], 0)
