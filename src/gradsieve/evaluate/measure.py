"""Measures a model on test sets: one value per item and metric, so that intervals can be drawn over items.

    metric            unit                     per item
    loss              nats per token           mean negative log-likelihood of its completion tokens
    nll, tokens       nats, tokens             the sum, and the number of tokens: Σ nll / Σ tokens is the loss per token
    key_loss          nats per token           mean over its key tokens (gradsieve.evaluate.keys)
    key_accuracy      share                    of its key tokens that are the model's first choice, given the true tokens before
    number_accuracy   share                    the same over its tokens with digits
    kl                nats per token           mean KL(base || model) over its completion tokens; base is the untouched model
    choice            0 or 1                   the right option has the smallest nll of all (equal ones: the first counts)
    choice_norm       0 or 1                   … the smallest loss of all

A value that an item cannot have (no key token, no digit) is NaN.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from functools import partial
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from gradsieve.clock import Progress, silent
from gradsieve.errors import InvalidArgument
from gradsieve.evaluate.keys import marks
from gradsieve.evaluate.likelihood import Likelihood, likelihood
from gradsieve.evaluate.sets import TestSet

Metric = Literal["loss", "nll", "tokens", "key_loss", "key_accuracy", "number_accuracy", "kl", "choice", "choice_norm"]
LOSSES: tuple[Metric, ...] = ("loss", "nll", "tokens", "key_loss", "key_accuracy", "number_accuracy")
CHOICES: tuple[Metric, ...] = ("choice", "choice_norm")

Measured = dict[str, dict[str, Tensor]]


def measure(
    model: nn.Module,
    sets: Iterable[TestSet],
    *,
    tokenizer: Any,
    base: nn.Module | None = None,
    metrics: Collection[Metric] | None = None,
    batch_tokens: int = 4096,
    device: str | None = None,
    progress: Progress = silent,
) -> Measured:
    """Returns the model's values by set and metric, float64 [items] in the order of the set's examples.

    Args:
        model: A causal language model of transformers, or a PEFT model around one; left as it was.
        sets: Test sets of different names.
        tokenizer: The one that made their tokens.
        base: The untouched model, for `kl`; a PEFT model without its adapters is its own base.
        metrics: See the module. None takes all but those of generated text, and `kl` only where there is a base. A set
            without options has no `choice`.
        batch_tokens: Padded tokens per forward pass; it changes time and memory, not values.
        device: Where the token ids go; None is where the model is.
        progress: Is told of tokens done, set by set.

    Raises:
        InvalidArgument: A metric is unknown, or `kl` is asked for and there is no base.
        ModelError: The model's head is not known, or it gives values that are not finite.
    """
    tests = list(sets)
    names = [test.name for test in tests]
    if len(set(names)) < len(names):
        raise InvalidArgument(f"sets must have different names, got {', '.join(names)}; rename them")
    wanted = _wanted(metrics, has_base=base is not None or hasattr(model, "disable_adapter"))
    score = partial(likelihood, model, batch_tokens=batch_tokens, device=device, progress=progress)
    measured: Measured = {}
    for test in tests:
        found: dict[str, Tensor] = {}
        if wanted & {*LOSSES, "kl"}:
            values = score(test.tokens, base=base, kl="kl" in wanted, stage=f"evaluate {test.name}")
            found |= losses(values, test, tokenizer)
        if wanted & {*CHOICES} and test.kind == "choice":
            found |= choices(test, score)
        measured[test.name] = {name: found[name] for name in get_args(Metric) if name in wanted and name in found}
    return measured


def _wanted(metrics: Collection[Metric] | None, has_base: bool) -> set[str]:
    if metrics is None:
        return {*LOSSES, *CHOICES, *(["kl"] if has_base else [])}
    for metric in metrics:
        if metric not in get_args(Metric):
            raise InvalidArgument(f"metrics must be among {', '.join(get_args(Metric))}, got {metric!r}")
    return {*metrics}


def losses(values: Likelihood, test: TestSet, tokenizer: Any) -> dict[str, Tensor]:
    """Returns the losses, accuracies and KL of a set's items from those of its completion tokens."""
    marked = marks(test, tokenizer)
    right = values.right.double()
    every = torch.ones_like(values.right)

    def mean(value: Tensor, of: Tensor) -> Tensor:
        return _sums(value, of, values.row, len(test.tokens)) / _sums(torch.ones_like(value), of, values.row, len(test.tokens))

    found = {
        "loss": mean(values.nll, every),
        "nll": _sums(values.nll, every, values.row, len(test.tokens)),
        "tokens": _sums(torch.ones_like(values.nll), every, values.row, len(test.tokens)),
        "key_loss": mean(values.nll, marked.key),
        "key_accuracy": mean(right, marked.key),
        "number_accuracy": mean(right, marked.number),
    }
    return found if values.kl is None else found | {"kl": mean(values.kl, every)}


def _sums(value: Tensor, of: Tensor, row: Tensor, items: int) -> Tensor:
    """Returns per item the sum of the values [N] that are marked, float64."""
    return torch.zeros(items, dtype=torch.float64).index_add_(0, row[of], value[of])


def choices(test: TestSet, score: Callable[..., Likelihood]) -> dict[str, Tensor]:
    """Returns whether the right option is the likeliest, as a whole (`choice`) and per token (`choice_norm`): 0 or 1."""
    rows = [tokens for item in test.options for tokens in item.tokens]
    values = score(rows, stage=f"choose {test.name}")
    every = torch.ones_like(values.right)
    nll = _sums(values.nll, every, values.row, len(rows))
    tokens = _sums(torch.ones_like(values.nll), every, values.row, len(rows))
    counts = [len(item.tokens) for item in test.options]
    answers = [item.answer for item in test.options]

    def hits(score: Tensor) -> Tensor:
        firsts = [int(part.argmin()) for part in score.split(counts)]
        return torch.tensor([float(a == b) for a, b in zip(firsts, answers, strict=True)], dtype=torch.float64)

    return {"choice": hits(nll), "choice_norm": hits(nll / tokens)}
