"""The output folder of a selection: chosen examples, scores, exclusions, the record of the run, the report; and its replay.

selected.jsonl   the chosen examples exactly as they were given, best first
scores.parquet   one row per usable example: id, row, selected, rank, weight, score, and every column that was read
excluded.jsonl   id, row and reason of every other example
run.json         configuration, hashes, versions, hardware, seeds, cost per stage
report.html      all of it to look at
"""

from __future__ import annotations

import dataclasses
import datetime
import json
import math
import os
import platform
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Annotated, Any

import torch
import tyro
import xxhash

from gradsieve import __version__
from gradsieve.atomic import replacing, write_atomically
from gradsieve.clock import Progress, silent
from gradsieve.data import Excluded, row_fields, write_jsonl, write_lines
from gradsieve.demo import is_demo
from gradsieve.errors import DataError, InvalidArgument
from gradsieve.pipeline import Result, method_class, select
from gradsieve.report import Page, Source, Stage, write_report
from gradsieve.types import Example, Reference, Selection

FILES = (
    ("selected.jsonl", "the chosen examples, exactly as given, best first"),
    ("scores.parquet", "every usable example with its score, rank and columns"),
    ("excluded.jsonl", "examples that could not be used, with the reason"),
    ("run.json", "configuration, hashes, versions and cost"),
)
_PACKAGES = ("torch", "transformers", "datasets", "peft", "trl", "accelerate", "safetensors", "numpy", "pyarrow")


def save(result: Result, out: Path) -> Path:
    """Writes all files of a result; each is there whole or not at all. Returns the folder."""
    out.mkdir(parents=True, exist_ok=True)
    with result.clock.stage("writing"):
        write_jsonl(out / "selected.jsonl", result.examples)
        _write_scores(result, out / "scores.parquet")
        write_excluded(out, result.excluded, result.sets["pool"].examples)
    record = _record(result)
    write_atomically(out / "run.json", json.dumps(record, indent=2, ensure_ascii=False, allow_nan=False).encode() + b"\n")
    write_report(page(result, record), out / "report.html")
    return out


def write_excluded(out: Path, excluded: Iterable[Excluded], examples: Sequence[Example]) -> None:
    """Writes `excluded.jsonl` into a folder: a line with the reason for each example that could not be used.

    Args:
        out: The folder, which exists.
        excluded: Those examples, by their position.
        examples: The whole pool.
    """
    rows = ({"id": e.id, "row": e.position, "reason": e.reason, "origin": examples[e.position].origin} for e in excluded)
    write_lines(out / "excluded.jsonl", (json.dumps(row, ensure_ascii=False).encode() for row in rows))


@dataclass(frozen=True)
class Replay:
    """Do a recorded selection again and compare it row by row.

    Attributes:
        run: The run.json of a selection.
        out: Folder for the second run; `replay` beside the record by default.
    """

    run: Annotated[Path, tyro.conf.Positional]
    out: Path | None = None


def replay(run: Path, out: Path, progress: Progress = silent) -> Result:
    """Does a recorded run again and compares the selection, row by row.

    Args:
        run: A `run.json`.
        out: Folder for the second run's files.
        progress: Is told how far long stages are.

    Raises:
        DataError: The record cannot be read.
        InvalidArgument: Data or model are not those of the record, or the selection came out differently.
    """
    try:
        record = json.loads(run.read_bytes())
        method, job, wanted = record["method"], dict(record["job"]), record["selection"]["digest"]
        weights, unnamed = record["model"]["weights"], _unnamed(record)
        job |= {role: tuple(inputs["files"]) for role, inputs in record["inputs"].items()}
        digests = {role: inputs["digest"] for role, inputs in record["inputs"].items()}
        name, settings = method["name"], method["settings"]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{run}: must be the run.json of a selection, got {error!r}; select again") from None
    if unnamed:
        raise InvalidArgument(f"{run} must name {unnamed}; call select again instead")
    job["store"] = None
    result = select(name, settings=settings, out=out, progress=progress, **job)
    again = _record(result)
    for role, digest in digests.items():
        if again["inputs"][role]["digest"] != digest:
            raise InvalidArgument(f"{role} must be the data of {run}, got other content in {' '.join(job[role])}")
    if again["model"]["weights"] != weights:
        raise InvalidArgument(f"model must be the one of {run}, got other weights in {record['model']['name']}")
    if again["selection"]["digest"] != wanted:
        raise InvalidArgument(
            f"the selection must be that of {run}, got another one in {out}; versions then and now are in the two run.json"
        )
    return result


def _unnamed(record: Mapping[str, Any]) -> str:
    """Returns what a record cannot name, so that the run cannot be replayed; "" where it names everything."""
    for role, inputs in record["inputs"].items():
        if not inputs["files"]:
            return f"the files of its {role}, got examples from memory"
    return "its model's folder, got a model object" if record["model"]["live"] else ""


def page(result: Result, record: Mapping[str, Any] | None = None) -> Page:
    """Returns what the report says about a result; `record` is what its run.json holds, made anew if not given."""
    by_id = {example.id: example for example in result.sets["pool"].examples}
    ids = list(result.pool.ids)
    excluded = [(e.id, e.reason) for e in result.excluded]
    selection = dataclasses.replace(result.selection, trace=_plain(result.selection.trace))  # as a rebuilt report has it
    return page_of(record or _record(result), [by_id[id] for id in ids], dict(result.pool.columns), selection, excluded)


def page_of(
    record: Mapping[str, Any],
    examples: Sequence[Example],
    columns: Mapping[str, torch.Tensor],
    selection: Selection,
    excluded: Sequence[tuple[str, str]],
) -> Page:
    """Returns what the report says about a recorded run.

    Args:
        record: The content of run.json.
        examples: The usable pool, [n].
        columns: Numbers per row by name, [n] each.
        selection: What was chosen; its notes stand at the end of the record's.
        excluded: Id and reason of the other examples.
    """
    name, settings = record["method"]["name"], record["method"]["settings"]
    kind = method_class(name)
    groups, groups_are = _groups(examples)
    inputs = record["inputs"].items()
    return Page(
        method=getattr(kind, "title", name),
        picks_by=getattr(kind, "picks_by", "its own score"),
        source=getattr(kind, "source", ""),
        settings=settings,
        model=record["model"]["name"],
        sources=[Source(role, ", ".join(part["files"]) or "examples from memory", part["examples"]) for role, part in inputs],
        budget=record["job"]["budget"],
        seed=record["job"]["seed"],
        date=record["date"],
        version=record["gradsieve"],
        ids=[example.id for example in examples],
        prompts=[_prompt(example) for example in examples],
        completions=[str(example.messages[-1].get("content") or "") for example in examples],
        selection=selection,
        columns=columns,
        groups=groups,
        groups_are=groups_are,
        excluded=excluded,
        notes=[note for note in record["notes"] if note not in selection.notes],
        references={name: Reference(**fact) for name, fact in record["references"].items()},
        stages=[Stage(c["stage"], c["wall_seconds"], c["cpu_seconds"], c["bytes"]) for c in record["stages"]],
        files=list(FILES),
        repeatable=not _unnamed(record) and not name.startswith("__main__:"),  # a class that only its own script has
    )


def _groups(examples: Sequence[Example]) -> tuple[list[str | None] | None, str]:
    """The demo's planted kinds where the examples carry them, else their categories, else nothing."""
    planted = [row_fields(e).get("planted") if b'"planted"' in e.raw else None for e in examples]
    if any(planted) and all(kind is None or isinstance(kind, str) for kind in planted):
        return planted, "planted kinds"
    categories = [example.category for example in examples]
    return (categories, "categories") if any(categories) else (None, "groups")


def _prompt(example: Example) -> str:
    turns = [turn for turn in example.messages[:-1] if turn.get("content")]
    if len(turns) == 1:
        return str(turns[0]["content"])
    return "\n".join(f"{turn['role']}: {turn['content']}" for turn in turns)


def _write_scores(result: Result, path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    pool, selection = result.pool, result.selection
    n = len(pool.ids)
    row_of = {result.sets["pool"].examples[position].id: position for position in result.sets["pool"].kept}
    rank = torch.full((n,), -1, dtype=torch.int64)
    rank[selection.rows] = torch.arange(1, len(selection.rows) + 1)
    weight = torch.zeros(n, dtype=torch.float64)
    weight[selection.rows] = selection.weights.double()
    table: dict[str, Any] = {
        "id": pa.array(list(pool.ids), pa.string()),
        "row": pa.array([row_of[id] for id in pool.ids], pa.int64()),
        "selected": pa.array((rank > 0).tolist(), pa.bool_()),
        "rank": pa.array([r if r > 0 else None for r in rank.tolist()], pa.int64()),
        "weight": pa.array(weight.tolist(), pa.float64()),
        "score": pa.array(selection.scores.tolist(), pa.float64()),
    }
    for name, column in pool.columns.items():
        table[name] = pa.array(column.tolist(), pa.float64())
    for name, values in _per_row(result).items():
        table[score_column(name)] = pa.array(values, pa.float64())
    with replacing(path) as file:
        pq.write_table(pa.table(table), file)


def score_column(entry: str) -> str:
    """Returns the column of scores.parquet that holds an entry of the trace with a number per row."""
    return entry if entry in ("utility", "risk", "overlap") else f"trace/{entry}"


def _per_row(result: Result) -> dict[str, list[float | None]]:
    """The entries of the trace that the method says have one number per row of the pool."""
    trace = result.selection.trace
    return {name: [None if v is None else float(v) for v in trace[name]] for name in result.selection.per_row}


def _plain(value: Any) -> Any:
    """The value as JSON has it, which has no NaN and no infinity: they are null."""
    if isinstance(value, Mapping):
        return {str(key): _plain(v) for key, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    if hasattr(value, "tolist"):
        return _plain(value.tolist())
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _record(result: Result) -> dict[str, Any]:
    name, selector = result.method
    job = dataclasses.asdict(result.job)
    per_row = _per_row(result)
    chosen = [result.pool.ids[row] for row in result.selection.rows.tolist()]
    record: dict[str, Any] = {
        "gradsieve": __version__,
        "date": now(),
        "method": {"name": name, "settings": dataclasses.asdict(selector)},  # type: ignore[call-overload]
        "job": {key: _from_anywhere(key, value) for key, value in job.items() if key not in result.sets},
        "model": {"name": result.model.name, "weights": result.model.weights, "live": result.model.live is not None},
        "inputs": {
            role: {
                "files": [_absolute(file) for file in job[role]],
                "format": result.formats.get(role),
                "examples": len(part.examples),
                "usable": len(part.kept),
                "digest": data_digest(part.examples),
            }
            for role, part in result.sets.items()
        },
        "selection": {
            "examples": len(chosen),
            "tokens": int(result.pool.columns["tokens"][result.selection.rows].sum()),
            "tokens_per_example": {
                "pool": float(result.pool.columns["tokens"].mean()),
                "chosen": float(result.pool.columns["tokens"][result.selection.rows].mean()) if chosen else None,
            },
            "mean_cosine": dataclasses.asdict(result.alignment) if result.alignment is not None else None,
            "digest": selection_digest(chosen, result.selection.weights.tolist()),
            "content": data_digest(result.examples),
        },
        "overhead": dataclasses.asdict(result.overhead) if result.overhead is not None else None,
        "references": {name: dataclasses.asdict(fact) for name, fact in result.references.items()},
        "trace": {key: value for key, value in result.selection.trace.items() if key not in per_row},
        "trace_columns": list(per_row),
        "notes": [*result.notes, *result.selection.notes],
        "excluded": len(result.excluded),
        "stages": [dataclasses.asdict(cost) for cost in result.clock.costs],
        "versions": {"python": platform.python_version(), **versions()},
        "hardware": hardware(result.job.device),
    }
    return {key: _plain(value) for key, value in record.items()}


def data_digest(examples: Iterable[Example]) -> str:
    """Returns the hash by which a record knows a set of examples again: of their raw bytes, in order."""
    hasher = xxhash.xxh3_128()
    for number, example in enumerate(examples):
        hasher.update((b"\n" if number else b"") + example.raw)
    return str(hasher.hexdigest())


def selection_digest(ids: Sequence[str], weights: Sequence[float]) -> str:
    """Returns the hash by which a record knows a choice again: of the ids, best first, and of their weights."""
    return xxhash.xxh3_128_hexdigest(json.dumps([list(ids), [float(weight) for weight in weights]]).encode())


def _from_anywhere(key: str, value: Any) -> Any:
    """A field of the job with its paths made absolute, so that the run can be replayed from another folder."""
    if key in ("corrupted", "replay"):
        return [_absolute(file) for file in value]
    is_folder = key in ("model", "navigator") and value is not None and Path(value).is_dir()
    is_path = is_folder or (key in ("chat_template", "warmup_recipe") and value is not None)
    return _absolute(value) if is_path else value


def _absolute(file: str) -> str:
    return file if is_demo(file) else str(Path(file).absolute())


def versions() -> Mapping[str, str]:
    """Returns the versions of the packages that a run's numbers depend on, those that are installed."""
    found = {}
    for package in _PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def hardware(device: str) -> Mapping[str, Any]:
    """Returns what a run was computed on."""
    accelerator = torch.cuda.get_device_name(device) if device.startswith("cuda") else device
    return {
        "machine": platform.machine(),
        "system": platform.system(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "device": accelerator,
    }


def now() -> str:
    """Returns the time, to the minute, as it is written in records and reports."""
    return datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC")
