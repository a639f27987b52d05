"""A comparison in the processes of a launcher (torchrun, accelerate launch): all train, the first does everything else."""

from __future__ import annotations

import atexit
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from gradsieve.errors import GradsieveError, InvalidArgument
from gradsieve.foreign import alone_on_purpose

_LAUNCHED = ("RANK", "LOCAL_RANK", "WORLD_SIZE")  # by which a trainer knows that it is one of several
_SHARDED = ("ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED")
_LONGEST_WAIT = timedelta(days=365)  # of the others for the first, which measures and takes gradients meanwhile


def launched() -> tuple[int, bool]:
    """Returns how many processes a launcher started together, and whether this is the first; of one alone it is."""
    size = int(os.environ.get("WORLD_SIZE", "1"))
    return size, size == 1 or os.environ.get("RANK") == "0"


class Team:
    """The processes of a launcher; a process that was started alone is a team of one, which waits for nobody.

    The first tells the others which training is next, with the objects they need for it. Outside of those trainings it works
    as if it had been started alone: a warm-up before gradients is no matter of the others.

    Attributes:
        size: How many processes.
        first: Whether this is the one that does everything else.
    """

    def __init__(self, device: str) -> None:
        """Meets the others.

        Raises:
            InvalidArgument: The launcher was told to shard weights.
        """
        self._launched = {name: os.environ[name] for name in _LAUNCHED if name in os.environ}
        self.size, self.first = launched()
        self._together = False
        if self.size == 1:
            return
        if sharded := [name for name in _SHARDED if os.environ.get(name, "").lower() == "true"]:
            raise InvalidArgument(
                f"a comparison must be launched with plain data parallelism, got {' and '.join(sharded)}: the first process "
                "measures the whole model"
            )
        from accelerate import PartialState

        with _one_line():
            PartialState(cpu=device == "cpu")  # opens the group that trainers will use
            self._group = dist.new_group(backend="gloo", timeout=_LONGEST_WAIT)

    @contextmanager
    def leading(self) -> Iterator[None]:
        """In the first process: whatever is done here, the others are told when it ends, by an error too."""
        if self.size == 1:
            yield
            return
        self._leave()
        try:
            with alone_on_purpose():
                yield
        except BaseException:
            if not self._together:  # in a training the others wait for its next step: they end when this process does
                self._part()
            raise
        else:
            self._part()
        finally:
            os.environ.update(self._launched)

    @contextmanager
    def training(self, *needed: Any) -> Iterator[int]:
        """In the first process: a training in which the others join, who get what is `needed` for it; gives their number."""
        if self.size == 1:
            yield 1
            return
        self._tell(needed)
        os.environ.update(self._launched)
        with self.joined():
            yield self.size
        self._leave()

    @contextmanager
    def joined(self) -> Iterator[None]:
        """In any process: a training of all, which each leaves when all are done."""
        self._together = True
        with _one_line():
            yield
            dist.barrier(self._group)
        self._together = False

    def told(self) -> Iterator[Any]:
        """In the others: yields what is needed for the next training, until the first ends."""
        while True:
            box: list[Any] = [None]
            with _one_line():
                dist.broadcast_object_list(box, src=0, group=self._group)
            if box[0] is None:
                atexit.register(_close)
                return
            yield box[0]

    def _tell(self, needed: Any) -> None:
        with _one_line():
            dist.broadcast_object_list([needed], src=0, group=self._group)

    def _part(self) -> None:
        """Tells the others that all is done."""
        self._tell(None)
        atexit.register(_close)

    def _leave(self) -> None:
        for name in self._launched:
            os.environ.pop(name, None)


def _close() -> None:
    """Ends torch's threads before the interpreter, which they would abort; for a process that nobody waits for any more."""
    if dist.is_initialized():
        dist.destroy_process_group()


@contextmanager
def _one_line() -> Iterator[None]:
    """Says in one line that another process has ended; its own message says why."""
    try:
        yield
    except RuntimeError as error:
        if not (isinstance(error, dist.DistError) or "gloo" in str(error)):
            raise
        reason = re.sub(r"^\[\S+\] ", "", str(error).strip()).partition(". ")[0].partition("\n")[0]
        raise GradsieveError(
            f"another process of the launcher has ended or is out of reach ({reason}); its message says why; the same command "
            "goes on with what is finished"
        ) from error
