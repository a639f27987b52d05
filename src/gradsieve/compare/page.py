"""A summary → its files: one HTML page that asks nothing from anywhere, Markdown, CSV, and the figures as SVG."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from markupsafe import Markup

from gradsieve.atomic import write_atomically
from gradsieve.compare.cells import plan_cells
from gradsieve.compare.config import RANDOM, Config
from gradsieve.compare.figures import figures, overlap_name
from gradsieve.compare.leaks import Leak
from gradsieve.compare.records import read_finished, read_json
from gradsieve.compare.summary import Pair, Standing, Summary, summarise
from gradsieve.compare.tables import (
    SHOWN_LEAKS,
    effects_csv,
    expected_by_chance,
    generations,
    interval,
    leaks_words,
    markdown,
    pairs_csv,
    per_step,
    standings_csv,
    tally,
)
from gradsieve.compare.units import forgetting_words, gain_words, with_unit
from gradsieve.errors import DataError
from gradsieve.report import wording
from gradsieve.report.render import document, packaged

VIEWS = {
    "equal_steps": (
        "Equal steps",
        "Every arm takes the same number of optimizer steps of full batches, so small subsets repeat.",
    ),
    "equal_repetition": ("Equal repetition", "Every arm passes as often over what it chose, so small subsets take few steps."),
}


def write_reports(config: Config) -> Summary:
    """Writes report.html, summary.md, standings.csv, effects.csv, pairs.csv and figures/, from the finished cells alone.

    Where arms answered prompts there is generations.md too.

    Raises:
        DataError: The untouched model's cell is not finished, cells do not fit each other, or leaks.jsonl cannot be read.
    """
    study, cells = Path(config.out), plan_cells(config)
    found = [read_finished(study, cell) for cell in cells]
    finished = [one for one in found if one is not None]
    missing = [cell.name for cell, one in zip(cells, found, strict=True) if one is None]
    summary = summarise(finished, read_json(study / "comparison.json"), missing, config.resamples)
    drawn, leaks, questions = figures(summary), _leaks(study / "leaks.jsonl"), _questions(summary)
    (study / "figures").mkdir(exist_ok=True)
    files = {"report.html": render(summary, drawn, leaks), "summary.md": markdown(summary, list(drawn), leaks, bool(questions))}
    files |= {"generations.md": generations(summary.name, questions)} if questions else {}
    files |= {"standings.csv": standings_csv(summary), "effects.csv": effects_csv(summary), "pairs.csv": pairs_csv(summary)}
    files |= {f"figures/{name}.svg": svg for name, svg in drawn.items()}
    for name, text in files.items():
        write_atomically(study / name, text.encode("utf-8"))
    return summary


def render(summary: Summary, drawn: Mapping[str, str], leaks: Sequence[str] = ()) -> str:
    """Returns the page as one HTML document; the same summary gives the same text.

    Args:
        summary: What is said.
        drawn: Its figures.
        leaks: The lines of leaks.jsonl, in words.
    """
    values = {
        "s": summary,
        "figures": drawn,
        "headline": headline(summary),
        "lead": lead(summary),
        "numbers": _numbers(summary),
        "view_words": VIEWS,
        "questions": _questions(summary),
        "subsets": [(budget, name) for budget in summary.overlaps if (name := overlap_name(budget)) in drawn],
        "leaks": leaks[:SHOWN_LEAKS],
        "leaks_words": leaks_words(leaks),
        "expected": expected_by_chance(summary),
        "gain_words": gain_words(summary.gain_metric),
        "forgetting_words": forgetting_words(summary.forgetting_metric) if summary.forgetting_metric else "",
        "settings": _settings(summary.record["config"]),
        "versions": [*summary.record["versions"].items(), *summary.record["hardware"].items()],
    }
    filters: dict[str, Callable[..., object]] = {"interval": interval, "tally": tally, "per_step": per_step, "safe_svg": Markup}
    filters |= {"with_unit": with_unit}
    own = {name: packaged("gradsieve.compare", name) for name in ("page.html.j2", "page.css")}
    return document(own["page.html.j2"], values, filters, more_css=own["page.css"])


def headline(summary: Summary) -> str:
    """Returns how many arms taught the target better than chance, or kept the rest better, which a comparison is made for."""
    judged = _judged(summary)
    if not judged:
        return "Nothing can be judged yet"
    wins = sum(verdict == "win" for verdict in judged.values())
    if wins == 0 and (keeping := _keeping(summary)):
        return f"No method taught more than random, {len(keeping)} of {len(judged)} choices forgot less"
    if wins == 0:
        return "No method beat random"
    return f"{wins} of {len(judged)} choices beat random"


def lead(summary: Summary) -> str:
    """Returns the result in sentences."""
    judged = _judged(summary)
    if not judged:
        return (
            "A judgement needs a method besides the baselines, at least three seeds of it and of random, and two items of each "
            "target test."
        )
    by = {kind: [name for name, verdict in judged.items() if verdict == kind] for kind in ("win", "tie", "loss")}
    tests = wording.joined(summary.tests_of("target", summary.gain_metric))
    parts = [
        f"In {summary.gain_metric} of {tests}: better than random of the same budget: {wording.joined(by['win']) or 'none'}; "
        f"not told apart from it: {wording.joined(by['tie']) or 'none'}; worse: {wording.joined(by['loss']) or 'none'}."
    ]
    if summary.forgetting_metric:
        kept = wording.joined(_keeping(summary)) or "none"
        parts.append(f"In {summary.forgetting_metric} of the general tests better than random, and in gain not worse: {kept}.")
        front = [_name(summary, one) for one in summary.standings if one.on_front]
        beside = ", beside the untouched model" if all(summary.base_on_front.values()) else ""
        parts.append(f"On the front of gain and forgetting{beside}: {wording.joined(front) or 'none'}.")
    return " ".join(parts)


def _judged(summary: Summary) -> dict[str, str]:
    """Returns the verdict against random on the target tests of every choice of every method."""
    return {
        _name(summary, one): one.over_random.verdict
        for one in summary.standings
        if one.budget and one.over_random is not None and one.over_random.verdict != "unjudged"
    }


def _name(summary: Summary, one: Standing) -> str:
    return one.label + (f" ({one.view.replace('_', ' ')})" if len(summary.views()) > 1 else "")


def _keeping(summary: Summary) -> list[str]:
    """Returns the choices that forget less than random of the same budget and do not gain less."""
    better = {(one.view, one.arm, one.other) for view in summary.views() for one in summary.better(view) if _forgets_less(one)}
    random = {(one.view, one.budget): one.label for one in summary.standings if one.arm == RANDOM}
    found = [one for one in summary.standings if (one.view, one.label, random.get((one.view, one.budget))) in better]
    return [_name(summary, one) for one in found]


def _forgets_less(pair: Pair) -> bool:
    return pair.keeping is not None and pair.keeping.verdict == "win"


def _numbers(summary: Summary) -> list[tuple[str, str, str]]:
    config = summary.record["config"]
    done = sum(one.seeds for one in summary.standings) + 1
    trained, examined = wording.duration(summary.trained_seconds), wording.duration(summary.examined_seconds)
    best = max(summary.standings, key=lambda one: one.gain.mean, default=None)
    return [
        (str(len(config["arms"])), "arms", wording.joined([arm["name"] for arm in config["arms"]])),
        (str(len(config["seeds"])), "seeds", "of training, draws and, where the file asks, data"),
        (str(done), "finished cells", f"{len(summary.missing)} are missing" if summary.missing else "all of them"),
        (
            f"{best.gain.mean:+.3f}".replace("-", "−") if best else "–",
            with_unit("largest gain", summary.gain_metric),
            _name(summary, best) if best else "",
        ),
        (trained, "of training", f"and {examined} of evaluation"),
    ]


def _leaks(path: Path) -> list[str]:
    """Returns each line of leaks.jsonl in words; none where there is no such file."""
    if not path.exists():
        return []
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
        return [str(Leak(**json.loads(line))) for line in lines if line.strip()]
    except (OSError, ValueError, TypeError) as error:
        raise DataError(f"{path}: must have a leak a line, got {error}; remove it and run again") from None


def _questions(summary: Summary) -> list[dict[str, Any]]:
    """Returns the shown prompts, each with what every arm answered."""
    questions: dict[tuple[str, str], dict[str, Any]] = {}
    for arm, answers in summary.generations:
        for one in answers:
            new = {"prompt": one["prompt"], "reference": one["reference"], "answers": []}
            entry = questions.setdefault((one["test"], one["item"]), new)
            entry["answers"].append((arm, one["answer"]))
    return list(questions.values())


def _settings(config: Mapping[str, Any]) -> list[tuple[str, str]]:
    rows = [(name, _setting(value)) for name, value in config.items() if name not in ("arms", "tests", "tasks", "source")]
    rows += [(f"test {name}", _setting(test)) for name, test in (config["tests"] | config["tasks"]).items()]
    for arm in config["arms"]:
        own = {key: arm[key] for key in ("method", "settings", "budgets", "recipe") if arm[key] and arm[key] != arm["name"]}
        rows.append((f"arm {arm['name']}", _setting(own) or "its defaults"))
    return rows


def _setting(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {_setting(own)}" for key, own in value.items() if own not in (None, [], {}, ()))
    return wording.setting(value)
