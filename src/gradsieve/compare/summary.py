"""Finished cells → what can be said: gains, forgetting, differences with intervals, the Pareto front, costs, overlaps.

    gain         of an arm: its difference to the untouched model, turned so that higher is better
    forgetting   the same on a general test, turned so that higher is worse; KL to the base model as it is
    standing     one arm at one budget in one view: its gain on the target tests and its forgetting, each averaged over the
                 tests, in the metric that is looked at first

How two arms are paired, `gradsieve.compare.paired` says.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import numpy as np

from gradsieve.compare.config import BASE, FULL, RANDOM
from gradsieve.compare.paired import Key, Paired
from gradsieve.compare.records import Finished, read_json
from gradsieve.compare.statistics import JUDGED, JUDGED_ITEMS, Estimate, Floats, Verdict, front, tally
from gradsieve.compare.subsets import overlap
from gradsieve.errors import DataError

Over = Mapping[Key, tuple[Estimate, Floats]]
"""By how much each arm is better than the untouched model, and the same under every draw."""


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

    @property
    def label(self) -> str:
        """Its arm and budget in tables."""
        return _label(self.arm, self.budget)


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
        on_front: Whether no other arm of the view gains as much and forgets less, or gains more and forgets as little, by the
            seeds that most arms have; None of an arm that has not all of them, or without general tests.
        front_share: In which share of the draws that is so; NaN where `on_front` is None.
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
    on_front: bool | None
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

    @property
    def step_seconds(self) -> tuple[float, float]:
        """What one optimizer step took, and the part of it that surgery added."""
        return self.seconds["train"] / self.steps, self.seconds["surgery"] / self.steps


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
        base_on_front: Whether no arm of a view gains and forgets nothing, or the like; of views that have a front.
        pairs: Every two of them that share seeds, view by view.
        overlaps: Jaccard index of the subsets of each pair, by budget: mean over seeds.
        generations: What each arm answered, first seed, largest budget: (label, answers).
        trained_seconds: Of all training that was done: cells that took over the work of another count once.
        examined_seconds: Of all evaluation and generation, the untouched model's too.
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
    base_on_front: Mapping[str, bool]
    pairs: Sequence[Pair]
    overlaps: Mapping[str, tuple[Sequence[str], Sequence[Sequence[float]]]]
    generations: Sequence[tuple[str, Sequence[Mapping[str, str]]]]
    trained_seconds: float
    examined_seconds: float
    missing: Sequence[str]
    record: Mapping[str, Any]
    notes: Sequence[str]

    def views(self) -> list[str]:
        """Returns the views, in order."""
        return list(dict.fromkeys(standing.view for standing in self.standings))

    def pairs_of(self, view: str) -> int:
        """Returns how many pairs a view has."""
        return sum(pair.view == view for pair in self.pairs)

    def tests_of(self, role: str, metric: str) -> list[str]:
        """Returns the tests of a role that have a metric."""
        return list(dict.fromkeys(e.test for e in self.effects if (e.role, e.metric) == (role, metric)))

    def better(self, view: str) -> list[Pair]:
        """Returns who is better than whom in gain or forgetting beyond doubt, and in the other not worse."""
        both = [one for pair in self.pairs if pair.view == view for one in (pair, pair.turned)]
        return [one for one in both if one.dominates]


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
    roles = {name: test["role"] for name, test in (config["tests"] | config["tasks"]).items()}
    paired = Paired(finished, roles, resamples)
    of_target, of_general = paired.metrics("target"), paired.metrics("general")
    gain_metric = next((metric for metric in of_target if metric != "kl"), None)
    if gain_metric is None:
        raise DataError("target tests must have a value in a metric besides kl, got none; name a metric that their items have")
    forgetting_metric = next((metric for metric in ("kl", gain_metric, *of_general) if metric in of_general), None)
    effects = [
        _effect(paired, key, test, metric)
        for key in paired.seeds
        for test, values in paired.base.values.items()
        for metric in values
        if paired.has(test, metric)
    ]
    views = dict.fromkeys(view for _, _, view in paired.seeds)
    by_view = {view: _of_view(paired, effects, view, gain_metric, forgetting_metric) for view in views}
    standings = [one for own, _ in by_view.values() for one in own]
    return Summary(
        name=str(config["source"]),
        gain_metric=gain_metric,
        forgetting_metric=forgetting_metric,
        roles=roles,
        effects=effects,
        standings=standings,
        base_on_front={view: on for view, (_, on) in by_view.items() if on is not None},
        pairs=_pairs(paired, gain_metric, forgetting_metric),
        overlaps=_overlaps(finished),
        generations=_generations(finished),
        trained_seconds=_seconds(finished, "train"),
        examined_seconds=_seconds(finished, "evaluate") + _seconds(finished, "generate"),
        missing=list(missing),
        record=record,
        notes=[*_notes(record, effects, standings, missing), *_left_out(paired, gain_metric), *_single(effects)],
    )


def _effect(paired: Paired, key: Key, test: str, metric: str) -> Effect:
    arm, budget, view = key
    others: dict[str, Key] = {BASE: (BASE, None, view), RANDOM: (RANDOM, budget, view), FULL: (FULL, None, view)}
    against = {name: None if other == key else paired.difference(key, other, test, metric) for name, other in others.items()}
    values = paired.values(key, paired.seeds[key], test, metric)
    base = paired.values((BASE, None, view), [0], test, metric)
    return Effect(arm, budget, view, test, paired.roles[test], metric, float(values.mean()), float(base.mean()), against)


def _of_view(
    paired: Paired, effects: Sequence[Effect], view: str, gain: str, forgetting: str | None
) -> tuple[list[Standing], bool | None]:
    """Returns where the arms of a view stand, and whether the untouched model is on their front; None without one."""
    keys = [key for key in paired.seeds if key[2] == view]
    base: Key = (BASE, None, view)
    gains = {key: paired.over_tests(key, base, "target", gain) for key in keys}
    losses = {key: paired.over_tests(key, base, "general", forgetting) for key in keys} if forgetting else {}
    on_front: dict[Key, tuple[bool | None, float]] = dict.fromkeys([base, *keys], (None, math.nan))
    if forgetting:
        on_front |= _front(paired, gains, losses, base, gain, forgetting)
    standings = [
        _standing(
            paired,
            effects,
            key,
            (gains[key][0], _over_random(paired, key, gain), _turned(losses[key][0]) if forgetting else None),
            on_front[key],
        )
        for key in keys
    ]
    return standings, on_front[base][0]


def _front(
    paired: Paired, of_gain: Over, of_keeping: Over, base: Key, gain: str, forgetting: str
) -> dict[Key, tuple[bool | None, float]]:
    """Returns which arms are on the front and in which share of the draws, of those that have the seeds it is judged by.

    The untouched model is one of them: arms that gain and lose nothing leave it behind.
    """
    seeds = front_seeds([paired.seeds[key] for key in of_gain])
    whole = [key for key in of_gain if {*seeds} <= {*paired.seeds[key]}]
    points, drawn = [np.zeros(2)], [np.zeros((2, paired.resamples))]
    for key in whole:
        gained, gains = of_gain[key]
        kept, keeping = of_keeping[key]
        if {*seeds} != {*paired.seeds[key]}:  # those of its own seeds are of others too
            gained, gains = paired.over_tests(key, base, "target", gain, seeds)
            kept, keeping = paired.over_tests(key, base, "general", forgetting, seeds)
        points.append(np.array([gained.mean, -kept.mean]))
        drawn.append(np.stack([gains, -keeping]))
    at, under = np.stack(points), np.stack(drawn)
    once, often = front(at[:, 0], at[:, 1]), front(under[:, 0].T, under[:, 1].T).mean(0)
    return {key: (bool(on), float(share)) for key, on, share in zip([base, *whole], once, often, strict=True)}


def front_seeds(of_arms: Sequence[Sequence[int]]) -> Sequence[int]:
    """Returns the seeds that the front is judged by: at least `JUDGED` where an arm has them, and those that most arms have."""
    need = min(JUDGED, max(map(len, of_arms)))
    enough = [seeds for seeds in of_arms if len(seeds) >= need]
    return max(enough, key=lambda seeds: (sum({*seeds} <= {*others} for others in enough), len(seeds)))


def _over_random(paired: Paired, key: Key, metric: str) -> Estimate | None:
    random: Key = (RANDOM, key[1], key[2])
    if key == random or not paired.shared(key, random):
        return None
    return paired.over_tests(key, random, "target", metric)[0]


def _pairs(paired: Paired, gain: str, forgetting: str | None) -> list[Pair]:
    return [
        Pair(
            key[2],
            _label(*key[:2]),
            _label(*other[:2]),
            paired.over_tests(key, other, "target", gain)[0],
            paired.over_tests(key, other, "general", forgetting)[0] if forgetting else None,
        )
        for key, other in combinations(paired.seeds, 2)
        if key[2] == other[2] and paired.shared(key, other)
    ]


def _label(arm: str, budget: str | None) -> str:
    return f"{arm} {budget}" if budget else arm


def _turned(found: Estimate) -> Estimate:
    """Returns a gain as a loss."""
    return dataclasses.replace(found, mean=-found.mean, low=-found.high, high=-found.low)


def _standing(
    paired: Paired,
    effects: Sequence[Effect],
    key: Key,
    found: tuple[Estimate, Estimate | None, Estimate | None],
    on_front: tuple[bool | None, float],
) -> Standing:
    own = [effect for effect in effects if (effect.arm, effect.budget, effect.view) == key]
    records = [one.record for one in paired.finished if (one.cell.arm, one.cell.budget, one.cell.view) == key]
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


def _seconds(finished: Sequence[Finished], stage: str) -> float:
    """Returns what a stage took in all cells that did their own work."""
    return math.fsum(one.record["seconds"].get(stage, 0.0) for one in finished if "same_as" not in one.record)


def _mean(values: Sequence[float]) -> float:
    return float(np.mean(values)) if values else math.nan


def _generations(finished: Sequence[Finished]) -> list[tuple[str, list[dict[str, str]]]]:
    """Returns what each arm answered in its first seed, first view and largest budget, by arm and budget."""
    shown: dict[str, Finished] = {}
    for one in finished:
        known = shown.setdefault(one.cell.arm, one)
        alike = (one.cell.seed, one.cell.view) == (known.cell.seed, known.cell.view)
        if alike and _examples(one) > _examples(known):
            shown[one.cell.arm] = one
    answers = [(_label(one.cell.arm, one.cell.budget), one.generations()) for one in shown.values()]
    return [(label, own) for label, own in answers if own]


def _examples(one: Finished) -> int:
    return int((one.record["selection"] or {"examples": 0})["examples"])


def _notes(
    record: Mapping[str, Any], effects: Sequence[Effect], standings: Sequence[Standing], missing: Sequence[str]
) -> list[str]:
    notes = list(record["notes"])
    if missing:
        notes.append(f"{len(missing)} cells are not finished: what is said here is of the others")
    few = [standing for standing in standings if standing.seeds < JUDGED]
    if few:
        names = "all arms" if len(few) == len(standings) else ", ".join(dict.fromkeys(standing.label for standing in few))
        notes.append(
            f"fewer than {JUDGED} seeds say too little of how runs differ: {names} not judged; run the seeds that are "
            "missing, or name more"
        )
    if len({standing.seeds for standing in standings}) > 1:
        notes.append("arms have different seeds: who is on the front is judged by those that most arms have")
    against = [effect.against[name] for effect in effects for name in (RANDOM, FULL)]
    judged = [one for one in against if one is not None and one.verdict != "unjudged"]
    if judged:
        apart = sum(e.verdict in ("win", "loss") for e in judged)
        notes.append(
            f"{apart} of {len(judged)} intervals against random and full leave 0 out; where nothing differed, about "
            f"{0.05 * len(judged):.0f} would by chance"
        )
    added = [arm["name"] for arm in record["config"]["arms"] if arm["added"]]
    if added:
        notes.append(f"{', '.join(added)} added, because no comparison may lack them")
    return notes


def _left_out(paired: Paired, gain: str) -> list[str]:
    """Returns what is missing from the tables and from gain, where a test has no value of a metric."""
    empty = [f"{metric} of {test}" for test, by in paired.base.values.items() for metric in by if not paired.has(test, metric)]
    notes = [f"left out, since no item has a value: {', '.join(empty)}"] if empty else []
    targets = [test for test, role in paired.roles.items() if role == "target"]
    lacking = [test for test in targets if not paired.has(test, gain)]
    if lacking:
        notes.append(f"gain is measured in {gain} and does not count {', '.join(lacking)}, without a value of it")
    return notes


def _single(effects: Sequence[Effect]) -> list[str]:
    found = dict.fromkeys(
        f"{effect.metric} of {effect.test}"
        for effect in effects
        if (e := effect.against[BASE]) is not None and e.items < JUDGED_ITEMS
    )
    return [f"one item says nothing of how items differ: not judged: {', '.join(found)}"] if found else []
