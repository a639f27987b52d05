"""Any task of lm-evaluation-harness on a model in memory, adapters included.

A task is a name out of lm-eval's own collection or out of a folder of YAML files. With `dataset_path: json` and local
`data_files`, nothing is fetched; stock tasks fetch their data the first time.
"""

from __future__ import annotations

import difflib
import importlib.util
import inspect
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from itertools import islice
from pathlib import Path
from typing import Any

import torch
import xxhash
from torch import Tensor, nn

from gradsieve.errors import DataError, InvalidArgument, MissingExtra
from gradsieve.evaluate.network import evaluating
from gradsieve.foreign import own_randomness, without_git

_PLACES = ("dataset_path", "dataset_name", "dataset_kwargs")
"""Settings of a task that say where its documents are, which are known by themselves."""


@dataclass(frozen=True, eq=False)
class TaskResult:
    """What one task, or a group of tasks, gave.

    Attributes:
        scores: lm-eval's own aggregates by `metric,filter`. Errors are left to intervals over `items`.
        items: Per metric its value for each document, float64 [documents] in the order of the documents' numbers, NaN where
            the task gives NaN; only metrics that are one number per document, none for a group; by `metric,filter` where
            there are several filters.
            What lm-eval calls `perplexity` of a document is its log-likelihood, and is called `loglikelihood` here.
        version: The task's version.
        fewshot: How many solved examples stood in each prompt.
        documents: How many documents the task has, measured or not; 0 for a group.
        higher_is_better: Of metrics in `items`, as far as the task or lm-eval says so.
    """

    scores: Mapping[str, float]
    items: Mapping[str, Tensor]
    version: str
    fewshot: int
    documents: int
    higher_is_better: Mapping[str, bool] = field(default_factory=dict)


def harness(
    model: nn.Module,
    tokenizer: Any,
    tasks: Sequence[str],
    *,
    include_path: str | Path | None = None,
    limit: int | None = None,
    fewshot: int | None = None,
    chat: bool = False,
    batch_size: int = 8,
    seed: int = 1234,
) -> dict[str, TaskResult]:
    """Returns the results of lm-eval's tasks by task, groups and their members included.

    Args:
        model: A causal language model of transformers, or a PEFT model around one; left as it was.
        tokenizer: Its tokenizer.
        tasks: Names of tasks, groups or tags.
        include_path: A folder of task YAML files; they take precedence over lm-eval's own.
        limit: Documents per task, from the first.
        fewshot: Solved examples in each prompt; None is the task's own number.
        chat: Whether prompts go through the tokenizer's chat template.
        batch_size: Prompts per forward pass.
        seed: Of the solved examples' choice and of anything drawn; the process's own random state comes back.

    Raises:
        InvalidArgument: A task is unknown, or `limit` is below 1.
        DataError: A task's data are neither local nor within reach.
        MissingExtra: lm-eval is not installed.
    """
    _require_package()
    if limit is not None and limit < 1:
        raise InvalidArgument(f"limit must be at least 1 document, got {limit}")
    manager = _task_manager(tasks, include_path)
    from lm_eval.evaluator import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    with evaluating(model), own_randomness(), without_git():
        try:
            found = simple_evaluate(
                model=HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size),
                tasks=list(tasks),
                task_manager=manager,
                limit=limit,
                num_fewshot=fewshot,
                apply_chat_template=chat,
                fewshot_random_seed=seed,
                random_seed=seed,
                numpy_random_seed=seed,
                torch_random_seed=seed,
                bootstrap_iters=0,
            )
        except (ConnectionError, FileNotFoundError) as error:
            reason = str(error).strip().partition("\n")[0]
            raise DataError(f"{', '.join(tasks)}: the data must be local or within reach, got: {reason}") from error
    return {name: _result(found, name) for name in found["results"]}


def task_documents(name: str, *, include_path: str | Path | None = None, limit: int | None = None) -> list[tuple[str, str]]:
    """Returns prompt and answer of the documents that a task measures, from the first, worded as the task words them.

    The prompt is without solved examples; of several answers that count as right it is the first.

    Raises:
        InvalidArgument: The task is unknown.
        DataError: It is a group of tasks, or its data are neither local nor within reach, or not of texts.
        MissingExtra: lm-eval is not installed.
    """
    task = _loaded(name, include_path)
    try:
        return [_texts(task, document) for document in islice(task.eval_docs, limit)]
    except (LookupError, TypeError) as error:
        raise DataError(f"{name}: prompts and answers must be texts, got {error!r}") from error


def task_digest(
    name: str, *, include_path: str | Path | None = None, limit: int | None = None, fewshot: int | None = None
) -> str:
    """Returns a hash of all that decides a task's numbers, wherever its files are: the YAML with what it includes, the modules
    of its functions, the documents that it measures, from the first, and those that its solved examples are drawn from.

    Raises:
        InvalidArgument, DataError, MissingExtra: As `task_documents`.
    """
    task = _loaded(name, include_path)
    settings = {key: value for key, value in task.config.to_dict(keep_callable=True).items() if key not in _PLACES}
    solved = task.config.num_fewshot if fewshot is None else fewshot
    hasher = xxhash.xxh3_128()
    for part in ([settings], islice(task.eval_docs, limit), task.fewshot_docs() if solved else ()):
        for text in map(_plain, part):
            hasher.update(len(text).to_bytes(8, "little") + text)
        hasher.update(b"next")
    return str(hasher.hexdigest())


def check_tasks(tasks: Sequence[str]) -> None:
    """Checks that lm-eval's own collection has these tasks, without their data.

    Raises:
        InvalidArgument: It does not.
        MissingExtra: lm-eval is not installed.
    """
    _require_package()
    _task_manager(tasks, None)


def _require_package() -> None:
    if importlib.util.find_spec("lm_eval") is None:
        raise MissingExtra("lm-evaluation-harness tasks need the package lm_eval; pip install 'gradsieve[eval]'")


def _loaded(name: str, include_path: str | Path | None) -> Any:
    """Returns a task of lm-eval with its documents."""
    from jinja2 import TemplateError

    _require_package()
    manager = _task_manager([name], include_path)
    try:
        with own_randomness():
            task = manager.load([name])["tasks"].get(name)
    except (ConnectionError, FileNotFoundError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise DataError(f"{name}: the data must be local or within reach, got: {reason}") from error
    except (LookupError, TypeError, ValueError, TemplateError) as error:
        reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
        raise DataError(f"{name}: its YAML must fit lm-eval and name splits and fields of the data, got {reason}") from error
    if task is None:
        raise DataError(f"{name}: must be a single task, got a group; name its members")
    return task


def _plain(content: Any) -> bytes:
    return json.dumps(content, sort_keys=True, ensure_ascii=False, default=_source).encode()


def _source(value: Any) -> str:
    """Returns the text of the module that a function or class stands in; of anything else what Python prints."""
    try:
        return f"{value.__qualname__}\n{Path(inspect.getfile(value)).read_text(encoding='utf-8')}"
    except (AttributeError, TypeError, OSError):
        return str(value)


def _texts(task: Any, document: Any) -> tuple[str, str]:
    """Returns a document's prompt and answer; where a task gives the number of an option, the option."""

    def text(given: Any) -> str:
        if isinstance(given, int) and task.config.doc_to_choice is not None:
            given = task.doc_to_choice(document)[given]
        return text(given[0]) if isinstance(given, list) and given else str(given)

    return text(task.doc_to_text(document)), text(task.doc_to_target(document))


def _task_manager(tasks: Sequence[str], include_path: str | Path | None) -> Any:
    """Returns lm-eval's index of tasks; its own thousands are only read if the folder lacks a task."""
    if not tasks:
        raise InvalidArgument("tasks must name at least one task, got none")
    if include_path is not None and not Path(include_path).is_dir():
        raise InvalidArgument(f"include_path must be a folder of task YAML files, got {include_path}")
    manager = _stock_tasks() if include_path is None else _own_tasks(Path(include_path), tasks)
    for task in tasks:
        if task not in manager.all_tasks:
            close = difflib.get_close_matches(task, manager.all_tasks, n=3)
            cure = f"did you mean {' or '.join(close)}?" if close else "give the folder of its YAML by include_path"
            raise InvalidArgument(f"tasks must be known to lm-eval, got {task!r}; {cure}")
    return manager


def _own_tasks(folder: Path, tasks: Sequence[str]) -> Any:
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=str(folder), include_defaults=False)
    if {*tasks} <= {*manager.all_tasks}:
        return manager
    _refuse_broken(folder)
    return TaskManager(include_path=str(folder), include_defaults=True)


def _refuse_broken(folder: Path) -> None:
    """Refuses files that are no YAML, which lm-eval passes over."""
    import yaml

    for path in sorted(folder.rglob("*.yaml")):
        try:
            yaml.compose(path.read_text(encoding="utf-8"))
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise DataError(f"{path}: must be valid YAML, got {' '.join(str(error).split())}; correct it") from None


@cache
def _stock_tasks() -> Any:
    """Returns lm-eval's own collection, which takes ten seconds to read."""
    from lm_eval.tasks import TaskManager

    return TaskManager(include_defaults=True)


def _result(found: Mapping[str, Any], name: str) -> TaskResult:
    numbers = {key: float(value) for key, value in found["results"][name].items() if _is_number(value) and "," in key}
    samples = sorted(found["samples"].get(name, []), key=lambda sample: sample["doc_id"])
    version = str(found["versions"].get(name, ""))
    documents = int(found["n-samples"].get(name, {}).get("original", 0))
    fewshot = int(found["n-shot"].get(name) or 0)
    names, filters = _names(found, name), list(dict.fromkeys(sample["filter"] for sample in samples))
    items: dict[str, Tensor] = {}
    higher: dict[str, bool] = {}
    for kind in filters:
        for metric, column in _items([sample for sample in samples if sample["filter"] == kind]).items():
            own, better = names.get(metric, (metric, None))
            own = own if len(filters) == 1 else f"{own},{kind}"
            items[own] = column
            if better is not None:
                higher[own] = better
    return TaskResult(numbers, items, version, fewshot, documents, higher)


def _names(found: Mapping[str, Any], name: str) -> dict[str, tuple[str, bool]]:
    """Returns what a task's metrics are of one document, and whether more of it is better."""
    names = {metric: (metric, better) for metric, better in found["higher_is_better"].get(name, {}).items()}
    if found["configs"].get(name, {}).get("output_type") == "loglikelihood":
        names["perplexity"] = "loglikelihood", True
    return names


def _items(rows: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
    """Returns the per-document values of one filter's samples, one per document."""
    columns = {metric: [row.get(metric) for row in rows] for metric in rows[0]["metrics"]}
    return {
        metric: torch.tensor([float(value) for value in values], dtype=torch.float64)  # type: ignore[arg-type]
        for metric, values in columns.items()
        if all(isinstance(value, int | float) for value in values)
    }


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not (isinstance(value, float) and math.isnan(value))
