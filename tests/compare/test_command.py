"""The command: cells beforehand, the run, mistakes in one line."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from gradsieve.cli import run
from gradsieve.compare.command import told_line
from gradsieve.compare.run import Comparison


@pytest.fixture
def path(content: dict[str, Any], tmp_path: Path) -> Path:
    file = tmp_path / "small.yaml"
    file.write_text(yaml.safe_dump(content | {"arms": {"random": None}, "seeds": [0]}))
    return file


def test_a_dry_run_prints_the_cells(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["compare", str(path), "--dry-run"]) == 0
    out = capsys.readouterr().out
    assert "3 of 3 cells to do, about" in out
    assert all(word in out for word in ("base", "full", "random", "25%", "equal_steps"))
    assert not (path.parent / "study").exists()


def test_a_dry_run_of_some_arms_is_of_these_alone(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["compare", str(path), "--dry-run", "--only", "random@25%"]) == 0
    assert "2 of 2 cells to do, about" in capsys.readouterr().out
    assert run(["compare", str(path), "--only", "random@5%"]) == 2
    assert capsys.readouterr().err == "gradsieve: only must name budgets of the arm (random@25%), got 'random@5%'\n"


def test_a_run_says_what_is_done_and_where_to_look(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["compare", str(path), "--minutes", "0"]) == 0
    assert "No cell is finished yet; run the same command again" in capsys.readouterr().out
    assert run(["compare", str(path), "--out", str(path.parent / "other")]) == 0
    said = capsys.readouterr()
    assert "cell 3 of 3: random--25pct--0--equal_steps" in said.err
    assert f"Look at {path.parent / 'other' / 'report.html'}" in said.out
    assert (path.parent / "other" / "report.html").exists()


def test_a_mistake_is_one_line(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path.write_text(path.read_text() + "stepps: 3\n")
    assert run(["compare", str(path)]) == 2
    assert capsys.readouterr().err.startswith(f"gradsieve: {path}: stepps must be one of model, pool,")


def test_a_finished_cell_is_told_with_its_time(finished: Comparison) -> None:
    done = finished.finished()
    line = told_line(done[1], 2, 9, 3700.0)
    assert line.startswith("cell 2 of 9: full--0--equal_steps: ")
    assert line.endswith(", about 1 h 2 min left")
    assert "left" not in told_line(done[1], 9, 9, 0.0)
    assert "left" not in told_line(done[0], 1, 9, None)
