"""A `Page` → the text of one HTML file, and that file on disk.

The file asks nothing from anywhere. Its policy (Content-Security-Policy) allows the one style sheet and the one script whose
hashes it names and no request at all, so that text of the data could neither run nor fetch even if it were not escaped.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
from importlib import resources
from pathlib import Path

import jinja2
from markupsafe import Markup

from gradsieve.atomic import write_atomically
from gradsieve.report import wording
from gradsieve.report.content import content
from gradsieve.report.page import Page


def render(page: Page) -> str:
    """Returns the report as one self-contained HTML document; the same page gives the same text."""
    css, js = _packaged("page.css"), _packaged("page.js")
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True, finalize=_shown
    )
    environment.filters |= {
        name: getattr(wording, name) for name in ("counted", "duration", "label", "number", "percent", "setting", "size")
    }
    environment.filters["json"] = _json
    template = environment.from_string(_packaged("page.html.j2"))
    return template.render(
        css=Markup(css), js=Markup(js), css_hash=_hash(css), js_hash=_hash(js), page=page, **content(page)
    ).lstrip()


def write_report(page: Page, path: str | os.PathLike[str]) -> None:
    """Writes the report to `path`: all of it or, if anything fails, nothing."""
    write_atomically(Path(path), render(page).encode("utf-8"))


def _packaged(name: str) -> str:
    return resources.files("gradsieve.report").joinpath(name).read_text(encoding="utf-8")


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
