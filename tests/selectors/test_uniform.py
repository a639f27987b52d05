from collections import Counter
from dataclasses import replace

import pytest
import torch

from gradsieve.errors import InvalidArgument
from gradsieve.selectors.uniform import Random
from gradsieve.types import ArrayGradients, Budget, Problem


def draw(problem, budget, seed=0, **settings):
    return Random(**settings).select(problem, Budget.parse(budget), torch.Generator().manual_seed(seed))


def test_every_subset_is_equally_likely():
    problem = Problem(ArrayGradients(list("bcaed"), torch.ones(5, 1)))
    counts = Counter(tuple(draw(problem, 2, seed).rows.tolist()) for seed in range(4000))
    assert len(counts) == 20  # ordered pairs
    assert all(abs(count - 200) < 4.5 * 200**0.5 for count in counts.values())


def test_it_reads_nothing_and_scores_nothing(make_problem):
    bare = Problem(ArrayGradients([str(i) for i in range(10)], torch.empty(10, 0)))
    selection = draw(bare, 4)
    assert Random().needs == frozenset()
    assert selection.scores.isnan().all()
    assert selection.weights.tolist() == [1, 1, 1, 1]
    assert selection.notes == ()


def test_a_pool_with_other_gradients_gives_the_same_draw(make_problem):
    problem, other = make_problem(20, seed=1), make_problem(20, seed=2)
    renamed = replace(other, candidates=replace(other.candidates, ids=problem.candidates.ids))
    assert torch.equal(draw(problem, 5).rows, draw(renamed, 5).rows)


@pytest.mark.parametrize("k", [1, 4, 10, 37, 60])
def test_strata_of_length_are_filled_in_proportion(k, make_problem):
    problem = make_problem(60)
    rows = draw(problem, k, stratify="length", bins=4).rows
    tokens = problem.candidates.columns["tokens"]
    edges = [tokens.sort().values[i] for i in (15, 30, 45)]
    for low, high in zip([-1, *edges], [*edges, 1e9], strict=True):
        sure = ((tokens > low) & (tokens < high))[rows].sum()  # rows at an edge are in one stratum or the next
        assert sure <= k / 4 + 1


def test_strata_are_drawn_from_at_random():
    pool = ArrayGradients(list("abcdef"), torch.ones(6, 1), {"tokens": torch.tensor([1, 1, 1, 9, 9, 9])})
    counts = Counter(tuple(draw(Problem(pool), 2, seed, stratify="length", bins=2).rows.tolist()) for seed in range(1800))
    assert set(counts) == {(short, long) for short in (0, 1, 2) for long in (3, 4, 5)}
    assert all(abs(count - 200) < 4.5 * 200**0.5 for count in counts.values())


def test_settings_are_checked():
    with pytest.raises(InvalidArgument, match="stratify must be one of none, length, got 'tokens'"):
        Random(stratify="tokens")
    with pytest.raises(InvalidArgument, match="bins must be at least 2, got 1"):
        Random(stratify="length", bins=1)
    bare = Problem(ArrayGradients(["a"], torch.ones(1, 1)))
    with pytest.raises(InvalidArgument, match="random needs the column 'tokens'"):
        draw(bare, 1, stratify="length")
