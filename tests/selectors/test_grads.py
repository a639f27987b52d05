import math
from collections import Counter
from dataclasses import replace

import pytest
import scipy.stats
import torch

from gradsieve.errors import InvalidArgument
from gradsieve.selectors.grads import STATISTICS, GrADS
from gradsieve.types import ArrayGradients, Budget, Problem, Warmup


def select(problem, budget="25%", seed=0, **settings):
    return GrADS(**settings).select(problem, Budget.parse(budget), torch.Generator().manual_seed(seed))


def of_norms(embedding, lm_head=None, sketch=None):
    n = len(embedding)
    columns = {"norm/embedding": torch.tensor(embedding), "norm/lm_head": torch.tensor(lm_head or [1.0] * n)}
    return Problem(ArrayGradients([f"{i:02d}" for i in range(n)], torch.ones(n, 1) if sketch is None else sketch, columns))


def score_naive(pool):
    s = torch.zeros(len(pool.ids), dtype=torch.float64)
    for name in ("norm/embedding", "norm/lm_head"):
        u = pool.columns[name].log()
        s += (u - u.mean()) / u.std(correction=0) / 2
    return s


def density_naive(s):
    """Silverman's rule and the sum of n Gaussians (Eq. GRADS-2)."""
    iqr = scipy.stats.iqr(s.numpy())
    h = 0.9 * min(s.std().item(), iqr / 1.34) * len(s) ** -0.2
    return torch.stack([(-0.5 * ((x - s) / h).square()).exp().sum() for x in s]) / (len(s) * h * math.sqrt(2 * math.pi))


def unit(x):
    return (x - x.min()) / (x.max() - x.min())


def grads_naive(problem, k, first, weights):
    """Eq. GRADS-5 with all factors computed anew in every step."""
    G = problem.candidates.sketch["base"].double()
    C = torch.nn.functional.cosine_similarity(G[:, None], G[None], dim=2)
    diversity = unit(1 - C.mean(1))
    chosen, novelties = [], []
    for _ in range(k):
        novelty = torch.ones(len(G), dtype=torch.float64) if not chosen else 1 - C[:, chosen].amax(1).clamp(min=0)
        value = weights[0] * first + weights[1] * diversity + weights[2] * novelty
        value[chosen] = -1
        chosen.append(int(value.argmax()))
        novelties.append(novelty[chosen[-1]].item())
    return chosen, diversity, novelties


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("weights", [(1.0, 0.25, 0.25), (1.0, 0.0, 0.0), (0.2, 1.0, 0.0), (0.0, 0.3, 1.0)])
@pytest.mark.parametrize("prefer", ["density", "magnitude"])
def test_it_is_the_naive_greedy_rule(seed, weights, prefer, make_problem):
    problem = make_problem(60, seed=seed)
    s = score_naive(problem.candidates)
    p = density_naive(s)
    first = unit(p if prefer == "density" else s)
    chosen, diversity, novelties = grads_naive(problem, 15, first, weights)
    names = ("score_weight", "diversity_weight", "novelty_weight")
    selection = select(problem, 15, prefer=prefer, **dict(zip(names, weights, strict=True)))
    assert selection.rows.tolist() == chosen
    assert selection.trace["picks"]["score"] == pytest.approx(first[chosen].tolist())
    if weights[1]:
        assert torch.allclose(selection.scores, weights[0] * first + weights[1] * diversity, atol=1e-5)
        assert selection.trace["picks"]["diversity"] == pytest.approx(diversity[chosen].tolist(), abs=1e-5)
    if weights[2]:
        assert selection.trace["picks"]["novelty"] == pytest.approx(novelties, abs=1e-6)


def test_the_trace_describes_the_pool_and_the_band(make_problem):
    problem = make_problem(60)
    s = score_naive(problem.candidates)
    selection = select(problem)
    trace = selection.trace
    assert trace["gradient_score"] == pytest.approx(s.tolist())
    assert trace["pool"] == pytest.approx(
        {"max": s.max().item(), "min": s.min().item(), "mean": s.mean().item(), "sd": s.std(correction=0).item()}, abs=1e-12
    )
    assert trace["band"] == pytest.approx([s[selection.rows].min().item(), s[selection.rows].max().item()])
    curve, grid = torch.tensor(trace["density"]["values"]), torch.tensor(trace["density"]["grid"])
    assert torch.trapezoid(curve, grid).item() == pytest.approx(1, abs=5e-3)
    assert trace["length_correlation"].keys() == {"gradient score", "score"}


def test_the_dense_region_comes_first():
    # Three equal norms amid others far apart: the region needs no threshold to be found.
    problem = of_norms([0.01, 5.0, 900.0, 5.0, 0.2, 5.0, 70.0])
    selection = select(problem, 3, diversity_weight=0.0, novelty_weight=0.0)
    assert selection.rows.tolist() == [1, 3, 5]
    assert selection.notes == ("norm/lm_head is the same for all candidates, so it says nothing here",)


def test_novelty_steps_over_a_duplicate_and_an_opposed_gradient_is_as_new_as_an_orthogonal_one():
    sketch = torch.tensor([[1.0, 0.0], [2.0, 0.0], [0.0, 1.0], [-1.0, 0.0]])
    problem = of_norms([5.0, 5.0, 5.0, 5.0], sketch=sketch)
    settings = {"score_weight": 0.0, "diversity_weight": 0.0, "novelty_weight": 1.0}
    selection = select(problem, 4, **settings)
    assert selection.rows.tolist() == [0, 2, 3, 1]
    assert selection.trace["picks"]["novelty"] == pytest.approx([1, 1, 1, 0])


def test_diversity_prefers_what_the_pool_does_not_have():
    problem = of_norms([1.0] * 4, sketch=torch.tensor([[1.0, 0.0], [1.0, 0.1], [1.0, -0.1], [0.0, 1.0]]))
    assert select(problem, 1, score_weight=0.0, novelty_weight=0.0).rows.tolist() == [3]


def test_magnitude_takes_the_largest_norms():
    problem = of_norms([1.0, 8.0, 2.0, 4.0], [1.0, 2.0, 8.0, 4.0])
    rows = select(problem, 3, prefer="magnitude", diversity_weight=0.0, novelty_weight=0.0).rows
    assert sorted(rows.tolist()) == [1, 2, 3]


def test_a_proportional_draw_follows_the_density():
    problem = of_norms([1.0, 1.1, 1.2, 30.0])
    settings = {"prefer": "proportional", "diversity_weight": 0.0, "novelty_weight": 0.0}
    p = density_naive(score_naive_one(problem))
    p = p / p.sum()
    counts = Counter(tuple(select(problem, 2, seed, **settings).rows.tolist()) for seed in range(1500))
    for i in range(4):
        for j in range(4):
            if i != j:
                expected = 1500 * (p[i] * p[j] / (1 - p[i])).item()
                assert abs(counts[i, j] - expected) < 4.5 * expected**0.5 + 1


def score_naive_one(problem):
    u = problem.candidates.columns["norm/embedding"].log()
    return (u - u.mean()) / u.std(correction=0) / 2


def test_a_stratified_draw_takes_equal_shares_of_the_bins_at_random():
    problem = of_norms([float(2**i) for i in (5, 0, 4, 1, 3, 2)])  # bins of two: {1, 3}, {5, 4}, {2, 0}
    settings = {"prefer": "stratified", "bins": 3, "diversity_weight": 0.0, "novelty_weight": 0.0}
    counts = Counter(tuple(select(problem, 3, seed, **settings).rows.tolist()) for seed in range(800))
    assert set(counts) == {(a, b, c) for a in (1, 3) for b in (5, 4) for c in (2, 0)}
    assert all(abs(count - 100) < 45 for count in counts.values())


def test_without_content_factors_no_sketch_is_read():
    bare = GrADS(diversity_weight=0.0, novelty_weight=0.0)
    assert bare.needs == {"norm/embedding", "norm/lm_head"}
    assert "sketch" in GrADS(diversity_weight=0.0).needs
    assert "sketch" in GrADS(novelty_weight=0.0).needs


def test_the_other_statistics_are_read_on_request_and_reported_where_they_are(make_problem):
    problem = make_problem(20)
    assert set(STATISTICS) <= GrADS(statistics=True).needs
    assert not set(STATISTICS) & GrADS().needs
    selection = select(problem, statistics=True)
    column = problem.candidates.columns["max/lm_head"]
    assert selection.trace["statistics"]["max/lm_head"] == pytest.approx(
        {"pool": column.mean().item(), "chosen": column[selection.rows].mean().item()}
    )
    fewer = replace(problem.candidates, columns={c: v for c, v in problem.candidates.columns.items() if c != "max/lm_head"})
    assert "max/lm_head" not in select(replace(problem, candidates=fewer)).trace["statistics"]
    with pytest.raises(InvalidArgument, match="grads needs the column 'max/lm_head'"):
        select(replace(problem, candidates=fewer), statistics=True)


def test_a_norm_of_zero_is_left_out_of_the_scores_and_of_the_standardisation():
    norms = [0.01, 5.0, 900.0, 5.0, 0.2, 5.0, 70.0]
    whole = select(of_norms([*norms, 0.0]), "100%")
    assert whole.rows.tolist() == select(of_norms(norms), "100%").rows.tolist()
    assert whole.scores[7].isnan()
    assert any(note.startswith("1 of 8 candidates have a zero gradient") for note in whole.notes)


def test_settings_are_checked():
    with pytest.raises(
        InvalidArgument, match="prefer must be one of density, proportional, stratified, magnitude, got 'dense'"
    ):
        GrADS(prefer="dense")
    with pytest.raises(InvalidArgument, match="novelty_weight must be at least 0 and finite, got -1"):
        GrADS(novelty_weight=-1.0)
    with pytest.raises(InvalidArgument, match="must not all be 0"):
        GrADS(score_weight=0.0, diversity_weight=0.0, novelty_weight=0.0)
    with pytest.raises(InvalidArgument, match="bins must be at least 2"):
        GrADS(bins=1)
    with pytest.raises(InvalidArgument, match="probe must be one of lora, full, got 'qlora'"):
        GrADS(probe="qlora")
    with pytest.raises(InvalidArgument, match="probe_epochs must be at least 0, got -1; 0 is no probe"):
        GrADS(probe_epochs=-1)


def test_its_warm_up_is_one_epoch_of_the_whole_pool_unless_it_is_left_out():
    assert GrADS().warmup == Warmup(1.0, 1, "lora", without="--probe-epochs 0")
    assert GrADS(probe_epochs=2, probe="full").warmup == Warmup(1.0, 2, "full", without="--probe-epochs 0")
    assert GrADS(probe_epochs=0).warmup is None
