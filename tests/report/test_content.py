from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gradsieve.report import Page, Stage
from gradsieve.report.content import EXCERPT, LONG_TEXT, content, text_limit


@given(st.lists(st.text(max_size=30), max_size=8), st.integers(0, 200))
def test_the_text_limit_is_the_largest_that_fits(texts: list[str], budget: int) -> None:
    def cost(limit: int) -> int:
        return sum(6 if c in "<>&" else len(c.encode("utf-8", "replace")) for text in texts for c in text[:limit])

    limit = text_limit(texts, budget)
    longest = max(map(len, texts), default=0)
    naive = max(limit for limit in range(longest + 1) if cost(limit) <= budget)
    assert limit == (None if naive == longest else naive)


def test_long_texts_are_cut_and_the_cut_is_counted(small_page: Callable[..., Page]) -> None:
    texts = ["x" * (LONG_TEXT + 5), "y" * (EXCERPT + 80), *"cdef"]
    page = small_page(completions=texts)
    best = content(page)["lists"]
    items = [item for name in ("best", "last_in", "first_out", "worst") for item in best[name]]
    shown = {item["id"]: item["completion"] for item in items}
    assert shown["a"] == {"begin": "x" * EXCERPT + "…", "whole": "x" * LONG_TEXT, "length": LONG_TEXT + 5}
    assert shown["b"] == {"begin": texts[1], "whole": None, "length": EXCERPT + 80}


def test_texts_of_the_figure_are_shortened_only_where_they_would_not_fit(medical_page: Callable[..., Page]) -> None:
    assert content(medical_page())["scatter"]["text_limit"] is None
    page = medical_page(completions=["word " * 2000] * 412)
    scatter = content(page)["scatter"]
    limit = scatter["text_limit"]
    assert 2500 < limit < 3000
    assert all(len(text) == limit + 1 for text in scatter["data"]["completion"])
    assert all(scatter["data"]["cut"])


def test_costs_add_what_was_measured(small_page: Callable[..., Page]) -> None:
    stages = (Stage("a", 2.0, 4.0, None), Stage("b", None, 1.0, 100), Stage("c", 8.0))
    cost = content(small_page(stages=stages))["cost"]
    assert (cost["wall"], cost["cpu"], cost["bytes"]) == (10.0, 5.0, 100)
    assert [share for _, share in cost["stages"]] == ["25.00", "0.00", "100.00"]
    unmeasured = content(small_page(stages=(Stage("a", None),)))["cost"]
    assert (unmeasured["wall"], unmeasured["cpu"], unmeasured["bytes"]) == (None, None, None)


def test_weights_count_like_fewer_examples(small_page: Callable[..., Page]) -> None:
    page = small_page()
    assert content(page)["weights"] is None
    page.selection.weights[:] = torch.tensor([3.0, 1.0])
    assert content(page)["weights"] == {"low": 1.0, "high": 3.0, "effective": pytest.approx(16 / 10)}


def test_notes_of_the_page_come_first_and_are_not_repeated(
    small_page: Callable[..., Page], medical_page: Callable[..., Page]
) -> None:
    page = medical_page(notes=("first", "second", "first"))
    assert content(page)["notes"] == ("first", "second", *page.selection.notes)
    assert content(small_page())["notes"] == ()


def test_the_drawn_rows_carry_their_numbers_and_texts(small_page: Callable[..., Page]) -> None:
    data = content(small_page(groups=["x", None, "x", None, "y", None]))["scatter"]["data"]
    assert data["start"] == ("tokens", "score")
    assert data["place"] == [0, 2, 0, 0, 1, 0]
    assert data["columns"]["score"] == [0.1, 0.8, 0.3, 0.2, 0.9, 0.4]
    assert data["prompt"][4] == "question e"
    assert data["groups"] == ["x", "y"]
    assert data["group"] == ["x", None, "x", None, "y", None]
    assert data["weight"] is None
    assert data["count"] == 2


def test_links_cannot_leave_the_directory_of_the_page(small_page: Callable[..., Page]) -> None:
    page = small_page(files=(("javascript:alert(1)", "x"), ("//host/a b.json", "y")))
    assert [href for href, _, _ in content(page)["links"]] == ["./javascript%3Aalert%281%29", "./%2F%2Fhost%2Fa%20b.json"]
    page = small_page(files=(("a.json", "x"),), folder="../javascript:x")
    assert [href for href, _, _ in content(page)["links"]] == ["./../javascript%3Ax/a.json"]


def test_cosines_that_repeat_utility_and_risk_are_shown_once(small_page: Callable[..., Page]) -> None:
    columns = {
        "norm": torch.ones(6),
        "dot/target": torch.arange(6.0) / 10,
        "dot/anchor": torch.tensor([0.1, -0.2, 0.3, 0.4, 0.5, 0.6]),
        "utility": torch.arange(6.0) / 10,
    }

    def beside(risk: list[float]) -> list[str]:
        page = content(small_page(columns=columns | {"risk": torch.tensor(risk)}))
        return [name for name, _ in page["lists"]["best"][0]["values"]]

    assert beside([0.0, 0.2, 0, 0, 0, 0]) == ["utility", "conflict", "score", "gradient norm"]
    assert beside([0.0] * 6) == ["utility", "conflict", "signed conflict", "score", "gradient norm"]
    del columns["utility"]
    assert beside([0.0, 0.2, 0, 0, 0, 0]) == ["cosine to target", "conflict", "score", "gradient norm"]
