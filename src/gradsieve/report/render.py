"""A `Page` → the text of one HTML file, and that file on disk.

The file asks nothing from anywhere. Its policy (Content-Security-Policy) allows the one style sheet and the one script whose
hashes it names and no request at all, so that text of the data could neither run nor fetch even if it were not escaped.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
from collections.abc import Callable, Mapping
from importlib import resources
from pathlib import Path

import jinja2
from markupsafe import Markup

from gradsieve.atomic import write_atomically
from gradsieve.report import wording
from gradsieve.report.content import content
from gradsieve.report.page import Page

FILTERS = ("counted", "duration", "label", "number", "percent", "setting", "size")
"""Functions of `wording` that every page of ours may use."""


def render(page: Page) -> str:
    """Returns the report as one self-contained HTML document; the same page gives the same text."""
    js = packaged("gradsieve.report", "page.js")
    values = {"js": Markup(js), "js_hash": _hash(js), "page": page, **content(page)}
    return document(packaged("gradsieve.report", "page.html.j2"), values, {"json": _json})


def document(
    template: str, values: Mapping[str, object], filters: Mapping[str, Callable[..., object]], more_css: str = ""
) -> str:
    """Returns a page of ours: the report's style and wording, every value escaped, every `None` a dash.

    Args:
        template: Jinja text; beside the values it has `css` and its hash for the policy, `css_hash`.
        values: What it shows.
        filters: Its own, beside `FILTERS`.
        more_css: What is added to the report's style sheet.
    """
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True, finalize=_shown
    )
    environment.filters |= {name: getattr(wording, name) for name in FILTERS} | dict(filters)
    css = packaged("gradsieve.report", "page.css") + more_css
    return environment.from_string(template).render(css=Markup(css), css_hash=_hash(css), **values).lstrip()


def write_report(page: Page, path: str | os.PathLike[str]) -> None:
    """Writes the report to `path`: all of it or, if anything fails, nothing."""
    write_atomically(Path(path), render(page).encode("utf-8"))


def packaged(package: str, name: str) -> str:
    """Returns the text of a file that is installed with a package."""
    return resources.files(package).joinpath(name).read_text(encoding="utf-8")


def _hash(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode("utf-8")).digest()).decode("ascii")


def _shown(value: object) -> object:
    """Returns what the template prints for a value: `–` for None, text with its control characters made visible."""
    if value is None:
        return "–"
    return wording.visible(value) if isinstance(value, str) and not isinstance(value, Markup) else value


def _json(value: object) -> Markup:
    """Returns JSON that no HTML parser can leave early: `<`, `>`, `&` and the two line separators are written as escapes."""
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return Markup(text)
