"""What is refused before a model is loaded: whatever would fail in its cell, hours later, or would have no effect."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from gradsieve.compare.cells import Cell
from gradsieve.compare.config import BASE, Arm, Config
from gradsieve.compare.material import Material
from gradsieve.compare.speed import expected_examples
from gradsieve.compare.stores import check_gradients, job_settings, selector, warmup_of
from gradsieve.compare.training import resolved_recipe
from gradsieve.data.dedup import find_duplicates
from gradsieve.errors import GradsieveError, InvalidArgument
from gradsieve.job import Job
from gradsieve.needs import reads_set
from gradsieve.train import Recipe
from gradsieve.train.checks import check_precision, check_warmup, require_packages
from gradsieve.train.plan import make_plan
from gradsieve.types import ArrayGradients, Budget


def check_comparison(material: Material, cells: Sequence[Cell], left: Sequence[Cell]) -> None:
    """Refuses a comparison that could not be finished as its file says.

    Args:
        material: What it works on.
        cells: All of them.
        left: Those that are not finished.

    Raises:
        GradsieveError: Whatever the user can mend; the message has file and key.
    """
    check_effects(material.config)
    check_arms(material)
    check_gradients(material, {cell.arm for cell in left})
    check_budgets(material)
    check_training(material, cells)


def check_effects(config: Config) -> None:
    """Refuses settings that nothing would come of."""
    for key, value, where in _without_effect(config):
        raise InvalidArgument(f"{config.source}: {key} must be left out {where}, got {value}; remove it")


def _without_effect(config: Config) -> Iterator[tuple[str, object, str]]:
    """Yields keys, their values, and where they do nothing."""
    trained = [arm for arm in config.arms if arm.name != BASE]
    if config.steps is not None and "equal_steps" not in config.views:
        yield "steps", config.steps, "where views has no equal_steps, of which it is the length"
    if "equal_repetition" not in config.views:
        if config.steps is not None and "epochs" in config.recipe:
            yield "recipe.epochs", config.recipe["epochs"], "in the view equal_steps where steps is set"
        for arm in (arm for arm in trained if "epochs" in arm.recipe):
            where = "in the view equal_steps, in which all arms take the same steps"
            yield f"arms.{arm.name}.recipe.epochs", arm.recipe["epochs"], where
    if config.recipe.get("anchor_batch") and not any(_operates(config, arm) for arm in trained):
        yield "recipe.anchor_batch", config.recipe["anchor_batch"], "where no arm has surgery"
    for arm in (arm for arm in trained if arm.recipe.get("anchor_batch") and not _operates(config, arm)):
        yield f"arms.{arm.name}.recipe.anchor_batch", arm.recipe["anchor_batch"], "of an arm without surgery"
    if config.gradients.get("replay"):
        where = "where arms choose from the pool alone (name the files under pool, or set a recipe's replay_share)"
        yield "gradients.replay", ", ".join(config.gradients["replay"]), where
    if config.gradients.get("warmup_recipe") and not any(warmup_of(selector(arm)) for arm in trained if arm.chooses):
        yield "gradients.warmup_recipe", config.gradients["warmup_recipe"], "where no method trains the model first"


def _operates(config: Config, arm: Arm) -> bool:
    return Recipe(**{**config.recipe, **arm.recipe}).surgery != "none"


def check_arms(material: Material) -> None:
    """Refuses an arm whose method reads a role that is not given, or that a seed has no examples of."""
    for arm in material.config.arms:
        needs = selector(arm).needs if arm.chooses else frozenset()
        for role in ("target", "anchor"):
            if any(reads_set(need, role) for need in needs):
                _require(material, role, f"the arm {arm.name}")


def _require(material: Material, role: str, reader: str) -> None:
    config = material.config
    if not getattr(config, role):
        raise InvalidArgument(f"{config.source}: {role} must be given for {reader}, got none")
    for seed in config.seeds:
        if not getattr(material.sides(seed), role):
            raise InvalidArgument(
                f"{config.source}: {role} must have an example for {reader}, got none in seed {seed}, as all that leaked were "
                "dropped; mend the files"
            )


def check_budgets(material: Material) -> None:
    """Refuses budgets that a seed's pool, without what repeats in it, cannot pay for, or that buy nothing."""
    config = material.config
    budgets = {"budgets": config.budgets} | {f"arms.{arm.name}.budgets": arm.budgets for arm in config.arms}
    job = Job(**job_settings(material))
    for seed in config.seeds if config.data_per_seed else config.seeds[:1]:
        tokens = material.trainable(seed).pool
        usable = [tokens.examples[position] for position in tokens.kept]
        repeated = {duplicate.position for duplicate in find_duplicates(usable, job.dedup, job.dedup_threshold)}
        lengths = torch.tensor([n for i, n in enumerate(tokens.lengths) if i not in repeated], dtype=torch.float64)
        ids = [id for i, id in enumerate(tokens.ids) if i not in repeated]
        pool = ArrayGradients(ids, torch.empty(len(lengths), 0), {"tokens": lengths})
        for key, budget in ((key, budget) for key, own in budgets.items() for budget in own):
            try:
                Budget.parse(budget).limit(pool)
            except InvalidArgument as error:
                raise InvalidArgument(f"{config.source}: {key}, in seed {seed}: {error}") from None


def check_training(material: Material, cells: Sequence[Cell]) -> None:
    """Refuses recipes that would fail in their cell; the first seed's stand for all."""
    config = material.config
    for cell in (cell for cell in cells if cell.arm != BASE and cell.seed == config.seeds[0]):
        try:
            recipe = resolved_recipe(material, cell, config.arm(cell.arm))
            require_packages(recipe)
            check_precision({material.dtype}, recipe)
            check_warmup(recipe, len(make_plan(recipe, expected_examples(material, cell), 1, 1)))
        except GradsieveError as error:
            raise type(error)(f"{config.source}: {cell.name}: {error}") from None
        if recipe.surgery != "none" or recipe.replay_share > 0:
            _require(material, "anchor", f"surgery and replay of {cell.name}")
