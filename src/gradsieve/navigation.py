"""The Navigator of one run: a live model, what it is trained on, and what it is measured on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from gradsieve.data import IGNORE, Tokens, TokenSet
from gradsieve.data.corrupt import mostly_worked
from gradsieve.errors import InvalidArgument
from gradsieve.evaluate.completion import Completion
from gradsieve.evaluate.keys import marks
from gradsieve.evaluate.likelihood import likelihood
from gradsieve.train.navigator import LoRANavigator, NavigatorSettings
from gradsieve.types import Budget, Cost

CountPasses = Callable[[float, float, float], float]
"""(tokens of the chosen, of the target, of the held-out anchor) → token passes of training and measuring a Navigator"""


def split_anchor(anchor: TokenSet) -> tuple[TokenSet, TokenSet]:
    """Returns the anchor's examples that give the reference, and those that measure forgetting: halves of every category.

    The order of the file does not matter: within a category examples are taken by turns in the order of their hash, the first
    by the half that has fewer by then. Equal examples stay together, or one half would hold what the other is measured on.

    Raises:
        InvalidArgument: A half has fewer than 2 examples.
    """
    ordered = sorted(range(len(anchor.kept)), key=lambda i: anchor.keys[i])
    turn: dict[str | None, int] = {}
    place: dict[bytes, int] = {}
    halves: tuple[list[int], list[int]] = ([], [])
    for i in ordered:
        category = anchor.examples[anchor.kept[i]].category
        if anchor.keys[i] not in place:
            place[anchor.keys[i]] = turn.setdefault(category, int(len(halves[1]) < len(halves[0])))
            turn[category] = 1 - turn[category]
        halves[place[anchor.keys[i]]].append(i)
    if min(map(len, halves)) < 2:
        raise InvalidArgument(
            f"anchor must hold at least 4 different usable examples to be split in reference and hold-out, got {len(ordered)}"
        )
    reference, held_out = (anchor.restricted("anchor", sorted(half)) for half in halves)
    return reference, held_out


def make_navigator(
    model: nn.Module,
    candidates: Sequence[Tokens],
    target: TokenSet,
    held_out: TokenSet,
    tokenizer: Any,
    settings: NavigatorSettings,
) -> LoRANavigator:
    """Returns a Navigator that is measured on the target and on the anchor's held-out examples.

    L_dom is the target's mean loss. L_gen is, on the held-out examples, the mean over examples of the mean over their
    completion tokens ("loss", "kl") or over their answer-bearing tokens ("key"; examples without one do not count).

    Args:
        model: Gets adapters, until the Navigator is closed.
        candidates: Tokens of every row of the pool.
        target: Examples of the wanted ability.
        held_out: General examples that no reference was made of.
        tokenizer: Tells the answer-bearing tokens.
        settings: How it is trained.
    """
    keys = _key_tokens(held_out, tokenizer)

    def measure(live: nn.Module, cost: Cost) -> tuple[float, float]:
        domain = likelihood(live, target.tokens, batch_tokens=settings.batch_tokens)
        general = likelihood(live, held_out.tokens, kl=cost == "kl", batch_tokens=settings.batch_tokens)
        values = general.kl if cost == "kl" else general.nll
        assert values is not None
        which = keys if cost == "key" else torch.ones_like(keys)
        if not which.any():
            raise InvalidArgument("constraint key needs anchor examples with answer-bearing tokens, got none; use kl or loss")
        return _mean(domain.nll, domain.row, torch.ones_like(domain.right)), _mean(values, general.row, which)

    return LoRANavigator(model, candidates, measure, settings)


def navigator_passes(
    passes: CountPasses, pool: TokenSet, target: TokenSet, held_out: TokenSet, budget: Budget, warmup: int
) -> float:
    """Returns what a Navigator is trained and measured on, its warm-up included, in token passes (`gradsieve.overhead`).

    Args:
        passes: The method's count.
        pool: Of whose mean length an episode's examples are taken to be.
        target: Examples of the wanted ability.
        held_out: General examples that no reference was made of.
        budget: How much an episode chooses.
        warmup: Steps before the first episode.
    """
    mean = sum(pool.lengths) / len(pool.lengths)
    episode = budget.tokens or mean * (budget.examples or (budget.share or 1.0) * len(pool.lengths))
    before = mean * warmup * min(NavigatorSettings().warmup_batch, len(pool.lengths))
    return passes(episode, sum(target.lengths), sum(held_out.lengths)) + before


def _mean(values: Tensor, row: Tensor, which: Tensor) -> float:
    """Returns the mean over rows of each row's mean over its tokens in `which`; rows without such tokens do not count."""
    values, row = values[which], row[which]
    size = int(row.max()) + 1
    total = torch.zeros(size, dtype=torch.float64).index_add_(0, row, values.double())
    count = torch.bincount(row, minlength=size)
    return float((total[count > 0] / count[count > 0]).mean())


def _key_tokens(examples: TokenSet, tokenizer: Any) -> Tensor:
    """Returns which completion tokens bear the answer, category by category, in the order of `likelihood`: bool [N]."""
    parts: dict[str | None, list[int]] = {}
    for i, position in enumerate(examples.kept):
        parts.setdefault(examples.examples[position].category, []).append(i)
    counts = torch.tensor([int((tokens.labels[1:] != IGNORE).sum()) for tokens in examples.tokens])
    starts = counts.cumsum(0) - counts
    keys = torch.zeros(int(counts.sum()), dtype=torch.bool)
    for members in parts.values():
        own = [examples.examples[examples.kept[i]] for i in members]
        answers = [Completion.of(examples.tokens[i], tokenizer) for i in members]
        marked = marks(answers, worked=mostly_worked(own)).key
        places = torch.cat([torch.arange(int(starts[i]), int(starts[i] + counts[i])) for i in members])
        keys[places] = marked
    return keys
