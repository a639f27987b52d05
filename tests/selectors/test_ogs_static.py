import itertools
from dataclasses import replace

import numpy as np
import pytest
import scipy.optimize
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gradsieve.errors import InvalidArgument
from gradsieve.selectors.ogs_static import OGSStatic
from gradsieve.types import ArrayGradients, Budget, Problem, Reference

level = st.integers(0, 6).map(lambda i: i / 8)


def of(utility, risk, sketch=None, **columns):
    """Returns a problem whose exact utilities and contrast risks are these."""
    n = len(utility)
    dots = {"dot/target": torch.tensor(utility), "dot/contrast/anchor:x": -torch.tensor(risk), "norm": torch.ones(n)}
    dots |= {name.replace("__", "/"): torch.tensor(values) for name, values in columns.items()}
    return Problem(ArrayGradients([f"{i:03d}" for i in range(n)], torch.ones(n, 1) if sketch is None else sketch, dots))


def select(problem, budget, seed=0, **fields):
    fields = {"against": "contrast", "risk": "conflict"} | fields  # what the exact problems here are made for
    return OGSStatic(**fields).select(problem, Budget.parse(budget), torch.Generator().manual_seed(seed))


def noted(selection, text):
    return any(text in note for note in selection.notes)


def best_naive(utility, risk, k, bound, strata=None):
    """The best summed utility of any k rows (of given numbers per stratum) within the bound, or None."""
    strata = strata or [0] * len(utility)
    need = sorted(strata_of_first(strata, k))
    best = None
    for rows in itertools.combinations(range(len(utility)), k):
        within = sum(risk[i] for i in rows) <= k * bound + 1e-9 and sorted(strata[i] for i in rows) == need
        if within and (best is None or sum(utility[i] for i in rows) > best):
            best = sum(utility[i] for i in rows)
    return best


def strata_of_first(strata, k):
    """Which strata the first k seats go to by Webster's method."""
    seats = dict.fromkeys(set(strata), 0)
    for _ in range(k):
        winner = min(seats, key=lambda s: ((seats[s] + 0.5) / strata.count(s), s))
        seats[winner] += 1
    return [s for s, count in seats.items() for _ in range(count)]


def optimum_of_relaxation(utility, risk, k, bound):
    n = len(utility)
    result = scipy.optimize.linprog(
        -np.array(utility), A_ub=[risk], b_ub=[k * bound], A_eq=[np.ones(n)], b_eq=[k], bounds=[(0, 1)] * n, method="highs"
    )
    return -result.fun


def ogs_static_naive(utility, risk, k, bound):
    """Top-k by a - λr, ties by risk, for the smallest λ among 0 and all points where two rows change places."""
    pairs = itertools.permutations(range(len(utility)), 2)
    crossings = {(utility[i] - utility[j]) / (risk[i] - risk[j]) for i, j in pairs if risk[i] > risk[j]}
    for penalty in [0.0, *sorted(c * (1 + 1e-9) for c in crossings if c > 0)]:
        rows = sorted(range(len(utility)), key=lambda i: (penalty * risk[i] - utility[i], risk[i]))[:k]
        if sum(risk[i] for i in rows) <= k * bound + 1e-12:
            return penalty, rows
    return None, None


def test_by_hand():
    # The two most useful have a mean risk of 0.45, twice the bound. Row 1 loses its place to row 2 where
    # 0.8 - 0.5λ = 0.5, at λ = 0.6, and rows 0 and 2 have a mean risk of 0.2.
    selection = select(of([0.9, 0.8, 0.5, 0.3], [0.4, 0.5, 0.0, 0.0]), 2, bound_of="mean", bound=100.0)
    assert selection.trace["bound"] == pytest.approx(0.225)
    assert selection.rows.tolist() == [0, 2]
    assert selection.trace["lambda"] == pytest.approx(0.6)
    assert selection.trace["mean_risk"] == pytest.approx(0.2)
    assert selection.scores.tolist() == pytest.approx([0.66, 0.5, 0.5, 0.3])
    assert selection.trace["gap"] == pytest.approx(0.6 * (0.45 - 0.4), abs=1e-6)


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("bound", [15.0, 30.0, 60.0])
def test_it_is_the_naive_rule(seed, bound):
    rng = torch.Generator().manual_seed(seed)
    utility = torch.rand(40, generator=rng, dtype=torch.float64)
    risk = (0.8 * utility + 0.3 * torch.rand(40, generator=rng, dtype=torch.float64) - 0.2).clamp(min=0)
    limit = float(np.percentile(risk.numpy(), bound))
    penalty, rows = ogs_static_naive(utility.tolist(), risk.tolist(), 10, limit)
    selection = select(of(utility.tolist(), risk.tolist()), 10, bound=bound)
    assert selection.trace["bound"] == pytest.approx(limit)
    if rows is None:
        assert noted(selection, "infeasible")
        return
    assert sorted(selection.rows.tolist()) == sorted(rows)
    assert selection.trace["lambda"] == pytest.approx(penalty, rel=1e-6)
    final = utility - selection.trace["lambda"] * risk
    assert torch.allclose(selection.scores, final)
    assert selection.rows.tolist() == sorted(rows, key=lambda i: -final[i].item())


def check_against_all_subsets(selection, utility, risk, k, bound, strata=None):
    mean_risk = sum(risk[i] for i in selection.rows) / k
    best = best_naive(utility, risk, k, bound, strata)
    if best is None:
        assert noted(selection, "infeasible")
        return
    assert mean_risk <= bound + 1e-9
    reached = sum(utility[i] for i in selection.rows)
    assert best - reached <= max(utility) - min(utility) + 1e-9  # one exchange
    if selection.trace["gap"] is not None:
        assert best - reached <= selection.trace["gap"] + 1e-9
    if selection.trace["lambda"] == 0:
        assert best == pytest.approx(reached)


@settings(deadline=None, max_examples=150)
@given(st.lists(st.tuples(level, level), min_size=2, max_size=9), st.data())
def test_among_all_subsets_it_is_within_one_exchange_of_the_best_and_within_its_own_gap(rows, data):
    utility, risk = [a for a, _ in rows], [r for _, r in rows]
    k = data.draw(st.integers(1, len(rows)))
    q = data.draw(st.sampled_from([0.0, 10.0, 25.0, 50.0, 80.0, 100.0]))
    selection = select(of(utility, risk), k, bound=q)
    bound = float(np.percentile(risk, q))
    check_against_all_subsets(selection, utility, risk, k, bound)
    if selection.trace["gap"] is not None:
        reached = sum(utility[i] for i in selection.rows)
        assert reached + selection.trace["gap"] == pytest.approx(optimum_of_relaxation(utility, risk, k, bound), abs=1e-6)


@settings(deadline=None, max_examples=60)
@given(st.lists(st.tuples(level, level, st.integers(1, 9)), min_size=4, max_size=9), st.data())
def test_with_strata_too(rows, data):
    utility, risk, length = zip(*rows, strict=True)
    k = data.draw(st.integers(1, len(rows)))
    by_length = sorted(range(len(rows)), key=lambda i: (length[i], i))
    strata = [by_length.index(i) * 2 // len(rows) for i in range(len(rows))]
    problem = of(list(utility), list(risk), completion_tokens=list(length))
    selection = select(problem, k, bound=40.0, stratify="length", bins=2)
    assert sorted(strata[i] for i in selection.rows) == sorted(strata_of_first(strata, k))
    check_against_all_subsets(selection, utility, risk, k, float(np.percentile(risk, 40)), strata)


def test_rows_tied_at_the_critical_penalty_use_up_the_room():
    # All on the line a = r: at λ = 1 any four rows are equally good, so the bound should be met with equality, or nearly.
    values = [i / 16 for i in range(16)]
    selection = select(of(values, values), 4, bound=40.0)
    assert selection.trace["bound"] == pytest.approx(6 / 16)
    assert selection.trace["lambda"] == pytest.approx(1)
    assert selection.trace["gap"] < 12 / 16
    assert selection.trace["mean_risk"] > 0.25


def test_rows_tied_at_the_critical_penalty_change_places_within_their_stratum():
    # One row of each half by length, all on the line a = r: from {0, 2} only 2 -> 3 fits the bound of 0.54 in sum.
    values = [0.1, 0.5, 0.2, 0.3]
    problem = of(values, values, completion_tokens=[1, 1, 9, 9])
    selection = select(problem, 2, bound_of="mean", bound=100 * 0.27 / 0.275, stratify="length", bins=2)
    assert sorted(selection.rows.tolist()) == [0, 3]


def test_the_bound_can_be_a_share_of_the_mean_risk():
    problem = of([0.9, 0.8, 0.5, 0.4], [0.8, 0.4, 0.0, 0.0])
    assert select(problem, 2, bound_of="mean", bound=100.0).trace["bound"] == pytest.approx(0.3)
    assert select(problem, 2, bound_of="mean", bound=100.0).rows.tolist() == [1, 2]
    assert select(problem, 2, bound_of="mean", bound=50.0).rows.tolist() == [2, 3]


def test_overlap_counts_agreement_with_the_anchor_as_much_as_conflict():
    cosine = [0.9, -0.9, 0.1, -0.2, 0.0]
    problem = of([0.9, 0.8, 0.3, 0.2, 0.1], [0.0] * 5, dot__anchor=cosine)
    overlap = select(problem, 2, against="plain", risk="overlap")
    assert overlap.trace["overlap"] == pytest.approx([abs(c) for c in cosine])
    assert {0, 1}.isdisjoint(overlap.rows.tolist())  # with one of them the mean is above the bound, the median 0.2
    assert sorted(select(problem, 2, against="plain").rows.tolist()) == [0, 2]  # agreement is free, conflict is not
    both = of([0.5] * 3, [0.3, -0.7, 0.1], dot__anchor=[-0.2, 0.6, 0.4])
    trace = select(both, 1, against="both", risk="overlap").trace
    assert trace["overlap"] == pytest.approx([0.3, 0.6, 0.4])  # to agree with a contrast (-0.7) is no risk
    rule = OGSStatic()
    assert rule.select(problem, Budget.parse("2"), torch.Generator()).trace["overlap"] == pytest.approx(
        [abs(c) for c in cosine]
    )
    assert rule.needs == {"norm", "dot/target", "dot/anchor"}


def test_a_bound_that_does_not_bind_is_reported_with_its_cures():
    plain = of([0.9, 0.6, 0.5], [0.0, 0.0, 0.0], dot__anchor=[0.5, 0.1, -0.1])
    selection = select(plain, 2, against="plain")
    assert selection.trace["lambda"] == 0
    assert selection.rows.tolist() == [0, 1]
    assert noted(selection, "λ not binding")
    assert noted(selection, "use --risk overlap, --against contrast, --form filter or a lower --bound")
    binding = select(of([0.9, 0.6, 0.5], [0.9, 0.1, 0.1]), 1)
    assert binding.trace["lambda"] > 0
    assert not noted(binding, "λ not binding")


def test_a_bound_that_cannot_be_met_is_reported_with_what_can():
    selection = select(of([0.9, 0.1, 0.5, 0.6], [0.4, 0.2, 0.3, 0.2]), 3, bound=10.0)
    assert noted(
        selection, "infeasible: the least risky examples that fill the budget have mean risk 0.2333, above the bound 0.2"
    )
    assert selection.rows.tolist() == [3, 1, 2]
    assert selection.trace["lambda"] is None
    assert len(selection.trace["path"]) == 1
    assert selection.scores.tolist() == pytest.approx([-0.4, -0.2, -0.3, -0.2])


def test_a_bound_that_only_the_safest_meet_is_met_by_risk_first():
    selection = select(of([0.9, 0.6, 0.5, 0.1], [0.4, 2e-9, 1e-9, 1e-9]), 2, bound=0.0)
    assert selection.rows.tolist() == [2, 3]
    assert noted(selection, "leaves no room")


def test_a_token_budget_is_kept_together_with_the_bound(make_problem):
    problem = make_problem(100)
    tokens = problem.candidates.columns["tokens"]
    selection = select(problem, "600tok", bound=20.0)
    assert selection.trace["lambda"] > 0
    assert selection.trace["mean_risk"] <= selection.trace["bound"] + 1e-9
    assert tokens[selection.rows].sum() <= 600
    assert selection.trace["gap"] is None


def test_a_token_budget_is_filled_up_within_the_bound_only():
    problem = of([0.9, 0.8, 0.7, 0.6, 0.5], [0.0, 0.0, 0.9, 0.0, 0.9], tokens=[10.0, 50.0, 5.0, 10.0, 5.0])
    selection = select(problem, "30tok", bound=50.0)
    assert selection.rows.tolist() == [0, 3]
    assert noted(selection, "spend 20 of the budget's 30 tokens: the shortest of the others has 50")


def test_the_path_shows_risk_and_utility_falling(make_problem):
    path = select(make_problem(100), 20, bound=10.0).trace["path"]
    penalties, risks, utilities = zip(*path, strict=True)
    assert penalties[0] == 0
    assert list(penalties) == sorted(penalties)
    assert list(risks) == sorted(risks, reverse=True)
    assert list(utilities) == sorted(utilities, reverse=True)


def test_risk_is_the_largest_conflict_with_any_contrast(make_problem):
    problem = make_problem(50)
    columns = problem.candidates.columns
    conflicts = {
        name: [max(0.0, -(columns[f"dot/{name}"][i] / columns["norm"][i]).item()) for i in range(50)]
        for name in ("anchor", "contrast/anchor:math", "contrast/anchor:knowledge", "contrast/target")
    }
    contrast = [max(values) for values in zip(*(conflicts[c] for c in conflicts if c != "anchor"), strict=True)]
    assert select(problem, 5).trace["risk"] == pytest.approx(contrast)
    assert select(problem, 5, against="plain").trace["risk"] == pytest.approx(conflicts["anchor"])
    both = [max(values) for values in zip(contrast, conflicts["anchor"], strict=True)]
    assert select(problem, 5, against="both").trace["risk"] == pytest.approx(both)
    utility = (columns["dot/target"] / columns["norm"]).tolist()
    assert select(problem, 5).trace["utility"] == pytest.approx(utility)
    references = ["target", "contrast/anchor:knowledge", "contrast/anchor:math", "contrast/target"]
    assert select(problem, 5).trace["references"] == references


def test_the_filter_drops_the_riskiest_and_draws_uniformly_from_the_rest():
    problem = of([0.0] * 5, [0.1, 0.9, 0.2, 0.8, 0.3])
    drawn = [frozenset(select(problem, 2, seed, form="filter", drop=40.0).rows.tolist()) for seed in range(900)]
    assert set(drawn) == {frozenset(pair) for pair in itertools.combinations([0, 2, 4], 2)}
    assert all(abs(drawn.count(pair) - 300) < 70 for pair in set(drawn))
    selection = select(problem, 2, form="filter", drop=40.0)
    assert selection.trace["dropped"] == [1, 3]
    assert selection.trace["threshold"] == pytest.approx(0.8)
    assert selection.scores.tolist() == pytest.approx([-0.1, -0.9, -0.2, -0.8, -0.3])
    assert "dot/target" not in OGSStatic(form="filter").needs


def test_the_filter_never_drops_what_has_no_risk_and_says_that_it_dropped_less():
    selection = select(of([0.0] * 4, [0.0, 0.5, 0.0, 0.0]), 2, form="filter", drop=75.0)
    assert selection.trace["dropped"] == [1]
    assert noted(selection, "drop 75% means 3 examples, but only 1 have any risk")


def test_the_filter_by_utility_takes_the_best_of_the_rest():
    selection = select(of([0.9, 0.8, 0.1, 0.5], [0.9, 0.1, 0.0, 0.2]), 2, form="filter", drop=25.0, draw="utility")
    assert selection.rows.tolist() == [1, 3]
    assert torch.allclose(
        selection.scores, torch.tensor([torch.nan, 0.8, 0.1, 0.5], dtype=torch.float64), equal_nan=True, atol=1e-7
    )


def test_the_filter_that_leaves_too_few_says_so():
    selection = select(of([0.9, 0.8, 0.1, 0.5], [0.9, 0.1, 0.1, 0.2]), 4, form="filter", drop=50.0)
    assert sorted(selection.rows.tolist()) == [1, 2]
    assert noted(selection, "2 examples are chosen of the 4 the budget asks for")


def test_the_filter_by_diversity_is_maximal_marginal_relevance(make_problem):
    problem = make_problem(40)
    selection = select(problem, 10, form="filter", drop=20.0, draw="diversity")
    G = problem.candidates.sketch["base"].double()
    U = G / G.norm(dim=1, keepdim=True)
    centre = U.mean(0) / U.mean(0).norm()
    risk = torch.tensor(selection.trace["risk"])
    kept = [i for i in range(40) if i not in risk.argsort(descending=True)[:8].tolist()]
    chosen = []
    for _ in range(10):
        nearest = {i: max([0.0, *(float(U[i] @ U[s]) for s in chosen)]) for i in kept}
        value = {i: 0.5 * float(U[i] @ centre) - 0.5 * nearest[i] for i in kept if i not in chosen}
        chosen.append(max(value, key=value.get))
    assert selection.rows.tolist() == chosen


def test_a_sketch_of_zero_cannot_be_diverse():
    problem = of([0.5] * 3, [0.1] * 3, sketch=torch.tensor([[1.0], [0.0], [-1.0]]))
    selection = select(problem, 3, form="filter", drop=0.0, draw="diversity")
    assert sorted(selection.rows.tolist()) == [0, 2]
    assert noted(selection, "1 of 3 candidates have a zero gradient, which has no direction; left out: 001")
    assert sorted(select(problem, 3, form="filter", drop=0.0).rows.tolist()) == [0, 1, 2]


def test_the_filter_with_strata_draws_from_each():
    length = [1, 1, 1, 1, 9, 9, 9, 9]
    problem = of([0.0] * 8, [0.0, 0.0, 0.0, 0.0, 0.9, 0.1, 0.1, 0.1], completion_tokens=length)
    for seed in range(10):
        rows = select(problem, 3, seed, form="filter", drop=12.5, stratify="length", bins=2).rows.tolist()
        assert 4 not in rows
        assert sum(length[row] == 1 for row in rows) == 2  # 4 and 3 are left: Webster gives 2 and 1


def test_centring_takes_the_mean_direction_out_of_both_sides(make_problem):
    g = make_problem(40).candidates.sketch["base"]
    target = torch.randn(16, generator=torch.Generator().manual_seed(3)) + g.mean(0)
    pool = ArrayGradients.from_matrix(g, references={"target": target, "contrast/anchor:x": g[0]})
    selection = select(Problem(pool), 5, center=True)
    U = g.double() / g.double().norm(dim=1, keepdim=True)
    mean = U.mean(0) / U.mean(0).norm()
    G, t = (x - (x @ mean)[..., None] * mean for x in (g.double(), target.double()))
    assert selection.trace["utility"] == pytest.approx(torch.cosine_similarity(G, t[None]).tolist(), abs=1e-6)
    assert "sketch" in OGSStatic(center=True).needs
    assert "sketch" not in OGSStatic().needs


def test_centring_finds_what_the_target_adds_to_the_format_all_share():
    G = torch.tensor([[10.0, 0.0, 0.0], [10.0, -0.1, 3.0], [10.0, 2.0, 8.0], [10.0, -2.0, -8.0], [10.0, 0.1, -3.0]])
    references = {"target": torch.tensor([10.0, 1.0, 0.0]), "contrast/anchor:x": torch.tensor([1.0, 0.0, 0.0])}
    problem = Problem(ArrayGradients.from_matrix(G, references=references))
    assert select(problem, 1).rows.tolist() == [0]
    assert select(problem, 1, center=True).rows.tolist() == [2]


def test_centring_at_its_edges():
    assert select(of([0.7, 0.7], [0.1, 0.1]), 2, center=True).trace["utility"] == [0.0, 0.0]  # rows that are the mean
    opposed = of([0.5, -0.5], [0.1, 0.1], sketch=torch.tensor([[1.0], [-1.0]]))
    assert select(opposed, 2, center=True).trace["utility"] == [0.5, -0.5]  # nothing is shared
    with pytest.raises(InvalidArgument, match="center must leave something of the target, got a cosine of 1"):
        select(of([1.0, 1.0], [0.1, 0.1]), 2, center=True)


def test_noisy_references_and_length_are_noted(make_problem):
    problem = make_problem(40)
    assert not noted(select(problem, 5), "unreliable")
    noisy = Reference(1.0, 4, 0.2)
    problem = replace(problem, references={"contrast/anchor:math": noisy, "anchor": noisy, "target": noisy})
    notes = select(problem, 5).notes
    assert sum("unreliable" in note for note in notes) == 2
    assert sum("'contrast/anchor:math' is unreliable" in note for note in notes) == 1
    a = [0.9, 0.8, 0.7, 0.5, 0.1]
    long = select(of(a, [0.3, 0.1, 0.5, 0.2, 0.4], completion_tokens=[5, 6, 7, 8, 9]), 2)
    assert long.trace["length_correlation"]["utility"] == pytest.approx(-1)
    assert noted(long, "utility is largely a measure of length: its rank correlation with completion_tokens is -1.00")


def test_a_risk_that_is_nearly_always_zero_is_noted():
    assert noted(select(of([0.1] * 20, [0.0] * 19 + [0.3]), 3), "risk is zero for 95% of the candidates")
    assert not noted(select(of([0.1] * 20, [0.0] * 18 + [0.3] * 2), 3), "risk is zero")
    plain = of([0.1] * 20, [0.0] * 20, dot__anchor=[0.5] * 20)
    said = "so it tells few of them apart; use --risk overlap or --against contrast"
    assert noted(select(plain, 3, against="plain", risk="conflict"), said)
    assert not noted(select(plain, 3, against="plain", risk="overlap"), "risk is zero")
    apart = replace(plain.candidates, columns=plain.candidates.columns | {"dot/anchor": torch.zeros(20)})
    overlapping = select(replace(plain, candidates=apart), 3, against="plain", risk="overlap")
    assert noted(overlapping, "so it tells few of them apart; use --against contrast")
    both = of([0.1] * 20, [0.0] * 20, dot__anchor=[0.5] * 20)
    copies = "give wrong copies that fail in other ways (--corrupted FILE)"
    assert noted(select(both, 3, against="both", risk="conflict"), f"apart; use --risk overlap or {copies}")
    assert noted(select(both, 3, against="contrast"), f"apart; {copies}")


def test_a_broken_contrast_that_is_only_read_if_there_is_refused(make_problem):
    problem = make_problem(10)
    problem.candidates.columns["dot/contrast/target"][3] = torch.nan
    with pytest.raises(InvalidArgument, match="column 'dot/contrast/target' must be finite"):
        select(problem, 2)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"against": "math"}, "against must be one of contrast, plain, both, categories, got 'math'"),
        ({"form": "best"}, "form must be one of top, filter, got 'best'"),
        ({"bound_of": "max"}, "bound_of must be one of percentile, mean, got 'max'"),
        ({"draw": "all"}, "draw must be one of random, diversity, utility, got 'all'"),
        ({"stratify": "yes"}, "stratify must be one of none, length, got 'yes'"),
        ({"bound": -1.0}, r"bound must lie in \[0, 100\] percent, got -1"),
        ({"drop": 100.0}, r"drop must lie in \[0, 100\) percent, got 100"),
        ({"form": "filter", "draw": "diversity", "stratify": "length"}, "stratify must be none with draw diversity"),
    ],
)
def test_settings_are_checked(fields, message):
    with pytest.raises(InvalidArgument, match=message):
        OGSStatic(**fields)
