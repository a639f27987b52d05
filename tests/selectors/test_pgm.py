"""PGM against GRAD-MATCH on each part, and what its weights, budgets and notes mean."""

from __future__ import annotations

import pytest
import torch

from gradsieve.errors import InvalidArgument
from gradsieve.selectors import pgm
from gradsieve.selectors.gradmatch import GradMatch
from gradsieve.selectors.pgm import PGM
from gradsieve.types import ArrayGradients, Budget, Problem


def run(method, problem, budget, seed=0):
    return method.select(problem, Budget.parse(budget), torch.Generator().manual_seed(seed))


def pgm_naive(problem, partitions, size, budget, match, lam, seed):
    """Cuts the shuffled pool in mini-batches and parts, runs GRAD-MATCH on each part, and takes the union part by part."""
    pool, n = problem.candidates, len(problem.candidates.ids)
    G = pool.rows(torch.arange(n)).double()
    order = torch.tensor(sorted(range(n), key=pool.ids.__getitem__))
    order = order[torch.randperm(n, generator=torch.Generator().manual_seed(seed))]
    batches = [sorted(b.tolist(), key=pool.ids.__getitem__) for b in order.split(size)]
    means = torch.stack([G[b].mean(0) for b in batches])
    weight = {}
    queues = []
    for part in torch.arange(len(batches)).tensor_split(partitions):
        of_part = ArrayGradients([f"{i:04d}" for i in part.tolist()], means[part])
        picks = budget // size // partitions
        chosen = GradMatch(match, lam=lam, exchange=False).select(
            Problem(of_part, problem.targets), Budget(examples=picks), torch.Generator()
        )
        queue = part[chosen.rows].tolist()
        queues.append(queue)
        members = sum(len(batches[i]) for i in part.tolist())
        for i, w in zip(queue, (chosen.weights / len(chosen.rows)).tolist(), strict=True):
            weight[i] = w * members / n / len(batches[i])
    turns = [queue[j] for j in range(max(map(len, queues))) for queue in queues if j < len(queue)]
    rows = [row for i in turns for row in batches[i]]
    return rows, [weight[i] * len(rows) for i in turns for _ in batches[i]]


@pytest.mark.parametrize("match", ["target", "pool"])
@pytest.mark.parametrize(("partitions", "size"), [(1, 1), (1, 4), (3, 4), (4, 1)])
def test_it_is_gradmatch_on_the_mini_batches_of_each_part(match, partitions, size, make_problem):
    problem = make_problem(96)
    for seed in range(3):
        selection = run(PGM(partitions, size, match, lam=0.5), problem, 48 if size == 4 else 12, seed)
        budget = 48 if size == 4 else 12
        rows, weights = pgm_naive(problem, partitions, size, budget, match, 0.5, seed)
        assert selection.rows.tolist() == rows
        assert selection.weights.tolist() == pytest.approx(weights, rel=1e-4)


@pytest.mark.parametrize("match", ["target", "pool"])
def test_the_error_in_the_trace_is_that_of_the_weighted_mean_gradient(match, make_problem):
    problem = make_problem(80)
    selection = run(PGM(4, 2, match), problem, 32)
    G = problem.candidates.rows(torch.arange(80)).double()
    wanted = G.mean(0) if match == "pool" else problem.targets.rows(torch.arange(6)).double().mean(0)
    matched = (selection.weights[:, None] * G[selection.rows]).mean(0)
    assert selection.trace["error_by_partitions"] == {
        4: pytest.approx(float((matched - wanted).norm() / wanted.norm()), rel=1e-5)
    }


def test_the_curve_has_the_error_of_gradmatch_and_of_each_number_of_parts(make_problem):
    problem = make_problem(200, d=32)
    selection = run(PGM(8, 1, "pool", lam=0.0, curve=True), problem, 24)
    assert list(selection.trace["error_by_partitions"]) == [1, 2, 4, 8]
    gradmatch = run(GradMatch("pool", lam=0.0, exchange=False), problem, 24).trace["error"][-1]
    errors = selection.trace["error_by_partitions"]
    assert errors[1] == pytest.approx(gradmatch, rel=1e-5)
    assert errors[8] > errors[1]
    assert list(selection.trace["bars"]["error by number of parts"]) == ["8 parts", "1 part", "2 parts", "4 parts"]
    assert selection.trace["bars"] == {
        "error by number of parts": {"8 parts": errors[8], "1 part": errors[1], "2 parts": errors[2], "4 parts": errors[4]}
    }
    assert torch.equal(selection.rows, run(PGM(8, 1, "pool", lam=0.0), problem, 24).rows)


def test_without_the_curve_nothing_is_compared(make_problem):
    assert "bars" not in run(PGM(4, 2), make_problem(80), 32).trace


def test_a_case_solved_by_hand():
    # mini-batches of copies: means (2, 0) and (0, 1) in one part; the target is (3, 1); weights 3/2 and 1, halved over two rows
    G = torch.tensor([[2.0, 0.0], [0.0, 1.0]])
    problem = Problem(ArrayGradients(["a", "b"], G), ArrayGradients(["t"], torch.tensor([[3.0, 1.0]])))
    selection = run(PGM(1, 1, lam=0.0), problem, 2)
    assert selection.rows.tolist() == [0, 1]
    assert selection.weights.tolist() == pytest.approx([2 * 1.5, 2 * 1.0])
    assert selection.trace["parts"] == [{"batches": 2, "picked": 2, "error": pytest.approx(0, abs=1e-7), "stop": "matched"}]
    both = run(PGM(1, 2, lam=0.0), problem, 2)  # one mini-batch, mean (1, 1/2): weight (3 + 1/2)/(5/4) = 2.8
    assert both.weights.tolist() == pytest.approx([2 * 1.4] * 2)
    assert both.scores.tolist() == pytest.approx([3.5 / 10**0.5] * 2)


def test_whole_mini_batches_are_dealt_to_the_parts(make_problem):
    selection = run(PGM(4, 4), make_problem(64), 36)  # nine mini-batches for four parts of the same size
    assert [part["picked"] for part in selection.trace["parts"]] == [3, 2, 2, 2]
    assert selection.notes == ()


@pytest.mark.parametrize("budget", [24, "600tok"])
def test_passes_and_threads_change_nothing(budget, make_problem, monkeypatch):
    problem = make_problem(90, d=16)
    whole = run(PGM(6, 2, curve=True, workers=1), problem, budget)
    many = run(PGM(6, 2, curve=True, workers=5), problem, budget)
    monkeypatch.setattr(pgm, "SUM_BYTES", 8 * 16 * 15)  # two parts of seven or eight mini-batches a pass
    passes = []
    means = pgm._Deal.means
    monkeypatch.setattr(pgm._Deal, "means", lambda self, *span: passes.append(span) or means(self, *span))
    parted = run(PGM(6, 2, curve=True, workers=2), problem, budget)
    assert len(passes) > 6
    for other in (many, parted):
        assert torch.equal(whole.rows, other.rows)
        assert torch.equal(whole.weights, other.weights)
        assert torch.equal(whole.scores, other.scores)
        assert whole.trace == other.trace


def test_what_is_taken_by_pieces_is_the_whole():
    torch.manual_seed(0)
    M, sizes, v = torch.randn(9000, 3), torch.rand(9000).double(), torch.randn(3).double()
    assert torch.allclose(pgm._weighted_sum(M, sizes), sizes @ M.double())
    assert torch.allclose(pgm._products(M, v), M.double() @ v)


def test_a_budget_that_is_no_multiple_of_a_mini_batch_is_a_stated_shortfall(make_problem):
    selection = run(PGM(2, 4), make_problem(60), 15)
    assert len(selection.rows) == 12
    assert selection.notes == (
        "12 examples are chosen of the 15 the budget asks for: no mini-batch of 4 examples that would help costs as "
        "little as is left to its part",
    )


@pytest.mark.parametrize(("n", "parts"), [(10, 3), (9, 3), (103, 4), (12, 1)])
def test_the_whole_pool_can_be_taken(n, parts):
    near = 1 + 0.01 * torch.randn(n, 200, generator=torch.Generator().manual_seed(n))
    problem = Problem(ArrayGradients([f"{i:03}" for i in range(n)], near), ArrayGradients(["t"], torch.ones(1, 200)))
    selection = run(PGM(parts, 4, lam=5.0, tolerance=0.0), problem, n)
    assert sorted(selection.rows.tolist()) == list(range(n))
    assert not selection.notes


def test_what_whole_mini_batches_leave_pays_for_the_short_one():
    near = 1 + 0.01 * torch.randn(11, 200, generator=torch.Generator().manual_seed(0))  # mini-batches of 4, 4 and 3
    problem = Problem(ArrayGradients([f"{i:03}" for i in range(11)], near), ArrayGradients(["t"], torch.ones(1, 200)))
    assert len(run(PGM(1, 4, lam=5.0, tolerance=0.0), problem, 7).rows) == 7


def test_a_score_that_is_length_is_noted(make_problem):
    problem = make_problem(60)
    pool = problem.candidates
    scores = run(PGM(2, 3), problem, 12).scores
    pool.columns["completion_tokens"] = scores.argsort().argsort().double() + 1
    selection = run(PGM(2, 3), problem, 12)
    assert selection.trace["length_correlation"] == {"score": pytest.approx(1.0, abs=0.01)}
    assert "score is largely a measure of length" in selection.notes[0]


def test_parts_in_which_nothing_is_aligned_are_a_stated_shortfall():
    G = torch.tensor([[-1.0, 0.1 * i] for i in range(8)])
    problem = Problem(ArrayGradients([str(i) for i in range(8)], G), ArrayGradients(["t"], torch.tensor([[1.0, -0.01]])))
    selection = run(PGM(2, 1), problem, 4)
    assert len(selection.rows) == 0
    assert "in 2 of 2 parts no further mini-batch helps (2 have none with a positive product" in selection.notes[0]


def test_smaller_budgets_than_parts_or_mini_batches_are_met_with_fewer_and_a_note(make_problem):
    selection = run(PGM(8, 4), make_problem(60), 3)
    assert len(selection.rows) == 3
    assert "mini-batches hold 3 examples, not 4: the budget is no larger" in selection.notes[0]
    assert "the pool is cut in 1 parts, not 8" in selection.notes[1]


def test_a_token_budget_pays_for_whole_mini_batches(make_problem):
    problem = make_problem(60)
    selection = run(PGM(2, 3), problem, "700tok")
    tokens = problem.candidates.columns["tokens"][selection.rows]
    assert len(selection.rows) % 3 == 0
    assert 400 < tokens.sum() <= 700
    assert any("spend" in note for note in selection.notes) == (tokens.sum() < 0.95 * 700)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"partitions": 0}, "partitions must be at least 1, got 0"),
        ({"batch": 0}, "batch must be at least 1, got 0"),
        ({"workers": -1}, "workers must be at least 0, got -1"),
        ({"match": "own"}, "match must be one of target, pool, got 'own'"),
    ],
)
def test_settings_that_break_a_rule_are_refused(settings, message):
    with pytest.raises(InvalidArgument, match=message):
        PGM(**settings)
