"""One cell's work: train on a subset, measure, let it answer a few prompts."""

from __future__ import annotations

import dataclasses
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xxhash

from gradsieve.clock import Progress, silent
from gradsieve.compare.cells import Cell
from gradsieve.compare.config import BASE, Arm, Config
from gradsieve.compare.material import Material, tokens_digest
from gradsieve.compare.records import Values
from gradsieve.compare.subsets import Subset
from gradsieve.data import IGNORE, Tokens
from gradsieve.errors import InvalidArgument
from gradsieve.evaluate import TestSet, measure
from gradsieve.train import Recipe, finetune
from gradsieve.train.plan import make_plan

ANSWER_TOKENS = 48


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

    Raises:
        InvalidArgument: An arm needs an anchor and there is none, or it chose nothing.
    """
    if arm.method == BASE:
        return Job(None)
    assert chosen is not None
    assert cell.seed is not None
    trainable = material.trainable(cell.seed)
    recipe = resolved_recipe(material, cell, arm)
    of_id = dict(zip(trainable.pool.ids, trainable.pool.tokens, strict=True))
    anchor = trainable.anchor.tokens if trainable.anchor else []
    if (recipe.surgery != "none" or recipe.replay_share > 0) and not anchor:
        raise InvalidArgument(f"{arm.name} needs an anchor (general examples), got none; name one in {material.config.source}")
    equal = len(set(chosen.weights)) <= 1
    return Job(
        recipe,
        [of_id[id] for id in chosen.ids],
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
    return len(make_plan(Recipe(**config.recipe), pool))


@dataclass(frozen=True, eq=False)
class Outcome:
    """What came of a cell.

    Attributes:
        values: Per item, by test and metric.
        answers: Prompt, reference and answer of a few items.
        training: Steps, tokens, seconds and the like; empty for `base`.
        seconds: Of training, evaluation and generation.
    """

    values: Values
    answers: Sequence[Mapping[str, str]]
    training: Mapping[str, Any]
    seconds: Mapping[str, float]


def work(model: Any, material: Material, job: Job, folder: Path, progress: Progress = silent) -> tuple[Outcome, Any]:
    """Trains, measures and lets the model answer; a killed training in `folder` goes on.

    Returns:
        The outcome, and the model as it was handed in; None in its place where all its weights were trained.
    """
    if job.recipe is None:
        return _examine(model, material, {}, 0.0, progress), model
    trained = finetune(
        model,
        job.tokens,
        job.recipe,
        folder,
        weights=job.weights,
        anchor=job.anchor,
        replay=job.replay,
        progress=progress,
    )
    facts = {
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
    lora = job.recipe.tuning == "lora"
    base = None if lora else material.source.load(material.dtype, material.device)
    outcome = _examine(trained.model, material, facts, trained.seconds, progress, base)
    return outcome, trained.restore() if lora else None


def clear(folder: Path, *, keep_model: bool) -> None:
    """Removes what a finished training left: all of it, or all but the model."""
    if not keep_model:
        shutil.rmtree(folder, ignore_errors=True)
        return
    shutil.rmtree(folder / "checkpoints", ignore_errors=True)


def _examine(
    model: Any, material: Material, facts: Mapping[str, Any], train_seconds: float, progress: Progress, base: Any = None
) -> Outcome:
    started = time.perf_counter()
    values = _measure(model, material, bool(facts), base, progress)
    measured = time.perf_counter()
    answers = _answers(model, material)
    seconds = {"train": train_seconds, "evaluate": measured - started, "generate": time.perf_counter() - measured}
    return Outcome(values, answers, facts, seconds)


def _measure(model: Any, material: Material, trained: bool, base: Any, progress: Progress) -> Values:
    """Returns the values per item by test and metric; the untouched model's KL to itself is 0.

    METEOR is called `meteor_nosyn` where there are no synonyms.
    """
    values: dict[str, dict[str, np.ndarray]] = {}
    for test in material.tests:
        metrics = metrics_of(material.config, test)
        asked = [metric for metric in metrics if trained or metric != "kl"]
        found = measure(
            model,
            [test],
            tokenizer=material.source.tokenizer,
            base=base if "kl" in asked else None,
            metrics=asked,  # type: ignore[arg-type]
            progress=progress,
        )[test.name]
        by_metric = {metric: column.numpy() for metric, column in found.items()}
        if "kl" in metrics and not trained:
            by_metric["kl"] = np.zeros(len(test.examples))
        names = [name for metric in metrics for name in (metric, f"{metric}_nosyn") if name in by_metric]
        values[test.name] = {name: by_metric[name] for name in names}
    return values


def metrics_of(config: Config, test: TestSet) -> tuple[str, ...]:
    """Returns what is measured on a test: what it asks for, else the comparison's metrics, without KL on a target test.

    Learning the target moves a model away from its base there; that is no forgetting, and KL costs a second forward pass.
    """
    own = config.tests[test.name].metrics
    return own or tuple(metric for metric in config.metrics if metric != "kl" or test.role == "general")


def _answers(model: Any, material: Material) -> list[dict[str, str]]:
    """Returns what the model answers, greedily, to the first prompts of each target test."""
    count = material.config.generations
    shown = []
    for test in (test for test in material.tests if test.role == "target"):
        for example, tokens in list(zip(test.examples, test.tokens, strict=True))[:count]:
            prompt = tokens.input_ids[: int(np.flatnonzero(tokens.labels != IGNORE)[0])]
            reference = str(example.messages[-1].get("content") or "")
            turns = [str(turn.get("content") or "") for turn in example.messages[:-1]]
            answer = _answer(model, material, prompt)
            shown.append(
                {"test": test.name, "item": example.id, "prompt": "\n".join(turns), "reference": reference, "answer": answer}
            )
    return shown


def _answer(model: Any, material: Material, prompt: np.ndarray) -> str:
    tokenizer = material.source.tokenizer
    ids = torch.from_numpy(prompt.astype(np.int64))[None].to(material.device)
    with torch.no_grad():
        out = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=ANSWER_TOKENS,
            do_sample=False,
            temperature=None,
            top_p=None,
            top_k=None,
            pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id,
        )
    return str(tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)).strip()
