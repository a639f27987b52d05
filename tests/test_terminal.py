"""What the terminal says at the end of a run."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import gradsieve as gs
from gradsieve.terminal import print_result

Write = Callable[..., Path]
SMALL: dict[str, Any] = {"dim": 256, "dtype": "float32", "unit_tokens": 400, "batch_tokens": 200}


def test_the_terminal_shows_tokens_an_example_before_and_after(
    write_data: Write, tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    result = gs.select(
        "length", model=str(tiny_model), pool=str(write_data("pool", 24)), budget="40%", out=tmp_path / "out", **SMALL
    )
    print_result(result, tmp_path / "out")
    tokens = [len(t.input_ids) for t in result.sets["pool"].tokens]
    chosen = [tokens[row] for row in result.selection.rows.tolist()]
    before, after = sum(tokens) / len(tokens), sum(chosen) / len(chosen)
    assert after > before + 1
    assert f"Tokens an example: {before:.0f} in the pool, {after:.0f} among the chosen." in capsys.readouterr().out
