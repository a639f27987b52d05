"""What each arm trains on: selections, made once, kept, and shared where nothing in them was random."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from gradsieve.clock import Progress, silent
from gradsieve.compare.cells import Cell
from gradsieve.compare.config import Arm
from gradsieve.compare.material import Material
from gradsieve.compare.records import read_json, write_json
from gradsieve.compare.stores import (
    ask,
    fill,
    gradient_settings,
    method_settings,
    navigator_passes,
    reads_store,
    selector,
    store_of,
    warmup_of,
)
from gradsieve.types import Budget, Problem, Selection, Selector


@dataclass(frozen=True)
class Subset:
    """What an arm trains on.

    Attributes:
        ids: Chosen examples, best first.
        weights: One per example, at least 0.
        notes: What the method had to say.
        select_seconds: What choosing took once gradients were there.
        gradient_seconds: What the gradients took that it read, of those that all methods share: as much of the seconds of each
            stage as it has work there, in token passes.
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
        return warmup_of(self.selector)

    def select(self, problem: Problem, budget: Budget, rng: torch.Generator) -> Selection:
        rng = torch.Generator().manual_seed(self.seed)
        before = rng.get_state()
        selection = self.selector.select(problem, budget, rng)
        self.drawn.append(not torch.equal(before, rng.get_state()))
        return selection


def subset(study: Path, material: Material, arm: Arm, budget: str | None, seed: int, progress: Progress = silent) -> Subset:
    """Returns what an arm trains on for a seed: read where it was chosen before, else chosen and kept.

    A method that drew nothing at random chooses the same for every seed with the same data, and is asked once.
    """
    known = known_subset(study, material, arm, budget, seed)
    if known is not None:
        return known
    assert budget is not None
    inputs = _inputs(material, arm, budget, seed)
    gradient_seconds = fill(study, material, arm, seed, progress) if reads_store(arm) else 0.0
    drawn: list[bool] = []
    started = time.perf_counter()
    store = store_of(study, material, arm, seed)
    result = ask(store, material, _Seeded(selector(arm), seed, drawn), budget, seed, progress)
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


def known_subset(study: Path, material: Material, arm: Arm, budget: str | None, seed: int) -> Subset | None:
    """Returns what an arm trains on for a seed where nothing has to be chosen for that; else None."""
    if not arm.chooses:
        pool = material.trainable(seed).pool
        return Subset(tuple(pool.ids), (1.0,) * len(pool.ids))
    assert budget is not None
    inputs = _inputs(material, arm, budget, seed)
    for other in material.config.seeds:
        found = _kept(study, arm, budget, other, inputs)
        if found is not None and (other == seed or not found.drew):
            return found
    return None


def navigator_passes_left(study: Path, material: Material, cells: Collection[Cell]) -> float:
    """Returns the work of the Navigators behind the choices of these cells that are not made yet, in token passes."""
    config = material.config
    choices = {(cell.arm, cell.budget, cell.seed) for cell in cells if cell.budget is not None and cell.seed is not None}
    return sum(
        navigator_passes(material, config.arm(name), budget, seed)
        for name, budget, seed in choices
        if _kept(study, config.arm(name), budget, seed, _inputs(material, config.arm(name), budget, seed)) is None
    )


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
    return {
        "method": arm.method,
        "settings": method_settings(arm),
        "budget": budget,
        "data": material.sides(seed).digest,
        "model": material.source.weights,
        "gradients": gradient_settings(material),
    }


def _name(arm: Arm, budget: str, seed: int) -> str:
    return f"{arm.name}--{budget.replace('%', 'pct')}--{seed}"


def _file(study: Path, arm: Arm, budget: str, seed: int) -> Path:
    return study / "selections" / f"{_name(arm, budget, seed)}.json"


def overlap(subsets: Mapping[str, Sequence[str]]) -> dict[tuple[str, str], float]:
    """Returns the Jaccard index of every pair of subsets: shared examples / examples in either."""
    sets = {name: frozenset(ids) for name, ids in subsets.items()}
    return {(a, b): len(sets[a] & sets[b]) / max(1, len(sets[a] | sets[b])) for a in sets for b in sets}
