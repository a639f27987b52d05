"""What watched layers read, kept from the forward to the backward pass.

A `Reading` is one tensor that one or more layers read (q, k and v; gate and up), with the work on it that they share. A `Call`
is one call of one layer. Once it is known that nothing but a projection and a Gram matrix is wanted of a tensor, these are
made and the tensor is let go.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from gradsieve.errors import ModelError
from gradsieve.gradients.parameters import Site


class Reading:
    """One tensor that layers read.

    Attributes:
        name: The first reader's parameter name: it names the projection that all readers share.
        sharers: How many layers read it.
        projected: a P [B, T, k], once made.
        gram: a aᵀ [B, T, T], once made.
        sums: Σ over d_in of a, [B, T], once made.
    """

    def __init__(self, tensor: Tensor, name: str) -> None:
        self.name = name
        self.sharers = 1
        self.calls: list[Call] = []
        self.projected: Tensor | None = None
        self.gram: Tensor | None = None
        self.sums: Tensor | None = None
        self._tensor: Tensor | None = tensor.detach()
        self._version = tensor._version

    def is_of(self, tensor: Tensor) -> bool:
        """Says whether a tensor is the one of this reading: the same memory read in the same way."""
        mine = self._tensor
        return mine is not None and (
            mine.data_ptr() == tensor.data_ptr()
            and mine.shape == tensor.shape
            and mine.stride() == tensor.stride()
            and mine.dtype == tensor.dtype
        )

    @property
    def tensor(self) -> Tensor:
        """The tensor itself.

        Raises:
            ModelError: The model has changed it in place since, or it was let go.
        """
        if self._tensor is None:
            raise ModelError(
                f"the layer of {self.name} must be called as often for every batch, got one more call than in a trial run; "
                "leave it out with --params re:PATTERN"
            )
        if self._tensor._version != self._version:
            raise ModelError(
                f"the input of {self.name} must stay as it is until the backward pass, got one that the model overwrites "
                "in place; leave the layer out with --params re:PATTERN"
            )
        return self._tensor

    @property
    def gone(self) -> bool:
        """Whether the tensor was let go."""
        return self._tensor is None

    def let_go(self) -> None:
        """Frees the tensor."""
        self._tensor = None


@dataclass(eq=False, slots=True)
class Call:
    """One call of a watched layer; `gradient` arrives in the backward pass, if the loss depends on this call at all."""

    module: nn.Module
    sites: list[Site]
    reading: Reading
    gradient: Tensor | None = None


def joined(calls: list[Call]) -> tuple[Reading, Tensor]:
    """Returns a layer's input and output gradient; several calls come one after the other, as if T were longer."""
    gradients = [call.gradient for call in calls if call.gradient is not None]
    if len(calls) == 1:
        return calls[0].reading, gradients[0]
    return Reading(torch.cat([call.reading.tensor for call in calls], 1), calls[0].reading.name), torch.cat(gradients, 1)


@dataclass(eq=False, slots=True)
class Trial:
    """Counts how often each watched module is called, in a forward pass on a few tokens."""

    counts: dict[nn.Module, int] = field(default_factory=dict)

    def saw(self, module: nn.Module) -> None:
        """Counts a call."""
        self.counts[module] = self.counts.get(module, 0) + 1

    def repeated(self) -> frozenset[nn.Module]:
        """Returns the modules called more than once."""
        return frozenset(module for module, count in self.counts.items() if count > 1)
