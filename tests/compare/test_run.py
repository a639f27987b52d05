"""Cells: each is done once, kept, gone on with after a kill, and never mistaken for another."""

import dataclasses
import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from gradsieve.compare.config import Config, parse_config
from gradsieve.compare.records import Finished, read_finished, read_items, write_results
from gradsieve.compare.run import Comparison
from gradsieve.errors import InvalidArgument


def stamps(study: Path) -> dict[str, int]:
    return {str(p.relative_to(study)): p.stat().st_mtime_ns for p in sorted(study.rglob("*")) if p.is_file()}


def results(study: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (study / "results.jsonl").read_text().splitlines()]


def test_every_cell_leaves_its_files_and_nothing_else(finished: Comparison) -> None:
    names = [cell.name for cell in finished.cells]
    assert len(names) == 1 + 2 * 4
    for cell in finished.cells:
        files = {path.name for path in (finished.study / "cells" / cell.name).iterdir()} - {".claim"}
        expected = {"items.parquet", "generations.json", "result.json"} | ({"selection.json"} if cell.arm != "base" else set())
        assert files == expected
    assert [record["cell"] for record in results(finished.study)] == names
    made = {path.name for path in finished.study.iterdir()}
    assert made == {"cells", "selections", "stores", "results.jsonl", "comparison.json"} | {
        "report.html", "summary.md", "generations.md", "standings.csv", "effects.csv", "pairs.csv", "figures",
    }  # fmt: skip


def test_a_result_says_what_it_came_from_and_what_it_took(finished: Comparison) -> None:
    record = {r["cell"]: r for r in results(finished.study)}["less--25pct--1--equal_steps"]
    assert (record["arm"], record["budget"], record["seed"], record["view"]) == ("less", "25%", 1, "equal_steps")
    assert record["training"]["steps"] == 2
    assert record["selection"]["examples"] == 6
    assert record["inputs"]["model"] == finished.material.source.weights
    assert record["inputs"]["training"]["recipe"]["seed"] == 1
    assert (record["config"]["max_length"], record["config"]["steps"], record["config"]["resamples"]) == (1024, 2, 200)
    assert (record["config"]["source"], record["config"]["limits"]) == ("small.yaml", {"asked": None, "sums": 4})
    assert str(finished.study.parent) not in json.dumps(record["config"])
    assert record["selection"]["gradients"]["dim"] == 256
    assert record["selection"]["data"] == finished.material.sides(1).digest
    assert {"gradients", "select", "train", "evaluate", "generate"} == set(record["seconds"])
    assert record["seconds"]["gradients"] > 0
    assert {"torch", "trl", "peft"} <= set(record["versions"])
    assert record["hardware"]["cores"] == os.cpu_count()
    assert set(record["means"]) == {"asked", "sums"}


def test_values_are_kept_per_item(finished: Comparison) -> None:
    for cell in finished.cells:
        read = read_items(finished.study / "cells" / cell.name / "items.parquet")
        assert [len(read.items[name]) for name in ("asked", "sums")] == [8, 4]
        assert set(read.values["sums"]) == {"loss", "key_accuracy", "kl"}
        assert set(read.values["asked"]) == {"loss", "key_accuracy"}
        means = read_finished(finished.study, cell).record["means"]  # type: ignore[union-attr]
        assert read.values["asked"]["loss"].mean() == pytest.approx(means["asked"]["loss"])
        assert (read.values["sums"]["kl"] == 0).all() == (cell.arm == "base")


def test_all_arms_take_equal_steps_and_seeds_differ(finished: Comparison) -> None:
    records = [r for r in results(finished.study) if r["arm"] != "base"]
    assert {r["training"]["steps"] for r in records} == {2}
    by_seed = {(r["arm"], r["seed"]): r["means"]["asked"]["loss"] for r in records}
    for arm in ("full", "random", "less", "agem"):
        assert by_seed[arm, 0] != by_seed[arm, 1]


def test_a_method_without_chance_chooses_once_and_random_draws_anew(finished: Comparison) -> None:
    assert {p.stem for p in (finished.study / "selections").iterdir()} == {
        "less--25pct--0", "random--25pct--0", "random--25pct--1", "agem--25pct--0", "agem--25pct--1",
    }  # fmt: skip
    chosen = {}
    for cell in finished.cells[1:]:
        path = finished.study / "cells" / cell.name / "selection.json"
        chosen[cell.arm, cell.seed] = json.loads(path.read_text())["ids"]
    assert chosen["less", 0] == chosen["less", 1]
    assert chosen["random", 0] != chosen["random", 1]
    assert chosen["random", 0] == chosen["agem", 0]
    assert len(chosen["full", 0]) == 24
    assert len(list((finished.study / "stores").iterdir())) == 1


def test_surgery_is_told_apart_and_its_cost_measured(finished: Comparison) -> None:
    records = {r["cell"]: r for r in results(finished.study)}
    surgery, plain = records["agem--25pct--0--equal_steps"], records["random--25pct--0--equal_steps"]
    assert surgery["training"]["surgery_seconds"] > 0
    assert plain["training"]["surgery_seconds"] == 0
    assert surgery["inputs"]["training"]["anchor"] is not None
    assert surgery["work"] != plain["work"]


def test_what_the_file_no_longer_names_stays_among_the_results(finished: Comparison, tmp_path: Path) -> None:
    shutil.copytree(finished.study / "cells", tmp_path / "cells")
    named = [cell for cell in finished.cells if cell.arm != "less"]
    write_results(tmp_path, named)
    dropped = [cell.name for cell in finished.cells if cell.arm == "less"]
    assert [record["cell"] for record in results(tmp_path)] == [cell.name for cell in named] + sorted(dropped)


def test_a_second_run_does_nothing(finished: Comparison, monkeypatch: pytest.MonkeyPatch) -> None:
    from gradsieve.models import ModelSource

    monkeypatch.setattr(ModelSource, "load", lambda *_: pytest.fail("the model was loaded"))
    before = stamps(finished.study / "cells")
    told: list[Finished] = []
    done = Comparison.of(finished.config).run(told=lambda one, *_: told.append(one))
    assert len(done) == len(finished.cells)
    assert told == []
    assert stamps(finished.study / "cells") == before


def test_what_a_study_keeps_in_git_is_enough_to_go_on(finished: Comparison, tmp_path: Path) -> None:
    ignored = (Path(__file__).parents[2] / "studies" / "results" / ".gitignore").read_text().split()
    assert ignored
    shutil.copytree(finished.study, tmp_path / "study", ignore=shutil.ignore_patterns(*(name.rstrip("/") for name in ignored)))
    assert not (tmp_path / "study" / "stores").exists()
    config = dataclasses.replace(finished.config, out=str(tmp_path / "study"))
    told: list[Finished] = []
    done = Comparison.of(config).run(told=lambda one, *_: told.append(one))
    assert told == []
    assert len(done) == len(finished.cells)
    assert (tmp_path / "study" / "report.html").exists()


def copied(finished: Comparison, tmp_path: Path) -> Config:
    shutil.copytree(finished.study, tmp_path / "study")
    return dataclasses.replace(finished.config, out=str(tmp_path / "study"))


def test_a_cell_that_is_missing_is_done_again_to_the_same_values(finished: Comparison, tmp_path: Path) -> None:
    config = copied(finished, tmp_path)
    lost = tmp_path / "study" / "cells" / "less--25pct--1--equal_steps"
    (lost / "result.json").unlink()
    before = stamps(tmp_path / "study" / "cells")
    told: list[tuple[str, int, int, float]] = []
    Comparison.of(config).run(told=lambda one, done, total, left: told.append((one.cell.name, done, total, left)))
    assert told == [(lost.name, 9, 9, 0)]
    there = read_items(finished.study / "cells" / lost.name / "items.parquet").values
    again = read_items(lost / "items.parquet").values
    assert all((there[t][m] == again[t][m]).all() for t in there for m in there[t])
    after = stamps(tmp_path / "study" / "cells")
    assert {name for name in before if before[name] != after[name] and ".claim" not in name} <= {
        f"{lost.name}/{name}" for name in ("items.parquet", "generations.json", "result.json", "selection.json")
    }


def test_a_training_folder_that_a_kill_left_in_a_finished_cell_is_removed(finished: Comparison, tmp_path: Path) -> None:
    config = copied(finished, tmp_path)
    left, kept = (tmp_path / "study" / "cells" / f"{arm}--0--equal_steps" / "training" for arm in ("full", "random--25pct"))
    for folder in (left / "checkpoints" / "checkpoint-1", left / "model", kept / "model"):
        folder.mkdir(parents=True)
    told: list[Finished] = []
    Comparison.of(config).run(told=lambda one, *_: told.append(one))
    assert told == []
    assert not left.exists()
    assert (kept / "model").exists()  # by a run with keep_models


def test_cells_of_other_settings_are_refused_with_both_sides(finished: Comparison, tmp_path: Path) -> None:
    config = dataclasses.replace(copied(finished, tmp_path), recipe={**finished.config.recipe, "learning_rate": 1e-3})
    message = r"full--0--equal_steps must be of .*training\.recipe\.learning_rate None there, 0\.001 here; name another --out"
    with pytest.raises(InvalidArgument, match=message):
        Comparison.of(config).run()


def test_arms_and_views_can_be_added_and_equal_work_is_not_done_twice(finished: Comparison, tmp_path: Path) -> None:
    config = copied(finished, tmp_path)
    config = dataclasses.replace(
        config, views=("equal_steps", "equal_repetition"), seeds=(0,), recipe=config.recipe | {"epochs": 1}
    )
    config = dataclasses.replace(config, arms=[arm for arm in config.arms if arm.name != "agem"])
    told: list[str] = []
    comparison = Comparison.of(config)
    comparison.run(told=lambda one, *_: told.append(one.cell.name))
    assert told == [f"{arm}--0--equal_repetition" for arm in ("full", "random--25pct", "less--25pct")]
    steps = {r["cell"]: r["training"].get("steps") for r in results(comparison.study)}
    assert steps["full--0--equal_repetition"] == 6
    assert steps["random--25pct--0--equal_repetition"] == 2


def test_the_same_work_under_two_names_is_done_once(finished: Comparison, tmp_path: Path) -> None:
    config = copied(finished, tmp_path)
    again = dataclasses.replace(config.arm("less"), name="again")
    told: list[Finished] = []
    Comparison.of(dataclasses.replace(config, arms=[*config.arms, again])).run(told=lambda one, *_: told.append(one))
    assert [one.record["same_as"] for one in told] == ["less--25pct--0--equal_steps", "less--25pct--1--equal_steps"]
    assert [one.record["arm"] for one in told] == ["again", "again"]
    kept = [json.loads((tmp_path / "study" / "selections" / "again--25pct--0.json").read_text()) for _ in told]  # of both seeds
    spent = [(one.record["seconds"]["gradients"], one.record["seconds"]["select"]) for one in told]
    assert spent == [(one["gradient_seconds"], one["select_seconds"]) for one in kept]
    twin = read_items(finished.study / "cells" / "less--25pct--0--equal_steps" / "items.parquet").values
    assert all((told[0].measurements().values[t][m] == twin[t][m]).all() for t in twin for m in twin[t])


def test_a_cell_that_another_process_is_at_is_left_to_it(finished: Comparison, tmp_path: Path) -> None:
    config = copied(finished, tmp_path)
    folder = tmp_path / "study" / "cells" / "base"
    (folder / "result.json").unlink()
    with open(folder / ".claim", "w") as handle:
        fcntl.flock(handle, fcntl.LOCK_SH)  # which only an exclusive claim meets
        done = Comparison.of(config).run()
    assert "base" not in [one.cell.name for one in done]
    assert "base" in [one.cell.name for one in Comparison.of(config).run()]


def test_no_cell_is_begun_after_the_minutes(config: Config) -> None:
    assert Comparison.of(config).run(minutes=0) == []


def test_some_arms_can_be_run_first(config: Config) -> None:
    config = dataclasses.replace(config, seeds=(0,))
    comparison = Comparison.of(config)
    with pytest.raises(InvalidArgument, match=r"only must name arms \(.*less.*\), got 'les'"):
        comparison.run(only=["les"])
    assert not comparison.study.exists()
    left: list[float | None] = []
    assert [one.cell.arm for one in comparison.run(only=["random"], told=lambda *told: left.append(told[-1]))] == [
        "base",
        "random",
    ]
    assert left[-1] == 0  # of what is run now
    assert "3 cells are not finished" in (comparison.study / "summary.md").read_text()
    done = comparison.run(only=["full"])
    assert [one.cell.arm for one in done] == ["base", "full", "random"]


def test_a_tracker_may_be_added_to_what_is_half_done(finished: Comparison, tmp_path: Path) -> None:
    config = copied(finished, tmp_path)
    recipe = config.recipe | {"report_to": ("tensorboard",), "save_steps": 1, "micro_batch": 2}
    told: list[Finished] = []
    done = Comparison.of(dataclasses.replace(config, recipe=recipe)).run(told=lambda one, *_: told.append(one))
    assert told == []
    assert len(done) == len(finished.cells)


def test_a_killed_comparison_ends_with_the_values_of_a_whole_one(
    finished: Comparison, content: dict[str, Any], tmp_path: Path
) -> None:
    content |= {"arms": {"less": None}, "seeds": [0]}
    path = tmp_path / "small.yaml"
    path.write_text(yaml.safe_dump(content))
    command = [sys.executable, "-m", "gradsieve.cli", "compare", str(path)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    first = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    cells = Path(content["out"]) / "cells"
    deadline = time.monotonic() + 100
    while not (cells / "random--25pct--0--equal_steps" / "training").exists():
        assert time.monotonic() < deadline
        assert first.poll() is None, first.stderr.read().decode()  # type: ignore[union-attr]
        time.sleep(0.005)
    first.send_signal(signal.SIGKILL)
    first.wait()
    first.stderr.close()  # type: ignore[union-attr]
    kept = {p: p.stat().st_mtime_ns for p in cells.glob("*/result.json")}
    assert len(kept) == 2
    done = Comparison.of(parse_config(content, "small.yaml")).run()
    assert len(done) == 4
    assert all(p.stat().st_mtime_ns == stamp for p, stamp in kept.items())
    for one in done:
        there = read_items(finished.study / "cells" / one.cell.name / "items.parquet").values
        values = one.measurements().values
        assert all(torch.equal(*map(torch.from_numpy, (there[t][m], values[t][m]))) for t in there for m in there[t])
