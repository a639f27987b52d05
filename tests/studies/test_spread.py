"""What share of the chosen is of which source."""

import runpy
from pathlib import Path

import pytest

MADE = runpy.run_path(str(Path(__file__).parents[2] / "studies" / "spread.py"))


def test_a_source_is_known_by_who_published_it() -> None:
    rows = [{"source": "acts/eng 1"}, {"source": "acts/fre 2"}, {"source": "glossary of terms"}]
    assert [MADE["family"](row) for row in rows] == ["acts", "acts", "glossary"]
    assert MADE["share"](rows, "acts") == pytest.approx(2 / 3)
