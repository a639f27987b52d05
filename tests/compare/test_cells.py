"""Which cells a comparison has."""

import re

import pytest

from gradsieve.compare.cells import Cell, only_cells, plan_cells
from gradsieve.compare.config import parse_config
from gradsieve.errors import InvalidArgument


def test_every_arm_meets_every_budget_seed_and_view_once(content: dict[str, object]) -> None:
    arms = {
        "less": None,
        "long": {"method": "length", "budgets": ["50%"]},
        "agem": {"method": "full", "recipe": {"surgery": "agem"}},
    }
    content |= {"arms": arms, "budgets": ["5%", "20%"], "seeds": [0, 7], "views": ["equal_steps", "equal_repetition"]}
    cells = plan_cells(parse_config(content, "x.yaml"))
    expected = {Cell("base")}
    for seed in (0, 7):
        for view in ("equal_steps", "equal_repetition"):
            expected |= {Cell(arm, None, seed, view) for arm in ("full", "agem")}
            expected |= {Cell(arm, budget, seed, view) for arm in ("random", "less") for budget in ("5%", "20%")}
            expected |= {Cell(arm, "50%", seed, view) for arm in ("random", "long")}
    assert set(cells) == expected
    assert len(cells) == len(expected)
    assert len({cell.name for cell in cells}) == len(cells)
    assert cells[0] == Cell("base")
    assert [cell.seed for cell in cells[1:]] == [0] * 16 + [7] * 16


def test_some_cells_are_named_by_arm_and_budget(content: dict[str, object]) -> None:
    arms = {"less": None, "long": {"method": "length", "budgets": ["50%", "20%"]}}
    config = parse_config(content | {"arms": arms, "budgets": ["5%", "20%"], "seeds": [0, 7]}, "x.yaml")

    def named(*only: str) -> set[tuple[str, str | None]]:
        cells = only_cells(config, only)
        assert cells == [cell for cell in plan_cells(config) if cell in cells]
        assert {cell.seed for cell in cells} == {None, 0, 7}
        return {(cell.arm, cell.budget) for cell in cells if cell.arm != "base"}

    assert only_cells(config, ()) == plan_cells(config)
    assert named("less@20%", "full") == {("less", "20%"), ("full", None)}
    assert named("long") == {("long", "50%"), ("long", "20%")}
    assert named("less@5%", "less@20%") == named("less")
    for wrong, message in {
        "les@5%": "only must name arms (base, full, random, less, long), got 'les@5%'",
        "long@5%": "only must name budgets of the arm (long@20%, long@50%), got 'long@5%'",
        "less@": "only must name budgets of the arm (less@5%, less@20%), got 'less@'",
        "full@5%": "only must name budgets of the arm (full, which has none), got 'full@5%'",
    }.items():
        with pytest.raises(InvalidArgument, match=re.escape(message)):
            only_cells(config, [wrong])


def test_a_cells_folder_says_which_it_is() -> None:
    assert Cell("ogs-static", "5%", 2, "equal_steps").name == "ogs-static--5pct--2--equal_steps"
    assert Cell("full", None, 0, "equal_repetition").name == "full--0--equal_repetition"
    assert Cell("base").name == "base"
