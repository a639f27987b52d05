"""Gradients for all arms: one store for every method that wants them at the same weights, with whatever any of the arms reads.

The pools of all seeds are taken in one go where their references are the same, which are then measured once. A method that
trains the model on the pool first has a store per seed. What that cost is written beside it while it goes, so that a kill loses
seconds of the record, not the record:

    STORE/spent.json   seconds by stage
    STORE/whole.json   digests of the data whose gradients are all there
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

from gradsieve.clock import Progress
from gradsieve.compare.config import Arm
from gradsieve.compare.material import Material
from gradsieve.compare.records import read_json, write_json
from gradsieve.needs import reads_model
from gradsieve.pipeline import Result, find_method, select
from gradsieve.types import Budget, Example, Problem, Selection, Selector

WHOLE = "whole.json"
_WRITE_EVERY_S = 5.0


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


def warmup_of(selector: Selector) -> Any:
    """Returns how a method wants the model trained before gradients are taken; None for most."""
    return getattr(selector, "warmup", None)


def selector(arm: Arm) -> Selector:
    """Returns the arm's method."""
    return find_method(arm.method, arm.settings)[1]


def gradient_settings(material: Material) -> dict[str, Any]:
    """Returns all that decides how gradients are taken, but the model and the data, as JSON has it."""
    config = material.config
    own = {**config.gradients, "max_length": config.max_length, "dtype": str(material.dtype), "template": material.template}
    return dict(json.loads(json.dumps(own, default=str)))


def fill(study: Path, material: Material, arm: Arm, seed: int, progress: Progress) -> float:
    """Takes the gradients that any arm like this reads, where they are not there yet; returns the seconds of this seed's."""
    store = store_of(study, material, arm, seed)
    with _alone(store):
        if missing := _missing(store, material, _together(material, arm, seed)):
            stopwatch = _Stopwatch(store / "spent.json", progress)
            everything = _Everything(_shared_needs(material, arm), warmup_of(selector(arm)))
            pools = _pools(material, arm, seed)
            ask(store, material, everything, "1", seed, stopwatch.progress, pool=pools)
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
    warmup = warmup_of(selector(arm))
    others = [other for other in material.config.arms if reads_store(other) and warmup_of(selector(other)) == warmup]
    return frozenset(need for other in others for need in selector(other).needs)


def ask(
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
    stores = {store_of(study, material, arm, seed): (arm, seed) for seed in material.config.seeds for arm in arms}
    shared = {store: _together(material, *own) for store, own in stores.items()}
    return {store: seeds for store, seeds in shared.items() if _missing(store, material, seeds)}


def _filled(store: Path) -> list[str]:
    """Returns which data a store has all gradients of."""
    return list(read_json(store / WHOLE)) if (store / WHOLE).exists() else []


def _missing(store: Path, material: Material, seeds: Sequence[int]) -> set[str]:
    """Returns which data of these seeds a store lacks gradients of: a seed may have come later."""
    return {material.sides(seed).digest for seed in seeds} - set(_filled(store))


def store_of(study: Path, material: Material, arm: Arm, seed: int) -> Path:
    """Returns the folder of the gradients that an arm reads for a seed."""
    return study / "stores" / _key(material, arm, seed)


def _key(material: Material, arm: Arm, seed: int) -> str:
    """Returns the name of a store: what its rows depend on, which is the pool only where the model is trained on it first."""
    needs, warmup, sides = sorted(_shared_needs(material, arm)), warmup_of(selector(arm)), material.sides(seed)
    data = sides.references if warmup is None else sides.digest
    key = [data, material.source.weights, gradient_settings(material), repr(warmup), needs]
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
