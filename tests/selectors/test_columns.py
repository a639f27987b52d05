"""The methods that read one column: perplexity, length, metadata."""

from __future__ import annotations

import pytest
import torch

from gradsieve.errors import InvalidArgument
from gradsieve.selectors.length import Length
from gradsieve.selectors.metadata import Metadata
from gradsieve.selectors.perplexity import Perplexity
from gradsieve.types import ArrayGradients, Budget, Problem


def run(method, budget, ids=None, **columns):
    columns = {name.replace("__", "/"): torch.tensor(values) for name, values in columns.items()}
    n = len(next(iter(columns.values())))
    pool = ArrayGradients(ids or [str(i) for i in range(n)], torch.empty(n, 0), columns)
    return method.select(Problem(pool), Budget.parse(budget), torch.Generator())


def test_perplexity_takes_the_middle_of_the_loss_outwards():
    selection = run(Perplexity(), 3, loss=[9.0, 1.0, 5.0, 4.0, 2.0])
    assert selection.rows.tolist()[0] == 3
    assert set(selection.rows.tolist()) == {3, 2, 4}
    assert selection.scores.tolist() == pytest.approx([-0.4, -0.4, -0.2, 0.0, -0.2])
    assert selection.trace["chosen_loss"] == [2.0, 5.0]
    assert selection.trace["pool_loss"] == [1.0, 9.0]


@pytest.mark.parametrize(("centre", "rows"), [(0.0, [1, 4]), (1.0, [0, 2]), (0.65, [2, 3])])
def test_perplexity_takes_the_band_at_any_quantile(centre, rows):
    assert run(Perplexity(centre), 2, loss=[9.0, 1.0, 5.0, 4.0, 2.0]).rows.tolist() == rows


def test_equal_losses_have_equal_scores_and_go_by_id():
    selection = run(Perplexity(), 3, ids=["c", "a", "b", "d"], loss=[2.0, 2.0, 2.0, 2.0])
    assert selection.rows.tolist() == [1, 2, 0]
    assert selection.scores.unique().tolist() == [0.0]


def test_a_loss_that_measures_length_is_noted():
    columns = {"loss": [1.0, 2.0, 3.0, 4.0], "completion_tokens": [40.0, 30.0, 20.0, 10.0]}
    selection = run(Perplexity(), 2, **columns)
    assert "loss is largely a measure of length: its rank correlation with completion_tokens is -1.00" in selection.notes


def test_length_takes_the_longest_or_the_shortest():
    length = [3.0, 9.0, 5.0, 9.0]
    assert run(Length(), 3, ids=["d", "c", "b", "a"], completion_tokens=length).rows.tolist() == [3, 1, 2]
    short = run(Length("short"), 2, completion_tokens=length)
    assert short.rows.tolist() == [0, 2]
    assert short.scores.tolist() == [-3, -9, -5, -9]
    assert (short.trace["mean_length"], short.trace["pool_mean_length"]) == (4.0, 6.5)


def test_length_keeps_a_token_budget():
    columns = {"completion_tokens": [3.0, 9.0, 5.0], "tokens": [10.0, 30.0, 10.0]}
    assert run(Length(), "40tok", **columns).rows.tolist() == [1, 2]
    short = run(Length(), "25tok", **columns)
    assert short.rows.tolist() == []
    assert "the next best, '1', has 30 tokens" in short.notes[0]


def test_metadata_ranks_by_the_column_it_names():
    columns = {"meta__stars": [3.0, 5.0, 1.0], "meta__cited": [7.0, 0.0, 2.0]}
    assert run(Metadata("stars"), 2, **columns).rows.tolist() == [1, 0]
    low = run(Metadata("cited", "low"), 2, **columns)
    assert low.rows.tolist() == [1, 2]
    assert low.scores.tolist() == [-7, 0, -2]
    assert (low.trace["mean"], low.trace["pool_mean"]) == (1.0, 3.0)
    assert Metadata("stars").needs == {"meta/stars"}


def test_metadata_that_is_not_there_or_not_finite_is_refused():
    with pytest.raises(InvalidArgument, match="metadata needs the column 'meta/stars' of the candidates, got meta/cited; "):
        run(Metadata("stars"), 1, meta__cited=[1.0])
    with pytest.raises(InvalidArgument, match="column 'meta/stars' must be finite, got nan for '1'"):
        run(Metadata("stars"), 1, meta__stars=[1.0, float("nan")])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Perplexity(1.5), r"centre must lie in \[0, 1\], got 1.5; "),
        (lambda: Length("longest"), "prefer must be one of long, short, got 'longest'"),
        (lambda: Metadata(""), "column must name one number of the examples, got ''; "),
        (lambda: Metadata("*"), r"column must name one number of the examples, got '\*'; "),
        (lambda: Metadata("stars", "most"), "prefer must be one of high, low, got 'most'"),
    ],
)
def test_settings_that_break_a_rule_are_refused(make, message):
    with pytest.raises(InvalidArgument, match=message):
        make()
