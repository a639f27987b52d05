"""How the demo asks for a term and frames the answer, and how a wording is changed without changing what is said."""

from __future__ import annotations

import random
import re

# {x} stands inside a sentence, {X} as a heading. The first GENERAL fit any field, the others a medical one.
QUESTIONS = (
    "What is {x}?",
    "Define {x}.",
    'What does "{X}" mean?',
    "Briefly explain {x}.",
    "How is {x} defined?",
    "Glossary entry, please: {X}",
    "Tell me what {x} refers to.",
    "I came across the term {x}. What is meant?",
    "What would a clinician understand by {x}?",
    "Give a short clinical definition of {x}.",
    'A patient\'s chart says "{X}". What does that describe?',
    "Which finding is called {x}?",
    "Medical term: {X}. Meaning?",
    "A colleague noted {x} in a patient. What is that?",
    "For an exam in medicine: {X}?",
)
GENERAL = 8
ANSWERS = ("{D}", "{X}: {D}", "It is defined as follows: {D}", "In short: {D}")

# Applied to whole words. None changes the meaning of a definition.
SYNONYMS = (
    ("abnormally", "unusually"),
    ("abnormal", "anomalous"),
    ("abnormality", "anomaly"),
    ("anomaly", "abnormality"),
    ("decreased", "reduced"),
    ("reduced", "lowered"),
    ("reduction", "decrease"),
    ("increased", "raised"),
    ("elevated", "raised"),
    ("absence", "lack"),
    ("absent", "missing"),
    ("presence", "occurrence"),
    ("characterized", "marked"),
    ("located", "situated"),
    ("usually", "typically"),
    ("typically", "usually"),
    ("multiple", "several"),
    ("affecting", "involving"),
    ("involving", "affecting"),
    ("due to", "because of"),
    ("caused by", "resulting from"),
    ("inability", "incapacity"),
    ("enlarged", "increased in size"),
    ("enlargement", "increase in size"),
    ("occurs", "takes place"),
    ("consisting of", "made up of"),
    ("defect", "flaw"),
    ("circulation", "bloodstream"),
)


def ask(x: str, X: str, rng: random.Random, *, general: bool = False, other_than: int | None = None) -> tuple[str, int]:
    """Returns a question for the term and the wording's number; for any field, or in another wording, if asked so."""
    choices = [i for i in range(GENERAL if general else len(QUESTIONS)) if i != other_than]
    number = rng.choice(choices)
    return QUESTIONS[number].format(x=x, X=X), number


def frame(X: str, definition: str, rng: random.Random, *, other_than: int | None = None) -> tuple[str, int]:
    """Returns an answer that says the definition, and the framing's number; in another framing if asked so."""
    number = rng.choice([i for i in range(len(ANSWERS)) if i != other_than])
    return ANSWERS[number].format(X=X, D=definition), number


def reword(definition: str, rng: random.Random, edits: int = 2) -> str:
    """Returns the definition with up to `edits` words replaced by synonyms; as it was where no synonym is known."""
    fitting = [(word, other) for word, other in SYNONYMS if re.search(rf"\b{word}\b", definition, re.IGNORECASE)]
    for word, other in rng.sample(fitting, min(edits, len(fitting))):

        def in_case(match: re.Match[str], other: str = other) -> str:
            return other[0].upper() + other[1:] if match.group()[0].isupper() else other

        definition = re.sub(rf"\b{word}\b", in_case, definition, count=1, flags=re.IGNORECASE)
    # "An abnormal" becomes "A raised" and the like
    definition = re.sub(r"\b([Aa])n (?=[b-df-hj-np-tv-z])", r"\1 ", definition)
    return re.sub(r"\b([Aa]) (?=[aeiou](?!ni|s[eu]|ro))", r"\1n ", definition)
