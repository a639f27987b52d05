import pytest
import torch

from gradsieve.errors import InvalidArgument
from gradsieve.selectors.reading import cosines, matching, reference_notes, require, zero_note
from gradsieve.types import ArrayGradients, Budget, Problem, Reference


def pool(columns=None, d=2, n=3):
    columns = {"norm": torch.ones(n)} if columns is None else columns
    return ArrayGradients([f"id{i}" for i in range(n)], torch.ones(n, d), columns)


def test_a_token_budget_needs_tokens_above_zero():
    free = pool({"tokens": torch.tensor([3.0, 0.0, 2.0])})
    require(Problem(free), set(), "m", Budget.parse("2"))
    with pytest.raises(InvalidArgument, match=r"column 'tokens' must be above 0, got 0\.0 for 'id1'; extract it again"):
        require(Problem(free), set(), "m", Budget.parse("2tok"))


def test_everything_that_is_there_passes():
    everything = pool({"norm": torch.ones(3), "dot/anchor:math": torch.ones(3), "tokens": torch.ones(3)})
    require(Problem(everything, everything, everything), {"norm", "dot/anchor:*", "sketch", "targets", "anchors"}, "m")
    require(Problem(everything), set(), "m", Budget.parse("2tok"))


@pytest.mark.parametrize(
    ("need", "message"),
    [
        (
            "dot/anchor",
            "m needs --anchor (general examples it must not forget), got none; pass a JSONL, or `--anchor demo` for the",
        ),
        ("anchors", "m needs --anchor (general examples it must not forget), got none; pass"),
        ("dot/anchor:*", "m needs --anchor with categories (general examples it must not forget), got none; pass"),
        (
            "dot/contrast/anchor:*",
            "m needs --anchor with wrong copies (general examples it must not forget), got none; pass wrong",
        ),
        ("dot/target", "m needs --target (examples of the ability you want), got none; pass a JSONL"),
        ("targets", "m needs --target (examples of the ability you want), got none; pass a JSONL"),
        ("navigator", "m needs a live model to train and measure, got none; give"),
        ("norm/lm_head", "m needs the column 'norm/lm_head' of the candidates, got norm; extract it, or add it to the columns"),
    ],
)
def test_what_is_missing_is_named_with_its_cure(need, message):
    with pytest.raises(InvalidArgument) as error:
        require(Problem(pool()), {"norm", need}, "m")
    assert str(error.value).startswith(message)


def test_targets_without_rows_count_as_missing():
    with pytest.raises(InvalidArgument, match="m needs --target"):
        require(Problem(pool(), targets=pool({}, n=0)), {"targets"}, "m")


def test_missing_sketches_and_sketches_of_another_size_are_refused():
    with pytest.raises(InvalidArgument, match="m needs the candidates' sketches, got none; extract them with --dim above 0"):
        require(Problem(pool(d=0)), {"sketch"}, "m")
    with pytest.raises(InvalidArgument, match="sketches of the targets must have the candidates' size 2, got 5"):
        require(Problem(pool(), targets=pool(d=5)), {"targets"}, "m")
    require(Problem(pool(), targets=pool(d=5)), {"norm"}, "m")


def test_negative_norms_are_refused_and_negative_products_are_not():
    negative = torch.tensor([1.0, -2.0, 3.0])
    with pytest.raises(InvalidArgument, match=r"column 'norm/embedding' must not be negative, got -2\.0 for 'id1'"):
        require(Problem(pool({"norm/embedding": negative})), {"norm/embedding"}, "m")
    require(Problem(pool({"dot/target": negative})), {"dot/target"}, "m")


def test_a_pattern_matches_columns_in_order():
    columns = dict.fromkeys(
        ["dot/contrast/anchor:b", "dot/contrast/target", "dot/contrast/anchor:a", "dot/anchor:a"], torch.ones(3)
    )
    assert matching(pool(columns), "dot/contrast/anchor:*") == ["dot/contrast/anchor:a", "dot/contrast/anchor:b"]


@pytest.mark.parametrize("name", ["dot/anchor:math [en]", "dot/anchor:why?", "dot/anchor:*"])
def test_a_column_stands_for_itself_whatever_its_name_holds(name):
    columns = {name: torch.tensor([1.0, 2.0, torch.nan]), "dot/anchor:whys": torch.ones(3)}
    assert matching(pool(columns), name) == [name]
    with pytest.raises(InvalidArgument, match="must be finite, got nan for 'id2'"):
        require(Problem(pool(columns)), {name}, "m")


def test_cosines_divide_by_the_norm_and_are_undefined_for_zero():
    g = pool({"norm": torch.tensor([2.0, 0.0, 4.0]), "dot/anchor": torch.tensor([1.0, 0.0, -4.0])})
    assert torch.allclose(cosines(g, "anchor"), torch.tensor([0.5, torch.nan, -1.0], dtype=torch.float64), equal_nan=True)


def test_products_with_a_reference_that_is_not_unit_are_refused():
    g = pool({"norm": torch.ones(3), "dot/anchor": torch.tensor([0.1, -3.0, 0.2])})
    with pytest.raises(InvalidArgument, match="'dot/anchor' must hold products with the unit reference, got a cosine of 3"):
        cosines(g, "anchor")


def test_only_noisy_references_that_are_asked_for_get_a_note():
    references = {"target": Reference(1.0, 12, 0.69), "anchor": Reference(1.0, 300, 0.7), "other": Reference(1.0, 2, -3.0)}
    notes = reference_notes(Problem(pool(), references=references), ["target", "anchor", "unknown"])
    assert len(notes) == 1
    assert "'target' is unreliable: its signal share is 0.69 (below 0.7) with 12 examples; give more" in notes[0]
    halves = {"target": Reference(1.0, 12, 0.9, split_half=0.69), "anchor": Reference(1.0, 12, 0.9, split_half=0.7)}
    (ranked,) = reference_notes(Problem(pool(), references=halves), halves)
    assert "'target' is unreliable: halves of it rank the pool with a correlation of 0.69 (below 0.7) with 12" in ranked
    both = {"target": Reference(1.0, 12, 0.5, split_half=float("nan"))}
    (note,) = reference_notes(Problem(pool(), references=both), both)
    assert "its signal share is 0.50 and halves of it rank the pool with a correlation of nan (below 0.7)" in note
    nan = Problem(pool(), references={"target": Reference(1.0, 1, float("nan"))})
    assert len(reference_notes(nan, ["target"])) == 1


def test_zero_rows_are_counted_and_named():
    g = pool({}, n=6)
    assert zero_note(g, torch.zeros(6, dtype=torch.bool), "m") == []
    (note,) = zero_note(g, torch.tensor([0, 1, 1, 1, 1, 0]).bool(), "m")
    assert note == "4 of 6 candidates have a zero gradient, which has no direction; left out: id1, id2, id3, …"
    with pytest.raises(InvalidArgument, match="m needs gradients with a direction, got zero for all 6 targets"):
        zero_note(g, torch.ones(6, dtype=torch.bool), "m", "targets")
