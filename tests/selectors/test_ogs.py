"""OGS as a selector: what it emits, what it says of itself, and what it refuses."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from gradsieve.errors import InvalidArgument
from gradsieve.selectors import ogs as module
from gradsieve.selectors.ogs import OGS
from gradsieve.selectors.ogs_account import policy_notes
from gradsieve.selectors.ogs_policy import Run, Trained
from gradsieve.selectors.ogs_simulator import total
from gradsieve.selectors.ogs_static import OGSStatic
from gradsieve.selectors.orth_only import OrthOnly
from gradsieve.selectors.ranking import best_first, id_order
from gradsieve.types import ArrayGradients, Budget, Problem, Selection

QUICK: dict[str, Any] = {"clusters": 5, "updates": 2, "episodes": 4}


def run(problem: Problem, budget: str = "24", seed: int = 0, **settings: Any) -> Selection:
    return OGS(**QUICK | settings).select(problem, Budget.parse(budget), torch.Generator().manual_seed(seed))


def world(problem: Problem, budget: str = "24", **settings: Any) -> Any:
    return module._world(OGS(**QUICK | settings), problem, Budget.parse(budget), torch.Generator().manual_seed(0))


def with_columns(problem: Problem, part: str = "candidates", **columns: Any) -> Problem:
    g = getattr(problem, part)
    kept = {k: v for k, v in (dict(g.columns) | columns).items() if v is not None}
    return replace(problem, **{part: ArrayGradients(g.ids, g.sketch, kept)})


def test_the_emitted_subset_is_the_greedy_episode_draw_by_draw(make_problem):
    problem = make_problem(120)
    selection = run(problem, batch=3)
    steps = selection.trace["steps"]
    draws = world(problem, batch=3).simulator.draws
    supply = [rows.split(3) for rows in draws.rows]
    taken, rows = [0] * 5, []
    for c in steps["cluster"]:
        rows += supply[c][taken[c]].tolist()
        taken[c] += 1
    assert selection.rows.tolist() == rows[:24]
    batches = selection.rows.split(steps["examples"])
    assert [len(batch) for batch in batches] == [3] * 8
    draw = selection.trace["draw"]
    assert all(draw[row] == number for number, batch in enumerate(batches, 1) for row in batch.tolist())
    assert sum(number is not None for number in draw) == 24
    told = [c["drawn"] for c in selection.trace["clusters"]]
    assert told == [min(3 * t, len(r)) for t, r in zip(taken, draws.rows, strict=True)]
    predicted = selection.trace["simulated"]["ogs"]
    assert sum(steps["reward"]) == pytest.approx(predicted["reward"], abs=1e-9)
    assert sum(steps["cost"]) == pytest.approx(predicted["cost"], abs=1e-9)


def test_rows_of_a_cluster_come_in_the_order_of_the_scores(make_problem):
    problem = make_problem(120)
    selection = run(problem, epsilon=0.02)
    assert selection.trace["order_lambda"] > 0
    by_id = id_order(problem.candidates.ids)
    for rows in world(problem, epsilon=0.02).simulator.draws.rows:
        among = torch.full((120,), torch.nan, dtype=torch.float64)
        among[rows] = selection.scores[rows]
        assert torch.equal(rows, best_first(among, by_id))


def test_random_order_is_another_order_of_the_same_clusters(make_problem):
    problem = make_problem(120)
    scored, mixed = (world(problem, order=order).simulator.draws.rows for order in ("score", "random"))
    assert all(a.sort().values.equal(b.sort().values) for a, b in zip(scored, mixed, strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(scored, mixed, strict=True))


def test_the_default_step_ends_at_the_lowest_target_loss_on_the_way(make_problem):
    problem = make_problem(120)
    step = world(problem, batch=3).step
    useful = (problem.candidates.columns["dot/target"] / problem.candidates.columns["norm"]).argsort(descending=True)[:24]

    def gain(length: float) -> float:
        w = world(problem, step=length, batch=3)
        return total(w.surfaces, w.directions, useful)[0]

    assert gain(step) > max(gain(0.95 * step), gain(1.05 * step), 0)


def test_the_order_keeps_the_bound_to_first_order_where_the_most_useful_would_lead(make_problem):
    problem = make_problem(120)
    w = world(problem, epsilon=0.1)
    useful, chosen = (best_first(s, id_order(problem.candidates.ids))[:24] for s in (w.columns["utility"], w.scores))
    labels = torch.full((120,), -1).index_fill(0, useful, 0)
    _, at = w.surfaces[1].table(module.unit_sums(w.directions, labels, 1), labels, useful)
    here = total(w.surfaces, w.directions, useful)[1]  # cost(δ) ≈ cost(δ₀) + <∇cost(δ₀), δ - δ₀>
    slopes = w.surfaces[1].slopes(at[0], w.directions)
    expected = here + float(slopes[chosen].sum() - slopes[useful].sum())
    assert here > 0.1
    assert expected == pytest.approx(0.1, rel=0.25)  # one row is worth about a fifth
    assert expected <= 0.1


def test_the_batch_is_a_64th_of_the_budget_rounded_up(make_problem):
    problem = make_problem(150)
    assert world(problem, "100%").simulator.draws.batch == 3
    assert world(problem, "40").simulator.draws.batch == 1
    tokens = problem.candidates.columns["tokens"]
    assert world(problem, f"{int(tokens.sum())}tok").simulator.draws.batch == 3


def test_a_token_budget_is_spent_and_prices_the_draws(make_problem):
    problem = make_problem(100)
    selection = run(problem, "1500tok")
    tokens = problem.candidates.columns["tokens"]
    assert 1400 < tokens[selection.rows].sum() <= 1500
    draws = world(problem, "1500tok").simulator.draws
    assert draws.budget == 1500
    steps = selection.trace["steps"]
    assert sum(steps["examples"]) == len(selection.rows)
    assert len(steps["examples"]) == len(steps["cluster"])
    assert draws.price[0, 0] == tokens[draws.rows[0][: draws.batch]].sum()


def test_a_token_budget_passes_over_what_it_does_not_pay_for(make_problem):
    problem = make_problem(40)
    best = int(module.cosines(problem.candidates, "target").nan_to_num(-1).argmax())
    tokens = torch.full((40,), 1000.0)
    tokens[best] = 5
    selection = run(with_columns(problem, tokens=tokens), "900tok", order="random", clusters=1)
    assert selection.rows.tolist() == [best]
    assert (
        "the chosen 1 examples spend 5 of the budget's 900 tokens: the shortest of the others has 1000" in selection.notes[-1]
    )
    norm = problem.candidates.columns["norm"].clone()
    norm[best] = 0
    with pytest.raises(InvalidArgument, match="budget must pay for a candidate whose gradient is not zero, got 900tok; raise"):
        run(with_columns(problem, tokens=tokens, norm=norm), "900tok")


def test_replay_examples_have_clusters_of_their_own_and_their_share_is_told(make_problem):
    problem = make_problem(90)
    replay = torch.zeros(90)
    replay[::3] = 1
    selection = run(with_columns(problem, replay=replay), "45", general_clusters=3)
    clusters = selection.trace["clusters"]
    assert sum(c["replay"] for c in clusters) == 3
    assert sum(c["rows"] for c in clusters if c["replay"]) == 30
    assert selection.trace["replay_share"] == pytest.approx(replay[selection.rows].mean().item())
    assert run(problem).trace["replay_share"] == 0
    with pytest.raises(InvalidArgument, match=r"column 'replay' must be 0 or 1, got 0\.5"):
        run(with_columns(problem, replay=replay / 2))


def test_with_risk_as_cost_the_bound_is_on_the_mean_risk_of_the_chosen(make_problem):
    problem = make_problem(120)
    settings = {"fidelity": "linear", "constraint": "risk", "against": "contrast"}
    bound = run(problem, **settings, epsilon=0.05, updates=10).trace
    assert bound["order_lambda"] > 0
    assert 0.04 < bound["simulated"]["threshold"]["cost"] <= 0.05
    assert bound["simulated"]["ogs"]["cost"] <= 1.1 * 0.05  # a policy of ten updates meets its bound within a tenth
    tokens = problem.candidates.columns["tokens"]
    by_tokens = run(problem, "1500tok", **settings)
    weighted = (torch.tensor(by_tokens.trace["risk"], dtype=torch.float64) * tokens)[by_tokens.rows].sum() / 1500
    assert by_tokens.trace["simulated"]["ogs"]["cost"] == pytest.approx(weighted.item())
    selection = run(problem, **settings)
    simulated = selection.trace["simulated"]
    risk = torch.tensor(selection.trace["risk"], dtype=torch.float64)
    assert simulated["ogs"]["cost"] == pytest.approx(risk[selection.rows].mean().item())
    assert selection.trace["epsilon"] == pytest.approx(risk.quantile(0.5).item())


def test_the_bound_is_in_the_unit_of_its_cost(make_problem):
    problem = make_problem(30)
    bounds = [world(problem, constraint=constraint).simulator.epsilon for constraint in ("kl", "loss")]
    key = OGS(constraint="key", fidelity="navigator", **QUICK)
    live = module._world(key, replace(problem, navigator=object()), Budget.parse("8"), torch.Generator().manual_seed(0))
    assert [*bounds, live.simulator.epsilon] == [0.1, 0.01, 0.01]


def test_the_loss_cost_is_relative_and_signed_and_kl_is_neither(make_problem):
    problem = make_problem(120)
    loss, kl = (run(problem, constraint=c).trace["simulated"]["random"]["cost"] for c in ("loss", "kl"))
    assert loss < 0 < kl  # these anchors share the pool's direction: training lowers their loss and moves the model
    doubled = with_columns(problem, "anchors", loss=2 * problem.anchors.columns["loss"])
    assert run(doubled, constraint="loss").trace["simulated"]["random"]["cost"] == pytest.approx(loss / 2)
    assert run(doubled, constraint="kl").trace["simulated"]["random"]["cost"] == pytest.approx(kl)
    curved, linear = (
        run(problem, constraint="loss", fidelity=f).trace["simulated"]["ogs-static"] for f in ("quadratic", "linear")
    )
    assert curved["cost"] > linear["cost"]
    assert curved["reward"] < linear["reward"]


def test_the_choice_does_not_depend_on_the_order_of_the_pool(make_problem):
    problem = make_problem(120)
    order = torch.randperm(120, generator=torch.Generator().manual_seed(1))
    g = problem.candidates
    mixed = ArrayGradients([g.ids[i] for i in order], g.rows(order), {k: v[order] for k, v in g.columns.items()})
    a, b = run(problem, updates=5), run(replace(problem, candidates=mixed), updates=5)
    assert [g.ids[i] for i in a.rows] == [mixed.ids[i] for i in b.rows]
    assert a.trace["training"] == b.trace["training"]


@pytest.mark.parametrize(
    ("settings", "others", "note"),
    [
        ({"epsilon": 1e6}, {"epsilon": 0.02}, "λ not binding: .* lower --epsilon"),
        ({"epsilon": 1e-6}, {"epsilon": 0.3}, "bound not met: .* raise --epsilon"),
        ({"clusters": 200}, {}, "clusters: 120 were found where 200 were asked for"),
    ],
)
def test_what_the_user_must_know_is_said(settings, others, note, make_problem):
    notes = run(make_problem(120), **settings).notes
    assert any(re.search(note, n) for n in notes), notes
    assert not any(re.search(note, n) for n in run(make_problem(120), **others).notes)


def test_what_the_user_must_know_of_the_anchor_is_said_of_ogs_itself(make_problem):
    problem = make_problem(60)
    noisy = {name: replace(fact, signal_share=0.1, count=7) for name, fact in problem.references.items()}
    selection = run(replace(problem, references=noisy), against="contrast")
    names = {"target", "anchor", "contrast/target", "contrast/anchor:math", "contrast/anchor:knowledge"}
    assert set(selection.trace["references"]) == names  # the simulated losses rest on the mean of the anchor too
    for name in names:
        cure = "with 7 examples; give more of them"
        assert f"the reference '{name}' is unreliable: its signal share is 0.10 (below 0.7) {cure}" in selection.notes
    assert sum("the anchor has 14 usable examples" in note for note in selection.notes) == 1
    kind = {"dot/anchor": problem.candidates.columns["dot/anchor"].abs()}
    kind["completion_tokens"] = 100 * problem.candidates.columns["dot/target"] / problem.candidates.columns["norm"] + 200
    agreeing = run(with_columns(problem, **kind))
    cure = "use ogs-static with --risk overlap or --against contrast"
    assert f"risk is zero for 100% of the candidates, so it tells few of them apart; {cure}" in agreeing.notes
    assert sum("risk is zero" in note for note in agreeing.notes) == 1
    assert any(note.startswith("utility is largely a measure of length") for note in agreeing.notes)
    assert agreeing.trace["length_correlation"]["utility"] == pytest.approx(1)
    assert set(agreeing.trace["length_correlation"]) == {"utility", "risk", "score"}
    assert not any("is unreliable" in note or "risk is zero" in note for note in run(problem, against="contrast").notes)


def test_orth_is_held_against_the_anchor_in_the_form_that_was_asked_for(make_problem):
    problem = make_problem(60)
    forms = {
        "plain": {},
        "example": {"normalize": "example"},
        "category": {"normalize": "category"},
        "subspace": {"against": "categories"},
    }
    orth = {
        name: 1 - module.anchor_cosine(problem, own.get("normalize", "none")).abs()
        for name, own in forms.items()
        if name != "subspace"
    } | {"subspace": module.subspace_orth(problem, 0.9)[0]}
    for name, own in forms.items():
        draws = world(problem, **own).simulator.draws
        centred = (orth[name] - orth[name].mean()) / orth[name].std(correction=0)
        assert draws.left[:, 0, 0].tolist() == pytest.approx([float(centred[rows].mean()) for rows in draws.rows], abs=1e-5)
    assert not torch.allclose(orth["plain"], orth["subspace"], atol=0.01)


def test_sketches_decide_neither_utility_nor_risk_nor_orth(make_problem):
    problem = make_problem(60)
    g = problem.candidates
    noise = torch.randn(60, g.dim, generator=torch.Generator().manual_seed(9))
    other = replace(problem, candidates=ArrayGradients(g.ids, noise, dict(g.columns)))
    for against in ("plain", "contrast", "both", "categories"):
        a, b = (run(p, against=against) for p in (problem, other))
        assert a.trace["utility"] == b.trace["utility"]
        assert a.trace["risk"] == b.trace["risk"]
        assert torch.equal(*(module._orth(OGS(against=against), p) for p in (problem, other)))
        rules = [OGSStatic(against=against).select(p, Budget.parse("24"), torch.Generator()) for p in (problem, other)]
        assert torch.equal(rules[0].rows, rules[1].rows)
    orth = [OrthOnly(space="categories").select(p, Budget.parse("24"), torch.Generator()) for p in (problem, other)]
    assert torch.equal(orth[0].rows, orth[1].rows)


class Counted:
    """The same gradients; counts how often all of them are read, and the most rows that are asked for by number."""

    def __init__(self, inner: ArrayGradients) -> None:
        self.inner, self.passes, self.most = inner, 0, 0
        self.ids, self.dim, self.columns, self.checkpoints = inner.ids, inner.dim, inner.columns, inner.checkpoints
        self.representations = inner.representations

    def blocks(self, checkpoint: str | None = None) -> Iterator[tuple[Tensor, Tensor]]:
        self.passes += 1
        for rows in torch.arange(len(self.ids)).split(16):
            yield rows, self.inner.rows(rows, checkpoint)

    def rows(self, index: Tensor, checkpoint: str | None = None) -> Tensor:
        self.most = max(self.most, len(index))
        return self.inner.rows(index, checkpoint)


def test_the_store_is_read_once_where_unit_sketches_fit_and_a_few_times_where_not(make_problem, monkeypatch):
    problem = make_problem(120)
    held = Counted(problem.candidates)
    first = run(replace(problem, candidates=held))
    assert (held.passes, held.most) == (1, 1)
    monkeypatch.setattr("gradsieve.selectors.directions.CACHE_BYTES", 1)
    monkeypatch.setattr("gradsieve.selectors.clusters.SAMPLE_ROWS", 50)
    read = Counted(problem.candidates)
    run(replace(problem, candidates=read))
    assert read.passes == 7
    assert read.most == 50
    assert len(first.rows) == 24


def outcome(policy: tuple[float, float], rule: tuple[float, float]) -> bool:
    """Whether the notes say that the policy did not beat the rule, at a bound of 1."""
    trained = Trained(None, Run(1.0, (0,), (0.0,), (0.0,)), 0, {})  # type: ignore[arg-type]
    notes = policy_notes("kl", 1.0, trained, {"ogs": policy, "threshold": rule, "ogs-static": (-9.0, 0.0)})
    return any("did not beat the threshold rule at the same bound" in note for note in notes)


def test_a_rule_that_was_not_beaten_is_named():
    assert not outcome((2.0, 0.9), (1.9, 0.5))
    assert outcome((1.8, 0.9), (1.9, 0.5))
    assert outcome((1.9, 0.9), (1.9, 0.9))
    assert not outcome((1.0, 0.9), (9.0, 1.1))  # the rule breaks the bound
    assert outcome((9.0, 1.1), (1.0, 0.9))  # the policy does
    assert outcome((9.0, 1.3), (1.0, 1.2))  # both do
    assert not outcome((1.0, 1.1), (9.0, 1.2))


def test_a_bound_that_is_missed_by_little_is_not_met():
    trained = Trained(None, Run(1.0, (0,), (0.0,), (0.0,)), 0, {})  # type: ignore[arg-type]
    for cost, said in ((1.01, True), (1.0, False)):
        notes = policy_notes("kl", 1.0, trained, {"ogs": (1.0, cost), "threshold": (0.0, 0.0), "ogs-static": (0.0, 0.0)})
        assert any("bound not met" in note for note in notes) == said


def test_targets_that_the_pool_cannot_teach_are_named(make_problem):
    problem = make_problem(60)
    flipped = with_columns(problem, **{"dot/target": -problem.candidates.columns["dot/target"].abs()})
    assert any("raise the simulated target loss" in note for note in run(flipped).notes)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"clusters": 0}, "clusters must be at least 1, got 0"),
        ({"general_clusters": 0}, "general_clusters must be at least 1"),
        ({"batch": 0}, "batch must be at least 1"),
        ({"updates": 0}, "updates must be at least 1"),
        ({"episodes": 0}, "episodes must be at least 1"),
        ({"epsilon": 0.0}, "epsilon must be above 0"),
        ({"step": -1.0}, "step must be above 0"),
        ({"learning_rate": float("inf")}, "learning_rate must be above 0 and finite"),
        ({"multiplier_rate": -0.1}, "multiplier_rate must be at least 0"),
        ({"constraint": "answers"}, "constraint must be one of"),
        ({"fidelity": "exact"}, "fidelity must be one of"),
        ({"against": "none"}, "against must be one of"),
        ({"order": "id"}, "order must be one of"),
        ({"fidelity": "linear"}, "constraint must be loss or risk with fidelity linear"),
    ],
)
def test_settings_that_mean_nothing_are_refused(settings, message):
    with pytest.raises(InvalidArgument, match=message):
        OGS(**settings)


def test_what_cannot_be_used_is_refused(make_problem):
    problem = make_problem(30)
    with pytest.raises(InvalidArgument, match="ogs needs the column 'loss' of the targets"):
        run(with_columns(problem, "targets", loss=None))
    with pytest.raises(InvalidArgument, match="mean loss of the anchors must be above 0"):
        run(with_columns(problem, "anchors", loss=torch.zeros(8)), constraint="loss")
    with pytest.raises(InvalidArgument, match="median risk of 0"):
        run(problem, constraint="risk")
    with pytest.raises(InvalidArgument, match="pass --step"):
        run(with_columns(problem, **{"dot/target": torch.zeros(30)}))


def test_importing_the_method_does_not_import_gymnasium():
    import subprocess
    import sys

    code = "import sys, gradsieve.selectors.ogs; sys.exit('gymnasium' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
