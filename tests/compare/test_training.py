"""What a cell trains: order, weights, steps, its labels, what trackers see, and no trace in the cells that follow."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from gradsieve.compare import training
from gradsieve.compare.cells import Cell
from gradsieve.compare.config import Config, parse_config
from gradsieve.compare.run import Comparison
from gradsieve.compare.stores import store_of
from gradsieve.compare.subsets import Subset
from gradsieve.compare.training import full_steps, make_job, work
from gradsieve.data.token_set import _key
from gradsieve.store import GradientStore


def test_equal_steps_are_by_default_those_of_the_whole_pool(config: Config) -> None:
    recipe = config.recipe | {"epochs": 1}
    config = dataclasses.replace(config, arms=config.arms[:3], steps=None, seeds=(0,), recipe=recipe)
    comparison = Comparison.of(config)
    assert full_steps(config, 24) == 6
    assert {
        make_job(comparison.material, cell, config.arm(cell.arm), comparison.chosen(cell)).steps
        for cell in comparison.cells[1:]
    } == {6}


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


@pytest.mark.parametrize(
    ("recipe", "anchor", "replay"),
    [({"surgery": "agem"}, 8, 0), ({"surgery": "pcgrad"}, 8, 0), ({"replay_share": 0.5}, 0, 8), ({}, 0, 0)],
)
def test_surgery_of_either_kind_has_the_anchor_and_replay_its_examples(
    content: dict[str, Any], recipe: dict[str, Any], anchor: int, replay: int
) -> None:
    content["arms"] = {"x": {"method": "random", "recipe": recipe}}
    material = Comparison.of(parse_config(content, "x.yaml")).material
    job = make_job(material, Cell("x", "25%", 0, "equal_steps"), material.config.arm("x"), Subset(("pool-3",), (1.0,)))
    assert (len(job.anchor), len(job.replay)) == (anchor, replay)


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


def test_surgery_or_replay_of_all_arms_needs_no_steps_in_the_file(content: dict[str, Any]) -> None:
    del content["steps"]
    for own in ({"surgery": "agem", "anchor_batch": 2}, {"replay_share": 0.5}):
        config = parse_config(content | {"recipe": content["recipe"] | {"epochs": 1} | own, "arms": {"random": None}}, "x.yaml")
        assert full_steps(config, 24) == (6 if "surgery" in own else 12)  # half of each batch of 4 is replayed
        Comparison.of(config)


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
