"""How near the chosen gradients are to one another, counted pair by pair, and what share is of which source."""

import runpy
from pathlib import Path

import pytest
import torch

MADE = runpy.run_path(str(Path(__file__).parents[2] / "studies" / "spread.py"))


def test_the_mean_cosine_is_that_of_all_pairs() -> None:
    rows = torch.randn(7, 5, generator=torch.Generator().manual_seed(0)) + 0.5
    pairs = [torch.cosine_similarity(rows[i], rows[j], dim=0).item() for i in range(7) for j in range(7) if i != j]
    assert MADE["mean_cosine"](rows) == pytest.approx(sum(pairs) / len(pairs), rel=1e-5)
    assert MADE["mean_cosine"](3 * rows[:1].repeat(4, 1)) == pytest.approx(1.0)


def test_a_source_is_known_by_who_published_it() -> None:
    rows = [{"source": "acts/eng 1"}, {"source": "acts/fre 2"}, {"source": "glossary of terms"}]
    assert [MADE["family"](row) for row in rows] == ["acts", "acts", "glossary"]
    assert MADE["share"](rows, "acts") == pytest.approx(2 / 3)
