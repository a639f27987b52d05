"""What each arm trains on: selections, made once, kept, and shared where nothing in them was random.

Gradients of all methods come from one store, with whatever any of the arms reads: the pools of all seeds are taken in one go
where their references are the same, which are then measured once. A method that trains the model on the pool first has a store
per seed. What that cost is written beside it while it goes, so that a kill loses seconds of the record, not the record.
"""

from __future__ import annotations

import dataclasses
import fcntl
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import xxhash

from gradsieve.clock import Progress, silent
from gradsieve.compare.config import Arm
from gradsieve.compare.material import Material
from gradsieve.compare.records import read_json, write_json
from gradsieve.needs import reads_model
from gradsieve.pipeline import Result, find_method, select
from gradsieve.types import Budget, Example, Problem, Selection, Selector

WHOLE = "whole.json"  # in a store: the data it has all gradients of
_WRITE_EVERY_S = 5.0


@dataclass(frozen=True)
class Subset:
    """What an arm trains on.

    Attributes:
        ids: Chosen examples, best first.
        weights: One per example, at least 0.
        notes: What the method had to say.
        select_seconds: What choosing took once gradients were there.
        gradient_seconds: What the gradients took that it read, of those that all methods share: the references, and its pool's
            part of the rest.
        drew: Whether the method drew at random.
        source: Name of the selection it is.
    """

    ids: tuple[str, ...]
    weights: tuple[float, ...]
    notes: tuple[str, ...] = ()
    select_seconds: float = 0.0
    gradient_seconds: float = 0.0
    drew: bool = False
    source: str = "all"


@dataclass(frozen=True)
class _Seeded:
    """A selector that draws with its own seed, so that gradients taken with one seed serve draws with several."""

    selector: Selector
    seed: int
    drawn: list[bool]

    @property
    def needs(self) -> frozenset[str]:
        return self.selector.needs

    @property
    def warmup(self) -> Any:
        return _warmup(self.selector)

    def select(self, problem: Problem, budget: Budget, rng: torch.Generator) -> Selection:
        rng = torch.Generator().manual_seed(self.seed)
        before = rng.get_state()
        selection = self.selector.select(problem, budget, rng)
        self.drawn.append(not torch.equal(before, rng.get_state()))
        return selection


@dataclass(frozen=True)
class _Everything:
    """Chooses nothing of interest; what it needs is what all arms with this warm-up need together."""

    needs: frozenset[str]
    warmup: Any

    def select(self, problem: Problem, budget: Budget, rng: torch.Generator) -> Selection:
        n = len(problem.candidates.ids)
        return Selection(torch.arange(1), torch.ones(1, dtype=torch.float64), torch.full((n,), torch.nan, dtype=torch.float64))


def reads_store(arm: Arm) -> bool:
    """Says whether an arm's method reads what passes of the model give, which stores keep."""
    return arm.chooses and any(reads_model(need) for need in selector(arm).needs)


def _warmup(selector: Selector) -> Any:
    """Returns how a method wants the model trained before gradients are taken; None for most."""
    return getattr(selector, "warmup", None)


def selector(arm: Arm) -> Selector:
    """Returns the arm's method."""
    return find_method(arm.method, arm.settings)[1]


def subset(study: Path, material: Material, arm: Arm, budget: str | None, seed: int, progress: Progress = silent) -> Subset:
    """Returns what an arm trains on for a seed: read where it was chosen before, else chosen and kept.

    A method that drew nothing at random chooses the same for every seed with the same data, and is asked once.
    """
    pool = material.trainable(seed).pool
    if not arm.chooses:
        return Subset(tuple(pool.ids), (1.0,) * len(pool.ids))
    assert budget is not None
    inputs = _inputs(material, arm, budget, seed)
    for other in material.config.seeds:
        found = _kept(study, arm, budget, other, inputs)
        if found is not None and (other == seed or not found.drew):
            return found
    gradient_seconds = _gradients(study, material, arm, seed, progress) if reads_store(arm) else 0.0
    drawn: list[bool] = []
    started = time.perf_counter()
    store = _store(study, material, arm, seed)
    result = _select(store, material, _Seeded(selector(arm), seed, drawn), budget, seed, progress)
    made = Subset(
        ids=tuple(example.id for example in result.examples),
        weights=tuple(result.selection.weights.double().tolist()),
        notes=tuple(dict.fromkeys((*result.notes, *result.selection.notes))),
        select_seconds=time.perf_counter() - started,
        gradient_seconds=gradient_seconds,
        drew=any(drawn),
        source=_name(arm, budget, seed),
    )
    write_json(_file(study, arm, budget, seed), {"inputs": inputs, "seed": seed, **dataclasses.asdict(made)})
    return made


def _kept(study: Path, arm: Arm, budget: str, seed: int, inputs: Mapping[str, Any]) -> Subset | None:
    path = _file(study, arm, budget, seed)
    if not path.exists():
        return None
    record = read_json(path)
    if record.pop("inputs") != inputs:
        return None
    record.pop("seed")
    fields: dict[str, Any] = record | {key: tuple(record[key]) for key in ("ids", "weights", "notes")}
    return Subset(**fields)


def _inputs(material: Material, arm: Arm, budget: str, seed: int) -> dict[str, Any]:
    """Returns all that decides what a method chooses, but the seed of its draws."""
    settings = json.loads(json.dumps(dataclasses.asdict(selector(arm)), default=str))  # type: ignore[call-overload]
    return {
        "method": arm.method,
        "settings": settings,
        "budget": budget,
        "data": material.sides(seed).digest,
        "model": material.source.weights,
        "gradients": _gradient_settings(material),
    }


def _gradient_settings(material: Material) -> dict[str, Any]:
    config = material.config
    own = {**config.gradients, "max_length": config.max_length, "dtype": str(material.dtype), "template": material.template}
    return dict(json.loads(json.dumps(own, default=str)))


def _name(arm: Arm, budget: str, seed: int) -> str:
    return f"{arm.name}--{budget.replace('%', 'pct')}--{seed}"


def _file(study: Path, arm: Arm, budget: str, seed: int) -> Path:
    return study / "selections" / f"{_name(arm, budget, seed)}.json"


# -- gradients ----------------------------------------------------------------------------------------------------------------


def _gradients(study: Path, material: Material, arm: Arm, seed: int, progress: Progress) -> float:
    """Takes the gradients that any arm like this reads, where they are not there yet; returns the seconds of this seed's."""
    store = _store(study, material, arm, seed)
    with _alone(store):
        if missing := _missing(store, material, _together(material, arm, seed)):
            stopwatch = _Stopwatch(store / "spent.json", progress)
            everything = _Everything(_shared_needs(material, arm), _warmup(selector(arm)))
            pools = _pools(material, arm, seed)
            _select(store, material, everything, "1", seed, stopwatch.progress, pool=pools)
            stopwatch.write()
            write_json(store / WHOLE, sorted({*_filled(store), *missing}))
    return _seconds_of(read_json(store / "spent.json")["seconds"], material, arm, seed)


def _pools(material: Material, arm: Arm, seed: int) -> Sequence[Example]:
    """Returns the examples of all pools that share a store, under ids that no two of them have."""
    seeds = _together(material, arm, seed)
    if len(seeds) == 1:
        return material.sides(seed).pool
    return [dataclasses.replace(row, id=f"{one}/{row.id}") for one in seeds for row in material.sides(one).pool]


def _together(material: Material, arm: Arm, seed: int) -> list[int]:
    """Returns the seeds whose different pools share a store with this seed's."""
    key = _key(material, arm, seed)
    alike = [other for other in material.config.seeds if _key(material, arm, other) == key]
    return list({material.sides(other).digest: other for other in reversed(alike)}.values())[::-1]


def _seconds_of(spent: Mapping[str, float], material: Material, arm: Arm, seed: int) -> float:
    """Returns what of a store's seconds one seed alone would have taken: everything, but of the pools its own tokens."""
    pools = {one: material.trainable(one).pool for one in {*_together(material, arm, seed), seed}}
    tokens = {key: length for pool in pools.values() for key, length in zip(pool.keys, pool.lengths, strict=True)}
    share = sum(tokens[key] for key in set(pools[seed].keys)) / sum(tokens.values())
    return sum(seconds * (share if stage.endswith("of the pool") else 1.0) for stage, seconds in spent.items())


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Waits until no other process fills a store; one that is killed waits for nobody any more."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / ".claim", "a") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def _shared_needs(material: Material, arm: Arm) -> frozenset[str]:
    """Returns what all arms with the arm's warm-up read."""
    warmup = _warmup(selector(arm))
    others = [other for other in material.config.arms if reads_store(other) and _warmup(selector(other)) == warmup]
    return frozenset(need for other in others for need in selector(other).needs)


def _select(
    store: Path,
    material: Material,
    method: Any,
    budget: str,
    seed: int,
    progress: Progress,
    pool: Sequence[Example] | None = None,
) -> Result:
    """Asks a method for its choice from the seed's pool, or from `pool`, all of which is then taken as it is."""
    sides, config = material.sides(seed), material.config
    settings = config.gradients if pool is None else {**config.gradients, "dedup": "off"}
    shared = {name: getattr(config, name) for name in ("max_length", "dtype", "device", "chat_template", "trust_remote_code")}
    return select(
        method,
        model=config.model,
        pool=sides.pool if pool is None else pool,
        target=sides.target,
        anchor=sides.anchor,
        budget=budget,
        store=str(store),
        progress=progress,
        **shared,
        **settings,
    )


def open_stores(study: Path, material: Material) -> dict[Path, list[int]]:
    """Returns the stores that are still to be filled, each with the seeds whose different pools it is for."""
    arms = [arm for arm in material.config.arms if reads_store(arm)]
    stores = {_store(study, material, arm, seed): (arm, seed) for seed in material.config.seeds for arm in arms}
    shared = {store: _together(material, *own) for store, own in stores.items()}
    return {store: seeds for store, seeds in shared.items() if _missing(store, material, seeds)}


def _filled(store: Path) -> list[str]:
    """Returns which data a store has all gradients of."""
    return list(read_json(store / WHOLE)) if (store / WHOLE).exists() else []


def _missing(store: Path, material: Material, seeds: Sequence[int]) -> set[str]:
    """Returns which data of these seeds a store lacks gradients of: a seed may have come later."""
    return {material.sides(seed).digest for seed in seeds} - set(_filled(store))


def _store(study: Path, material: Material, arm: Arm, seed: int) -> Path:
    return study / "stores" / _key(material, arm, seed)


def _key(material: Material, arm: Arm, seed: int) -> str:
    """Returns the name of a store: what its rows depend on, which is the pool only where the model is trained on it first."""
    needs, warmup, sides = sorted(_shared_needs(material, arm)), _warmup(selector(arm)), material.sides(seed)
    data = sides.references if warmup is None else sides.digest
    key = [data, material.source.weights, _gradient_settings(material), repr(warmup), needs]
    return xxhash.xxh3_64_hexdigest(json.dumps(key, sort_keys=True).encode())


class _Stopwatch:
    """Adds the seconds of each stage of long work to a file while it goes on, so that a killed run's count too."""

    def __init__(self, path: Path, progress: Progress) -> None:
        self._path = path
        self._progress = progress
        self._seconds: dict[str, float] = dict(read_json(path)["seconds"]) if path.exists() else {}
        self._stage = "begin"
        self._counted = self._written = time.perf_counter()

    def progress(self, stage: str, done: int, total: int) -> None:
        """Passes on how far a stage is, and writes every few seconds."""
        self._progress(stage, done, total)
        self._stage = stage
        self._count()
        if self._counted - self._written > _WRITE_EVERY_S:
            self.write()

    def _count(self) -> None:
        before, self._counted = self._counted, time.perf_counter()
        self._seconds[self._stage] = self._seconds.get(self._stage, 0.0) + self._counted - before

    def write(self) -> None:
        """Writes the seconds until now."""
        self._count()
        self._written = self._counted
        write_json(self._path, {"seconds": self._seconds})


def overlap(subsets: Mapping[str, Sequence[str]]) -> dict[tuple[str, str], float]:
    """Returns the Jaccard index of every pair of subsets: shared examples / examples in either."""
    sets = {name: frozenset(ids) for name, ids in subsets.items()}
    return {(a, b): len(sets[a] & sets[b]) / max(1, len(sets[a] | sets[b])) for a in sets for b in sets}
