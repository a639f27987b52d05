"""A summary as tables: CSV of every effect, Markdown of where each arm stands."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence

from gradsieve.compare.config import BASE, FULL, RANDOM
from gradsieve.compare.statistics import Estimate
from gradsieve.compare.summary import Standing, Summary
from gradsieve.report.wording import duration, joined

COMPARED = (BASE, RANDOM, FULL)


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


def markdown(summary: Summary) -> str:
    """Returns where each arm stands, view by view, and what must be known."""
    lines = [f"# {summary.name}", "", *_legend(summary), ""]
    for view in summary.views():
        lines += [f"## {view.replace('_', ' ').capitalize()}", "", *_standings(summary, view), "", *_dominations(summary, view)]
        for metric in _metrics(summary):
            lines += [f"### {metric}", "", *_effects(summary, view, metric), ""]
    if summary.notes:
        lines += ["## Notes", "", *(f"- {note}" for note in summary.notes), ""]
    return "\n".join(lines)


def interval(found: Estimate | None, *, verdict: bool = False) -> str:
    """Returns `+0.031 [+0.012, +0.050]`, with its verdict on request; `–` for None."""
    if found is None:
        return "–"
    digits = max(2, min(4, 2 - _power(max(abs(found.low), abs(found.high), abs(found.mean)))))
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
    lines = [f"Gain: {summary.gain_metric} of {tests['target']} against the untouched model, higher is better."]
    if summary.forgetting_metric:
        lines.append(f"Forgetting: {summary.forgetting_metric} of {tests['general']}, lower is better.")
    lines.append("Brackets: 95 % intervals over items and seeds. A tie is an interval that holds 0. Seconds are per cell.")
    return [" ".join(lines)]


def _standings(summary: Summary, view: str) -> list[str]:
    header = ["arm", "examples", "steps", "gain", "over random", "forgetting", "on the front"]
    header += ["against random", "against full", "selecting", "training", "a step"]
    rows = []
    for one in (one for one in summary.standings if one.view == view):
        front = "–" if one.front_share != one.front_share else f"{'yes' if one.on_front else 'no'} ({one.front_share:.0%})"
        selecting = one.seconds["gradients"] + one.seconds["select"]
        rows.append(
            [one.label, f"{one.examples:.0f}", f"{one.steps:.0f}", interval(one.gain), interval(one.over_random, verdict=True)]
            + [interval(one.forgetting), front, tally(one, RANDOM), tally(one, FULL)]
            + [duration(selecting), duration(one.seconds["train"]), per_step(one)]
        )
    return _table(header, rows)


def _dominations(summary: Summary, view: str) -> list[str]:
    rows = [[one.arm, one.other, interval(one.gain), interval(one.keeping)] for one in summary.better(view)]
    if not rows:
        return []
    said = (
        f"{len(rows)} of {summary.pairs_of(view)} pairs (pairs.csv has all). Each interval stands for itself: of twenty pairs "
        "without a difference one is expected here."
    )
    title = "### Better in gain or forgetting, and not worse in the other"
    return [title, "", said, "", *_table(["arm", "than", "gains more by", "forgets less by"], rows), ""]


def _metrics(summary: Summary) -> list[str]:
    return list(dict.fromkeys(effect.metric for effect in summary.effects))


def _effects(summary: Summary, view: str, metric: str) -> list[str]:
    own = [effect for effect in summary.effects if (effect.view, effect.metric) == (view, metric)]
    rows = [
        [effect.label, effect.test, f"{effect.base:.4g} → {effect.mean:.4g}", interval(effect.against[BASE], verdict=True)]
        + [interval(effect.against[name], verdict=True) for name in (RANDOM, FULL)]
        for effect in own
    ]
    return _table(["arm", "test", "base → arm", "better than base by", "than random", "than full"], rows)


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    safe = [[cell.replace("|", "\\|") for cell in row] for row in rows]
    return [f"| {' | '.join(header)} |", f"|{'---|' * len(header)}", *(f"| {' | '.join(row)} |" for row in safe)]
