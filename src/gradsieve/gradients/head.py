"""The LM head: loss, its gradient at the hidden states, and the head's own per-example gradient, without B·T·V logits.

Logits exist at supervised positions only, for as many whole examples at once as stay below `LOGIT_FLOATS`; a longer example
is done in runs of positions for the loss, and in tiles of the vocabulary for its statistics.
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
IGNORE = -100


@dataclass(frozen=True, slots=True)
class Supervised:
    """The supervised positions of a batch, example by example.

    Attributes:
        example: int64 [N], ascending.
        position: int64 [N], where the hidden state that predicts stands.
        target: int64 [N], the token it must predict.
        weight: [N], the factor of this position's loss: 1/T_z, or 1.
        spans: Per example its (first, last + 1) in the N positions.
    """

    example: Tensor
    position: Tensor
    target: Tensor
    weight: Tensor
    spans: list[tuple[int, int]]

    @classmethod
    def of(cls, labels: Tensor, reduction: str, dtype: torch.dtype) -> Supervised:
        """Returns the positions that labels [B, T] (unshifted) supervise."""
        shifted = labels[:, 1:]
        example, position = (shifted != IGNORE).nonzero(as_tuple=True)
        counts = torch.bincount(example, minlength=len(labels))
        weight = (1.0 / counts.to(dtype))[example] if reduction == "mean" else torch.ones_like(example, dtype=dtype)
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


Errors = Callable[[slice | Tensor], Tensor]
"""Gives an example's logit errors ∂l/∂logits for a part of the vocabulary (a range, or token ids), [T_z, part]."""


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
        config = model.config
        self.module = module
        self.factor = 1.0
        if getattr(config, "logits_scaling", None):
            self.factor = 1.0 / float(config.logits_scaling)
        elif getattr(config, "logit_scale", None):
            self.factor = float(config.logit_scale)
        self.cap = float(getattr(config, "final_logit_softcapping", None) or 0.0)
        self.dtype = torch.promote_types(module.weight.dtype, torch.float32)

    def logits(self, hidden: Tensor, vocabulary: slice | Tensor = slice(None)) -> Tensor:
        """Returns the logits of hidden states [N, D] over a part of the vocabulary, float32 (float64 for such models)."""
        bias = self.module.bias[vocabulary] if self.module.bias is not None else None
        raw = nn.functional.linear(hidden, self.module.weight[vocabulary], bias).to(self.dtype)
        if self.factor != 1.0:
            raw = raw.mul_(self.factor)
        return raw.div_(self.cap).tanh_().mul_(self.cap) if self.cap else raw

    def _error(self, logits: Tensor, log_total: Tensor, weight: Tensor, right: tuple[Tensor, Tensor]) -> Tensor:
        """Returns ∂l/∂(W h + bias), overwriting the logits; `right` holds (row, column) of the targets among them."""
        slope = (1 - (logits / self.cap).square()).mul_(self.factor) if self.cap else None
        error = logits.sub_(log_total[:, None]).exp_()
        error[right] -= 1
        error.mul_(weight[:, None])
        if slope is not None:
            return error.mul_(slope)
        return error.mul_(self.factor) if self.factor != 1.0 else error

    def backward(
        self,
        hidden: Tensor,
        supervised: Supervised,
        on_errors: Callable[[int, int, Tensor], None] | None = None,
        on_example: Callable[[int, Tensor, Errors], None] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Returns every position's negative log-likelihood and the loss's gradient at the hidden states.

        Args:
            hidden: Hidden states at the supervised positions, [N, D], detached.
            supervised: Where they stand and what they must predict.
            on_errors: Called with (first, last + 1, errors [run, V]) for every run of positions.
            on_example: Called once per example with (z, hidden [T_z, D], errors by range of the vocabulary).

        Returns:
            nll [N] (unweighted, nats) and gradient [N, D] in the dtype of `hidden`.
        """
        vocabulary = self.module.weight.shape[0]
        most = max(1, LOGIT_FLOATS // vocabulary)
        nll = hidden.new_empty(len(hidden), dtype=self.dtype)
        log_totals = torch.empty_like(nll)
        gradient = torch.empty_like(hidden)
        weight = supervised.weight.to(self.dtype)
        for first, last, whole in supervised.runs(most):
            run = slice(first, last)
            logits = self.logits(hidden[run])
            target = supervised.target[run]
            log_totals[run] = logits.logsumexp(1)
            nll[run] = log_totals[run] - logits.gather(1, target[:, None])[:, 0]
            rows = torch.arange(last - first, device=hidden.device)
            error = self._error(logits, log_totals[run], weight[run], (rows, target))
            torch.mm(error.to(hidden.dtype), self.module.weight, out=gradient[run])
            if on_errors:
                on_errors(first, last, error)
            for z in whole if on_example else ():
                start, end = supervised.spans[z]
                on_example(z, hidden[start:end], _part_of(error[start - first : end - first]))  # type: ignore[misc]
        for z, (start, end) in enumerate(supervised.spans if on_example else ()):
            if end - start > most:
                on_example(z, hidden[start:end], self._long(hidden, supervised, log_totals, weight, slice(start, end)))  # type: ignore[misc]
        return nll, gradient

    def _long(self, hidden: Tensor, supervised: Supervised, log_totals: Tensor, weight: Tensor, span: slice) -> Errors:
        """The errors of an example too long to hold them all: made again for each part asked for."""
        vocabulary = torch.arange(self.module.weight.shape[0], device=hidden.device)

        def errors(part: slice | Tensor) -> Tensor:
            row, column = (supervised.target[span, None] == vocabulary[part]).nonzero(as_tuple=True)
            return self._error(self.logits(hidden[span], part), log_totals[span], weight[span], (row, column))

        return errors

    def tiles(self, length: int) -> Iterator[slice]:
        """Yields ranges of the vocabulary whose product with hidden states, [range, D], stays in the cache."""
        vocabulary, width = self.module.weight.shape
        step = max(1, min(TILE_FLOATS // width, LOGIT_FLOATS // max(1, length)))
        for first in range(0, vocabulary, step):
            yield slice(first, min(first + step, vocabulary))


def _part_of(error: Tensor) -> Errors:
    return lambda part: error[:, part]
