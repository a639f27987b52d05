"""Reference directions: mean gradients of sets of examples, and their stack that every example is multiplied with."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Self

import torch
from torch import Tensor

from gradsieve.errors import InvalidArgument
from gradsieve.gradients.layers import squared_norm
from gradsieve.types import Reference


@dataclass(eq=False)
class MeanGradient:
    """A mean gradient (OGS-1), or the difference of two (OGS-10): one tensor per parameter, [d_out, d_in].

    Attributes:
        tensors: By parameter name; vectors are [n, 1].
        count: Examples summed (of the first set, for a difference).
        noise: Mean per-example variance over count: the squared length that sampling alone gives the mean.
        dtype: The model's own precision, that of the products with this direction.
    """

    tensors: dict[str, Tensor]
    count: int = 0
    noise: float = 0.0
    dtype: torch.dtype = torch.float32
    _squares: float = 0.0

    @classmethod
    def zeros(cls, shapes: Mapping[str, tuple[int, int]], like: Tensor) -> Self:
        """Returns an empty sum, float32 (float64 for a float64 model)."""
        dtype = torch.promote_types(like.dtype, torch.float32)
        zeros = {name: torch.zeros(shape, dtype=dtype, device=like.device) for name, shape in shapes.items()}
        return cls(zeros, dtype=like.dtype)

    def add_product(self, name: str, b: Tensor, a: Tensor, part: slice = slice(None)) -> None:
        """Adds Σ_n b_n a_nᵀ to some rows of a tensor; b is [N, d_out], a [N, d_in]. Half precision is added up in float32."""
        tensor = self.tensors[name][part]
        if a.dtype == tensor.dtype:
            tensor.addmm_(b.T, a)
        else:
            tensor += b.T @ a

    def add_norms(self, squares: Tensor, tokens: Tensor) -> None:
        """Counts examples whose gradients were added, by their squared norms and completion tokens, [B] each."""
        if not tokens.all():
            without = int((tokens == 0).sum())
            raise InvalidArgument(
                f"every example of a reference set must have completion tokens, got {without} without; drop them"
            )
        if not squares.isfinite().all():
            raise InvalidArgument(
                "a reference set must have finite gradients only; drop the examples with infinite or NaN loss"
            )
        self.count += len(squares)
        self._squares += float(squares.sum())

    def finish(self) -> Self:
        """Divides the sums by the count, once."""
        if self.count < 2:
            raise InvalidArgument(f"a reference set must hold at least 2 usable examples, got {self.count}; add some")
        for tensor in self.tensors.values():
            tensor /= self.count
        variance = (self._squares / self.count - self.squared_norm()) * self.count / (self.count - 1)
        self.noise = variance / self.count
        return self

    def squared_norm(self) -> float:
        """Returns ‖r‖²."""
        return float(sum(squared_norm(tensor[None]).sum() for tensor in self.tensors.values()))

    def minus(self, other: MeanGradient) -> MeanGradient:
        """Returns the contrast self - other (OGS-10), emptying `other` to bound the memory; its noise is the sum of both."""
        tensors = {name: other.tensors.pop(name).neg_().add_(tensor) for name, tensor in self.tensors.items()}
        return MeanGradient(tensors, self.count, self.noise + other.noise, self.dtype)

    def facts(self) -> Reference:
        """Returns norm, count and signal share."""
        squares = self.squared_norm()
        return Reference(norm=squares**0.5, count=self.count, signal_share=1 - self.noise / squares if squares else 0.0)


@dataclass(frozen=True, eq=False)
class UnitDirection:
    """One reference as it is kept: r/‖r‖ in the type of the products, half the size of the mean for a bfloat16 model.

    Attributes:
        tensors: By parameter name, [d_out, d_in].
        fact: What is known about the direction.
    """

    tensors: dict[str, Tensor]
    fact: Reference

    @classmethod
    def of(cls, name: str, mean: MeanGradient) -> UnitDirection:
        """Returns the unit direction of a mean gradient.

        Raises:
            InvalidArgument: The mean gradient is zero.
        """
        fact = mean.facts()
        if not fact.norm > 0:
            raise InvalidArgument(f"reference {name!r} must have a gradient above 0, got norm {fact.norm}")
        dtype = _product_dtype(mean.dtype)
        return cls({key: (tensor / fact.norm).to(dtype) for key, tensor in mean.tensors.items()}, fact)


@dataclass(frozen=True, eq=False)
class References:
    """Unit directions, stacked per parameter so that one product serves them all.

    Attributes:
        names: r names.
        tensors: [r, d_out, d_in] by parameter name, every direction of norm 1 over all parameters.
        facts: What is known about each.
    """

    names: tuple[str, ...] = ()
    tensors: Mapping[str, Tensor] = field(default_factory=dict)
    facts: Mapping[str, Reference] = field(default_factory=dict)

    @classmethod
    def stack(cls, means: Mapping[str, MeanGradient]) -> References:
        """Returns the unit directions of `means`, emptying them parameter by parameter to bound the memory.

        Raises:
            InvalidArgument: A mean gradient is zero.
        """
        units = {name: UnitDirection.of(name, mean) for name, mean in means.items()}
        for mean in means.values():  # the same mean may stand under two names
            mean.tensors.clear()
        return cls.of_units(units)

    @classmethod
    def of_units(cls, units: Mapping[str, UnitDirection]) -> References:
        """Returns the stack of unit directions, emptying them parameter by parameter."""
        tensors = {}
        for key in list(next(iter(units.values())).tensors) if units else ():
            tensors[key] = torch.stack([unit.tensors.pop(key) for unit in units.values()])
        return cls(tuple(units), tensors, {name: unit.fact for name, unit in units.items()})

    def of(self, key: str) -> Tensor:
        """Returns the directions' part of one parameter, [r, d_out, d_in]; r is 0 without references."""
        return self.tensors[key] if self.names else torch.empty(0, 0, 0)


def _product_dtype(model: torch.dtype) -> torch.dtype:
    """Returns what directions are kept in: bfloat16 for such models; float16 has no room for a unit vector's entries."""
    return model if model in (torch.bfloat16, torch.float64) else torch.float32
