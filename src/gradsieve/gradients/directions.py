"""Reference directions: mean gradients of sets of examples, and their stack that every example is multiplied with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Self

import torch
from torch import Tensor

from gradsieve.errors import InvalidArgument
from gradsieve.gradients.layers import squared_norm
from gradsieve.gradients.sketch import SketchPlan
from gradsieve.types import Reference

SPLITS = 5  # random splits behind a split-half rank correlation: one alone is noisy with few examples
WIDE = "wide sketch"  # stands in for a parameter's name where directions are sketches of all parameters


@dataclass(eq=False)
class MeanGradient:
    """A mean gradient (OGS-1), or the difference of two (OGS-10): one tensor per parameter, [d_out, d_in].

    Attributes:
        tensors: By parameter name; vectors are [n, 1].
        count: Examples summed (of the first set, for a difference).
        noise: Mean per-example variance over count: the squared length that sampling alone gives the mean.
        dtype: The model's own precision, that of the products with this direction.
        sketched: Whether the examples' sketches are kept.
        sketches: float32 [b, d] per batch, in the order of adding.
        squares: float64 [b] per batch, every example's squared norm, likewise.
    """

    tensors: dict[str, Tensor]
    count: int = 0
    noise: float = 0.0
    dtype: torch.dtype = torch.float32
    sketched: bool = False
    sketches: list[Tensor] = field(default_factory=list)
    squares: list[Tensor] = field(default_factory=list)

    @classmethod
    def zeros(cls, shapes: Mapping[str, tuple[int, int]], like: Tensor, *, sketched: bool = False) -> Self:
        """Returns an empty sum, float32 (float64 for a float64 model)."""
        dtype = torch.promote_types(like.dtype, torch.float32)
        zeros = {name: torch.zeros(shape, dtype=dtype, device=like.device) for name, shape in shapes.items()}
        return cls(zeros, dtype=like.dtype, sketched=sketched)

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
        self.squares.append(squares)

    def finish(self) -> Self:
        """Divides the sums by the count, once."""
        if self.count < 2:
            raise InvalidArgument(f"a reference set must hold at least 2 usable examples, got {self.count}; add some")
        for tensor in self.tensors.values():
            tensor /= self.count
        squares = sum(float(part.sum()) for part in self.squares)
        variance = (squares / self.count - self.squared_norm()) * self.count / (self.count - 1)
        self.noise = variance / self.count
        return self

    def squared_norm(self) -> float:
        """Returns ‖r‖²."""
        return float(sum(squared_norm(tensor[None]).sum() for tensor in self.tensors.values()))

    def minus(self, other: MeanGradient, pairs: Sequence[Tensor] | None = None, sizes: Tensor | None = None) -> MeanGradient:
        """Returns the contrast D = self - other (OGS-10), emptying `other` to bound the memory.

        Its noise is that of paired differences d_u = g_u - g'_u where `pairs` is given, Σ n_u ‖d_u - D‖² / (m (U - 1)) with
        m = Σ n_u, and ‖d_u‖² estimated without bias by ‖S d_u‖²: a right and a wrong answer to one prompt share most of their
        gradient, and what they share is no noise of their difference. Without pairs it is the sum of both noises.

        Args:
            other: The mean of the corrupted copies.
            pairs: float32 [U, d] twice, the sketches of the examples and, in the same order, of their copies; or the means of
                groups of pairs that are independent of each other where the pairs are not.
            sizes: n_u, the pairs in each group: [U]; one each by default.
        """
        tensors = {name: other.tensors.pop(name).neg_().add_(tensor) for name, tensor in self.tensors.items()}
        contrast = MeanGradient(tensors, self.count, self.noise + other.noise, self.dtype)
        if pairs is not None:
            squares = (pairs[0] - pairs[1]).double().square().sum(1)
            share = torch.ones_like(squares) if sizes is None else sizes.to(squares)
            mean = float((share * squares).sum() / share.sum())
            contrast.noise = (mean - contrast.squared_norm()) / (len(squares) - 1)
        return contrast

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
        wide: The projection, where the directions are sketches (`gradsieve.gradients.wide`): [r, 1, d] under `WIDE`.
        halves: What `halves` returns of every reference's examples, by name; empty where the directions are sketches.
    """

    names: tuple[str, ...] = ()
    tensors: Mapping[str, Tensor] = field(default_factory=dict)
    facts: Mapping[str, Reference] = field(default_factory=dict)
    wide: SketchPlan | None = None
    halves: Mapping[str, Tensor] = field(default_factory=dict)

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
    def of_units(cls, units: Mapping[str, UnitDirection], wide: SketchPlan | None = None) -> References:
        """Returns the stack of unit directions, emptying them parameter by parameter; `wide` where they are sketches."""
        tensors, gram = {}, torch.zeros(len(units), len(units), dtype=torch.float64)
        for key in list(next(iter(units.values())).tensors) if units else ():
            tensors[key] = torch.stack([unit.tensors.pop(key) for unit in units.values()])
            gram += _products(tensors[key].flatten(1))
        length = gram.diagonal().sqrt()  # 1 but for the rounding of the directions
        cosines = (gram / torch.outer(length, length)).tolist()
        names = tuple(units)
        facts = {
            name: replace(units[name].fact, cosines=dict(zip(names, row, strict=True)))
            for name, row in zip(names, cosines, strict=True)
        }
        return cls(names, tensors, facts, wide)

    @property
    def full(self) -> bool:
        """Whether there are directions, and they are whole gradients."""
        return bool(self.names) and self.wide is None

    def of(self, key: str) -> Tensor:
        """Returns the directions' part of one parameter, [r, d_out, d_in]; r is 0 without full references."""
        return self.tensors[key] if self.full else torch.empty(0, 0, 0)


def halves(sketches: Tensor) -> Tensor:
    """Returns the mean sketches of both halves of a set, split at random `SPLITS` times: float32 [SPLITS, 2, d].

    Args:
        sketches: float32 [m, d] of its m >= 2 examples (for a contrast: of the paired differences), in an order that does not
            depend on that of the input.
    """
    rng = torch.Generator().manual_seed(0)
    splits = (torch.randperm(len(sketches), generator=rng).tensor_split(2) for _ in range(SPLITS))
    return torch.stack([torch.stack([sketches[half].mean(0) for half in split]) for split in splits])


def _products(rows: Tensor) -> Tensor:
    """Returns the products of rows [r, n] with each other, float64 [r, r]; converted in parts to bound the memory."""
    total = torch.zeros(len(rows), len(rows), dtype=torch.float64)
    for part in rows.split(1 << 20, dim=1):
        wide = part.to(torch.promote_types(part.dtype, torch.float32))
        total += (wide @ wide.T).double().cpu()
    return total


def _product_dtype(model: torch.dtype) -> torch.dtype:
    """Returns what directions are kept in: bfloat16 for such models; float16 has no room for a unit vector's entries."""
    return model if model in (torch.bfloat16, torch.float64) else torch.float32
