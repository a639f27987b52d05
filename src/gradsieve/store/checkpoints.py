"""The same examples at several checkpoints of a model: one store each, one view of all."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from gradsieve.types import Gradients


class CheckpointGradients:
    """`Gradients` of the same rows at several checkpoints; columns are those of the last.

    Args:
        views: One per checkpoint by name, in the order of training, with the same ids in the same order.
    """

    def __init__(self, views: Mapping[str, Gradients]) -> None:
        self._views = dict(views)
        self._last = list(self._views.values())[-1]
        assert all(list(view.ids) == list(self._last.ids) for view in self._views.values())
        self.checkpoints: tuple[str, ...] = tuple(self._views)

    @property
    def ids(self) -> Sequence[str]:
        return self._last.ids

    @property
    def dim(self) -> int:
        return self._last.dim

    @property
    def columns(self) -> Mapping[str, Tensor]:
        return self._last.columns

    @property
    def finite(self) -> Tensor:
        """Which rows have finite columns at every checkpoint: bool [n]."""
        return torch.stack([finite_rows(view) for view in self._views.values()]).all(0)

    @property
    def representations(self) -> Sequence[str]:
        """Matrices beside the sketches, at the last checkpoint."""
        return getattr(self._last, "representations", ())

    def blocks(self, checkpoint: str | None = None) -> Iterator[tuple[Tensor, Tensor]]:
        """Yields (rows int64 [b], sketches float32 [b, d]) of a checkpoint, the first by default."""
        view, own = self._of(checkpoint)
        yield from view.blocks(own)

    def rows(self, index: Tensor, checkpoint: str | None = None) -> Tensor:
        """Returns the sketches of these rows at a checkpoint, the first by default: float32 [k, d]."""
        view, own = self._of(checkpoint)
        return view.rows(index, own)

    def _of(self, name: str | None) -> tuple[Gradients, str | None]:
        if name in self.representations:
            return self._last, name
        return self._views[name or self.checkpoints[0]], None


def finite_rows(gradients: Gradients) -> Tensor:
    """Returns which rows have nothing but finite columns: bool [n]."""
    return torch.stack([column.isfinite() for column in gradients.columns.values()]).all(0)
