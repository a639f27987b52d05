"""Fine-tuning as a function of model, tokens and recipe, in a folder that a killed run goes on in.

out/training.json        recipe and fingerprint of the run, written first
out/checkpoints/         checkpoint-STEP/: weights, optimizer, schedule, random states; whole once they hold spent.json
out/model/               the adapters (lora) or the whole model (full), safetensors
out/trained.json         numbers of the finished run, written last: with it, the same call only loads the model
"""

from __future__ import annotations

import copy
import importlib.util
import json
import math
import random
import shutil
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import xxhash
from torch import nn

from gradsieve.clock import Progress, silent
from gradsieve.data import IGNORE, Tokens
from gradsieve.errors import DataError, InvalidArgument, MissingExtra, ModelError
from gradsieve.train.plan import Step, epoch_ends, make_plan
from gradsieve.train.recipe import Recipe

if TYPE_CHECKING:
    from datasets import Dataset

    from gradsieve.train.trainer import PlannedTrainer

STARTED, FINISHED, CHECKPOINTS, MODEL = "training.json", "trained.json", "checkpoints", "model"
INSTALL = "pip install 'gradsieve[train]'"


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """The model as it was after a pass over the data, with its optimizer.

    Attributes:
        folder: Adapters or model, and `optimizer.pt`, whose state is numbered in the order of `parameters.json`.
        epoch: Passes over the data that were complete.
        learning_rate: Mean over the steps since the checkpoint before: LESS's weight of it.
    """

    folder: Path
    epoch: float
    learning_rate: float


@dataclass(frozen=True, eq=False)
class Trained:
    """A finished training run.

    Attributes:
        model: The trained model, in eval mode.
        folder: Its adapters or weights on disk.
        steps: Optimizer steps taken.
        epochs: Passes over the data.
        tokens: Tokens trained on, without padding or anchors.
        seconds: On the clock, in steps and checkpoints, over all interruptions.
        cpu_seconds: Processor seconds of this process, over all interruptions.
        surgery_seconds: The part of `seconds` that surgery added.
        conflicts: Steps whose gradient opposed the anchor's.
        losses: Mean weighted loss of each step, before the step.
        checkpoints: One per pass, with `save_epochs`.
    """

    model: nn.Module = field(repr=False)
    folder: Path
    steps: int
    epochs: float
    tokens: int
    seconds: float
    cpu_seconds: float
    surgery_seconds: float
    conflicts: int
    losses: tuple[float, ...]
    checkpoints: tuple[Checkpoint, ...]
    _restore: Callable[[], nn.Module] = field(repr=False)

    def restore(self) -> nn.Module:
        """Takes the adapters off and returns the model that was handed in, with its own weights; costs milliseconds.

        Raises:
            InvalidArgument: All weights were trained, in place.
        """
        return self._restore()


def finetune(
    model: nn.Module,
    tokens: Sequence[Tokens],
    recipe: Recipe,
    out: Path,
    *,
    weights: Sequence[float] | None = None,
    anchor: Sequence[Tokens] = (),
    replay: Sequence[Tokens] = (),
    progress: Progress = silent,
) -> Trained:
    """Trains a model on tokens, on exactly the labels and the loss that gradients are taken of.

        L_step = (1/B) sum_{i in step} w_i l(z_i),   l(z) = mean over z's completion tokens

    with the weights scaled to a mean of 1 over the data, so that steps of any batch aim at the weighted mean gradient.

    With `lora` the model handed in carries the adapters until `Trained.restore()` takes them off; its own weights are not
    touched, and an error takes them off too. With `full` its weights are trained in place. The same call on the same
    folder goes on from the last checkpoint of a killed run, to the same weights, and only loads those of a finished one.

    Args:
        model: A causal language model of transformers.
        tokens: Examples to train on, best first where the order matters.
        recipe: How.
        out: Folder of this run.
        weights: At least 0, one per example; all equal by default.
        anchor: Examples whose gradient the surgery protects.
        replay: General examples of which `replay_share` of each batch is drawn.
        progress: Is told how many tokens are done.

    Raises:
        InvalidArgument: Arguments do not fit each other, or the folder holds another run.
        MissingExtra: trl is not installed.
        ModelError: The model cannot be trained this way, or its loss is no longer finite.
    """
    _require_packages(recipe)
    scaled = _check(model, tokens, recipe, weights, anchor, replay)
    plan = make_plan(recipe, len(tokens), len(replay), len(anchor))
    if math.ceil(recipe.warmup * len(plan)) >= len(plan):
        raise InvalidArgument(
            f"warmup must leave a step at the full rate, got {recipe.warmup:g} of {len(plan)} steps; set it to 0"
        )
    _claim(out, recipe, _fingerprint(model, recipe, tokens, scaled, anchor, replay))
    before = _Before.of(model)
    if (out / FINISHED).exists():
        return _load(model, recipe, out, before)
    try:
        with _own_randomness(), _known_renames():
            trainer = _train(model, _dataset(tokens, scaled, replay, anchor), plan, recipe, out, progress)
    except BaseException:
        before.restore()
        raise
    live = trainer.accelerator.unwrap_model(trainer.model, keep_fp32_wrapper=False)
    facts = _facts(trainer, plan, out)
    if trainer.is_world_process_zero():
        from gradsieve.train.trainer import write_json

        write_json(out / FINISHED, facts)
    trainer.accelerator.wait_for_everyone()
    trainer.accelerator.free_memory()
    return _trained(live, recipe, out, facts, before)


def _train(
    model: nn.Module, data: Dataset, plan: Sequence[Step], recipe: Recipe, out: Path, progress: Progress
) -> PlannedTrainer:
    from transformers.utils import logging as transformers_logging

    from gradsieve.train.trainer import PlannedTrainer, Spent, last_checkpoint

    transformers_logging.disable_progress_bar()
    before = last_checkpoint(out / CHECKPOINTS)
    spent = before[1] if before else Spent()
    trainer = PlannedTrainer(model, data, plan, recipe, out / CHECKPOINTS, progress, spent)
    trainer.train(resume_from_checkpoint=str(before[0]) if before else None)
    trainer.save_model(str(out / MODEL))
    return trainer


# -- before ---------------------------------------------------------------------------------------------------------------


def _require_packages(recipe: Recipe) -> None:
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


def _check(
    model: nn.Module,
    tokens: Sequence[Tokens],
    recipe: Recipe,
    weights: Sequence[float] | None,
    anchor: Sequence[Tokens],
    replay: Sequence[Tokens],
) -> list[float]:
    """Checks that the arguments fit each other; returns the weights scaled to a mean of 1."""
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
    dtypes = {p.dtype for p in model.parameters() if p.is_floating_point()}
    if recipe.tuning == "full" and not dtypes <= {torch.float32, torch.float64}:
        raise ModelError(
            f"full tuning needs float32 weights (small updates vanish in {', '.join(sorted(map(str, dtypes)))}); "
            "load the model in float32, and compute in bfloat16 by dtype: bfloat16"
        )


def _scaled(weights: Sequence[float] | None, count: int) -> list[float]:
    if weights is None:
        return [1.0] * count
    w = np.asarray(weights, dtype=np.float64)
    if w.shape != (count,):
        raise InvalidArgument(f"weights must be one per example ({count}), got {list(w.shape)}")
    if not (np.isfinite(w).all() and (w >= 0).all() and w.sum() > 0):
        raise InvalidArgument("weights must be finite, at least 0 and not all 0")
    return [float(x) for x in w / w.mean()]


def _fingerprint(
    model: nn.Module,
    recipe: Recipe,
    tokens: Sequence[Tokens],
    weights: Sequence[float],
    anchor: Sequence[Tokens],
    replay: Sequence[Tokens],
) -> str:
    """Returns a hash of all that decides the outcome."""
    settings = {k: v for k, v in recipe.to_mapping().items() if k not in ("report_to", "device", "micro_batch", "save_steps")}
    hasher = xxhash.xxh3_128(json.dumps([settings, list(weights)]).encode())
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


def _claim(out: Path, recipe: Recipe, fingerprint: str) -> None:
    """Writes what the folder is for, or refuses one that is for something else."""
    from gradsieve.train.trainer import write_json

    out.mkdir(parents=True, exist_ok=True)
    if (out / STARTED).exists():
        found = json.loads((out / STARTED).read_text())
        if found["fingerprint"] == fingerprint:
            return
        ours = recipe.to_mapping()
        differing = [f"{k} {v} there, {ours.get(k)} here" for k, v in found["recipe"].items() if ours.get(k) != v]
        raise InvalidArgument(
            f"out must be a new folder or one of the same training, got {out}, where "
            f"{'; '.join(differing) or 'model, examples or weights differ'}; name another folder or remove it"
        )
    write_json(out / STARTED, {"fingerprint": fingerprint, "recipe": recipe.to_mapping()})


def _dataset(tokens: Sequence[Tokens], weights: Sequence[float], replay: Sequence[Tokens], anchor: Sequence[Tokens]) -> Dataset:
    """Returns data, replay and anchor as one table, in the numbering of plans."""
    from datasets import Dataset

    everything = [*tokens, *replay, *anchor]
    return Dataset.from_dict(
        {
            "input_ids": [example.input_ids.tolist() for example in everything],
            "labels": [example.labels.tolist() for example in everything],
            "weight": [*weights, *[1.0] * (len(replay) + len(anchor))],
        }
    )


@contextmanager
def _known_renames() -> Iterator[None]:
    """Hides transformers' warnings that trl and peft still call activation checkpointing by its old name."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", r"`\w*gradient_checkpointing\w*` is deprecated", FutureWarning)
        yield


@contextmanager
def _own_randomness() -> Iterator[None]:
    """Gives the caller's global random states back afterwards: trainers seed them."""
    states = random.getstate(), np.random.get_state()  # noqa: NPY002
    try:
        with torch.random.fork_rng():
            yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])  # noqa: NPY002


@dataclass(frozen=True, eq=False)
class _Before:
    """A model as it was handed in, so that it can be put back, but for the weights of full tuning."""

    model: Any
    trains: bool
    requires: Mapping[str, bool]
    configs: Sequence[tuple[Any, Mapping[str, Any]]]
    attributes: Mapping[str, Any]
    hooks: Mapping[nn.Module, frozenset[int]]

    @classmethod
    def of(cls, model: Any) -> _Before:
        return cls(
            model,
            model.training,
            {name: parameter.requires_grad for name, parameter in model.named_parameters()},
            [(part, copy.deepcopy(vars(part))) for part in (model.config, model.generation_config) if part is not None],
            dict(vars(model)),
            {module: frozenset(module._forward_hooks) for module in model.modules()},
        )

    def strip(self) -> None:
        """Takes off what the trainer puts on a model beside adapters: its own forward, tags, checkpointing, hooks."""
        if _checkpoints_activations(self.model):
            getattr(self.model, "activation_checkpointing_disable", self.model.gradient_checkpointing_disable)()
        for module, known in self.hooks.items():
            for number in set(module._forward_hooks) - known:
                del module._forward_hooks[number]
        for name in set(vars(self.model)) - set(self.attributes) - {"peft_config"}:
            delattr(self.model, name)
        if "forward" in self.attributes:
            self.model.forward = self.attributes["forward"]
        for part, values in self.configs:
            vars(part).update(values)

    def restore(self) -> nn.Module:
        """Takes everything off and returns the model."""
        _take_off_adapters(self.model)
        self.strip()
        for name, parameter in self.model.named_parameters():
            parameter.requires_grad_(self.requires[name])
            parameter.grad = None
        self.model.train(self.trains)
        return self.model  # type: ignore[no-any-return]


def _checkpoints_activations(model: Any) -> bool:
    """transformers renames the property in its version 6, and warns of the old name before that."""
    kind = type(model)
    name = "is_activation_checkpointing" if hasattr(kind, "is_activation_checkpointing") else "is_gradient_checkpointing"
    return bool(getattr(model, name))


def _take_off_adapters(model: Any) -> None:
    """Puts each adapted layer's own layer back in its place."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    for name, module in list(model.named_modules()):
        if isinstance(module, BaseTunerLayer):
            parent, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(parent), leaf, module.get_base_layer())
    if hasattr(model, "peft_config"):
        del model.peft_config


# -- after ----------------------------------------------------------------------------------------------------------------


def _facts(trainer: PlannedTrainer, plan: Sequence[Step], out: Path) -> dict[str, Any]:
    """Returns the numbers of a finished run, as JSON."""
    history = [entry for entry in trainer.state.log_history if "loss" in entry]
    rates = [entry["learning_rate"] for entry in history]
    ends = epoch_ends(plan) if trainer.recipe.save_epochs else []
    return {
        "steps": len(plan),
        "epochs": plan[-1].epoch,
        **asdict(trainer.spent),
        "losses": [entry["loss"] for entry in history],
        "checkpoints": [
            {
                "folder": f"{CHECKPOINTS}/checkpoint-{end}",
                "epoch": plan[end - 1].epoch,
                "learning_rate": sum(rates[start:end]) / (end - start),
            }
            for start, end in zip([0, *ends], ends, strict=False)
        ],
    }


def _load(model: Any, recipe: Recipe, out: Path, before: _Before) -> Trained:
    """Returns a finished run with its weights read from its folder."""
    facts = json.loads((out / FINISHED).read_text())
    if recipe.tuning == "lora":
        from peft import PeftModel

        with _known_renames():
            live: Any = PeftModel.from_pretrained(model, str(out / MODEL))
    else:
        live = model
        live.load_state_dict(type(model).from_pretrained(out / MODEL, dtype=model.dtype).state_dict())
    return _trained(live, recipe, out, facts, before)


def _trained(live: Any, recipe: Recipe, out: Path, facts: dict[str, Any], before: _Before) -> Trained:
    before.strip()
    live.zero_grad()
    live.eval()
    kept = {out / entry["folder"] for entry in facts["checkpoints"]}
    for folder in (out / CHECKPOINTS).glob("checkpoint-*"):
        if folder not in kept:
            shutil.rmtree(folder, ignore_errors=True)  # several processes may come here at once

    def refuse() -> nn.Module:
        raise InvalidArgument("restore must follow lora tuning, got full, which trains in place; load the model again")

    return Trained(
        model=live,
        folder=out / MODEL,
        **{
            name: facts[name]
            for name in ("steps", "epochs", "tokens", "seconds", "cpu_seconds", "surgery_seconds", "conflicts")
        },
        losses=tuple(facts["losses"]),
        checkpoints=tuple(Checkpoint(out / e["folder"], e["epoch"], e["learning_rate"]) for e in facts["checkpoints"]),
        _restore=before.restore if recipe.tuning == "lora" else refuse,
    )
