"""What README and docs say is held against the code: settings, links, commands, Python."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import pytest

from gradsieve.cli import COMMANDS, run
from gradsieve.compare.command import Compare
from gradsieve.demo_run import Demo
from gradsieve.errors import InvalidArgument
from gradsieve.export import Export
from gradsieve.job import Job
from gradsieve.needs import asks_for
from gradsieve.outputs import Replay
from gradsieve.pipeline import find_method, method_class, select
from gradsieve.rebuild import Rebuild
from gradsieve.selectors import SELECTORS
from gradsieve.transfer import Transfer
from gradsieve.types import Budget

ROOT = Path(__file__).parents[1]
METHODS = ROOT / "docs" / "methods"
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
CARDS = sorted(path for path in METHODS.glob("*.md") if path.name != "README.md")

WITHOUT_CARD: frozenset[str] = frozenset()
CARD = {"orth-only": "ogs-static.md"}  # the others have a card of their name
DESCRIBED: dict[str, type] = {n: kind for n, kind in SELECTORS.items() if n not in WITHOUT_CARD}

HEADINGS = (
    "## Equations",
    "## Choices",
    "## Settings of `",
    "## Reads",
    "## Cost",
    "## When to use it, and when not",
    "## Run it",
)


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


def card_of(method: str) -> Path:
    return METHODS / CARD.get(method, f"{method}.md")


# -- cards --------------------------------------------------------------------------------------------------------------


def settings_of(page: str, method: str) -> dict[str, str] | None:
    """Returns the default of each setting that the page's table for a method names, None without such a section."""
    section = re.search(rf"^#+ Settings of `{re.escape(method)}`\n(.*?)(?=^#|\Z)", page, re.MULTILINE | re.DOTALL)
    if section is None:
        return None
    rows = re.findall(r"^\| `(\w+)` \| (?:`(.*?)`|(\(required\))) \|", section[1], re.MULTILINE)
    assert len(rows) == len({name for name, *_ in rows}), "a setting is named twice"
    return {name: default or required for name, default, required in rows}


def default_of(field: dataclasses.Field[Any]) -> str:
    return "(required)" if field.default is dataclasses.MISSING else str(field.default)


@pytest.mark.parametrize("method", sorted(SELECTORS))
def test_every_method_has_a_card_or_is_listed_without_one(method: str) -> None:
    assert card_of(method).exists() != (method in WITHOUT_CARD)


@pytest.mark.parametrize("method", sorted(DESCRIBED))
def test_a_card_names_exactly_the_settings_and_their_defaults(method: str) -> None:
    fields = {field.name: default_of(field) for field in dataclasses.fields(DESCRIBED[method])}
    assert settings_of(card_of(method).read_text(encoding="utf-8"), method) == fields


@pytest.mark.parametrize("method", sorted(DESCRIBED))
def test_a_card_cites_the_paper_that_the_method_cites(method: str) -> None:
    source = DESCRIBED[method].source  # type: ignore[attr-defined]
    page = " ".join(card_of(method).read_text(encoding="utf-8").split())
    cited = re.findall(r"arXiv:[\d.]+|\w+ et al\. \d{4}", source)
    assert [name for name in cited if name not in page] == []


@pytest.mark.parametrize("card", CARDS, ids=name_of)
def test_a_card_has_every_section_in_order_and_is_short(card: Path) -> None:
    lines = card.read_text(encoding="utf-8").splitlines()
    headings = [line for line in lines if line.startswith("## ")]
    assert all(line.startswith(start) for line, start in zip(headings, HEADINGS, strict=False))
    assert len(headings) >= len(HEADINGS)
    assert len(lines) < 120


def test_every_card_belongs_to_a_method_and_the_index_lists_every_method() -> None:
    assert set(CARDS) == {card_of(method) for method in DESCRIBED}
    index = (METHODS / "README.md").read_text(encoding="utf-8")
    listed = dict(re.findall(r"^\| `([\w-]+)` \| \[.*?\]\(([\w-]+\.md)", index, re.MULTILINE))
    assert listed == {method: card_of(method).name for method in DESCRIBED}


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_inside_the_repository_lead_somewhere(page: Path) -> None:
    for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        if "://" not in link:
            assert (page.parent / link.partition("#")[0]).exists(), link


def test_the_settings_of_a_page_without_a_section_are_unknown_and_not_empty() -> None:
    page = "## Settings of `one`\n\n| name | default | meaning |\n|---|---|---|\n| `a` | `1` | x |\n| `b` | (required) | x |\n"
    assert settings_of(page, "one") == {"a": "1", "b": "(required)"}
    assert settings_of(page, "two") is None


# -- commands -----------------------------------------------------------------------------------------------------------


def commands(text: str) -> Iterator[str]:
    """Yields every `gradsieve …` command of a page: lines of code blocks, and code in a sentence."""
    text = text.replace("\\\n", " ")
    fences = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
    blocks = [body for language, body in fences.findall(text) if language != "python"]
    prose = fences.sub("", text)
    blocks += re.findall(r"^ {4}(.*)$", prose, re.MULTILINE)
    for line in "\n".join(blocks).splitlines():
        if re.match(r"(?:\$ )?gradsieve\s", line.strip()):
            yield line.strip().removeprefix("$ ")
    yield from (" ".join(code.split()) for code in re.findall(r"`(gradsieve\s[^`]+)`", prose))


def words_of(command: str) -> list[str]:
    return [word for word in shlex.split(command, comments=True) if word != "…"][1:]


def flags_of(kind: type) -> set[str]:
    return {"--" + field.name.replace("_", "-") for field in dataclasses.fields(kind)}


def allowed_flags(words: list[str]) -> set[str]:
    """Returns the flags that a command knows."""
    command = words[0]
    if command in ("select", "estimate"):
        method = words[1] if len(words) > 1 else "METHOD"
        if method in ("METHOD", "package.module:Class"):
            own = set()
        else:
            own = flags_of(method_class(method))  # an error that names the method, where there is none
        return flags_of(Job) | own | {"--out", "--config", "--help"}
    known = {
        "demo": flags_of(Demo),
        "extract": flags_of(Job) | {"--config", "--check"},
        "replay": flags_of(Replay),
        "export": flags_of(Export),
        "report": flags_of(Rebuild),
        "compare": flags_of(Compare),
        "transfer": flags_of(Transfer) | {"--config"},
    }
    return known.get(command, set()) | {"--help"}


def shown() -> list[Any]:
    found = ((page, command) for page in PAGES for command in commands(page.read_text(encoding="utf-8")))
    return [pytest.param(command, id=f"{name_of(page)}: {command}") for page, command in found]


@pytest.mark.parametrize("command", shown())
def test_a_command_that_is_shown_exists_and_knows_its_flags(command: str) -> None:
    words = words_of(command)
    assert words[0] in {*COMMANDS, "--help", "--version", "COMMAND"}
    assert {word.partition("=")[0] for word in words if word.startswith("--")} <= allowed_flags(words)


class Accepted(Exception):
    """The arguments got as far as the job itself."""


def accept(method: Any, *, settings: Any = None, budget: Any = "5%", **job: Any) -> None:
    """Stands for `gradsieve.select`: checks what can be checked without reading anything."""
    find_method(method, settings)
    Budget.parse(budget)
    unknown = set(job) - {field.name for field in dataclasses.fields(Job)} - set(inspect.signature(select).parameters)
    if unknown:
        raise InvalidArgument(f"arguments must be fields of Job, got {unknown}")


def written_out() -> list[Any]:
    """Returns the `select` commands that could be typed as they stand."""
    params = [param for param in shown() if not {"…", "--config", "--help"} & set(shlex.split(param.values[0], comments=True))]
    return [param for param in params if words_of(param.values[0])[:1] == ["select"] and words_of(param.values[0])[1:]]


@pytest.mark.parametrize("command", written_out())
def test_a_select_that_is_written_out_is_accepted(
    command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def stand_in(*args: Any, **kwargs: Any) -> None:
        accept(*args, **kwargs)
        raise Accepted

    monkeypatch.setattr("gradsieve.pipeline.select", stand_in)
    with pytest.raises(Accepted):
        assert run(words_of(command)) == 0, capsys.readouterr().err


def test_commands_are_found_in_blocks_and_in_sentences() -> None:
    block = "    gradsieve demo --seed 1  # quick"
    fence = "```console\n$ gradsieve select less \\\n  --dim 64\n```"
    found = [words_of(command) for command in commands(f"Say `gradsieve methods`, or\n\n{block}\n\n{fence}\n")]
    assert found == [["select", "less", "--dim", "64"], ["demo", "--seed", "1"], ["methods"]]
    assert "--rates" in allowed_flags(["select", "less"])
    assert "--rates" not in allowed_flags(["select", "random"])
    assert "--dim" not in allowed_flags(["demo"])


# -- Python -------------------------------------------------------------------------------------------------------------


def python_blocks() -> list[Any]:
    found = []
    for page in PAGES:
        for i, block in enumerate(
            re.findall(r"^```python\n(.*?)^```$", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
        ):
            found.append(pytest.param(block, id=f"{name_of(page)}: {i}"))
    return found


@pytest.mark.parametrize("block", python_blocks())
def test_python_that_is_shown_parses_and_runs_with_select_stood_in(
    block: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    ast.parse(block)

    def stand_in(*args: Any, **kwargs: Any) -> MagicMock:
        accept(*args, **kwargs)
        return MagicMock()

    monkeypatch.setattr("gradsieve.pipeline.select", stand_in)
    monkeypatch.chdir(tmp_path)
    exec(compile(block, "block", "exec"), {"__name__": "block"})


def test_the_pages_show_python_and_every_card_a_command_or_a_reason() -> None:
    assert python_blocks()
    for card in CARDS:
        text = card.read_text(encoding="utf-8")
        assert "```python" in text, card.name
        assert re.search(rf"^    gradsieve select {card.stem} ", text, re.MULTILINE)


def test_the_readmes_table_of_methods_is_that_of_the_code() -> None:
    """Where this fails, put the rows that it prints between the two marks."""
    rows = ["| method | needs | reads | picks by | cost | source |", "|---|---|---|---|---|---|"]
    for name, kind in SELECTORS.items():
        page = card_of(name).relative_to(ROOT)
        cells = (getattr(kind, column) for column in ("reads", "picks_by", "cost", "source"))
        rows.append(f"| [`{name}`]({page}) | {asks_for(kind())} | {' | '.join(cells)} |")
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    found = re.search(r"<!-- methods -->\n\n(.*?)\n\n<!-- /methods -->", readme, re.DOTALL)
    assert found is not None
    assert found[1] == "\n".join(rows), "\n".join(rows)
