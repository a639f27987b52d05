"""Scores of a written text against the reference: BLEU, METEOR, ROUGE, and whether its final number is right.

    bleu             0-100   sacrebleu's sentence BLEU (exponential smoothing, effective order), with its Chinese tokenizer
                             where the reference's letters are mostly Chinese, else 13a; a set's mean of it is not corpus BLEU
    meteor           0-1     NLTK's METEOR with stems and WordNet's synonyms
    meteor_nosyn     0-1     the same without synonyms: what there is where WordNet is not installed
    rouge1/2/L       0-1     F-measure of rouge-score, without stemming
    exact_number     0 or 1  the text's final number has the value of the reference's

METEOR and ROUGE see runs of letters and digits in lower case, and every Chinese or Japanese character as a word of its own; on
English that is rouge-score's own tokenizer.

Papineni et al. (2002); Banerjee and Lavie (2005); Lin (2004).
"""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor

from gradsieve.errors import MissingExtra
from gradsieve.evaluate.completion import CJK
from gradsieve.evaluate.keys import final_number

_LIBRARIES = {
    "bleu": "sacrebleu",
    "meteor": "nltk",
    "rouge1": "rouge_score",
    "rouge2": "rouge_score",
    "rougeL": "rouge_score",
}
# full-width digits, comma, stop and minus, and the minus of mathematics
_PLAIN = {0xFF10 + digit: str(digit) for digit in range(10)} | {0xFF0C: ",", 0xFF0E: ".", 0xFF0D: "-", 0x2212: "-"}
_SIGN_BEFORE_CURRENCY = re.compile(r"(?<![0-9])-([$€£¥]) ?(?=[0-9.])")  # after a space it is a dash or the mark of a list
_PIECE = re.compile(rf"[{CJK}]|[^\W_{CJK}]+")


def pieces(text: str) -> list[str]:
    """Returns the words that METEOR and ROUGE compare."""
    return _PIECE.findall(text.lower())


def check_installed(metrics: Collection[str]) -> None:
    """Raises MissingExtra where the library of one of the metrics is not installed."""
    for metric in sorted(metrics):
        package = _LIBRARIES.get(metric)
        if package is not None and importlib.util.find_spec(package) is None:
            raise MissingExtra(f"{metric} needs the package {package}; pip install 'gradsieve[eval]'")


def bleu(texts: Sequence[str], references: Sequence[str]) -> Tensor:
    """Returns each text's sentence BLEU, 0 to 100, float64 [items]."""
    from sacrebleu.metrics import BLEU

    scorers = {name: BLEU(tokenize=name, effective_order=True) for name in ("13a", "zh")}
    return _each(texts, references, lambda text, right: scorers[_language(right)].sentence_score(text, [right]).score)


def rouge(texts: Sequence[str], references: Sequence[str]) -> dict[str, Tensor]:
    """Returns each text's ROUGE-1, ROUGE-2 and ROUGE-L, F-measure, 0 to 1, float64 [items]."""
    from rouge_score.rouge_scorer import RougeScorer

    names = ["rouge1", "rouge2", "rougeL"]
    scorer = RougeScorer(names, tokenizer=_Pieces())
    scores = [scorer.score(right, text) for text, right in zip(texts, references, strict=True)]
    return {name: torch.tensor([score[name].fmeasure for score in scores], dtype=torch.float64) for name in names}


def meteor(texts: Sequence[str], references: Sequence[str]) -> dict[str, Tensor]:
    """Returns each text's METEOR, 0 to 1, float64 [items], under the name that says whether synonyms counted."""
    from nltk.translate.meteor_score import single_meteor_score

    with _wordnet() as wordnet:
        synonyms = wordnet or _NoSynonyms()

        def score(text: str, right: str) -> float:
            return float(single_meteor_score(pieces(right), pieces(text), wordnet=synonyms))

        return {"meteor" if wordnet else "meteor_nosyn": _each(texts, references, score)}


def exact_number(texts: Sequence[str], references: Sequence[str], ended: Sequence[bool] | None = None) -> Tensor:
    """Returns whether each text's final number has the value of its reference's, float64 [items]; NaN without one there.

    Fractions are numbers. What a number is only part of (3:4, 2^5) has no value: NaN in a reference, and no point in a text.
    The number of a text that was cut off is not its final one, and counts as wrong, unless `####` stands before it and more
    follows.

    Args:
        texts: The generated texts.
        references: The right answers.
        ended: Whether each text came to its end; all by default.
    """

    def score(text: str, right: str, ended: bool) -> float:
        wanted = _final_value(right)
        return float("nan") if wanted is None else float(_final_value(text, ended=ended) == wanted)

    whole = [True] * len(texts) if ended is None else ended
    return torch.tensor([score(*one) for one in zip(texts, references, whole, strict=True)], dtype=torch.float64)


def _each(texts: Sequence[str], references: Sequence[str], score: Callable[[str, str], float]) -> Tensor:
    return torch.tensor([score(text, right) for text, right in zip(texts, references, strict=True)], dtype=torch.float64)


def _language(text: str) -> str:
    letters = [char for char in text if char.isalpha()]
    chinese = sum(re.match(f"[{CJK}]", char) is not None for char in letters)
    return "zh" if 2 * chinese > len(letters) else "13a"


def _final_value(text: str, *, ended: bool = True) -> Fraction | None:
    """Returns the value of a text's final number, however digits, commas and minus are written; None without one."""
    plain = _SIGN_BEFORE_CURRENCY.sub(r"\1-", text.translate(_PLAIN))
    number = final_number(plain)
    if number is None or not (ended or ("####" in plain[: number.start] and plain[number.end :].strip(".,:/") != "")):
        return None
    return number.value


@contextmanager
def _wordnet() -> Iterator[Any]:
    """Gives NLTK's WordNet, or None where its files are not installed."""
    from nltk.corpus.reader import CorpusReader, WordNetCorpusReader
    from nltk.corpus.util import LazyCorpusLoader

    # As nltk.corpus.wordnet, but not the one of the whole process: that one could not be looked for again.
    other_languages = LazyCorpusLoader("omw-1.4", CorpusReader, r".*/wn-data-.*\.tab", encoding="utf8")
    wordnet: Any = LazyCorpusLoader("wordnet", WordNetCorpusReader, other_languages)
    try:
        wordnet.synsets("word")
    except LookupError:
        yield None
        return
    try:
        yield wordnet
    finally:
        for stream in wordnet._data_file_map.values():  # the reader itself never closes them
            stream.close()


class _NoSynonyms:
    """A WordNet without words."""

    def synsets(self, word: str) -> Mapping[str, str]:
        return {}


class _Pieces:
    """`pieces` in the form that rouge-score asks for."""

    def tokenize(self, text: str) -> list[str]:
        return pieces(text)
