from __future__ import annotations

import random

from gradsieve.demo.offdomain import glosses, python_question, python_summaries


def test_there_are_several_hundred_distinct_texts():
    words, functions = glosses(), python_summaries()
    assert len({term for term, _ in words}) == len({meaning for _, meaning in words}) == len(words) > 100
    assert len({name for name, _ in functions}) == len({text for _, text in functions}) == len(functions) > 400


def test_every_text_is_one_short_sentence():
    for _, text in glosses() + python_summaries():
        assert text[0].isupper()
        assert text.endswith(".")
        assert 15 < len(text) < 180
        assert text.isascii()


def test_summaries_are_those_of_the_things_they_name():
    found = dict(python_summaries())
    assert found["math.atan"] == "Return the arc tangent (measured in radians) of x."
    assert "ast.auto" not in found, "imported there from enum"
    assert not any(name.endswith(("Error", "Warning")) for name in found)


def test_a_question_names_the_thing():
    assert all("json.dumps" in python_question("json.dumps", random.Random(i)) for i in range(20))
