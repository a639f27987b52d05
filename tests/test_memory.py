import sys

import pytest
import torch

from gradsieve.memory import HOLES, Trimmer, resident

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="resident memory is read from /proc")


def test_holes_are_given_back_once_the_process_has_grown() -> None:
    trim = Trimmer()
    trim()
    start = resident()
    # blocks below the allocator's threshold for maps of their own; every second one stays, so that the heap cannot shrink
    blocks = [torch.ones(25_000) for _ in range(2 * HOLES // 100_000 + 2000)]
    kept = blocks[::2]
    assert resident() > start + HOLES
    del blocks
    trim()
    assert resident() < start + 1.6 * HOLES
    assert sum(len(block) for block in kept) > 0
