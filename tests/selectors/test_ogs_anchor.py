"""What stands for the anchor, against twins that have the whole gradients and directions in hand."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from gradsieve.errors import InvalidArgument
from gradsieve.selectors.ogs_anchor import anchor_cosine, anchor_notes, subspace_orth, worst_conflict
from gradsieve.selectors.ogs_static import OGSStatic
from gradsieve.selectors.orth_only import OrthOnly
from gradsieve.types import ArrayGradients, Budget, Problem, Reference, Selection

CATEGORIES = ("code", "knowledge", "math")


def world(seed: int, apart: float = 1.0, p: int = 20) -> tuple[Problem, torch.Tensor, dict[str, torch.Tensor]]:
    """A problem with three anchor categories, its whole gradients, and the anchor's by category."""
    rng = torch.Generator().manual_seed(seed)
    shared = torch.randn(p, generator=rng, dtype=torch.float64)
    sizes = {"code": 5, "knowledge": 9, "math": 3}
    anchors = {
        name: (shared + apart * torch.randn(p, generator=rng, dtype=torch.float64))
        + torch.randn(size, p, generator=rng, dtype=torch.float64)
        for name, size in sizes.items()
    }
    G = torch.randn(30, p, generator=rng, dtype=torch.float64) + 0.3 * shared
    A = torch.cat(list(anchors.values()))
    means = {"anchor": A.mean(0), "unit/anchor": (A / A.norm(dim=1, keepdim=True)).mean(0), "target": shared}
    means |= {f"anchor:{name}": part.mean(0) for name, part in anchors.items()}
    cosines = {a: {b: float(torch.cosine_similarity(r, s, dim=0)) for b, s in means.items()} for a, r in means.items()}
    references = {name: Reference(float(r.norm()), 400, 0.9, cosines[name]) for name, r in means.items()}
    return Problem(ArrayGradients.from_matrix(G, references=means), references=references), G, anchors


@pytest.mark.parametrize("seed", range(3))
def test_the_anchor_is_averaged_as_asked(seed):
    problem, G, anchors = world(seed)
    A = torch.cat(list(anchors.values()))
    expected = {
        "none": A.mean(0),
        "example": (A / A.norm(dim=1, keepdim=True)).mean(0),
        "category": sum(part.mean(0) / part.mean(0).norm() for part in anchors.values()),
    }
    for normalize, direction in expected.items():
        cosine = torch.cosine_similarity(G, direction[None], dim=1)
        assert torch.allclose(anchor_cosine(problem, normalize), cosine, atol=1e-12)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("energy", [0.5, 0.9, 0.99, 1.0])
def test_orthogonality_to_the_subspace_is_that_of_the_thin_svd(seed, energy):
    problem, G, anchors = world(seed)
    M = torch.stack([part.mean(0) / part.mean(0).norm() for part in anchors.values()], dim=1)
    U, S, _ = torch.linalg.svd(M, full_matrices=False)
    share = S.square().cumsum(0) / S.square().sum()
    r = next(i + 1 for i in range(3) if share[i] >= energy - 1e-12)
    orth, rank = subspace_orth(problem, energy)
    assert rank == r
    assert torch.allclose(orth, 1 - (G @ U[:, :r]).norm(dim=1) / G.norm(dim=1), atol=1e-9)


def test_one_category_is_the_plain_form_and_repeated_ones_span_one_direction():
    problem, _, _ = world(0)
    plain = 1 - (problem.candidates.columns["dot/anchor:math"] / problem.candidates.columns["norm"]).abs()
    columns = {"norm": problem.candidates.columns["norm"], "dot/anchor:math": problem.candidates.columns["dot/anchor:math"]}
    one = ArrayGradients(problem.candidates.ids, torch.zeros(30, 1), columns)
    orth, rank = subspace_orth(replace(problem, candidates=one), 0.9)
    assert rank == 1
    assert torch.allclose(orth, plain)
    columns["dot/anchor:twice"] = columns["dot/anchor:math"]
    same = {name: Reference(1.0, 9, 0.9, {"anchor:math": 1.0, "anchor:twice": 1.0}) for name in ("anchor:math", "anchor:twice")}
    two = Problem(ArrayGradients(problem.candidates.ids, torch.zeros(30, 1), columns), references=same)
    orth, rank = subspace_orth(two, 1.0)
    assert rank == 1
    assert torch.allclose(orth, plain)


def test_the_worst_conflict_counts():
    problem, G, anchors = world(1, apart=3.0)
    conflicts = torch.stack([-torch.cosine_similarity(G, part.mean(0)[None], dim=1) for part in anchors.values()])
    assert torch.allclose(worst_conflict(problem.candidates), conflicts.amax(0))
    selection = OGSStatic(against="categories", risk="conflict").select(problem, Budget.parse("5"), torch.Generator())
    assert selection.trace["risk"] == pytest.approx(conflicts.amax(0).clamp(min=0).tolist())
    assert selection.trace["references"] == ["target", *(f"anchor:{name}" for name in CATEGORIES)]


def test_methods_use_the_form_that_was_asked_for():
    problem, _, _ = world(2, apart=3.0)
    budget, rng = Budget.parse("6"), torch.Generator()
    for normalize in ("none", "example", "category"):
        orth = 1 - anchor_cosine(problem, normalize).abs()
        assert OrthOnly(normalize=normalize).select(problem, budget, rng).scores.tolist() == orth.tolist()
        risk = anchor_cosine(problem, normalize).abs()
        static = OGSStatic(against="plain", normalize=normalize).select(problem, budget, rng)
        assert static.trace["overlap"] == risk.tolist()
    selection = OrthOnly(space="categories", energy=1.0).select(problem, budget, rng)
    assert selection.scores.tolist() == subspace_orth(problem, 1.0)[0].tolist()
    assert selection.trace["rank"] == 3


def test_what_cannot_be_known_is_refused():
    problem, _, _ = world(0)
    with pytest.raises(InvalidArgument, match=r"the cosine of the references 'anchor:code' and 'anchor:code' must be known"):
        anchor_cosine(replace(problem, references={}), "category")
    names = [f"anchor:{name}" for name in CATEGORIES]
    opposed = {a: Reference(1.0, 9, 0.9, {b: 1.0 if a == b else -0.5 for b in names}) for a in names}
    with pytest.raises(InvalidArgument, match="cancel each other"):
        anchor_cosine(replace(problem, references=opposed), "category")


@pytest.mark.parametrize(
    ("method", "settings", "message"),
    [
        (OGSStatic, {"against": "contrast", "normalize": "example"}, "normalize must be none with against contrast"),
        (OGSStatic, {"utility": "nearest", "center": True}, "center must be off with utility nearest"),
        (OGSStatic, {"utility": "hidden", "center": True}, "center must be off with utility hidden"),
        (OGSStatic, {"neighbours": 0}, "neighbours must be at least 1"),
        (OGSStatic, {"normalize": "rows"}, "normalize must be one of"),
        (OGSStatic, {"utility": "far"}, "utility must be one of"),
        (OrthOnly, {"space": "categories", "normalize": "example"}, "normalize must be none with space categories"),
        (OrthOnly, {"space": "all"}, "space must be one of"),
        (OrthOnly, {"energy": 0.0}, r"energy must lie in \(0, 1\]"),
        (OrthOnly, {"energy": 1.1}, r"energy must lie in \(0, 1\]"),
    ],
)
def test_settings_that_do_not_go_together_are_refused(method, settings, message):
    with pytest.raises(InvalidArgument, match=message):
        method(**settings)


def test_a_small_anchor_is_noted_whichever_way_it_is_read():
    def references(**counts: int) -> Problem:
        named = {name.replace("__", "/").replace("_of_", ":"): Reference(1.0, count, 0.9) for name, count in counts.items()}
        return Problem(ArrayGradients(["a"], torch.ones(1, 1)), references=named)

    def note(problem: Problem) -> list[str]:
        return anchor_notes(problem, list(problem.references))

    assert note(references(target=5)) == []
    assert note(references(anchor=300)) == []
    assert "has 299 usable" in note(references(anchor=299))[0]
    assert "has 290 usable" in note(references(contrast__anchor_of_a=150, contrast__anchor_of_b=140))[0]
    assert note(references(anchor_of_a=160, anchor_of_b=140)) == []
    assert "has 250 usable" in note(references(anchor=250, contrast__anchor_of_a=100, contrast__target=400))[0]
    halved = {count: note(replace(references(anchor=count), navigator=object())) for count in (149, 150)}
    assert halved[150] == []
    assert "has 149 usable examples for its references and about as many held out; 300 to 500 in all" in halved[149][0]


@pytest.mark.parametrize("utility", ["nearest", "hidden"])
def test_the_nearest_targets_see_what_their_mean_averages_away(utility):
    rng = torch.Generator().manual_seed(0)
    topics, shared = 3 * torch.randn(6, 40, generator=rng), 4 * torch.randn(40, generator=rng)
    inside = shared + topics[torch.arange(60) % 6] + torch.randn(60, 40, generator=rng)
    outside = shared + 3 * torch.randn(60, 40, generator=rng)
    T = shared + topics[torch.arange(24) % 6] + torch.randn(24, 40, generator=rng)
    G = torch.cat([inside, outside])
    pool = ArrayGradients.from_matrix(G, references={"target": T.mean(0), "anchor": shared})
    targets = ArrayGradients.from_matrix(T, [f"t{i}" for i in range(24)])
    if utility == "hidden":  # sketches then say nothing
        pool = ArrayGradients(pool.ids, torch.randn(len(G), 9, generator=rng), pool.columns, {"hidden": G})
        targets = ArrayGradients(targets.ids, torch.randn(len(T), 9, generator=rng), targets.columns, {"hidden": T})
    problem = Problem(pool, targets)
    U = G / G.norm(dim=1, keepdim=True)
    V = T / T.norm(dim=1, keepdim=True)
    naive = torch.cosine_similarity((U - U.mean(0))[:, None], (V - U.mean(0))[None], dim=2).topk(4, dim=1).values.mean(1)
    nearest, budget = OGSStatic(against="plain", utility=utility, neighbours=4), Budget.parse("60")
    selection = nearest.select(problem, budget, torch.Generator())
    found = torch.tensor(selection.trace["utility"], dtype=torch.float64)
    assert torch.allclose(found, naive.double(), atol=1e-5)
    assert "target" not in selection.trace["references"]

    def separates(score: torch.Tensor) -> float:
        return float((score[:60, None] > score[None, 60:]).double().mean())

    assert separates(found) > 0.95 > separates(pool.columns["dot/target"] / pool.columns["norm"]) + 0.05
    all_of_them = replace(nearest, neighbours=99).select(problem, budget, torch.Generator())
    assert all_of_them.trace["utility"] != selection.trace["utility"]


@pytest.mark.parametrize("utility", ["nearest", "hidden"])
def test_a_target_without_a_direction_is_left_out_by_name(utility):
    rng = torch.Generator().manual_seed(0)
    G, T = torch.randn(50, 12, generator=rng), torch.randn(4, 12, generator=rng)
    T[2] = 0
    names = [f"t{i}" for i in range(4)]

    def chosen(keep: list[int], T: torch.Tensor = T) -> Selection:
        pool = ArrayGradients.from_matrix(G, references={"target": G[1], "anchor": G[0]})
        rows = T[keep]
        pool = ArrayGradients(pool.ids, G, pool.columns, {"hidden": G})
        targets = ArrayGradients([names[i] for i in keep], rows, {}, {"hidden": rows})
        method = OGSStatic(against="plain", utility=utility, neighbours=3)
        return method.select(Problem(pool, targets), Budget.parse("10"), torch.Generator())

    with_zero, without = chosen([0, 1, 2, 3]), chosen([0, 1, 3])
    assert with_zero.trace["utility"] == without.trace["utility"]
    of = "hidden state" if utility == "hidden" else "gradient"
    assert f"1 of 4 targets have a zero {of}, which has no direction; left out: t2" in with_zero.notes
    assert not any("left out" in note for note in without.notes)
    with pytest.raises(InvalidArgument, match="'t1' must be finite"):
        chosen([0, 1, 3], T.index_fill(0, torch.tensor([1]), torch.nan))


def test_a_pool_of_one_direction_that_the_target_shares_is_refused():
    G = torch.tensor([[3.0, 4.0], [0.6, 0.8]])
    pool = ArrayGradients.from_matrix(G, references={"target": G[0], "anchor": G[0]})
    method, budget = OGSStatic(against="plain", utility="nearest"), Budget.parse("1")
    with pytest.raises(InvalidArgument, match="a target that differs from the pool's mean direction"):
        method.select(Problem(pool, ArrayGradients(["t"], G[:1])), budget, torch.Generator())
    away = Problem(pool, ArrayGradients(["t"], torch.tensor([[4.0, -3.0]])))
    assert method.select(away, budget, torch.Generator()).trace["utility"] == [0.0, 0.0]
