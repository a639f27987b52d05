from __future__ import annotations

import random
import re

from gradsieve.demo.wording import ANSWERS, GENERAL, QUESTIONS, SYNONYMS, ask, frame, reword


def test_there_are_a_dozen_wordings_and_each_names_the_term_once():
    assert len(set(QUESTIONS)) >= 12
    assert all(q.count("{x}") + q.count("{X}") == 1 for q in QUESTIONS)
    assert all(a.count("{D}") == 1 for a in ANSWERS)


def test_another_wording_is_never_the_one_named_and_all_others_come():
    rng = random.Random(0)
    for number in range(len(QUESTIONS)):
        drawn = {ask("x", "X", rng, other_than=number)[1] for _ in range(400)}
        assert drawn == set(range(len(QUESTIONS))) - {number}
    for number in range(len(ANSWERS)):
        assert {frame("X", "D.", rng, other_than=number)[1] for _ in range(100)} == set(range(len(ANSWERS))) - {number}


def test_wordings_for_any_field_are_not_medical():
    drawn = {ask("felt", "Felt", random.Random(i), general=True) for i in range(200)}
    assert {number for _, number in drawn} == set(range(GENERAL))
    assert not any(re.search("clinic|patient|medic|finding", question) for question, _ in drawn)


def test_rewording_replaces_at_most_two_words_and_keeps_grammar_and_case():
    reworded = {reword("An abnormal reduction of the tibia.", random.Random(i)) for i in range(40)}
    assert reworded == {"An anomalous decrease of the tibia."}
    assert reword("An elevated level.", random.Random(0)) == "A raised level."
    assert reword("A reduced level.", random.Random(0)) == "A lowered level."
    assert reword("Absent tibia.", random.Random(0)) == "Missing tibia."
    assert reword("Nothing fits here.", random.Random(0)) == "Nothing fits here."
    text = "Multiple absent, elevated and enlarged parts, located in a unique European one-sided place."
    for i in range(20):
        changed = set(re.findall(r"\w+", text)) - set(re.findall(r"\w+", reword(text, random.Random(i))))
        assert 1 <= len(changed) <= 2
        assert "a unique European one" in reword(text, random.Random(i))


def test_no_synonym_is_the_word_itself():
    assert all(word != other for word, other in SYNONYMS)
