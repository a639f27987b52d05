"""The page and the Markdown beside it: what they link to is there, what they show of data is text."""

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from markdown_it import MarkdownIt

from gradsieve.compare.figures import figures
from gradsieve.compare.page import render, write_reports
from gradsieve.compare.records import read_json
from gradsieve.compare.run import Comparison
from gradsieve.compare.summary import Summary
from gradsieve.compare.tables import escaped, generations, markdown
from gradsieve.errors import DataError
from gradsieve.report.wording import visible

HOSTILE = "</p><script>hit()</script> | a | `b` **c** [d](e) ![f](g) _h_ $i$ &amp;\n\n# j\n- k\x1b[31m\x00"
LEAK = {
    "kind": "near", "similarity": 0.9, "side": "pool", "id": HOSTILE, "origin": "pool.jsonl:1",
    "other_side": "test law", "other_id": "l0", "other_origin": "law.jsonl:1",
}  # fmt: skip


@pytest.fixture
def study(finished: Comparison, tmp_path: Path) -> Path:
    """A finished comparison's folder that a test may change."""
    shutil.copytree(finished.study, tmp_path / "study", ignore=shutil.ignore_patterns("stores"))
    return tmp_path / "study"


def rewritten(finished: Comparison, study: Path) -> Summary:
    return write_reports(replace(finished.config, out=str(study)))


def linked(text: str) -> set[str]:
    return set(re.findall(r"\]\(([^)]+)\)", text))


def test_summary_md_shows_the_figures_and_links_only_to_what_is_beside_it(finished: Comparison, study: Path) -> None:
    text = (study / "summary.md").read_text()
    names = {f"figures/{path.name}" for path in (study / "figures").iterdir()}
    assert len(names) == 5
    assert linked(text) == names | {"generations.md"}
    assert "![Gain against forgetting](figures/pareto-equal_steps.svg)" in text
    assert all((study / name).exists() for name in linked(text))
    for path in study.glob("cells/*/generations.json"):  # as where a study's texts are not kept
        path.unlink()
    (study / "generations.md").unlink()
    rewritten(finished, study)
    assert linked((study / "summary.md").read_text()) == names
    assert not (study / "generations.md").exists()
    assert "generations.md" not in (study / "report.html").read_text()


def test_generations_md_holds_every_answer_as_text(finished: Comparison, study: Path) -> None:
    text = (study / "generations.md").read_text()
    asked = read_json(study / "cells" / "base" / "generations.json")
    assert text.count("## Prompt ") == len(asked) > 0
    assert text.count("**Reference**") == text.count("**base**") == text.count("**agem 25%**") == len(asked)
    questions = [{"prompt": HOSTILE, "reference": "1. one\n    two\n\nthree", "answers": [("a", HOSTILE), ("b", "")]}]
    text = generations(HOSTILE, questions)
    assert no_markup(text)
    assert "hit()&lt;/script&gt; \\| a" in text
    assert "> 1\\. one\\\n> &nbsp;&nbsp;&nbsp;&nbsp;two\n> \n> three\n" in text
    assert text.endswith("**b**\n\n> (nothing)\n")


def no_markup(text: str) -> bool:
    """Whether a Markdown reader sees `HOSTILE` as text wherever it stands, and nothing but what we write as markup."""
    tokens = MarkdownIt("commonmark", {"html": True}).enable("table").parse(text)
    inner = [child for token in tokens for child in token.children or []]
    kinds = {token.type.removesuffix("_open").removesuffix("_close") for token in [*tokens, *inner]}
    ours = {"heading", "inline", "text", "paragraph", "blockquote", "hardbreak", "softbreak", "strong", "link"}
    ours |= {"bullet_list", "list_item", "table", "thead", "tbody", "tr", "th", "td"}
    links = {str(child.attrs["href"]) for child in inner if child.type == "link_open"}
    read = ["".join(child.content for child in token.children or []) for token in tokens if token.type == "inline"]
    flat = " ".join(visible(HOSTILE).split())
    return (
        kinds <= ours
        and links <= {"leaks.jsonl"}
        and any(flat in one for one in read)
        and not re.search("[\x00-\x09\x0b-\x1f]", text)
    )


def test_hostile_text_is_escaped_in_markdown(finished: Comparison, study: Path) -> None:
    summary = rewritten(finished, study)
    arms = [replace(one, arm=HOSTILE) for one in summary.standings]
    effects = [replace(one, arm=HOSTILE, test=HOSTILE) for one in summary.effects]
    pairs = [replace(one, arm=HOSTILE, other=HOSTILE) for one in summary.pairs]
    bad = replace(
        summary, name=HOSTILE, notes=[HOSTILE], roles={HOSTILE: "target"}, standings=arms, effects=effects, pairs=pairs
    )
    text = markdown(bad, [], [HOSTILE])
    assert no_markup(text)
    for table in re.findall(r"(?:^\|.*\n)+", text, re.M):
        cells = [len(re.findall(r"(?<!\\)\|", row)) for row in table.splitlines()]
        assert len(set(cells)) == 1  # no row has more cells than the header
    assert escaped("key_accuracy of a_b") == "key_accuracy of a_b"
    assert (escaped("- a"), escaped("12. a"), escaped("a - b 1.5")) == ("\\- a", "12\\. a", "a - b 1.5")


def test_the_page_forbids_what_it_does_not_need_and_holds_hostile_text_as_text(finished: Comparison, study: Path) -> None:
    summary = replace(rewritten(finished, study), notes=[HOSTILE])
    page = render(summary, figures(summary), [HOSTILE])
    head = page[: page.index("</head>")]
    (policy,) = re.findall(r'<meta http-equiv="Content-Security-Policy" content="([^"]+)">', head)
    assert policy.startswith("default-src 'none'; style-src 'sha256-")
    assert head.index("Content-Security-Policy") < head.index("<style>")
    assert "unsafe" not in policy
    assert "<script" not in page
    assert "\x1b" not in page
    assert page.count("&lt;/p&gt;&lt;script&gt;hit()") == 2


def test_leaks_are_counted_and_the_first_are_shown(finished: Comparison, study: Path) -> None:
    assert "Leaks" not in (study / "summary.md").read_text() + (study / "report.html").read_text()
    lines = [json.dumps(LEAK | {"id": f"p{i}"}) for i in range(11)]
    (study / "leaks.jsonl").write_text("\n".join(lines) + "\n")
    rewritten(finished, study)
    for name in ("summary.md", "report.html"):
        text = (study / name).read_text()
        assert "11 examples were found on both sides of a wall and dropped, of which 8 are shown." in text
        assert [f"(p{i})" in text for i in range(11)] == [True] * 8 + [False] * 3
    assert "leaks.jsonl" in linked((study / "summary.md").read_text())
    assert '<a href="leaks.jsonl">' in (study / "report.html").read_text()
    (study / "leaks.jsonl").write_text('{"kind": "near"}\n')
    with pytest.raises(DataError, match=r"leaks\.jsonl: must have a leak a line"):
        rewritten(finished, study)


def test_the_main_result_comes_first_and_columns_have_units(finished: Comparison, study: Path) -> None:
    page = (study / "report.html").read_text()
    heads = re.findall(r"<th[^>]*>([^<]+)</th>", page[: page.index("</thead>")])
    expected = ["arm", "gain (nats per token)", "gain over random (nats per token)", "against random", "against full"]
    assert heads == [*expected, "forgetting (nats per token)", "on the front (of draws)", "examples", "steps", "a step"]
    text = (study / "summary.md").read_text()
    row = next(line for line in text.splitlines() if line.startswith("| arm"))
    assert row.startswith(
        f"| {' | '.join(expected).replace('gain over', 'over')} | forgetting (nats per token) | on the front |"
    )
    assert "### key_accuracy, share" in text
    assert "key_accuracy (share)" in page
    arms = [line.split(" | ")[0][2:] for line in text.splitlines() if line.startswith("| ")]
    assert arms.count("less 25%") > 1


def test_what_was_chosen_is_left_out_where_one_arm_chose(finished: Comparison, study: Path) -> None:
    summary = rewritten(finished, study)
    assert "What they chose" in render(summary, figures(summary))
    alone = replace(summary, overlaps={"25%": (["random"], [[1.0]])})
    assert "What they chose" not in render(alone, figures(alone))
    assert "What they chose" not in markdown(alone, list(figures(alone)))


def test_a_committed_study_keeps_what_its_summary_links_to() -> None:
    results = Path(__file__).parents[2] / "studies" / "results"
    ignored = (results / ".gitignore").read_text().split()
    assert {"generations.md", "leaks.jsonl", "figures/", "summary.md"}.isdisjoint(ignored)
    for path in results.glob("*/summary.md"):
        assert all((path.parent / name).exists() for name in linked(path.read_text())), path
