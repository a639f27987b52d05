"""Reading examples: files in any of the known shapes become one `Dataset` of `Example`s with unique ids.

What a file is (JSON lines, Parquet, …) is told by its name: see `gradsieve.data.files`. Which shape its rows have (messages,
prompt-completion, …) is told by the keys of all its rows: see `gradsieve.data.shapes`.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import xxhash

from gradsieve.data.files import Row, json_type, read_rows
from gradsieve.data.shapes import Format, Message, Turns, detect_shape, fitting_shapes, read_turns
from gradsieve.errors import DataError, InvalidArgument
from gradsieve.types import Example

logger = logging.getLogger(__name__)

_ID_DIGITS = 16  # of the 32 hexadecimal digits of the content's hash; equal prefixes get a suffix like repeated contents


@dataclass(frozen=True)
class Dataset:
    """Examples in reading order, and what reading them showed.

    Attributes:
        examples: All rows of all sources; repeated ones are kept.
        format: The shape of the rows; `a.jsonl: messages, b.jsonl: alpaca` where the sources differ.
        repeated: Examples whose conversation equals an earlier one.
        sources: The files as they were named.
        notes: Sentences the user must read: blank lines skipped, ids left unused.
    """

    examples: tuple[Example, ...]
    format: str
    repeated: int
    sources: tuple[str, ...]
    notes: tuple[str, ...] = ()


@dataclass(slots=True)
class _Parsed:
    """A row that was understood, before it has an id of its own."""

    given_id: str | None
    digest: str
    turns: Turns
    raw: bytes
    origin: str
    category: str | None


def read_examples(
    sources: Sequence[str | Path] | str | Path,
    *,
    format: Format = "auto",
    category_field: str = "category",
    category_per_file: bool = False,
) -> Dataset:
    """Returns the examples of one or more files, in the order of the files and of their rows.

    An id is the row's `id` (a string or an integer) if every row of its file has one. Otherwise it is the first 16 digits of
    the content's hash; repeats get `-2`, `-3`, … in reading order.

    Args:
        sources: Files (.jsonl, .json, both also .gz; .parquet; .arrow) or dataset folders (`DIR` or `DIR:SPLIT`).
        format: The shape of the rows, for all files; `auto` tells it per file from the keys of all its rows.
        category_field: The field that names an example's category, if the row has it.
        category_per_file: Where there are several files, let each file's name (without its ending; as given where two would be
            the same) be the category of its rows that have none.

    Raises:
        DataError: A file or row breaks a rule; the message starts with `FILE:LINE` (`FILE: row N` where there are no lines).
        InvalidArgument: No sources are given, or `format` is unknown.
    """
    if isinstance(sources, str | Path):
        sources = [sources]
    if not sources:
        raise InvalidArgument("sources must name at least one file, got none; give a JSONL or Parquet file")
    if format not in get_args(Format):
        raise InvalidArgument(f"format must be one of {', '.join(get_args(Format))}, got {format!r}")
    notes: list[str] = []
    shapes: dict[str, str] = {}
    parsed: list[_Parsed] = []
    for source, category in zip(sources, _file_categories(sources), strict=True):
        shape, rows = _read_source(source, format, category_field, notes)
        shapes[str(source)] = shape
        bare = [row for row in rows if row.category is None]
        if category_per_file and len(sources) > 1 and bare:
            notes.append(
                f'{source}: {len(bare)} of {len(rows)} rows have no "{category_field}"; theirs is the file\'s, {category!r}'
            )
            for row in bare:
                row.category = category
        parsed.extend(rows)
    ids = _unique_ids(parsed)
    same = len(set(shapes.values())) == 1
    return Dataset(
        examples=tuple(Example(i, p.turns, p.raw, p.origin, p.category) for i, p in zip(ids, parsed, strict=True)),
        format=next(iter(shapes.values())) if same else ", ".join(f"{name}: {shape}" for name, shape in shapes.items()),
        repeated=len(parsed) - len({p.digest for p in parsed}),
        sources=tuple(str(source) for source in sources),
        notes=tuple(notes),
    )


def _file_categories(sources: Sequence[str | Path]) -> list[str]:
    """Returns the sources' names without folder and ending; as they are given where two would be the same."""
    names = [Path(str(source).removesuffix(".gz")).stem for source in sources]
    return names if len(set(names)) == len(names) else [str(source) for source in sources]


def content_hash(example: Example) -> str:
    """Returns the hash of the conversation alone: 32 hexadecimal digits of XXH3-128.

    Roles and contents enter as they are, nothing is normalised; an assistant turn's `tool_calls` enter as well, because they
    are what it says. Ids, categories, weights and other fields do not. Equal conversations of different shapes are equal.
    """
    return _digest(example.messages)


def overlap(a: Sequence[Example], b: Sequence[Example]) -> list[tuple[Example, Example]]:
    """Returns every pair of an example of `a` and one of `b` with the same conversation, in the order of `a`, then `b`.

    O(len(a) + len(b) + pairs).
    """
    by_content: dict[str, list[Example]] = {}
    for example in b:
        by_content.setdefault(content_hash(example), []).append(example)
    return [(example, other) for example in a for other in by_content.get(content_hash(example), ())]


def row_fields(example: Example) -> dict[str, Any]:
    """Returns all fields of the row the example came from."""
    fields: dict[str, Any] = json.loads(example.raw)
    return fields


def _read_source(source: str | Path, format: Format, category_field: str, notes: list[str]) -> tuple[str, list[_Parsed]]:
    """Returns a file's shape and rows.

    The rows are turned as they come, in the shape of the first one. Which error is the right one can depend on later rows
    (a row of another shape makes the file ambiguous), so after a failure only the keys are gathered, to the end of the file.
    """
    name = str(source)
    keys: set[str] = set()
    shape: str | None = None if format == "auto" else format
    failed: tuple[Row, DataError | None] | None = None
    parsed: list[_Parsed] = []
    for row in read_rows(source, notes):
        if format == "auto":
            keys.update(key for key, value in row.fields.items() if value is not None)
            if failed is not None:
                continue
            if shape is None:
                fitting = fitting_shapes(keys)
                if len(fitting) != 1:
                    failed = (row, None)
                    continue
                shape = fitting[0]
        assert shape is not None
        try:
            parsed.append(_parse_row(row, shape, category_field))
        except DataError as error:
            if format != "auto":
                raise
            failed = (row, error)
    if format == "auto":
        detected = detect_shape(keys, name)
        if failed is not None:
            row, reason = failed
            if reason is not None:
                raise reason
            _parse_row(row, detected, category_field)  # the first row fits no shape, hence not this one: raises
        shape = detected
    assert shape is not None
    _drop_partial_ids(parsed, name, notes)
    return shape, parsed


def _parse_row(row: Row, shape: str, category_field: str) -> _Parsed:
    fields = row.fields
    turns = read_turns(fields, shape, row.origin)
    try:
        digest = _digest(turns)
        str(fields.get("id", "")).encode()
    except UnicodeEncodeError as error:
        bad = f"\\u{ord(error.object[error.start]):04x}"
        raise DataError(f"{row.origin}: text and id must be valid Unicode, got the lone surrogate {bad}; repair it") from error
    given = fields.get("id")
    if given is not None and (isinstance(given, bool) or not isinstance(given, str | int) or given == ""):
        raise DataError(f'{row.origin}: "id" must be a string that is not empty or an integer, got {given!r}; rename the field')
    category = fields.get(category_field)
    if category is not None and not isinstance(category, str):
        cure = "name another field as the category"
        raise DataError(f'{row.origin}: "{category_field}" must be a string, got {json_type(category)}; {cure}')
    return _Parsed(None if given is None else str(given), digest, turns, row.raw, row.origin, category)


def _drop_partial_ids(parsed: list[_Parsed], name: str, notes: list[str]) -> None:
    """Forgets the given ids of a file in which not every row has one."""
    given = sum(p.given_id is not None for p in parsed)
    if 0 < given < len(parsed):
        for p in parsed:
            p.given_id = None
        notes.append(f'{name}: only {given} of {len(parsed)} rows have an "id", so ids are made from the content')
        logger.warning(notes[-1])


def _unique_ids(parsed: Iterable[_Parsed]) -> list[str]:
    """Returns one unique id per row.

    Raises:
        DataError: Two rows have the same given id.
    """
    parsed = list(parsed)
    origins: dict[str, str] = {}
    for p in parsed:
        if p.given_id is not None and origins.setdefault(p.given_id, p.origin) is not p.origin:
            first = origins[p.given_id]
            raise DataError(
                f'{p.origin}: "id" must be unique, got {p.given_id!r}, which {first} has as well; rename one of them'
            )
    ids, uses = [], dict[str, int]()
    for p in parsed:
        made = p.given_id
        if made is None:
            stem = p.digest[:_ID_DIGITS]
            number = uses.get(stem, 0) + 1
            made = stem if number == 1 else f"{stem}-{number}"
            while made in origins:  # somebody's given id
                number += 1
                made = f"{stem}-{number}"
            uses[stem] = number
        ids.append(made)
    return ids


def _digest(turns: Sequence[Message]) -> str:
    """Returns the XXH3-128 of the turns, each written as `role:length:content`, which no other conversation can spell."""
    parts = []
    for turn in turns:
        content = turn["content"]
        parts.append(f"{turn['role']}:-" if content is None else f"{turn['role']}:{len(content)}:{content}")
        if calls := turn.get("tool_calls"):
            text = json.dumps(calls, sort_keys=True, default=str)
            parts.append(f"tool_calls:{len(text)}:{text}")
    return xxhash.xxh3_128_hexdigest("".join(parts).encode())
