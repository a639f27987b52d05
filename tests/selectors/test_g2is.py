"""G2IS: a case by hand, its components and modes, the graph, how a budget is split, and what its notes mean."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.decomposition import PCA

from gradsieve.errors import InvalidArgument
from gradsieve.selectors import g2is_walk
from gradsieve.selectors.g2is import G2IS, core_knowledge, largest_remainder
from gradsieve.types import ArrayGradients, Budget, Problem, Warmup


def run(method, problem, budget, seed=0):
    return method.select(problem, Budget.parse(budget), torch.Generator().manual_seed(seed))


def problem_of(G, T, ids=None, **columns):
    G, T = torch.as_tensor(G, dtype=torch.float32), torch.as_tensor(T, dtype=torch.float32)
    ids = ids or [f"{i:04d}" for i in range(len(G))]
    return Problem(ArrayGradients(ids, G, columns), ArrayGradients([f"t{i}" for i in range(len(T))], T))


def remainder_naive(total, weights):
    exact = [total * w for w in weights]
    parts = [int(np.floor(x + 1e-9)) for x in exact]
    for i in sorted(range(len(parts)), key=lambda i: parts[i] - exact[i])[: total - sum(parts)]:
        parts[i] += 1
    return parts


def test_a_component_without_a_start_says_so(monkeypatch):
    monkeypatch.setattr(g2is_walk, "START_AMONG", 1)
    G, T = [[2.0, 1.0], [2.0, 1.1], [1.0, 2.0]], [[1.0, 0.9], [-1.0, -0.9], [0.9, -1.0], [-0.9, 1.0]]
    stopped = run(G2IS("paper", explained=0.99, compare_modes=False), problem_of(G, T), 2)
    assert [component["stop"] for component in stopped.trace["components"]] == ["budget", "budget"]
    own = run(G2IS("paper", explained=0.99, compare_modes=False), problem_of([[1.0, 1.0]] * 3, T), 3)
    assert [component["stop"] for component in own.trace["components"]] == ["budget", "start"]
    assert any("component 2 ended after 0 examples" in note and "furthest along its direction" in note for note in own.notes)


def test_a_case_solved_by_hand():
    # k = (1, 0). Start at 0; its neighbours are 1 (cosine .8), 4 (.6), 2 (0), 3 (-1). 1 = (.8, .6) fits: the sum's cosine falls
    # to .95. From 1, its neighbour 2 = (0, 1) fits too: (1.8, 1.6) has .75 ≥ .8·.95 = .76? no. Then 4 = (.6, -.8): its product
    # with 1 is 0, which is no conflict; the sum is (2.4, -.2). Then 2 conflicts with 4, and 3 with 0: stuck.
    G = [[1.0, 0.0], [0.8, 0.6], [0.0, 1.0], [-1.0, 0.0], [0.6, -0.8]]
    T = [[1.0, 0.0], [2.0, 0.0]]
    selection = run(G2IS(neighbours=2), problem_of(G, T), 4)
    assert selection.rows.tolist() == [0, 1, 4]
    assert selection.trace["walk"] == {
        "row": [0, 1, 4],
        "component": [0, 0, 0],
        "step": [0, 1, 2],
        "via": ["start", "walk", "fallback"],
    }
    (component,) = selection.trace["components"]
    assert component["variance"] == 1
    assert (component["budget"], component["picks"], component["stop"]) == (4, 3, "constraints")
    assert (component["conflicts"], component["inconsistent"]) == (2, 0)
    assert component["cosine_to_target"] == pytest.approx(1)
    assert selection.scores.tolist() == pytest.approx([1, 0.8, 0, -1, 0.6], abs=1e-7)
    assert selection.trace["mean_cosine"] == pytest.approx(0.8)
    assert selection.trace["pool_mean_cosine"] == pytest.approx(0.28)
    assert selection.notes[0] == (
        "3 examples are chosen of the 4 the budget asks for. component 1 ended after 3 examples of a budget of 4 examples: "
        "of the candidates left 2 conflict with one of its picks and 0 would turn their sum too far from its direction"
    )


def test_the_components_are_those_of_scikit_learn(make_problem):
    for seed in range(10):
        T = make_problem(5, d=12, m=9, seed=seed).targets.sketch["base"]
        for explained in (0.2, 0.5, 0.95):
            V, share = core_knowledge(T, "paper", explained)
            pca = PCA(n_components=explained).fit(T.double().numpy())
            assert np.allclose(V, pca.components_, atol=1e-6)
            assert np.allclose(share, pca.explained_variance_ratio_ / pca.explained_variance_ratio_.sum())


def test_directions_that_explain_exactly_the_share_are_not_enough_as_in_scikit_learn():
    T = torch.tensor([[1.0, 0.0, 0.0], [-1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, -1.0, 0.0]])
    V, share = core_knowledge(T, "paper", 0.5)
    assert len(V) == PCA(n_components=0.5, svd_solver="full").fit(T.double().numpy()).n_components_ == 2
    assert share.tolist() == pytest.approx([0.5, 0.5])


def test_aligned_components_are_uncentred_and_point_towards_the_target(make_problem):
    T = make_problem(5, d=12, m=9).targets.sketch["base"].double()
    V, share = core_knowledge(T, "aligned", 1.0)
    assert len(V) == 9
    assert (V @ T.mean(0) >= -1e-9).all()
    assert torch.allclose(V @ V.T, torch.eye(9, dtype=torch.float64), atol=1e-6)
    assert torch.allclose((T @ V.T).square().sum(0) / T.square().sum(), share, atol=1e-6)


def test_aligned_picks_help_the_target_where_published_picks_do_not():
    torch.manual_seed(0)
    shared = torch.randn(40)
    G = torch.randn(400, 40) + 0.5 * torch.randn(400, 1) * shared
    T = torch.randn(12, 40) * 0.4 + shared
    aligned, paper = (run(G2IS(mode, neighbours=20), problem_of(G, T), 40) for mode in ("aligned", "paper"))
    assert aligned.trace["mean_cosine"] > 0.3
    assert abs(paper.trace["mean_cosine"]) < 0.15
    turned = dataclasses.replace(problem_of(G, T), targets=ArrayGradients([f"t{i}" for i in range(12)], -T))
    opposite = run(G2IS(neighbours=20), turned, 40)
    assert opposite.trace["mean_cosine"] > 0.3


@pytest.mark.parametrize(("mode", "other"), [("aligned", "paper"), ("paper", "aligned")])
def test_the_mean_cosine_of_either_mode_is_that_of_a_run_in_it(make_problem, mode, other):
    problem = make_problem(60, d=8)
    both, beside = (run(G2IS(m, 0.9, neighbours=5), problem, 12).trace for m in (mode, other))
    assert both["modes"][other] == beside["modes"][other]
    assert both["modes"][mode]["mean_cosine_to_target"] == pytest.approx(both["mean_cosine"])
    assert both["modes"][other]["mean_cosine_to_target"] == pytest.approx(beside["mean_cosine"])
    assert both["modes"]["pool"]["mean_cosine_to_target"] == pytest.approx(both["pool_mean_cosine"])
    assert list(run(G2IS(mode, compare_modes=False), problem, 12).trace["modes"]) == [mode, "pool"]


def test_the_share_of_picks_against_the_target_is_counted():
    G = [[1.0, 0.1], [1.0, -0.2], [-1.0, 0.3], [0.0, 1.0]]
    trace = run(G2IS(neighbours=3), problem_of(G, [[1.0, 0.0], [2.0, 0.0]]), 2).trace
    assert trace["modes"]["pool"] == {
        "rows": 4,
        "components": None,
        "mean_cosine_to_target": pytest.approx(trace["pool_mean_cosine"]),
        "share_against_it": 0.25,
    }
    assert trace["modes"]["aligned"]["share_against_it"] == 0


def test_a_mode_that_the_target_has_no_directions_for_is_said_so_beside_the_other():
    trace = run(G2IS(), problem_of([[1.0, 0.0], [0.0, 1.0]], [[1.0, 2.0]] * 3), 1).trace
    assert "paper" not in trace["modes"]
    assert "needs targets that differ, got no variance" in trace["mode paper"]


def test_the_graph_is_exact_below_a_size_and_faiss_above(make_problem, monkeypatch):
    pytest.importorskip("faiss")
    problem = make_problem(80)
    assert run(G2IS(neighbours=5), problem, 1).trace["graph"] == "exact, of the visited candidates"
    assert run(G2IS(neighbours=5), problem, 30).trace["graph"] == "exact, of all candidates"
    monkeypatch.setattr("gradsieve.selectors.g2is.EXACT_UP_TO", 79)
    monkeypatch.setattr("gradsieve.selectors.graph.FAISS_FROM", 10)
    assert run(G2IS(neighbours=5), problem, 30).trace["graph"] == "faiss"
    assert run(G2IS(neighbours=0), problem, 30).trace["graph"] == "exact, of the visited candidates"


def test_its_warm_up_ends_in_adam_s_direction_and_may_be_left_out():
    assert G2IS().warmup == Warmup(0.05, 4, candidates="adam")
    assert G2IS(warmup_share=0.0).warmup is None
    with pytest.raises(InvalidArgument, match=r"warmup_share must lie in \[0, 1\], got -0.1; 0 is no warm-up"):
        G2IS(warmup_share=-0.1)


def test_picks_less_like_the_target_than_the_pool_are_noted():
    G = [[1.0, 0.1], [1.0, 0.2], [1.0, -0.3], [0.0, 1.0], [0.05, 1.0]]
    T = [[3.0, 1.0], [3.0, -1.0], [3.0, 1.0], [3.0, -1.0]]  # centred, only the second axis is left
    selection = run(G2IS("paper"), problem_of(G, T), 2)
    assert "the picks are less like the target than the pool is" in selection.notes[0]
    assert "use mode aligned" in selection.notes[0]
    assert not any("less like" in note for note in run(G2IS(), problem_of(G, T), 2).notes)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 500), st.lists(st.integers(1, 50), min_size=1, max_size=9))
def test_the_budget_is_split_without_loss_and_within_one_of_the_exact_share(total, sizes):
    shares = torch.tensor(sizes, dtype=torch.float64) / sum(sizes)
    parts = largest_remainder(total, shares)
    assert sum(parts) == total
    assert all(abs(part - total * share) < 1 + 1e-9 for part, share in zip(parts, shares.tolist(), strict=True))
    assert parts == remainder_naive(total, shares.tolist())


def test_remainders_go_to_the_largest():
    assert largest_remainder(10, torch.tensor([0.57, 0.33, 0.10], dtype=torch.float64)) == [6, 3, 1]
    assert largest_remainder(3, torch.tensor([0.5, 0.5], dtype=torch.float64)) == [2, 1]


def test_a_token_shortfall_says_what_is_left():
    tokens = torch.tensor([30.0, 90.0])
    selection = run(G2IS(), problem_of([[1.0, 0.1], [1.0, 0.2]], [[1.0, 0.0], [1.0, 0.1]], tokens=tokens), "100tok")
    assert selection.rows.tolist() == [0]
    spent, cause = selection.notes[-1].split(". ")
    assert spent == "the chosen 1 examples spend 30 of the budget's 100 tokens"
    assert cause.endswith(
        "after 1 examples of a budget of 100 tokens: each of the 1 candidates left has more tokens than remain"
    )


def test_a_graph_made_at_once_and_lists_on_demand_give_the_same_walk(make_problem, monkeypatch):
    problem = make_problem(80)
    at_once = run(G2IS(neighbours=5), problem, 30)
    monkeypatch.setattr("gradsieve.selectors.g2is.VISITS", 0)
    assert torch.equal(run(G2IS(neighbours=5), problem, 30).rows, at_once.rows)


def test_the_layout_has_a_place_for_every_pick_and_the_target(make_problem):
    selection = run(G2IS(), make_problem(700), 20)
    layout = selection.trace["layout"]
    assert len(layout["picks"]) == len(selection.rows)
    assert len(layout["sample"]) == len(layout["sample_rows"]) == 500
    assert len(layout["target"]) == 2
    both = dict(zip(layout["sample_rows"], layout["sample"], strict=True))
    for row, place in zip(selection.rows.tolist(), layout["picks"], strict=True):
        if row in both:
            assert place == pytest.approx(both[row])
    spread = np.var(np.array(layout["sample"]), axis=0)
    assert spread[0] >= spread[1] > 0


def test_targets_without_variance_are_refused():
    G = [[1.0, 0.0], [0.0, 1.0]]
    with pytest.raises(InvalidArgument, match="mode paper needs targets that differ, got no variance; "):
        run(G2IS("paper"), problem_of(G, [[1.0, 2.0]] * 3), 1)
    with pytest.raises(InvalidArgument, match="g2is needs targets with a gradient that is not zero"):
        run(G2IS(), problem_of(G, [[0.0, 0.0]]), 1)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"mode": "centred"}, "mode must be one of aligned, paper, got 'centred'"),
        ({"graph": "hnsw"}, "graph must be one of auto, exact, faiss, got 'hnsw'"),
        ({"on_shortfall": "pad"}, "on_shortfall must be one of stop, next-component, got 'pad'"),
        ({"explained": 0.0}, r"explained must lie in \(0, 1\], got 0.0; "),
        ({"delta": 1.5}, r"delta must lie in \[0, 1\], got 1.5; "),
        ({"neighbours": -1}, "neighbours must be at least 0, got -1; "),
        ({"neighbours": 0, "graph": "faiss"}, "neighbours must be at least 1 with graph faiss, got 0; "),
    ],
)
def test_settings_that_break_a_rule_are_refused(wrong, message):
    with pytest.raises(InvalidArgument, match=message):
        G2IS(**wrong)
