"""Duplicates against all pairs, by hand, and on the demo's planted ones."""

from __future__ import annotations

import math
import random
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gradsieve.data.dedup import THRESHOLD, banding, find_duplicates, rarity, shingles
from gradsieve.errors import InvalidArgument, MissingExtra
from gradsieve.types import Example


def example(id, text, answer="Yes."):
    messages = ({"role": "user", "content": text}, {"role": "assistant", "content": answer})
    return Example(id, messages, b"", f"x:{id}")


def likeness_naive(pool):
    """Jaccard indices of all pairs, a shingle in s of n texts weighing round(log2(1 + n/s))."""
    sets = [set(shingles(f"{e.messages[0]['content']}\n{e.messages[1]['content']}").tolist()) for e in pool]
    weight = {x: round(math.log2(1 + len(sets) / sum(x in s for s in sets))) for x in set.union(*sets)}
    return [[sum(weight[x] for x in a & b) / sum(weight[x] for x in a | b) for b in sets] for a in sets]


def dedup_naive(examples, threshold):
    """Goes through the pool by id and drops what is like any that stays; the most like one, then the smaller id, is named."""
    first = {}
    for i in sorted(range(len(examples)), key=lambda i: examples[i].id):
        first.setdefault(str(examples[i].messages), i)
    copies = {i: first[str(e.messages)] for i, e in enumerate(examples) if first[str(e.messages)] != i}
    pool = [i for i in sorted(range(len(examples)), key=lambda i: examples[i].id) if i not in copies]
    likeness = likeness_naive([examples[i] for i in pool])
    stays, gone = [], {}
    for a, i in enumerate(pool):
        like = [b for b in stays if likeness[a][b] >= threshold]
        if like:
            gone[i] = pool[min(like, key=lambda b: (-likeness[a][b], examples[pool[b]].id))]
        else:
            stays.append(a)
    return gone | {i: gone.get(of, of) for i, of in copies.items()}


def found(examples, how, threshold=THRESHOLD):
    return {d.position: d.of for d in find_duplicates(examples, how, threshold)}


def test_the_same_text_goes_and_the_smallest_id_stays():
    pool = [example("c", "one"), example("a", "two"), example("b", "one"), example("d", "One"), example("e", "one", "No.")]
    assert found(pool, "exact") == {0: 2}
    assert found(pool, "off") == {}
    assert find_duplicates(pool, "exact", 0.7)[0].reason(pool) == "copy of b"


@pytest.mark.parametrize("how", ["exact", "near"])
def test_other_calls_of_tools_are_no_copies(how):
    def asked(id, city):
        call = {"type": "function", "function": {"name": "weather", "arguments": {"city": city}}}
        turns = ({"role": "user", "content": "How is it there?"}, {"role": "assistant", "content": None, "tool_calls": [call]})
        return Example(id, turns, b"{}", "memory")

    pool = [asked("a", "Rome, the eternal one"), asked("b", "Oslo by the fjord"), asked("c", "Rome, the eternal one")]
    assert [(found.position, found.of) for found in find_duplicates(pool, how, 0.9)] == [(2, 0)]


def test_case_punctuation_and_spacing_do_not_hide_a_near_duplicate():
    pool = [example("a", "What is a fever, in medicine?"), example("b", "what is a  FEVER in medicine"), example("c", "dogs")]
    assert found(pool, "exact") == {}
    assert found(pool, "near", 1.0) == {1: 0}
    assert find_duplicates(pool, "near", 0.9)[0].reason(pool) == "near-duplicate of a"


def test_roles_and_the_borders_of_turns_count_for_the_same_text():
    one = Example("a", ({"role": "user", "content": "ab"}, {"role": "assistant", "content": "c"}), b"", "x")
    other = Example("b", ({"role": "user", "content": "a"}, {"role": "assistant", "content": "bc"}), b"", "x")
    assert found([one, other], "exact") == {}


def test_a_chain_of_likeness_does_not_run_off_and_a_copy_follows_the_one_it_repeats():
    a, b, c = "abcdefghijklmnop", "abcdefghijklmnopqrst", "abcdefghijklmnopqrstuvwx"
    likeness = likeness_naive([example("1", a), example("2", b), example("3", c)])
    ab, bc, ac = likeness[0][1], likeness[1][2], likeness[0][2]
    assert ac < min(ab, bc)
    between = (ac + min(ab, bc)) / 2
    pool = [example("1", a), example("2", b), example("3", c), example("4", b)]
    assert found(pool, "near", between) == {1: 0, 3: 0}  # 3 is like 2 and not like 1, which stays


def test_a_rewording_is_more_like_than_another_fact_in_the_same_template():
    rng = random.Random(0)
    names = ["".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=24)) for _ in range(60)]
    pool = [
        example(f"{i:02d}", f"Which of the treatments for adults are known to help against {name} today?", f"See {name}.")
        for i, name in enumerate(names)
    ]
    pool.append(example("60", f"Tell me how {names[7]} is treated.", f"Look up {names[7]}."))
    plain = [set(shingles(f"{e.messages[0]['content']}\n{e.messages[1]['content']}").tolist()) for e in pool]
    unweighted = [len(plain[7] & p) / len(plain[7] | p) for p in plain]
    assert unweighted[60] < max(unweighted[:7])
    assert found(pool, "near", 0.27) == {60: 7}


def test_what_all_texts_have_weighs_one_and_what_one_has_weighs_most():
    texts, weight = rarity([np.array([5, i], dtype=np.uint64) for i in range(10, 17)])
    assert [text.tolist() for text in texts] == [[0, i] for i in range(1, 8)]
    assert weight.tolist() == [1] + [3] * 7  # log2(1 + 7/7), log2(1 + 7/1)


words = st.lists(st.sampled_from(["fever", "rash", "cats", "heart", "lungs", "a", "b", "of the"]), min_size=1, max_size=8)


@settings(max_examples=60, deadline=None)
@given(st.lists(words, min_size=1, max_size=12), st.sampled_from([0.3, 0.5, 0.7, 0.9, 1.0]), st.randoms())
def test_what_goes_is_what_all_pairs_say(texts, threshold, shuffled):
    names = [f"{i:02d}" for i in range(len(texts))]
    shuffled.shuffle(names)
    pool = [example(name, " ".join(text)) for name, text in zip(names, texts, strict=True)]
    assert found(pool, "near", threshold) == dedup_naive(pool, threshold)


def test_the_order_of_the_pool_does_not_matter():
    pool = [example(f"{i:03d}", f"word{i % 7} and number {i % 3}") for i in range(60)]
    forth, back = find_duplicates(pool, "near", 0.6), find_duplicates(pool[::-1], "near", 0.6)
    assert {(pool[d.position].id, pool[d.of].id) for d in forth} == {
        (pool[::-1][d.position].id, pool[::-1][d.of].id) for d in back
    }


@pytest.mark.parametrize("threshold", [0.3, 0.5, 0.7, 0.8, 0.95, 1.0])
def test_examples_at_the_threshold_are_compared_almost_surely(threshold):
    bands, rows = banding(threshold)
    assert bands * rows <= 128
    assert 1 - (1 - threshold**rows) ** bands >= 0.999
    assert rows == 64 or 1 - (1 - threshold ** (rows + 1)) ** (128 // (rows + 1)) < 0.999


def test_shingles_are_runs_of_letters_each_once():
    assert len(shingles("aaaaaaa")) == 1
    assert len(shingles("ab")) == 1
    assert len(shingles("abcdef")) == 3
    assert np.array_equal(shingles("AB, cd-ef"), shingles("ab cd ef"))


def test_settings_that_break_a_rule_and_a_missing_package_are_named(monkeypatch):
    with pytest.raises(InvalidArgument, match=r"dedup_threshold must lie in \(0, 1\], got 0"):
        find_duplicates([], "near", 0)
    with pytest.raises(InvalidArgument, match="dedup must be one of off, exact, near, got 'fuzzy'"):
        find_duplicates([], "fuzzy", 0.5)
    monkeypatch.setitem(sys.modules, "datasketch", None)
    with pytest.raises(MissingExtra, match=r"pip install 'gradsieve\[text\]'"):
        find_duplicates([example("a", "x")], "near", 0.7)


@pytest.mark.demo
@pytest.mark.parametrize("seed", range(3))
def test_nearly_all_of_the_demos_planted_near_duplicates_are_found_and_no_sound_row_goes(seed):
    from gradsieve.data import row_fields
    from gradsieve.demo import demo_set

    pool = demo_set("pool", "demo:400", seed)
    kinds = [row_fields(e).get("planted") for e in pool]
    assert kinds.count("near-duplicate") == 28
    pairs = [{kinds[d.position], kinds[d.of]} for d in find_duplicates(pool, "near", THRESHOLD)]
    assert 26 <= sum("near-duplicate" in pair for pair in pairs) <= 28  # of each pair the smaller id stays
    others = [pair for pair in pairs if "near-duplicate" not in pair]
    assert all(pair == {"false-arithmetic"} for pair in others)  # one template, other numbers: no sound row goes
    assert len(others) <= 7
    careful = [{kinds[d.position], kinds[d.of]} for d in find_duplicates(pool, "near", 0.7)]
    assert 5 <= sum("near-duplicate" in pair for pair in careful) == len(careful) <= 11
