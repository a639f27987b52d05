"""The page in a real browser: no console message, no request, no sideways scrolling, texts under pointer and keys."""

from __future__ import annotations

import base64
import json
import os
import select
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from gradsieve.report import Page, write_report
from gradsieve.report.figures import axis
from gradsieve.types import Selection

CHROMIUM = next((path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None)
pytestmark = [pytest.mark.browser, pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed")]
FLAGS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--no-first-run",
    "--disable-extensions",
    "--hide-scrollbars",
    "--remote-debugging-pipe",
]
# Chromium reads commands from descriptor 3 and writes answers to 4; preexec_fn would fork a process with threads.
LAUNCH = "import os, sys; r, w = map(int, sys.argv[1:3]); os.dup2(r, 3); os.dup2(w, 4); os.execv(sys.argv[3], sys.argv[3:])"


class Browser:
    """One tab of a headless Chromium, driven over the DevTools protocol through a pipe."""

    def __init__(self, profile: Path) -> None:
        assert CHROMIUM is not None
        # Descriptors 3 and 4 are taken by the copies, so that the originals must be others.
        pairs = [os.pipe() for _ in range(4)]
        (read, self._write), (self._read, write) = [pair for pair in pairs if min(pair) > 4][:2]
        arguments = [sys.executable, "-c", LAUNCH, str(read), str(write), CHROMIUM, *FLAGS, f"--user-data-dir={profile}"]
        self._process = subprocess.Popen(
            arguments, pass_fds=(read, write), stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        for descriptor in {d for pair in pairs for d in pair} - {self._read, self._write}:
            os.close(descriptor)
        self._number = 0
        self._buffer = b""
        self.events: list[dict[str, Any]] = []
        self._session: str | None = None
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def close(self) -> None:
        self._session = None
        self.call("Browser.close")
        self._process.wait(timeout=20)
        os.close(self._read)
        os.close(self._write)

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        self._number += 1
        message: dict[str, Any] = {"id": self._number, "method": method, "params": parameters}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._write, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._next()
            if answer.get("id") == self._number:
                assert "error" not in answer, answer
                return dict(answer["result"])
            self.events.append(answer)

    def _next(self) -> dict[str, Any]:
        deadline = time.monotonic() + 30
        while b"\0" not in self._buffer:
            ready, _, _ = select.select([self._read], [], [], max(0, deadline - time.monotonic()))
            assert ready, "Chromium did not answer within 30 s"
            part = os.read(self._read, 1 << 20)
            assert part, "Chromium ended"
            self._buffer += part
        line, self._buffer = self._buffer.split(b"\0", 1)
        return dict(json.loads(line))

    def open(self, path: Path, *, width: int, height: int = 800, dark: bool = False, touch: bool = False) -> None:
        self.events.clear()
        scheme = [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
        self.call("Emulation.setEmulatedMedia", features=scheme)
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=touch)
        self.call("Emulation.setTouchEmulationEnabled", enabled=touch)
        self.call("Page.navigate", url=path.as_uri())
        while not any(event.get("method") == "Page.loadEventFired" for event in self.events):
            self.events.append(self._next())

    def run(self, script: str) -> Any:
        result = self.call("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in result, result["exceptionDetails"]
        return result["result"].get("value")

    def pointer(self, kind: str, x: float, y: float) -> None:
        clicks = 0 if kind == "mouseMoved" else 1
        self.call("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left" if clicks else "none", clickCount=clicks)

    def click(self, x: float, y: float) -> None:
        self.pointer("mousePressed", x, y)
        self.pointer("mouseReleased", x, y)

    def tap(self, x: float, y: float) -> None:
        self.call("Input.dispatchTouchEvent", type="touchStart", touchPoints=[{"x": x, "y": y}])
        self.call("Input.dispatchTouchEvent", type="touchEnd", touchPoints=[])

    def key(self, key: str) -> None:
        for kind in ("keyDown", "keyUp"):
            self.call("Input.dispatchKeyEvent", type=kind, key=key, code=key)

    def complaints(self) -> list[Any]:
        """Console messages, exceptions and violations since the page was opened."""
        self.run("0")
        loud = ("Runtime.consoleAPICalled", "Runtime.exceptionThrown", "Log.entryAdded")
        return [event["params"] for event in self.events if event.get("method") in loud]

    def requests(self) -> list[str]:
        sent = [event for event in self.events if event.get("method") == "Network.requestWillBeSent"]
        return [event["params"]["request"]["url"] for event in sent]

    def screenshot(self, path: Path, *, full: bool = True) -> None:
        height = self.run("document.documentElement.scrollHeight") if full else self.run("innerHeight")
        area = {"x": 0, "y": 0 if full else self.run("scrollY"), "width": self.run("innerWidth"), "height": height, "scale": 1}
        shot = self.call("Page.captureScreenshot", clip=area, captureBeyondViewport=True)
        path.write_bytes(base64.b64decode(shot["data"]))


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    opened = Browser(tmp_path_factory.mktemp("profile"))
    yield opened
    opened.close()


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory, medical_page: Callable[..., Page]) -> Path:
    path = tmp_path_factory.mktemp("report") / "report.html"
    write_report(medical_page(), path)
    return path


READ = "document.querySelector('#reader [data-field=\"{}\"]').textContent"
PLACES = """(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const field = document.querySelector(".cloud .field");
  field.scrollIntoView({block: "center", behavior: "instant"});
  const box = field.getBoundingClientRect();
  const at = (name, i) => {
    const {low, high} = data.axes[name];
    return (data.columns[name][i] - low) / (high - low);
  };
  const [x, y] = data.start;
  return data.id.map((id, i) => [id, box.left + box.width * at(x, i), box.top + box.height * (1 - at(y, i))]);
})()"""


def loneliest(places: list[tuple[str, float, float]]) -> tuple[str, float, float]:
    """The dot whose nearest neighbour is farthest: the pointer cannot mean another one."""

    def room(i: int) -> float:
        _, x, y = places[i]
        return min((x - a) ** 2 + (y - b) ** 2 for j, (_, a, b) in enumerate(places) if j != i)

    return places[max(range(len(places)), key=room)]


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [360, 768, 1280])
def test_the_page_opens_without_a_word_or_a_request_and_fits_the_width(
    browser: Browser, report: Path, width: int, dark: bool
) -> None:
    browser.open(report, width=width, dark=dark, touch=width == 360)
    assert browser.complaints() == []
    assert browser.requests() == [report.as_uri()]
    assert browser.run("document.documentElement.scrollWidth") <= width
    assert browser.run("matchMedia('(prefers-color-scheme: dark)').matches") is dark
    red, green, blue = map(int, browser.run("getComputedStyle(document.body).backgroundColor.match(/\\d+/g)"))
    assert (red + green + blue < 384) is dark
    browser.run("document.querySelectorAll('details').forEach((d) => (d.open = true))")
    assert browser.run("document.documentElement.scrollWidth") <= width


@pytest.mark.parametrize("width", [360, 768, 1024, 1280])
def test_a_long_time_stands_on_one_line(browser: Browser, report: Path, width: int) -> None:
    browser.open(report, width=width, touch=width == 360)
    browser.run("window.time = [...document.querySelectorAll('.numbers b')].at(-1); time.textContent = '57 min 27 s'")
    lines = browser.run("time.getBoundingClientRect().height / parseFloat(getComputedStyle(time).lineHeight)")
    assert lines == pytest.approx(1, abs=0.1)
    assert browser.run("document.documentElement.scrollWidth") <= width


def test_text_is_large_enough_to_read_on_a_phone(browser: Browser, report: Path) -> None:
    browser.open(report, width=360, touch=True)
    sizes = browser.run(
        "[...document.querySelectorAll('main *')].filter((e) => e.childElementCount === 0 && e.textContent.trim())"
        ".map((e) => parseFloat(getComputedStyle(e).fontSize))"
    )
    assert min(sizes) >= 12


def test_a_dot_shows_its_example_under_the_pointer_and_a_click_holds_it(
    browser: Browser, report: Path, medical_page: Callable[..., Page]
) -> None:
    page = medical_page()
    browser.open(report, width=1280)
    places = browser.run(PLACES)
    first, x, y = loneliest(places)
    assert browser.run(READ.format("id")) != first
    browser.pointer("mouseMoved", x + 3, y - 3)
    row = page.ids.index(first)
    assert browser.run(READ.format("id")) == first
    assert browser.run(READ.format("prompt")) == page.prompts[row]
    assert browser.run(READ.format("completion")) == page.completions[row]
    assert browser.run(READ.format("status")).startswith("Chosen" if page.chosen[row] else "Not chosen")
    second, x2, y2 = loneliest([place for place in places if place[0] != first])
    browser.click(x, y)
    browser.pointer("mouseMoved", x2, y2)
    assert browser.run(READ.format("id")) == first
    browser.key("Escape")
    browser.pointer("mouseMoved", x2, y2 + 1)
    assert browser.run(READ.format("id")) == second
    assert browser.complaints() == []


def test_a_tap_shows_the_example_on_a_phone(browser: Browser, report: Path) -> None:
    browser.open(report, width=360, touch=True)
    name, x, y = loneliest(browser.run(PLACES))
    browser.tap(x + 6, y)
    assert browser.run(READ.format("id")) == name


def test_the_keyboard_walks_from_dot_to_dot(browser: Browser, report: Path, medical_page: Callable[..., Page]) -> None:
    page = medical_page()
    utility = dict(zip(page.ids, page.selection.trace["utility"], strict=True))
    browser.open(report, width=1280)
    browser.run("document.querySelector('.cloud .field').focus()")
    best = page.ids[page.order[0]]
    assert browser.run(READ.format("id")) == best
    seen = [best]
    for _ in range(3):
        browser.key("ArrowLeft")
        seen.append(browser.run(READ.format("id")))
    assert len(set(seen)) == 4
    assert [utility[name] for name in seen] == sorted((utility[name] for name in seen), reverse=True)
    browser.key("ArrowRight")
    assert utility[browser.run(READ.format("id"))] > utility[seen[-1]]
    browser.key("Enter")
    assert "held" in browser.run(READ.format("status"))
    browser.key("Home")
    assert browser.run(READ.format("id")) == best
    assert f"place 1 of {len(page.order)}" in browser.run(READ.format("status"))


def test_every_dot_of_a_stack_can_be_walked_to(browser: Browser, tmp_path: Path, small_page: Callable[..., Page]) -> None:
    columns = {"tokens": torch.tensor([1.0, 1, 1, 1, 2, 3])}
    scores = torch.tensor([1.0, 1, 1, 1, 2, 3], dtype=torch.float64)
    stacked = Selection(torch.tensor([0]), torch.ones(1, dtype=torch.float64), scores)
    write_report(small_page(columns=columns, selection=stacked), tmp_path / "report.html")
    browser.open(tmp_path / "report.html", width=1280)
    browser.run("document.querySelector('.cloud .field').focus()")
    seen = [browser.run(READ.format("id"))]
    for _ in range(5):
        browser.key("ArrowRight")
        seen.append(browser.run(READ.format("id")))
    assert sorted(seen) == list("abcdef")


def test_axes_can_be_changed_and_groups_ringed(browser: Browser, report: Path, medical_page: Callable[..., Page]) -> None:
    page = medical_page()
    browser.open(report, width=1280)
    change = "(() => {{ const s = document.getElementById('{0}'); s.value = '{1}'; s.dispatchEvent(new Event('change')); }})()"
    drawn = "document.getElementById('{0}').getAttribute('d')"
    before = {name: browser.run(drawn.format(name)) for name in ("others", "chosen")}
    assert browser.run("getComputedStyle(document.querySelector('.canvas path.border')).visibility") == "visible"
    browser.run(change.format("axis-x", "norm"))
    for name in before:
        after = browser.run(drawn.format(name))
        assert after != before[name]
        assert after.count("M") == before[name].count("M")
    assert browser.run("getComputedStyle(document.querySelector('.canvas path.border')).visibility") == "hidden"
    labels = browser.run("[...document.querySelectorAll('.cloud .ticks-x text')].map((t) => t.textContent)")
    assert labels == list(axis(page.columns["norm"].numpy()).texts)
    browser.run(change.format("axis-x", "utility"))
    assert {name: browser.run(drawn.format(name)) for name in before} == before
    browser.run(change.format("ring", "off-domain"))
    assert page.groups is not None
    assert browser.run(drawn.format("ringed")).count("M") == list(page.groups).count("off-domain")
    assert browser.complaints() == []


def test_the_script_writes_what_the_page_wrote(browser: Browser, tmp_path: Path, small_page: Callable[..., Page]) -> None:
    tricky = {"loss": 0.00012345, "norm": 1234.56, "tokens": 12_345_678.0, "utility": -0.5, "risk": 0.0, "cos/target": 999.7}
    columns = {name: torch.tensor([1.0, 2, 3, 4, value, 5], dtype=torch.float64) for name, value in tricky.items()}
    page = small_page(columns=columns, groups=["x", None] * 3)
    page.selection.weights[:] = torch.tensor([0.25, 1.0])
    path = tmp_path / "report.html"
    write_report(page, path)
    browser.open(path, width=1280)
    served = "new DOMParser().parseFromString({}, 'text/html').querySelector('#reader')".format(
        json.dumps(path.read_text(encoding="utf-8"))
    )
    words = "[...{}.querySelectorAll('[data-field]')].map((e) => e.textContent.replace(/\\s+/g, ' ').trim())"
    shown = browser.run(words.format("document.querySelector('#reader')"))
    assert shown == browser.run(words.format(served))
    assert "weight 0.25" in shown[0]
    assert "1.23×10⁻⁴" in shown[4]
    assert "−0.5" in shown[4]
    assert "1.23×10⁷" in shown[4]


def test_hostile_texts_neither_run_nor_fetch(browser: Browser, tmp_path: Path, small_page: Callable[..., Page]) -> None:
    text = "</script><script>window.hit = 1</script><img src=http://127.0.0.1:9/x onerror='window.hit = 1'>"
    page = small_page(
        prompts=[text] * 6, completions=[text * 9] * 6, ids=[text + c for c in "abcdef"], groups=[text, "b"] * 3, notes=(text,)
    )
    write_report(page, tmp_path / "report.html")
    browser.open(tmp_path / "report.html", width=1280)
    browser.run("document.querySelector('.cloud .field').focus()")
    browser.key("ArrowLeft")
    assert browser.run(READ.format("prompt")) == text
    assert browser.run("window.hit === undefined && document.images.length === 0")
    assert len(browser.requests()) == 1
    assert browser.complaints() == []


def test_even_markup_that_got_through_could_not_run_or_fetch(browser: Browser, report: Path, tmp_path: Path) -> None:
    leak = "<script>window.hit = 1</script><img src='http://127.0.0.1:9/x' onerror='window.hit = 1'>"
    leak += "<style>body {display: none}</style>"
    html = report.read_text(encoding="utf-8").replace("<main>", "<main>" + leak)
    (tmp_path / "report.html").write_text(html, encoding="utf-8")
    browser.open(tmp_path / "report.html", width=1280)
    assert browser.run("window.hit === undefined && getComputedStyle(document.body).display !== 'none'")
    assert not [event for event in browser.events if event.get("method") == "Network.responseReceived" and "9/x" in str(event)]
    assert sum("Content Security Policy" in str(complaint) for complaint in browser.complaints()) >= 3


def test_the_figure_is_there_without_scripts(browser: Browser, report: Path) -> None:
    browser.call("Emulation.setScriptExecutionDisabled", value=True)
    try:
        browser.open(report, width=1280)
        assert browser.run("document.getElementById('chosen').getAttribute('d').length > 100")
        assert browser.run("document.getElementById('axis-x').hidden")
        assert browser.run(READ.format("prompt")).strip()
    finally:
        browser.call("Emulation.setScriptExecutionDisabled", value=False)


def test_a_large_pool_answers_the_pointer_at_once(browser: Browser, tmp_path: Path, medical_page: Callable[..., Page]) -> None:
    write_report(medical_page(20_000), tmp_path / "report.html")
    browser.open(tmp_path / "report.html", width=1280)
    places = browser.run(PLACES)
    assert len(places) == 3000
    start = time.monotonic()
    for _, x, y in places[:20]:
        browser.pointer("mouseMoved", x, y)
    assert time.monotonic() - start < 5
