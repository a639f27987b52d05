"""The folder of a comparison, and what stands in it.

comparison.json              the resolved configuration, versions and hardware of the last run
leaks.jsonl                  every leak that was found, with --drop-leaks
stores/KEY/                  gradients, one store for all methods and seeds with the same references
           spent.json        what they cost; whole.json: of which data they are
selections/NAME.json         what a method chose: ids, weights, notes, seconds; shared where nothing was random
cells/CELL/selection.json    the same, of this cell
           training/         a training run at work; removed at the end, but for the model with keep_models, and what
                             TensorBoard reads
           items.parquet     test, item, metric, value: one row per measurement
           generations.json  prompt, reference and answer of a few items
           result.json       everything else, written last: with it the cell is finished
results.jsonl                all result.json, one a line, those of arms that the file no longer names last
report.html, figures/, …     made from these files alone
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from gradsieve.atomic import replacing, write_atomically
from gradsieve.compare.cells import Cell
from gradsieve.data import write_lines
from gradsieve.errors import DataError, InvalidArgument

RESULT = "result.json"

Values = Mapping[str, Mapping[str, npt.NDArray[np.float64]]]
"""Values per item, float64 [items], by test and metric."""


@dataclass(frozen=True, eq=False)
class Measurements:
    """What a finished cell measured.

    Attributes:
        items: Ids of each test's items, in order.
        values: One value per item, by test and metric.
    """

    items: Mapping[str, Sequence[str]]
    values: Values


@dataclass(frozen=True, eq=False)
class Finished:
    """A finished cell.

    Attributes:
        cell: Which one.
        record: Its result.json.
        folder: Where it is.
    """

    cell: Cell
    record: Mapping[str, Any]
    folder: Path

    def measurements(self) -> Measurements:
        """Reads the values per item."""
        return read_items(self.folder / "items.parquet")

    def generations(self) -> list[dict[str, str]]:
        """Reads the answers to the shown prompts; empty where there are none."""
        path = self.folder / "generations.json"
        return list(read_json(path)) if path.exists() else []


def cell_folder(study: Path, cell: Cell) -> Path:
    """Returns a cell's folder."""
    return study / "cells" / cell.name


def read_finished(study: Path, cell: Cell) -> Finished | None:
    """Returns a finished cell, None where it is not."""
    folder = cell_folder(study, cell)
    path = folder / RESULT
    return Finished(cell, read_json(path), folder) if path.exists() else None


def write_results(study: Path, cells: Sequence[Cell]) -> None:
    """Gathers the finished cells into `results.jsonl`: these in their order, then whatever else the folder holds."""
    planned = [cell_folder(study, cell) / RESULT for cell in cells]
    others = sorted(set((study / "cells").glob(f"*/{RESULT}")) - set(planned))
    done = [read_json(path) for path in [*planned, *others] if path.exists()]
    write_lines(study / "results.jsonl", (_line(record) for record in done))


def write_items(path: Path, items: Mapping[str, Sequence[str]], values: Values) -> None:
    """Writes one row per measurement; the file is there whole or not at all."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    columns: dict[str, list[Any]] = {"test": [], "item": [], "metric": [], "value": []}
    for test, metrics in values.items():
        for metric, column in metrics.items():
            if len(column) != len(items[test]):
                raise InvalidArgument(
                    f"{metric} of {test} must have one value per item ({len(items[test])}), got {len(column)}"
                )
            columns["test"] += [test] * len(column)
            columns["item"] += items[test]
            columns["metric"] += [metric] * len(column)
            columns["value"] += column.tolist()
    arrays = {name: pa.array(columns[name], pa.string()).dictionary_encode() for name in ("test", "item", "metric")}
    table = pa.table({**arrays, "value": pa.array(columns["value"], pa.float64())})
    with replacing(path) as file:
        pq.write_table(table, file, compression="zstd")


def read_items(path: Path) -> Measurements:
    """Reads `items.parquet`."""
    import pyarrow.parquet as pq

    try:
        table = pq.read_table(path)
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: must be readable, got {error}; remove the cell's folder and run again") from None
    tests, items, metrics = (table[name].to_pylist() for name in ("test", "item", "metric"))
    ids: dict[str, dict[str, None]] = {}
    values: dict[str, dict[str, list[float]]] = {}
    for test, item, metric, value in zip(tests, items, metrics, table["value"].to_pylist(), strict=True):
        ids.setdefault(test, {})[item] = None
        values.setdefault(test, {}).setdefault(metric, []).append(value)
    arrays = {test: {metric: np.array(v, dtype=np.float64) for metric, v in by.items()} for test, by in values.items()}
    return Measurements({test: list(own) for test, own in ids.items()}, arrays)


def write_json(path: Path, content: Any) -> None:
    """Writes JSON that is there whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False).encode() + b"\n")


def read_json(path: Path) -> Any:
    """Reads a file of `write_json`."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: must be readable JSON, got {error}; remove it and run again") from None


def differences(there: Mapping[str, Any], here: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    """Yields `key THERE there, HERE here` for each entry in which two nested mappings differ."""
    for key in [*there, *(key for key in here if key not in there)]:
        mine, other = there.get(key), here.get(key)
        if isinstance(mine, Mapping) and isinstance(other, Mapping):
            yield from differences(mine, other, f"{prefix}{key}.")
        elif mine != other:
            yield f"{prefix}{key} {mine} there, {other} here"


def _line(record: Mapping[str, Any]) -> bytes:
    return json.dumps(record, ensure_ascii=False, allow_nan=False).encode()
