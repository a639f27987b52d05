from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gradsieve.report import wording


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "–"),
        (math.nan, "–"),
        (math.inf, "∞"),
        (-math.inf, "−∞"),
        (0.0, "0"),
        (7, "7"),
        (0.03124, "0.0312"),
        (-0.5, "−0.5"),
        (123.456, "123"),
        (1204.4, "1,204"),
        (-1_234_567, "−1,234,567"),
        (3.2e-7, "3.2×10⁻⁷"),
        (-4e12, "−4×10¹²"),
        (999.7, "1,000"),
    ],
)
def test_numbers_have_three_digits_and_nothing_is_hidden(value: float | None, text: str) -> None:
    assert wording.number(value) == text


@given(st.floats(-1e300, 1e300))
def test_a_written_number_is_within_half_a_digit_of_the_value(value: float) -> None:
    text = wording.number(value).replace("−", "-").replace(",", "")
    if "×10" in text:
        mantissa, exponent = text.split("×10")
        text = mantissa + "e" + exponent.translate(str.maketrans("⁻⁰¹²³⁴⁵⁶⁷⁸⁹", "-0123456789"))
    assert float(text) == pytest.approx(value, rel=0.0051)


@pytest.mark.parametrize(
    ("share", "text"),
    [
        (0, "0%"),
        (0.0002, "under 0.1%"),
        (0.097, "9.7%"),
        (0.03, "3%"),
        (0.65, "65%"),
        (1, "100%"),
        (math.nan, "–"),
        (None, "–"),
    ],
)
def test_percentages(share: float | None, text: str) -> None:
    assert wording.percent(share) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.42, "0.42 s"),
        (9.96, "10 s"),
        (59.6, "1 min"),
        (200, "3 min 20 s"),
        (3599.9, "1 h"),
        (7500, "2 h 5 min"),
        (None, "–"),
        (math.nan, "–"),
    ],
)
def test_durations(seconds: float | None, text: str) -> None:
    assert wording.duration(seconds) == text


@pytest.mark.parametrize(
    ("count", "text"), [(812, "812 B"), (1400, "1.4 kB"), (999_600, "1 MB"), (2.5e12, "2.5 TB"), (None, "–")]
)
def test_sizes(count: float | None, text: str) -> None:
    assert wording.size(count) == text


def test_settings_are_written_as_in_yaml() -> None:
    values = [True, None, 3, 0.25, "top", (1, "a"), [], {"a": 1}]
    assert [wording.setting(v) for v in values] == ["true", "null", "3", "0.25", "top", "1, a", "none", "{'a': 1}"]


def test_labels_are_known_composed_or_the_name_itself() -> None:
    names = ["utility", "cos/anchor:math", "dot/target", "max/lm_head", "sd/embedding", "some_column"]
    written = [wording.label(name).name for name in names]
    assert written == [
        "utility",
        "cosine to anchor:math",
        "product with target",
        "lm head: maximum",
        "embedding: sd",
        "some column",
    ]


@given(st.text())
def test_visible_text_can_be_written_and_holds_no_control_character(text: str) -> None:
    shown = wording.visible(text)
    shown.encode("utf-8")
    assert not any((ord(c) < 32 and c not in "\n\t") or 127 <= ord(c) < 160 for c in shown)


def test_control_characters_and_lone_surrogates_are_shown_as_signs() -> None:
    assert wording.visible("a\0b\x1b[0m\r\nc\ud800\x85") == "a␀b␛[0m\nc��"


def test_lists_of_words() -> None:
    assert [wording.joined(list(w)) for w in ("", "a", "ab", "abc")] == ["", "a", "a and b", "a, b and c"]
    assert wording.counted(1, "example") == "1 example"
    assert wording.counted(1204, "entry", "entries") == "1,204 entries"
