"""What a model gives to known texts: for every completion token its negative log-likelihood, whether it is the model's first
choice, and how far the model's whole distribution is from the base model's.

All values are flat over the completion tokens, example by example in the order given, position by position:

    row    int64 [N]     which example
    nll    float64 [N]   -log p(token | tokens before it), nats
    right  bool [N]      whether the token is the most likely one (equal logits: the smaller id counts)
    kl     float64 [N]   Σ_v p_base(v) log(p_base(v) / p_model(v)), nats; below 0 by no more than rounding in float32

Logits exist at completion positions only, some at a time (gradsieve.evaluate.network).
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from gradsieve.clock import Progress, silent
from gradsieve.data import IGNORE, Tokens
from gradsieve.errors import ModelError
from gradsieve.evaluate.network import KeptBase, Network, base_of, each_batch, evaluating


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
    base: nn.Module | KeptBase | None = None,
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
        base: The model that KL starts from, or what was kept of it; None is `model` without its PEFT adapters.
        kl: Whether KL is wanted; it costs a second forward pass, unless the base was kept.
        batch_tokens: Padded tokens per forward pass; it changes time and memory, not values.
        device: Where the token ids go; None is where the model's embedding is.
        stage: The name that `progress` is given.
        progress: Is told of tokens done.

    Raises:
        InvalidArgument: KL is wanted, but there is no base and the model has no adapters to take off.
        ModelError: The model's head is not known, or it gives values that are not finite.
    """
    with evaluating(model), evaluating(base) if isinstance(base, nn.Module) else nullcontext():
        ours = Network(model, device)
        theirs = base_of(ours, base, device) if kl else None
        return _collected(ours, theirs, rows, batch_tokens, stage, progress)


def _collected(
    ours: Network, theirs: Network | KeptBase | None, rows: Sequence[Tokens], batch_tokens: int, stage: str, progress: Progress
) -> Likelihood:
    counts = torch.tensor([int((tokens.labels[1:] != IGNORE).sum()) for tokens in rows])
    ends = counts.cumsum(0)
    nll, kl = torch.zeros(2, int(counts.sum()), dtype=torch.float64)
    right = torch.zeros(len(nll), dtype=torch.bool)
    for batch in each_batch(rows, batch_tokens, stage, progress):
        places = torch.cat([torch.arange(int(ends[i] - counts[i]), int(ends[i])) for i in batch.places])
        states = ours.states(batch)
        base_states = theirs.states(batch) if theirs else states
        for run in torch.arange(len(places)).split(ours.most):
            log_p = ours.log_probabilities(states[run])
            target = batch.supervised.target[run].to(log_p.device)
            nll[places[run]] = -log_p.gather(1, target[:, None])[:, 0].double().cpu()
            right[places[run]] = (log_p.argmax(1) == target).cpu()
            if theirs:
                kl[places[run]] = _divergence(theirs.log_probabilities(base_states[run]), log_p).double().cpu()
    _check_finite(nll, kl)
    row = torch.arange(len(rows)).repeat_interleave(counts)
    return Likelihood(len(rows), row, nll, right, kl if theirs else None)


def _divergence(base: Tensor, log_p: Tensor) -> Tensor:
    """Returns KL(base || model) [N] of log-probabilities [N, V]; tokens that the base rules out add nothing."""
    return base.exp().mul_(base - log_p).masked_fill_(base.isneginf(), 0.0).sum(1)


def _check_finite(nll: Tensor, divergence: Tensor) -> None:
    bad = int((~(nll.isfinite() & divergence.isfinite())).sum())
    if bad:
        raise ModelError(
            f"the model must give finite losses, got {bad} of {len(nll)} tokens that are not; its weights are damaged"
        )
