"""Finished cells of other settings are refused before anything is done, those too that are not run now."""

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from gradsieve.compare import stores, subsets
from gradsieve.compare.config import Config
from gradsieve.compare.estimate import forecast
from gradsieve.compare.run import Comparison
from gradsieve.errors import InvalidArgument


def without_cells_of(finished: Comparison, arm: str, folder: Path) -> Config:
    shutil.copytree(finished.study, folder / "study")
    for path in (folder / "study" / "cells").glob(f"{arm}--*"):
        shutil.rmtree(path)
    return dataclasses.replace(finished.config, out=str(folder / "study"))


def with_settings(config: Config, arm: str, **settings: Any) -> Config:
    arms = [dataclasses.replace(one, settings=settings) if one.name == arm else one for one in config.arms]
    return dataclasses.replace(config, arms=arms)


def untouched(monkeypatch: pytest.MonkeyPatch) -> None:
    from gradsieve.models import ModelSource

    monkeypatch.setattr(ModelSource, "load", lambda *_: pytest.fail("the model was loaded"))
    for name in ("fill", "ask"):
        monkeypatch.setattr(subsets, name, lambda *_: pytest.fail("something was chosen"))


def test_cells_that_are_not_run_now_are_of_the_same_settings(
    finished: Comparison, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = without_cells_of(finished, "less", tmp_path)
    untouched(monkeypatch)
    before = (tmp_path / "study" / "comparison.json").read_bytes()
    other = dataclasses.replace(config, recipe=config.recipe | {"learning_rate": 5e-2})
    message = r"full--0--.*training\.recipe\.learning_rate None there, 0\.05 here; name another --out"
    with pytest.raises(InvalidArgument, match=message):
        Comparison.of(other).run(only=["less"])
    with pytest.raises(InvalidArgument, match=message):
        forecast(Comparison.of(other), ["less"])
    assert (tmp_path / "study" / "comparison.json").read_bytes() == before


def test_gradients_are_rehearsed_for_arms_alone_that_are_not_finished(
    finished: Comparison, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = without_cells_of(finished, "less", tmp_path)
    rehearsed = []
    monkeypatch.setattr(stores, "rehearse", lambda method, *_: rehearsed.append(method.warmup is not None))
    Comparison.of(finished.config)
    assert rehearsed == []
    Comparison.of(config)
    assert rehearsed == [True]  # random is finished, less is not


def test_cells_that_are_not_run_now_are_not_chosen_for(
    finished: Comparison, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = without_cells_of(finished, "nothing", tmp_path)
    shutil.rmtree(tmp_path / "study" / "selections")
    shutil.rmtree(tmp_path / "study" / "stores")
    path = tmp_path / "study" / "cells" / "less--25pct--0--equal_steps" / "result.json"
    record = json.loads(path.read_text())
    del record["settings"]["rates"], record["selection"]["data"]  # as an earlier version had it
    path.write_text(json.dumps(record))
    untouched(monkeypatch)
    assert len(Comparison.of(config).run(only=["full"])) == len(finished.cells)
    other = with_settings(config, "less", warmup_epochs=3)
    with pytest.raises(
        InvalidArgument, match=r"less--25pct--0--.*settings\.warmup_epochs 4 there, 3 here; name less in --only too"
    ):
        Comparison.of(other).run(only=["full"])
    other = dataclasses.replace(config, gradients=config.gradients | {"params": "linear"})
    with pytest.raises(InvalidArgument, match=r"less--25pct--0--.*gradients\.params None there, linear here; name less"):
        Comparison.of(other).run(only=["full"])


def test_cells_that_are_not_run_now_have_a_pool_with_their_examples(
    finished: Comparison, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = without_cells_of(finished, "full", tmp_path)
    pool = tmp_path / "pool.jsonl"
    pool.write_text("".join(Path(config.pool[0]).read_text().splitlines(keepends=True)[8:]))
    untouched(monkeypatch)
    with pytest.raises(InvalidArgument, match=r"data .* there, .* here; examples there that the pool lacks, pool-"):
        Comparison.of(dataclasses.replace(config, pool=(str(pool),))).run(only=["full"])
