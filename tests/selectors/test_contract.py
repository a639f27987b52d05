"""The laws that every method in SELECTORS keeps; a method is tested by being there."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator, Sequence
from fnmatch import fnmatchcase
from typing import Any

import pytest
import torch
from torch import Tensor

from gradsieve.errors import InvalidArgument
from gradsieve.selectors import SELECTORS
from gradsieve.types import ArrayGradients, Budget, Gradients, Problem, Selection, Selector

VARIANTS: dict[str, list[dict[str, Any]]] = {  # settings beside the defaults that must keep the laws too
    "orth-only": [{"space": "categories"}, {"normalize": "category"}, {"normalize": "example"}],
    "ogs": [
        {"constraint": "loss", "fidelity": "linear", "order": "random"},
        {"constraint": "risk", "epsilon": 0.05, "against": "both", "clusters": 2, "batch": 3},
    ],
    "curiosity": [{"rank": 2, "noise": 1.0}],
    "length": [{"prefer": "short"}],
    "metadata": [{"prefer": "low", "bins": 3}, {"at_least": 0.25, "at_most": 0.75}],
    "perplexity": [{"centre": 1.0}],
    "g2is": [{"mode": "paper", "neighbours": 0}, {"explained": 0.9, "neighbours": 3, "on_shortfall": "next-component"}],
    "gradmatch": [{"match": "pool", "lam": 0.0}],
    "pgm": [{"match": "pool", "partitions": 3, "batch": 1, "curve": True}],
    "random": [{"stratify": "length", "bins": 4}],
    "grads": [{"prefer": "proportional"}, {"prefer": "stratified", "bins": 3}, {"prefer": "magnitude", "novelty_weight": 0.0}],
    "ogs-static": [
        {"against": "both", "bound": 20.0},
        {"bound_of": "mean", "bound": 40.0, "stratify": "length", "bins": 3, "center": True},
        {"form": "filter", "drop": 30.0},
        {"form": "filter", "draw": "diversity"},
        {"form": "filter", "draw": "utility", "against": "plain", "center": True},
        {"against": "categories", "utility": "nearest", "neighbours": 2},
        {"against": "both", "utility": "hidden", "neighbours": 2},
        {"against": "both", "utility": "each", "bound": 30.0},
        {"form": "filter", "drop": 20.0, "draw": "utility", "utility": "each"},
        {"against": "both", "normalize": "category"},
    ],
}
QUICK: dict[str, dict[str, Any]] = {"ogs": {"updates": 1, "episodes": 2}}  # defaults that would only take time
CASES = [
    pytest.param(name, method(**QUICK.get(name, {}) | settings), id="-".join([name, *map(str, settings.values())]))
    for name, method in SELECTORS.items()
    for settings in [{}, *VARIANTS.get(name, [])]
]
every_method = pytest.mark.parametrize(("name", "method"), CASES)
GRADIENT_COLUMNS = ("norm", "norm/*", "max/*", "min/*", "mean/*", "sd/*", "dot/*")


def run(method: Selector, problem: Problem, budget: str = "25%", seed: int = 0) -> Selection:
    return method.select(problem, Budget.parse(budget), torch.Generator().manual_seed(seed))


def reads_gradients(method: Selector) -> bool:
    return bool(method.needs - {"tokens", "completion_tokens", "loss", "loss/alone", "bm25/target", "meta/rating"})


def chosen_ids(selection: Selection, problem: Problem) -> list[str]:
    return [problem.candidates.ids[row] for row in selection.rows.tolist()]


def rebuilt(g: Gradients, rows: Sequence[int], ids: Sequence[str] | None = None, scale: float = 1.0) -> ArrayGradients:
    """Returns these rows of g, repeated or reordered, renamed, or with all gradients scaled."""
    index = torch.tensor(rows)
    sketch = {c: g.rows(index, c) * scale for c in g.checkpoints}
    columns = {
        name: column[index] * (scale if any(fnmatchcase(name, p) for p in GRADIENT_COLUMNS) else 1)
        for name, column in g.columns.items()
    }
    extra = {name: g.rows(index, name) * scale for name in g.representations}
    return ArrayGradients(ids or [g.ids[row] for row in rows], sketch, columns, extra)


class Reblocked:
    """The same gradients in blocks of another size that come last row first."""

    def __init__(self, inner: Gradients, size: int) -> None:
        self.inner, self.size = inner, size
        self.ids, self.dim, self.columns, self.checkpoints = inner.ids, inner.dim, inner.columns, inner.checkpoints
        self.representations = inner.representations

    def blocks(self, checkpoint: str | None = None) -> Iterator[tuple[Tensor, Tensor]]:
        for rows in torch.arange(len(self.ids)).flip(0).split(self.size):
            yield rows, self.inner.rows(rows, checkpoint)

    def rows(self, index: Tensor, checkpoint: str | None = None) -> Tensor:
        return self.inner.rows(index, checkpoint)


@every_method
def test_it_is_a_selector_and_says_what_it_is(name, method):
    assert isinstance(method, Selector)
    assert isinstance(method.needs, frozenset)
    for fact in (method.title, method.picks_by, method.reads, method.cost, method.source):
        assert isinstance(fact, str)
        assert fact
    with pytest.raises(dataclasses.FrozenInstanceError):
        method.anything = 1


@every_method
def test_every_field_is_documented(name, method):
    doc = type(method).__doc__
    for field in dataclasses.fields(method):
        assert re.search(rf"^        {field.name}: \S", doc.split("Attributes:")[1], re.MULTILINE), field.name


@every_method
@pytest.mark.parametrize("budget", ["1", "7", "25%", "400tok"])
def test_the_selection_keeps_the_budget_and_is_well_formed(name, method, budget, make_problem):
    problem = make_problem(28)
    selection = run(method, problem, budget)
    k, pool = len(selection.rows), problem.candidates
    assert 1 <= k <= Budget.parse(budget).limit(pool)
    if budget.endswith("tok"):
        assert pool.columns["tokens"][selection.rows].sum() <= 400
    elif k < Budget.parse(budget).limit(pool):
        assert selection.notes
    assert selection.rows.dtype == torch.int64
    assert len(set(selection.rows.tolist())) == k
    assert selection.rows.min() >= 0
    assert selection.rows.max() < 28
    assert selection.weights.shape == (k,)
    assert selection.weights.isfinite().all()
    assert (selection.weights >= 0).all()
    assert selection.scores.shape == (28,)
    assert selection.scores.dtype == selection.weights.dtype == torch.float64
    assert selection.scores.isnan().all() or not selection.scores[selection.rows].isnan().any()


@every_method
@pytest.mark.parametrize("budget", ["150tok", "600tok"])
def test_a_token_budget_is_spent_or_the_shortfall_has_a_note(name, method, budget, make_problem):
    problem = make_problem(28)
    selection = run(method, problem, budget)
    spent = problem.candidates.columns["tokens"][selection.rows].sum()
    most = int(budget.removesuffix("tok"))
    assert spent <= most
    assert spent >= 0.95 * most or any(f"spend {int(spent)} of the budget's {most} tokens" in note for note in selection.notes)


MAY_STOP = {"gradmatch", "pgm", "g2is", "ogs", "ogs-static"}  # for another reason than the budget, which a note gives


@every_method
@pytest.mark.parametrize("seed", range(4))
def test_a_token_budget_passes_over_what_does_not_fit_and_goes_on(name, method, seed, make_problem):
    problem = make_problem(28, seed=seed)
    columns = problem.candidates.columns
    columns["tokens"][:] = (torch.randn(28, generator=torch.Generator().manual_seed(seed)).exp() * 60).ceil()
    most = int(columns["tokens"].sum() * (0.15 + 0.1 * seed))
    assert columns["tokens"].max() > 0.3 * most
    selection = run(method, problem, f"{most}tok", seed)
    rows = selection.rows.tolist()
    left = most - int(columns["tokens"][rows].sum())
    dropped = selection.trace.get("dropped", [])
    open_ = [row for row in range(28) if row not in rows and row not in (dropped if isinstance(dropped, list) else [])]
    open_ = [row for row in open_ if selection.scores.isnan().all() or not selection.scores[row].isnan()]
    fits = [row for row in open_ if columns["tokens"][row] <= left]
    assert left >= 0
    assert not fits or (
        name in MAY_STOP and (left <= 0.05 * most or any(f"of the budget's {most}" in n for n in selection.notes))
    )


@every_method
def test_the_same_seed_gives_the_same_selection(name, method, make_problem):
    problem = make_problem(30)
    a, b = run(method, problem, seed=5), run(method, problem, seed=5)
    assert torch.equal(a.rows, b.rows)
    assert torch.equal(a.weights, b.weights)
    assert torch.equal(a.scores.nan_to_num(-9), b.scores.nan_to_num(-9))
    assert a.notes == b.notes


@every_method
@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("copies", [1, 3])
def test_the_order_of_the_pool_does_not_matter_even_among_duplicates(name, method, seed, copies, make_problem):
    problem = make_problem(36 // copies, seed=seed)
    rows = list(range(36 // copies)) * copies
    pool = rebuilt(problem.candidates, rows, [f"{(17 * i) % 36:02d}" for i in range(36)])
    other = torch.randperm(36, generator=torch.Generator().manual_seed(seed)).tolist()
    first = dataclasses.replace(problem, candidates=pool)
    second = dataclasses.replace(problem, candidates=rebuilt(pool, other))
    a, b = run(method, first), run(method, second)
    assert chosen_ids(a, first) == chosen_ids(b, second)
    assert torch.allclose(a.weights, b.weights, rtol=1e-9)
    assert torch.allclose(a.scores[other], b.scores, rtol=1e-9, atol=1e-12, equal_nan=True)


@every_method
@pytest.mark.parametrize("size", [1, 5])
def test_blocks_of_any_size_and_order_give_the_same_selection(name, method, size, make_problem):
    problem = make_problem(33, checkpoints=2)
    parts = {part: Reblocked(getattr(problem, part), size) for part in ("candidates", "targets", "anchors")}
    a, b = run(method, problem), run(method, dataclasses.replace(problem, **parts))
    assert torch.equal(a.rows, b.rows)
    assert torch.allclose(a.weights, b.weights, rtol=1e-9)
    assert torch.allclose(a.scores, b.scores, rtol=1e-9, atol=1e-12, equal_nan=True)


@every_method
def test_sketches_that_are_too_many_to_hold_are_read_again_with_the_same_selection(name, method, make_problem, monkeypatch):
    problem = make_problem(60)
    held = run(method, problem)
    for limit in ("directions.CACHE_BYTES", "dense.DENSE_BYTES", "pgm.SUM_BYTES", "round_robin.PRODUCT_BYTES"):
        monkeypatch.setattr(f"gradsieve.selectors.{limit}", 1)
    read = run(method, problem)
    assert torch.equal(read.rows, held.rows)
    assert torch.allclose(read.weights, held.weights, rtol=1e-6)
    assert torch.allclose(read.scores, held.scores, rtol=1e-9, atol=1e-12, equal_nan=True)
    assert read.notes == held.notes


@every_method
def test_a_pool_of_one_can_be_chosen_from(name, method, make_problem):
    assert run(method, make_problem(1), "1").rows.tolist() == [0]


@every_method
def test_a_budget_of_the_whole_pool_takes_it_or_says_why_not(name, method, make_problem):
    selection = run(method, make_problem(12), "100%")
    assert len(selection.rows) == 12 or selection.notes


@every_method
def test_scaling_all_gradients_changes_nothing(name, method, make_problem):
    problem = make_problem(30)
    scaled = {
        p: rebuilt(g, range(len(g.ids)), scale=8.0) for p in ("candidates", "targets", "anchors") if (g := getattr(problem, p))
    }
    assert torch.equal(run(method, problem).rows, run(method, dataclasses.replace(problem, **scaled)).rows)


@every_method
def test_a_zero_gradient_is_refused_or_left_out_with_a_note(name, method, make_problem):
    if not reads_gradients(method):
        pytest.skip("reads no gradient")
    problem = make_problem(20)
    zeroed = [rebuilt(problem.candidates, [i], scale=0.0 if i in (3, 11) else 1.0) for i in range(20)]
    sketch = torch.cat([part.rows(torch.tensor([0])) for part in zeroed])
    columns = {c: torch.cat([part.columns[c] for part in zeroed]) for c in problem.candidates.columns}
    extra = {e: torch.cat([part.extra[e] for part in zeroed]) for e in problem.candidates.extra}
    problem = dataclasses.replace(problem, candidates=ArrayGradients(problem.candidates.ids, sketch, columns, extra))
    try:
        selection = run(method, problem, "100%")
    except InvalidArgument as error:
        assert "zero" in str(error)  # noqa: PT017
    else:
        assert not {3, 11} & set(selection.rows.tolist())
        assert any("zero" in note and problem.candidates.ids[3] in note for note in selection.notes)


@every_method
def test_a_pool_of_zero_gradients_is_refused(name, method, make_problem):
    if not reads_gradients(method):
        pytest.skip("reads no gradient")
    problem = make_problem(5)
    zeros = rebuilt(problem.candidates, range(5), scale=0.0)
    with pytest.raises(InvalidArgument, match="zero"):
        run(method, dataclasses.replace(problem, candidates=zeros), "2")


def without(problem: Problem, need: str) -> Problem:
    if need in ("targets", "anchors"):
        return dataclasses.replace(problem, **{need: None})
    if need.endswith("/targets"):
        return dataclasses.replace(problem, targets=without(Problem(problem.targets), need.removesuffix("/targets")).candidates)
    pool = problem.candidates
    sketch = torch.empty(len(pool.ids), 0) if need == "sketch" else pool.rows(torch.arange(len(pool.ids)))
    columns = {c: v for c, v in pool.columns.items() if not fnmatchcase(c, need)}
    extra = {e: v for e, v in pool.extra.items() if e != need}
    return dataclasses.replace(problem, candidates=ArrayGradients(pool.ids, sketch, columns, extra))


@every_method
def test_whatever_it_needs_and_does_not_get_is_named(name, method, make_problem):
    for need in method.needs - {"navigator"}:
        with pytest.raises(InvalidArgument, match=rf"^{name} needs .*got .*; \w"):
            run(method, without(make_problem(10), need), "2")


@every_method
def test_a_token_budget_needs_tokens(name, method, make_problem):
    with pytest.raises(InvalidArgument, match=f"^{name} needs the column 'tokens'"):
        run(method, without(make_problem(10), "tokens"), "100tok")


@every_method
def test_a_needed_column_that_is_not_finite_is_refused(name, method, make_problem):
    for need in method.needs:
        problem = make_problem(10)
        for column in (c for c in problem.candidates.columns if fnmatchcase(c, need)):
            problem.candidates.columns[column][4] = torch.nan
            with pytest.raises(InvalidArgument, match=re.escape(f"column '{column}' must be finite")):
                run(method, problem, "2")
            break


@every_method
def test_a_sketch_that_is_not_finite_is_refused(name, method, make_problem):
    matrices = {need for need in method.needs if need == "sketch" or need in make_problem(1).candidates.representations}
    if not matrices:
        pytest.skip("reads no matrix")
    problem = make_problem(10)
    for matrix in matrices:
        of = problem.candidates.sketch["base"] if matrix == "sketch" else problem.candidates.extra[matrix]
        of[7, 2] = torch.inf
    with pytest.raises(
        InvalidArgument, match=f"{'|'.join(matrices)}.*{problem.candidates.ids[7]}.*finite|finite.*{problem.candidates.ids[7]}"
    ):
        run(method, problem, "2")


@every_method
def test_the_problem_is_left_as_it_was(name, method, make_problem):
    problem, untouched = make_problem(20), make_problem(20)
    run(method, problem)
    for part in ("candidates", "targets", "anchors"):
        a, b = getattr(problem, part), getattr(untouched, part)
        assert list(a.ids) == list(b.ids)
        assert all(torch.equal(a.sketch[c], b.sketch[c]) for c in b.sketch)
        assert a.columns.keys() == b.columns.keys()
        assert all(torch.equal(a.columns[c], b.columns[c]) for c in b.columns)
        assert all(torch.equal(a.extra[e], b.extra[e]) for e in b.extra)
    assert problem.references == untouched.references


@every_method
def test_an_empty_pool_is_refused(name, method, make_problem):
    problem = make_problem(4)
    columns = {c: torch.empty(0) for c in problem.candidates.columns}
    nothing = ArrayGradients([], torch.empty(0, 16), columns, {e: torch.empty(0, 24) for e in problem.candidates.extra})
    with pytest.raises(InvalidArgument, match="at least one"):
        run(method, dataclasses.replace(problem, candidates=nothing), "1")
