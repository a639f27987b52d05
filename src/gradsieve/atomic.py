"""Writing files whole or not at all: to a temporary name beside the target, fsync, rename or link."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import secrets
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from gradsieve.errors import DataError, InvalidArgument

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


def write_atomically(path: Path, content: bytes) -> None:
    """Writes a file so that it is there whole or not at all, also after a power cut.

    Raises:
        DataError: The file cannot be written; the message has the cause and the cure.
    """
    with replacing(path) as file:
        file.write(content)


def write_new(path: Path, content: bytes) -> bool:
    """Writes a file whole, unless there is one of that name; returns whether it did.

    Where a disk knows no hard links, two processes may both write, and the later stays.

    Raises:
        DataError: The file cannot be written; the message has the cause and the cure.
    """
    own = path.with_name(f".{path.name}.{secrets.token_hex(4)}.new")
    write_atomically(own, content)
    try:
        os.link(own, path)
    except FileExistsError:
        return False
    except OSError:
        own.replace(path)
    finally:
        own.unlink(missing_ok=True)
    _sync_folder(path.parent)
    return True


def require_writable(folder: Path) -> None:
    """Makes a folder where there is none.

    Raises:
        InvalidArgument: It cannot be made, or nothing can be written to it.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise InvalidArgument(f"out must be a folder one can write to, got {folder}: {error.strerror}; name another") from None


def write_json(path: Path, values: Any) -> None:
    """Writes values as JSON that is there whole or not at all.

    Raises:
        DataError: The file cannot be written; the message has the cause and the cure.
    """
    write_atomically(path, json.dumps(values, indent=1).encode())


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[IO[bytes]]:
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
