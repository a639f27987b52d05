"""Which cells a comparison has."""

from gradsieve.compare.cells import Cell, plan_cells
from gradsieve.compare.config import parse_config


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
            expected |= {Cell("long", "50%", seed, view)}
    assert set(cells) == expected
    assert len(cells) == len(expected)
    assert len({cell.name for cell in cells}) == len(cells)
    assert cells[0] == Cell("base")
    assert [cell.seed for cell in cells[1:]] == [0] * 14 + [7] * 14


def test_a_cells_folder_says_which_it_is() -> None:
    assert Cell("ogs-static", "5%", 2, "equal_steps").name == "ogs-static--5pct--2--equal_steps"
    assert Cell("full", None, 0, "equal_repetition").name == "full--0--equal_repetition"
    assert Cell("base").name == "base"
