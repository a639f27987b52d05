"""Give freed memory back to the system: batches of ever other shapes leave glibc's heap full of holes, 1 GiB in 20 batches."""

from __future__ import annotations

import ctypes
import os
import sys
from pathlib import Path

HOLES = 256 << 20  # bytes of growth since the last call that gave back, below which nothing is done


class Trimmer:
    """Trims the heap whenever the process has grown by `HOLES` bytes; does nothing where there is no glibc."""

    def __init__(self) -> None:
        library = ctypes.CDLL(None) if sys.platform.startswith("linux") else None
        self._trim = getattr(library, "malloc_trim", None)  # glibc has it, musl has not
        self._after = 0

    def __call__(self) -> None:
        if self._trim is not None and resident() > self._after + HOLES:
            self._trim(0)
            self._after = resident()


def resident() -> int:
    """Returns the process's resident memory in bytes (Linux)."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")
