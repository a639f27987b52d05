"""RDS+ against a loop, a case by hand, and what turns mean when targets want the same."""

from __future__ import annotations

import pytest
import torch

from gradsieve.errors import InvalidArgument
from gradsieve.selectors import round_robin
from gradsieve.selectors.rds import RDS
from gradsieve.types import ArrayGradients, Budget, Problem


def run(problem, budget):
    return RDS().select(problem, Budget.parse(budget), torch.Generator())


def of_hidden(X, T, tokens=None):
    """Returns a problem with these hidden states, ids a, b, c, … and no sketches."""

    def part(H):
        ids = [chr(ord("a") + i) for i in range(len(H))]
        columns = {} if tokens is None else {"tokens": torch.tensor(tokens[: len(H)])}
        return ArrayGradients(ids, torch.empty(len(H), 0), columns, {"hidden": torch.as_tensor(H, dtype=torch.float32)})

    return Problem(part(X), part(T))


def rds_naive(X, T, ids, target_ids, k, tokens=None, purse=0):
    """Every target in turn walks down its own full ranking, past what is taken and what is too dear."""
    tokens = tokens or [0] * len(ids)
    similarity = torch.nn.functional.cosine_similarity(X[:, None].double(), T[None].double(), dim=2)
    order = sorted(range(len(target_ids)), key=target_ids.__getitem__)
    taken = []
    rest = list(range(len(ids)))
    while rest and len(taken) < k:
        for j in order:
            left = purse - sum(tokens[i] for i in taken)
            rest = [i for i in range(len(ids)) if i not in taken and tokens[i] <= left]
            if rest and len(taken) < k:
                taken.append(min(rest, key=lambda i: (-round(float(similarity[i, j]), 6), ids[i])))
    return taken, similarity.amax(1)


@pytest.mark.parametrize("k", [1, 5, 24, 40])
@pytest.mark.parametrize("m", [1, 4, 9])
def test_it_takes_what_a_walk_down_every_ranking_takes(k, m, make_problem):
    for seed in range(3):
        problem = make_problem(40, m=m, seed=seed)
        pool, targets = problem.candidates, problem.targets
        rows, best = rds_naive(pool.extra["hidden"], targets.extra["hidden"], pool.ids, targets.ids, k)
        selection = run(problem, k)
        assert selection.rows.tolist() == rows
        assert torch.allclose(selection.scores, best, atol=1e-6)


def test_lists_that_run_out_and_targets_in_parts_change_nothing(make_problem, monkeypatch):
    problem = make_problem(60, m=7)
    problem.targets.extra["hidden"][1:] = problem.targets.extra["hidden"][0]  # all want the same
    whole = run(problem, 30)
    monkeypatch.setattr(round_robin, "LISTED", 1)
    monkeypatch.setattr(round_robin, "PRODUCT_BYTES", 8 * 60 * 2)
    assert torch.equal(run(problem, 30).rows, whole.rows)
    assert torch.equal(run(problem, 30).scores, whole.scores)
    assert whole.trace["targets_served"] == 7


def test_a_case_solved_by_hand():
    # targets x and y; x takes a (cosine 1), y takes c, x takes b, y what is left
    problem = of_hidden([[1, 0], [3, 1], [0.1, 2], [-1, 1]], [[5, 0], [0, 1]])
    selection = run(problem, 3)
    assert selection.rows.tolist() == [0, 2, 1]
    assert selection.scores.tolist() == pytest.approx([1, 3 / 10**0.5, 2 / 4.01**0.5, 1 / 2**0.5])
    assert selection.trace["similarity"] == pytest.approx([1, 2 / 4.01**0.5, 3 / 10**0.5])
    assert selection.trace["targets_served"] == 2


def test_a_candidate_that_two_targets_want_most_goes_to_the_first_and_the_second_takes_its_next():
    problem = of_hidden([[1, 1], [1, 0.9], [0, -1]], [[1, 1], [2, 2]])
    assert run(problem, 2).rows.tolist() == [0, 1]
    assert run(problem, 2).trace["similarity"] == pytest.approx([1, 1.9 / (2 * 1.81) ** 0.5])


def test_a_target_passes_over_what_the_rest_of_a_token_budget_does_not_pay_for():
    problem = of_hidden([[1, 0], [1, 0.1], [0, 1], [0.1, 1]], [[1, 0], [0, 1]], tokens=[10, 10, 100, 10])
    selection = run(problem, "30tok")
    assert selection.rows.tolist() == [0, 3, 1]
    assert selection.notes == ()
    short = run(problem, "29tok")
    assert short.rows.tolist() == [0, 3]
    assert "the chosen 2 examples spend 20 of the budget's 29 tokens" in short.notes[-1]


@pytest.mark.parametrize("listed", [1, 1 << 22])
def test_a_token_budget_takes_what_a_walk_down_every_ranking_takes(listed, make_problem, monkeypatch):
    monkeypatch.setattr(round_robin, "LISTED", listed)
    for seed in range(6):
        problem = make_problem(40, m=1 + seed, seed=seed)
        pool, targets = problem.candidates, problem.targets
        tokens = pool.columns["tokens"].tolist()
        rows, _ = rds_naive(pool.extra["hidden"], targets.extra["hidden"], pool.ids, targets.ids, 40, tokens, 500)
        assert run(problem, "500tok").rows.tolist() == rows


def test_zero_rows_take_no_part():
    problem = of_hidden([[0, 0], [1, 0], [0, 1]], [[0, 0], [1, 1]])
    selection = run(problem, 3)
    assert sorted(selection.rows.tolist()) == [1, 2]
    assert selection.scores[0].isnan()
    assert "1 of 3 candidates have a zero hidden vector, which has no direction; left out: a" in selection.notes[0]
    assert "1 of 2 targets have a zero hidden vector" in selection.notes[1]
    assert selection.trace["targets"] == 1


def test_other_widths_are_refused():
    problem = of_hidden([[1, 0], [0, 1]], [[1, 0, 0]])
    with pytest.raises(InvalidArgument, match=r"the targets must be as wide as the candidates \(2\), got 3"):
        run(problem, 1)
