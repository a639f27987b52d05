"""Finished cells → what can be said: gains, forgetting, differences with intervals, the Pareto front, costs, overlaps.

    gain         of an arm: its difference to the untouched model, turned so that higher is better
    forgetting   the same on a general test, turned so that higher is worse; KL to the base model as it is
    standing     one arm at one budget in one view: its gain on the target tests and its forgetting, each averaged over the
                 tests, in the metric that is looked at first

Differences are paired: the same items, the same seeds (of `base`, in which nothing is random, the values stand for every seed).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import combinations
from typing import Any

import numpy as np
import numpy.typing as npt

from gradsieve.compare.cells import Cell
from gradsieve.compare.config import BASE, FULL, RANDOM
from gradsieve.compare.records import Finished, Measurements, read_json
from gradsieve.compare.statistics import Draws, Estimate, Floats, Verdict, estimate, front, interval, replicates, tally
from gradsieve.compare.subsets import overlap
from gradsieve.errors import DataError

LOWER_IS_BETTER = frozenset(
    {"loss", "nll", "key_loss", "kl", "perplexity", "word_perplexity", "byte_perplexity", "bits_per_byte"}
)
"""Metrics of which less is better; of all others more is."""

Key = tuple[str, str | None, str]
"""An arm at a budget in a view."""


@dataclass(frozen=True, slots=True)
class Effect:
    """One arm at one budget in one view, on one test by one metric.

    Attributes:
        arm: Which arm.
        budget: None where it does not choose.
        view: What is equal between the arms.
        test: Which test.
        role: `target` or `general`.
        metric: By what.
        mean: Over seeds and items, as measured.
        base: The untouched model's.
        against: Difference to `base`, `random` (same budget) and `full`, higher is better; None where there is no such arm.
    """

    arm: str
    budget: str | None
    view: str
    test: str
    role: str
    metric: str
    mean: float
    base: float
    against: Mapping[str, Estimate | None]


@dataclass(frozen=True, slots=True)
class Standing:
    """Where an arm stands.

    Attributes:
        arm: Which, at which
        budget: and in which
        view: of the two.
        gain: On the target tests, higher is better.
        over_random: Gain beyond that of random at the same budget; None without it.
        forgetting: On the general tests, lower is better.
        on_front: Whether no other arm of the view gains as much and forgets less, or gains more and forgets as little.
        front_share: In which share of the draws that is so.
        verdicts: Wins, ties and losses over all tests and metrics, against random and full.
        examples: Chosen, mean over seeds.
        steps: Optimizer steps.
        seconds: Mean cost per cell: gradients, select, train, evaluate, surgery.
        seeds: It was run with.
    """

    arm: str
    budget: str | None
    view: str
    gain: Estimate
    over_random: Estimate | None
    forgetting: Estimate | None
    on_front: bool
    front_share: float
    verdicts: Mapping[str, Mapping[Verdict, int]]
    examples: float
    steps: float
    seconds: Mapping[str, float]
    seeds: int

    @property
    def label(self) -> str:
        """Its name in tables and plots."""
        return _label(self.arm, self.budget)


@dataclass(frozen=True, slots=True)
class Pair:
    """Two arms of one view, each with its budget.

    Attributes:
        view: In which both stand.
        arm: The one, as tables name it.
        other: The other.
        gain: By how much the one gains more.
        keeping: By how much it forgets less; None without general tests.
    """

    view: str
    arm: str
    other: str
    gain: Estimate
    keeping: Estimate | None

    @property
    def turned(self) -> Pair:
        """The same seen from the other."""
        return Pair(self.view, self.other, self.arm, _turned(self.gain), self.keeping and _turned(self.keeping))

    @property
    def dominates(self) -> bool:
        """Whether the one is better in gain or in forgetting beyond doubt, and not worse in the other."""
        verdicts = {self.gain.verdict, *([self.keeping.verdict] if self.keeping else [])}
        return "win" in verdicts and verdicts <= {"win", "tie"}


@dataclass(frozen=True, eq=False)
class Summary:
    """Everything a report says.

    Attributes:
        name: Of the comparison.
        gain_metric: What gain is measured by, on target tests.
        forgetting_metric: What forgetting is measured by, on general tests.
        roles: Role of each test.
        effects: Every arm, budget, view, test and metric.
        standings: Every arm and budget, view by view.
        pairs: Every two of them that share seeds, view by view.
        overlaps: Jaccard index of the subsets of each pair, by budget: mean over seeds.
        generations: What each arm answered, first seed: (label, answers).
        missing: Cells that are not finished.
        record: Content of comparison.json.
        notes: Sentences the reader must know.
    """

    name: str
    gain_metric: str
    forgetting_metric: str | None
    roles: Mapping[str, str]
    effects: Sequence[Effect]
    standings: Sequence[Standing]
    pairs: Sequence[Pair]
    overlaps: Mapping[str, tuple[Sequence[str], Sequence[Sequence[float]]]]
    generations: Sequence[tuple[str, Sequence[Mapping[str, str]]]]
    missing: Sequence[str]
    record: Mapping[str, Any]
    notes: Sequence[str]

    def views(self) -> list[str]:
        """Returns the views, in order."""
        return list(dict.fromkeys(standing.view for standing in self.standings))

    def pairs_of(self, view: str) -> int:
        """Returns how many pairs a view has."""
        return sum(pair.view == view for pair in self.pairs)

    def better(self, view: str) -> list[Pair]:
        """Returns who is better than whom in gain or forgetting beyond doubt, and in the other not worse."""
        both = [one for pair in self.pairs if pair.view == view for one in (pair, pair.turned)]
        return [one for one in both if one.dominates]


@dataclass(frozen=True, eq=False)
class _Table:
    """Everything that was measured: values by arm, seed, test and metric."""

    finished: Sequence[Finished]
    roles: Mapping[str, str]
    resamples: int
    _measured: dict[Cell, Measurements] = field(default_factory=dict)
    _drawn: dict[tuple[str, int], npt.NDArray[np.uint16]] = field(default_factory=dict)  # the same for all arms

    @cached_property
    def base(self) -> Measurements:
        return self.measured(Cell(BASE))

    @cached_property
    def seeds(self) -> Mapping[Key, list[int]]:
        """The seeds of each arm at each budget in each view."""
        found: dict[Key, list[int]] = {}
        for one in self.finished:
            cell = one.cell
            if cell.seed is not None and cell.view is not None:
                found.setdefault((cell.arm, cell.budget, cell.view), []).append(cell.seed)
        return found

    def measured(self, cell: Cell) -> Measurements:
        if cell not in self._measured:
            found = next(one for one in self.finished if one.cell == cell)
            self._measured[cell] = found.measurements()
        return self._measured[cell]

    def values(self, key: Key, seeds: Sequence[int], test: str, metric: str) -> Floats:
        """Returns the values of an arm, [S, I]: those of the items that have one."""
        arm, budget, view = key
        known = ~np.isnan(self.base.values[test][metric])
        if arm == BASE:
            return np.tile(self.base.values[test][metric][known], (len(seeds), 1))
        rows = []
        for seed in seeds:
            cell = Cell(arm, budget, seed, view)  # type: ignore[arg-type]
            measured = self.measured(cell)
            row = measured.values[test][metric]
            if list(measured.items[test]) != list(self.base.items[test]) or (np.isnan(row) == known).any():
                raise DataError(f"{cell.name}: its values of {metric} on {test} must be of the items of base, got others")
            rows.append(row[known])
        return np.stack(rows)

    def difference(self, key: Key, other: Key, test: str, metric: str) -> Floats | None:
        """Returns by how much an arm is better than another, [S, I]; None where they share no seed."""
        seeds = self.seeds.get(key, []) if other[0] == BASE else _shared(self.seeds.get(key, []), self.seeds.get(other, []))
        if not seeds:
            return None
        sign = -1.0 if metric in LOWER_IS_BETTER else 1.0
        return sign * (self.values(key, seeds, test, metric) - self.values(other, seeds, test, metric))

    def estimate(self, table: Floats, test: str, metric: str) -> Estimate:
        return estimate(table, *self._draws(table, test, metric))

    def replicates(self, table: Floats, test: str, metric: str) -> Floats:
        return replicates(table, *self._draws(table, test, metric))

    def _draws(self, table: Floats, test: str, metric: str) -> tuple[Draws, Floats]:
        draws, key = Draws.of(len(table), self.resamples), (f"{test}/{metric}", table.shape[1])
        if key not in self._drawn:
            self._drawn[key] = draws.items(*key).astype(np.uint16)
        return draws, self._drawn[key].astype(np.float64)


def summarise(
    finished: Sequence[Finished], record: Mapping[str, Any], missing: Sequence[str] = (), resamples: int = 4000
) -> Summary:
    """Returns what the finished cells say.

    Args:
        finished: Cells, in order; the untouched model's must be among them.
        record: The content of comparison.json.
        missing: Names of the cells that are not finished.
        resamples: Of the bootstrap.

    Raises:
        DataError: Cells are of different items, or there is no base.
    """
    config = record["config"]
    if not any(one.cell.arm == BASE for one in finished):
        raise DataError("the cell base must be finished before anything can be compared, got none; run gradsieve compare")
    roles = {name: test["role"] for name, test in (config["tests"] | config.get("tasks", {})).items()}
    table = _Table(finished, roles, resamples)
    metrics = list(dict.fromkeys(metric for values in table.base.values.values() for metric in values))
    gain_metric = next(metric for metric in metrics if metric != "kl")
    general = [test for test, role in roles.items() if role == "general"]
    forgetting_metric = ("kl" if "kl" in metrics else gain_metric) if general else None
    effects = [
        effect
        for key in table.seeds
        for test, values in table.base.values.items()
        for metric in values
        if (effect := _effect(table, key, test, metric)) is not None
    ]
    standings = _standings(table, effects, gain_metric, forgetting_metric)
    return Summary(
        name=str(config["source"]),
        gain_metric=gain_metric,
        forgetting_metric=forgetting_metric,
        roles=roles,
        effects=effects,
        standings=standings,
        pairs=_pairs(table, gain_metric, forgetting_metric),
        overlaps=_overlaps(finished),
        generations=_generations(finished),
        missing=list(missing),
        record=record,
        notes=_notes(record, effects, standings, missing),
    )


def _effect(table: _Table, key: Key, test: str, metric: str) -> Effect | None:
    arm, budget, view = key
    if metric not in table.base.values[test] or np.isnan(table.base.values[test][metric]).all():
        return None
    against: dict[str, Estimate | None] = {}
    for name, other in ((BASE, (BASE, None, view)), (RANDOM, (RANDOM, budget, view)), (FULL, (FULL, None, view))):
        difference = None if other == key else table.difference(key, other, test, metric)
        against[name] = None if difference is None else table.estimate(difference, test, metric)
    values = table.values(key, table.seeds[key], test, metric)
    base = table.values((BASE, None, view), [0], test, metric)
    return Effect(arm, budget, view, test, table.roles[test], metric, float(values.mean()), float(base.mean()), against)


def _standings(table: _Table, effects: Sequence[Effect], gain: str, forgetting: str | None) -> list[Standing]:
    views = list(dict.fromkeys(view for _, _, view in table.seeds))
    return [standing for view in views for standing in _of_view(table, effects, view, gain, forgetting)]


def _of_view(table: _Table, effects: Sequence[Effect], view: str, gain: str, forgetting: str | None) -> list[Standing]:
    keys = [key for key in table.seeds if key[2] == view]
    base: Key = (BASE, None, view)
    gains = {key: _over_tests(table, key, base, "target", gain) for key in keys}
    losses = {key: _over_tests(table, key, base, "general", forgetting) for key in keys} if forgetting else {}
    most = max(len(table.seeds[key]) for key in keys)
    whole = [key for key in keys if len(table.seeds[key]) == most]
    on_front = dict.fromkeys(keys, (False, math.nan))
    if forgetting:
        points = np.array([[gains[key][0].mean, -losses[key][0].mean] for key in whole] + [[0.0, 0.0]])
        drawn = np.stack([np.stack([gains[key][1], -losses[key][1]]) for key in whole] + [np.zeros((2, table.resamples))])
        once, often = front(points[:, 0], points[:, 1]), front(drawn[:, 0].T, drawn[:, 1].T).mean(0)
        on_front |= {key: (bool(once[i]), float(often[i])) for i, key in enumerate(whole)}
    return [
        _standing(
            table,
            effects,
            key,
            (gains[key][0], _over_random(table, key, gain), _turned(losses[key][0]) if forgetting else None),
            on_front[key],
        )
        for key in keys
    ]


def _over_random(table: _Table, key: Key, metric: str) -> Estimate | None:
    random: Key = (RANDOM, key[1], key[2])
    if key == random or not _shared(table.seeds[key], table.seeds.get(random, [])):
        return None
    return _over_tests(table, key, random, "target", metric)[0]


def _pairs(table: _Table, gain: str, forgetting: str | None) -> list[Pair]:
    return [
        Pair(
            key[2],
            _label(*key[:2]),
            _label(*other[:2]),
            _over_tests(table, key, other, "target", gain)[0],
            _over_tests(table, key, other, "general", forgetting)[0] if forgetting else None,
        )
        for key, other in combinations(table.seeds, 2)
        if key[2] == other[2] and _shared(table.seeds[key], table.seeds[other])
    ]


def _label(arm: str, budget: str | None) -> str:
    return f"{arm} {budget}" if budget else arm


def _over_tests(table: _Table, key: Key, other: Key, role: str, metric: str) -> tuple[Estimate, Floats]:
    """Returns the difference to another arm in a metric, averaged over a role's tests that have it, and its replicates [B]."""
    tables = {
        test: table.difference(key, other, test, metric)
        for test, own in table.roles.items()
        if own == role and metric in table.base.values[test] and not np.isnan(table.base.values[test][metric]).all()
    }
    if not tables:
        raise DataError(f"tests of role {role} must have the metric {metric}, got none that does; add it to their metrics")
    present = {test: values for test, values in tables.items() if values is not None}
    drawn = np.mean([table.replicates(values, test, metric) for test, values in present.items()], axis=0)
    mean = float(np.mean([values.mean() for values in present.values()]))
    items = sum(values.shape[1] for values in present.values())
    seeds = max(len(values) for values in present.values())
    return Estimate(mean, *interval(drawn), seeds, items), drawn


def _turned(found: Estimate) -> Estimate:
    """Returns a gain as a loss."""
    return Estimate(-found.mean, -found.high, -found.low, found.seeds, found.items)


def _standing(
    table: _Table,
    effects: Sequence[Effect],
    key: Key,
    found: tuple[Estimate, Estimate | None, Estimate | None],
    on_front: tuple[bool, float],
) -> Standing:
    own = [effect for effect in effects if (effect.arm, effect.budget, effect.view) == key]
    records = [one.record for one in table.finished if (one.cell.arm, one.cell.budget, one.cell.view) == key]
    verdicts = {name: _tally(own, name) for name in (RANDOM, FULL)}
    seconds = {name: _mean([r["seconds"][name] for r in records]) for name in ("gradients", "select", "train", "evaluate")}
    seconds["surgery"] = _mean([r["training"]["surgery_seconds"] for r in records])
    return Standing(
        *key,
        gain=found[0],
        over_random=found[1],
        forgetting=found[2],
        on_front=on_front[0],
        front_share=on_front[1],
        verdicts=verdicts,
        examples=_mean([r["selection"]["examples"] for r in records]),
        steps=_mean([r["training"]["steps"] for r in records]),
        seconds=seconds,
        seeds=len(records),
    )


def _tally(effects: Sequence[Effect], other: str) -> dict[Verdict, int]:
    return tally([difference.verdict for effect in effects if (difference := effect.against[other]) is not None])


def _overlaps(finished: Sequence[Finished]) -> dict[str, tuple[list[str], list[list[float]]]]:
    """Returns names and the mean Jaccard index over seeds of each pair of subsets, by budget."""
    chosen: dict[str, dict[int, dict[str, list[str]]]] = {}
    for one in finished:
        cell = one.cell
        if cell.budget is None or cell.seed is None:
            continue
        ids = read_json(one.folder / "selection.json")["ids"]
        chosen.setdefault(cell.budget, {}).setdefault(cell.seed, {})[cell.arm] = ids
    tables = {}
    for budget, by_seed in chosen.items():
        names = list(dict.fromkeys(name for subsets in by_seed.values() for name in subsets))
        matrices = [overlap(subsets) for subsets in by_seed.values()]
        rows = [[_mean([m[a, b] for m in matrices if (a, b) in m]) for b in names] for a in names]
        tables[budget] = (names, rows)
    return tables


def _mean(values: Sequence[float]) -> float:
    return float(np.mean(values)) if values else math.nan


def _generations(finished: Sequence[Finished]) -> list[tuple[str, list[dict[str, str]]]]:
    """Returns what each arm answered in its first seed, first view and largest budget."""
    found: dict[str, list[dict[str, str]]] = {}
    for one in finished:
        answers = one.generations()
        if answers and one.cell.arm not in found:
            found[one.cell.arm] = answers
    return list(found.items())


def _notes(
    record: Mapping[str, Any], effects: Sequence[Effect], standings: Sequence[Standing], missing: Sequence[str]
) -> list[str]:
    notes = list(record.get("notes", ()))
    if missing:
        notes.append(f"{len(missing)} cells are not finished: what is said here is of the others")
    seeds = {standing.seeds for standing in standings}
    if seeds and min(seeds) < 2:
        notes.append(
            "with one seed nothing is known of how runs differ: its intervals are of items alone, and nothing is judged"
        )
    elif seeds and min(seeds) < 3:
        notes.append("two seeds say little of how runs differ: intervals are wide; run at least three")
    judged = [e for effect in effects for name in (RANDOM, FULL) if (e := effect.against[name]) is not None and e.seeds > 1]
    if judged:
        apart = sum(e.verdict in ("win", "loss") for e in judged)
        notes.append(
            f"{apart} of {len(judged)} intervals against random and full leave 0 out; where nothing differed, about "
            f"{0.05 * len(judged):.0f} would by chance"
        )
    added = [arm["name"] for arm in record["config"]["arms"] if arm.get("added")]
    if added:
        notes.append(f"{', '.join(added)} added, because no comparison may lack them")
    return notes


def _shared(seeds: Sequence[int], others: Sequence[int]) -> list[int]:
    return [seed for seed in seeds if seed in others]
