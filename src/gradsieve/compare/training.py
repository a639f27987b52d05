"""One cell's work: train on a subset, measure, let it answer a few prompts."""

from __future__ import annotations

import dataclasses
import shutil
import time
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from copy import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import xxhash

from gradsieve.clock import Progress, silent
from gradsieve.compare.cells import Cell
from gradsieve.compare.config import BASE, Arm, Config
from gradsieve.compare.material import Material, metrics_of, tokens_digest
from gradsieve.compare.records import Values
from gradsieve.compare.subsets import Subset
from gradsieve.compare.units import directed
from gradsieve.data import Tokens
from gradsieve.errors import InvalidArgument
from gradsieve.evaluate import Generated, KeptBase, TaskResult, TestSet, harness, keep_base, measure
from gradsieve.train import Recipe, Trained, finetune
from gradsieve.train.finetune import CHECKPOINTS, FINISHED, MODEL, STARTED
from gradsieve.train.plan import make_plan


@dataclass(frozen=True, eq=False)
class Job:
    """A cell made ready: what it trains on, and how.

    Attributes:
        recipe: With steps or epochs and seed set; None for `base`.
        tokens: Examples to train on, best first.
        weights: One per example; None where all are equal.
        anchor: Examples that surgery protects.
        replay: General examples that are mixed in.
    """

    recipe: Recipe | None
    tokens: Sequence[Tokens] = ()
    weights: tuple[float, ...] | None = None
    anchor: Sequence[Tokens] = ()
    replay: Sequence[Tokens] = ()

    @property
    def steps(self) -> int:
        """Optimizer steps."""
        return len(self._plan())

    @property
    def trained_tokens(self) -> int:
        """Tokens that go through the model in training, those of surgery's anchors included."""
        everything = [*self.tokens, *self.replay, *self.anchor]
        lengths = [len(one.input_ids) for one in everything]
        return sum(lengths[row] for step in self._plan() for row in (*step.rows, *step.anchors))

    def _plan(self) -> Sequence[Any]:
        if self.recipe is None:
            return ()
        return make_plan(self.recipe, len(self.tokens), len(self.replay), len(self.anchor))

    def inputs(self) -> dict[str, Any]:
        """Returns all that decides how the training comes out, but the model."""
        if self.recipe is None:
            return {"recipe": None}
        return {
            "recipe": self.recipe.to_mapping(),
            "subset": tokens_digest(self.tokens),
            "weights": None if self.weights is None else xxhash.xxh3_64_hexdigest(repr(self.weights).encode()),
            "anchor": tokens_digest(self.anchor) if self.anchor else None,
            "replay": tokens_digest(self.replay) if self.replay else None,
        }


def make_job(material: Material, cell: Cell, arm: Arm, chosen: Subset | None) -> Job:
    """Returns a cell's job.

    In the view `equal_steps` every arm takes the same number of full batches, whatever it chose; in `equal_repetition` every
    arm passes as often over what it chose, so that a small subset takes few steps.

    """
    if arm.method == BASE:
        return Job(None)
    assert chosen is not None
    assert cell.seed is not None
    trainable = material.trainable(cell.seed)
    recipe = resolved_recipe(material, cell, arm)
    anchor = trainable.anchor.tokens if trainable.anchor else []
    equal = len(set(chosen.weights)) <= 1
    return Job(
        recipe,
        [trainable.of_id[id] for id in chosen.ids],
        None if equal else chosen.weights,
        anchor if recipe.surgery != "none" else (),
        anchor if recipe.replay_share > 0 else (),
    )


def resolved_recipe(material: Material, cell: Cell, arm: Arm) -> Recipe:
    """Returns how a cell is trained: the comparison's recipe, the arm's own settings, the view's length, the cell's seed."""
    config = material.config
    assert cell.seed is not None
    recipe = Recipe(**{**config.recipe, **arm.recipe})
    recipe = dataclasses.replace(recipe, epochs=recipe.passes, seed=cell.seed)
    if cell.view == "equal_repetition":
        return recipe
    steps = config.steps or full_steps(config, len(material.trainable(cell.seed).pool.ids))
    return dataclasses.replace(recipe, epochs=None, steps=steps)


def full_steps(config: Config, pool: int) -> int:
    """Returns the steps that training on the whole pool takes in the recipe's epochs."""
    return len(make_plan(Recipe(**config.recipe), pool, 1, 1))


@dataclass(frozen=True, eq=False)
class Outcome:
    """What came of a cell.

    Attributes:
        items: Ids of each test's items.
        values: Per item, by test and metric.
        answers: Prompt, reference and answer of a few items.
        training: Steps, tokens, seconds and the like; empty for `base`.
        seconds: Of training, evaluation and generation.
    """

    items: Mapping[str, Sequence[str]]
    values: Values
    answers: Sequence[Mapping[str, str]]
    training: Mapping[str, Any]
    seconds: Mapping[str, float]


def keep(model: Any, material: Material, progress: Progress = silent) -> KeptBase | None:
    """Returns what KL needs of the untouched model, kept once for all cells; None where no test has KL."""
    tests = [test for test in material.tests if "kl" in metrics_of(material.config, test)]
    return keep_base(model, tests, progress=progress) if tests else None


def train(model: Any, material: Material, job: Job, folder: Path, progress: Progress = silent) -> Trained:
    """Trains a cell's model; a killed training in `folder`, which lies in the cell's own, goes on."""
    assert job.recipe is not None
    on_cpu = material.device == "cpu"  # what a trainer would do on its own is to take the accelerator
    return finetune(
        model,
        job.tokens,
        dataclasses.replace(job.recipe, device="cpu") if on_cpu else job.recipe,
        folder,
        weights=job.weights,
        anchor=job.anchor,
        replay=job.replay,
        name=folder.parent.name,
        progress=progress,
    )


def given_back(trained: Trained, job: Job) -> Any:
    """Returns the untouched model after a training; None where all its weights were trained."""
    assert job.recipe is not None
    return trained.restore() if job.recipe.tuning == "lora" else None


def work(
    model: Any,
    base: KeptBase | None,
    material: Material,
    job: Job,
    folder: Path,
    progress: Progress = silent,
    training: AbstractContextManager[int] = nullcontext(1),  # noqa: B008  (holds nothing)
) -> tuple[Outcome, Any]:
    """Trains, measures and lets the model answer; a killed training in `folder` goes on.

    Args:
        model: The untouched model.
        base: What `keep` kept of it.
        material: What is measured on.
        job: The cell's.
        folder: Of the training.
        progress: Is told how far a stage is.
        training: Is entered while the model is trained; gives the number of processes that train it.

    Returns:
        The outcome, and the model as it was handed in; None in its place where all its weights were trained.
    """
    if job.recipe is None:
        return _examine(model, None, material, {}, progress), model
    with training as processes:
        trained = train(model, material, job, folder, progress)
    facts = {
        "processes": processes,
        "steps": trained.steps,
        "epochs": trained.epochs,
        "tokens": trained.tokens,
        "seconds": trained.seconds,
        "cpu_seconds": trained.cpu_seconds,
        "surgery_seconds": trained.surgery_seconds,
        "conflicts": trained.conflicts,
        "first_loss": trained.losses[0],
        "last_loss": float(np.mean(trained.losses[-5:])),
    }
    outcome = _examine(trained.model, base, material, facts, progress)
    return outcome, given_back(trained, job)


def clear(folder: Path, *, keep_model: bool) -> None:
    """Removes what a finished training left: all of it but what TensorBoard reads, or all but that and the model.

    Nothing is removed where the checkpoints are gone: what is there then was kept.
    """
    if not (folder / CHECKPOINTS).exists():
        return
    if not keep_model:
        shutil.rmtree(folder / MODEL, ignore_errors=True)
        for name in (STARTED, FINISHED):
            (folder / name).unlink(missing_ok=True)
    shutil.rmtree(folder / CHECKPOINTS, ignore_errors=True)
    if folder.exists() and not any(folder.iterdir()):
        folder.rmdir()


def _examine(model: Any, base: KeptBase | None, material: Material, facts: Mapping[str, Any], progress: Progress) -> Outcome:
    started = time.perf_counter()
    texts: dict[str, list[str]] = {}
    items = {test.name: [example.id for example in test.examples] for test in material.tests}
    values = {test.name: _measure(model, test, base, material, bool(facts), texts, progress) for test in material.tests}
    for task in material.config.tasks:
        values[task] = _task(model, task, material)
        items[task] = [str(number) for number in range(len(next(iter(values[task].values()))))]
    measured = time.perf_counter()
    answers = _answers(model, material, texts)
    seconds = {
        "train": facts.get("seconds", 0.0),
        "evaluate": measured - started,
        "generate": time.perf_counter() - measured,
    }
    return Outcome(items, values, answers, facts, seconds)


def _measure(
    model: Any,
    test: TestSet,
    base: KeptBase | None,
    material: Material,
    trained: bool,
    texts: dict[str, list[str]],
    progress: Progress,
) -> dict[str, npt.NDArray[np.float64]]:
    """Returns the values per item by metric, and keeps the texts; the untouched model's KL to itself is 0.

    METEOR is called `meteor_nosyn` where there are no synonyms.
    """
    metrics = metrics_of(material.config, test)
    asked = [metric for metric in metrics if trained or metric != "kl"]

    def keep_texts(test: TestSet, written: list[Generated]) -> None:
        texts[test.name] = [one.text for one in written]

    found = measure(
        model,
        [test],
        tokenizer=material.source.tokenizer,
        base=base if "kl" in asked else None,
        metrics=asked,  # type: ignore[arg-type]
        max_new_tokens=material.config.max_new_tokens,
        progress=progress,
        on_texts=keep_texts,
    )[test.name]
    by_metric = {metric: column.numpy() for metric, column in found.items()}
    if "kl" in metrics and not trained:
        by_metric["kl"] = np.zeros(len(test.examples))
    names = [name for metric in metrics for name in (metric, f"{metric}_nosyn") if name in by_metric]
    return {name: by_metric[name] for name in names}


def _task(model: Any, name: str, material: Material) -> dict[str, npt.NDArray[np.float64]]:
    """Returns what a task of lm-evaluation-harness gives per document, under names that say what is better of it."""
    found = run_task(model, name, material, material.config.tasks[name].limit)
    return {
        directed(metric, found.higher_is_better.get(metric)): column.double().numpy() for metric, column in found.items.items()
    }


def run_task(model: Any, name: str, material: Material, limit: int | None) -> TaskResult:
    """Returns what a task of lm-evaluation-harness gives on its first `limit` documents, on all where that is None.

    Raises:
        InvalidArgument: It gives no number per document.
    """
    task = material.config.tasks[name]
    tokenizer = material.source.tokenizer
    if material.template is not None:
        tokenizer = copy(tokenizer)
        tokenizer.chat_template = material.template
    found = harness(
        model,
        tokenizer,
        [name],
        include_path=task.include_path,
        limit=limit,
        fewshot=task.fewshot,
        chat=task.chat,
    )[name]
    if not found.items:
        raise InvalidArgument(f"task {name} must give a number per document, got none (a group of tasks?); name its members")
    return found


def _answers(model: Any, material: Material, texts: Mapping[str, Sequence[str]]) -> list[dict[str, str]]:
    """Returns what the model answers, greedily, to the first prompts of each target test; texts that are there are taken."""
    config, shown = material.config, []
    for test in (test for test in material.tests if test.role == "target"):
        count = min(config.generations, len(test.examples))
        if count == 0:
            continue
        written = texts.get(test.name) or _written(model, test.first(count), material)
        for example, answer in list(zip(test.examples, written, strict=False))[:count]:
            turns = [str(turn.get("content") or "") for turn in example.messages[:-1]]
            reference = str(example.messages[-1].get("content") or "")
            shown.append(
                {
                    "test": test.name,
                    "item": example.id,
                    "prompt": "\n".join(turns),
                    "reference": reference,
                    "answer": answer.strip(),
                }
            )
    return shown


def _written(model: Any, test: TestSet, material: Material) -> list[str]:
    """Returns the greedily generated text of each item."""
    texts: list[str] = []
    measure(
        model,
        [test],
        tokenizer=material.source.tokenizer,
        metrics=["stopped"],
        max_new_tokens=material.config.max_new_tokens,
        on_texts=lambda _, written: texts.extend(one.text for one in written),
    )
    return texts
