"""Text scores against their libraries, and by hand where the libraries know no Chinese."""

from __future__ import annotations

import importlib.util
import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gradsieve.errors import MissingExtra
from gradsieve.evaluate import texts as module
from gradsieve.evaluate.texts import bleu, check_installed, exact_number, meteor, pieces, rouge

PAIRS = [
    ("The cat sat on the mat.", "The cat sat on a mat."),
    ("It is a guide to action which ensures obedience", "It is a guide to action that ensures that it is obeyed"),
    ("", "Nothing was said."),
    ("entirely other words", "Nothing was said."),
    ("Limit salt to 5 g a day, 3.5 at best!", "Limit salt to 5 g a day, 3.5 at best!"),
]
TEXTS, REFERENCES = ([pair[i] for pair in PAIRS] for i in (0, 1))


def test_bleu_is_that_of_sacrebleu() -> None:
    from sacrebleu import sentence_bleu

    assert bleu(TEXTS, REFERENCES).tolist() == [sentence_bleu(t, [r]).score for t, r in PAIRS]
    assert bleu(TEXTS, REFERENCES)[-1].item() == pytest.approx(100)


def test_rouge_is_that_of_rouge_score_on_english() -> None:
    from rouge_score.rouge_scorer import RougeScorer

    names = ["rouge1", "rouge2", "rougeL"]
    scorer, found = RougeScorer(names), rouge(TEXTS, REFERENCES)
    for name in names:
        assert found[name].tolist() == [scorer.score(r, t)[name].fmeasure for t, r in PAIRS]
    assert found["rouge1"][2:].tolist() == [0, 0, 1]


@given(st.text(alphabet=st.characters(max_codepoint=127)))
def test_words_are_those_of_rouge_score_on_english(text: str) -> None:
    from rouge_score.tokenize import tokenize

    assert pieces(text) == tokenize(text, None)


def test_meteor_without_synonyms_is_that_of_nltk_where_words_match() -> None:
    # nltk's own example; with WordNet's synonyms it is 0.6944 as well
    text = "It is a guide to action which ensures that the military always obeys the commands of the party"
    right = "It is a guide to action that ensures that the military will forever heed Party commands"
    assert meteor([text], [right])["meteor_nosyn"].item() == pytest.approx(0.6944, abs=1e-4)
    assert meteor(["", "cats"], [right, "cat"])["meteor_nosyn"].tolist() == [0.0, 0.5]  # 0.5: one match, one chunk


def test_chinese_characters_are_words() -> None:
    text, right = "限制钠盐摄入", "应当限制盐的摄入"
    assert pieces("限制Na 5克") == ["限", "制", "na", "5", "克"]
    scores = rouge([text], [right])
    precision, recall = 5 / 6, 5 / 8
    assert scores["rouge1"].item() == pytest.approx(2 * precision * recall / (precision + recall))
    two = 2 / 5, 2 / 7  # 限制 and 摄入
    assert scores["rouge2"].item() == pytest.approx(2 * two[0] * two[1] / sum(two))
    assert scores["rougeL"].item() == scores["rouge1"].item()
    mean, chunks = precision * recall / (0.9 * precision + 0.1 * recall), 3  # 限制, 盐, 摄入
    assert meteor([text], [right])["meteor_nosyn"].item() == pytest.approx((1 - 0.5 * (chunks / 5) ** 3) * mean)


def test_bleu_cuts_chinese_into_characters() -> None:
    from sacrebleu import sentence_bleu

    text, right = "应当限制钠盐的摄入。", "应当限制盐的摄入。"
    assert bleu([text], [right]).item() == sentence_bleu(text, [right], tokenize="zh").score
    assert bleu([text], [right]).item() > 50
    mixed = "每天 5 g of salt at the very most"  # mostly Latin letters
    assert bleu([mixed], [mixed[:-5]]).item() == sentence_bleu(mixed, [mixed[:-5]]).score


@pytest.mark.parametrize(
    ("text", "right", "score"),
    [
        ("So 1,500.", "#### 1500", 1.0),
        ("#### 1500.0 or 3", "#### 1500", 1.0),
        ("12 #### 13", "#### 12", 0.0),
        ("none", "#### 12", 0.0),
        ("-4", "The answer is 4.", 0.0),
        ("4", "none", math.nan),
        ("It falls by \N{MINUS SIGN}5", "-5", 1.0),
        ("It falls by \N{MINUS SIGN}5", "5", 0.0),
        ("a loss of -$5", "#### -5", 1.0),
        ("a loss of -$5", "#### 5", 0.0),
        ("prices from 3-$5", "#### 5", 1.0),
        ("The total:\n- $18", "#### 18", 1.0),
        ("Answer - $18", "#### 18", 1.0),
        ("Answer - $18", "#### -18", 0.0),
        ("Answer: - 18", "#### 18", 1.0),
        ("\uff11\uff0c\uff12\uff10\uff10", "1200", 1.0),
        ("10² is more", "#### 10", 1.0),
        ("#### 3/5", "#### 3/4", 0.0),
        ("1/4.", "= 3/4.", 0.0),
        (r"\boxed{\frac{1}{4}}", r"\boxed{\frac{3}{4}}", 0.0),
        (r"\boxed{\dfrac{6}{8}}", "0.75", 1.0),
        ("1/2", "#### 0.5", 1.0),
        ("1 1/2", r"\frac{3}{2}", 1.0),
        (r"-1\tfrac12", "-1.5", 1.0),
        ("\uff11\uff0f\uff12", "0.5", 1.0),
        ("1,000/3", "2,000/6", 1.0),
        ("0.1", "1/10", 1.0),
        ("4", "#### 3:4", math.nan),
        ("4", r"\boxed{\frac{x}{4}}", math.nan),
        ("3:4", "#### 4", 0.0),
    ],
)
def test_numbers_are_held_to_their_value(text: str, right: str, score: float) -> None:
    assert exact_number([text], [right]).tolist() == pytest.approx([score], nan_ok=True)


@pytest.mark.parametrize(
    ("text", "score"),
    [
        ("So 6 x 2 = 12, and then we", 0.0),
        ("#### 12", 0.0),
        ("#### 12 and", 1.0),
        ("12 #### and", 0.0),
        ("#### 12\n", 1.0),
        ("#### 12.", 0.0),
    ],
)
def test_the_last_number_of_a_text_that_was_cut_off_is_not_its_answer(text: str, score: float) -> None:
    assert exact_number([text], ["#### 12"], [False]).tolist() == [score]
    assert exact_number([text], ["#### 12"], [True]).tolist() == [1.0]


@pytest.fixture
def wordnet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A WordNet of one synset, {car, auto}, where NLTK looks for it."""
    import nltk

    folder = tmp_path / "corpora" / "wordnet"
    folder.mkdir(parents=True)
    for part in ("noun", "verb", "adj", "adv"):
        for name in (f"index.{part}", f"data.{part}", f"{part}.exc"):
            (folder / name).write_text("")
    header = "  1 WordNet 3.0 Copyright\n"
    (folder / "data.adj").write_text(header)
    (folder / "data.noun").write_text(f"{header}{len(header):08d} 06 n 02 car 0 auto 0 000 | a vehicle  \n")
    (folder / "index.noun").write_text("".join(f"{word} n 1 0 1 1 {len(header):08d}  \n" for word in ("auto", "car")))
    (folder / "lexnames").write_text("".join(f"{i:02d}\tnoun.{i}\t1\n" for i in range(45)))
    (folder / "index.sense").write_text("")
    monkeypatch.setattr(nltk.data, "path", [str(tmp_path)])


@pytest.mark.usefixtures("wordnet")
def test_synonyms_count_where_wordnet_is_installed() -> None:
    found = meteor(["my auto"], ["my car"])
    assert list(found) == ["meteor"]
    assert found["meteor"].item() == pytest.approx(1 - 0.5 / 8)  # two matches, one chunk
    assert meteor(["my dog"], ["my car"])["meteor"].item() == pytest.approx(0.5 * 0.5)


def test_without_wordnet_the_name_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    import nltk

    monkeypatch.setattr(nltk.data, "path", [])
    found = meteor(["my auto"], ["my car"])
    assert list(found) == ["meteor_nosyn"]
    assert found["meteor_nosyn"].item() == pytest.approx(0.5 * 0.5)


def test_a_missing_library_names_its_cure(monkeypatch: pytest.MonkeyPatch) -> None:
    find: Any = importlib.util.find_spec
    monkeypatch.setattr(module.importlib.util, "find_spec", lambda name: None if name == "sacrebleu" else find(name))
    check_installed(["loss", "rouge1", "meteor"])
    with pytest.raises(MissingExtra, match=r"bleu needs the package sacrebleu; pip install 'gradsieve\[eval\]'"):
        check_installed(["loss", "bleu"])
