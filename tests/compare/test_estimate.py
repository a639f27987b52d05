"""What is said beforehand: every cell with its time, from a short measurement, and nothing written."""

import dataclasses
import importlib
import re
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from gradsieve.compare import material, training
from gradsieve.compare.cells import Cell
from gradsieve.compare.command import forecast_line
from gradsieve.compare.config import Config, parse_config
from gradsieve.compare.estimate import forecast
from gradsieve.compare.records import read_json, write_json
from gradsieve.compare.run import Comparison
from gradsieve.compare.speed import Speed, predicted, training_tokens
from gradsieve.compare.stores import WHOLE, open_stores, passes_left
from gradsieve.compare.subsets import navigator_passes_left
from gradsieve.data import TokenSet
from gradsieve.evaluate import TaskResult
from gradsieve.navigation import split_anchor
from gradsieve.train.navigator import LoRANavigator

estimate: Any = importlib.import_module("gradsieve.compare.estimate")


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
    assert finished.seconds_left([], finished.cells) is None
    left = finished.seconds_left(finished.finished()[:3], finished.cells)
    assert left is not None
    assert left > 0


def test_pools_with_the_same_references_share_a_store_unless_there_is_a_warm_up(
    content: dict[str, Any], tmp_path: Path
) -> None:
    lines = Path(content["pool"]).read_text().splitlines()
    for seed in (0, 1):
        (tmp_path / f"pool-{seed}.jsonl").write_text("\n".join(lines[10 * seed : 10 * seed + 12]) + "\n")
    content |= {"pool": str(tmp_path / "pool-{seed}.jsonl"), "arms": {"ogs-static": None, "gradmatch": None}}
    comparison = Comparison.of(parse_config(content, "x.yaml"))
    ((store, seeds),) = open_stores(comparison.study, comparison.material).items()
    assert seeds == [0, 1]
    store.mkdir(parents=True)
    digests = [comparison.material.sides(seed).digest for seed in seeds]
    write_json(store / WHOLE, digests[:1])
    assert open_stores(comparison.study, comparison.material)
    write_json(store / WHOLE, digests)
    assert not open_stores(comparison.study, comparison.material)
    (store / WHOLE).unlink()
    assert passes_left(comparison.study, comparison.material, ["ogs-static", "random"]) > 0
    assert passes_left(comparison.study, comparison.material, ["random"]) == 0
    content["arms"]["less"] = {"settings": {"warmup_share": 0.5}}
    comparison = Comparison.of(parse_config(content | {"out": str(tmp_path / "other")}, "x.yaml"))
    assert sorted(open_stores(comparison.study, comparison.material).values()) == [[0], [0, 1], [1]]
    (tmp_path / "target-0.jsonl").write_text("\n".join(Path(content["target"]).read_text().splitlines()[:-1]) + "\n")
    (tmp_path / "target-1.jsonl").write_text(Path(content["target"]).read_text())
    content |= {"target": str(tmp_path / "target-{seed}.jsonl"), "arms": {"ogs-static": None}, "out": str(tmp_path / "third")}
    comparison = Comparison.of(parse_config(content, "x.yaml"))
    assert sorted(open_stores(comparison.study, comparison.material).values()) == [[0], [1]]


@pytest.mark.parametrize(("documents", "limit", "expected"), [(100, None, 55), (100, 40, 25), (4, None, 7), (1, None, 5.5)])
def test_the_time_of_a_task_follows_from_few_of_its_documents(
    content: dict[str, Any], documents: int, limit: int | None, expected: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(material, "check_tasks", lambda *_, **__: None)  # made-up tasks
    content["tasks"] = {"colours": {"limit": limit}}
    made = Comparison.of(parse_config(content, "x.yaml")).material
    clock, asked = [0.0], []

    def harness(*_: Any, limit: int, **__: Any) -> dict[str, TaskResult]:
        asked.append(limit)
        clock[0] += 5 + 0.5 * min(limit, documents)
        return {"colours": TaskResult({}, {"acc": torch.zeros(1)}, "1", 0, documents)}

    monkeypatch.setattr(training, "harness", harness)
    monkeypatch.setattr(estimate, "time", SimpleNamespace(perf_counter=lambda: clock[0]))
    assert estimate._task_seconds(None, "colours", made) == pytest.approx(expected)
    assert max(asked) == 9


def test_a_forecast_counts_the_time_of_tasks(content: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(material, "check_tasks", lambda *_, **__: None)  # made-up tasks
    plain = Comparison.of(parse_config(content, "x.yaml"))
    tasks = Comparison.of(parse_config(content | {"tasks": {"colours": {}, "shapes": {}}}, "x.yaml"))
    monkeypatch.setattr(estimate, "_task_seconds", lambda *_: 1000.0)
    without, with_tasks = (estimate._measured(one) for one in (plain, tasks))
    assert without.examine < 1000
    assert with_tasks.examine == pytest.approx(2000, abs=1000)
    assert with_tasks.examined_base == pytest.approx(2000, abs=1000)


class Counter:
    """Counts the tokens of all stages that come to their end: gradients and training in full, a forward pass half."""

    def __init__(self) -> None:
        self.passes: dict[str, float] = {}

    def __call__(self, stage: str, done: int, total: int) -> None:
        if done == total:
            self.passes[stage] = self.passes.get(stage, 0.0) + total * (0.5 if "forward" in stage else 1.0)


@pytest.mark.parametrize(
    ("arms", "stages"),
    [
        ({"orth-only": {"settings": {"normalize": "example"}}, "ogs-static": None, "pgm": None},
         {"references", "gradients of the target"}),
        ({name: {"settings": {"warmup_share": 0.4, "warmup_epochs": 2}} for name in ("less", "g2is")},
         {"warm-up", "gradients of the target"}),
        ({"grads": {"settings": {"probe_epochs": 1, "online": True}}}, {"warm-up"}),
        ({"rds": None, "ifd": None}, {"forward pass of the target", "forward pass of the pool's answers alone"}),
    ],
)  # fmt: skip
def test_what_is_to_come_is_what_the_cells_compute(
    arms: dict[str, Any], stages: set[str], content: dict[str, Any], tmp_path: Path
) -> None:
    lines = Path(content["pool"]).read_text().splitlines()
    for seed in (0, 1):
        (tmp_path / f"pool-{seed}.jsonl").write_text("\n".join(lines[8 * seed : 8 * seed + 14]) + "\n")
    content |= {"pool": str(tmp_path / "pool-{seed}.jsonl"), "arms": arms}
    for seeds in ([0],) if "warm-up" in stages else ([0], [0, 1]):  # the second time the first's rows are there
        comparison = Comparison.of(parse_config(content | {"seeds": seeds}, "x.yaml"))
        expected, counter = passes_left(comparison.study, comparison.material), Counter()
        for cell in comparison.cells:
            if cell.arm in arms:
                comparison.chosen(cell, counter)
        if seeds == [0]:
            assert stages <= counter.passes.keys()
        recorded = 0 if "grads" not in arms else sum(comparison.material.trainable(seeds[-1]).pool.lengths)  # while it trains
        assert expected == pytest.approx(
            sum(counter.passes.values()) + recorded, rel=5e-3
        )  # answers alone by the tokens of all
        assert passes_left(comparison.study, comparison.material) == 0


def test_a_shared_store_gives_each_seed_what_its_own_would(content: dict[str, Any], tmp_path: Path) -> None:
    lines = Path(content["pool"]).read_text().splitlines()
    for seed in (0, 1):
        (tmp_path / f"pool-{seed}.jsonl").write_text("\n".join(lines[8 * seed : 8 * seed + 14]) + "\n")
    content |= {"pool": str(tmp_path / "pool-{seed}.jsonl"), "arms": {"orth-only": None}, "budgets": ["5"]}
    cells = [Cell("orth-only", "5", seed, "equal_steps") for seed in (0, 1)]

    def chosen(seeds: list[int], name: str) -> dict[int, Any]:
        comparison = Comparison.of(parse_config(content | {"seeds": seeds, "out": str(tmp_path / name)}, "x.yaml"))
        found = {cell.seed: comparison.chosen(cell) for cell in cells if cell.seed in seeds}
        assert len(list((comparison.study / "stores").iterdir())) == 1
        return found

    both = chosen([0, 1], "both")
    assert both[0].ids != both[1].ids
    for seed in (0, 1):
        alone = chosen([seed], f"alone-{seed}")[seed]
        assert (both[seed].ids, both[seed].weights) == (alone.ids, alone.weights)
    (spent,) = (read_json(path)["seconds"] for path in (tmp_path / "both" / "stores").glob("*/spent.json"))
    assert spent.keys() == {"references", "gradients of the pool"}
    for seed in (0, 1):
        assert spent["references"] < both[seed].gradient_seconds < sum(spent.values())
    chosen([0], "later")
    assert chosen([0, 1], "later")[1].ids == both[1].ids  # a seed that came later finds its rows taken, in the same store
    (filled,) = (read_json(path) for path in (tmp_path / "later" / "stores").glob(f"*/{WHOLE}"))
    assert len(filled) == 2
    (refilled,) = (read_json(path)["seconds"] for path in (tmp_path / "later" / "stores").glob("*/spent.json"))
    assert refilled.keys() == {"references", "gradients of the pool", "references again"}
    later = Comparison.of(parse_config(content | {"out": str(tmp_path / "later")}, "x.yaml")).chosen(cells[1])
    assert later is not None
    share = 14 / 22  # of the rows of both pools, about
    expected = refilled["references"] + share * refilled["gradients of the pool"]
    assert later.gradient_seconds == pytest.approx(expected, rel=0.1)
    twice = sum(one.gradient_seconds for one in both.values())
    assert twice > spent["references"] + sum(spent.values())  # each would have measured them, and some rows are in both pools


def test_a_method_is_charged_what_it_reads_of_a_shared_store(content: dict[str, Any]) -> None:
    content |= {"arms": {"rds": None, "orth-only": None, "gradmatch": None}, "seeds": [0]}
    comparison = Comparison.of(parse_config(content, "x.yaml"))
    found = {arm: comparison.chosen(Cell(arm, "25%", 0, "equal_steps")) for arm in ("rds", "orth-only", "gradmatch")}
    (spent,) = (read_json(path)["seconds"] for path in (comparison.study / "stores").glob("*/spent.json"))
    assert spent.keys() == {"references", "gradients of the pool", "gradients of the target"}
    pool, target = spent["gradients of the pool"], spent["gradients of the target"]
    expected = {
        "rds": (pool + target) / 2,  # a forward pass is half of one
        "orth-only": spent["references"] + pool,
        "gradmatch": pool + target,
    }
    charged = {arm: one.gradient_seconds for arm, one in found.items() if one is not None}
    assert charged == {arm: pytest.approx(seconds) for arm, seconds in expected.items()}


def test_rows_of_seeds_that_are_gone_are_charged_to_nobody_else(content: dict[str, Any], tmp_path: Path) -> None:
    lines = Path(content["pool"]).read_text().splitlines()
    for seed in (0, 1, 2):
        (tmp_path / f"pool-{seed}.jsonl").write_text("\n".join(lines[4 * seed : 4 * seed + 14]) + "\n")
    content |= {"pool": str(tmp_path / "pool-{seed}.jsonl"), "arms": {"orth-only": None}, "budgets": ["5"]}

    def made(*seeds: int) -> Comparison:
        return Comparison.of(parse_config(content | {"seeds": list(seeds)}, "x.yaml"))

    def seconds(seed: int, comparison: Comparison) -> float:
        chosen = comparison.chosen(Cell("orth-only", "5", seed, "equal_steps"))
        assert chosen is not None
        return chosen.gradient_seconds

    both = made(0, 1)
    first = seconds(1, both)
    shutil.rmtree(both.study / "selections")
    assert seconds(1, made(1)) == pytest.approx(first)
    later = made(2)  # 10 of its 14 rows were seed 1's
    expected, counter = passes_left(later.study, later.material), Counter()
    later.chosen(Cell("orth-only", "5", 2, "equal_steps"), counter)
    pool = later.material.trainable(2).pool
    known = set(both.material.trainable(1).pool.keys)
    assert counter.passes["gradients of the pool"] == sum(
        length for key, length in zip(pool.keys, pool.lengths, strict=True) if key not in known
    )
    assert expected == pytest.approx(sum(counter.passes.values()))


def test_what_repeats_between_pools_is_taken_for_both(content: dict[str, Any], tmp_path: Path) -> None:
    lines = Path(content["pool"]).read_text().splitlines()
    (tmp_path / "pool-0.jsonl").write_text("\n".join(lines[:12]) + "\n")
    (tmp_path / "pool-1.jsonl").write_text("\n".join(line.replace("Sure.", "Right.") for line in lines[:12]) + "\n")
    content["gradients"] |= {"dedup": "near", "dedup_threshold": 0.3}
    content |= {"pool": str(tmp_path / "pool-{seed}.jsonl"), "arms": {"orth-only": None}, "budgets": ["2"]}
    comparison = Comparison.of(parse_config(content, "x.yaml"))
    comparison.chosen(Cell("orth-only", "2", 0, "equal_steps"))
    ((store, whole),) = ((path.parent, read_json(path)) for path in (comparison.study / "stores").glob(f"*/{WHOLE}"))
    assert len(whole) == 2
    plans = sorted(store.glob("pool/plans/*"))
    comparison.chosen(Cell("orth-only", "2", 1, "equal_steps"))
    assert sorted(store.glob("pool/plans/*")) == plans  # nothing was missing


def test_a_navigator_counts_until_its_choice_is_made(content: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    live: dict[str, Any] = {"fidelity": "navigator", "clusters": 3, "updates": 1, "episodes": 2, "batch": 2}
    arms: dict[str, Any] = {"ogs": {"settings": live | {"rounds": 1, "measurements": 2}}, "orth-only": None}
    content |= {"arms": arms, "budgets": ["50%"], "seeds": [0]}
    content["gradients"] |= {"navigator_warmup": 2}
    comparison, spent = Comparison.of(parse_config(content, "x.yaml")), []
    monkeypatch.setattr(LoRANavigator, "close", lambda self: (spent.append(self), self._before.restore()))
    expected = navigator_passes_left(comparison.study, comparison.material, comparison.cells)
    comparison.chosen(Cell("ogs", "50%", 0, "equal_steps"))
    filling, navigator = spent
    assert not filling.trained_tokens  # it only went with the gradients
    half = comparison.material.trainable(0).anchor
    assert half is not None
    held = sum(sum(part.lengths) for part in split_anchor(half)[1:])
    target = TokenSet.of("target", comparison.material.sides(0).target, comparison.material.source.tokenizer, max_length=256)
    calls = navigator.measured["kl"]
    assert expected == pytest.approx(navigator.trained_tokens + calls * (sum(target.lengths) / 2 + held), rel=0.05)
    assert navigator_passes_left(comparison.study, comparison.material, comparison.cells) == 0
    other = Comparison.of(parse_config(content | {"out": f"{content['out']}-other"}, "x.yaml"))
    told = forecast(other)
    assert told.navigators > 0
    assert told.total == pytest.approx(told.gradients + told.navigators + sum(seconds for _, _, seconds in told.cells))
    assert re.search(r", of which .+ for gradients and .+ for Navigators \(measured", forecast_line(told))
    assert forecast(other, ["orth-only"]).navigators == 0


def test_time_grows_with_what_is_trained_on(config: Config) -> None:
    config = dataclasses.replace(config, views=("equal_steps", "equal_repetition"), recipe=config.recipe | {"epochs": 1})
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
