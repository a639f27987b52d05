"""The page of a comparison in a real browser: no console message, no request, no sideways scrolling."""

import importlib.util
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from gradsieve.compare.run import Comparison

SPEC = importlib.util.spec_from_file_location("report_browser", Path(__file__).parents[1] / "report" / "test_browser.py")
assert SPEC is not None
assert SPEC.loader is not None
report = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(report)
pytestmark = report.pytestmark


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    opened = report.Browser(tmp_path_factory.mktemp("profile"))
    yield opened
    opened.close()


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [360, 1280])
def test_the_page_opens_without_a_word_or_a_request_and_fits_the_width(
    browser: Any, finished: Comparison, width: int, dark: bool
) -> None:
    path = finished.study / "report.html"
    browser.open(path, width=width, dark=dark, touch=width == 360)
    assert browser.complaints() == []
    assert browser.requests() == [path.as_uri()]
    browser.run("document.querySelectorAll('details').forEach((d) => (d.open = true))")
    assert browser.run("document.documentElement.scrollWidth") <= width
    assert browser.run("document.querySelectorAll('.figure svg').length") == len(list((finished.study / "figures").iterdir()))
    sizes = browser.run(
        "[...document.querySelectorAll('main *')].filter((e) => e.childElementCount === 0 && e.textContent.trim()"
        " && !e.closest('svg')).map((e) => parseFloat(getComputedStyle(e).fontSize))"
    )
    assert min(sizes) >= 12


def test_a_figure_opens_by_itself(browser: Any, finished: Comparison) -> None:
    for path in sorted((finished.study / "figures").iterdir()):
        browser.open(path, width=800)
        assert browser.complaints() == []
        assert browser.requests() == [path.as_uri()]
        assert browser.run("document.documentElement.tagName") == "svg"


def test_the_standings_need_no_sideways_scrolling_at_1400(browser: Any, finished: Comparison) -> None:
    browser.open(finished.study / "report.html", width=1400)
    seen, needed = browser.run(
        "(() => { const e = document.querySelector('.standings').parentElement; return [e.clientWidth, e.scrollWidth]; })()"
    )
    assert needed <= seen
