"""What a comparison works on: examples read and checked for leaks, tokens, test sets, the model's files."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import zip_longest
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xxhash

from gradsieve.compare.config import METRICS, Config, TestFiles
from gradsieve.compare.leaks import Leak, find_leaks, refuse, without_leaks
from gradsieve.compare.statistics import JUDGED_ITEMS
from gradsieve.data import Tokens, TokenSet, content_hash, read_examples
from gradsieve.data.template import read_template
from gradsieve.demo import demo_general, demo_set, demo_test, is_demo
from gradsieve.errors import DataError, InvalidArgument
from gradsieve.evaluate import TestSet, check_tasks, fits, task_digest, task_documents
from gradsieve.models import ModelSource, find_model, resolve_device, resolve_dtype
from gradsieve.types import Example


@dataclass(frozen=True, eq=False)
class Sides:
    """The examples of one seed's data, after leaks were taken out.

    Attributes:
        pool: To choose from.
        target: Of the wanted ability; may be empty.
        anchor: General; may be empty.
        leaks: What was taken out.
    """

    pool: Sequence[Example]
    target: Sequence[Example]
    anchor: Sequence[Example]
    leaks: Sequence[Leak]

    @cached_property
    def digest(self) -> str:
        """The hash of all of it, in order."""
        return self._hashed("pool", "target", "anchor")

    @cached_property
    def references(self) -> str:
        """The hash of target and anchor, in order."""
        return self._hashed("target", "anchor")

    def _hashed(self, *names: str) -> str:
        return _digest({name: getattr(self, name) for name in names})


@dataclass(frozen=True, eq=False)
class Trainable:
    """One seed's examples as tokens.

    Attributes:
        pool: The pool's usable examples.
        anchor: The anchor's; None without one.
    """

    pool: TokenSet
    anchor: TokenSet | None

    @cached_property
    def of_id(self) -> Mapping[str, Tokens]:
        """The pool's tokens by id."""
        return dict(zip(self.pool.ids, self.pool.tokens, strict=True))

    @cached_property
    def by_length(self) -> Sequence[str]:
        """The pool's ids, the shortest example first."""
        return [id for _, id in sorted(zip(self.pool.lengths, self.pool.ids, strict=True))]


@dataclass(eq=False)
class Material:
    """Everything a comparison reads, each thing once.

    Attributes:
        config: The comparison.
        source: The model's files and tokenizer.
        device: Where it is computed, and
        dtype: in which type.
        template: Text of the chat template that replaces the model's own.
        tests: The test sets.
        tasks: A hash of all that decides each local task's numbers; None of a stock task's.
        notes: Sentences the user must read.
    """

    config: Config
    source: ModelSource
    device: str
    dtype: torch.dtype
    template: str | None
    tests: Sequence[TestSet]
    tasks: Mapping[str, str | None]
    notes: list[str]
    _sides: dict[int, Sides]
    _trainable: dict[tuple[str, ...], Trainable] = field(default_factory=dict)

    @classmethod
    def read(cls, config: Config, *, drop_leaks: bool = False) -> Material:
        """Reads all data and finds the model, without loading it.

        Raises:
            GradsieveError: A file, the model or a test cannot be used, or examples leak and must not be dropped.
        """
        notes: list[str] = []
        tests = {name: read_test(config, name, test, notes) for name, test in config.tests.items()}
        seeds = config.seeds if config.data_per_seed else config.seeds[:1]
        task_sides, tasks = _read_tasks(config, notes)
        walls = {f"test {name}": examples for name, examples in tests.items()} | task_sides
        sides = {seed: _read_sides(config, seed, walls, drop_leaks, notes) for seed in seeds}
        sides = {seed: sides.get(seed, sides[seeds[0]]) for seed in config.seeds}
        dropped = [len({(leak.side, leak.id) for leak in one.leaks}) for one in sides.values() if one.leaks]
        if dropped:
            notes.append(f"examples that leaked were dropped ({max(dropped)} at most per seed); leaks.jsonl lists them")
        source = find_model(config.model, trust_remote_code=config.trust_remote_code)
        device = resolve_device(config.device)
        template = read_template(config.chat_template)
        sets = [
            TestSet.of(
                name, config.tests[name].role, part, source.tokenizer, max_length=config.max_length, chat_template=template
            )
            for name, part in tests.items()
        ]
        for test in sets:
            if len(test.tokens) < JUDGED_ITEMS:
                raise InvalidArgument(
                    f"{config.source}: tests.{test.name} must have at least {JUDGED_ITEMS} usable items, got {len(test.tokens)}"
                )
            if test.excluded:
                notes.append(f"{len(test.excluded)} items of {test.name} cannot be used; the first: {test.excluded[0].reason}")
            if cut := sum(tokens.truncated for tokens in test.tokens):
                notes.append(
                    f"{cut} of {len(test.tokens)} items of {test.name} are longer than {config.max_length} tokens and were cut "
                    "at the end, and no generated text is held to an answer that was cut; raise max_length to keep them whole"
                )
        _check_metrics(config, sets)
        return cls(config, source, device, resolve_dtype(config.dtype, device), template, sets, tasks, notes, sides)

    @cached_property
    def named_files(self) -> dict[str, Any]:
        """What stands under `gradients` by the name of a file or model: a hash of its content by key."""
        given = self.config.gradients
        found: dict[str, Any] = {}
        if given.get("warmup_recipe"):
            found["warmup_recipe"] = xxhash.xxh3_128_hexdigest(Path(given["warmup_recipe"]).read_bytes())
        if given.get("corrupted"):
            found["corrupted"] = _digest({"corrupted": _read(self.config, given["corrupted"], "corrupted", self.notes)})
        if given.get("navigator"):
            found["navigator"] = find_model(given["navigator"], trust_remote_code=self.config.trust_remote_code).weights
        return found

    def sides(self, seed: int) -> Sides:
        """Returns a seed's examples."""
        return self._sides[seed]

    def leaks(self) -> list[Leak]:
        """Returns every leak that was dropped, of all seeds, each once."""
        return list(dict.fromkeys(leak for sides in self._sides.values() for leak in sides.leaks))

    def trainable(self, seed: int) -> Trainable:
        """Returns a seed's examples as tokens."""
        config = self.config
        key = tuple(file for role in ("pool", "target", "anchor") for file in config.files(role, seed))
        if key not in self._trainable:
            sides = self.sides(seed)
            pool = self._tokens("pool", sides.pool)
            self._trainable[key] = Trainable(pool, self._tokens("anchor", sides.anchor) if sides.anchor else None)
        return self._trainable[key]

    def _tokens(self, name: str, examples: Sequence[Example]) -> TokenSet:
        made = TokenSet.of(
            name, examples, self.source.tokenizer, max_length=self.config.max_length, chat_template=self.template
        )
        made.require_usable()
        for note in made.remarks(self.config.max_length):
            if note not in self.notes:
                self.notes.append(note)
        return made


def _digest(parts: Mapping[str, Sequence[Example]]) -> str:
    """Returns the hash of named examples, in order."""
    hasher = xxhash.xxh3_128()
    for name, examples in parts.items():
        hasher.update(f"{name} {len(examples)}\n".encode())
        for example in examples:
            hasher.update(example.id.encode() + b"\n" + example.raw + b"\n" + (example.category or "").encode() + b"\n")
    return str(hasher.hexdigest())


def read_test(config: Config, name: str, test: TestFiles, notes: list[str]) -> list[Example]:
    """Returns the examples of a test; with a limit those whose texts have the smallest hashes, in the order of the files.

    What the user must know of the files is added to the notes.
    """
    examples = _read(config, test.files, f"tests.{name}", notes)
    if test.limit is None or len(examples) <= test.limit:
        return list(examples)
    kept = {example.id for example in sorted(examples, key=lambda e: (content_hash(e), e.id))[: test.limit]}
    return [example for example in examples if example.id in kept]


def tokens_digest(tokens: Sequence[Tokens]) -> str:
    """Returns a hash of ids and labels, in order."""
    hasher = xxhash.xxh3_128()
    for one in tokens:
        for part in (one.input_ids, one.labels):
            hasher.update(len(part).to_bytes(8, "little"))
            hasher.update(np.ascontiguousarray(part, dtype=np.int32).tobytes())
    return str(hasher.hexdigest())


def metrics_of(config: Config, test: TestSet) -> tuple[str, ...]:
    """Returns what is measured on a test: what it asks for, else those of the comparison's metrics that its kind has.

    KL is not measured on a target test, unless it asks for it: learning the target moves a model away from its base there; that
    is no forgetting, and KL costs a second forward pass.
    """
    given = config.metrics if test.role == "general" else tuple(metric for metric in config.metrics if metric != "kl")
    return config.tests[test.name].metrics or tuple(metric for metric in given if fits(metric, test.kind))


def _check_metrics(config: Config, tests: Sequence[TestSet]) -> None:
    """Refuses metrics that a test, or any, cannot have, and tests that are left with none but KL, which is no gain."""
    for test in tests:
        for metric in config.tests[test.name].metrics:
            if not fits(metric, test.kind):
                raise InvalidArgument(
                    f"{config.source}: tests.{test.name}.metrics must be of sets of kind {test.kind}, got {metric}; remove it"
                )
        if not {*metrics_of(config, test)} - {"kl"}:
            raise InvalidArgument(
                f"{config.source}: metrics must hold one that {test.name} (kind {test.kind}) has besides kl, got "
                f"{', '.join(config.metrics)}; add loss"
            )
    for metric in () if config.metrics is METRICS else config.metrics:
        fitting = [test for test in tests if fits(metric, test.kind)]
        if not fitting:
            kinds = ", ".join(f"{test.name} ({test.kind})" for test in tests)
            raise InvalidArgument(f"{config.source}: metrics must each be of some test's kind, got {metric} for {kinds}")
        if metric == "kl" and not any(test.role == "general" or "kl" in metrics_of(config, test) for test in fitting):
            raise InvalidArgument(
                f"{config.source}: metrics must hold kl only with a test of role general, got none; remove kl, or name one"
            )


def _read_tasks(config: Config, notes: list[str]) -> tuple[dict[str, list[Example]], dict[str, str | None]]:
    """Returns the documents of the tasks in local YAML files as examples, for the search for leaks alone, and a hash of each.

    Stock tasks would fetch their data; that they were not looked at is added to the notes.
    """
    sides: dict[str, list[Example]] = {}
    digests: dict[str, str | None] = {}
    for name, task in config.tasks.items():
        reason, digests[name] = "not of a local YAML file", None
        if task.include_path is None:
            check_tasks([name])
        else:
            digests[name] = task_digest(name, include_path=task.include_path, limit=task.limit, fewshot=task.fewshot)
            try:
                sides[f"task {name}"] = [
                    Example(str(number), _turns(*texts), b"", f"document {number}")
                    for number, texts in enumerate(task_documents(name, include_path=task.include_path, limit=task.limit))
                ]
                continue
            except DataError as error:
                reason = str(error)
        notes.append(f"the documents of the task {name} were not checked for leaks: {reason}")
    return sides, digests


def _turns(prompt: str, answer: str) -> tuple[Mapping[str, str], ...]:
    return {"role": "user", "content": prompt}, {"role": "assistant", "content": answer.strip()}


def _read_sides(config: Config, seed: int, walls: Mapping[str, Sequence[Example]], drop: bool, notes: list[str]) -> Sides:
    roles = {role: _read(config, config.files(role, seed), role, notes) for role in ("pool", "target", "anchor")}
    sides = {**roles, **walls}
    leaks = find_leaks(sides, [name for name in sides if name not in roles], config.near_duplicate)
    if not drop:
        refuse(leaks)
    kept = without_leaks(sides, leaks)
    if not kept["pool"]:
        raise InvalidArgument("pool must hold examples that do not leak, got none")
    return Sides(kept["pool"], kept["target"], kept["anchor"], leaks)


def _read(config: Config, files: Sequence[str], role: str, notes: list[str]) -> Sequence[Example]:
    if not files:
        return []
    if any(map(is_demo, files)):
        if len(files) > 1:
            raise DataError(f"{config.source}: {role} must be one `demo` set or files, got {' '.join(files)}")
        return _demo(files[0], role)
    dataset = read_examples(
        files, format=config.format, category_field=config.category_field, category_per_file=role == "anchor"
    )
    notes += [note for note in dataset.notes if note not in notes]
    return dataset.examples


def _demo(name: str, role: str) -> Sequence[Example]:
    """Returns a built-in set: `demo` or `demo:SIZE` of a role, or one of the tests."""
    tests: dict[str, Callable[[], Sequence[Example]]] = {
        "demo:medicine": demo_test,
        "demo:arithmetic": lambda: demo_general("arithmetic"),
        "demo:knowledge": lambda: demo_general("knowledge"),
    }
    if role.startswith("tests."):
        if name not in tests:
            raise InvalidArgument(f"{role} must be one of {', '.join(tests)} or files, got {name!r}")
        return tests[name]()
    size = name.removeprefix("demo:")
    if role == "anchor" and size.isdecimal():
        return _first_of_each(demo_set("anchor"), int(size))
    return demo_set(role, name)


def _first_of_each(examples: Sequence[Example], count: int) -> list[Example]:
    """Returns `count` examples, as many of each category as of the others, give or take one."""
    by_category: dict[str | None, list[Example]] = {}
    for example in examples:
        by_category.setdefault(example.category, []).append(example)
    if not len(by_category) <= count <= len(examples):
        raise InvalidArgument(f"the demo's anchor must have {len(by_category)} to {len(examples)} examples, got demo:{count}")
    turns = [one for row in zip_longest(*by_category.values()) for one in row if one is not None]
    return turns[:count]
