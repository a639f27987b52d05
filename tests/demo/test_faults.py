from __future__ import annotations

import random

import pytest

from gradsieve.demo import faults
from gradsieve.demo.offdomain import glosses, python_summaries
from gradsieve.demo.terms import Term
from gradsieve.errors import InvalidArgument


def term(id: str, branch: str) -> Term:
    return Term(id, f"Name {id}", f"name {id}", f"Definition of {id}.", ("p",), frozenset({branch}))


@pytest.mark.parametrize("branches", ["aabb", "abc", "aaabbc", "aabbccdd", "aaaabbcd"])
def test_swapped_definitions_are_a_derangement_that_leaves_every_branch(branches):
    terms = [term(f"{branch}{i}", branch) for i, branch in enumerate(branches)]
    for seed in range(20):
        rows = faults.swapped(terms, random.Random(seed))
        asked = [next(t for t in terms if t.id in question) for question, _ in rows]
        given = [next(t for t in terms if t.definition in answer) for _, answer in rows]
        assert {t.id for t in asked} == {t.id for t in given} == {t.id for t in terms}
        assert all(a.branches != g.branches for a, g in zip(asked, given, strict=True))


def test_a_branch_with_more_than_half_of_the_terms_is_our_own_bug():
    with pytest.raises(AssertionError, match="from its own branch"):
        faults.swapped([term("a1", "a"), term("a2", "a"), term("b", "b")], random.Random(0))


def test_near_duplicates_ask_and_frame_otherwise():
    rows = [faults.sound(term(str(i), "a"), random.Random(i)) for i in range(40)]
    for seed in range(5):
        copies = faults.near_duplicates(rows, 40, random.Random(seed))
        sources = [next(row for row in rows if row.term.definition in answer) for _, answer in copies]
        assert {source.term.id for source in sources} == {str(i) for i in range(40)}
        for (question, answer), source in zip(copies, sources, strict=True):
            assert question != source.question
            assert answer != source.answer


def test_off_domain_rows_are_half_crafts_half_python_and_all_different():
    rows = faults.off_domain(100, random.Random(0))
    assert len({answer for _, answer in rows}) == 100
    assert sum("Python" in question for question, _ in rows) == 50
    words, functions = len(glosses()), len(python_summaries())
    assert len(faults.off_domain(words + functions, random.Random(0))) == words + functions
    with pytest.raises(InvalidArgument, match=f"at most {words + functions}, got {words + functions + 1}"):
        faults.off_domain(words + functions + 1, random.Random(0))
