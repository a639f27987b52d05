"""The table of every method in every study, from two small ones written by hand."""

import csv
import json
import re
import runpy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

SCRIPT = Path(__file__).parents[2] / "studies" / "scoreboard.py"
STATIC = {"against": "contrast", "risk": "conflict", "form": "filter", "drop": 35.0, "gone": 1}


def cell(arm: str, budget: str | None = "20%", method: str = "random", **more: Any) -> dict[str, Any]:
    return {"arm": arm, "budget": budget, "method": method, "settings": {}, "own_recipe": {}, **more}


def write(folder: Path, cells: list[dict[str, Any]], pairs: list[tuple[Any, ...]], views: Sequence[str] = ("equal",)) -> Path:
    folder.mkdir()
    (folder / "results.jsonl").write_text("".join(json.dumps(one) + "\n" for one in cells))
    with (folder / "pairs.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        names = ["minus_gain", "verdict_gain", "minus_keeping", "verdict_keeping"]
        writer.writerow(["view", "arm", "other", "seeds", *names])
        writer.writerows([view, *pair] for view in views for pair in pairs)
    return folder


@pytest.fixture
def folders(tmp_path: Path) -> list[Path]:
    arms = [
        cell("base", None),
        cell("full", None),
        cell("random"),
        cell("slow", own_recipe={"learning_rate": 1e-4, "order": "selection"}),
        cell("kept", method="ogs-static", settings=STATIC),
        cell("kept", "5%", "ogs-static", settings=STATIC),
    ]
    one = write(
        tmp_path / "one",
        arms,
        [
            ("random 20%", "kept 20%", 3, -0.25, "loss", -0.5, "loss"),  # random gains less and forgets more
            ("full", "random 20%", 5, 0.125, "tie", 0.0625, "win"),
            ("slow 20%", "random 20%", 3, -0.5, "loss", 0.25, "tie"),
            ("kept 5%", "random 20%", 3, 1.0, "win", 1.0, "win"),  # of another size
            ("full", "kept 20%", 3, 1.0, "win", 1.0, "win"),
        ],
    )
    two = write(tmp_path / "two", arms, [("kept 20%", "random 20%", 2, 1.0, "unjudged", 1.0, "unjudged")])
    return [one, two]


def test_each_method_is_held_against_a_random_draw_of_its_size(folders: list[Path]) -> None:
    head, rule, *rows = runpy.run_path(str(SCRIPT))["table"](folders)
    assert head == ["method", "budget", "one"]  # nothing of the other is judged
    assert len(rule) == 3
    assert rows == [
        ["full", "–", "+0.125 / **−0.062**"],
        ["`random`, learning rate 0.0001", "20%", "**−0.500** / −0.250"],
        ["`ogs-static`, against contrast, form filter, drop 35", "20%", "**+0.250** / **−0.500**"],
    ]


def test_only_what_was_judged_is_bold_and_what_was_not_measured_is_a_dash(tmp_path: Path) -> None:
    arms = [cell("full", None), *(cell(name, budget) for name in ("random", "slow") for budget in ("100tok", "3000tok", "7"))]
    for one in arms[4:]:
        one["own_recipe"] = {"learning_rate": 1e-4}
    pairs = [
        ("slow 100tok", "random 100tok", 3, 1.0, "win", 0.5, "unjudged"),
        ("slow 3000tok", "random 3000tok", 3, 1.0, "tie", "", ""),
        ("slow 7", "random 7", 3, 1.0, "loss", 0.5, "win"),
    ]
    rows = runpy.run_path(str(SCRIPT))["table"]([write(tmp_path / "one", arms, pairs)])[2:]
    assert [row[1:] for row in rows] == [
        ["3000tok", "+1.000 / –"], ["100tok", "**+1.000** / −0.500"], ["7", "**+1.000** / **−0.500**"],
    ]  # fmt: skip


def test_two_views_are_refused(folders: list[Path], tmp_path: Path) -> None:
    both = write(tmp_path / "both", [cell("random")], [("full", "random 20%", 3, 1.0, "win", 1.0, "win")], ("equal", "other"))
    with pytest.raises(SystemExit, match="both must be a comparison in one view, got equal, other"):
        runpy.run_path(str(SCRIPT))["table"]([*folders, both])


def test_the_page_shows_the_table_of_what_is_committed() -> None:
    root = SCRIPT.parents[1]
    block = re.search(r"scoreboard\.py (.*)\n\n(?s:(\|.*?))\n\n", (root / "docs" / "studies.md").read_text(encoding="utf-8"))
    assert block
    folders = [root / "studies" / "results" / name for name in re.findall(r"[\w-]+", block[1].split("{")[1])]
    rows = runpy.run_path(str(SCRIPT))["table"](folders)
    assert block[2].splitlines() == [f"| {' | '.join(row)} |" for row in rows]
