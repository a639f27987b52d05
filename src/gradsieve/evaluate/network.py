"""A language model taken apart: hidden states at completion positions, and the log-probabilities that its head makes of them.

Logits exist `LOGIT_FLOATS` numbers at a time, in float32 (float64 for float64 models). A base model that many models are
compared with can be kept as its hidden states (`keep_base`), so that its forward pass is made once.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import xxhash
from torch import Tensor, nn

from gradsieve.clock import Progress, silent
from gradsieve.data import IGNORE, Tokens
from gradsieve.data.batches import batches, pad
from gradsieve.errors import InvalidArgument, ModelError
from gradsieve.evaluate.sets import TestSet
from gradsieve.gradients.head import Supervised, scaling, shape_logits
from gradsieve.gradients.parameters import unwrap

LOGIT_FLOATS = 1 << 23


@dataclass(frozen=True, eq=False)
class Batch:
    """Rows that go through a model at once.

    Attributes:
        places: Their indices in all rows.
        rows: The rows themselves.
        ids: int64 [B, T], padded on the right.
        supervised: Their completion positions.
    """

    places: Sequence[int]
    rows: Sequence[Tokens]
    ids: Tensor
    supervised: Supervised


def each_batch(rows: Sequence[Tokens], batch_tokens: int, stage: str, progress: Progress) -> Iterator[Batch]:
    """Yields the rows in batches of at most `batch_tokens` padded tokens, longest first, and reports the tokens done."""
    order = sorted(range(len(rows)), key=lambda i: (-len(rows[i].input_ids), i))
    lengths = [len(rows[i].input_ids) for i in order]
    done = 0
    for part in batches(lengths, batch_tokens):
        chosen = [rows[i] for i in order[part]]
        labels = pad([row.labels for row in chosen], IGNORE)
        yield Batch(order[part], chosen, pad([row.input_ids for row in chosen], 0), Supervised.of(labels, "sum", torch.float32))
        done += sum(lengths[part])
        progress(stage, done, sum(lengths))


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Puts a model into evaluation mode, without gradients, and back: modes, and which parameters are trained."""
    modes = [(module, module.training) for module in model.modules()]
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    model.eval()
    try:
        with torch.no_grad():  # not inference mode: buffers made there could not be trained with afterwards
            yield
    finally:
        for module, training in modes:
            module.training = training
        for parameter, flag in flags:  # taking adapters off and on again unfreezes them
            parameter.requires_grad_(flag)


@dataclass(frozen=True, eq=False)
class Head:
    """An output layer: logits = f(W h + bias), f a factor and a soft cap."""

    module: nn.Module
    factor: float
    cap: float

    def logits(self, states: Tensor) -> Tensor:
        """Returns the logits [N, V] of the next token for hidden states [N, D]."""
        raw: Tensor = self.module(states)
        return shape_logits(raw.to(torch.promote_types(raw.dtype, torch.float32)), self.factor, self.cap)


class Network:
    """A model taken apart: hidden states, and the log-probabilities that its head makes of them."""

    def __init__(self, model: nn.Module, device: str | None, around: Callable[[], AbstractContextManager[Any]] = nullcontext):
        self.model = model
        self._around = around
        self._inner: Any = unwrap(model)
        self.head = Head(self._inner.get_output_embeddings(), *scaling(self._inner.config))
        self._device = device or self._inner.get_input_embeddings().weight.device
        self.vocabulary = int(self._inner.get_input_embeddings().weight.shape[0])
        self.most = max(1, LOGIT_FLOATS // self.vocabulary)
        self._try()

    def states(self, batch: Batch) -> Tensor:
        """Returns the last hidden states [N, D] at the batch's supervised positions."""
        hidden = self._hidden(batch.ids)
        return hidden[batch.supervised.example.to(hidden.device), batch.supervised.position.to(hidden.device)]

    def log_probabilities(self, states: Tensor) -> Tensor:
        """Returns log p [N, V] of the next token."""
        return torch.log_softmax(self._logits(states), 1)

    def copy_of_head(self) -> Head:
        """Returns a copy that later training does not reach; adapters that are off now stay off in it."""
        with self._around():
            return copy.deepcopy(self.head)

    def _hidden(self, ids: Tensor) -> Tensor:
        with self._around():
            return self._inner.base_model(input_ids=ids.to(self._device), use_cache=False)[0]  # type: ignore[no-any-return]

    def _logits(self, states: Tensor) -> Tensor:
        with self._around():
            return self.head.logits(states)

    def _try(self) -> None:
        """Compares our logits with the model's own on four tokens: a head may do more than is known here."""
        ids = torch.arange(1, 5)[None]
        ours = self._logits(self._hidden(ids)[0])
        with self._around():
            theirs = self._inner(input_ids=ids.to(self._device), use_cache=False).logits[0].to(ours.dtype)
        if not theirs.isfinite().all():
            raise ModelError(
                "the model must give finite logits, got NaN or infinity for tokens 1 to 4; its weights are damaged"
            )
        if not torch.allclose(ours, theirs, rtol=1e-2, atol=1e-2 * float(theirs.abs().max())):
            raise ModelError(
                f"the output of {type(self._inner).__name__} must be its LM head on the last hidden states, got logits that "
                f"differ by {float((ours - theirs).abs().max()):.3g}; this architecture's head is not supported yet"
            )


@dataclass(frozen=True, eq=False)
class KeptBase:
    """A model as its hidden states at the completion positions of some test sets, and its head.

    Attributes:
        vocabulary: Its tokens.
        head: A copy of its output layer.
        kept: Hidden states [T_z, D] by example, in the model's own type, on the CPU.
    """

    vocabulary: int
    head: Head
    kept: Mapping[bytes, Tensor]

    def states(self, batch: Batch) -> Tensor:
        """Returns the hidden states [N, D] at the batch's supervised positions.

        Raises:
            InvalidArgument: A row was in none of the sets.
        """
        missing = sum(_key(row) not in self.kept for row in batch.rows)
        if missing:
            raise InvalidArgument(
                f"base must be kept for the sets that are measured, got {missing} items it lacks; keep it again"
            )
        device = next(self.head.module.parameters()).device
        return torch.cat([self.kept[_key(row)] for row in batch.rows]).to(device)

    def log_probabilities(self, states: Tensor) -> Tensor:
        """Returns log p [N, V] of the next token."""
        return torch.log_softmax(self.head.logits(states), 1)


def keep_base(
    model: nn.Module,
    sets: Iterable[TestSet],
    *,
    batch_tokens: int = 4096,
    device: str | None = None,
    progress: Progress = silent,
) -> KeptBase:
    """Returns what `kl` needs of the untouched model, so that measuring many models costs one pass of it in all.

    Memory: its hidden size in numbers per completion token (0.14 GB for 60,000 tokens of 576 float32), and a copy of its head.

    Args:
        model: The model before any training; of a PEFT model, what it is without its adapters.
        sets: The test sets that `kl` will be measured on.
        batch_tokens: Padded tokens per forward pass.
        device: Where the token ids go; None is where the model's embedding is.
        progress: Is told of tokens done.
    """
    rows = [row for test in sets for row in test.tokens]
    kept: dict[bytes, Tensor] = {}
    with evaluating(model):
        network = Network(model, device, getattr(model, "disable_adapter", nullcontext))
        for batch in each_batch(rows, batch_tokens, "keep base", progress):
            parts = network.states(batch).split([last - first for first, last in batch.supervised.spans])
            kept |= {_key(row): part.cpu().clone() for row, part in zip(batch.rows, parts, strict=True)}
    return KeptBase(network.vocabulary, network.copy_of_head(), kept)


def _key(row: Tokens) -> bytes:
    return xxhash.xxh3_128_digest(row.input_ids.tobytes() + row.labels.tobytes())


def base_of(ours: Network, base: nn.Module | KeptBase | None, device: str | None) -> Network | KeptBase:
    """Returns what KL starts from; None is the model without its adapters.

    Raises:
        InvalidArgument: There is no base, or it has another vocabulary.
    """
    theirs: Network | KeptBase
    if isinstance(base, KeptBase):
        theirs = base
    elif base is not None:
        theirs = Network(base, device)
    else:
        disable = getattr(ours.model, "disable_adapter", None)
        if disable is None:
            name = type(ours.model).__name__
            raise InvalidArgument(f"base must be given for KL of a model without adapters ({name}), got none; pass base=…")
        theirs = Network(ours.model, device, disable)
    if theirs.vocabulary != ours.vocabulary:
        raise InvalidArgument(
            f"base must have the model's vocabulary ({ours.vocabulary} tokens), got {theirs.vocabulary}; pass its own base"
        )
    return theirs
