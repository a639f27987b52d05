"""What is checked before a model is trained, and the hash of all that decides what comes out."""

from __future__ import annotations

import importlib.util
import json
import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np
import torch
import xxhash
from torch import nn

from gradsieve.data import IGNORE, Tokens
from gradsieve.errors import DataError, InvalidArgument, MissingExtra, ModelError
from gradsieve.train.recipe import Recipe

INSTALL = "pip install 'gradsieve[train]'"
INCIDENTAL = frozenset({"report_to", "device", "micro_batch", "save_steps"})
"""Settings of a recipe that are of memory, place and record alone; `micro_batch` only without dropout, see `deciding`."""


def require_packages(recipe: Recipe) -> None:
    """Checks that what the recipe needs is installed.

    Raises:
        InvalidArgument: A tracker is unknown.
        MissingExtra: A package is not installed.
    """
    for name in ("trl", "accelerate"):
        if importlib.util.find_spec(name) is None:
            raise MissingExtra(f"training needs the package {name}, which is not installed; {INSTALL}")
    from transformers.integrations import get_available_reporting_integrations, get_reporting_integration_callbacks

    for name in recipe.report_to:
        try:
            get_reporting_integration_callbacks([name])
        except ValueError as error:
            raise InvalidArgument(f"report_to must name trackers of transformers, got {name!r}: {error}") from None
        if name not in get_available_reporting_integrations():
            raise MissingExtra(f"report_to names {name}, which is not installed; pip install {name}")


def check(
    model: nn.Module,
    tokens: Sequence[Tokens],
    recipe: Recipe,
    weights: Sequence[float] | None,
    anchor: Sequence[Tokens],
    replay: Sequence[Tokens],
) -> list[float]:
    """Returns the weights scaled to a mean of 1, if the arguments fit each other.

    Raises:
        DataError: An example has nothing to learn.
        InvalidArgument: Arguments do not fit each other.
        ModelError: The model cannot be trained this way.
    """
    _check_model(model, recipe)
    if not tokens:
        raise InvalidArgument("tokens must hold at least one example to train on, got none; raise the budget")
    for name, examples in (("tokens", tokens), ("anchor", anchor), ("replay", replay)):
        for position, example in enumerate(examples):
            if not (example.labels[1:] != IGNORE).any():
                raise DataError(f"{name}[{position}] must have a completion token after its first token; drop it")
    for name, examples, setting, used in (
        ("anchor", anchor, f"surgery {recipe.surgery}", recipe.surgery != "none"),
        ("replay", replay, f"replay_share {recipe.replay_share:g}", recipe.replay_share > 0),
    ):
        if used and not examples:
            raise InvalidArgument(f"{name} must hold examples with {setting}, got none; pass {name}=…")
        if examples and not used:
            raise InvalidArgument(f"{name} must be empty with {setting}, got {len(examples)} examples; set the recipe's")
    return _scaled(weights, len(tokens))


def _check_model(model: nn.Module, recipe: Recipe) -> None:
    from transformers import PreTrainedModel

    if not isinstance(model, PreTrainedModel):
        raise ModelError(
            f"the model must be a plain model of transformers, got {type(model).__name__}; "
            "merge or take off its adapters first (merge_and_unload, unload)"
        )
    if hasattr(model, "peft_config"):
        raise ModelError("the model must have no adapters, got some; call restore() of the run before")
    check_precision({p.dtype for p in model.parameters() if p.is_floating_point()}, recipe)


def check_precision(weights: Collection[torch.dtype], recipe: Recipe) -> None:
    """Checks that weights of these types can be trained by a recipe.

    Raises:
        ModelError: All of them are to be trained, and small updates would vanish.
    """
    if recipe.tuning == "full" and not {*weights} <= {torch.float32, torch.float64}:
        raise ModelError(
            f"full tuning needs float32 weights (small updates vanish in {', '.join(sorted(map(str, weights)))}); "
            "load the model in float32 (a comparison's dtype: float32), and compute in bfloat16 by the recipe's dtype: bfloat16"
        )


def check_warmup(recipe: Recipe, steps: int) -> None:
    """Checks that the rate's warm-up leaves a step at the full rate.

    Raises:
        InvalidArgument: It does not.
    """
    if math.ceil(recipe.warmup * steps) >= steps:
        raise InvalidArgument(f"warmup must leave a step at the full rate, got {recipe.warmup:g} of {steps} steps; set it to 0")


def _scaled(weights: Sequence[float] | None, count: int) -> list[float]:
    if weights is None:
        return [1.0] * count
    w = np.asarray(weights, dtype=np.float64)
    if w.shape != (count,):
        raise InvalidArgument(f"weights must be one per example ({count}), got {list(w.shape)}")
    if not (np.isfinite(w).all() and (w >= 0).all() and w.sum() > 0):
        got = f"{w.min():g} to {w.max():g}"
        raise InvalidArgument(f"weights must be finite, at least 0 and not all 0, got {got}")
    return [float(x) for x in w / w.mean()]


def deciding(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Returns those of a recipe's settings that decide what comes out: dropout is drawn anew in each forward pass."""
    passes = {"micro_batch"} if settings.get("dropout") else set()
    return {name: value for name, value in settings.items() if name not in INCIDENTAL - passes}


def fingerprint(
    model: nn.Module,
    recipe: Recipe,
    tokens: Sequence[Tokens],
    weights: Sequence[float],
    anchor: Sequence[Tokens],
    replay: Sequence[Tokens],
) -> str:
    """Returns a hash of all that decides the outcome."""
    hasher = xxhash.xxh3_128(json.dumps([deciding(recipe.to_mapping()), list(weights)]).encode())
    for examples in (tokens, anchor, replay):
        hasher.update(f"{len(examples)}\n".encode())
        for example in examples:
            hasher.update(f"{len(example.input_ids)}\n".encode())
            hasher.update(example.input_ids.tobytes())
            hasher.update(example.labels.tobytes())
    for name, tensor in sorted(model.state_dict().items()):
        hasher.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        hasher.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return str(hasher.hexdigest())
