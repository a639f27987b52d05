from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest

from gradsieve.demo.general import Fact, facts, mmlu_facts
from gradsieve.demo.offdomain import glosses
from gradsieve.errors import DataError

PHILOSOPHY = """
dataset_name: philosophy
fewshot_config:
  sampler: first_n
  samples:
  - question: 'What did Plato write?


      (A) The Republic (B) Ulysses (C) Emma (D) Faust'
    target: Let's think step by step. We refer to Wikipedia articles on philosophy
      for help. Plato wrote The Republic. The answer is (A).
  - question: "Who taught Plato?\\n(A) Kant (B) Socrates (C) Hume (D) Marx"
    target: Let's think step by step. We refer to Wikipedia for help. It was Socrates. The answer is (B).
  - question: "LONG (A) x (B) y (C) z (D) w"
    target: It is so. The answer is (B).
"""


@pytest.fixture
def lm_eval(monkeypatch, tmp_path) -> Path:
    """An installed lm-eval, as far as files go; importing it fails."""
    folder = tmp_path / "lm_eval" / "tasks" / "mmlu" / "flan_cot_fewshot"
    folder.mkdir(parents=True)
    (tmp_path / "lm_eval" / "__init__.py").write_text("raise AssertionError('lm_eval must not be imported')")
    (folder / "_template_yaml").write_text("doc_to_target: !function x.y")
    (folder / "mmlu_philosophy.yaml").write_text(PHILOSOPHY.replace("LONG", "word " * 80), encoding="utf-8")
    (folder / "mmlu_college_medicine.yaml").write_text(PHILOSOPHY, encoding="utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "lm_eval", raising=False)
    return folder


def test_sixty_short_facts_of_our_own_overlap_with_no_planted_text():
    ours = facts()
    assert len({fact.question for fact in ours}) == len(ours) == 60
    assert all(fact.question.endswith("?") and fact.answer.endswith(".") and fact.source == "facts" for fact in ours)
    assert max(len(fact.question) + len(fact.answer) for fact in ours) < 200
    assert not {fact.answer for fact in ours} & {meaning for _, meaning in glosses()}


def test_short_general_mmlu_examples_are_read_without_their_stock_phrases(lm_eval):
    assert mmlu_facts() == [
        Fact(
            "What did Plato write?\n(A) The Republic (B) Ulysses (C) Emma (D) Faust",
            "Plato wrote The Republic. The answer is (A).",
            "mmlu:philosophy",
        ),
        Fact(
            "Who taught Plato?\n(A) Kant (B) Socrates (C) Hume (D) Marx",
            "It was Socrates. The answer is (B).",
            "mmlu:philosophy",
        ),
    ]


def test_without_lm_eval_there_are_none(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert mmlu_facts() is None


def test_an_lm_eval_of_another_form_is_an_error(lm_eval):
    (lm_eval / "mmlu_philosophy.yaml").write_text("fewshot_config: {samples: [{question: only}]}")
    with pytest.raises(
        DataError, match=r"mmlu_philosophy\.yaml: must hold fewshot_config\.samples .* got KeyError\('target'\)"
    ):
        mmlu_facts()
    (lm_eval / "mmlu_philosophy.yaml").unlink()
    with pytest.raises(DataError, match="flan_cot_fewshot: must hold MMLU's worked examples, got none"):
        mmlu_facts()
