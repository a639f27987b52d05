"""What a comparison reads: limits that depend on texts alone, built-in sets, tokens told apart."""

import dataclasses
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from gradsieve.compare.config import Config, TestFiles, parse_config
from gradsieve.compare.material import Material, read_test, tokens_digest
from gradsieve.data import content_hash
from gradsieve.errors import DataError, InvalidArgument


def test_a_limit_takes_the_smallest_hashes_in_the_order_of_the_file(config: Config) -> None:
    test = config.tests["asked"]
    every = read_test(config, "asked", dataclasses.replace(test, limit=None), [])
    some = read_test(config, "asked", dataclasses.replace(test, limit=5), [])
    assert {content_hash(e) for e in some} == set(sorted(content_hash(e) for e in every)[:5])
    assert [e.id for e in some] == [e.id for e in every if e in some]
    assert read_test(config, "asked", dataclasses.replace(test, limit=99), []) == every


def test_built_in_sets_have_the_sizes_asked_for(content: dict[str, Any]) -> None:
    tests = {
        "medicine": {"role": "target", "files": "demo:medicine", "limit": 10},
        "arithmetic": {"role": "general", "files": "demo:arithmetic"},
        "knowledge": {"role": "general", "files": "demo:knowledge"},
    }
    content |= {"pool": "demo:50", "target": "demo:12", "anchor": "demo:9", "tests": tests}
    material = Material.read(parse_config(content, "x.yaml"))
    sides = material.sides(0)
    assert (len(sides.pool), len(sides.target)) == (50, 12)
    assert sorted(Counter(e.category for e in sides.anchor).values()) == [4, 5]
    assert [(test.name, len(test.examples)) for test in material.tests] == [
        ("medicine", 10), ("arithmetic", 40), ("knowledge", 40),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"anchor": "demo:1"}, r"the demo's anchor must have 2 to \d+ examples, got demo:1"),
        ({"anchor": "demo:x"}, r"anchor must be demo, demo:SIZE or files, got 'demo:x'"),
        ({"pool": ["demo", "more.jsonl"]}, r"x\.yaml: pool must be one `demo` set or files, got demo more\.jsonl"),
        ({"chat_template": "nowhere.jinja"}, r"chat_template must be a readable Jinja file, got nowhere\.jinja"),
    ],
)
def test_what_cannot_be_read_is_named(content: dict[str, Any], change: dict[str, Any], message: str) -> None:
    with pytest.raises((DataError, InvalidArgument), match=message):
        Material.read(parse_config(content | change, "x.yaml"))


def test_items_that_were_cut_are_noted(content: dict[str, Any]) -> None:
    whole = Material.read(parse_config(content, "x.yaml"))
    assert not any("were cut" in note for note in whole.notes)
    most = sorted(len(tokens.input_ids) for tokens in whole.tests[0].tokens)[4]
    notes = Material.read(parse_config(content | {"max_length": most}, "x.yaml")).notes
    [note] = [note for note in notes if "items of asked" in note]
    assert re.match(rf"[23] of 8 items of asked are longer than {most} tokens and were cut at the end", note)


def test_what_the_reader_says_of_files_is_noted(content: dict[str, Any]) -> None:
    for name in ("pool", "anchor"):
        path = Path(content[name])
        lines = path.read_text().splitlines()
        path.write_text("\n".join([lines[0], "", *lines[1:]]) + "\n")
    notes = Material.read(parse_config(content, "x.yaml")).notes
    assert [sum("blank" in note and f"{name}.jsonl" in note for note in notes) for name in ("pool", "anchor")] == [1, 1]


def test_anchors_of_a_file_each_are_categories(content: dict[str, Any]) -> None:
    path = Path(content["anchor"])
    rows = [line.replace('"category": "arithmetic"', '"topic": "sums"') for line in path.read_text().splitlines()]
    files = [path.with_name(f"{name}.jsonl") for name in ("left", "right")]
    for file, part in zip(files, (rows[:5], rows[5:]), strict=True):
        file.write_text("\n".join(part) + "\n")
    sides = Material.read(parse_config(content | {"anchor": [str(file) for file in files]}, "x.yaml")).sides(0)
    assert Counter(e.category for e in sides.anchor) == {"left": 5, "right": 3}


def test_an_unknown_built_in_test_is_named(content: dict[str, Any]) -> None:
    config = parse_config(content, "x.yaml")
    with pytest.raises(InvalidArgument, match=r"tests\.law must be one of demo:medicine, .* or files, got 'demo:law'"):
        read_test(config, "law", TestFiles("target", ("demo:law",)), [])


def test_digests_tell_tokens_labels_and_order_apart(config: Config) -> None:
    tokens = Material.read(config).trainable(0).pool.tokens
    assert tokens_digest(tokens) == tokens_digest(list(tokens))
    assert tokens_digest(tokens) != tokens_digest(tokens[::-1])
    relabelled = dataclasses.replace(tokens[0], labels=tokens[0].input_ids)
    assert tokens_digest([relabelled]) != tokens_digest(tokens[:1])
