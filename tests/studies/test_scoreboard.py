"""The table of every method in every study, from two small ones written by hand."""

import csv
import json
import re
import runpy
from pathlib import Path
from typing import Any

import pytest

SCRIPT = Path(__file__).parents[2] / "studies" / "scoreboard.py"
STATIC = {"against": "contrast", "risk": "conflict", "form": "filter", "drop": 35.0, "gone": 1}


def cell(arm: str, budget: str | None = "20%", method: str = "random", **more: Any) -> dict[str, Any]:
    return {"arm": arm, "budget": budget, "method": method, "settings": {}, "own_recipe": {}, **more}


def write(folder: Path, cells: list[dict[str, Any]], pairs: list[tuple[str, str, int, float, str, float, str]]) -> Path:
    folder.mkdir()
    (folder / "results.jsonl").write_text("".join(json.dumps(one) + "\n" for one in cells))
    with (folder / "pairs.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        names = ["minus_gain", "verdict_gain", "minus_keeping", "verdict_keeping"]
        writer.writerows([["arm", "other", "seeds", *names], *pairs])
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


def test_the_page_shows_the_table_of_what_is_committed() -> None:
    root = SCRIPT.parents[1]
    block = re.search(r"scoreboard\.py (.*)\n\n(?s:(\|.*?))\n\n", (root / "docs" / "studies.md").read_text(encoding="utf-8"))
    assert block
    folders = [root / "studies" / "results" / name for name in re.findall(r"[\w-]+", block[1].split("{")[1])]
    rows = runpy.run_path(str(SCRIPT))["table"](folders)
    assert block[2].splitlines() == [f"| {' | '.join(row)} |" for row in rows]
