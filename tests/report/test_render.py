from __future__ import annotations

import base64
import dataclasses
import hashlib
import itertools
import json
import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gradsieve.errors import DataError
from gradsieve.report import Page, Source, render, write_report
from gradsieve.types import Selection

HOSTILE = (
    "</script><script>alert(1)</script>",
    "<img src=x onerror=alert(1)>",
    "</title></style><!-- <script>",
    "javascript:alert(1)",
    "\"' onmouseover='alert(1)",
    "line\u2028and\u2029paragraph",
    "{{ 7 * 7 }} {% raw %}",
    "&lt;b&gt; &amp; \ud800 \0 \x1b[31m",
)
VOID = {"meta", "link", "path", "circle", "line", "rect", "br"}


class Document(HTMLParser):
    """The elements of a page, its text outside of scripts and styles, and what each script and style holds."""

    def __init__(self, html: str) -> None:
        super().__init__(convert_charrefs=True)
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.text = ""
        self.raw: list[tuple[str, str]] = []
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        assert len(attrs) == len(dict(attrs)), f"<{tag}> repeats an attribute"
        if tag in ("script", "style"):
            self.raw.append((tag, ""))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag, f"</{tag}> closes another element"

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] in ("script", "style"):
            self.raw[-1] = (self.raw[-1][0], self.raw[-1][1] + data)
        else:
            self.text += data

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]


def hostile_page(small_page: Callable[..., Page], text: str) -> Page:
    """A page with `text` in every place that the data or the caller can reach."""
    return small_page(
        method=text,
        picks_by=text,
        source=text,
        settings={text: text},
        model=text,
        sources=(Source(text, text, 6), Source(text, text, 2)),
        budget=text,
        date=text,
        version=text,
        ids=[text + str(i) for i in range(6)],
        prompts=[text] * 6,
        completions=[text * 60] * 6,
        selection=Selection(
            torch.tensor([4, 1]),
            torch.tensor([1.0, 2.0], dtype=torch.float64),
            torch.arange(6.0, dtype=torch.float64),
            {
                text: text,
                text + "x": [1.0, 2, 3, 4, 5, 7],
                "steps": {text + "/" + text: [1.0, 2.0]},
                "note": {text: text},
                text + "t": {text: {text: text}},
            },
            (text,),
        ),
        columns={text + "y": torch.tensor([10.0, 20, 30, 40, 50, 70])},
        groups=[text, None] * 3,
        groups_are=text,
        excluded=((text, text),),
        notes=(text + "!",),
        files=((text, text),),
    )


def skeleton(html: str) -> list[tuple[str, tuple[str, ...]]]:
    """Tags with the names of their attributes: what data must not be able to change."""
    return [(tag, tuple(sorted(attributes))) for tag, attributes in Document(html).elements]


@pytest.mark.parametrize("text", HOSTILE)
def test_no_text_of_the_data_can_change_the_structure(small_page: Callable[..., Page], text: str) -> None:
    harmless = render(hostile_page(small_page, "w" * len(text)))
    html = render(hostile_page(small_page, text))
    assert skeleton(html) == skeleton(harmless)
    for _, attributes in Document(html).elements:
        assert not any(name.startswith("on") or name == "style" for name in attributes)


@settings(max_examples=15, deadline=None)
@given(st.text(min_size=1, max_size=12))
def test_any_text_comes_back_from_the_data_as_it_was(small_page: Callable[..., Page], text: str) -> None:
    html = render(small_page(prompts=[text] * 6))
    html.encode("utf-8")
    (data,) = [json.loads(raw) for tag, raw in Document(html).raw if raw.startswith("{") and tag == "script"]
    back = data["prompt"][0]
    assert len(back) == len(text.replace("\r\n", "\n"))
    assert all(
        a == b or ord(a) < 32 or 127 <= ord(a) < 160 or a == "\r" for a, b in zip(text.replace("\r\n", "\n"), back, strict=True)
    )


def test_json_escapes_everything_an_html_or_script_parser_reacts_to(small_page: Callable[..., Page]) -> None:
    html = render(small_page(prompts=["</script><!--&\u2028\u2029"] * 6))
    (data,) = [raw for tag, raw in Document(html).raw if raw.startswith("{")]
    assert not re.search("[<>&\u2028\u2029]", data)
    assert json.loads(data)["prompt"][0] == "</script><!--&\u2028\u2029"


def test_the_policy_allows_this_style_and_this_script_and_nothing_else(medical_page: Callable[..., Page]) -> None:
    document = Document(render(medical_page()))
    policy = next(m["content"] for m in document.all("meta") if m.get("http-equiv") == "Content-Security-Policy")
    assert policy is not None
    rules = dict(rule.strip().split(" ", 1) for rule in policy.split(";"))
    assert rules["default-src"] == "'none'"
    assert rules["base-uri"] == rules["form-action"] == "'none'"
    assert rules["img-src"] == "data:"
    assert "unsafe" not in policy
    for tag, name in (("style", "style-src"), ("script", "script-src")):
        (code,) = [raw for kind, raw in document.raw if kind == tag and not raw.startswith("{")]
        assert code
        assert rules[name] == f"'sha256-{base64.b64encode(hashlib.sha256(code.encode()).digest()).decode()}'"


def test_nothing_is_asked_from_anywhere(medical_page: Callable[..., Page]) -> None:
    html = render(medical_page())
    document = Document(html)
    for _, attributes in document.elements:
        for name in ("src", "href", "srcset", "action", "poster", "data", "xlink:href"):
            value = attributes.get(name)
            assert value is None or value.startswith(("./", "data:,")), value
    assert not re.search(r"https?:|@import|url\(|//[a-z]", html.replace('http-equiv="', ""))


def test_the_same_page_gives_the_same_text(medical_page: Callable[..., Page]) -> None:
    assert render(medical_page()) == render(medical_page())


def test_sections_and_headings_are_in_order_and_labelled(medical_page: Callable[..., Page]) -> None:
    document = Document(render(medical_page()))
    assert document.open == []
    levels = [int(tag[1]) for tag, _ in document.elements if re.fullmatch("h[1-6]", tag)]
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(b <= a + 1 for a, b in itertools.pairwise(levels))
    ids = [a["id"] for _, a in document.elements if "id" in a]
    assert len(ids) == len(set(ids))
    for _, attributes in document.elements:
        for name in ("aria-labelledby", "aria-describedby"):
            assert name not in attributes or attributes[name] in ids
    assert all(a.get("aria-hidden") == "true" for a in document.all("svg"))
    figures = document.all("figure")
    assert all("aria-label" in a or a.get("class") == "scatter" for a in figures)
    (html,) = document.all("html")
    assert html["lang"] == "en"


@pytest.fixture(scope="module")
def full_text(medical_page: Callable[..., Page]) -> str:
    return re.sub(r"\s+", " ", Document(render(medical_page())).text)


@pytest.mark.parametrize(
    "text",
    [
        "OGS chose 41 of 412 examples",
        "below 0.7.",  # a note of the page
        "the anchor says nothing about these examples",  # a note of the selection
        "swapped definition",
        "no completion tokens after truncation to 1024",
        "gradsieve replay run.json",
        "bound_of",
        "percentile",
        "gradients of the pool",
        "findings-dev.jsonl",
        "arXiv 2602.06359",
        "Rank correlation of score and length",
        "Marked: λ = 2.3",
        "dashed line parts what was chosen",
        "every number of every example",
    ],
)
def test_a_full_page_says(full_text: str, text: str) -> None:
    assert text in full_text


def test_a_group_can_be_ringed_whatever_spaces_its_name_has(small_page: Callable[..., Page]) -> None:
    html = render(small_page(groups=[" a  b ", " a  b ", 'c"', 'c"', None, None]))
    assert '<option value=" a  b "> a  b </option>' in html
    assert '<option value="c&#34;">' in html


def test_a_bare_page_leaves_out_what_it_does_not_have(small_page: Callable[..., Page]) -> None:
    text = Document(render(small_page())).text
    assert "Read this first" not in text
    for absent in ("Left out", "Cost", "How it got there", "Files beside", "share of pool"):
        assert absent not in text
    scoreless = Selection(
        torch.tensor([4]), torch.ones(1, dtype=torch.float64), torch.full((6,), torch.nan, dtype=torch.float64)
    )
    html = render(small_page(selection=scoreless, columns={}))
    assert "fewer than two numbers" in html
    assert "none can be called worst" in html
    assert "<script" not in html


def test_a_selection_of_nothing_is_a_page_too(small_page: Callable[..., Page]) -> None:
    nothing = Selection(torch.tensor([], dtype=torch.int64), torch.ones(0, dtype=torch.float64), torch.arange(6.0))
    html = render(small_page(selection=nothing, groups=["a", "b", None] * 2))
    assert "Pick chose 0 of 6 examples" in html
    assert "NaN" not in Document(html).text


def test_missing_numbers_are_dashes(small_page: Callable[..., Page]) -> None:
    columns = {"loss": torch.tensor([1.0, 2, 3, torch.nan, torch.nan, torch.inf]), "tokens": torch.full((6,), torch.nan)}
    html = render(small_page(columns=columns))
    document = Document(html)
    assert not re.search(r"\b(nan|NaN|None|inf)\b", document.text)
    assert "loss –" in re.sub(r"\s+", " ", document.text)
    assert "3 examples without a value" in document.text
    (data,) = [json.loads(raw) for _, raw in document.raw if raw.startswith("{")]
    assert data["columns"]["loss"] == [1, 2, 3, None, None, None]
    assert "3 examples have no value on these axes" in document.text


def test_a_large_pool_is_thinned_and_the_page_says_so(medical_page: Callable[..., Page]) -> None:
    page = medical_page(6000)
    html = render(page)
    assert "a random sample of 3,000 of 6,000 examples" in html
    assert len(html.encode()) < 1_000_000


def test_two_thousand_long_examples_stay_below_three_megabytes(medical_page: Callable[..., Page]) -> None:
    page = medical_page(2000, completions=["<&> word " * 900] * 2000)
    html = render(page)
    assert len(html.encode()) < 3_000_000
    assert re.search(r"Texts beside the figure are shortened to [\d,]+ characters", html)


def test_a_report_is_written_whole_or_not_at_all(
    tmp_path: Path, small_page: Callable[..., Page], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "report.html"
    page = small_page()
    write_report(page, path)
    assert path.read_text(encoding="utf-8") == render(page)
    before = path.read_bytes()

    def fail(_: int) -> None:
        raise OSError("disk full")

    monkeypatch.setattr("os.fsync", fail)
    with pytest.raises(DataError, match=r"report\.html: cannot be written: disk full"):
        write_report(dataclasses.replace(page, method="Other"), path)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["report.html"]


def _schemes() -> list[dict[str, str]]:
    css = (Path(__file__).parents[2] / "src/gradsieve/report/page.css").read_text(encoding="utf-8")
    blocks = re.findall(r":root \{([^}]*)\}", css)
    light, dark = (dict(re.findall(r"--([\w-]+): (#[0-9a-f]{6})", block)) for block in blocks[:2])
    assert light.keys() == dark.keys()
    return [light, dark]


@pytest.mark.parametrize("colours", _schemes(), ids=["light", "dark"])
def test_text_has_contrast_in_both_schemes(colours: dict[str, str], contrast: Callable[[str, str], float]) -> None:
    for ink in ("ink", "soft", "accent"):
        assert contrast(colours[ink], colours["paper"]) >= 4.5
    assert contrast(colours["ink"], colours["raised"]) >= 4.5
    for ink in ("ink", "warn"):
        assert contrast(colours[ink], colours["warn-paper"]) >= 4.5
    for shape in ("dot", "ring", "accent"):
        assert contrast(colours[shape], colours["paper"]) >= 3
