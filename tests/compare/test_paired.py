"""Which tests and metrics a difference is taken over, and what is said of those that have no value."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gradsieve.compare.cells import Cell
from gradsieve.compare.page import headline, lead
from gradsieve.compare.paired import Paired
from gradsieve.compare.records import Finished, write_items, write_json
from gradsieve.compare.statistics import Draws, replicates
from gradsieve.compare.summary import Summary, summarise
from gradsieve.errors import DataError

ROLES = {"law": "target", "tax": "target", "math": "general"}
CELLS = [Cell("base"), *(Cell(arm, "10%", seed, "equal_steps") for seed in range(3) for arm in ("random", "good"))]
Measured = dict[str, dict[str, np.ndarray]]
Write = Callable[[Callable[[Cell], Measured]], list[Finished]]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Writes the cells' values, which a function gives."""

    def made(values: Callable[[Cell], Measured]) -> list[Finished]:
        found = []
        for cell in CELLS:
            own, folder = values(cell), tmp_path / cell.name
            items = {test: [f"{test}{i}" for i in range(len(next(iter(by.values()))))] for test, by in own.items()}
            write_json(folder / "selection.json", {"ids": [cell.name], "weights": []})
            write_items(folder / "items.parquet", items, own)
            record = {
                "selection": {"examples": 1} if cell.budget else None,
                "training": {"steps": 5, "surgery_seconds": 0.0, "tokens": 10},
                "seconds": {"gradients": 0.0, "select": 0.0, "train": 1.0, "evaluate": 1.0, "generate": 0.0},
            }
            found.append(Finished(cell, record, folder))
        return found

    return made


def said(cells: list[Finished], roles: dict[str, str] = ROLES) -> Summary:
    tests = {name: {"role": role, "files": ["x"]} for name, role in roles.items()}
    arms = [{"name": name, "method": name, "added": False} for name in ("base", "random", "good")]
    config = {"source": "x.yaml", "seeds": [0, 1, 2], "budgets": ["10%"], "tasks": {}, "tests": tests, "arms": arms}
    return summarise(cells, {"notes": [], "config": config}, resamples=200)


def level(cell: Cell, count: int, gain: float = 0.5) -> np.ndarray:
    """A loss of which `good` has less, with noise of its own in every cell."""
    noise = np.random.default_rng([len(cell.name), cell.seed or 0, count]).normal(0, 0.01, count)
    return np.linspace(2, 3, count) + noise - gain * (cell.arm == "good")


def test_the_interval_of_a_mean_over_tests_is_that_of_the_mean_under_every_draw(write: Write) -> None:
    cells = write(lambda cell: {"law": {"loss": level(cell, 12)}, "tax": {"loss": level(cell, 5, gain=2.0)}})
    found, drawn = Paired(cells, ROLES, 300).over_tests(
        ("good", "10%", "equal_steps"), ("random", "10%", "equal_steps"), "target", "loss"
    )
    of = {one.cell: one.measurements().values for one in cells}
    draws, each, means = Draws.of(3, 300), [], []
    for test, count in (("law", 12), ("tax", 5)):
        rows = [
            of[Cell("random", "10%", seed, "equal_steps")][test]["loss"]
            - of[Cell("good", "10%", seed, "equal_steps")][test]["loss"]
            for seed in range(3)
        ]
        each.append(replicates(np.stack(rows), draws, draws.items(f"{test}/loss", count)))
        means.append(np.stack(rows).mean())
    assert drawn == pytest.approx((each[0] + each[1]) / 2)
    assert (found.low, found.high) == pytest.approx(tuple(np.quantile((each[0] + each[1]) / 2, [0.025, 0.975])))
    assert found.mean == pytest.approx(sum(means) / 2)
    assert (found.seeds, found.items, found.verdict) == (3, 17, "win")


def test_a_test_with_one_item_is_not_judged_nor_is_a_mean_that_it_is_part_of(write: Write) -> None:
    summary = said(write(lambda cell: {"law": {"loss": level(cell, 12)}, "tax": {"loss": level(cell, 1)}}))
    verdicts = {(e.arm, e.test): e.against["base"].verdict for e in summary.effects if e.against["base"]}
    assert (verdicts["good", "law"], verdicts["good", "tax"]) == ("win", "unjudged")
    assert {one.gain.verdict for one in summary.standings} == {"unjudged"}
    assert headline(summary) == "Nothing can be judged yet"
    assert "one item says nothing of how items differ: not judged: loss of tax" in summary.notes


def test_gain_is_named_by_the_tests_that_have_its_metric(write: Write) -> None:
    def values(cell: Cell) -> Measured:
        return {
            "law": {"loss": np.full(4, np.nan), "key_loss": np.full(4, np.nan), "key_accuracy": level(cell, 4)},
            "tax": {"loss": np.full(6, np.nan), "key_loss": level(cell, 6)},
            "math": {"loss": level(cell, 5)},
        }

    summary = said(write(values))
    assert summary.gain_metric == "key_loss"
    assert summary.forgetting_metric == "loss"
    assert lead(summary).startswith("In key_loss of tax: better than random of the same budget: good 10%;")
    assert "left out, since no item has a value: loss of law, key_loss of law, loss of tax" in summary.notes
    assert "gain is measured in key_loss and does not count law, without a value of it" in summary.notes
    with pytest.raises(DataError, match="target tests must have a value in a metric besides kl, got none"):
        said(write(lambda cell: {"law": {"loss": np.full(4, np.nan), "kl": np.zeros(4)}, "math": {"loss": level(cell, 5)}}))


def test_a_cell_that_lacks_a_metric_of_base_is_named(write: Write) -> None:
    def values(cell: Cell) -> Measured:
        meteor = "meteor_nosyn" if cell.arm == "base" else "meteor"
        return {"law": {"loss": level(cell, 4), meteor: np.full(4, 0.5)}, "math": {"loss": level(cell, 5)}}

    message = "random--10pct--0--equal_steps: must have meteor_nosyn on law, as base has, got loss, meteor; remove the folder"
    with pytest.raises(DataError, match=message):
        said(write(values), {"law": "target", "math": "general"})


def test_items_without_a_value_are_left_out_where_no_cell_has_one(write: Write) -> None:
    def values(cell: Cell) -> Measured:
        law = level(cell, 6)
        law[[1, 4]] = math.nan
        return {"law": {"acc": law, "f1": np.full(6, math.nan)}, "math": {"loss": level(cell, 5)}}

    summary = said(write(values), {"law": "target", "math": "general"})
    [effect] = (effect for effect in summary.effects if (effect.arm, effect.test) == ("good", "law"))
    assert (effect.metric, effect.against["base"] and effect.against["base"].items) == ("acc", 4)
    assert "left out, since no item has a value: f1 of law" in summary.notes


def test_an_item_that_only_one_cell_has_a_value_of_is_named(write: Write) -> None:
    def values(cell: Cell) -> Measured:
        law = level(cell, 6)
        law[4] = math.nan if cell.arm == "good" else law[4]
        return {"law": {"acc": law}, "math": {"loss": level(cell, 5)}}

    with pytest.raises(
        DataError, match=r"good.*: its values of acc on law must .* got NaN for law4 of one of the two; leave law4 out"
    ):
        said(write(values), {"law": "target", "math": "general"})


def test_a_metric_that_says_less_is_better_counts_so(write: Write) -> None:
    def values(cell: Cell) -> Measured:
        errors: dict[str, Any] = {"error (lower is better)": level(cell, 8)}
        return {"law": errors, "math": {"loss": level(cell, 5)}}

    (good,) = (one for one in said(write(values), {"law": "target", "math": "general"}).standings if one.arm == "good")
    assert good.gain.verdict == "win"
