"""The report of a finished run once more, from the files in its folder and the pool it was made from."""

from __future__ import annotations

import dataclasses
import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import tyro

from gradsieve.data import read_examples
from gradsieve.demo import demo_set, is_demo
from gradsieve.errors import DataError, InvalidArgument
from gradsieve.outputs import data_digest, page_of, score_column
from gradsieve.report import Page, write_report
from gradsieve.types import Example, Selection

_OWN = {"id", "row", "selected", "rank", "weight", "score"}


@dataclass(frozen=True)
class Rebuild:
    """Write the report of a finished selection again, for example with a newer gradsieve. No model is loaded.

    Attributes:
        run: Folder of the selection.
        out: The file to write; `report.html` in the run's folder by default.
    """

    run: Annotated[Path, tyro.conf.Positional]
    out: Path | None = None


def rebuild(command: Rebuild) -> Path:
    """Writes the report and returns its path.

    Raises:
        DataError: A file of the run is missing or broken.
        InvalidArgument: The pool is not on disk, or no longer the one of the run.
    """
    out = command.out or command.run / "report.html"
    folder = os.path.relpath(command.run.resolve(), out.parent.resolve())
    write_report(dataclasses.replace(read_page(command.run), folder=folder), out)
    return out


def read_page(run: Path) -> Page:
    """Returns what the report says about the selection in a folder."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        record = json.loads((run / "run.json").read_bytes())
        scores = pq.read_table(run / "scores.parquet").to_pydict()
        excluded = [json.loads(line) for line in (run / "excluded.jsonl").read_bytes().splitlines()]
        reasons = [(row["id"], row["reason"]) for row in excluded]
        traced, part, job = record["trace_columns"], record["inputs"]["pool"], record["job"]
    except (OSError, ValueError, KeyError, TypeError, pa.ArrowException) as error:
        raise DataError(f"{run}: must be the folder of a selection, got {error!r}; select again") from None
    pool = {example.id: example for example in _pool(run, part, job)}
    missing = [id for id in scores["id"] if id not in pool]
    if missing:
        raise DataError(f"{run}: scores.parquet must name examples of the pool, got {missing[0]!r}; select again")
    names = [name for name in scores if name not in _OWN and name not in {score_column(entry) for entry in traced}]
    columns = {name: torch.tensor(scores[name], dtype=torch.float64) for name in names}
    return page_of(record, [pool[id] for id in scores["id"]], columns, _selection(record, scores), reasons)


def _pool(run: Path, part: Mapping[str, Any], job: Mapping[str, Any]) -> Sequence[Example]:
    """Returns the pool as the run had it, with the replay examples at its end."""
    if not part["files"]:
        raise InvalidArgument(f"{run} must name the files of its pool, got examples from memory; its report cannot be rebuilt")
    if is_demo(part["files"][0]):
        examples: Sequence[Example] = demo_set("pool", part["files"][0], job["seed"])
    else:
        examples = _read(part["files"], job)
    if replay := job["replay"]:
        examples = [*examples, *_read(replay, job)]
    if data_digest(examples) != part["digest"]:
        files = " ".join([*part["files"], *replay])
        raise InvalidArgument(f"the pool must be the data of {run}, got other content in {files}")
    return examples


def _read(files: Sequence[str], job: Mapping[str, Any]) -> Sequence[Example]:
    return read_examples(files, format=job["format"], category_field=job["category_field"]).examples


def _selection(record: Mapping[str, Any], scores: Mapping[str, list[Any]]) -> Selection:
    ranked = sorted((rank, row) for row, rank in enumerate(scores["rank"]) if rank is not None)
    rows = torch.tensor([row for _, row in ranked], dtype=torch.int64)
    trace = {entry: scores[score_column(entry)] for entry in record["trace_columns"]} | record["trace"]
    return Selection(
        rows=rows,
        weights=torch.tensor(scores["weight"], dtype=torch.float64)[rows],
        scores=torch.tensor([math.nan if v is None else v for v in scores["score"]], dtype=torch.float64),
        trace=trace,
        per_row=record["trace_columns"],
    )
