"""A summary as tables: CSV of every effect, Markdown of where each arm stands and of what it answers.

Names, notes and answers come from data and configuration: in Markdown they are text, whatever they hold (`escaped`).
"""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Collection, Mapping, Sequence
from itertools import pairwise
from typing import Any

from gradsieve.compare.config import BASE, FULL, RANDOM
from gradsieve.compare.statistics import Estimate
from gradsieve.compare.summary import Standing, Summary
from gradsieve.compare.units import forgetting_words, gain_words, unit, with_unit
from gradsieve.report.wording import duration, joined, visible

COMPARED = (BASE, RANDOM, FULL)
PICTURES = {
    "pareto": "Gain against forgetting",
    "gain": "Gain by budget",
    "forgetting": "Forgetting by budget",
    "cost": "What a cell takes",
    "overlap": "What subsets share",
}
"""What each kind of figure shows; its name begins with the kind."""

SHOWN_LEAKS = 8
_SPECIAL = {ord(c): f"\\{c}" for c in "\\`*[]|~#"} | {ord("&"): "&amp;", ord("<"): "&lt;", ord(">"): "&gt;", ord("$"): "&#36;"}


def effects_csv(summary: Summary) -> str:
    """Returns every effect, one a line; differences are turned so that higher is better."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    parts = [f"{what}_{name}" for name in COMPARED for what in ("minus", "low", "high", "verdict")]
    writer.writerow(["view", "arm", "budget", "seeds", "test", "role", "metric", "mean", "base_mean", *parts])
    for effect in summary.effects:
        first = effect.against[BASE]
        row: list[object] = [effect.view, effect.arm, effect.budget or "", first.seeds if first else ""]
        row += [effect.test, effect.role, effect.metric, effect.mean, effect.base]
        for name in COMPARED:
            found = effect.against[name]
            row += ["", "", "", ""] if found is None else [found.mean, found.low, found.high, found.verdict]
        writer.writerow(row)
    return out.getvalue()


def pairs_csv(summary: Summary) -> str:
    """Returns every two arms, one pair a line: by how much the first gains more and forgets less."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    parts = [f"{what}_{name}" for name in ("gain", "keeping") for what in ("minus", "low", "high", "verdict")]
    writer.writerow(["view", "arm", "other", "seeds", *parts])
    for pair in summary.pairs:
        row: list[object] = [pair.view, pair.arm, pair.other, pair.gain.seeds]
        for found in (pair.gain, pair.keeping):
            row += ["", "", "", ""] if found is None else [found.mean, found.low, found.high, found.verdict]
        writer.writerow(row)
    return out.getvalue()


def standings_csv(summary: Summary) -> str:
    """Returns where each arm stands and what it cost, one a line; forgetting is turned so that lower is better."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    parts = [f"{name}{end}" for name in ("gain", "over_random", "forgetting") for end in ("", "_low", "_high")]
    seconds = ["gradients", "select", "train", "surgery", "evaluate"]
    costs = [*(f"{name}_seconds" for name in seconds), "step_seconds", "surgery_step_seconds"]
    writer.writerow(["view", "arm", "budget", "seeds", "examples", "steps", *parts, "on_front", "front_share", *costs])
    for one in summary.standings:
        row: list[object] = [one.view, one.arm, one.budget or "", one.seeds, one.examples, one.steps]
        for found in (one.gain, one.over_random, one.forgetting):
            row += ["", "", ""] if found is None else [found.mean, found.low, found.high]
        row += [one.on_front, one.front_share, *(one.seconds[name] for name in seconds), *one.step_seconds]
        writer.writerow(row)
    return out.getvalue()


def markdown(summary: Summary, drawn: Collection[str] = (), leaks: Sequence[str] = (), answers: bool = False) -> str:
    """Returns where each arm stands, view by view, and what must be known.

    Args:
        summary: What is said.
        drawn: Names of the figures beside it, which it shows.
        leaks: The lines of the leaks.jsonl beside it, in words.
        answers: Whether generations.md is beside it.
    """
    lines = [f"# {escaped(summary.name)}", "", *_legend(summary), ""]
    for view in summary.views():
        lines += [f"## {view.replace('_', ' ').capitalize()}", "", *_standings(summary, view), ""]
        lines += _pictures([name for name in drawn if name.endswith(f"-{view}")])
        lines += _dominations(summary, view)
        for metric in _metrics(summary):
            lines += [
                f"### {escaped(metric)}{f', {unit(metric)}' if unit(metric) else ''}",
                "",
                *_effects(summary, view, metric),
                "",
            ]
    overlaps = [name for name in drawn if name.startswith("overlap-")]
    if overlaps:
        lines += ["## What they chose", "", *_pictures(overlaps)]
    if answers:
        lines += ["## What they answer", "", "The same prompts, answered by every arm: [generations.md](generations.md).", ""]
    if leaks:
        lines += ["## Leaks", "", leaks_words(leaks) + " All are in [leaks.jsonl](leaks.jsonl).", ""]
        lines += [*(f"- {escaped(leak)}" for leak in leaks[:SHOWN_LEAKS]), ""]
    if summary.notes:
        lines += ["## Notes", "", *(f"- {escaped(note)}" for note in summary.notes), ""]
    return "\n".join(lines)


def generations(name: str, questions: Sequence[Mapping[str, Any]]) -> str:
    """Returns the shown prompts, each with its reference and what every arm answered, as Markdown."""
    said = "The same prompts, answered greedily by each arm's first model: to look at, not to judge by."
    lines = [f"# What they answer: {escaped(name)}", "", said, ""]
    for number, question in enumerate(questions, 1):
        lines += [f"## Prompt {number}", "", *_quoted(question["prompt"]), ""]
        for who, text in [("Reference", question["reference"]), *question["answers"]]:
            lines += [f"**{escaped(who)}**", "", *_quoted(text or "(nothing)"), ""]
    return "\n".join(lines)


def leaks_words(leaks: Sequence[str]) -> str:
    """Returns how many leaks there are, and how many of them are shown."""
    more = f", of which {SHOWN_LEAKS} are shown" if len(leaks) > SHOWN_LEAKS else ""
    what = "example was" if len(leaks) == 1 else "examples were"
    return f"{len(leaks)} {what} found on both sides of a wall and dropped{more}."


def escaped(text: str) -> str:
    """Returns text as one line of Markdown that shows it, whatever it holds: no markup, no HTML, no control character."""
    line = re.sub(r"\s*\n\s*", " ", visible(text).strip()).translate(_SPECIAL)
    line = re.sub(r"(?<!\w)_|_(?!\w)", r"\\_", line)
    return re.sub(r"^([-+=]|\d+(?=[.)]))", lambda m: f"{m[0]}\\" if m[0].isdigit() else f"\\{m[0]}", line)


def _quoted(text: str) -> list[str]:
    """Returns text as a quotation that keeps its lines."""
    lines = visible(text).expandtabs(4).split("\n")
    shown = ["&nbsp;" * (len(line) - len(line.lstrip())) + escaped(line) for line in lines]
    breaks = ["\\" if one.strip() and next_one.strip() else "" for one, next_one in pairwise([*lines, ""])]
    return [f"> {line}{ending}" for line, ending in zip(shown, breaks, strict=True)]


def _pictures(drawn: Sequence[str]) -> list[str]:
    return [line for name in drawn for line in (f"![{PICTURES[name.partition('-')[0]]}](figures/{name}.svg)", "")]


def interval(found: Estimate | None, *, verdict: bool = False) -> str:
    """Returns `+0.031 [+0.012, +0.050]`, with its verdict on request; `–` for None."""
    if found is None:
        return "–"
    three = 2 - _power(max(abs(found.low), abs(found.high), abs(found.mean)))
    digits = max(2, min(4, three), three - 1)  # three of the largest number; two where it is small
    text = f"{found.mean:+.{digits}f} [{found.low:+.{digits}f}, {found.high:+.{digits}f}]".replace("-", "−")
    return f"{text} {found.verdict}" if verdict else text


def _power(value: float) -> int:
    power = 0
    while value and value < 1 and power > -6:
        value, power = value * 10, power - 1
    return power


def per_step(standing: Standing) -> str:
    """Returns what an optimizer step took: `0.21 s`, with surgery `0.21 s (surgery 0.080 s)`."""
    step, surgery = standing.step_seconds
    return f"{duration(step)} (surgery {duration(surgery)})" if surgery else duration(step)


def tally(standing: Standing, other: str) -> str:
    """Returns `2 wins, 9 ties, 1 loss`; `–` where there was nothing to compare with."""
    words = {"win": ("win", "wins"), "tie": ("tie", "ties"), "loss": ("loss", "losses"), "unjudged": ("unjudged", "unjudged")}
    counts = standing.verdicts[other]
    return joined([f"{count} {words[kind][count != 1]}" for kind, count in counts.items() if count]) or "–"


def _legend(summary: Summary) -> list[str]:
    tests = {role: joined([t for t, own in summary.roles.items() if own == role]) for role in ("target", "general")}
    lines = [f"{escaped(gain_words(summary.gain_metric))} (here {escaped(tests['target'])}); higher is better."]
    if summary.forgetting_metric:
        words = escaped(forgetting_words(summary.forgetting_metric))
        lines.append(f"{words} (here {escaped(tests['general'])}); lower is better.")
    lines.append("Brackets: 95 % intervals over items and seeds. A tie is an interval that holds 0. Seconds are per cell.")
    return [" ".join(lines)]


def _standings(summary: Summary, view: str) -> list[str]:
    gain, forgetting = summary.gain_metric, summary.forgetting_metric or ""
    header = ["arm", with_unit("gain", gain), with_unit("over random", gain), "against random", "against full"]
    header += [with_unit("forgetting", forgetting), "on the front", "examples", "steps", "selecting", "training", "a step"]
    rows = []
    for one in (one for one in summary.standings if one.view == view):
        front = "–" if one.front_share != one.front_share else f"{'yes' if one.on_front else 'no'} ({one.front_share:.0%})"
        selecting = one.seconds["gradients"] + one.seconds["select"]
        rows.append(
            [
                escaped(one.label),
                interval(one.gain),
                interval(one.over_random, verdict=True),
                tally(one, RANDOM),
                tally(one, FULL),
            ]
            + [interval(one.forgetting), front, f"{one.examples:.0f}", f"{one.steps:.0f}"]
            + [duration(selecting), duration(one.seconds["train"]), per_step(one)]
        )
    return _table(header, rows)


def _dominations(summary: Summary, view: str) -> list[str]:
    rows = [[escaped(one.arm), escaped(one.other), interval(one.gain), interval(one.keeping)] for one in summary.better(view)]
    if not rows:
        return []
    said = (
        f"{len(rows)} of {summary.pairs_of(view)} pairs (pairs.csv has all). Each interval stands for itself: of twenty pairs "
        f"without a difference {expected_by_chance(summary)} expected here."
    )
    title = "### Better in gain or forgetting, and not worse in the other"
    gain, forgetting = summary.gain_metric, summary.forgetting_metric or ""
    header = ["arm", "than", with_unit("gains more by", gain), with_unit("forgets less by", forgetting)]
    return [title, "", said, "", *_table(header, rows), ""]


def expected_by_chance(summary: Summary) -> str:
    """Returns how many of twenty pairs without a difference one of the intervals is expected to tell apart: 5 % for each."""
    return "about two are" if summary.forgetting_metric else "one is"


def _metrics(summary: Summary) -> list[str]:
    return list(dict.fromkeys(effect.metric for effect in summary.effects))


def _effects(summary: Summary, view: str, metric: str) -> list[str]:
    own = [effect for effect in summary.effects if (effect.view, effect.metric) == (view, metric)]
    rows = [
        [
            escaped(effect.label),
            escaped(effect.test),
            f"{effect.base:.4g} → {effect.mean:.4g}",
            interval(effect.against[BASE], verdict=True),
        ]
        + [interval(effect.against[name], verdict=True) for name in (RANDOM, FULL)]
        for effect in own
    ]
    return _table(["arm", "test", "base → arm", "better than base by", "than random", "than full"], rows)


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    return [f"| {' | '.join(header)} |", f"|{'---|' * len(header)}", *(f"| {' | '.join(row)} |" for row in rows)]
