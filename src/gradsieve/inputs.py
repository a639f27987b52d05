"""The examples of a run, read and checked: every role has what the method needs, and no two share any."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gradsieve.data import overlap, read_examples
from gradsieve.demo import demo_set, describe, is_demo
from gradsieve.errors import InvalidArgument
from gradsieve.job import Data, Job, file_names
from gradsieve.needs import reads_set
from gradsieve.types import Example


@dataclass(slots=True)
class Inputs:
    """What was read.

    Attributes:
        examples: By role: `pool`, with the replay data at its end, and where there are any `target` and `anchor`.
        corrupted: The user's own wrong copies of anchor and target examples, by id.
        replayed: Ids of the replay data.
        formats: The shape of each role's examples, for people.
        notes: What the user should know.
    """

    examples: dict[str, Sequence[Example]] = field(default_factory=dict)
    corrupted: dict[str, Example] = field(default_factory=dict)
    replayed: frozenset[str] = frozenset()
    formats: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def read_inputs(job: Job, method: str, needs: Collection[str], data: Mapping[str, Data]) -> Inputs:
    """Returns the examples of all roles.

    Args:
        job: What else the run is asked for.
        method: Name of the method, for messages.
        needs: What it reads.
        data: Files or examples by role.

    Raises:
        GradsieveError: A file cannot be read, a role that the method reads is empty, or two roles share examples or ids.
    """
    if not data["pool"]:
        raise InvalidArgument("--pool must name the examples to choose from, got none; pass a JSONL, or `--pool demo`")
    for role, flag in (
        ("target", "--target (examples of the ability you want)"),
        ("anchor", "--anchor (general examples)"),
    ):
        if not data[role] and any(reads_set(need, role) for need in needs):
            raise InvalidArgument(f"{method} needs {flag}, got none; pass a JSONL, or `--{role} demo` for the built-in one")
    inputs = Inputs()
    examples = inputs.examples
    examples |= {role: _read_set(job, inputs, role, value) for role, value in data.items() if value}
    if job.replay:
        _add_replay(inputs, _read_set(job, inputs, "replay", job.replay))
    for role in set(examples) - {"pool"}:
        _refuse_overlap(role, examples[role], "pool", examples["pool"])
    if "target" in examples and "anchor" in examples:
        _refuse_overlap("anchor", examples["anchor"], "target", examples["target"])
    if job.corrupted:
        inputs.corrupted = _copies(inputs, _read_set(job, inputs, "corrupted", job.corrupted))
        if not any(need.startswith("dot/contrast") for need in needs):
            inputs.notes.append(
                f"the wrong copies of --corrupted were not used: {method} as it is set reads no contrast; ogs-static and ogs "
                "read them with --against contrast"
            )
    return inputs


def _read_set(job: Job, inputs: Inputs, role: str, data: Data) -> Sequence[Example]:
    if not isinstance(data, str | Path) and any(isinstance(part, Example) for part in data):
        return _from_memory(role, data)
    files = file_names(data)
    if any(map(is_demo, files)):
        if len(files) > 1:
            raise InvalidArgument(f"--{role} must be `demo` alone or files, got {' '.join(files)}")
        examples = demo_set(role, files[0], job.seed)
        inputs.formats[role] = describe(examples)
        return examples
    dataset = read_examples(files, format=job.format, category_field=job.category_field, category_per_file=role == "anchor")
    inputs.notes += dataset.notes
    inputs.formats[role] = dataset.format
    if not dataset.examples:
        raise InvalidArgument(f"{role} must hold at least one example, got none in {', '.join(files)}")
    if dataset.repeated:
        inputs.notes.append(f"{dataset.repeated} examples of the {role} repeat an earlier one word for word; they were kept")
    return dataset.examples


def _add_replay(inputs: Inputs, replay: Sequence[Example]) -> None:
    pool = inputs.examples["pool"]
    inputs.replayed = frozenset(example.id for example in replay)
    if shared := inputs.replayed & {example.id for example in pool}:
        raise InvalidArgument(f"replay must have ids of its own, got {min(shared)!r}, which the pool has too; rename it")
    inputs.examples["pool"] = [*pool, *replay]


def _copies(inputs: Inputs, corrupted: Sequence[Example]) -> dict[str, Example]:
    ids = [{example.id for example in inputs.examples.get(role, ())} for role in ("anchor", "target")]
    if both := ids[0] & ids[1]:
        raise InvalidArgument(
            f"anchor and target must share no ids where --corrupted names copies by id, got {min(both)!r} in both; rename one"
        )
    copies = {example.id: example for example in corrupted}
    originals = {example.id: example for role in ("anchor", "target") for example in inputs.examples.get(role, ())}
    for id, copy in copies.items():
        if id not in originals:
            raise InvalidArgument(f"corrupted must hold copies of anchor or target examples, got {copy.origin} with id {id!r}")
        if copy.messages == originals[id].messages:
            raise InvalidArgument(f"corrupted must differ from its original, got {copy.origin} with the messages of {id!r}")
    return copies


def _from_memory(role: str, data: Sequence[Any]) -> Sequence[Example]:
    """Returns examples that the caller made, once it is sure that each is one and that ids tell them apart."""
    if not all(isinstance(part, Example) for part in data):
        raise InvalidArgument(f"{role} must be files or examples, not both; write the examples to a file first")
    first: dict[str, Example] = {}
    for example in data:
        if example.id in first:
            there = first[example.id].origin
            raise InvalidArgument(
                f"{role} must have unique ids, got {example.id!r} at {there} and {example.origin}; rename one"
            )
        first[example.id] = example
    return data


def _refuse_overlap(role: str, examples: Sequence[Example], other: str, others: Sequence[Example]) -> None:
    pairs = overlap(examples, others)
    if pairs:
        mine, theirs = pairs[0]
        raise InvalidArgument(
            f"{role} must not share examples with the {other}, got {len(pairs)} shared, the first {mine.origin} and "
            f"{theirs.origin}; remove them from one side"
        )
