"""GRAD-MATCH on problems: what is matched, what the weights mean, and what a shortfall says."""

from __future__ import annotations

import pytest
import torch

from gradsieve.errors import InvalidArgument
from gradsieve.selectors.gradmatch import GradMatch
from gradsieve.types import ArrayGradients, Budget, Problem


def run(method, problem, budget):
    return method.select(problem, Budget.parse(budget), torch.Generator())


def problem_of(G, T, **columns):
    G, T = torch.as_tensor(G, dtype=torch.float32), torch.as_tensor(T, dtype=torch.float32)
    columns = {name: torch.tensor(values) for name, values in columns.items()}
    ids = [f"{i:03d}" for i in range(max(len(G), len(T)))]
    return Problem(ArrayGradients(ids[: len(G)], G, columns), ArrayGradients(ids[: len(T)], T))


def test_the_weighted_mean_of_the_selection_is_the_targets_mean_in_a_case_solved_by_hand():
    problem = problem_of([[0.0, 2.0], [4.0, 0.0], [-1.0, 0.0]], [[5.0, 1.0], [1.0, 1.0]])  # the mean is (3, 1)
    selection = run(GradMatch(lam=0.0), problem, 2)
    assert selection.rows.tolist() == [1, 0]
    assert selection.weights.tolist() == pytest.approx([2 * 3 / 4, 2 * 1 / 2])
    assert selection.trace["error"] == pytest.approx([1 / 10**0.5, 0.0])
    assert selection.trace["weight_sum"] == pytest.approx(3 / 4 + 1 / 2)
    assert selection.scores.tolist() == pytest.approx([2 / 10**0.5, 12 / 10**0.5, -3 / 10**0.5])
    assert selection.notes == ()


def test_lam_is_a_share_of_the_mean_squared_norm():
    selection = run(GradMatch(lam=0.5), problem_of([[2.0, 0.0], [0.0, -4.0]], [[3.0, 1.0]]), 1)  # mean squared norm 10
    assert selection.weights.tolist() == pytest.approx([6 / (4 + 5)])


def test_the_pool_can_be_matched_by_a_few_of_its_examples(make_problem):
    problem = make_problem(200)
    selection = run(GradMatch(match="pool", lam=0.0), problem, "16")
    G = problem.candidates.rows(torch.arange(200)).double()
    mean = G.mean(0)
    matched = (selection.weights[:, None] * G[selection.rows]).mean(0)
    error = float((matched - mean).norm() / mean.norm())
    assert error == pytest.approx(selection.trace["error"][-1])
    assert error < 0.2
    plain = G[torch.randperm(200)[:16]].mean(0)
    assert error < 0.5 * float((plain - mean).norm() / mean.norm())
    assert "targets" not in GradMatch(match="pool").needs


def test_matching_the_target_is_not_matching_the_pool(make_problem):
    problem = make_problem(60)
    assert run(GradMatch(), problem, 10).rows.tolist() != run(GradMatch(match="pool"), problem, 10).rows.tolist()


def test_more_lam_spreads_the_weight(make_problem):
    problem = make_problem(60)
    spread = [run(GradMatch(lam=lam), problem, 40).weights for lam in (0.0, 0.5, 50.0)]
    effective = [float(w.sum() ** 2 / w.square().sum()) for w in spread]
    assert effective[0] < effective[1] < effective[2]


def test_no_aligned_example_gives_an_empty_selection_that_says_why():
    selection = run(GradMatch(), problem_of([[-1.0, 0.0], [0.0, 1.0]], [[1.0, 0.0]]), 2)
    assert selection.rows.tolist() == []
    assert selection.weights.shape == (0,)
    assert (
        "0 examples are chosen of the 2 the budget asks for: no other example's gradient has a positive" in selection.notes[0]
    )
    assert "100.00% of the gradient's length is left" in selection.notes[0]


def test_repeated_examples_are_chosen_once_without_lam_and_the_shortfall_is_stated():
    selection = run(GradMatch(lam=0.0), problem_of([[1.0, 1.0]] * 4, [[1.0, 0.5]]), 4)
    assert selection.rows.tolist() == [0]
    assert "1 examples are chosen of the 4" in selection.notes[0]


def test_a_gradient_that_is_matched_early_ends_the_selection_with_a_note():
    selection = run(GradMatch(lam=0.0), problem_of([[1.0, 0.0], [0.0, 0.1], [-0.9, 0.1]], [[2.0, 0.0]]), 3)
    assert selection.rows.tolist() == [0]
    assert "1 examples are chosen of the 3 the budget asks for: they match the gradient to 0.0001" in selection.notes[0]


def test_a_token_budget_keeps_the_set_that_matches_better_and_passes_over_what_does_not_fit():
    G = [[4.0, 0.0, 0.0], [0.0, 3.0, 0.0], [0.0, 0.0, 2.0], [-1.0, -1.0, -1.0]]
    problem = problem_of(G, [[1.0, 1.0, 1.0]], tokens=[10.0, 50.0, 5.0, 5.0])  # per token 16/10, 9/50, 4/5
    selection = run(GradMatch(), problem, "30tok")
    assert selection.rows.tolist() == [0, 2]
    assert "spend 15 of the budget's 30 tokens: no other that would help is as short as what is left" in selection.notes[0]
    assert "the one that would most, '001', has 50 tokens" in selection.notes[0]
    assert run(GradMatch(), problem, "65tok").rows.tolist() == [0, 1, 2]
    none = problem_of(G[:3], [[1.0, 1.0, 1.0]], tokens=[10.0, 50.0, 5.0])
    assert "spend 15 of the budget's 30 tokens: what is left pays for no other" in run(GradMatch(), none, "30tok").notes[0]


def test_one_long_example_or_many_short_ones_whichever_matches_better():
    # the long one has the largest product and takes all of the budget; the three short ones make the target together
    G = [[1.5, 1.5, 0.3], [2.0, 0.0, 0.0], [0.0, 2.0, 0.0], [0.0, 0.0, 2.0]]
    many = run(GradMatch(lam=0.0, exchange=False), problem_of(G, [[1.0, 1.0, 1.0]], tokens=[30.0, 10.0, 10.0, 10.0]), "30tok")
    assert sorted(many.rows.tolist()) == [1, 2, 3]
    assert many.trace["by"] == "squared product per token"
    assert many.trace["error"][-1] == pytest.approx(0, abs=1e-6)
    # a short one helps a little more per token, but leaves too little for the long one that makes nearly all of the target
    G = [[3.0, 3.0, 0.0], [0.5, 0.0, 0.0]]
    one = run(GradMatch(lam=0.0, exchange=False), problem_of(G, [[1.0, 1.0, 0.0]], tokens=[300.0, 2.0]), "300tok")
    assert one.rows.tolist() == [0]
    assert one.trace["by"] == "product"


def test_a_target_without_a_mean_gradient_is_refused():
    with pytest.raises(InvalidArgument, match="gradmatch needs a mean gradient of the target to match, got zero; "):
        run(GradMatch(), problem_of([[1.0, 0.0]], [[1.0, 0.0], [-1.0, 0.0]]), 1)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"match": "anchor"}, "match must be one of target, pool, got 'anchor'"),
        ({"lam": -1.0}, "lam must be at least 0 and finite, got -1.0; "),
        ({"lam": float("nan")}, "lam must be at least 0 and finite, got nan; "),
        ({"tolerance": 1.0}, r"tolerance must lie in \[0, 1\), got 1.0; "),
    ],
)
def test_settings_that_break_a_rule_are_refused(settings, message):
    with pytest.raises(InvalidArgument, match=message):
        GradMatch(**settings)
