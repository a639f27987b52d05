"""Finished cells → differences between arms: the same items, the same seeds, each pair cell by cell.

    X[arm]  [S, I]    values of the S seeds that both arms have and the I items that have one, of one test in one metric
    D = ±(X[a] - X[b])  turned so that higher is better

Of `base`, in which nothing is random, the values stand for every seed. All differences share the draws of items, so that those
of one test can be averaged and held against each other draw by draw.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import numpy.typing as npt

from gradsieve.compare.cells import Cell
from gradsieve.compare.config import BASE
from gradsieve.compare.records import Finished, Measurements
from gradsieve.compare.statistics import Draws, Estimate, Floats, estimate, interval, replicates
from gradsieve.compare.units import lower_is_better
from gradsieve.errors import DataError

Key = tuple[str, str | None, str]
"""An arm at a budget in a view."""


@dataclass(frozen=True, eq=False)
class Paired:
    """Everything that was measured, for differences between any two arms.

    Attributes:
        finished: Cells, the untouched model's among them.
        roles: Role of each test.
        resamples: Of the bootstrap.
    """

    finished: Sequence[Finished]
    roles: Mapping[str, str]
    resamples: int
    _measured: dict[Cell, Measurements] = field(default_factory=dict)
    _drawn: dict[tuple[str, int], npt.NDArray[np.uint16]] = field(default_factory=dict)  # the same for all arms

    @cached_property
    def base(self) -> Measurements:
        """What the untouched model has."""
        return self._of(Cell(BASE))

    @cached_property
    def seeds(self) -> Mapping[Key, list[int]]:
        """The seeds of each arm at each budget in each view."""
        found: dict[Key, list[int]] = {}
        for one in self.finished:
            cell = one.cell
            if cell.seed is not None and cell.view is not None:
                found.setdefault((cell.arm, cell.budget, cell.view), []).append(cell.seed)
        return found

    def shared(self, key: Key, other: Key) -> list[int]:
        """Returns the seeds of an arm that another has too."""
        others = self.seeds.get(key if other[0] == BASE else other, [])
        return [seed for seed in self.seeds.get(key, []) if seed in others]

    def has(self, test: str, metric: str) -> bool:
        """Says whether any item of a test has a value of a metric."""
        values = self.base.values.get(test, {}).get(metric)
        return values is not None and not np.isnan(values).all()

    def values(self, key: Key, seeds: Sequence[int], test: str, metric: str) -> Floats:
        """Returns the values of an arm, [S, I]: those of the items that have one.

        Raises:
            DataError: They are of other items than the untouched model's.
        """
        arm, budget, view = key
        known = ~np.isnan(self.base.values[test][metric])
        if arm == BASE:
            return np.tile(self.base.values[test][metric][known], (len(seeds), 1))
        rows = []
        for seed in seeds:
            cell = Cell(arm, budget, seed, view)  # type: ignore[arg-type]
            measured = self._of(cell)
            there = measured.values.get(test, {})
            if metric not in there:
                raise DataError(
                    f"{cell.name}: must have {metric} on {test}, as base has, got {', '.join(there) or 'none'}; remove the "
                    "folder of the one that was measured otherwise and run again"
                )
            row = there[metric]
            if list(measured.items[test]) != list(self.base.items[test]):
                raise DataError(f"{cell.name}: its values of {metric} on {test} must be of the items of base, got others")
            if (np.isnan(row) == known).any():
                item = measured.items[test][int((np.isnan(row) == known).argmax())]
                raise DataError(
                    f"{cell.name}: its values of {metric} on {test} must be of the items of base, got NaN for {item} of "
                    f"one of the two; leave {item} out of {test}, or {test} out of the comparison, and run in another folder"
                )
            rows.append(row[known])
        return np.stack(rows)

    def metrics(self, role: str) -> list[str]:
        """Returns the metrics of which any test of a role has a value, in the order they were asked for."""
        tests = [test for test, own in self.roles.items() if own == role]
        named = dict.fromkeys(metric for test in tests for metric in self.base.values.get(test, {}))
        return [metric for metric in named if any(self.has(test, metric) for test in tests)]

    def difference(self, key: Key, other: Key, test: str, metric: str) -> Estimate | None:
        """Returns by how much an arm is better than another on a test; None where they share no seed."""
        if not self.shared(key, other):
            return None
        table = self._differences(key, other, test, metric, self.shared(key, other))
        return estimate(table, *self._draws(table, test, metric))

    def over_tests(
        self, key: Key, other: Key, role: str, metric: str, seeds: Sequence[int] | None = None
    ) -> tuple[Estimate, Floats]:
        """Returns by how much an arm is better than another, mean of a role's tests, and the same under every draw, [B].

        Args:
            key: The one.
            other: The other; they must share a seed.
            role: Of the tests, of which those count that have the metric.
            metric: In which.
            seeds: Of those that both have; all by default.

        Raises:
            DataError: No test of the role has the metric.
        """
        tests = [test for test, own in self.roles.items() if own == role and self.has(test, metric)]
        if not tests:
            raise DataError(f"tests of role {role} must have the metric {metric}, got none that does; add it to their metrics")
        own = self.shared(key, other) if seeds is None else seeds
        tables = {test: self._differences(key, other, test, metric, own) for test in tests}
        drawn = np.mean([replicates(table, *self._draws(table, test, metric)) for test, table in tables.items()], axis=0)
        mean = float(np.mean([table.mean() for table in tables.values()]))
        items = [table.shape[1] for table in tables.values()]
        return Estimate(mean, *interval(drawn), len(own), sum(items), min(items)), drawn

    def _of(self, cell: Cell) -> Measurements:
        if cell not in self._measured:
            found = next(one for one in self.finished if one.cell == cell)
            self._measured[cell] = found.measurements()
        return self._measured[cell]

    def _differences(self, key: Key, other: Key, test: str, metric: str, seeds: Sequence[int]) -> Floats:
        """D of the module, [S, I]."""
        sign = -1.0 if lower_is_better(metric) else 1.0
        return sign * (self.values(key, seeds, test, metric) - self.values(other, seeds, test, metric))

    def _draws(self, table: Floats, test: str, metric: str) -> tuple[Draws, Floats]:
        draws, key = Draws.of(len(table), self.resamples), (f"{test}/{metric}", table.shape[1])
        if key not in self._drawn:
            self._drawn[key] = draws.items(*key).astype(np.uint16)
        return draws, self._drawn[key].astype(np.float64)
