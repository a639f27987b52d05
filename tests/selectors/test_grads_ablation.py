"""Each factor of GrADS alone, against the greedy rule written out."""

from __future__ import annotations

import pytest
import torch

from gradsieve.selectors import grads_ablation as module
from gradsieve.selectors.directions import Directions
from gradsieve.selectors.grads import GrADS
from gradsieve.selectors.grads_ablation import set_novelty
from gradsieve.types import ArrayGradients, Budget

WAYS = {"all three": (1.0, 0.25, 0.25), "score alone": (1, 0, 0), "diversity alone": (0, 1, 0), "novelty alone": (0, 0, 1)}


def cosines(gradients):
    G = gradients.sketch["base"].double()
    return torch.nn.functional.cosine_similarity(G[:, None], G[None], dim=2)


def greedy_naive(C, first, diversity, weights, k, among):
    chosen = []
    for _ in range(k):
        novelty = 1 - C[:, chosen].amax(1).clamp(min=0) if chosen else torch.ones(len(C), dtype=torch.float64)
        value = weights[0] * first + weights[1] * diversity + weights[2] * novelty
        left = [row for row in among if row not in chosen]
        chosen.append(max(left, key=lambda row: (round(value[row].item(), 9), -among.index(row))))
    return chosen


def novelty_naive(C, rows):
    return 1 - sum(max(0.0, *(C[i, j].item() for j in rows if j != i)) for i in rows) / len(rows)


def run(problem, **settings):
    return GrADS(**settings).select(problem, Budget.parse("25%"), torch.Generator().manual_seed(0))


def test_each_way_to_choose_is_the_greedy_rule_with_its_weights(make_problem):
    problem = make_problem(48)
    pool = problem.candidates
    selection = run(problem)
    C = cosines(pool)
    among = sorted(range(48), key=pool.ids.__getitem__)
    first = torch.tensor([0.0] * 48, dtype=torch.float64)
    whole = run(problem, diversity_weight=0.0, novelty_weight=1e-12)  # its score is the first factor
    first = whole.scores
    diversity = (selection.scores - first) / 0.25
    bars = selection.trace["bars"]
    chosen = {name: greedy_naive(C, first, diversity, weights, 12, among) for name, weights in WAYS.items()}
    assert chosen["all three"] == selection.rows.tolist()
    for name, rows in {**chosen, "the candidates": among}.items():
        assert bars["Score factor, mean"][name] == pytest.approx(first[rows].mean().item(), abs=1e-6)
        assert bars["Diversity factor, mean"][name] == pytest.approx(diversity[rows].mean().item(), abs=1e-6)
        assert bars["Novelty of the set"][name] == pytest.approx(novelty_naive(C, rows), abs=1e-6)
        lengths = pool.columns["completion_tokens"][rows]
        assert bars["Answer length, median tokens"][name] == pytest.approx(lengths.quantile(0.5).item())
    assert next(iter(bars["Novelty of the set"])) == "all three"
    for name, rows in chosen.items():
        common = len(set(rows) & set(chosen["all three"])) / 12
        assert bars["Share that all three chose too"][name] == pytest.approx(common)
    assert selection.trace["ablation"] == {"candidates": 48, "picks": 12}


def test_a_factor_alone_is_best_at_what_it_looks_for(make_problem):
    bars = run(make_problem(120, seed=3)).trace["bars"]
    for panel, name in (("Score factor, mean", "score alone"), ("Diversity factor, mean", "diversity alone")):
        assert max(bars[panel], key=bars[panel].__getitem__) == name
    novelty = bars["Novelty of the set"]
    assert novelty["novelty alone"] > novelty["score alone"]
    assert novelty["novelty alone"] > novelty["the candidates"]


def test_large_pools_are_compared_on_a_sample_with_the_same_share(make_problem, monkeypatch):
    monkeypatch.setattr(module, "CANDIDATES", 20)
    problem = make_problem(100)
    selection = run(problem)
    assert selection.trace["ablation"] == {"candidates": 20, "picks": 5}
    assert len(selection.rows) == 25


def test_without_sketches_there_is_nothing_to_compare(make_problem):
    assert "bars" not in run(make_problem(20), diversity_weight=0.0, novelty_weight=0.0).trace


def test_the_novelty_of_a_set_by_hand(monkeypatch):
    G = torch.tensor([[1.0, 0.0], [0.6, 0.8], [-1.0, 0.0], [1.0, 0.0]])
    directions = Directions.of(ArrayGradients(list("abcd"), G))
    assert set_novelty(directions, torch.tensor([0, 1])) == pytest.approx(0.4)
    assert set_novelty(directions, torch.tensor([0, 2])) == 1  # opposed counts as new
    assert set_novelty(directions, torch.tensor([0, 1, 3])) == pytest.approx(1 - (1 + 0.6 + 1) / 3)
    assert set_novelty(directions, torch.tensor([2])) == 1
    monkeypatch.setattr(module, "PICKS", 2)  # asks the first and the last only
    assert set_novelty(directions, torch.tensor([0, 1, 3])) == pytest.approx(0)
