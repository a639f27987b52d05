"""Which cells a comparison has: one per arm, budget, seed and view, each a unit that is run, kept and resumed by itself."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from gradsieve.compare.config import BASE, FULL, RANDOM, Config, View
from gradsieve.errors import InvalidArgument


@dataclass(frozen=True, slots=True)
class Cell:
    """One training run and its evaluation; for `base` the evaluation alone.

    Attributes:
        arm: Name of its arm.
        budget: What the arm may choose; None where it does not choose.
        seed: Of training and of the method's draws; None for `base`, in which nothing is random.
        view: What is equal between the arms; None for `base`.
    """

    arm: str
    budget: str | None = None
    seed: int | None = None
    view: View | None = None

    @property
    def name(self) -> str:
        """Its folder's name; names of arms hold single dashes at most, so that two cells never share one."""
        parts = [self.arm, self.budget, self.seed, self.view]
        return "--".join(str(part) for part in parts if part is not None).replace("%", "pct")


def plan_cells(config: Config) -> list[Cell]:
    """Returns the cells in the order they are run.

    The untouched model first, because others are measured against it; then seed by seed, so that whatever is finished when a
    run is cut short compares all arms; within a seed view by view, the baselines before the methods. Chance is tried at every
    budget that any arm has.
    """
    cells = [Cell(BASE)]
    for seed in config.seeds:
        for view in config.views:
            cells.append(Cell(FULL, None, seed, view))
            others = [arm for arm in config.arms if arm.name not in (BASE, FULL)]
            for arm in (arm for arm in others if not arm.chooses):
                cells.append(Cell(arm.name, None, seed, view))
            for budget in budgets(config):
                for arm in others:
                    if arm.name == RANDOM or (arm.chooses and budget in (arm.budgets or config.budgets)):
                        cells.append(Cell(arm.name, budget, seed, view))
    return cells


def budgets(config: Config) -> Sequence[str]:
    """Returns every budget of any arm, the comparison's own first, each once."""
    return list(dict.fromkeys([*config.budgets, *(budget for arm in config.arms for budget in arm.budgets)]))


def only_cells(config: Config, only: Sequence[str]) -> list[Cell]:
    """Returns the cells of some arms, and the untouched model's, in the order they are run; all where `only` is empty.

    Args:
        config: The comparison.
        only: Names of arms, each alone or with one of its budgets: ARM or ARM@BUDGET.

    Raises:
        InvalidArgument: There is no such arm, or it has no such budget.
    """
    cells = plan_cells(config)
    of_arm: dict[str, set[str | None]] = {}
    for cell in cells:
        of_arm.setdefault(cell.arm, set()).add(cell.budget)
    wanted: set[tuple[str, str | None]] = {(BASE, None)}
    for given in only:
        name, at, budget = given.partition("@")
        if name not in of_arm:
            raise InvalidArgument(f"only must name arms ({', '.join(arm.name for arm in config.arms)}), got {given!r}")
        if at and budget not in of_arm[name]:
            have = ", ".join(f"{name}@{own}" for own in budgets(config) if own in of_arm[name]) or f"{name}, which has none"
            raise InvalidArgument(f"only must name budgets of the arm ({have}), got {given!r}")
        wanted |= {(name, own) for own in of_arm[name] if not at or own == budget}
    return [cell for cell in cells if not only or (cell.arm, cell.budget) in wanted]
