"""What a model gives to known texts: for every completion token its negative log-likelihood, whether it is the model's first
choice, and how far the model's whole distribution is from the base model's.

All values are flat over the completion tokens, example by example in the order given, position by position:

    row    int64 [N]     which example
    nll    float64 [N]   -log p(token | tokens before it), nats
    right  bool [N]      whether the token is the most likely one (equal logits: the smaller id counts)
    kl     float64 [N]   Σ_v p_base(v) log(p_base(v) / p_model(v)), nats; at least 0

Logits exist at completion positions only, `LOGIT_FLOATS` at a time, in float32 (float64 for float64 models).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from gradsieve.clock import Progress, silent
from gradsieve.data import IGNORE, Tokens
from gradsieve.data.batches import batches, pad
from gradsieve.errors import InvalidArgument, ModelError
from gradsieve.gradients.head import Supervised, scaling, shape_logits
from gradsieve.gradients.parameters import unwrap

LOGIT_FLOATS = 1 << 23


@dataclass(frozen=True, eq=False)
class Likelihood:
    """Values per completion token of `items` examples; see the module for their meaning and order."""

    items: int
    row: Tensor
    nll: Tensor
    right: Tensor
    kl: Tensor | None

    def sums(self, value: Tensor, of: Tensor) -> Tensor:
        """Returns per example the sum of the values [N] that are marked (bool [N]), float64 [items]."""
        return torch.zeros(self.items, dtype=torch.float64).index_add_(0, self.row[of], value[of].double())


def likelihood(
    model: nn.Module,
    rows: Sequence[Tokens],
    *,
    base: nn.Module | None = None,
    kl: bool = False,
    batch_tokens: int = 4096,
    device: str | None = None,
    stage: str = "evaluate",
    progress: Progress = silent,
) -> Likelihood:
    """Returns the model's values at every completion token of the rows.

    Args:
        model: A causal language model of transformers, or a PEFT model around one; left as it was.
        rows: Ids and labels; an example without completion tokens has no values.
        base: The model that KL starts from; None is `model` without its PEFT adapters.
        kl: Whether KL is wanted; it costs a second forward pass.
        batch_tokens: Padded tokens per forward pass; it changes time and memory, not values.
        device: Where the token ids go; None is where the model's embedding is.
        stage: The name that `progress` is given.
        progress: Is told of tokens done.

    Raises:
        InvalidArgument: KL is wanted, but there is no base and the model has no adapters to take off.
        ModelError: The model's head is not known, or it gives values that are not finite.
    """
    with evaluating(model), evaluating(base or model):
        ours = _Network(model, device)
        theirs = _base_network(ours, base, device) if kl else None
        return _collected(ours, theirs, rows, batch_tokens, stage, progress)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Puts a model into evaluation mode, without gradients, and its modules back into the modes they were in."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():  # not inference mode: buffers made there could not be trained with afterwards
            yield
    finally:
        for module, training in modes:
            module.training = training


def _collected(
    ours: _Network, theirs: _Network | None, rows: Sequence[Tokens], batch_tokens: int, stage: str, progress: Progress
) -> Likelihood:
    counts = torch.tensor([int((tokens.labels[1:] != IGNORE).sum()) for tokens in rows])
    ends = counts.cumsum(0)
    nll, kl = torch.zeros(2, int(counts.sum()), dtype=torch.float64)
    right = torch.zeros(len(nll), dtype=torch.bool)
    order = sorted(range(len(rows)), key=lambda i: (-len(rows[i].input_ids), i))
    lengths = [len(rows[i].input_ids) for i in order]
    done = 0
    for part in batches(lengths, batch_tokens):
        chosen = order[part]
        ids = pad([rows[i].input_ids for i in chosen], 0)
        supervised = Supervised.of(pad([rows[i].labels for i in chosen], IGNORE), "sum", torch.float32)
        places = torch.cat([torch.arange(int(ends[i] - counts[i]), int(ends[i])) for i in chosen])
        states = ours.states(ids, supervised)
        base_states = theirs.states(ids, supervised) if theirs else states
        for run in torch.arange(len(places)).split(ours.most):
            log_p = ours.log_probabilities(states[run])
            target = supervised.target[run].to(log_p.device)
            nll[places[run]] = -log_p.gather(1, target[:, None])[:, 0].double().cpu()
            right[places[run]] = (log_p.argmax(1) == target).cpu()
            if theirs:
                kl[places[run]] = _divergence(theirs.log_probabilities(base_states[run]), log_p).double().cpu()
        done += sum(lengths[part])
        progress(stage, done, sum(lengths))
    _check_finite(nll, kl)
    row = torch.arange(len(rows)).repeat_interleave(counts)
    return Likelihood(len(rows), row, nll, right, kl if theirs else None)


def _divergence(base: Tensor, log_p: Tensor) -> Tensor:
    """Returns KL(base || model) [N] of log-probabilities [N, V]; tokens that the base rules out add nothing."""
    terms = base.exp().mul_(base - log_p)
    return terms.nan_to_num_(nan=0.0).sum(1) if base.isneginf().any() else terms.sum(1)


def _check_finite(nll: Tensor, divergence: Tensor) -> None:
    bad = int((~(nll.isfinite() & divergence.isfinite())).sum())
    if bad:
        raise ModelError(
            f"the model must give finite losses, got {bad} of {len(nll)} tokens that are not; its weights are damaged"
        )


class _Network:
    """A model taken apart: hidden states, and the log-probabilities that its head makes of them."""

    def __init__(self, model: nn.Module, device: str | None, around: Callable[[], AbstractContextManager[Any]] = nullcontext):
        config = getattr(model, "active_peft_config", None)
        if config is not None and config.is_prompt_learning:
            name = type(config).__name__
            raise ModelError(f"adapters must change layers (LoRA and its kin), got {name}, which adds tokens to the prompt")
        self.model = model
        self._around = around
        self._inner: Any = unwrap(model)
        self._head: Any = self._inner.get_output_embeddings()
        self._factor, self._cap = scaling(self._inner.config)
        self._device = device or self._inner.get_input_embeddings().weight.device
        self.vocabulary = int(self._inner.get_input_embeddings().weight.shape[0])
        self.most = max(1, LOGIT_FLOATS // self.vocabulary)
        self._try()

    def states(self, ids: Tensor, supervised: Supervised) -> Tensor:
        """Returns the last hidden states [N, D] at the supervised positions of ids [B, T], padded on the right."""
        hidden = self._hidden(ids)
        return hidden[supervised.example.to(hidden.device), supervised.position.to(hidden.device)]

    def log_probabilities(self, states: Tensor) -> Tensor:
        """Returns log p [N, V] of the next token."""
        return torch.log_softmax(self._logits(states), 1)

    def _hidden(self, ids: Tensor) -> Tensor:
        with self._around():
            return self._inner.base_model(input_ids=ids.to(self._device), use_cache=False)[0]  # type: ignore[no-any-return]

    def _logits(self, states: Tensor) -> Tensor:
        with self._around():
            raw: Tensor = self._head(states)
        return shape_logits(raw.to(torch.promote_types(raw.dtype, torch.float32)), self._factor, self._cap)

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


def _base_network(ours: _Network, base: nn.Module | None, device: str | None) -> _Network:
    if base is not None:
        theirs = _Network(base, device)
    else:
        disable = getattr(ours.model, "disable_adapter", None)
        if disable is None:
            name = type(ours.model).__name__
            raise InvalidArgument(f"base must be given for KL of a model without adapters ({name}), got none; pass base=…")
        theirs = _Network(ours.model, device, disable)
    if theirs.vocabulary != ours.vocabulary:
        raise InvalidArgument(
            f"base must have the model's vocabulary ({ours.vocabulary} tokens), got {theirs.vocabulary}; pass its own base"
        )
    return theirs
