"""Words and matches of texts, against BM25 written out."""

from __future__ import annotations

import math
import sys

import pytest
import torch

from gradsieve.data.texts import bm25_scores, embeddings, text_of, words
from gradsieve.errors import InvalidArgument, MissingExtra
from gradsieve.types import Example


def example(id, *turns):
    messages = tuple({"role": role, "content": text} for role, text in zip(("user", "assistant") * 3, turns, strict=False))
    return Example(id, messages, b"", f"x:{id}")


def bm25_naive(pool, targets, k1=1.5, b=0.75):
    """Σ over the query's words of idf · tf / (tf + k1 (1 - b + b length/mean length)), over the best, averaged over queries."""
    documents = [words(text_of(z)) for z in pool]
    mean = sum(map(len, documents)) / len(documents)
    total = [0.0] * len(pool)
    for v in targets:
        own = []
        for document in documents:
            score = 0.0
            for word in words(text_of(v)):
                found = sum(word in d for d in documents)
                idf = math.log(1 + (len(documents) - found + 0.5) / (found + 0.5)) if found else 0.0
                tf = document.count(word)
                score += idf * tf / (tf + k1 * (1 - b + b * len(document) / mean))
            own.append(score)
        total = [t + (x / max(own) if max(own) > 0 else 0.0) for t, x in zip(total, own, strict=True)]
    return [t / len(targets) for t in total]


def test_scores_are_those_of_bm25_written_out():
    pool = [
        example(str(i), text, "yes") for i, text in enumerate(["fever and rash", "a rash, a RASH", "cats", "fever", "yes no"])
    ]
    targets = [example("t", "rash of fever", "yes"), example("u", "dogs", "never seen")]
    scores = bm25_scores(pool, targets)
    assert scores.dtype == torch.float64
    assert scores.tolist() == pytest.approx(bm25_naive(pool, targets), rel=1e-5)
    assert scores.max() <= 1


def test_a_target_that_matches_nothing_counts_as_a_zero():
    pool = [example("a", "fever", "yes"), example("b", "cats", "no")]
    one, two = (bm25_scores(pool, [example("t", "fever", "x"), example("u", "qqq", "zzz")][:m]) for m in (1, 2))
    assert one.tolist() == pytest.approx([1, 0])
    assert two.tolist() == pytest.approx([0.5, 0])


def test_a_pool_without_words_is_refused():
    with pytest.raises(InvalidArgument, match="bm25 needs words in the pool, got none"):
        bm25_scores([example("a", "!!", "??")], [example("t", "fever", "x")])


def test_words_are_folded_and_texts_hold_every_turn_without_roles():
    assert words("Ｆever, FEVER_rash! straße") == ["fever", "fever", "rash", "strasse"]
    assert words("发烧 2天") == ["发", "烧", "2", "天"]
    assert text_of(example("a", "one", "two", "three")) == "one\ntwo\nthree"


def test_a_package_that_is_missing_is_named_with_its_cure(monkeypatch):
    monkeypatch.setitem(sys.modules, "bm25s", None)
    monkeypatch.setitem(sys.modules, "sentence_transformers", None)
    with pytest.raises(MissingExtra, match=r"needs the package bm25s; pip install 'gradsieve\[text\]'"):
        bm25_scores([example("a", "x", "y")], [example("t", "x", "y")])
    with pytest.raises(MissingExtra, match="needs the package sentence-transformers; pip install"):
        embeddings([example("a", "x", "y")], "model", "cpu")
