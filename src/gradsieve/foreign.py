"""What other libraries do to the whole process, taken back: random states they seed, what they print that helps nobody."""

from __future__ import annotations

import logging
import random
import warnings
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def known_renames() -> Iterator[None]:
    """Hides transformers' warnings that trl and peft still call activation checkpointing by its old name."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", r"`\w*gradient_checkpointing\w*` is deprecated", FutureWarning)
        yield


@contextmanager
def alone_on_purpose() -> Iterator[None]:
    """Hides transformers' advice to take a launcher, where one of a launcher's processes trains without the others."""

    def other(record: logging.LogRecord) -> bool:
        return "process group is initialized, but parallel_mode" not in record.getMessage()

    logger = logging.getLogger("transformers.training_args")
    logger.addFilter(other)
    try:
        yield
    finally:
        logger.removeFilter(other)


@contextmanager
def without_git() -> Iterator[None]:
    """Keeps lm-eval from asking git for the current folder's commit: where there is none, git prints that this is fatal."""
    from lm_eval import evaluator

    before = evaluator.get_git_commit_hash
    evaluator.get_git_commit_hash = lambda: None
    try:
        yield
    finally:
        evaluator.get_git_commit_hash = before


@contextmanager
def own_randomness() -> Iterator[None]:
    """Gives the caller's global random states back afterwards: of random, numpy and torch."""
    import numpy as np
    import torch

    states = random.getstate(), np.random.get_state()  # noqa: NPY002
    try:
        with torch.random.fork_rng():
            yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])  # noqa: NPY002
