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
    bleu, meteor, rouge1, rouge2, rougeL       of the greedily generated text against the item's answer, sets of kind choice and
                                               text (gradsieve.evaluate.texts); `meteor` is `meteor_nosyn` without WordNet
    exact_number      0 or 1                   the generated text's final number is the answer's, sets of kind worked
    stopped           0 or 1                   the generated text came to its end within max_new_tokens

A value that an item cannot have (no key token, no digit) is NaN; so is what a generated text would be held to where the item's
own answer was cut off at the maximum length.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from functools import partial
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from gradsieve.clock import Progress, silent
from gradsieve.data import Tokens
from gradsieve.errors import InvalidArgument
from gradsieve.evaluate.completion import Completion
from gradsieve.evaluate.generation import Generated, generate, stop_tokens
from gradsieve.evaluate.keys import Marks, marks
from gradsieve.evaluate.likelihood import Likelihood, likelihood
from gradsieve.evaluate.network import KeptBase
from gradsieve.evaluate.sets import Options, TestSet
from gradsieve.evaluate.texts import bleu, check_installed, exact_number, meteor, rouge

Metric = Literal[
    "loss", "nll", "tokens", "key_loss", "key_accuracy", "number_accuracy", "kl", "choice", "choice_norm",
    "bleu", "meteor", "rouge1", "rouge2", "rougeL", "exact_number", "stopped",
]  # fmt: skip
LOSSES: tuple[Metric, ...] = ("loss", "nll", "tokens", "key_loss", "key_accuracy", "number_accuracy")
CHOICES: tuple[Metric, ...] = ("choice", "choice_norm")
TEXTS: tuple[Metric, ...] = ("bleu", "meteor", "rouge1", "rouge2", "rougeL", "exact_number", "stopped")

Measured = dict[str, dict[str, Tensor]]


def fits(metric: str, kind: str | None) -> bool:
    """Says whether items of a kind (`TestSet.kind`) have a metric at all."""
    if metric in CHOICES:
        return kind == "choice"
    if metric == "exact_number":
        return kind == "worked"
    return kind != "worked" or metric not in TEXTS or metric == "stopped"


def measure(
    model: nn.Module,
    sets: Iterable[TestSet],
    *,
    tokenizer: Any,
    base: nn.Module | KeptBase | None = None,
    metrics: Collection[Metric] | None = None,
    max_new_tokens: int = 256,
    batch_tokens: int = 4096,
    device: str | None = None,
    progress: Progress = silent,
    on_texts: Callable[[TestSet, list[Generated]], None] | None = None,
) -> Measured:
    """Returns the model's values by set and metric, float64 [items] in the order of the set's examples.

    Args:
        model: A causal language model of transformers, or a PEFT model around one; left as it was.
        sets: Test sets of different names.
        tokenizer: The one that made their tokens.
        base: The untouched model, for `kl`, or what `keep_base` kept of it; a PEFT model without its adapters is its own.
        metrics: See the module. None takes all but those of generated text, and `kl` only where there is a base. A set
            without options has no `choice`.
        max_new_tokens: Where a generated text is cut off.
        batch_tokens: Padded tokens per forward pass; it changes time and memory, not values.
        device: Where the token ids go; None is where the model is.
        progress: Is told of tokens done, set by set; a generated text counts as `max_new_tokens`.
        on_texts: Is given the generated texts of each set, in the order of its examples.

    Raises:
        InvalidArgument: A metric is unknown, `kl` is asked for and there is no base, or a text does not fit into the model.
        MissingExtra: The library of a text metric is not installed; found out before anything is measured.
        ModelError: The model's head is not known, or it gives values that are not finite.
    """
    tests = list(sets)
    names = [test.name for test in tests]
    if len(set(names)) < len(names):
        raise InvalidArgument(f"sets must have different names, got {', '.join(names)}; rename them")
    wanted = _wanted(metrics, has_base=base is not None or hasattr(model, "disable_adapter"))
    if any(test.kind != "worked" for test in tests):
        check_installed(wanted)
    score = partial(likelihood, model, batch_tokens=batch_tokens, device=device, progress=progress)
    write = partial(generate, model, tokenizer=tokenizer, batch_tokens=batch_tokens, device=device, progress=progress)
    measured: Measured = {}
    for test in tests:
        found: dict[str, Tensor] = {}
        items = [Completion.of(tokens, tokenizer) for tokens in test.tokens]
        if wanted & {*LOSSES, "kl"}:
            values = score(test.tokens, base=base, kl="kl" in wanted, stage=f"evaluate {test.name}")
            found |= losses(values, marks(items, worked=test.kind == "worked"))
        if any(fits(metric, test.kind) for metric in wanted & {*CHOICES}):
            found |= choices(test.options, score(_options(test), stage=f"choose {test.name}"))
        if texts := {metric for metric in wanted & {*TEXTS} if fits(metric, test.kind)}:
            prompts = [item.prompt_ids for item in items]
            stop = stop_tokens(model, items, tokenizer)
            written = write(prompts, stop=stop, max_new_tokens=max_new_tokens, stage=f"generate {test.name}")
            if on_texts:
                on_texts(test, written)
            found |= text_scores(texts, items, written, worked=test.kind == "worked")
        measured[test.name] = {name: value for name, value in found.items() if name.removesuffix("_nosyn") in wanted}
    return measured


def _wanted(metrics: Collection[Metric] | None, has_base: bool) -> set[str]:
    if metrics is None:
        return {*LOSSES, *CHOICES, *(["kl"] if has_base else [])}
    for metric in metrics:
        if metric not in get_args(Metric):
            raise InvalidArgument(f"metrics must be among {', '.join(get_args(Metric))}, got {metric!r}")
    return {*metrics}


def losses(values: Likelihood, marked: Marks) -> dict[str, Tensor]:
    """Returns the losses, accuracies and KL of items from those of their completion tokens, float64 [items] by name."""
    every, ones, right = torch.ones_like(values.right), torch.ones_like(values.nll), values.right.double()

    def mean(value: Tensor, of: Tensor) -> Tensor:
        return values.sums(value, of) / values.sums(ones, of)

    found = {
        "loss": mean(values.nll, every),
        "nll": values.sums(values.nll, every),
        "tokens": values.sums(ones, every),
        "key_loss": mean(values.nll, marked.key),
        "key_accuracy": mean(right, marked.key),
        "number_accuracy": mean(right, marked.number),
    }
    return found if values.kl is None else found | {"kl": mean(values.kl, every)}


def choices(items: Sequence[Options], values: Likelihood) -> dict[str, Tensor]:
    """Returns whether the right option is the likeliest, as a whole (`choice`) and per token (`choice_norm`): 0 or 1 [items].

    Args:
        items: The options and the right one of each item.
        values: Of all options, item by item.
    """
    every = torch.ones_like(values.right)
    nll = values.sums(values.nll, every)
    tokens = values.sums(torch.ones_like(values.nll), every)

    def hits(score: Tensor) -> Tensor:
        firsts = [int(part.argmin()) for part in score.split([len(item.tokens) for item in items])]
        return torch.tensor([float(a == item.answer) for a, item in zip(firsts, items, strict=True)], dtype=torch.float64)

    return {"choice": hits(nll), "choice_norm": hits(nll / tokens)}


def text_scores(
    wanted: Collection[str], items: Sequence[Completion], written: Sequence[Generated], *, worked: bool
) -> dict[str, Tensor]:
    """Returns the scores of generated texts that are wanted, as far as such items have them, by name.

    An answer that was cut off is nothing to hold a text to: its scores are NaN, but for `stopped`.

    Args:
        wanted: Names out of `TEXTS`.
        items: The right answers.
        written: The generated ones.
        worked: Whether they are worked answers, held to their final number alone.
    """
    found = {"stopped": torch.tensor([float(one.stopped) for one in written], dtype=torch.float64)}
    whole = torch.tensor([not item.cut for item in items])
    pairs = [(item, one) for item, one in zip(items, written, strict=True) if not item.cut]
    texts, references = [one.text for _, one in pairs], [item.last for item, _ in pairs]
    scores: dict[str, Tensor] = {}
    if worked:
        scores["exact_number"] = exact_number(texts, references, [one.stopped for _, one in pairs])
    elif "bleu" in wanted:
        scores["bleu"] = bleu(texts, references)
    if not worked and "meteor" in wanted:
        scores |= meteor(texts, references)
    if not worked and {"rouge1", "rouge2", "rougeL"} & {*wanted}:
        scores |= rouge(texts, references)
    nothing = torch.full((len(items),), float("nan"), dtype=torch.float64)
    return found | {name: nothing.masked_scatter(whole, score) for name, score in scores.items()}


def _options(test: TestSet) -> list[Tokens]:
    return [tokens for item in test.options for tokens in item.tokens]
