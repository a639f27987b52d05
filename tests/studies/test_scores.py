"""The AUCs of a study's scores, counted pair by pair."""

import runpy
from pathlib import Path

import pytest
import torch

import gradsieve as gs

MADE = runpy.run_path(str(Path(__file__).parents[2] / "studies" / "scores.py"))
KINDS = ["clean", "swapped", "clean", "clean", "swapped", *MADE["KINDS"][1:]]


def pool(n: int) -> gs.ArrayGradients:
    rng = torch.Generator().manual_seed(0)
    dots, norms = (torch.rand(n, generator=rng, dtype=torch.float64) + shift for shift in (0, 1))
    columns = {"dot/target": dots, "norm": norms, "loss": norms.flip(0).round(), "completion_tokens": torch.arange(1.0, n + 1)}
    return gs.ArrayGradients([f"{i}" for i in range(n)], torch.zeros(n, 4), columns)


def test_auc_is_the_share_of_pairs_in_which_the_faulty_row_scores_lower() -> None:
    gradients = pool(len(KINDS))
    found = MADE["table"](gradients, KINDS)
    ways = {
        "cosine with target": gradients.columns["dot/target"] / gradients.columns["norm"],
        "loss": -gradients.columns["loss"],
        "length": gradients.columns["completion_tokens"],
    }
    assert {name for name, _ in found} == set(ways)
    for name, score in ways.items():
        for kind in MADE["KINDS"]:
            pairs = [
                (s, c)
                for s, k in zip(score, KINDS, strict=True)
                if k == kind
                for c, own in zip(score, KINDS, strict=True)
                if own == "clean"
            ]
            assert found[name, kind] == pytest.approx(sum((s < c) + 0.5 * (s == c) for s, c in pairs) / len(pairs))
    assert found["length", "length"] == pytest.approx(1.0)


def test_pools_are_averaged_and_their_spread_is_shown() -> None:
    tables = [{("a", column): value for column in (*MADE["KINDS"], "length")} for value in (0.5, 1.0)]
    assert MADE["lines"](tables) == [["a", *["0.75 (0.50…1.00)"] * 6]]
