"""Leaks against pairs compared one by one, and what is done about them."""

import re
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gradsieve.compare.leaks import SHORTEST, find_leaks, refuse, triples, without_leaks
from gradsieve.errors import InvalidArgument
from gradsieve.types import Example


def example(id: str, prompt: str, answer: str) -> Example:
    turns = ({"role": "user", "content": prompt}, {"role": "assistant", "content": answer})
    return Example(id, turns, b"{}", f"file:{id}")


def jaccard(a: str, b: str) -> float:
    def runs(text: str) -> set[tuple[str, ...]]:
        words = re.findall(r"[^\W_]+", text.lower())
        return {tuple(words[i : i + 3]) for i in range(len(words) - 2)} or {tuple(words)}

    return len(runs(a) & runs(b)) / len(runs(a) | runs(b))


TEXT = "the liver makes bile which breaks down fats in the small bowel and is kept in the gall bladder until a meal"
POOL = [
    example("same", "What is bile?", "A fluid of the liver."),
    example("near", "What does the liver make, and where is it kept?", TEXT),
    example("asked otherwise", "Tell me of gall.", TEXT + " comes"),
    example("short answer", "Which colour has it?", "It is green."),
    example("free", "What is a kidney?", "An organ that cleans the blood."),
]
TEST = [
    example("t1", "What is bile?", "A fluid of the liver."),
    example("t2", "What does the liver make and where is it kept?", TEXT + "."),
    example("t3", "Is moss green or red, and why?", "It is green."),
]


def test_the_three_kinds_are_told_apart_and_the_likest_partner_named() -> None:
    found = find_leaks({"pool": POOL, "test medicine": TEST}, ["test medicine"], 0.8)
    assert [(leak.kind, leak.id, leak.other_id) for leak in found] == [
        ("same", "same", "t1"),
        ("near", "near", "t2"),
        ("answer", "asked otherwise", "t2"),
    ]
    assert found[1].similarity == 1.0
    assert found[2].similarity == pytest.approx(jaccard(TEXT + " comes", TEXT))


def test_a_question_answered_otherwise_is_a_leak_unless_it_is_a_form() -> None:
    asked, other = example("p", "What is bile, then?", "Something the liver makes."), example("q", "Is bile?", "Yes.")
    test = [example("t", "what is BILE — then", "A fluid."), example("u", "Is bile?", "No.")]
    (found,) = find_leaks({"pool": [asked, other], "test": test}, ["test"], 0.8)
    assert (found.kind, found.id, found.other_id, found.similarity) == ("prompt", "p", "t", 1.0)
    assert str(found) == "pool file:p (p): its prompt is the same as test file:t (t)"
    form = [*test, example("v", "What is bile, then?", "Green.")]  # so begin two of them
    assert find_leaks({"pool": [asked], "test": form}, ["test"], 0.8) == []


def test_case_compatibility_forms_and_what_a_script_without_spaces_writes_do_not_hide_a_leak() -> None:
    pool = [
        example("p", "Ｗhat Ｉs this？", TEXT.upper()),
        example("q", "肝臓は何を作りますか", "肝臓は胆汁を作り胆嚢に蓄えます。食事のあと出ます"),
    ]
    test = [example("t", "what is that", TEXT), example("u", "別の質問", "肝臓は胆汁を作り,胆嚢に蓄えます 食事のあと出ます")]
    found = find_leaks({"pool": pool, "test": test}, ["test"], 0.8)
    assert [(leak.id, leak.other_id) for leak in found] == [("p", "t"), ("q", "u")]


def test_the_threshold_binds() -> None:
    likeness = jaccard(TEXT + " comes", TEXT)
    sides = {"pool": [POOL[2]], "test": TEST}
    assert len(find_leaks(sides, ["test"], likeness)) == 1
    assert find_leaks(sides, ["test"], likeness + 1e-9) == []


def test_short_answers_alone_are_no_leak() -> None:
    words = [f"w{i}" for i in range(SHORTEST + 2)]
    for count, leaks in ((SHORTEST + 2, 1), (SHORTEST + 1, 0)):
        answer = " ".join(words[:count])
        sides = {"pool": [example("p", "a b c d e f g h", answer)], "test": [example("t", "q r s t u v w x y z", answer)]}
        assert len(find_leaks(sides, ["test"], 0.8)) == leaks


def test_a_short_answer_that_a_long_one_holds_is_no_leak() -> None:
    words = [f"w{i}" for i in range(SHORTEST + 2)]
    long, short = example("l", "a b c d e f g h", " ".join(words)), example("s", "q r s t u v w x y", " ".join(words[:-1]))
    assert jaccard(" ".join(words), " ".join(words[:-1])) > 0.8
    assert find_leaks({"pool": [long], "test": [short]}, ["test"], 0.8) == []
    assert find_leaks({"pool": [short], "test": [long]}, ["test"], 0.8) == []


def test_the_side_that_steers_wins_over_the_pool_and_tests_win_over_all() -> None:
    twin = example("x", "What is bile?", "A fluid of the liver.")
    sides: dict[str, Sequence[Example]] = {"pool": POOL, "target": [twin], "anchor": [twin], "test a": TEST, "test b": TEST}
    found = find_leaks(sides, ["test a", "test b"], 0.8)
    assert {(leak.side, leak.other_side) for leak in found if leak.kind == "same"} == {
        ("pool", "target"), ("pool", "anchor"), ("pool", "test a"), ("pool", "test b"),
        ("target", "anchor"), ("target", "test a"), ("target", "test b"), ("anchor", "test a"), ("anchor", "test b"),
    }  # fmt: skip
    kept = without_leaks(sides, found)
    assert [e.id for e in kept["pool"]] == ["short answer", "free"]
    assert kept["target"] == kept["anchor"] == []
    assert kept["test a"] == TEST
    assert find_leaks(kept, ["test a", "test b"], 0.8) == []


def test_leaks_are_refused_with_the_pairs_listed() -> None:
    found = find_leaks({"pool": POOL, "test medicine": TEST}, ["test medicine"], 0.8)
    with pytest.raises(
        InvalidArgument, match=r"got 3 that do: pool file:same \(same\): the same as test medicine file:t1.*--drop"
    ):
        refuse(found)
    refuse([])
    many = find_leaks({"pool": [POOL[0]] * 12, "test": TEST}, ["test"], 0.8)
    with pytest.raises(InvalidArgument, match="and 4 more"):
        refuse(many)


def test_a_threshold_out_of_range_is_refused() -> None:
    for threshold in (0.0, 1.1):
        with pytest.raises(InvalidArgument, match="threshold must lie in"):
            find_leaks({"pool": POOL}, [], threshold)


def test_chinese_is_cut_by_letters() -> None:
    assert len(triples("肝脏制造胆汁")) == 4
    assert triples("肝脏制造") & triples("他的肝脏制造胆汁")


words = st.lists(st.sampled_from("abcd"), min_size=1, max_size=9).map(" ".join)


@given(st.lists(words, min_size=1, max_size=6), st.lists(words, min_size=1, max_size=6), st.sampled_from([0.3, 0.6, 1.0]))
def test_no_near_pair_is_missed(pool: list[str], test: list[str], threshold: float) -> None:
    sides = {
        "pool": [example(f"p{i}", "pool asks", text) for i, text in enumerate(pool)],
        "test": [example(f"t{i}", "test asks", text) for i, text in enumerate(test)],
    }
    found = {leak.id: leak.similarity for leak in find_leaks(sides, ["test"], threshold)}
    for i, text in enumerate(pool):
        best = max(jaccard(f"pool asks\n{text}", f"test asks\n{other}") for other in test)
        assert (f"p{i}" in found) == (best >= threshold)
        if f"p{i}" in found:
            assert found[f"p{i}"] == pytest.approx(best)
