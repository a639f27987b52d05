"""Which cells a comparison has: one per arm, budget, seed and view, each a unit that is run, kept and resumed by itself."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from gradsieve.compare.config import BASE, FULL, Config, View


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
    run is cut short compares all arms; within a seed view by view, the baselines before the methods.
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
                    if arm.chooses and budget in (arm.budgets or config.budgets):
                        cells.append(Cell(arm.name, budget, seed, view))
    return cells


def budgets(config: Config) -> Sequence[str]:
    """Returns every budget of any arm, the comparison's own first, each once."""
    return list(dict.fromkeys([*config.budgets, *(budget for arm in config.arms for budget in arm.budgets)]))
