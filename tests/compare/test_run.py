"""Cells: each is done once, kept, gone on with after a kill, and never mistaken for another."""

import dataclasses
import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from gradsieve.compare import training
from gradsieve.compare.cells import Cell
from gradsieve.compare.config import Config, TaskSettings, parse_config
from gradsieve.compare.material import metrics_of
from gradsieve.compare.records import Finished, read_finished, read_items, read_json
from gradsieve.compare.run import Comparison
from gradsieve.compare.stores import WHOLE, store_of
from gradsieve.compare.subsets import Subset
from gradsieve.compare.training import Job, full_steps, make_job, work
from gradsieve.data.token_set import _key
from gradsieve.errors import GradsieveError, InvalidArgument
from gradsieve.store import GradientStore


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
    twin = read_items(finished.study / "cells" / "less--25pct--0--equal_steps" / "items.parquet").values
    assert all((told[0].measurements().values[t][m] == twin[t][m]).all() for t in twin for m in twin[t])


def test_equal_steps_are_by_default_those_of_the_whole_pool(config: Config) -> None:
    config = dataclasses.replace(config, arms=config.arms[:3], steps=None, seeds=(0,))
    comparison = Comparison.of(config)
    assert full_steps(config, 24) == 6
    assert {
        make_job(comparison.material, cell, config.arm(cell.arm), comparison.chosen(cell)).steps
        for cell in comparison.cells[1:]
    } == {6}


TASK = """task: colours
dataset_path: json
dataset_kwargs:
  data_files: {{test: {folder}/colours.jsonl}}
  cache_dir: {folder}/cache
test_split: test
doc_to_text: "{{{{question}}}} Answer:"
output_type: multiple_choice
doc_to_choice: options
doc_to_target: gold
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}]
metadata: {{version: 1.0}}
"""


def test_tasks_and_written_texts_are_measured_like_tests(content: dict[str, Any], tmp_path: Path) -> None:
    rows = [{"question": f"What is {i}?", "options": ["red", "blue"], "gold": i % 2} for i in range(6)]
    (tmp_path / "colours.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "colours.yaml").write_text(TASK.format(folder=tmp_path))
    content["tests"]["asked"] |= {"metrics": ["loss", "stopped"], "limit": 3}
    content |= {"arms": {"random": None}, "seeds": [0], "max_new_tokens": 5}
    content["tasks"] = {"colours": {"include_path": str(tmp_path), "limit": 4}}
    comparison = Comparison.of(parse_config(content, "x.yaml"))
    one = comparison.run()[-1]
    measured = one.measurements()
    assert measured.items["colours"] == ["0", "1", "2", "3"]
    assert set(measured.values["colours"]["acc"]) <= {0.0, 1.0}
    assert len(measured.values["asked"]["stopped"]) == 3
    assert one.record["inputs"]["tasks"]["colours"]["limit"] == 4
    assert one.generations()[0]["item"] == measured.items["asked"][0]
    assert "colours" in (comparison.study / "summary.md").read_text()


def test_documents_of_local_tasks_are_searched_for_leaks_and_others_noted(content: dict[str, Any], tmp_path: Path) -> None:
    asked = "Which colour did the painter choose for the door of the house by the river?"
    rows = [{"question": asked if i else "And now?", "options": ["red", "blue"], "gold": i % 2} for i in range(3)]
    (tmp_path / "colours.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "colours.yaml").write_text(TASK.format(folder=tmp_path))
    content["tasks"] = {"colours": {"include_path": str(tmp_path), "limit": 2}, "arc_easy": {"limit": 2}}
    pool = Path(content["pool"])
    stolen = {"id": "stolen", "prompt": asked, "completion": "Blue."}
    pool.write_text(pool.read_text() + json.dumps(stolen) + "\n")
    config = parse_config(content, "x.yaml")
    with pytest.raises(InvalidArgument, match=r"pool .*:25 \(stolen\): \d+% like task colours document 1 \(1\)"):
        Comparison.of(config)
    material = Comparison.of(config, drop_leaks=True).material
    assert [(leak.id, leak.other_side) for leak in material.leaks()] == [("stolen", "task colours")]
    note = "the documents of the task arc_easy were not checked for leaks: not of a local YAML file"
    assert [one for one in material.notes if "were not checked" in one] == [note]


def test_a_cell_that_another_process_is_at_is_left_to_it(finished: Comparison, tmp_path: Path) -> None:
    config = copied(finished, tmp_path)
    folder = tmp_path / "study" / "cells" / "base"
    (folder / "result.json").unlink()
    with open(folder / ".claim", "w") as handle:
        fcntl.flock(handle, fcntl.LOCK_SH)  # which only an exclusive claim meets
        done = Comparison.of(config).run()
    assert "base" not in [one.cell.name for one in done]
    assert "base" in [one.cell.name for one in Comparison.of(config).run()]


def test_a_store_is_filled_by_one_process_at_a_time(config: Config, tmp_path: Path) -> None:
    comparison = Comparison.of(config)
    cell = Cell("less", "25%", 0, "equal_steps")
    store = store_of(comparison.study, comparison.material, config.arm("less"), 0)
    store.mkdir(parents=True)
    with open(store / ".claim", "a") as handle:
        fcntl.flock(handle, fcntl.LOCK_SH)  # as long as another is at it
        waiting = threading.Thread(target=comparison.chosen, args=(cell,))
        waiting.start()
        waiting.join(0.3)
        assert waiting.is_alive()
        assert {path.name for path in store.iterdir()} == {".claim"}
    waiting.join(100)
    assert read_json(store / WHOLE) == [comparison.material.sides(0).digest]


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


def test_examples_that_leak_are_refused_or_dropped_and_listed(content: dict[str, Any], tmp_path: Path) -> None:
    pool = Path(content["pool"])
    line = json.loads(Path(content["tests"]["asked"]["files"]).read_text().splitlines()[0]) | {"id": "stolen"}
    pool.write_text(pool.read_text() + json.dumps(line) + "\n")
    config = parse_config(content, "x.yaml")
    with pytest.raises(InvalidArgument, match=r"pool .*pool\.jsonl:25 \(stolen\): the same as test asked .*asked\.jsonl:1"):
        Comparison.of(config)
    comparison = Comparison.of(config, drop_leaks=True)
    assert len(comparison.material.sides(0).pool) == 24
    comparison.run(minutes=0)
    listed = [json.loads(text) for text in (comparison.study / "leaks.jsonl").read_text().splitlines()]
    assert [(leak["id"], leak["kind"]) for leak in listed] == [("stolen", "same")]
    assert any("leaks.jsonl" in note for note in comparison.material.notes)
    pool.write_text("".join(pool.read_text().splitlines(keepends=True)[:-1]))
    Comparison.of(config).run(minutes=0)
    assert not (comparison.study / "leaks.jsonl").exists()


def test_what_is_chosen_is_trained_in_its_order_with_its_weights_where_all_is_computed(
    content: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    material = Comparison.of(parse_config(content | {"device": "cpu"}, "x.yaml")).material
    chosen = Subset(("pool-3", "pool-1", "pool-2"), (2.0, 0.5, 0.5))
    given: dict[str, Any] = {}

    def stop(model: Any, tokens: Any, recipe: Any, folder: Path, **others: Any) -> None:
        given.update(others, tokens=tokens, recipe=recipe)
        raise KeyboardInterrupt

    monkeypatch.setattr(training, "finetune", stop)
    job = make_job(material, Cell("less", "25%", 0, "equal_steps"), material.config.arm("less"), chosen)
    with pytest.raises(KeyboardInterrupt):
        work(None, None, material, job, tmp_path)
    by_id = dict(zip(material.trainable(0).pool.ids, material.trainable(0).pool.tokens, strict=True))
    assert [id(one) for one in given["tokens"]] == [id(by_id[name]) for name in chosen.ids]
    assert given["weights"] == chosen.weights
    assert given["recipe"].device == "cpu"
    assert make_job(material, Cell("full", None, 0, "equal_steps"), material.config.arm("full"), chosen).weights == (
        2.0,
        0.5,
        0.5,
    )


def test_training_sees_the_ids_and_labels_that_gradients_were_taken_of(content: dict[str, Any]) -> None:
    comparison = Comparison.of(parse_config(content | {"arms": {"orth-only": None}, "seeds": [0]}, "x.yaml"))
    material, config = comparison.material, comparison.config
    jobs = [
        make_job(material, cell, config.arm(arm), comparison.chosen(cell))
        for arm, budget in (("orth-only", "25%"), ("full", None))
        for cell in [Cell(arm, budget, 0, "equal_steps")]
    ]
    (path,) = store_of(comparison.study, material, config.arm("orth-only"), 0).rglob("pool/store.json")
    held = {key for unit in GradientStore.open(path.parent).units() for key in unit.keys}
    chosen, whole = ({_key(tokens) for tokens in job.tokens} for job in jobs)
    assert chosen < whole == held
    one = jobs[0].tokens[0]
    for name in ("input_ids", "labels"):  # a key is of both
        changed = getattr(one, name).copy()
        changed[-1] += 1
        assert _key(dataclasses.replace(one, **{name: changed})) not in held


def test_full_tuning_leaves_no_trace_in_the_cells_that_follow(content: dict[str, Any], tmp_path: Path) -> None:
    whole = {"method": "random", "recipe": {"tuning": "full", "learning_rate": 0.1, "warmup": 0}}
    arms = {"whole": whole, "replay": {"method": "random", "recipe": {"replay_share": 0.5, "rank": 3}}}
    comparison = Comparison.of(parse_config(content | {"arms": arms, "seeds": [0]}, "x.yaml"))
    both = {one.cell.arm: one for one in comparison.run(only=["whole", "replay"])}
    alone = Comparison.of(parse_config(content | {"arms": arms, "seeds": [0], "out": str(tmp_path / "alone")}, "x.yaml"))
    twin = {one.cell.arm: one for one in alone.run(only=["replay"])}
    there, here = twin["replay"].measurements().values, both["replay"].measurements().values
    assert all((there[test][metric] == here[test][metric]).all() for test in there for metric in there[test])
    assert (both["whole"].measurements().values["sums"]["kl"] > 1e-3).all()
    assert both["whole"].record["inputs"]["training"]["recipe"]["tuning"] == "full"
    assert both["replay"].record["training"]["surgery_seconds"] == 0
    assert both["replay"].record["inputs"]["training"]["replay"] is not None


def test_a_tracker_may_be_added_to_what_is_half_done(finished: Comparison, tmp_path: Path) -> None:
    config = copied(finished, tmp_path)
    recipe = config.recipe | {"report_to": ("tensorboard",), "save_steps": 1, "micro_batch": 2}
    told: list[Finished] = []
    done = Comparison.of(dataclasses.replace(config, recipe=recipe)).run(told=lambda one, *_: told.append(one))
    assert told == []
    assert len(done) == len(finished.cells)


def test_what_tensorboard_reads_outlives_its_cell(content: dict[str, Any]) -> None:
    reading = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    content["recipe"] |= {"report_to": ["tensorboard"]}
    comparison = Comparison.of(parse_config(content | {"arms": {"random": None}, "seeds": [0]}, "x.yaml"))
    for one in comparison.run()[1:]:
        folder = one.folder / "training"
        assert [path.name for path in folder.iterdir()] == ["tensorboard"]
        losses = [event.value for event in reading.EventAccumulator(str(folder / "tensorboard")).Reload().Scalars("train/loss")]
        assert losses[0] == pytest.approx(one.record["training"]["first_loss"])
        assert len(losses) == 2


def test_every_cell_is_a_run_of_its_own_to_a_tracker(content: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []

    def stop(*_: Any, name: str, **__: Any) -> None:
        seen.append(name)
        raise KeyboardInterrupt

    monkeypatch.setattr(training, "finetune", stop)
    with pytest.raises(KeyboardInterrupt):
        Comparison.of(parse_config(content, "x.yaml")).run()
    assert seen == ["full--0--equal_steps"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"recipe": {"surgery": "agem"}, "anchor": None}, "x.yaml: full--0--equal_steps: anchor must be given for surgery and"),
        ({"recipe": {"replay_share": 0.5}, "anchor": None}, "x.yaml: full--0--equal_steps: anchor must be given for surgery"),
        ({"arms": {"x": {"method": "random", "recipe": {"replay_share": 0.1}}}}, "x.yaml: x--25pct--0.*replay_share must make"),
        (
            {"views": ["equal_repetition"], "recipe": {"batch": 64, "epochs": 1}},
            "x.yaml: full--0--equal_repetition: warmup must leave a step at the full rate, got 0.1 of 1 steps; set it to 0",
        ),
        (
            {"views": ["equal_repetition"], "recipe": {"batch": 6, "epochs": 1}},  # 4 steps of the whole pool
            "x.yaml: random--25pct--0--equal_repetition: warmup must leave a step at the full rate, got 0.1 of 1 steps",
        ),
        ({"recipe": {"report_to": ["trackerx"]}}, "x.yaml: full--0--equal_steps: report_to must name trackers"),
        ({"recipe": {"tuning": "full"}, "dtype": "bfloat16"}, "x.yaml: full--0.*full tuning needs float32.*dtype: float32"),
        ({"metrics": ["kl"]}, r"x.yaml: metrics must hold one that asked \(kind worked\) has besides kl, got kl; add loss"),
        ({"metrics": ["loss", "choice_norm"]}, "x.yaml: metrics must each be of some test's kind, got choice_norm for asked"),
        ({"tasks": {"arc_eazy": None}}, "tasks must be known to lm-eval, got 'arc_eazy'; did you mean arc_easy"),
    ],
)
def test_what_would_fail_in_its_cell_is_refused_before_any_is_run(
    content: dict[str, Any], changes: dict[str, Any], message: str
) -> None:
    changed = {name: value for name, value in (content | changes).items() if value is not None}
    if "arms" not in changes:
        changed["arms"] = {"random": None}
    with pytest.raises(GradsieveError, match=message):
        Comparison.of(parse_config(changed, "x.yaml"))


def test_a_metric_that_a_test_cannot_have_is_refused_where_it_asks_for_it_and_left_out_else(content: dict[str, Any]) -> None:
    content["tests"]["asked"] |= {"metrics": ["loss", "bleu"]}
    with pytest.raises(InvalidArgument, match=r"tests\.asked\.metrics must be of sets of kind worked, got bleu; remove"):
        Comparison.of(parse_config(content, "x.yaml"))
    del content["tests"]["asked"]["metrics"]
    del content["metrics"]
    material = Comparison.of(parse_config(content, "x.yaml")).material
    assert [metrics_of(material.config, test) for test in material.tests] == [
        ("loss", "key_loss", "key_accuracy"),
        ("loss", "key_loss", "key_accuracy", "kl"),
    ]


def test_surgery_or_replay_of_all_arms_needs_no_steps_in_the_file(content: dict[str, Any]) -> None:
    del content["steps"]
    for own in ({"surgery": "agem", "anchor_batch": 2}, {"replay_share": 0.5}):
        config = parse_config(content | {"recipe": content["recipe"] | own, "arms": {"random": None}}, "x.yaml")
        assert full_steps(config, 24) == (6 if "surgery" in own else 12)  # half of each batch of 4 is replayed
        Comparison.of(config)


def test_wrong_options_and_a_tasks_data_decide_a_cells_numbers(content: dict[str, Any], tmp_path: Path) -> None:
    picks, task = tmp_path / "picks.jsonl", tmp_path / "colours.jsonl"

    def write(wrong: str = "a shoe", answer: int = 0, gold: int = 0) -> None:
        rows = [
            {"prompt": f"What is best for {i}?", "choices": ["a hat", wrong], "answer": answer, "completion": "a hat"}
            for i in range(3)
        ]
        picks.write_text("".join(json.dumps(row) + "\n" for row in rows))
        asked = [{"question": f"What is {i}?", "options": ["red", "blue"], "gold": gold} for i in range(3)]
        task.write_text("".join(json.dumps(row) + "\n" for row in asked))

    (tmp_path / "colours.yaml").write_text(TASK.format(folder=tmp_path))
    content["tests"]["picks"] = {"role": "general", "files": str(picks)}
    content["tasks"] = {"colours": {"include_path": str(tmp_path)}}
    config = parse_config(content | {"arms": {"random": None}, "seeds": [0], "metrics": ["loss", "choice"]}, "x.yaml")
    write()
    Comparison.of(config).run(only=["base"])
    write()
    assert len(Comparison.of(config).run(only=["base"])) == 1
    for changes, named in (({"wrong": "a boot"}, "tests.picks.options"), ({"gold": 1}, "tasks.colours.data")):
        write(**changes)  # type: ignore[arg-type]
        with pytest.raises(InvalidArgument, match=f"base must be of the comparison that is asked for.*{named}"):
            Comparison.of(config).run(only=["base"])


def test_a_task_in_the_chat_format_is_asked_in_the_template_of_the_comparison(
    content: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "own.jinja").write_text("{% for m in messages %}<{{ m['content'] }}>{% endfor %}")
    (tmp_path / "colours.jsonl").write_text("{}\n")
    (tmp_path / "colours.yaml").write_text(TASK.format(folder=tmp_path))
    seen: list[str] = []

    def stop(model: Any, tokenizer: Any, *_: Any, **__: Any) -> None:
        seen.append(tokenizer.apply_chat_template([{"role": "user", "content": "why"}], tokenize=False))
        raise KeyboardInterrupt

    monkeypatch.setattr(training, "harness", stop)
    content |= {"chat_template": str(tmp_path / "own.jinja")}
    material = Comparison.of(parse_config(content, "x.yaml")).material
    config = dataclasses.replace(material.config, tasks={"colours": TaskSettings(chat=True)})
    with pytest.raises(KeyboardInterrupt):
        training.run_task(None, "colours", dataclasses.replace(material, config=config), None)
    assert seen == ["<why>"]
    assert "<" not in str(material.source.tokenizer.chat_template)[:1]


def test_a_role_that_an_arm_reads_must_be_there(content: dict[str, Any]) -> None:
    del content["target"]
    content["arms"] = {"less": None}
    with pytest.raises(InvalidArgument, match=r"x\.yaml: target must be given for the arm less, got none"):
        Comparison.of(parse_config(content, "x.yaml"))
    content |= {"arms": {"replay": {"method": "random", "recipe": {"replay_share": 0.5}}}, "target": content.get("anchor")}
    del content["anchor"]
    with pytest.raises(
        InvalidArgument, match=r"x\.yaml: replay--25pct--0--equal_steps: anchor must be given for surgery and rep"
    ):
        Comparison.of(parse_config(content, "x.yaml"))


def test_a_method_that_holds_out_half_of_the_anchor_has_a_store_of_its_own(content: dict[str, Any]) -> None:
    live = {"fidelity": "navigator", "clusters": 3, "updates": 1, "episodes": 2, "batch": 2, "measurements": 1}
    content["arms"] = {"ogs": {"settings": live}, "orth-only": None}
    comparison = Comparison.of(parse_config(content, "x.yaml"))
    chosen = [comparison.chosen(Cell(arm, "25%", 0, "equal_steps")) for arm in ("ogs", "orth-only")]
    assert all(one is not None and len(one.ids) == 6 for one in chosen)
    assert len(list((comparison.study / "stores").iterdir())) == 2


def test_a_number_may_be_missing_where_an_arm_does_without_it(content: dict[str, Any]) -> None:
    pool = Path(content["pool"])
    rows = [json.loads(line) for line in pool.read_text().splitlines()]
    pool.write_text("".join(json.dumps(row | ({"stars": i} if i else {})) + "\n" for i, row in enumerate(rows)))
    content["arms"] = {"starred": {"method": "metadata", "settings": {"column": "stars", "missing": "drop"}}}
    comparison = Comparison.of(parse_config(content, "x.yaml"))
    chosen = comparison.chosen(Cell("starred", "25%", 0, "equal_steps"))
    assert chosen is not None
    assert chosen.ids == tuple(f"pool-{i}" for i in range(23, 17, -1))


def test_meteor_without_synonyms_is_kept_under_its_own_name(
    content: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import nltk

    monkeypatch.setattr(nltk.data, "path", [])
    path = tmp_path / "said.jsonl"
    path.write_text(json.dumps({"prompt": "Where from?", "completion": "From the steppe."}) + "\n")
    content |= {"tests": {"said": {"role": "target", "files": str(path)}}, "metrics": ["rougeL", "meteor", "loss"]}
    material = Comparison.of(parse_config(content, "x.yaml")).material
    model = material.source.load(material.dtype, material.device)
    outcome, _ = work(model, None, material, Job(None), tmp_path / "cell")
    assert list(outcome.values["said"]) == ["rougeL", "meteor_nosyn", "loss"]


def test_data_may_differ_by_seed(content: dict[str, Any], tmp_path: Path) -> None:
    lines = Path(content["pool"]).read_text().splitlines()
    for seed in (0, 1):
        (tmp_path / f"pool-{seed}.jsonl").write_text("\n".join(lines[12 * seed : 12 * seed + 12]) + "\n")
    content |= {"pool": str(tmp_path / "pool-{seed}.jsonl"), "arms": {"length": None}}
    comparison = Comparison.of(parse_config(content, "x.yaml"))
    chosen = [comparison.chosen(Cell("length", "25%", seed, "equal_steps")) for seed in (0, 1)]
    assert chosen[0] is not None
    assert chosen[1] is not None
    assert {int(id.removeprefix("pool-")) // 12 for id in chosen[0].ids} == {0}
    assert {int(id.removeprefix("pool-")) // 12 for id in chosen[1].ids} == {1}


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
