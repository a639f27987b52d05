"""Writing files whole or not at all: to a temporary name beside the target, fsync, rename."""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO

from gradsieve.errors import DataError, InvalidArgument
from gradsieve.types import Example

_CURES = {
    errno.ENOSPC: "free space or write to another disk",
    errno.EDQUOT: "free space or write to another disk",
    errno.EFBIG: "free space or write to another disk",
    errno.EACCES: "choose a folder you may write to",
    errno.EPERM: "choose a folder you may write to",
    errno.EROFS: "choose a folder you may write to",
    errno.ENOENT: "create the folder first",
    errno.ENOTDIR: "choose a path below a folder",
    errno.EISDIR: "name a file, not a folder",
    errno.ENAMETOOLONG: "choose a shorter name",
}


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
    with _replacing(path) as file:
        for line in lines:
            if b"\n" in line:
                raise InvalidArgument(f"line {count + 1} of {path} must not hold a newline, got one; write it as compact JSON")
            file.write(line)
            file.write(b"\n")
            count += 1
    return count


@contextlib.contextmanager
def _replacing(path: Path) -> Iterator[IO[bytes]]:
    """Gives a file that takes the place of `path` when the block ends without an exception."""
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        if path.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
        try:
            with temporary.open("xb", buffering=1 << 20) as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
            _sync_folder(path.parent)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
    except OSError as error:
        cure = _CURES.get(error.errno or 0, "choose another path")
        raise DataError(f"{path}: cannot be written: {error.strerror or error}; {cure}") from error


def _sync_folder(folder: Path) -> None:
    """Makes a rename in the folder survive a power cut, where folders can be opened (not on Windows)."""
    if os.name != "posix":
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
