"""A comparison, cell by cell: whatever is finished is kept, whatever is not is done, in a folder that any run goes on in."""

from __future__ import annotations

import dataclasses
import fcntl
import json
import logging
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from importlib import metadata
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import xxhash

from gradsieve import __version__
from gradsieve.atomic import require_writable, write_atomically
from gradsieve.clock import Progress, silent
from gradsieve.compare.cells import Cell, only_cells, plan_cells
from gradsieve.compare.checks import check_comparison
from gradsieve.compare.config import BASE, Config
from gradsieve.compare.material import Material, metrics_of, tokens_digest
from gradsieve.compare.page import write_reports
from gradsieve.compare.records import (
    RESULT,
    Finished,
    cell_folder,
    differences,
    read_finished,
    read_json,
    write_items,
    write_json,
    write_results,
)
from gradsieve.compare.speed import Speed, predicted
from gradsieve.compare.stores import gradient_settings, method_settings, reads_store
from gradsieve.compare.subsets import Subset, known_subset, subset
from gradsieve.compare.team import Team
from gradsieve.compare.training import Job, Outcome, clear, given_back, keep, make_job, train, work
from gradsieve.data import write_lines
from gradsieve.errors import InvalidArgument
from gradsieve.evaluate import KeptBase, TestSet
from gradsieve.models import tokenizer_hash
from gradsieve.outputs import hardware, now, versions
from gradsieve.train.checks import deciding

log = logging.getLogger(__name__)


class Told(Protocol):
    """Is told of every finished cell."""

    def __call__(self, finished: Finished, done: int, total: int, seconds_left: float | None) -> None:
        """`done` of `total` cells are finished; what else is run now takes about `seconds_left`, None while that is unknown."""
        ...


def untold(finished: Finished, done: int, total: int, seconds_left: float | None) -> None:
    """A `Told` that does nothing."""


@dataclass(frozen=True, eq=False)
class Comparison:
    """A comparison made ready.

    Attributes:
        config: What is compared.
        study: Its folder.
        material: What it works on.
        cells: In the order they are run.
    """

    config: Config
    study: Path
    material: Material
    cells: Sequence[Cell]

    @classmethod
    def of(cls, config: Config, *, drop_leaks: bool = False) -> Comparison:
        """Reads everything and refuses what cannot be compared, before a model is loaded.

        Raises:
            GradsieveError: Whatever the user can mend.
        """
        material, study = Material.read(config, drop_leaks=drop_leaks), Path(config.out)
        cells = plan_cells(config)
        check_comparison(material, cells, [cell for cell in cells if read_finished(study, cell) is None])
        return cls(config, study, material, cells)

    def run(
        self, *, progress: Progress = silent, told: Told = untold, minutes: float | None = None, only: Sequence[str] = ()
    ) -> list[Finished]:
        """Does every cell that is not finished, and gathers the results.

        Several processes may work on one folder: each takes cells that no other is at. Those of one launcher (torchrun,
        accelerate launch) train every cell together; all else is done by the first, which alone is told of it.

        Args:
            progress: Is told how far a cell's stages are.
            told: Is told of every cell that is finished here.
            minutes: No cell is begun after so many minutes.
            only: What is run now beside the untouched model, each ARM or ARM@BUDGET; all by default.

        Returns:
            The finished cells, in order.

        Raises:
            InvalidArgument: `only` names something else, the folder holds a cell that was made with other settings, or a
                launcher shards weights.
            GradsieveError: Another process of the launcher has ended.
        """
        cells = only_cells(self.config, only)
        team = Team(self.material.device)
        if not team.first:
            self._assist(team)
            return self.finished()
        with team.leading():
            return self._lead(team, cells, progress, told, minutes)

    def _lead(self, team: Team, cells: Sequence[Cell], progress: Progress, told: Told, minutes: float | None) -> list[Finished]:
        started = time.monotonic()
        self.check_finished(cells)
        self._open()
        model: Any = None
        base: KeptBase | None = None
        for cell in cells:
            if minutes is not None and time.monotonic() - started > 60 * minutes:
                break
            with _claimed(cell_folder(self.study, cell)) as ours:
                if not ours:
                    continue
                folder = cell_folder(self.study, cell) / "training"
                if self._is_finished(cell):
                    clear(folder, keep_model=self.config.keep_models)  # where a process was killed before it did
                    continue
                chosen = self.chosen(cell, progress)
                job = make_job(self.material, cell, self.config.arm(cell.arm), chosen)
                twin = self._twin(cell, job)
                if twin is not None:
                    self._copy(cell, twin, chosen)
                else:
                    if model is None:
                        model = self.material.source.load(self.material.dtype, self.material.device)
                        base = base or keep(model, self.material, progress)
                    together = team.training(cell, chosen)
                    outcome, model = work(model, base, self.material, job, folder, progress, together)
                    self._keep(cell, job, chosen, outcome)
                clear(folder, keep_model=self.config.keep_models)
            write_results(self.study, self.cells)
            done = self.finished()
            told(done[[one.cell for one in done].index(cell)], len(done), len(self.cells), self.seconds_left(done, cells))
        write_results(self.study, self.cells)
        done = self.finished()
        if any(one.cell.arm == BASE for one in done):
            write_reports(self.config)
        return done

    def _assist(self, team: Team) -> None:
        """Joins in every training that the first process begins."""
        model: Any = None
        for cell, chosen in team.told():
            job = make_job(self.material, cell, self.config.arm(cell.arm), chosen)
            if model is None:
                model = self.material.source.load(self.material.dtype, "cpu")  # the trainer moves it to this process's device
            with team.joined():
                trained = train(model, self.material, job, cell_folder(self.study, cell) / "training")
            model = given_back(trained, job)

    def finished(self) -> list[Finished]:
        """Returns the finished cells, in order."""
        return [one for cell in self.cells if (one := read_finished(self.study, cell)) is not None]

    def chosen(self, cell: Cell, progress: Progress = silent) -> Subset | None:
        """Returns what a cell trains on, None for `base`."""
        if cell.arm == BASE:
            return None
        assert cell.seed is not None
        return subset(self.study, self.material, self.config.arm(cell.arm), cell.budget, cell.seed, progress)

    def seconds_left(self, done: Sequence[Finished], cells: Sequence[Cell]) -> float | None:
        """Returns about how long the others of `cells` will take, from what the finished took; None before one was trained."""
        there = {one.cell for one in done}
        speed = Speed.of_finished([one.record for one in done])
        if not speed.train:
            return None
        return sum(predicted(self.material, cell, self.config, speed) for cell in cells if cell not in there)

    # -- the folder ---------------------------------------------------------------------------------------------------

    def _open(self) -> None:
        require_writable(self.study)
        record = {
            "gradsieve": __version__,
            "date": now(),
            "config": json.loads(json.dumps(dataclasses.asdict(self.config), default=str)),
            "versions": versions(),
            "hardware": hardware(self.material.device),
            "notes": self.material.notes,
        }
        write_json(self.study / "comparison.json", record)
        leaks = self.material.leaks()
        (self.study / "leaks.jsonl").unlink(missing_ok=True)  # of a run before the files were mended
        if leaks:
            lines = (json.dumps(dataclasses.asdict(leak), ensure_ascii=False).encode() for leak in leaks)
            write_lines(self.study / "leaks.jsonl", lines)

    def _is_finished(self, cell: Cell) -> bool:
        """Says whether a cell is finished; refuses one that was made with other things than are asked for now."""
        found = read_finished(self.study, cell)
        if found is None:
            return False
        self._check_same(found, self.chosen(cell))
        return True

    def check_finished(self, cells: Sequence[Cell]) -> None:
        """Refuses finished cells that were made with other things, those too that are not run now: the report holds all.

        Nothing is chosen for that. Where no choice of today's settings is kept, what decides it must be as it was, or the cell
        is one of `cells`, which is chosen for in its turn.

        Raises:
            InvalidArgument: There is such a cell.
        """
        for one in self.finished():
            cell, chosen = one.cell, None
            if cell.seed is not None:
                chosen = known_subset(self.study, self.material, self.config.arm(cell.arm), cell.budget, cell.seed)
                if chosen is None and cell in cells:
                    continue
                chosen = chosen or self._as_before(one, cell.seed)
            self._check_same(one, chosen)

    def _as_before(self, found: Finished, seed: int) -> Subset:
        """Returns what a finished cell trained on, where nothing that decides its choice has changed."""
        content = read_json(found.folder / "selection.json")
        chosen = Subset(tuple(content["ids"]), tuple(content["weights"]))
        there, here = found.record, self._identity(found.cell, chosen)
        differing = list(differences(_of_choice(there, here), _of_choice(here, there)))
        gone = {*chosen.ids} - self.material.trainable(seed).of_id.keys()
        if gone:
            differing.append(f"examples there that the pool lacks, {min(gone)} among them")
        if differing:
            raise InvalidArgument(
                f"{found.folder} must be chosen by what is asked for, got {'; '.join(differing)}; name {found.cell.arm} in "
                "--only too, so that it is chosen anew, or another --out"
            )
        return chosen

    def _check_same(self, found: Finished, chosen: Subset | None) -> None:
        """Refuses a finished cell that was made with other things than are asked for now."""
        inputs = self._inputs(make_job(self.material, found.cell, self.config.arm(found.cell.arm), chosen))
        differing = list(differences(_deciding(found.record["inputs"]), _deciding(inputs)))
        if differing:
            raise InvalidArgument(
                f"{found.folder} must be of the comparison that is asked for, got other inputs: {'; '.join(differing)}; name "
                "another --out, or remove that folder"
            )

    def _inputs(self, job: Job) -> dict[str, Any]:
        """Returns all that decides a cell's numbers."""
        return {**self._shared_inputs, "training": job.inputs()}

    @cached_property
    def _shared_inputs(self) -> dict[str, Any]:
        material, config = self.material, self.config
        return {
            "model": material.source.weights,
            "tokenizer": tokenizer_hash(material.source.tokenizer),
            "dtype": str(material.dtype).removeprefix("torch."),
            "tests": {test.name: _test_inputs(config, test) for test in material.tests},
            "tasks": {
                name: {**dataclasses.asdict(task), "data": material.tasks[name] or f"lm_eval {metadata.version('lm_eval')}"}
                for name, task in config.tasks.items()
            },
            "generations": [config.generations, config.max_new_tokens],
        }

    @cached_property
    def _settings(self) -> dict[str, Any]:
        """The comparison's own settings, without arms and places: what `inputs` has by its hash is here by its name."""
        settings = dataclasses.asdict(self.config)
        places = ("model", "pool", "target", "anchor", "tests", "tasks", "arms", "chat_template", "out")
        limits = {name: test.limit for name, test in self.config.tests.items()}
        kept = {name: value for name, value in settings.items() if name not in places}
        return {**kept, "source": Path(self.config.source).name, "limits": limits}

    def _twin(self, cell: Cell, job: Job) -> Finished | None:
        """Returns a finished cell whose work was the same: a view or budget that makes no difference to it."""
        key = _digest(self._inputs(job))
        return next((one for one in self.finished() if one.cell != cell and one.record["work"] == key), None)

    def _copy(self, cell: Cell, twin: Finished, chosen: Subset | None) -> None:
        folder = cell_folder(self.study, cell)
        for name in ("items.parquet", "generations.json"):
            if (twin.folder / name).exists():
                write_atomically(folder / name, (twin.folder / name).read_bytes())
        self._write_selection(folder, chosen)
        seconds = {**twin.record["seconds"], **_choosing(chosen)}
        record = {**twin.record, **self._identity(cell, chosen), "seconds": seconds, "same_as": twin.cell.name}
        write_json(folder / RESULT, record)

    def _keep(self, cell: Cell, job: Job, chosen: Subset | None, outcome: Outcome) -> None:
        folder = cell_folder(self.study, cell)
        self._write_selection(folder, chosen)
        write_items(folder / "items.parquet", outcome.items, outcome.values)
        write_json(folder / "generations.json", list(outcome.answers))
        inputs = self._inputs(job)
        record = {
            **self._identity(cell, chosen),
            "inputs": inputs,
            "work": _digest(inputs),
            "training": dict(outcome.training),
            "seconds": {**_choosing(chosen), **outcome.seconds},
            "means": _means(outcome.values),
            "gradsieve": __version__,
            "versions": versions(),
            "hardware": hardware(self.material.device),
            "date": now(),
        }
        write_json(folder / RESULT, record)

    def _identity(self, cell: Cell, chosen: Subset | None) -> dict[str, Any]:
        arm = self.config.arm(cell.arm)
        return {
            "cell": cell.name,
            "arm": cell.arm,
            "budget": cell.budget,
            "seed": cell.seed,
            "view": cell.view,
            "method": arm.method,
            "settings": method_settings(arm) if arm.chooses else {},
            "own_recipe": dict(arm.recipe),
            "config": self._settings,
            "selection": None
            if chosen is None
            else {
                "examples": len(chosen.ids),
                "digest": xxhash.xxh3_128_hexdigest(json.dumps([chosen.ids, chosen.weights]).encode()),
                "source": chosen.source,
                "data": self.material.sides(cell.seed or 0).digest,
                "gradients": gradient_settings(self.material) if reads_store(arm) else None,
                "notes": list(chosen.notes),
            },
        }

    def _write_selection(self, folder: Path, chosen: Subset | None) -> None:
        if chosen is not None:
            write_json(folder / "selection.json", {"ids": list(chosen.ids), "weights": list(chosen.weights)})


def _test_inputs(config: Config, test: TestSet) -> dict[str, Any]:
    """Returns all of a test that decides its numbers: of multiple choice the wrong options and the right one too."""
    inputs = {"items": tokens_digest(test.tokens), "kind": test.kind, "metrics": list(metrics_of(config, test))}
    if not test.options:
        return inputs
    options = [[tokens_digest(item.tokens), item.answer] for item in test.options]
    return {**inputs, "options": xxhash.xxh3_128_hexdigest(json.dumps(options).encode())}


def _choosing(chosen: Subset | None) -> dict[str, float]:
    """Returns what a cell's choice took."""
    return {
        "gradients": chosen.gradient_seconds if chosen else 0.0,
        "select": chosen.select_seconds if chosen else 0.0,
    }


def _means(values: Mapping[str, Mapping[str, np.ndarray]]) -> dict[str, dict[str, float | None]]:
    def mean(column: np.ndarray) -> float | None:
        known = column[~np.isnan(column)]
        return float(known.mean()) if len(known) else None

    return {test: {metric: mean(column) for metric, column in by.items()} for test, by in values.items()}


def _of_choice(record: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, Any]:
    """Returns what decides a cell's choice, as far as another record has it too: those of earlier versions lack some."""

    def common(key: str) -> dict[str, Any]:
        return {name: value for name, value in record[key].items() if name in other[key]}

    chosen_by = {name: value for name, value in common("selection").items() if name in ("data", "gradients")}
    return {"method": record["method"], "settings": common("settings"), **chosen_by}


def _deciding(inputs: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a cell's inputs without those that do not decide its numbers: a tracker may be added to a study half done."""
    training = dict(inputs["training"])
    training["recipe"] = deciding(training["recipe"] or {})
    return {**inputs, "training": training}


def _digest(inputs: Mapping[str, Any]) -> str:
    return xxhash.xxh3_128_hexdigest(json.dumps(inputs, sort_keys=True).encode())


@contextmanager
def _claimed(folder: Path) -> Iterator[bool]:
    """Says whether this process may work in a folder; a killed process leaves it to the next."""
    folder.mkdir(parents=True, exist_ok=True)
    handle = os.open(folder / ".claim", os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(handle)
        yield False
        return
    try:
        yield True
    finally:
        os.close(handle)
