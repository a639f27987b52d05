"""What a comparison is made of: one YAML file → frozen dataclasses, every key of it known.

model: demo                        folder, hub id, or demo
pool: pool-{seed}.jsonl            files; {seed} asks for other data per seed, {data} is the folder given by --data
target: target.jsonl
anchor: [general.jsonl, math.jsonl]
tests:
  medicine: {role: target, files: medicine.jsonl, limit: 150}
  math: {role: general, files: math.jsonl}
arms:                              base, full and random are added where they are missing
  ogs-static:                      the arm's name is its method's, unless it says otherwise
  ogs-filter: {method: ogs-static, settings: {form: filter, draw: utility}, budgets: [10%]}   random has its budgets too
  pcgrad: {method: random, recipe: {…}}
budgets: [5%, 20%]
seeds: [0, 1, 2]
views: [equal_steps, equal_repetition]
steps: 60                          of the view equal_steps; as many as `full` takes by default
recipe: {…}                        fields of gradsieve.train.Recipe
gradients: {…}                     fields of gradsieve.Job: dim, params, batch_tokens, …
max_length: 256
metrics: [loss, key_loss, key_accuracy, kl, choice]
tasks:                             of lm-evaluation-harness, by their names there
  arc_easy: {role: general, limit: 100}
out: comparison
"""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from importlib import resources
from pathlib import Path
from typing import Any, ClassVar, Literal, TypeVar, get_args, get_type_hints

from gradsieve.compare.typed import mapping, refuse_unknown, typed, typed_fields
from gradsieve.data import Format
from gradsieve.errors import DataError, GradsieveError, InvalidArgument
from gradsieve.job import Job
from gradsieve.models import DType
from gradsieve.pipeline import find_method
from gradsieve.types import SEEDS, Budget

T = TypeVar("T")
View = Literal["equal_steps", "equal_repetition"]
Role = Literal["target", "general"]

BASE, FULL, RANDOM = "base", "full", "random"
"""The arms that no comparison may lack: the untouched model, training on everything, and chance."""

METRICS = ("loss", "key_loss", "key_accuracy", "kl", "choice")
"""What is measured by default."""

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.+]*(?:-[A-Za-z0-9_.+]+)*")
SHARED = ("max_length", "dtype", "device", "format", "category_field", "chat_template", "trust_remote_code")
"""Fields of `Job` that hold for gradients, training and evaluation alike: they stand at the top of the file."""

_OF_THE_CELL = ("model", "pool", "target", "anchor", "budget", "seed", "store")
_BY_VIEW = ("steps", "seed")


@dataclass(frozen=True)
class TestFiles:
    """A named set of examples to evaluate on.

    Attributes:
        role: `target` for the wanted ability, `general` for one that must not be forgotten.
        files: Where they are.
        limit: So many of them at most, a random choice that depends on the texts alone; None for all.
        metrics: What is measured on it; the comparison's own metrics by default, without KL where the role is target.
    """

    __test__: ClassVar[bool] = False  # for pytest, which takes any Test… for a test

    role: Role
    files: tuple[str, ...]
    limit: int | None = None
    metrics: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not self.files:
            raise InvalidArgument("files must name at least one file, got none")
        if self.limit is not None and self.limit < 2:
            raise InvalidArgument(f"limit must be at least 2, got {self.limit}")


@dataclass(frozen=True)
class TaskSettings:
    """A task of lm-evaluation-harness, stock or of a local YAML file; what it gives per document counts like a test's items.

    Attributes:
        role: `target` for the wanted ability, `general` for one that must not be forgotten.
        limit: Documents, from the first; None for all.
        fewshot: Solved examples in each prompt; None for the task's own number.
        include_path: Folder of the task's YAML file, where it is not a stock task.
        chat: Whether prompts go through the chat template.
    """

    role: Role = "general"
    limit: int | None = None
    fewshot: int | None = None
    include_path: str | None = None
    chat: bool = False

    def __post_init__(self) -> None:
        if self.limit is not None and self.limit < 2:
            raise InvalidArgument(f"limit must be at least 2, got {self.limit}")
        if self.fewshot is not None and self.fewshot < 0:
            raise InvalidArgument(f"fewshot must be at least 0, got {self.fewshot}")


@dataclass(frozen=True)
class Arm:
    """One way to come by a model: a method with its settings, or a baseline.

    Attributes:
        name: Its name in tables and folders.
        method: `base`, `full`, a method of `gradsieve methods`, or package.module:Class.
        settings: The method's hyper-parameters.
        budgets: Budgets of its own in place of the comparison's; `random` has those of all arms besides.
        recipe: Training settings of its own: gradient surgery, replay.
        added: Whether it was added because no comparison may lack it.
    """

    name: str
    method: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    budgets: tuple[str, ...] = ()
    recipe: Mapping[str, Any] = field(default_factory=dict)
    added: bool = False

    @property
    def chooses(self) -> bool:
        """Whether it picks a subset, so that it has budgets."""
        return self.method not in (BASE, FULL)


@dataclass(frozen=True)
class Config:
    """A comparison: methods x budgets x seeds x views.

    Attributes:
        source: The file it was read from, for messages.
        model: Folder, hub id, or demo.
        pool: Files to choose from; `{seed}` in a path asks for other data per seed.
        target: Examples of the wanted ability.
        anchor: General examples that must not be forgotten, by categories: a field's, or, of several files, each file's name.
        tests: What is evaluated on, by name.
        arms: The ways compared, in order: base, full and random first.
        budgets: How much each arm may choose.
        seeds: Of training, of the methods' draws and, with `{seed}`, of the data.
        views: Equal optimizer steps, equal repetition of the data, or both.
        steps: Optimizer steps of the view `equal_steps`; None: as many as `full` takes in its epochs.
        recipe: How every arm is trained.
        gradients: How gradients are taken: the fields of `Job` that are not here.
        max_length: Tokens per example; the rest is cut off at the end.
        dtype: Compute type of everything; auto is bfloat16 where the hardware has it, else float32.
        device: Where everything is computed.
        format: Shape of the examples; auto looks.
        category_field: Field of an anchor's example that names its ability.
        chat_template: File with a Jinja chat template to use in place of the model's own.
        trust_remote_code: Let the tokenizer run code that comes with it.
        metrics: What is measured on every test whose kind has it.
        tasks: Of lm-evaluation-harness, by name.
        max_new_tokens: Where a generated text is cut off.
        keep_models: Keep each cell's adapters or weights when it is finished.
        generations: For so many prompts of each target test, what every arm answers is shown side by side.
        near_duplicate: Share of common word triples from which two examples count as the same, for the leak check.
        resamples: Of the bootstrap.
        out: Folder for everything.
    """

    source: str
    model: str
    pool: tuple[str, ...]
    tests: Mapping[str, TestFiles]
    arms: Sequence[Arm]
    budgets: tuple[str, ...]
    target: tuple[str, ...] = ()
    anchor: tuple[str, ...] = ()
    seeds: tuple[int, ...] = (0, 1, 2)
    views: tuple[View, ...] = ("equal_steps",)
    steps: int | None = None
    recipe: Mapping[str, Any] = field(default_factory=dict)
    gradients: Mapping[str, Any] = field(default_factory=dict)
    max_length: int = 1024
    dtype: DType = "auto"
    device: str = "auto"
    format: Format = "auto"
    category_field: str = "category"
    chat_template: str | None = None
    trust_remote_code: bool = False
    metrics: tuple[str, ...] = METRICS
    tasks: Mapping[str, TaskSettings] = field(default_factory=dict)
    max_new_tokens: int = 256
    keep_models: bool = False
    generations: int = 2
    near_duplicate: float = 0.8
    resamples: int = 4000
    out: str = "comparison"

    def __post_init__(self) -> None:
        rules: list[tuple[bool, str]] = [
            (bool(self.pool), "pool must name the examples to choose from, got none"),
            (bool(self.budgets), "budgets must name at least one, got none; write [5%, 20%]"),
            (bool(self.seeds), "seeds must name at least one, got none; write [0, 1, 2]"),
            (min(self.seeds, default=0) >= 0, f"seeds must be at least 0, got {min(self.seeds, default=0)}"),
            (max(self.seeds, default=0) < SEEDS, f"seeds must be below {SEEDS}, got {max(self.seeds, default=0)}"),
            (bool(self.views), "views must name at least one, got none; write [equal_steps, equal_repetition]"),
            (bool(self.metrics), "metrics must name at least one, got none; write [loss, kl]"),
            (self.steps is None or self.steps >= 1, f"steps must be at least 1, got {self.steps}"),
            (self.max_new_tokens >= 1, f"max_new_tokens must be at least 1, got {self.max_new_tokens}"),
            (self.generations >= 0, f"generations must be at least 0, got {self.generations}"),
            (0 < self.near_duplicate <= 1, f"near_duplicate must lie in (0, 1], got {self.near_duplicate}"),
            (self.resamples >= 100, f"resamples must be at least 100, got {self.resamples}"),
            (any(t.role == "target" for t in self.tests.values()), "tests must have one with role target, got none"),
        ]
        for name in ("budgets", "seeds", "views", "metrics"):
            values = getattr(self, name)
            rules.append((len(set(values)) == len(values), f"{name} must differ from each other, got {list(values)}"))
        rules += [_known_metric(metric) for metric in (*self.metrics, *(m for t in self.tests.values() for m in t.metrics))]
        twice = sorted(set(self.tests) & set(self.tasks))
        rules.append((not twice, f"tasks must have other names than tests, got {', '.join(twice)} twice"))
        for holds, message in rules:
            if not holds:
                raise InvalidArgument(message)

    @property
    def data_per_seed(self) -> bool:
        """Whether pool, target or anchor are other files for each seed."""
        return any("{seed}" in file for file in (*self.pool, *self.target, *self.anchor))

    def files(self, role: str, seed: int) -> tuple[str, ...]:
        """Returns the files of `pool`, `target` or `anchor` for a seed."""
        named: tuple[str, ...] = getattr(self, role)
        return tuple(file.replace("{seed}", str(seed)) for file in named)

    def arm(self, name: str) -> Arm:
        """Returns an arm by its name."""
        return next(arm for arm in self.arms if arm.name == name)


def _known_metric(metric: str) -> tuple[bool, str]:
    from gradsieve.evaluate import Metric

    known = get_args(Metric)
    return metric in known, f"metrics must be among {', '.join(known)}, got {metric!r}"


def demo_config() -> str:
    """Returns the YAML text of the built-in comparison."""
    return resources.files("gradsieve.compare").joinpath("demo.yaml").read_text(encoding="utf-8")


def load_config(path: str | Path, *, data: str | Path | None = None, out: str | Path | None = None) -> Config:
    """Reads a comparison's file; `demo` is the built-in one.

    Args:
        path: A YAML file, or `demo`.
        data: Folder that `{data}` stands for; `$GRADSIEVE_DATA` by default.
        out: Takes the place of the file's `out`.

    Raises:
        DataError: A key is unknown or a value does not fit; the message has file and key.
    """
    import yaml

    if str(path) == "demo":
        text, name = demo_config(), "demo.yaml"
    else:
        name = str(path)
        try:
            text = Path(path).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(f"{path}: must be a readable YAML file, got {error}") from None
    try:
        content = yaml.load(text, Loader=_unique_keys())
    except yaml.YAMLError as error:
        raise DataError(f"{path}: must be valid YAML, got {' '.join(str(error).split())}") from None
    return parse_config(content, name, data=data, out=out)


def parse_config(content: object, name: str, *, data: str | Path | None = None, out: str | Path | None = None) -> Config:
    """Returns the comparison that the content of a YAML file describes; see `load_config`."""
    given = mapping(content, f"{name}: the file")
    known = [f.name for f in dataclasses.fields(Config) if f.name != "source"]
    for key in given:
        if key not in known:
            raise DataError(f"{name}: {key} must be one of {', '.join(known)}, got {key!r}; correct or remove it")
    for key in ("model", "pool", "tests", "arms", "budgets"):
        if key not in given:
            raise DataError(f"{name}: {key} must be given, got none")
    if not isinstance(given.get("seeds", []), list):
        raise DataError(f"{name}: seeds must be a list, each seed by its name, got {given['seeds']!r}; write [0, 1, 2]")
    plain = {k: v for k, v in given.items() if k not in ("tests", "tasks", "arms", "recipe", "gradients")}
    kinds = get_type_hints(Config)
    fields = {key: typed(value, kinds[key], f"{name}: {key}") for key, value in plain.items()}
    if out is not None:
        fields["out"] = str(out)
    fields["tests"] = {test: _test(values, f"{name}: tests.{test}") for test, values in _named(given, "tests", name).items()}
    if "tasks" in given:
        fields["tasks"] = {
            task: _task(values, f"{name}: tasks.{task}") for task, values in _named(given, "tasks", name).items()
        }
    fields["recipe"] = _recipe(given.get("recipe"), f"{name}: recipe")
    fields["gradients"] = _gradients(given.get("gradients"), f"{name}: gradients")
    fields["arms"] = _arms(_named(given, "arms", name), name)
    try:
        config = Config(source=name, **fields)
    except InvalidArgument as error:
        raise DataError(f"{name}: {error}") from None
    for budget in {*config.budgets, *(budget for arm in config.arms for budget in arm.budgets)}:
        _checked(partial(Budget.parse, budget), f"{name}: budgets")
    return _placed(config, data)


def _named(given: Mapping[str, Any], key: str, name: str) -> dict[str, Any]:
    entries = mapping(given[key], f"{name}: {key}")
    for entry in entries:
        if not _NAME.fullmatch(entry):
            raise DataError(f"{name}: {key} must have names of letters, digits, _ . + and single -, got {entry!r}; rename it")
    return entries


def _test(values: object, where: str) -> TestFiles:
    fields = typed_fields(TestFiles, values, where)
    for key in ("role", "files"):
        if key not in fields:
            raise DataError(f"{where}.{key} must be given, got none")
    return _checked(lambda: TestFiles(**fields), where)


def _task(values: object, where: str) -> TaskSettings:
    fields = typed_fields(TaskSettings, values, where)
    return _checked(lambda: TaskSettings(**fields), where)


def _arms(entries: Mapping[str, Any], name: str) -> list[Arm]:
    arms = [_arm(arm, values, f"{name}: arms.{arm}") for arm, values in entries.items()]
    present = {arm.name for arm in arms}
    for method in (BASE, FULL, RANDOM):
        if method not in present:
            arms.append(Arm(method, method, added=True))
    first = {BASE: 0, FULL: 1, RANDOM: 2}
    return sorted(arms, key=lambda arm: first.get(arm.name, 3))


def _arm(name: str, values: object, where: str) -> Arm:
    given = mapping(values, where)
    refuse_unknown(given, ("method", "settings", "budgets", "recipe"), where)
    method = str(given.get("method", name))
    if name in (BASE, FULL, RANDOM) and method != name:
        raise DataError(f"{where}.method must be {name} (the baseline of that name), got {method!r}; rename the arm")
    if method in (BASE, FULL):
        for key in ("settings", "budgets"):
            if key in given:
                raise DataError(f"{where}.{key} must be left out for {method}, got {given[key]!r}")
    if method == BASE and ("recipe" in given or name != BASE):
        raise DataError(f"{where} must be named base and have no recipe: it is the untouched model")
    if name in (FULL, RANDOM) and "recipe" in given:
        raise DataError(
            f"{where}.recipe must be left out: {name} is trained as the comparison's recipe says, got {given['recipe']!r}; "
            f"name another arm {name}-…, with method: {name}"
        )
    settings = mapping(given.get("settings"), f"{where}.settings")
    if method not in (BASE, FULL):
        settings = _settings(method, settings, where)
    budgets = typed(given.get("budgets", []), tuple[str, ...], f"{where}.budgets")
    return Arm(name, method, settings, budgets, _recipe(given.get("recipe"), f"{where}.recipe"))


def _settings(method: str, settings: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Returns the settings in the types that the method's fields have, once the method has accepted them."""
    from gradsieve.pipeline import method_class

    kind = _checked(lambda: method_class(method), f"{where}.method")
    fields = typed_fields(kind, settings, f"{where}.settings")
    _checked(lambda: find_method(method, fields), f"{where}.settings")
    return fields


def _recipe(values: object, where: str) -> dict[str, Any]:
    from gradsieve.train import Recipe

    given = mapping(values, where)
    refuse_unknown(given, [f.name for f in dataclasses.fields(Recipe) if f.name not in _BY_VIEW], where)
    fields = typed_fields(Recipe, given, where)
    _checked(lambda: Recipe(**fields), where)
    return fields


def _gradients(values: object, where: str) -> dict[str, Any]:
    given = mapping(values, where)
    known = [f.name for f in dataclasses.fields(Job) if f.name not in (*_OF_THE_CELL, *SHARED)]
    refuse_unknown(given, known, where)
    return typed_fields(Job, given, where)


def _checked(make: Callable[[], T], where: str) -> T:
    """Returns what `make` makes; an error that the user can mend gets the place in the file before it."""
    try:
        return make()
    except GradsieveError as error:
        raise DataError(f"{where}: {error}") from None


def _placed(config: Config, data: str | Path | None) -> Config:
    """Returns the comparison with `{data}` replaced by the folder it stands for."""
    folder = str(data) if data is not None else os.environ.get("GRADSIEVE_DATA")

    def place(file: str, where: str) -> str:
        if "{data}" not in file:
            return file
        if not folder:
            raise DataError(f"{config.source}: {where} names {file}, which needs --data DIR (or $GRADSIEVE_DATA), got none")
        return file.replace("{data}", folder)

    tests = {}
    for name, test in config.tests.items():
        files = tuple(place(file, f"tests.{name}.files") for file in test.files)
        if any("{seed}" in file for file in files):
            raise DataError(
                f"{config.source}: tests.{name}.files must be the same for all seeds (items are paired), got {files[0]}"
            )
        tests[name] = dataclasses.replace(test, files=files)
    tasks = {
        name: dataclasses.replace(task, include_path=place(task.include_path, f"tasks.{name}.include_path"))
        for name, task in config.tasks.items()
        if task.include_path is not None
    }
    roles: dict[str, Any] = {
        role: tuple(place(file, role) for file in getattr(config, role)) for role in ("pool", "target", "anchor")
    }
    single: dict[str, Any] = {
        key: place(given, key) for key in ("model", "chat_template") if (given := getattr(config, key)) is not None
    }
    return dataclasses.replace(config, tests=tests, tasks={**config.tasks, **tasks}, **single, **roles)


def _unique_keys() -> Any:
    """Returns a YAML loader that refuses a key given twice, of which the first would be lost."""
    import yaml

    class Loader(yaml.SafeLoader):
        pass

    def construct(loader: Any, node: Any) -> Any:
        seen: set[str] = set()
        for key_node, _ in node.value:
            key = loader.construct_object(key_node, deep=True)
            if str(key) in seen:
                raise yaml.YAMLError(f"the key {key!r} twice, the second in line {key_node.start_mark.line + 1}")
            seen.add(str(key))
        return yaml.SafeLoader.construct_mapping(loader, node, deep=True)

    Loader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, construct)
    return Loader
