"""Gradients for all arms: one store for every method that wants them at the same weights, with whatever any of the arms reads.

The pools of all seeds are taken in one go where their references are the same, which are then measured once. A method that
trains the model on the pool first has a store per seed. What that cost is written beside it while it goes, so that a kill loses
seconds of the record, not the record:

    STORE/spent.json   seconds by stage; `references again` where seeds came after the store was filled
    STORE/whole.json   digests of the data whose gradients are all there
    STORE/rows.json    tokens of every row that was taken, by its key: also of seeds that the configuration no longer names
"""

from __future__ import annotations

import dataclasses
import fcntl
import json
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import xxhash

from gradsieve.clock import Progress
from gradsieve.compare.config import SHARED, Arm
from gradsieve.compare.material import Material
from gradsieve.compare.records import read_json, write_json
from gradsieve.errors import GradsieveError
from gradsieve.job import Job
from gradsieve.needs import reads_model
from gradsieve.pipeline import Result, find_method, passes, select
from gradsieve.rehearsal import rehearse
from gradsieve.types import Budget, Example, Problem, Selection, Selector

WHOLE, ROWS = "whole.json", "rows.json"
AGAIN = " again"
_OF_POOL = "of the pool"  # in the names of the stages that every pool has its own part of
_WRITE_EVERY_S = 5.0
_FEW = 32  # examples that a rehearsal takes
_WORK = {
    "references": "references",
    "answers alone": "pool alone",
    _OF_POOL: "pool",
    "of the target": "target",
    "of the anchor": "anchor",
}  # what the names of stages hold, and the work that `passes` counts there


@dataclass(frozen=True)
class _Everything:
    """Chooses nothing of interest; what it needs is what all arms that share a store need together."""

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


def method_settings(arm: Arm) -> dict[str, Any]:
    """Returns all hyper-parameters of an arm's method, as JSON has them."""
    settings = dataclasses.asdict(selector(arm))  # type: ignore[call-overload]
    return dict(json.loads(json.dumps(settings, default=str)))


def gradient_settings(material: Material) -> dict[str, Any]:
    """Returns all that decides how gradients are taken, but the model and the data, as JSON has it."""
    config = material.config
    own = {
        **config.gradients,
        **material.named_files,
        "max_length": config.max_length,
        "dtype": str(material.dtype),
        "template": material.template,
    }
    return dict(json.loads(json.dumps(own, default=str)))


def fill(study: Path, material: Material, arm: Arm, seed: int, progress: Progress) -> float:
    """Takes the gradients that any arm like this reads, where they are not there yet; returns the seconds of this seed's."""
    store = store_of(study, material, arm, seed)
    with _alone(store):
        if missing := _missing(store, material, _together(material, arm, seed)):
            stopwatch = _Stopwatch(store / "spent.json", progress, again=bool(_filled(store)))
            pools = _pools(material, arm, seed)
            ask(store, material, _everything(material, arm), "1", seed, stopwatch.progress, pool=pools)
            stopwatch.write()
            rows = _held(store) | _tokens(material, _together(material, arm, seed))
            write_json(store / ROWS, {key.hex(): length for key, length in rows.items()})
            write_json(store / WHOLE, sorted({*_filled(store), *missing}))
    return _seconds_of(store, material, arm, seed)


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


def _seconds_of(store: Path, material: Material, arm: Arm, seed: int) -> float:
    """Returns what of a store's seconds one arm and seed alone would have taken.

    Of the pools its own tokens; and of each stage as much as the method's work is of all that read the store, in token passes
    (`gradsieve.overhead`): one that reads hidden states alone needs no reference, and half of a pass over the pool.
    """
    own = _tokens(material, [seed])
    share = sum(own.values()) / sum((own | _tokens(material, _together(material, arm, seed)) | _held(store)).values())
    mine, all_work = _work(material, selector(arm), seed), _shared_work(material, arm, seed)
    spent: Mapping[str, float] = read_json(store / "spent.json")["seconds"]
    seconds = 0.0
    for stage, taken in spent.items():
        if not stage.endswith(AGAIN):
            work = next((name for said, name in _WORK.items() if said in stage), "")
            part = mine.get(work, 0.0) / all_work[work] if work in all_work else 1.0
            seconds += taken * part * (share if _OF_POOL in stage else 1.0)
    return seconds


def _shared_work(material: Material, arm: Arm, seed: int) -> Mapping[str, float]:
    """Returns what all gradients of one seed's data are that share a store with an arm's; see `_work`."""
    return _work(material, _everything(material, arm), seed)


def check_gradients(material: Material, arms: Collection[str]) -> None:
    """Refuses `gradients` with which one of some arms could not choose: the first seed's target and anchor stand for all.

    Raises:
        GradsieveError: What would go wrong; the message has file and key.
    """
    config = material.config
    pool = material.trainable(config.seeds[0]).pool
    few = [pool.examples[position] for position in pool.kept[:_FEW]]
    data = _data(material, config.seeds[0]) | {"pool": few}
    kinds = {repr(_kind(arm)): arm for arm in config.arms if arm.chooses and arm.name in arms}
    for arm in kinds.values():
        try:
            rehearse(_everything(material, arm), Job(**job_settings(material)), data, len(pool.kept))
        except GradsieveError as error:
            raise type(error)(f"{config.source}: gradients: {error}") from None


def _work(material: Material, method: Selector, seed: int) -> Mapping[str, float]:
    """Returns what a method's gradients of one seed's data are from nothing, in token passes, repeated examples included."""
    return passes(method, Job(**job_settings(material) | {"dedup": "off"}), _data(material, seed))


def _tokens(material: Material, seeds: Sequence[int]) -> dict[bytes, int]:
    """Returns the length of every row that a store has of these seeds' pools, by its key: of equal examples there is one."""
    pools = [material.trainable(seed).pool for seed in seeds]
    return {key: length for pool in pools for key, length in zip(pool.keys, pool.lengths, strict=True)}


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Waits until no other process fills a store; one that is killed waits for nobody any more."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / ".claim", "a") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def _everything(material: Material, arm: Arm) -> _Everything:
    return _Everything(_shared_needs(material, arm), warmup_of(selector(arm)))


def _shared_needs(material: Material, arm: Arm) -> frozenset[str]:
    """Returns what all arms read whose gradients can be the arm's: at the same weights, with as much of the anchor."""
    others = [other for other in material.config.arms if reads_store(other) and _kind(other) == _kind(arm)]
    return frozenset(need for other in others for need in selector(other).needs)


def _kind(arm: Arm) -> tuple[Any, bool]:
    """Returns how the model is trained before, and whether half of the anchor is held out, as for a Navigator."""
    method = selector(arm)
    return warmup_of(method), "navigator" in method.needs


def ask(
    store: Path,
    material: Material,
    method: Any,
    budget: str,
    seed: int,
    progress: Progress,
    pool: Sequence[Example] | None = None,
) -> Result:
    """Asks a method for its choice from the seed's pool, or only fills the store with `pool`, all of it as it is.

    No Navigator is warmed up for the latter: it would train for nothing.
    """
    settings = job_settings(material) | ({} if pool is None else {"dedup": "off", "navigator_warmup": 0})
    data = _data(material, seed) | ({} if pool is None else {"pool": pool})
    return select(method, **data, budget=budget, store=str(store), progress=progress, **settings)


def job_settings(material: Material) -> dict[str, Any]:
    """Returns the settings of `Job` with which every arm chooses, but for data and budget."""
    config = material.config
    return {**{name: getattr(config, name) for name in ("model", *SHARED)}, **config.gradients}


def _data(material: Material, seed: int) -> dict[str, Any]:
    sides = material.sides(seed)
    return {"pool": sides.pool, "target": sides.target, "anchor": sides.anchor}


def open_stores(study: Path, material: Material, arms: Collection[str] | None = None) -> dict[Path, list[int]]:
    """Returns the stores that are still to be filled, each with the seeds whose different pools it is for.

    Args:
        study: Folder of the comparison.
        material: What it works on.
        arms: Names of those that read them; all by default.
    """
    return {store: _together(material, *reader) for store, reader in _open(study, material, arms).items()}


def passes_left(study: Path, material: Material, arms: Collection[str] | None = None) -> float:
    """Returns the work of filling the open stores in token passes (`gradsieve.overhead`), warm-ups and references included.

    A store that was left while it was filled counts as an empty one. Arguments as for `open_stores`.
    """
    return sum(_passes_left(store, material, *reader) for store, reader in _open(study, material, arms).items())


def navigator_passes(material: Material, arm: Arm, budget: str, seed: int) -> float:
    """Returns the work of the Navigator behind one choice, in token passes; 0 of a method that has none."""
    if "navigator" not in selector(arm).needs:
        return 0.0
    return passes(selector(arm), Job(**job_settings(material) | {"budget": budget}), _data(material, seed)).get(
        "navigator", 0.0
    )


def _open(study: Path, material: Material, arms: Collection[str] | None) -> dict[Path, tuple[Arm, int]]:
    """Returns the stores that are still to be filled, each with an arm and a seed that read it."""
    readers = [arm for arm in material.config.arms if reads_store(arm) and (arms is None or arm.name in arms)]
    stores = {store_of(study, material, arm, seed): (arm, seed) for seed in material.config.seeds for arm in readers}
    return {store: own for store, own in stores.items() if _missing(store, material, _together(material, *own))}


def _passes_left(store: Path, material: Material, arm: Arm, seed: int) -> float:
    """What the job of one seed computes, with the rows of all seeds' pools in place of its own, and without what is there."""
    work = _shared_work(material, arm, seed)
    filled = _filled(store)
    there = _held(store) | _tokens(material, [one for one in material.config.seeds if material.sides(one).digest in filled])
    wanted = _tokens(material, _together(material, arm, seed))
    missing = sum(length for key, length in wanted.items() if key not in there)
    if filled:
        work = {name: work[name] for name in ("pool", "pool alone", "references") if name in work and missing}
    share = missing / sum(material.trainable(seed).pool.lengths)
    return sum(count * (share if name.startswith("pool") else 1.0) for name, count in work.items())


def _filled(store: Path) -> list[str]:
    """Returns which data a store has all gradients of."""
    return list(read_json(store / WHOLE)) if (store / WHOLE).exists() else []


def _held(store: Path) -> dict[bytes, int]:
    """Returns the tokens of every row that was taken, by its key; of a store of an earlier version nothing."""
    rows = read_json(store / ROWS) if (store / ROWS).exists() else {}
    return {bytes.fromhex(key): length for key, length in rows.items()}


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
    """Adds the seconds of each stage of long work to a file while it goes on, so that a killed run's count too.

    Where a store is filled `again`, for seeds that came later, what is not of their pools was taken before and counts apart.
    """

    def __init__(self, path: Path, progress: Progress, *, again: bool) -> None:
        self._path = path
        self._progress = progress
        self._again = again
        self._seconds: dict[str, float] = dict(read_json(path)["seconds"]) if path.exists() else {}
        self._stage = "begin"
        self._counted = self._written = time.perf_counter()

    def progress(self, stage: str, done: int, total: int) -> None:
        """Passes on how far a stage is, and writes every few seconds."""
        self._progress(stage, done, total)
        self._stage = stage + AGAIN if self._again and _OF_POOL not in stage else stage
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
