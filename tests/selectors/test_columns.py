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


def test_a_distance_from_the_middle_that_measures_length_is_noted():
    columns = {"loss": [1.0, 2.0, 3.0, 4.0, 5.0], "completion_tokens": [10.0, 30.0, 50.0, 31.0, 11.0]}
    selection = run(Perplexity(), 2, **columns)
    assert [note.split(" is ")[0] for note in selection.notes] == ["score"]


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
    assert short.rows.tolist() == [2, 0]
    assert run(Length(), "19tok", **columns).notes[0].endswith("19 tokens: the shortest of the others has 10")


def test_metadata_ranks_by_the_column_it_names():
    columns = {"meta__stars": [3.0, 5.0, 1.0], "meta__cited": [7.0, 0.0, 2.0]}
    assert run(Metadata("stars"), 2, **columns).rows.tolist() == [1, 0]
    low = run(Metadata("cited", "low"), 2, **columns)
    assert low.rows.tolist() == [1, 2]
    assert low.scores.tolist() == [-7, 0, -2]
    assert (low.trace["mean"], low.trace["pool_mean"]) == (1.0, 3.0)
    assert Metadata("stars").needs == {"meta/stars"}
    assert Metadata("stars", missing="median").needs == {"meta/stars?"}


def test_metadata_that_is_not_there_or_not_finite_is_refused():
    with pytest.raises(InvalidArgument, match="metadata needs the column 'meta/stars' of the candidates, got meta/cited; "):
        run(Metadata("stars"), 1, meta__cited=[1.0])
    with pytest.raises(InvalidArgument, match="column 'meta/stars' must be finite, got nan for '1'"):
        run(Metadata("stars"), 1, meta__stars=[1.0, float("nan")])


def test_metadata_keeps_what_lies_between_two_quantiles():
    stars = [1.0, 2.0, 3.0, 4.0, 5.0, 100.0, 0.0, 6.0, 7.0, 8.0, 9.0]
    selection = run(Metadata("stars", at_least=0.2, at_most=0.9), 3, meta__stars=stars)
    assert selection.rows.tolist() == [10, 9, 8]  # 100 is above the quantile of 0.9, which is 9
    assert selection.scores.isnan().nonzero()[:, 0].tolist() == [0, 5, 6]
    assert selection.trace["between"] == [2.0, 9.0]
    assert "3 of 11 examples are left out: their stars lies outside 2 to 9 (quantiles 0.2 to 0.9)" in selection.notes
    few = run(Metadata("stars", at_least=0.9), 5, meta__stars=stars)
    assert few.rows.tolist() == [5, 10]
    assert "2 examples are chosen of the 5" in few.notes[-1]


def test_metadata_is_spread_over_quantile_bins_with_the_preferred_first_in_each():
    stars = [float(i) for i in range(8)]
    assert set(run(Metadata("stars", bins=4), 4, meta__stars=stars).rows.tolist()) == {1, 3, 5, 7}
    assert set(run(Metadata("stars", "low", bins=2), 4, meta__stars=stars).rows.tolist()) == {0, 1, 4, 5}
    inside = run(Metadata("stars", at_most=0.5, bins=2), 2, meta__stars=stars)  # 0 to 3: the bins are those of what is left
    assert set(inside.rows.tolist()) == {1, 3}


def test_metadata_that_is_missing_is_dropped_or_counts_as_the_median():
    stars = [3.0, float("nan"), 1.0, 5.0, float("nan")]
    dropped = run(Metadata("stars", missing="drop"), 5, ids=list("edcba"), meta__stars=stars)
    assert dropped.rows.tolist() == [3, 0, 2]
    assert dropped.notes[0] == "2 of 5 examples have no stars and are left out: a, d"
    assert "3 examples are chosen of the 5" in dropped.notes[-1]
    assert dropped.trace["missing"] == 2
    filled = run(Metadata("stars", missing="median"), 4, ids=list("edcba"), meta__stars=stars)
    assert filled.rows.tolist() == [3, 4, 1, 0]  # 5, then three of 3 by id
    assert filled.notes[0] == "2 of 5 examples have no stars and count as the median, 3: a, d"
    band = run(Metadata("stars", missing="drop", at_least=0.5), 2, meta__stars=stars)
    assert band.trace["between"] == [3.0, 5.0]  # quantiles of those that are there
    some = [1.0, 2.0, 4.0, 9.0, *[float("nan")] * 4]
    bands = {
        missing: run(Metadata("stars", missing=missing, at_least=0.25), 2, meta__stars=some) for missing in ("drop", "median")
    }
    assert bands["median"].trace["between"] == bands["drop"].trace["between"] == [1.75, 9.0]
    with pytest.raises(InvalidArgument, match="metadata needs a number 'stars' in at least one example, got none"):
        run(Metadata("stars", missing="drop"), 1, meta__stars=[float("nan")])
    with pytest.raises(InvalidArgument, match="must be finite, got inf for '0'"):
        run(Metadata("stars", missing="drop"), 1, meta__stars=[float("inf")])
    with pytest.raises(InvalidArgument, match="metadata needs the column 'meta/stars'"):
        run(Metadata("stars", missing="drop"), 1, meta__cited=[1.0])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Perplexity(1.5), r"centre must lie in \[0, 1\], got 1.5; "),
        (lambda: Length("longest"), "prefer must be one of long, short, got 'longest'"),
        (lambda: Metadata(""), "column must name one number of the examples, got ''; "),
        (lambda: Metadata("*"), r"column must name one number of the examples, got '\*'; "),
        (lambda: Metadata("stars", "most"), "prefer must be one of high, low, got 'most'"),
        (lambda: Metadata("stars", at_least=0.5, at_most=0.5), r"0 <= at_least < at_most <= 1, got 0.5 and 0.5"),
        (lambda: Metadata("stars", bins=0), "bins must be at least 1, got 0; "),
        (lambda: Metadata("stars", missing="zero"), "missing must be one of refuse, drop, median, got 'zero'"),
    ],
)
def test_settings_that_break_a_rule_are_refused(make, message):
    with pytest.raises(InvalidArgument, match=message):
        make()
