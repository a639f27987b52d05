"""ogs-static where every target takes in its turn (utility each), against a walk down every target's own ranking."""

from __future__ import annotations

import pytest
import torch

from gradsieve.errors import InvalidArgument
from gradsieve.selectors import round_robin
from gradsieve.selectors.directions import Directions
from gradsieve.selectors.ogs_static import OGSStatic
from gradsieve.selectors.rds import RDS
from gradsieve.selectors.round_robin import Similar, take_turns
from gradsieve.types import ArrayGradients, Budget, Problem


def select(problem, budget, **fields):
    return OGSStatic(utility="each", **fields).select(problem, Budget.parse(budget), torch.Generator())


def unit(rows):
    """Unit rows on the grid of sketches, so that no rounding decides between two that are worth nearly the same."""
    return (torch.nn.functional.normalize(rows.double(), dim=1) * 2**24).round() / 2**24


def walk(problem, penalty, risk, k, tokens=None, purse=0, without=()):
    """The rows that targets, by id, take one after another by cosine - λ·risk; of what `purse` still pays for, if of tokens."""
    pool, targets = problem.candidates, problem.targets
    cosine = unit(pool.rows(torch.arange(len(pool.ids)))) @ unit(targets.rows(torch.arange(len(targets.ids)))).T
    worth = cosine - penalty * risk[:, None]
    taken: list[int] = []
    for turn in range(k):
        target = sorted(range(len(targets.ids)), key=targets.ids.__getitem__)[turn % len(targets.ids)]
        left = purse - sum(tokens[row] for row in taken) if tokens else 0
        free = [row for row in range(len(pool.ids)) if row not in (*taken, *without) and (not tokens or tokens[row] <= left)]
        if not free:
            break
        taken.append(min(free, key=lambda row: (-worth[row, target].item(), pool.ids[row])))
    return taken, cosine.amax(1)


def overlap(problem):
    columns = problem.candidates.columns
    return (columns["dot/anchor"] / columns["norm"]).abs().double()


@pytest.mark.parametrize("k", [1, 7, 20])
@pytest.mark.parametrize("bound", [40.0, 60.0, 100.0])
def test_it_takes_what_a_walk_at_its_penalty_takes_within_the_bound(k, bound, make_problem):
    tight = 0
    for seed in range(6):
        problem = make_problem(60, m=5, seed=seed)
        selection, risk = select(problem, k, bound=bound), overlap(problem)
        penalty, limit = selection.trace["lambda"], selection.trace["bound"]
        assert limit == pytest.approx(torch.quantile(risk, bound / 100).item(), abs=1e-6)
        if penalty is None:
            continue
        rows, best = walk(problem, penalty, risk, k)
        assert selection.rows.tolist() == rows
        assert risk[rows].mean() <= limit + 1e-6
        assert selection.trace["utility"] == pytest.approx(best.tolist(), abs=1e-6)
        assert torch.allclose(selection.scores, best - penalty * risk, atol=1e-6)
        assert selection.trace["gap"] is None
        if penalty > 0:
            tight += 1
            missed = max(tried for tried, mean, _ in selection.trace["path"] if tried < penalty and mean > limit)
            assert penalty - missed <= 1e-4 * penalty
            assert risk[walk(problem, missed, risk, k)[0]].mean() > limit
    assert tight or bound == 100


def test_with_room_for_every_risk_it_is_rds_by_gradient(make_problem):
    problem = make_problem(50, m=7)
    gradients = {"hidden": problem.candidates.rows(torch.arange(50))}
    states = ArrayGradients(problem.candidates.ids, torch.empty(50, 0), problem.candidates.columns, gradients)
    wanted = ArrayGradients(problem.targets.ids, torch.empty(7, 0), {}, {"hidden": problem.targets.rows(torch.arange(7))})
    by_states = RDS().select(Problem(states, wanted), Budget.parse("20"), torch.Generator())
    free = select(problem, "20", bound=100.0)
    assert free.trace["lambda"] == 0
    assert torch.equal(free.rows, by_states.rows)


def test_cosines_that_are_too_many_to_keep_are_made_again_with_the_same_choice(make_problem, monkeypatch):
    problem = make_problem(50, m=7)
    kept = select(problem, "20")
    monkeypatch.setattr(round_robin, "CACHE_BYTES", 0)
    monkeypatch.setattr(round_robin, "PRODUCT_BYTES", 8 * 50 * 3)
    again = select(problem, "20")
    assert kept.trace["lambda"] > 0
    assert torch.equal(again.rows, kept.rows)
    assert torch.equal(again.scores, kept.scores)


def test_the_choice_is_as_mixed_as_the_target_where_the_mean_takes_one_kind():
    rng = torch.Generator().manual_seed(0)
    common, rare = torch.eye(24)[0], torch.eye(24)[1]

    def around(kind, count):
        return kind + 0.15 * torch.randn(count, 24, generator=rng)

    G = torch.cat([around(common, 30), around(rare, 30)])
    T = torch.cat([around(common, 6), around(rare, 2)])
    pool = ArrayGradients.from_matrix(G, references={"target": T.mean(0), "anchor": torch.eye(24)[2]})
    problem = Problem(pool, ArrayGradients.from_matrix(T, [f"t{i}" for i in range(8)]))

    def of_the_rare(utility):
        method = OGSStatic(utility=utility, bound=100.0)
        return int((method.select(problem, Budget.parse("16"), torch.Generator()).rows >= 30).sum())

    trace = OGSStatic(utility="each", bound=100.0).select(problem, Budget.parse("5"), torch.Generator()).trace
    assert (trace["targets_served"], trace["targets"]) == (5, 8)
    assert of_the_rare("mean") == 0
    assert of_the_rare("each") == 4


def test_a_token_budget_keeps_the_bound_and_takes_what_a_walk_takes(make_problem):
    walked = 0
    for seed in range(8):
        problem = make_problem(40, m=4, seed=seed)
        selection, risk = select(problem, "400tok", bound=60.0), overlap(problem)
        tokens = problem.candidates.columns["tokens"].tolist()
        assert sum(tokens[row] for row in selection.rows.tolist()) <= 400
        if selection.trace["lambda"] is not None:
            walked += 1
            rows, _ = walk(problem, selection.trace["lambda"], risk, 40, tokens, 400)
            assert selection.rows.tolist() == rows
            assert risk[rows].mean() <= selection.trace["bound"] + 1e-6
    assert walked >= 4


def test_a_bound_that_nothing_meets_is_said_and_the_safest_are_taken(make_problem):
    problem = make_problem(40, m=4)
    selection = select(problem, "10", bound=0.0)
    assert selection.trace["lambda"] is None
    assert sorted(selection.rows.tolist()) == sorted(overlap(problem).argsort()[:10].tolist())
    assert any(note.startswith("infeasible: the least risky") for note in selection.notes)


def test_zero_rows_and_targets_take_no_part_by_name(make_problem):
    problem = make_problem(30, m=4)
    pool, targets = problem.candidates, problem.targets
    pool.sketch["base"][3] = 0
    pool.columns["norm"][3] = 0
    pool.columns["norm"][7] = 0  # too small for its own norm, not for its sketch
    targets.sketch["base"][1] = 0
    selection = select(problem, "30")
    assert len(selection.rows) == 28
    assert not {3, 7} & set(selection.rows.tolist())
    assert any(pool.ids[3] in note and "left out" in note for note in selection.notes)
    assert any(targets.ids[1] in note and "targets" in note for note in selection.notes)
    targets.sketch["base"][:] = 0
    with pytest.raises(InvalidArgument, match="zero for all 4 targets"):
        select(problem, "5")


def test_from_what_a_filter_leaves_the_targets_take_in_turns(make_problem):
    problem = make_problem(40, m=6)
    selection, risk = select(problem, "12", form="filter", drop=25.0, draw="utility"), overlap(problem)
    dropped = risk.argsort(descending=True)[:10].tolist()
    assert selection.trace["dropped"] == sorted(dropped)
    rows, best = walk(problem, 0.0, risk, 12, without=dropped)
    assert selection.rows.tolist() == rows
    assert selection.scores.isnan().nonzero()[:, 0].tolist() == sorted(dropped)
    assert torch.allclose(selection.scores.nan_to_num(), best.index_fill(0, torch.tensor(dropped), 0.0), atol=1e-6)


def test_a_cost_decides_who_is_taken_and_not_how_similar_it_is():
    pool = ArrayGradients(["a", "b", "c"], torch.tensor([[1.0, 0.0], [3.0, 4.0], [4.0, 3.0]]))
    similar = Similar(Directions.of(pool), Directions.of(ArrayGradients(["t"], torch.tensor([[2.0, 0.0]]))))
    turns = take_turns(similar, Budget.parse("3"), torch.tensor([0.5, 0.0, torch.nan], dtype=torch.float64))
    assert turns.rows.tolist() == [1, 0]
    assert turns.similarity.tolist() == pytest.approx([0.6, 1.0])
    assert similar.best().tolist() == pytest.approx([1.0, 0.6, 0.8])


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"stratify": "length"}, "stratify must be none with utility each, got length; use utility mean"),
        ({"stratify": "length", "form": "filter", "draw": "utility"}, "stratify must be none with utility each"),
        ({"center": True}, "center must be off with utility each"),
    ],
)
def test_settings_that_do_not_go_with_turns_are_refused(fields, message):
    with pytest.raises(InvalidArgument, match=message):
        OGSStatic(utility="each", **fields)
