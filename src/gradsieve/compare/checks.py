"""What is refused before a model is loaded: whatever would fail in its cell, hours later."""

from __future__ import annotations

from collections.abc import Sequence

from gradsieve.compare.cells import Cell
from gradsieve.compare.config import BASE, Config
from gradsieve.compare.material import Material
from gradsieve.compare.speed import expected_examples
from gradsieve.compare.stores import selector
from gradsieve.compare.training import resolved_recipe
from gradsieve.errors import GradsieveError, InvalidArgument
from gradsieve.needs import reads_set
from gradsieve.train.checks import check_precision, check_warmup, require_packages
from gradsieve.train.plan import make_plan


def check_arms(config: Config) -> None:
    """Refuses an arm whose method reads a role that is not given."""
    for arm in config.arms:
        needs = selector(arm).needs if arm.chooses else frozenset()
        for role in ("target", "anchor"):
            if any(reads_set(need, role) for need in needs) and not getattr(config, role):
                raise InvalidArgument(f"{config.source}: {role} must be given for the arm {arm.name}, got none")


def check_training(material: Material, cells: Sequence[Cell]) -> None:
    """Refuses recipes that would fail in their cell; the first seed's stand for all."""
    config = material.config
    for cell in (cell for cell in cells if cell.arm != BASE and cell.seed == config.seeds[0]):
        try:
            recipe = resolved_recipe(material, cell, config.arm(cell.arm))
            if (recipe.surgery != "none" or recipe.replay_share > 0) and not config.anchor:
                raise InvalidArgument("anchor must be given for surgery and replay, got none")
            require_packages(recipe)
            check_precision({material.dtype}, recipe)
            check_warmup(recipe, len(make_plan(recipe, expected_examples(material, cell), 1, 1)))
        except GradsieveError as error:
            raise type(error)(f"{config.source}: {cell.name}: {error}") from None
