"""The LM head: loss, its gradient at the hidden states, and the head's own per-example gradient, without B·T·V logits.

Logits exist at supervised positions only, for as many whole examples at once as stay below `LOGIT_FLOATS`, and become errors
e = ∂l/∂(W h + bias) in place, a few rows at a time while those are in the cache. A position's weight (1/T_z) is left out of e
and goes into h instead, which is so much smaller: G_z = Σ_t e_t (w_t h_t)ᵀ. An example too long for one run of positions has
its errors made again, in tiles of the vocabulary, for what needs all its positions at once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from gradsieve.errors import ModelError
from gradsieve.gradients.layers import TILE_FLOATS

LOGIT_FLOATS = 1 << 24
ROWS = 8  # rows of logits turned into errors at once: with 50,000 tokens, they just stay in the second-level cache
IGNORE = -100


@dataclass(frozen=True, slots=True)
class Supervised:
    """The supervised positions of a batch, example by example.

    Attributes:
        example: int64 [N], ascending.
        position: int64 [N], where the hidden state that predicts stands.
        target: int64 [N], the token it must predict.
        weight: [N], the factor of this position's loss: 1/T_z, or 1, times the example's scale.
        spans: Per example its (first, last + 1) in the N positions.
    """

    example: Tensor
    position: Tensor
    target: Tensor
    weight: Tensor
    spans: list[tuple[int, int]]

    @classmethod
    def of(cls, labels: Tensor, reduction: str, dtype: torch.dtype, scale: Tensor | None = None) -> Supervised:
        """Returns the positions that labels [B, T] (unshifted) supervise; `scale` [B] multiplies each example's weights."""
        shifted = labels[:, 1:]
        example, position = (shifted != IGNORE).nonzero(as_tuple=True)
        counts = torch.bincount(example, minlength=len(labels))
        weight = (1.0 / counts.to(dtype))[example] if reduction == "mean" else torch.ones_like(example, dtype=dtype)
        if scale is not None:
            weight = weight * scale.to(dtype)[example]
        ends = counts.cumsum(0).tolist()
        starts = [0, *ends[:-1]]
        return cls(example, position, shifted[example, position], weight, list(zip(starts, ends, strict=True)))

    def runs(self, most: int) -> Iterator[tuple[int, int, list[int]]]:
        """Yields (first, last + 1, examples wholly inside), as many whole examples as `most` positions hold.

        An example of more than `most` positions comes in several runs, each with an empty list of whole examples.
        """
        first, whole = 0, list[int]()
        for z, (start, end) in enumerate(self.spans):
            if end - first > most and first < start:
                yield first, start, whole
                first, whole = start, []
            if end - start > most:
                for begin in range(start, end, most):
                    yield begin, min(begin + most, end), []
                first = end
            elif end > start:
                whole.append(z)
        if first < len(self.example):
            yield first, len(self.example), whole

    def inside(self, first: int, last: int) -> Iterator[tuple[int, slice]]:
        """Yields (example, its rows counted from `first`) for all examples with positions in [first, last)."""
        for z, (start, end) in enumerate(self.spans):
            if max(start, first) < min(end, last):
                yield z, slice(max(start, first) - first, min(end, last) - first)


Errors = Callable[[slice | Tensor], Tensor]
"""Gives an example's errors e for a part of the vocabulary (a range, or token ids), [T_z, part]."""


def scaling(config: Any) -> tuple[float, float]:
    """Returns what a model does to W h + bias: its factor (1 where it has none) and its soft cap (0 where it has none)."""
    factor = 1.0
    if getattr(config, "logits_scaling", None):
        factor = 1.0 / float(config.logits_scaling)
    elif getattr(config, "logit_scale", None):
        factor = float(config.logit_scale)
    return factor, float(getattr(config, "final_logit_softcapping", None) or 0.0)


def shape_logits(raw: Tensor, factor: float, cap: float) -> Tensor:
    """Returns the logits that a model makes of W h + bias."""
    if factor != 1.0:
        raw = raw * factor
    return (raw / cap).tanh_().mul_(cap) if cap else raw


class Head:
    """The output layer of a causal language model: logits = f(W h + bias).

    f is the identity, a factor (Granite, Cohere) or a soft cap (Gemma 2); which one is read from the configuration and
    checked against the model's own logits by `GradientEngine`.
    """

    def __init__(self, model: Any) -> None:
        module = model.get_output_embeddings()
        if not isinstance(module, nn.Linear):
            raise ModelError(
                f"the model's output layer must be nn.Linear, got {type(module).__name__}; "
                "merge adapters of the LM head before extraction"
            )
        self.module = module
        self.factor, self.cap = scaling(model.config)
        self.dtype = torch.promote_types(module.weight.dtype, torch.float32)
        self._memory = torch.empty(0)

    def logits(self, hidden: Tensor, vocabulary: slice | Tensor = slice(None)) -> Tensor:
        """Returns the logits of hidden states [N, D] over a part of the vocabulary, float32 (float64 for such models)."""
        bias = self.module.bias[vocabulary] if self.module.bias is not None else None
        return self._shaped(nn.functional.linear(hidden, self.module.weight[vocabulary], bias).to(self.dtype))

    def _shaped(self, raw: Tensor) -> Tensor:
        """Applies f to W h + bias."""
        return shape_logits(raw, self.factor, self.cap)

    def _slope(self, logits: Tensor) -> Tensor | float:
        """The derivative of f, from its value."""
        return (1 - (logits / self.cap).square()).mul_(self.factor) if self.cap else self.factor

    def backward(
        self,
        hidden: Tensor,
        supervised: Supervised,
        on_run: Callable[[int, int, Tensor, Tensor], None] | None = None,
        on_example: Callable[[int, Tensor, Errors], None] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Returns every position's negative log-likelihood and the loss's gradient at the hidden states.

        Args:
            hidden: Hidden states at the supervised positions, [N, D], detached.
            supervised: Where they stand and what they must predict.
            on_run: Called with (first, last + 1, errors [run, V], weighted hidden states [run, D]) for every run of positions.
            on_example: Called once per example with positions: (z, weighted hidden states [T_z, D], its errors).

        Returns:
            nll [N] (unweighted, nats) and gradient [N, D] in the dtype of `hidden`.
        """
        vocabulary = self.module.weight.shape[0]
        most = max(1, LOGIT_FLOATS // vocabulary)
        nll, log_total = hidden.new_empty(2, len(hidden), dtype=self.dtype)
        gradient = torch.empty_like(hidden)
        weight = supervised.weight.to(self.dtype)[:, None]
        weighted = (hidden * weight).to(hidden.dtype) if on_run or on_example else hidden
        for first, last, whole in supervised.runs(most):
            run = slice(first, last)
            error = self._logits_in_place(hidden[run])
            nll[run], log_total[run] = self._errors_in_place(error, supervised.target[run])
            gradient[run] = (error @ self.module.weight) * weight[run]
            if on_run:
                on_run(first, last, error, weighted[run])
            for z in whole if on_example else ():
                start, end = supervised.spans[z]
                on_example(z, weighted[start:end], _part_of(error[start - first : end - first]))  # type: ignore[misc]
        for z, (start, end) in enumerate(supervised.spans if on_example else ()):
            if end - start > most:
                span = slice(start, end)
                on_example(z, weighted[span], self._long(hidden[span], supervised.target[span], log_total[span]))  # type: ignore[misc]
        return nll, gradient

    def _logits_in_place(self, hidden: Tensor) -> Tensor:
        """Returns W h + bias [N, V] in reused memory."""
        shape = len(hidden), self.module.weight.shape[0]
        if self._memory.numel() < shape[0] * shape[1]:
            self._memory = hidden.new_empty(shape[0] * shape[1])
        out = self._memory[: shape[0] * shape[1]].view(shape)
        torch.mm(hidden, self.module.weight.T, out=out)
        return out if self.module.bias is None else out.add_(self.module.bias)

    def _errors_in_place(self, raw: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """Turns W h + bias [N, V] into errors; returns each position's negative log-likelihood and log-sum of logits, [N]."""
        nll, log_total = [], []
        for part, right in zip(raw.split(ROWS), target.split(ROWS), strict=True):
            logits = self._shaped(part.to(self.dtype))
            log_p = torch.log_softmax(logits, 1)
            nll.append(-log_p.gather(1, right[:, None])[:, 0])
            log_total.append(nll[-1] + logits.gather(1, right[:, None])[:, 0])
            error = log_p.exp_().scatter_add_(1, right[:, None], -torch.ones_like(log_p[:, :1]))
            slope = self._slope(logits)
            part.copy_(error if isinstance(slope, float) and slope == 1.0 else error.mul_(slope))
        return torch.cat(nll), torch.cat(log_total)

    def _long(self, hidden: Tensor, target: Tensor, log_total: Tensor) -> Errors:
        """The errors of an example too long to hold them all: made again for each part asked for."""
        vocabulary = torch.arange(self.module.weight.shape[0], device=hidden.device)

        def errors(part: slice | Tensor) -> Tensor:
            logits = self.logits(hidden, part)
            error = (logits - log_total[:, None]).exp_()
            error[(target[:, None] == vocabulary[part]).nonzero(as_tuple=True)] -= 1
            return error.mul_(self._slope(logits)).to(hidden.dtype)

        return errors

    def tiles(self, length: int) -> Iterator[slice]:
        """Yields ranges of the vocabulary that keep errors [length, range] in the cache."""
        vocabulary = self.module.weight.shape[0]
        step = max(1, TILE_FLOATS // max(1, length))
        for first in range(0, vocabulary, step):
            yield slice(first, min(first + step, vocabulary))


def _part_of(error: Tensor) -> Errors:
    return lambda part: error[:, part]
