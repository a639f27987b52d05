"""What is said beforehand: every cell with its time, from a short measurement, and nothing written."""

import dataclasses

import pytest

from gradsieve.compare.cells import Cell
from gradsieve.compare.config import Config
from gradsieve.compare.estimate import Speed, forecast, predicted, training_tokens
from gradsieve.compare.run import Comparison


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
