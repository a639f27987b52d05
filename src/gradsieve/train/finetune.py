"""Fine-tuning as a function of model, tokens and recipe, in a folder that a killed run goes on in.

out/training.json        recipe and fingerprint of the run, written first
out/checkpoints/         checkpoint-STEP/: weights, optimizer, schedule, random states; whole once they hold spent.json
out/model/               the adapters (lora) or the whole model (full), safetensors
out/tensorboard/         what TensorBoard reads, if report_to names it and $TENSORBOARD_LOGGING_DIR no other place
out/trained.json         numbers of the finished run, written last: with it, the same call only loads the model
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from gradsieve.atomic import write_json
from gradsieve.clock import Progress, silent
from gradsieve.data import Tokens
from gradsieve.errors import InvalidArgument
from gradsieve.foreign import known_renames, own_randomness
from gradsieve.train.checks import check, check_warmup, deciding, fingerprint, require_packages
from gradsieve.train.lending import Before
from gradsieve.train.plan import Step, epoch_ends, make_plan
from gradsieve.train.recipe import Recipe

if TYPE_CHECKING:
    from datasets import Dataset

    from gradsieve.train.trainer import PlannedTrainer, Watch

STARTED, FINISHED, CHECKPOINTS, MODEL, LOGS = "training.json", "trained.json", "checkpoints", "model", "tensorboard"


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
        watch_seconds: The part of `seconds` in which the model was shown to `watch`.
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
    watch_seconds: float
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
    name: str = "",
    progress: Progress = silent,
    watch: Watch | None = None,
) -> Trained:
    """Trains a model on tokens, on exactly the labels and the loss that gradients are taken of by default.

        L_step = (1/B) sum_{i in step} w_i l(z_i),   l(z) = mean over z's completion tokens

    It is the mean also of examples whose gradients were taken of the sum (`Job.reduction`).

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
        name: What trackers call the run; by default as its folder is called.
        progress: Is told how many tokens are done.
        watch: Is shown the model before each step that is taken; it must leave it as it is.

    Raises:
        InvalidArgument: Arguments do not fit each other, or the folder holds another run.
        MissingExtra: trl is not installed.
        ModelError: The model cannot be trained this way, or its loss is no longer finite.
    """
    require_packages(recipe)
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    scaled = check(model, tokens, recipe, weights, anchor, replay)
    plan = make_plan(recipe, len(tokens), len(replay), len(anchor))
    check_warmup(recipe, len(plan))
    _claim(out, recipe, fingerprint(model, recipe, tokens, scaled, anchor, replay))
    before = Before.of(model)
    try:
        with own_randomness(), known_renames():
            if (out / FINISHED).exists():
                live, facts = _load(model, recipe, out)
            else:
                data = _dataset(tokens, scaled, replay, anchor)
                with _own_run(recipe):
                    live, facts = _train(model, data, plan, recipe, out, name or out.resolve().name, progress, watch)
        return _trained(live, recipe, out, facts, before)
    except BaseException:
        before.restore()
        raise


def _train(
    model: nn.Module,
    data: Dataset,
    plan: Sequence[Step],
    recipe: Recipe,
    out: Path,
    name: str,
    progress: Progress,
    watch: Watch | None,
) -> tuple[Any, dict[str, Any]]:
    """Returns the trained model and the numbers of the run, which its folder then has too."""
    from gradsieve.train.trainer import PlannedTrainer, Spent, last_checkpoint

    before = last_checkpoint(out / CHECKPOINTS)
    spent = before[1] if before else Spent()
    trainer = PlannedTrainer(model, data, plan, recipe, out / CHECKPOINTS, progress, spent, name, out / LOGS, watch)
    trainer.train(resume_from_checkpoint=str(before[0]) if before else None)
    trainer.save_model(str(out / MODEL))
    live = trainer.accelerator.unwrap_model(trainer.model, keep_fp32_wrapper=False)
    facts = _facts(trainer, plan)
    if trainer.is_world_process_zero():
        write_json(out / FINISHED, facts)
    trainer.accelerator.wait_for_everyone()
    trainer.accelerator.free_memory()
    return live, facts


@contextmanager
def _own_run(recipe: Recipe) -> Iterator[None]:
    """Ends the run that wandb began for this training, so that the next gets one of its own; the caller's is left open."""
    if "wandb" not in recipe.report_to:
        yield
        return
    import wandb

    theirs = wandb.run
    try:
        yield
    finally:
        if theirs is None and wandb.run is not None:
            wandb.finish()


def _claim(out: Path, recipe: Recipe, outcome: str) -> None:
    """Writes what the folder is for, or refuses one that is for something else."""
    out.mkdir(parents=True, exist_ok=True)
    if (out / STARTED).exists():
        found = json.loads((out / STARTED).read_text())
        if found["fingerprint"] == outcome:
            return
        theirs = found["recipe"]
        ours = deciding(recipe.to_mapping())
        differing = [f"{k} {theirs.get(k)} there, {v} here" for k, v in ours.items() if theirs.get(k) != v]
        raise InvalidArgument(
            f"out must be a new folder or one of the same training, got {out}, where "
            f"{'; '.join(differing) or 'model, examples or weights differ'}; name another folder or remove it"
        )
    write_json(out / STARTED, {"fingerprint": outcome, "recipe": recipe.to_mapping()})


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


# -- after ----------------------------------------------------------------------------------------------------------------


def _facts(trainer: PlannedTrainer, plan: Sequence[Step]) -> dict[str, Any]:
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


def _load(model: Any, recipe: Recipe, out: Path) -> tuple[Any, dict[str, Any]]:
    """Returns the model of a finished run, its weights read from the folder, and the run's numbers."""
    facts = json.loads((out / FINISHED).read_text())
    if recipe.tuning == "lora":
        from peft import PeftModel

        return PeftModel.from_pretrained(model, str(out / MODEL)), facts
    model.load_state_dict(type(model).from_pretrained(out / MODEL, dtype=model.dtype).state_dict())
    return model, facts


def _trained(live: Any, recipe: Recipe, out: Path, facts: dict[str, Any], before: Before) -> Trained:
    """Returns the run as its caller gets it; checkpoints that nobody reads are removed."""
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
        **{name: value for name, value in facts.items() if name not in ("losses", "checkpoints")},
        losses=tuple(facts["losses"]),
        checkpoints=tuple(Checkpoint(out / e["folder"], e["epoch"], e["learning_rate"]) for e in facts["checkpoints"]),
        _restore=before.restore if recipe.tuning == "lora" else refuse,
    )
