"""What is said beforehand: every cell with its time, from a short measurement, and nothing written."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from gradsieve.compare.cells import Cell
from gradsieve.compare.config import Config, parse_config
from gradsieve.compare.estimate import forecast
from gradsieve.compare.run import Comparison
from gradsieve.compare.speed import Speed, predicted, training_tokens
from gradsieve.compare.subsets import open_stores


def test_a_forecast_lists_every_cell_and_writes_nothing(config: Config) -> None:
    comparison = Comparison.of(config)
    expected = forecast(comparison)
    assert [cell for cell, _, _ in expected.cells] == list(comparison.cells)
    assert not any(done for _, done, _ in expected.cells)
    assert all(seconds > 0 for _, _, seconds in expected.cells)
    assert expected.gradients > 0
    assert expected.total == pytest.approx(expected.gradients + sum(seconds for _, _, seconds in expected.cells))
    assert not comparison.study.exists()


def test_finished_cells_count_in_place_of_the_measurement_and_cost_nothing_more(finished: Comparison) -> None:
    expected = forecast(finished)
    assert all(done for _, done, _ in expected.cells)
    assert (expected.total, expected.gradients) == (0, 0)
    speed = Speed.of_finished([one.record for one in finished.finished()])
    trained = [one.record for one in finished.finished() if one.record["training"]]
    spent = sum(r["seconds"]["train"] - r["training"]["surgery_seconds"] for r in trained)
    assert speed.train == pytest.approx(spent / sum(r["training"]["tokens"] for r in trained))
    assert finished.seconds_left([]) is None
    left = finished.seconds_left(finished.finished()[:3])
    assert left is not None
    assert left > 0


def test_gradients_of_other_data_or_after_a_warm_up_count_by_themselves(content: dict[str, Any], tmp_path: Path) -> None:
    lines = Path(content["pool"]).read_text().splitlines()
    for seed in (0, 1):
        (tmp_path / f"pool-{seed}.jsonl").write_text("\n".join(lines[10 * seed : 10 * seed + 12]) + "\n")
    content |= {"pool": str(tmp_path / "pool-{seed}.jsonl"), "arms": {"ogs-static": None, "gradmatch": None}}
    comparison = Comparison.of(parse_config(content, "x.yaml"))
    stores = open_stores(comparison.study, comparison.material)
    assert sorted(stores.values()) == [0, 1]
    done = next(store for store, seed in stores.items() if seed == 0)
    done.mkdir(parents=True)
    (done / "whole").touch()
    assert list(open_stores(comparison.study, comparison.material).values()) == [1]
    content["arms"]["less"] = {"settings": {"warmup_share": 0.5}}
    comparison = Comparison.of(parse_config(content | {"out": str(tmp_path / "other")}, "x.yaml"))
    assert sorted(open_stores(comparison.study, comparison.material).values()) == [0, 0, 1, 1]


def test_time_grows_with_what_is_trained_on(config: Config) -> None:
    config = dataclasses.replace(config, views=("equal_steps", "equal_repetition"))
    material = Comparison.of(config).material
    speed = Speed(train=0.01, examine=2.0, examined_base=1.0)
    assert predicted(material, Cell("base"), config, speed) == 1.0
    once = {
        budget: training_tokens(material, Cell("random", budget, 0, "equal_repetition"), config) for budget in ("25%", "50%")
    }
    assert 1.5 < once["50%"] / once["25%"] < 2.5
    steps = {budget: training_tokens(material, Cell("random", budget, 0, "equal_steps"), config) for budget in ("25%", "50%")}
    assert 0.8 < steps["50%"] / steps["25%"] < 1.25
    surgery = training_tokens(material, Cell("agem", "25%", 0, "equal_steps"), config)
    assert surgery > 1.2 * steps["25%"]
    exact = sum(material.trainable(0).pool.lengths)
    assert training_tokens(material, Cell("full", None, 0, "equal_repetition"), config) == exact
    some = training_tokens(material, Cell("random", f"{exact // 2}tok", 0, "equal_repetition"), config)
    assert some == pytest.approx(exact / 2, rel=0.1)
    assert predicted(material, Cell("full", None, 0, "equal_repetition"), config, speed) == pytest.approx(2 + 0.01 * exact)
