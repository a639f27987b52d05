"""Rows of data files on disk: one JSON object each, with the place it stands at and the bytes it came from.

    JSON lines      .jsonl .ndjson, and .json that does not start with `[`      origin `FILE:LINE`, lines count from 1
    JSON list       .json that starts with `[`                                  origin `FILE: row N`, rows count from 0
    Parquet         .parquet                                                    (as in `dataset[N]` or `frame.iloc[N]`)
    Arrow           .arrow .feather .ipc .arrows (IPC file or stream)
    dataset folder  written by `datasets.save_to_disk`; `DIR:SPLIT` picks a split

The JSON forms may be gzipped (`.gz` after the name). Text must be UTF-8 without a byte-order mark. The raw bytes of a JSON
line are the line without its terminator (`\\n` or `\\r\\n`); those of any other row are the row as one compact JSON line.
Blank lines are skipped and noted. NaN and Infinity are refused, since the files written later must be JSON.
"""

from __future__ import annotations

import contextlib
import difflib
import gzip
import io
import json
import logging
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any, NamedTuple, NoReturn

from gradsieve.errors import DataError

logger = logging.getLogger(__name__)

_JSON = (".jsonl", ".ndjson", ".json")
_ARROW = (".arrow", ".feather", ".ipc", ".arrows")
_BATCH = 1000  # rows of a columnar file that are Python objects at one time


class Row(NamedTuple):
    """One object of a file.

    Attributes:
        origin: `FILE:LINE` or `FILE: row N`.
        fields: The object.
        raw: One JSON line without its newline.
    """

    origin: str
    fields: dict[str, Any]
    raw: bytes


def read_rows(source: str | Path, notes: list[str]) -> Iterator[Row]:
    """Yields the rows of one file or dataset folder in their order, reading as it goes (a JSON list is read at once).

    Args:
        source: A file, a dataset folder, or `FOLDER:SPLIT`.
        notes: Sentences about what was skipped are appended here, at the latest with the last row.

    Raises:
        DataError: The file is missing, unreadable, empty or of an unknown kind, or one of its rows is no JSON object.
    """
    path, split = _split(source)
    count = 0
    try:
        for row in _reader(path, split)(str(source), path, notes):
            count += 1
            yield row
    except DataError:
        raise
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise DataError(f"{source}: must be a whole gzip file, got one that breaks after {count} rows: {error}") from error
    except OSError as error:
        raise DataError(f"{source}: cannot be read: {error.strerror or error}") from error
    if count == 0:
        raise DataError(f"{source}: must hold at least one example, got none; the file is empty")


def _split(source: str | Path) -> tuple[Path, str | None]:
    """Returns the path, and the split that `FOLDER:SPLIT` names."""
    path = Path(source)
    if path.exists():
        return path, None
    folder, colon, split = str(source).rpartition(":")
    if colon and split and Path(folder).is_dir():
        return Path(folder), split
    if colon and Path(folder).is_file():
        raise DataError(f"{source}: a split can only be named for a dataset folder, and {folder} is a file; write {folder}")
    siblings = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
    near = difflib.get_close_matches(path.name, siblings, n=1)
    raise DataError(f"{source}: no such file" + (f"; did you mean {path.with_name(near[0])}?" if near else ""))


def _reader(path: Path, split: str | None) -> Callable[[str, Path, list[str]], Iterator[Row]]:
    if path.is_dir():
        return lambda name, folder, notes: _dataset_folder(name, folder, split)
    suffix = Path(path.stem).suffix.lower() if path.suffix.lower() == ".gz" else path.suffix.lower()
    if suffix in _JSON:
        return _json_list if suffix == ".json" and _starts_with_bracket(path) else _json_lines
    if suffix == ".parquet" and path.suffix.lower() != ".gz":
        return _parquet
    if suffix in _ARROW and path.suffix.lower() != ".gz":
        return _arrow
    kinds = ", ".join((*_JSON, ".parquet", *_ARROW))
    raise DataError(
        f"{path}: the name must end in one of {kinds} (JSON also with .gz), got {path.name!r}; rename or convert it"
    )


# --- JSON ---------------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[IO[bytes]]:
    if path.suffix.lower() == ".gz":
        with gzip.open(path, "rb") as unzipped, io.BufferedReader(unzipped, 1 << 20) as buffered:
            yield buffered
    else:
        with path.open("rb", buffering=1 << 20) as file:
            yield file


def _starts_with_bracket(path: Path) -> bool:
    with _opened(path) as file:
        while chunk := file.read(4096):
            if text := chunk.lstrip():
                return text.startswith(b"[")
    return False


def _json_lines(name: str, path: Path, notes: list[str]) -> Iterator[Row]:
    blank = 0
    with _opened(path) as file:
        for number, line in enumerate(file, 1):
            raw = line[:-2] if line.endswith(b"\r\n") else line[:-1] if line.endswith(b"\n") else line
            if not raw.strip():
                blank += 1
                continue
            origin = f"{name}:{number}"
            fields = _parse(raw, origin, lines=True)
            if not isinstance(fields, dict):
                cure = "; a file that is one JSON list must be named .json" if isinstance(fields, list) else ""
                raise DataError(f"{origin}: the line must hold a JSON object, got {json_type(fields)}{cure}")
            yield Row(origin, fields, raw)
    if blank:
        notes.append(f"{name}: {blank} blank lines were skipped")
        logger.warning(notes[-1])


def _json_list(name: str, path: Path, notes: list[str]) -> Iterator[Row]:
    with _opened(path) as file:
        rows = _parse(file.read(), name, lines=False)
    for number, fields in enumerate(rows):
        yield _compact_row(f"{name}: row {number}", fields)


def _refuse_constant(literal: str) -> NoReturn:
    raise ValueError(f"{literal} is not JSON; write null or leave the field out")


_DECODER = json.JSONDecoder(parse_constant=_refuse_constant)


def _parse(raw: bytes, origin: str, *, lines: bool) -> Any:
    """Returns the JSON value in `raw`; errors name line (of a file read at once) and column."""
    try:
        return _DECODER.decode(raw.decode("utf-8"))
    except UnicodeDecodeError as error:
        line, column = raw.count(b"\n", 0, error.start) + 1, error.start - raw.rfind(b"\n", 0, error.start)
        place = origin if lines else f"{origin}:{line}"
        raise DataError(
            f"{place}: text must be UTF-8, got byte 0x{raw[error.start]:02x} at byte {column} of the line; convert it, "
            f"for example with: iconv -f latin1 -t utf-8"
        ) from error
    except json.JSONDecodeError as error:
        place = origin if lines else f"{origin}:{error.lineno}"
        if raw.startswith(b"\xef\xbb\xbf"):
            cure = r"remove it, for example with: sed -i '1s/^\xEF\xBB\xBF//'"
            raise DataError(f"{place}: text must be UTF-8 without a byte-order mark, got one; {cure}") from error
        cure = ""
        if lines and raw.strip() in (b"{", b"["):
            cure = "; a file must hold one object a line, or one list of objects and be named .json"
        raise DataError(f"{place}: not JSON at column {error.colno}: {error.msg}{cure}") from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"{origin}: not JSON that can be read: {error}") from error


# --- columns ------------------------------------------------------------------------------------------------------------


def _parquet(name: str, path: Path, notes: list[str]) -> Iterator[Row]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as file:
            yield from _batches(name, file.iter_batches(batch_size=_BATCH))
    except pa.ArrowException as error:
        raise DataError(f"{name}: not a Parquet file that can be read: {error}") from error


def _arrow(name: str, path: Path, notes: list[str]) -> Iterator[Row]:
    import pyarrow as pa

    try:
        with pa.OSFile(str(path)) as file:
            is_file = file.read(6) == b"ARROW1"
            file.seek(0)
            if is_file:
                reader = pa.ipc.open_file(file)
                yield from _batches(name, map(reader.get_batch, range(reader.num_record_batches)))
            else:
                yield from _batches(name, pa.ipc.open_stream(file))
    except pa.ArrowException as error:
        raise DataError(f"{name}: not an Arrow file or stream that can be read: {error}") from error


def _dataset_folder(name: str, folder: Path, split: str | None) -> Iterator[Row]:
    import datasets

    if not any((folder / marker).exists() for marker in ("state.json", "dataset_dict.json")):
        inside = ", ".join(sorted(p.name for p in folder.iterdir())[:5]) or "nothing"
        raise DataError(f"{folder}: must be a folder written by datasets.save_to_disk, got one with {inside}; name files")
    try:
        loaded = datasets.load_from_disk(str(folder))
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{folder}: not a dataset folder that can be read: {error}") from error
    if isinstance(loaded, dict):
        splits = ", ".join(loaded)
        if split is None and len(loaded) > 1:
            raise DataError(f"{folder}: one of its splits must be named, got {splits}; write {folder}:{next(iter(loaded))}")
        if split is not None and split not in loaded:
            raise DataError(f"{folder}: the split must be one of {splits}, got {split!r}; write {folder}:{next(iter(loaded))}")
        loaded = loaded[split or next(iter(loaded))]
    elif split is not None and split != str(loaded.split):
        raise DataError(f"{folder}: holds a single dataset, and no split {split!r}; write {folder}")
    yield from _batches(name, loaded.with_format("arrow").iter(_BATCH))


def _batches(name: str, batches: Any) -> Iterator[Row]:
    """Yields the rows of Arrow record batches or tables."""
    number = 0
    for batch in batches:
        for start in range(0, batch.num_rows, _BATCH):
            for fields in batch.slice(start, _BATCH).to_pylist():
                yield _compact_row(f"{name}: row {number}", fields)
                number += 1


def _compact_row(origin: str, fields: Any) -> Row:
    if not isinstance(fields, dict):
        raise DataError(f"{origin}: the row must be a JSON object, got {json_type(fields)}")
    try:
        return Row(origin, fields, _compact(fields))
    except (TypeError, ValueError):
        for key, value in fields.items():
            try:
                _compact(value)
            except (TypeError, ValueError) as error:
                raise DataError(f'{origin}: "{key}" must be a JSON value: {error}; drop or convert it') from error
        raise


def _compact(value: Any) -> bytes:
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"), default=_iso_time)
    return text.encode()


def _iso_time(value: Any) -> str:
    if hasattr(value, "isoformat"):  # date, time, datetime
        return str(value.isoformat())
    raise TypeError(f"got {type(value).__name__}")


_JSON_TYPES = {dict: "an object", list: "a list", str: "a string", bool: "a boolean", int: "a number", float: "a number"}


def json_type(value: Any) -> str:
    """Returns the JSON name of the value's type with its article, for messages."""
    return "null" if value is None else _JSON_TYPES.get(type(value), type(value).__name__)
