"""What watched layers read, kept from the forward to the backward pass.

A `Reading` is one tensor that one or more layers read (q, k and v; gate and up), with the work on it that they share. A `Call`
is one call of one layer. Once it is known that nothing but a projection and a Gram matrix is wanted of a tensor, these are
made and the tensor is let go. Where it is wanted and is a product of two tensors that autograd keeps anyway, as the last layer
of a gated MLP reads, it is let go too, and multiplied again in the backward pass. Inside a checkpointed block nothing is kept:
the reading comes when the block is run again.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from gradsieve.errors import ModelError
from gradsieve.gradients.extremes import Ranked
from gradsieve.gradients.parameters import Site
from gradsieve.gradients.sketch import SketchPlan


class Reading:
    """One tensor that layers read.

    Attributes:
        name: The first reader's parameter name: it names the projection that all readers share.
        sharers: How many layers read it.
        projected: a P [B, T, k] by projection, once made.
        gram: a aᵀ in doubled bands, once made.
        sums: Σ over d_in of a, [B, T], once made.
        ranked: a by the norms of its columns, once made.
    """

    def __init__(self, tensor: Tensor, name: str) -> None:
        self.name = name
        self.sharers = 1
        self.calls: list[Call] = []
        self.projected: dict[SketchPlan, Tensor] = {}
        self.gram: list[Tensor] | None = None
        self.sums: Tensor | None = None
        self.ranked: Ranked | None = None
        self._tensor: Tensor | None = tensor.detach()
        self._made_by: Any = tensor.grad_fn
        self._relies = False
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
    def gone(self) -> bool:
        """Whether the tensor was let go, and will not come back."""
        return self._tensor is None and not self._relies

    @property
    def tensor(self) -> Tensor:
        """The tensor itself.

        Raises:
            ModelError: The model has changed it in place since, or it was let go.
        """
        if self._relies:
            product: Tensor = self._made_by._saved_self * self._made_by._saved_other
            return product.detach()
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

    def let_go(self) -> None:
        """Frees the tensor."""
        self._tensor = self._made_by = None

    def rely_on_graph(self) -> None:
        """Frees the tensor if autograd keeps two factors of it until its readers' gradients have arrived."""
        if self._tensor is None or getattr(self._made_by, "name", str)() != "MulBackward0":
            return
        factors = self._made_by._saved_self, self._made_by._saved_other
        if all(isinstance(factor, Tensor) and factor.shape == self._tensor.shape for factor in factors):
            self._tensor, self._relies = None, True


@dataclass(frozen=True, eq=False, slots=True)
class Routing:
    """Which rows of a fused experts layer's input [S, d] belong to whom; rows are sorted by expert, then by token.

    Attributes:
        example: int64 [S], ascending within an expert.
        counts: Rows per expert.
    """

    example: Tensor
    counts: list[int]


@dataclass(eq=False, slots=True)
class Call:
    """One call of a watched layer.

    Attributes:
        reading: What it read; None inside a checkpointed block until that is run again.
        gradients: By number of the output. They arrive in the backward pass, if the loss depends on this call at all.
        outputs: How many outputs can get one.
        routing: Of a fused experts layer.
        arguments: All arguments of a module that is to be run again.
    """

    module: nn.Module
    sites: list[Site]
    reading: Reading | None
    outputs: int = 1
    routing: Routing | None = None
    arguments: tuple[tuple[Any, ...], Mapping[str, Any]] = ((), {})
    gradients: dict[int, Tensor] = field(default_factory=dict)

    @property
    def complete(self) -> bool:
        """Whether everything has arrived."""
        return self.reading is not None and len(self.gradients) == self.outputs

    def forget(self) -> None:
        """Frees what it read and received."""
        self.reading, self.routing, self.arguments = None, None, ((), {})
        self.gradients.clear()


def joined(calls: list[Call]) -> tuple[Reading, Tensor]:
    """Returns a layer's input and output gradient; several calls come one after the other, as if T were longer."""
    readings = [call.reading for call in calls if call.reading is not None]
    gradients = [call.gradients[0] for call in calls]
    if len(calls) == 1:
        return readings[0], gradients[0]
    whole = Reading(torch.cat([reading.tensor for reading in readings], 1), readings[0].name)
    return whole, torch.cat(gradients, 1)
