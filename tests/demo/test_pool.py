from __future__ import annotations

import json
import logging
import os
import re
import subprocess
import sys
from collections import Counter
from statistics import median

import pytest

from gradsieve.data import read_examples, write_jsonl
from gradsieve.demo import pool as module
from gradsieve.demo.faults import SHARES
from gradsieve.demo.pool import demo_anchor, demo_general, demo_pool, demo_set, demo_target, demo_test, describe, is_demo
from gradsieve.demo.terms import Term, read_terms
from gradsieve.demo.wording import QUESTIONS
from gradsieve.errors import InvalidArgument, MissingExtra
from gradsieve.types import Example


@pytest.fixture(scope="module")
def pool() -> list[Example]:
    return demo_pool()


@pytest.fixture(scope="module")
def asked() -> dict[str, Term]:
    """Every question that can be asked about a term, with the term."""
    terms = read_terms()
    return {wording.format(x=term.inline, X=term.name): term for term in terms for wording in QUESTIONS}


def planted(example: Example) -> str:
    return json.loads(example.raw)["planted"]


def turn(example: Example, place: int) -> str:
    return example.messages[place]["content"]


def words(text: str) -> set[str]:
    return set(re.findall(r"\w+", text.lower()))


def test_a_pool_has_the_rows_asked_for_and_thirty_percent_faults(pool):
    assert sum(SHARES.values()) == pytest.approx(0.3)
    assert Counter(map(planted, pool)) == {
        "clean": 280,
        "swapped": 32,
        "off-domain": 28,
        "near-duplicate": 28,
        "false-arithmetic": 32,
    }
    for n in (40, 57):
        kinds = Counter(map(planted, demo_pool(n, seed=3)))
        assert sum(kinds.values()) == n
        assert min(kinds.values()) >= 3


def test_ids_and_places_say_nothing_about_faults(pool):
    assert [e.id for e in pool] == [f"pool-{i:04d}" for i in range(400)]
    assert all(e.category is None for e in pool)
    for part in (pool[:100], pool[-100:]):
        assert len(set(map(planted, part))) == 5
        assert 15 <= sum(planted(e) != "clean" for e in part) <= 45


def test_raw_is_the_example_and_its_label_on_one_line(pool):
    for example in pool + demo_target() + demo_anchor(knowledge="facts"):
        line = json.loads(example.raw)
        assert b"\n" not in example.raw
        assert line["id"] == example.id
        assert line["messages"] == list(example.messages)
        assert [m["role"] for m in line["messages"]] == ["user", "assistant"]
        assert set(line) - {"id", "messages"} in ({"planted"}, set(), {"category", "source"})


def test_sound_rows_define_the_term_they_are_asked_for(pool, asked):
    seen = set()
    for example in pool:
        if planted(example) == "clean":
            term = asked[turn(example, 0)]
            assert turn(example, 1).endswith(term.definition)
            assert term.id not in seen
            seen.add(term.id)
    assert len({wording for example in pool for wording in QUESTIONS if turn(example, 0).startswith(wording[:9])}) >= 12


def test_swapped_rows_define_a_term_of_another_branch(pool, asked):
    for example in pool:
        if planted(example) == "swapped":
            term = asked[turn(example, 0)]
            (giver,) = [t for t in asked.values() if turn(example, 1).endswith(t.definition)][:1]
            assert term.branches.isdisjoint(giver.branches)


def test_no_branch_gives_more_than_half_of_the_swapped_terms():
    terms = [Term(str(i), "", "", "", ("p",), frozenset("a" if i > 5 else f"{i}")) for i in range(40)]
    chosen = module._to_swap([*terms, Term("two", "", "", "", ("p",), frozenset("ab"))], 7)
    assert len(chosen) == 7
    assert Counter(len(t.branches) for t in chosen) == {1: 7}
    assert sum(t.branches == {"a"} for t in chosen) == 3


def test_near_duplicates_repeat_one_sound_row_in_other_words_and_sound_rows_repeat_none(pool, asked):
    clean = {asked[turn(e, 0)].id: e for e in pool if planted(e) == "clean"}
    copies = [e for e in pool if planted(e) == "near-duplicate"]
    for copy in copies:
        original = clean[asked[turn(copy, 0)].id]
        assert turn(copy, 0) != turn(original, 0)
        assert turn(copy, 1) != turn(original, 1)
        definition = words(asked[turn(copy, 0)].definition)
        assert len(definition & words(turn(copy, 1))) >= len(definition) - 4
    assert len({asked[turn(c, 0)].id for c in copies}) == len(copies)
    definitions = [words(asked[turn(e, 0)].definition) for e in clean.values()]
    closest = max(len(a & b) / len(a | b) for i, a in enumerate(definitions) for b in definitions[:i])
    assert closest < 0.6


def test_arithmetic_is_false_in_the_pool_and_true_in_the_anchor(pool):
    def steps(example: Example) -> list[bool]:
        found = re.findall(r"(\d+) ([-+*/]) (\d+) = (\d+)", turn(example, 1))
        results = {"+": lambda a, b: a + b, "-": lambda a, b: a - b, "*": lambda a, b: a * b, "/": lambda a, b: a / b}
        return [results[o](int(a), int(b)) == int(r) for a, o, b, r in found]

    false = [steps(e) for e in pool if planted(e) == "false-arithmetic"]
    true = [steps(e) for e in demo_anchor(knowledge="facts") if e.category == "arithmetic"]
    assert all(len(s) >= 2 and not any(s) for s in false)
    assert all(len(s) >= 2 and all(s) for s in true)
    assert all(not steps(e) for e in pool if planted(e) != "false-arithmetic")


@pytest.mark.parametrize("seed", [0, 7])
def test_no_term_of_the_pool_shares_a_parent_with_the_target_or_the_test(seed, asked):
    rows = demo_pool(400, seed)
    terms = {t.id: t for e in rows for t in [asked.get(turn(e, 0))] if t}
    held = [[asked[turn(e, 0)] for e in part] for part in (demo_target(seed), demo_test(seed))]
    parts = [list(terms.values()), *held]
    assert len(terms) == 280 + 32
    for i, one in enumerate(parts):
        for other in parts[i + 1 :]:
            assert {p for t in one for p in t.parents}.isdisjoint(p for t in other for p in t.parents)
            for a in one:
                near = max(
                    len(words(a.definition) & words(b.definition)) / len(words(a.definition) | words(b.definition))
                    for b in other
                )
                assert near < 0.6


def test_the_target_spans_many_branches_and_parents_and_is_sound(asked):
    target = demo_target()
    terms = [asked[turn(e, 0)] for e in target]
    assert len(target) == 48
    assert all(turn(e, 1).endswith(t.definition) for e, t in zip(target, terms, strict=True))
    assert len({t.parents[0] for t in terms}) == 48
    assert len({b for t in terms for b in t.branches}) >= 10
    assert len(demo_target(size=5)) == 5


def test_texts_are_short(pool):
    def length(example: Example) -> int:  # word pieces are about 4.3 characters here
        return sum(len(m["content"]) for m in example.messages)

    assert 25 * 4 <= median(map(length, pool)) <= 40 * 4.3
    assert max(map(length, pool)) < 340


def test_the_same_seed_gives_the_same_bytes_and_another_seed_others(pool):
    assert [e.raw for e in demo_pool()] == [e.raw for e in pool]
    for make in (lambda s: demo_pool(60, s), demo_target, demo_test, lambda s: demo_anchor(s, "facts")):
        assert make(1) == make(1)
        assert make(1) != make(2)


def test_another_process_with_another_hash_seed_makes_the_same_bytes(pool):
    made = "b''.join(e.raw for e in demo_pool() + demo_test())"
    code = f"import sys; from gradsieve.demo.pool import *; sys.stdout.buffer.write({made})"
    environment = {**os.environ, "PYTHONHASHSEED": "1" if os.environ.get("PYTHONHASHSEED") != "1" else "2"}
    there = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, check=True).stdout
    assert there == b"".join(e.raw for e in pool + demo_test())


def test_the_anchor_has_sixty_problems_and_sixty_facts_and_says_where_they_are_from(caplog, monkeypatch):
    monkeypatch.setattr(module, "mmlu_facts", lambda: None)
    with caplog.at_level(logging.INFO, logger="gradsieve"):
        anchor = demo_anchor()
    assert "60 facts of our own, because lm-eval with MMLU's examples is not installed" in caplog.text
    assert Counter((e.category, json.loads(e.raw)["source"]) for e in anchor) == {
        ("arithmetic", "word problem"): 60,
        ("knowledge", "facts"): 60,
    }
    assert len({turn(e, 0) for e in anchor}) == 120
    with pytest.raises(MissingExtra, match="pip install lm-eval"):
        demo_anchor(knowledge="mmlu")


def test_the_anchor_takes_mmlu_where_there_is_one(monkeypatch):
    made = [module.facts()[i % 60] for i in range(80)]
    monkeypatch.setattr(module, "mmlu_facts", lambda: made[:30])
    assert Counter(e.category for e in demo_anchor()) == {"arithmetic": 60, "knowledge": 30}
    monkeypatch.setattr(module, "mmlu_facts", lambda: made)
    assert Counter(e.category for e in demo_anchor(knowledge="mmlu")) == {"arithmetic": 60, "knowledge": 60}


def test_sizes_out_of_range_are_refused(monkeypatch):
    with pytest.raises(InvalidArgument, match="examples must be at least 40"):
        demo_pool(39)
    with pytest.raises(InvalidArgument, match=r"size of the demo's target must lie in \[1, \d+\] \(its terms\), got 100000"):
        demo_target(size=100000)
    with pytest.raises(InvalidArgument, match=r"size of the demo's test must lie in \[1, "):
        demo_test(size=0)
    few = read_terms()[:1000]
    monkeypatch.setattr(module, "_terms", lambda: few)
    with pytest.raises(InvalidArgument, match=r"examples must be at most (\d+) \(the terms there are\), got 2000") as error:
        demo_pool(2000)
    most = int(re.search(r"most (\d+)", str(error.value)).group(1))
    assert len(demo_pool(most)) == most
    with pytest.raises(InvalidArgument, match=f"at most {most} "):
        demo_pool(most + 1)


def test_a_set_is_found_by_its_role(pool):
    assert demo_set("pool") == pool
    assert demo_set("pool", "demo:50", 3) == demo_pool(50, 3)
    assert (demo_set("target"), demo_set("target", "demo:5", 3)) == (demo_target(), demo_target(3, 5))
    assert demo_set("anchor", seed=3) == demo_anchor(3)
    with pytest.raises(InvalidArgument, match="without a size, got demo:7"):
        demo_set("anchor", "demo:7")


def test_written_and_read_again_the_examples_are_the_same(tmp_path, pool):
    for examples in (pool, demo_target(), demo_anchor(knowledge="facts")):
        write_jsonl(tmp_path / "examples.jsonl", examples)
        again = read_examples(tmp_path / "examples.jsonl").examples
        assert [(e.id, e.messages, e.raw, e.category) for e in again] == [
            (e.id, e.messages, e.raw, e.category) for e in examples
        ]


def test_a_built_in_set_says_what_it_is_made_of() -> None:
    assert describe(demo_anchor(0, "facts")) == "the built-in set (60 word problem, 60 facts)"
    assert describe(demo_target(0)) == "the built-in set"


def test_general_tests_share_nothing_with_the_anchor():
    asked = {turn(example, 0) for example in demo_anchor()}
    for ability in ("arithmetic", "knowledge"):
        test = demo_general(ability, size=30)
        assert len(test) == 30
        assert not asked & {turn(example, 0) for example in test}
        assert {example.category for example in test} == {ability}
        assert test == demo_general(ability, size=30)
    with pytest.raises(InvalidArgument, match=r"size of the demo's arithmetic test must lie in \[1, \d+\], got 500"):
        demo_general("arithmetic", size=500)


def test_a_set_that_the_demo_has_not_is_refused() -> None:
    assert [is_demo(name) for name in ("demo", "demo:40", "demo:x", "demo.jsonl", "my/demo")] == [
        True,
        True,
        True,
        False,
        False,
    ]
    with pytest.raises(InvalidArgument, match="pool must be demo, demo:SIZE or files, got 'demo:many'"):
        demo_set("pool", "demo:many")
    with pytest.raises(InvalidArgument, match="--replay must name files, got demo"):
        demo_set("replay")
