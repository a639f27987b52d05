"""What the arms choose, and the stores of gradients that they share."""

import fcntl
import json
import threading
from pathlib import Path
from typing import Any

from gradsieve.compare.cells import Cell
from gradsieve.compare.config import Config, parse_config
from gradsieve.compare.records import read_json
from gradsieve.compare.run import Comparison
from gradsieve.compare.stores import WHOLE, store_of


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
