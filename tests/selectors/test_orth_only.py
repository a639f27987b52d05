from dataclasses import replace

import pytest
import torch

from gradsieve.selectors.orth_only import OrthOnly
from gradsieve.types import ArrayGradients, Budget, Problem, Reference


def select(problem, budget, **fields):
    return OrthOnly(**fields).select(problem, Budget.parse(budget), torch.Generator())


def test_the_most_orthogonal_come_first_whatever_the_sign_and_ties_by_id():
    G = torch.tensor([[3.0, 0.0], [-1.0, 1.0], [0.0, -2.0], [5.0, 5.0], [0.0, 9.0]])
    pool = ArrayGradients.from_matrix(G, ["a", "c", "e", "b", "d"], {"anchor": torch.tensor([7.0, 0.0])})
    selection = select(Problem(pool), 4)
    assert [pool.ids[row] for row in selection.rows] == ["d", "e", "b", "c"]
    assert torch.allclose(selection.scores, torch.tensor([0, 1 - 0.5**0.5, 1, 1 - 0.5**0.5, 1], dtype=torch.float64))


def test_it_is_the_naive_rule(make_problem):
    problem = make_problem(80)
    columns, ids = problem.candidates.columns, problem.candidates.ids
    orth = [1 - abs(columns["dot/anchor"][i].item() / columns["norm"][i].item()) for i in range(80)]
    naive = sorted(range(80), key=lambda i: (-orth[i], ids[i]))[:20]
    selection = select(problem, "25%")
    assert selection.rows.tolist() == naive
    assert selection.trace["orth"] == pytest.approx(orth)


def test_a_noisy_anchor_is_noted(make_problem):
    problem = make_problem(10)
    noisy = replace(problem, references={"anchor": Reference(1.0, 300, 0.1), "target": Reference(1.0, 300, 0.1)})
    assert select(problem, 2).notes == ()
    (note,) = select(noisy, 2).notes
    assert "'anchor' is unreliable" in note
