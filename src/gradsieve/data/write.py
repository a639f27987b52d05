"""Writing examples and lines, each file whole or not at all."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from gradsieve.atomic import replacing
from gradsieve.errors import InvalidArgument
from gradsieve.types import Example


def write_jsonl(path: str | Path, examples: Iterable[Example]) -> int:
    """Writes each example's raw bytes and a newline, and returns how many there were.

    Reading the file again gives the same raw bytes in the same order. An existing file is replaced; a failed or interrupted
    write leaves it as it was.

    Raises:
        DataError: The file cannot be written; the message has the cause and the cure.
    """
    return write_lines(path, (example.raw for example in examples))


def write_lines(path: str | Path, lines: Iterable[bytes]) -> int:
    """Writes each line and a newline, atomically, and returns how many there were.

    Raises:
        DataError: The file cannot be written.
        InvalidArgument: A line holds a newline, or `path` ends in .gz (nothing is compressed here).
    """
    path = Path(path)
    if path.suffix.lower() == ".gz":
        raise InvalidArgument(f"path must not end in .gz, got {path}; write plain lines and compress them afterwards")
    count = 0
    with replacing(path) as file:
        for line in lines:
            if b"\n" in line:
                raise InvalidArgument(f"line {count + 1} of {path} must not hold a newline, got one; write it as compact JSON")
            file.write(line)
            file.write(b"\n")
            count += 1
    return count
