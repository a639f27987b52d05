from dataclasses import replace

import pytest
import torch

from gradsieve.errors import InvalidArgument
from gradsieve.selectors.less import LESS
from gradsieve.types import ArrayGradients, Budget, Problem, Warmup


def select(problem, budget="25%", **settings):
    return LESS(**settings).select(problem, Budget.parse(budget), torch.Generator())


def grouped(problem, groups):
    targets = replace(problem.targets, columns=dict(problem.targets.columns) | {"group": torch.tensor(groups)})
    return replace(problem, targets=targets)


def less_naive(pool, targets, groups, rates):
    """max over groups of the mean over the group of Σ_c η_c cos, one pair at a time."""
    scores = []
    for i in range(len(pool.ids)):
        means = []
        for group in sorted(set(groups)):
            members = [j for j in range(len(groups)) if groups[j] == group]
            total = 0.0
            for checkpoint, rate in zip(pool.checkpoints, rates, strict=True):
                for j in members:
                    a, b = (g.sketch[checkpoint][row].double() for g, row in ((pool, i), (targets, j)))
                    total += rate * torch.nn.functional.cosine_similarity(a, b, dim=0).item()
            means.append(total / len(members))
        scores.append(max(means))
    return scores


@pytest.mark.parametrize(
    ("groups", "rates"), [([0] * 6, (1.0,)), ([2, 7, 7, 2, 2, 9], (1.0,)), ([1, 1, 0, 0, 0, 0], (3e-4, 1e-4))]
)
def test_it_is_the_naive_rule(groups, rates, make_problem):
    problem = grouped(make_problem(40, checkpoints=len(rates)), groups)
    shares = [rate / sum(rates) for rate in rates]
    naive = less_naive(problem.candidates, problem.targets, groups, shares)
    selection = select(problem, rates=rates)
    assert selection.scores.tolist() == pytest.approx(naive, abs=3e-7)
    ids = problem.candidates.ids
    assert selection.rows.tolist() == sorted(range(40), key=lambda i: (-naive[i], ids[i]))[:10]


def test_the_group_that_is_matched_best_counts_not_the_mean_of_all():
    targets = ArrayGradients.from_matrix(torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 2.0]]))
    pool = ArrayGradients(["diagonal", "rare", "common"], torch.tensor([[1.0, 1.0], [3.0, 0.0], [0.0, 0.1]]))
    one = select(Problem(pool, targets), 1)
    assert [pool.ids[i] for i in one.rows] == ["diagonal"]
    two = select(grouped(Problem(pool, targets), [4, 5, 5]), 2)
    assert [pool.ids[i] for i in two.rows] == ["common", "rare"]
    assert two.scores.tolist() == pytest.approx([0.5**0.5, 1, 1])
    assert two.trace["chosen_per_group"] == {"4": 1, "5": 1}


def test_rates_weigh_the_checkpoints():
    sketch = {"a": torch.tensor([[1.0, 0.0], [0.0, 1.0]]), "b": torch.tensor([[0.0, 1.0], [1.0, 0.0]])}
    target = {"a": torch.tensor([[1.0, 0.0]]), "b": torch.tensor([[1.0, 0.0]])}
    problem = Problem(ArrayGradients(["x", "y"], sketch), ArrayGradients(["t"], target))
    assert select(problem, 1).scores.tolist() == [0.5, 0.5]
    assert select(problem, 1, rates=(1.0, 3.0)).scores.tolist() == [0.25, 0.75]
    assert select(problem, 1, rates=(1.0, 3.0)).trace["shares"] == [0.25, 0.75]


def test_groups_have_the_names_of_the_problem(make_problem):
    problem = replace(grouped(make_problem(20), [1, 1, 0, 2, 2, 2]), groups=("bones", "heart", "skin"))
    assert set(select(problem).trace["chosen_per_group"]) == {"bones", "heart", "skin"}
    with pytest.raises(InvalidArgument, match=r"must lie in \[0, 2\) \(Problem.groups\), got \[0, 1, 2\]"):
        select(replace(problem, groups=("bones", "heart")))


def test_rates_are_those_of_the_warm_up_unless_they_are_given(make_problem):
    problem = replace(make_problem(20, checkpoints=2), rates={"base": 3e-4, "epoch1": 1e-4})
    assert select(problem).trace["shares"] == pytest.approx([0.75, 0.25])
    assert torch.equal(select(problem).scores, select(replace(problem, rates={}), rates=(3e-4, 1e-4)).scores)
    assert select(problem, rates=(1.0, 1.0)).trace["shares"] == [0.5, 0.5]
    with pytest.raises(InvalidArgument, match=r"Problem.rates must have the checkpoints base, epoch1, got base; give one"):
        select(replace(problem, rates={"base": 1.0}))


def test_its_warm_up_keeps_every_pass_and_may_be_left_out():
    assert LESS().warmup == Warmup(0.05, 4, checkpoints="all", candidates="adam")
    assert LESS(warmup_share=0.2, warmup_epochs=1, less_form=True).warmup.candidates == "less"
    assert LESS(warmup_share=0.0).warmup is None
    for wrong, message in (
        ({"warmup_share": 1.5}, r"warmup_share must lie in \[0, 1\], got 1.5"),
        ({"warmup_epochs": 0}, "warmup_epochs must be at least 1, got 0"),
        ({"warmup_share": 0.0, "less_form": True}, "less_form must go with a warm-up, got warmup_share 0"),
    ):
        with pytest.raises(InvalidArgument, match=message):
            LESS(**wrong)


def test_the_score_is_the_same_bits_for_any_block_size(monkeypatch, make_problem):
    problem = make_problem(50, d=64)
    whole = select(problem).scores
    monkeypatch.setattr(ArrayGradients, "block_rows", 3)
    assert torch.equal(select(problem).scores, whole)


def test_the_score_is_the_same_bits_for_any_order_of_summation(make_problem):
    problem = make_problem(50, d=64)
    shuffled = torch.randperm(64, generator=torch.Generator().manual_seed(0))
    parts = (ArrayGradients(g.ids, g.sketch["base"][:, shuffled]) for g in (problem.candidates, problem.targets))
    assert torch.equal(select(Problem(*parts)).scores, select(problem).scores)


def test_zero_targets_are_left_out_of_the_mean_with_a_note(make_problem):
    problem = make_problem(30)
    sketch = torch.cat([problem.targets.sketch["base"], torch.zeros(1, 16)])
    ids = [*problem.targets.ids, "nothing"]
    selection = select(replace(problem, targets=ArrayGradients(ids, sketch)))
    assert torch.equal(selection.scores, select(problem).scores)
    assert selection.notes == ("1 of 7 targets have a zero gradient, which has no direction; left out: nothing",)
    groups = {"group": torch.tensor([0.0] * 6 + [1.0])}
    with pytest.raises(InvalidArgument, match="only zero gradients in '1'"):
        select(replace(problem, targets=ArrayGradients(ids, sketch, groups)))


def test_a_candidate_that_is_zero_at_one_checkpoint_has_no_score(make_problem):
    problem = make_problem(12, checkpoints=2)
    problem.candidates.sketch["base"][5] = 0
    problem.candidates.sketch["epoch1"][2] = 0
    selection = select(problem, "100%")
    assert selection.scores.isnan().nonzero().flatten().tolist() == [2, 5]
    assert not {2, 5} & set(selection.rows.tolist())


def test_what_does_not_fit_together_is_refused(make_problem):
    problem = make_problem(12, checkpoints=2)
    with pytest.raises(InvalidArgument, match=r"rates must have one value per checkpoint \(2: base, epoch1\), got 3"):
        select(problem, rates=(1.0, 1.0, 1.0))
    with pytest.raises(InvalidArgument, match="targets must have the candidates' checkpoints base, epoch1, got base; extract"):
        select(replace(problem, targets=make_problem(12).targets))
    with pytest.raises(InvalidArgument, match="rates must all be above 0"):
        LESS(rates=(1.0, 0.0))
    with pytest.raises(InvalidArgument, match="column 'group' of the targets must hold whole numbers"):
        select(grouped(problem, [0.5] * 6))
