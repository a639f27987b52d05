"""What the arms choose, and the stores of gradients that they share."""

import fcntl
import json
import shutil
import threading
from pathlib import Path
from typing import Any

import pytest

from gradsieve.compare.cells import Cell
from gradsieve.compare.config import Config, parse_config
from gradsieve.compare.records import read_json
from gradsieve.compare.run import Comparison
from gradsieve.compare.stores import WHOLE, gradient_settings, store_of
from gradsieve.compare.subsets import known_subset


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


@pytest.mark.parametrize(
    "changes",
    [
        {"arms": {"one": {"method": "length", "settings": {"prefer": "short"}}}},
        {"arms": {"one": {"method": "metadata", "settings": {"column": "stars"}}}},
        {"max_length": 60},
        {"gradients": {"dim": 512}},
        {"model": "other"},
        {"pool": "shorter"},
    ],
)
def test_a_choice_of_other_settings_is_not_taken_again(
    content: dict[str, Any], changes: dict[str, Any], tmp_path: Path
) -> None:
    pool = Path(content["pool"])
    rows = [json.loads(line) | {"stars": i} for i, line in enumerate(pool.read_text().splitlines())]
    for path, count in ((pool, 24), (tmp_path / "shorter.jsonl", 20)):
        path.write_text("".join(json.dumps(row) + "\n" for row in rows[:count]))
    content["arms"] = {"one": {"method": "length"}}
    comparison = Comparison.of(parse_config(content, "x.yaml"))
    made = comparison.chosen(Cell("one", "25%", 0, "equal_steps"))
    own = Comparison.of(parse_config(content, "x.yaml"))
    assert known_subset(own.study, own.material, own.config.arm("one"), "25%", 1) == made
    if "model" in changes:
        changes = {"model": str(shutil.copytree(content["model"], tmp_path / "other"))}
        settings = tmp_path / "other" / "config.json"
        settings.write_text(settings.read_text().replace('"rms_norm_eps": 1e-06', '"rms_norm_eps": 1e-05'))
    if "pool" in changes:
        changes = {"pool": str(tmp_path / "shorter.jsonl")}
    other = Comparison.of(parse_config(content | changes, "x.yaml"))
    assert known_subset(other.study, other.material, other.config.arm("one"), "25%", 0) is None


def test_files_named_under_gradients_count_by_their_content(content: dict[str, Any], tmp_path: Path) -> None:
    def of(**named: str) -> tuple[Path, Any]:
        config = parse_config(content | {"arms": {"less": None}, "gradients": {"dim": 256} | named}, "x.yaml")
        material = Comparison.of(config).material
        return store_of(tmp_path, material, config.arm("less"), 0), gradient_settings(material)

    recipe, copies = tmp_path / "recipe.yaml", tmp_path / "copies.jsonl"
    assert of()[1] == {"dim": 256, "max_length": 1024, "dtype": "torch.float32", "template": None}
    recipe.write_text("learning_rate: 1.0e-5\nwarmup: 0\n")
    rows = [json.loads(line) for line in Path(content["target"]).read_text().splitlines()]
    copies.write_text("".join(json.dumps(row | {"completion": "No idea."}) + "\n" for row in rows))
    navigator = shutil.copytree(content["model"], tmp_path / "navigator")
    files = {"warmup_recipe": recipe, "corrupted": copies, "navigator": navigator / "config.json"}
    for key, path in files.items():
        name = path.parent if key == "navigator" else path
        moved = tmp_path / f"moved-{path.name}"
        (shutil.copytree if name.is_dir() else shutil.copy)(name, moved)
        store, settings = of(**{key: str(name)})
        assert of(**{key: str(moved)}) == (store, settings)
        assert str(tmp_path) not in json.dumps(settings)
        text = path.read_text()
        path.write_text(text.replace("1.0e-5", "5.0e-2").replace("idea", "clue").replace("1e-06", "1e-05"))
        assert path.read_text() != text
        assert of(**{key: str(name)})[0] != store


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
