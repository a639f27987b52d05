"""The main job: read, extract what the method needs, select. `select` is the Python entry."""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from gradsieve.alignment import Alignment, alignment
from gradsieve.check import Compared
from gradsieve.clock import Clock, Progress, silent
from gradsieve.data import Excluded, TokenSet
from gradsieve.errors import InvalidArgument
from gradsieve.job import Data, Job, file_names
from gradsieve.models import ModelSource
from gradsieve.overhead import Overhead
from gradsieve.run import Run
from gradsieve.selectors import SELECTORS
from gradsieve.types import Budget, Example, Gradients, Problem, Reference, Selection, Selector


@dataclass(frozen=True, eq=False)
class Result:
    """A selection with everything that explains it.

    Attributes:
        method: Name and selector.
        job: The configuration, with `auto` resolved.
        selection: Rows count in the usable pool.
        pool: The usable pool's gradients as the method saw them.
        examples: The chosen examples, best first.
        sets: Every set of examples that was read, by role.
        formats: The shape that files were read as, by role.
        excluded: Examples of the pool that could not be used.
        references: Facts about the reference directions.
        notes: What the user must know beside the selection's own notes.
        clock: Cost per stage.
        model: The files and hash of the model that did the scoring.
        overhead: What choosing cost beside training; None where no gradient was taken.
        alignment: How alike the chosen gradients are; None where there are none.
    """

    method: tuple[str, Selector]
    job: Job
    selection: Selection
    pool: Gradients
    examples: list[Example]
    sets: Mapping[str, TokenSet]
    formats: Mapping[str, str]
    excluded: Sequence[Excluded]
    references: Mapping[str, Reference]
    notes: tuple[str, ...]
    clock: Clock
    model: ModelSource
    overhead: Overhead | None
    alignment: Alignment | None

    def save(self, out: str | Path) -> Path:
        """Writes `selected.jsonl`, `scores.parquet`, `excluded.jsonl`, `run.json` and `report.html`; returns the folder."""
        from gradsieve.outputs import save

        return save(self, Path(out))


def find_method(method: str | Selector, settings: Mapping[str, Any] | None = None) -> tuple[str, Selector]:
    """Returns (name, selector) for a name of `SELECTORS`, `package.module:Class`, or a selector itself.

    Raises:
        InvalidArgument: There is no such method, or it has no such setting.
    """
    if not isinstance(method, str):
        name = next((name for name, kind in SELECTORS.items() if type(method) is kind), None)
        return name or f"{type(method).__module__}:{type(method).__qualname__}", method
    kind = method_class(method)
    known = [f.name for f in dataclasses.fields(kind)]  # type: ignore[arg-type]
    for key in settings or {}:
        if key not in known:
            raise InvalidArgument(f"settings of {method} must be among {', '.join(known) or 'none'}, got {key!r}")
    return method, kind(**(settings or {}))


def method_class(name: str) -> type[Selector]:
    """Returns the class of a method's name, or of `package.module:Class`."""
    if name in SELECTORS:
        return SELECTORS[name]
    module, colon, attribute = name.partition(":")
    if not colon:
        raise InvalidArgument(f"method must be one of {', '.join(SELECTORS)} or package.module:Class, got {name!r}")
    try:
        kind = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise InvalidArgument(f"method {name!r} must be importable, got {error}") from None
    if not (dataclasses.is_dataclass(kind) and hasattr(kind, "select") and hasattr(kind, "needs")):
        raise InvalidArgument(f"method {name!r} must be a dataclass with `needs` and `select`, got {kind!r}")
    return kind  # type: ignore[return-value]


def select(
    method: str | Selector,
    *,
    model: str | Path | torch.nn.Module = "",
    pool: Data = (),
    target: Data = (),
    anchor: Data = (),
    budget: str | int | Budget = "5%",
    tokenizer: Any = None,
    out: str | Path | None = None,
    settings: Mapping[str, Any] | None = None,
    progress: Progress = silent,
    **job: Any,
) -> Result:
    """Chooses the examples of a pool that a method picks, and writes them to `out` if given.

    Args:
        method: A name (`gradsieve methods` lists them), `package.module:Class`, or a selector such as `gs.OGSStatic(drop=30)`.
        model: Folder, hub id, `demo`, or a model object (with `tokenizer`).
        pool: Files, `demo`, or examples.
        target: Examples of the ability you want, likewise.
        anchor: General examples not to be forgotten, likewise.
        budget: `500`, `5%` or `200000tok`.
        tokenizer: For a model object, or in place of the model's own.
        out: Folder for the results.
        settings: The method's hyper-parameters where it is given by name.
        progress: Is told how far long stages are.
        **job: The other fields of `Job`; an unknown one is an error.

    Raises:
        GradsieveError: Whatever the user can mend.
    """
    unknown = set(job) - {f.name for f in dataclasses.fields(Job)}
    if unknown:
        raise InvalidArgument(f"arguments must be fields of Job, got {', '.join(sorted(unknown))}; see help(gradsieve.Job)")
    data = {"pool": pool, "target": target, "anchor": anchor}
    names = {role: file_names(value) for role, value in data.items()}
    config = dataclasses.replace(
        Job(model=model if isinstance(model, str) else _name(model), budget=str(Budget.parse(budget)), **job),
        pool=names["pool"],
        target=names["target"],
        anchor=names["anchor"],
    )
    name, selector = find_method(method, settings)
    if config.replay and not getattr(selector, "replays", False):
        raise InvalidArgument(f"--replay must be left out with {name}, which draws no replay examples; use ogs")
    run = Run.of(config, name, selector, Path(out) if out is not None else None, progress)
    problem = run.problem(data, model, tokenizer)
    try:
        with run.clock.stage("selection"):
            rng = torch.Generator().manual_seed(config.seed)
            selection = selector.select(problem, Budget.parse(config.budget), rng)
    finally:
        if run.navigator is not None:
            run.navigator.close()
    spent = run.overhead(problem.candidates, selection)
    if spent is not None:
        run.notes.append(str(spent))
    alike = alignment(problem.candidates, selection.rows, config.seed)
    if alike is not None and alike.one_way:
        run.notes.append(str(alike))
    by_id = {example.id: example for example in run.sets["pool"].examples}
    result = Result(
        method=(name, selector),
        job=run.job,
        selection=selection,
        pool=problem.candidates,
        examples=[by_id[problem.candidates.ids[row]] for row in selection.rows.tolist()],
        sets=run.sets,
        formats=run.inputs.formats,
        excluded=run.excluded(problem.candidates),
        references=problem.references,
        notes=tuple(run.notes),
        clock=run.clock,
        model=run.source,
        overhead=spent,
        alignment=alike,
    )
    if out is not None:
        result.save(out)
    return result


def passes(method: Selector, job: Job, data: Mapping[str, Data]) -> Mapping[str, float]:
    """Returns what a selection would compute of a model from nothing, without loading it.

    Args:
        method: Whose needs count.
        job: How gradients are taken, with which model.
        data: `pool`, and where there are any `target` and `anchor`.

    Returns:
        Token passes (`gradsieve.overhead`) by what they are of: `pool`, `target`, `anchor`, `references`, `warm-up`,
        `pool alone`; of each what there is, at all checkpoints of a warm-up together. And `navigator`: of training and
        measuring one, with chosen examples of mean length.

    Raises:
        GradsieveError: Whatever the user can mend.
    """
    name, selector = find_method(method)
    run = Run.of(job, name, selector, None, silent)
    work = run.work(data, job.model, None)
    return work | run.navigator_work(getattr(selector, "navigator_passes", None))


@dataclass(frozen=True, eq=False)
class Extraction:
    """What `extract` has done.

    Attributes:
        problem: What any method may look at.
        job: The configuration, with `auto` resolved.
        notes: What the user must know.
        excluded: Examples of the pool that could not be used.
        checked: What was compared with float64 loops.
    """

    problem: Problem
    job: Job
    notes: tuple[str, ...]
    excluded: Sequence[Excluded]
    checked: Sequence[Compared]


def extract(job: Job, progress: Progress = silent, check: int = 0) -> Extraction:
    """Takes the gradients of a pool into `job.store`, with sketches of target and anchor and products with their references.

    Every method then finds what it needs there, but for what its settings ask besides: `ifd` takes the answers alone, and
    references of normalised rows or of the anchor's half for a Navigator have stores of their own. `job.budget` is not read.
    `excluded.jsonl` in the store's folder has the examples of this pool that could not be used, with the reason.

    Args:
        job: What to extract from, with which model, into which store.
        progress: Is told how far long stages are.
        check: Compare so many random examples with float64 loops (`gradsieve.check`).

    Raises:
        GradsieveError: Whatever the user can mend.
    """
    from gradsieve.outputs import write_excluded

    if job.store is None:
        raise InvalidArgument("--store must name a folder for the gradients, got none")
    needs = {"sketch", "norm", "hidden"}
    if job.target:
        needs |= {"targets", "dot/target", "dot/contrast/*"}
    if job.anchor:
        needs |= {"anchors", "dot/anchor", "dot/anchor:*", "dot/contrast/*"}
    run = Run(dataclasses.replace(job, budget="100%"), "extract", frozenset(needs), Path(job.store), progress)
    problem = run.problem({"pool": job.pool, "target": job.target, "anchor": job.anchor}, job.model, None)
    excluded = run.excluded(problem.candidates)
    write_excluded(Path(job.store), excluded, run.sets["pool"].examples)
    checked = run.check(problem.candidates, check) if check else []
    return Extraction(problem, run.job, tuple(run.notes), excluded, checked)


def _name(model: Path | torch.nn.Module) -> str:
    return str(model) if isinstance(model, Path) else type(model).__name__
