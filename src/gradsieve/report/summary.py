"""The top of the page: what was chosen and why, in three sentences and five numbers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from gradsieve.report import facts, wording
from gradsieve.report.figures import Floats
from gradsieve.report.page import Page, Stage


@dataclass(frozen=True, slots=True)
class Number:
    """One of the numbers under the headline: `value` large, `name` under it, `beside` for comparison."""

    value: str
    name: str
    beside: str


def headline(page: Page) -> str:
    """Returns the title: who chose how many of how many."""
    return f"{page.method} chose {len(page.order):,} of {wording.counted(len(page.ids), 'example')}"


def sentences(page: Page, values: Mapping[str, Floats]) -> list[str]:
    """Returns what was chosen, what the method picks by, and how the chosen examples differ from the pool."""
    others = [f"{wording.counted(source.size, f'{source.role} example')}" for source in page.sources[1:] if source.size]
    what = (
        f"They come from the {wording.counted(len(page.ids), 'usable example')} of {page.sources[0].name}, within a budget of "
        f"{page.budget}, for {page.model}{', measured against ' if others else ''}{wording.joined(others)}."
    )
    return [what, f"{page.method} picks by {page.picks_by}.", _difference(page, values)]


def _difference(page: Page, values: Mapping[str, Floats]) -> str:
    chosen = page.chosen
    if not chosen.any():
        return "Nothing was chosen, so there is nothing to compare with the pool."
    if chosen.all():
        return "Everything was chosen, so the selection differs from the pool in nothing but its order and weights."
    differ: list[str] = []
    alike: list[str] = []
    agreement = next((name for name in ("utility", "cos/target") if name in values), None)
    for name in [agreement] if agreement else []:
        _add(differ, alike, facts.compare(name, values[name], chosen))
    conflict = next((name for name in ("overlap", "risk", "conflict") if name in values), None)
    if conflict == "overlap":
        _add(differ, alike, facts.compare(conflict, values[conflict], chosen))
    elif conflict:
        before, after = _share_above_zero(values[conflict]), _share_above_zero(values[conflict][chosen])
        shares = f"{wording.percent(after)} of them, {wording.percent(before)} of the pool"
        if abs(after - before) >= 0.01:
            often = "less" if after < before else "more"
            differ.append(f"push against general knowledge {often} often ({shares})")
        else:
            alike.append("conflict")
    length = "tokens" if "tokens" in values else "completion_tokens"
    for name in [name for name in ("loss", length, "score") if name in values][: 3 - bool(conflict)]:
        _add(differ, alike, facts.compare(name, values[name], chosen))
    if differ:
        tail = f"; in {wording.joined(alike)} they are much like it" if alike else ""
        return f"Against the whole pool, the chosen examples {wording.joined(differ)}{tail}."
    if alike:
        return f"In {wording.joined(alike)} the chosen examples are much like the whole pool."
    return "The method read no number by which the chosen examples could be compared with the pool."


def _add(differ: list[str], alike: list[str], c: facts.Comparison) -> None:
    label = wording.label(c.name)
    if np.isnan(c.chosen[1]):
        return
    if c.differs == 0:
        alike.append(label.name)
    else:
        verb = label.more if c.differs > 0 else label.less
        differ.append(f"{verb} (median {label.name} {wording.number(c.chosen[1])}, pool {wording.number(c.pool[1])})")


def _share_above_zero(v: Floats) -> float:
    finite = v[np.isfinite(v)]
    return float(np.mean(finite > 0)) if len(finite) else float("nan")


def five_numbers(page: Page, values: Mapping[str, Floats]) -> list[Number]:
    """Returns the five most telling numbers there are, fewer where the method read too little for five."""
    chosen, k, n = page.chosen, len(page.order), len(page.ids)
    numbers = [Number(f"{k:,}", "examples chosen" if k != 1 else "example chosen", f"of {n:,}, or {wording.percent(k / n)}")]
    if "tokens" in values:
        tokens = np.nan_to_num(values["tokens"])
        share = wording.percent(float(tokens[chosen].sum() / tokens.sum())) if tokens.sum() else "–"
        each = f"; {tokens[chosen].mean():,.0f} an example, {tokens.mean():,.0f} in the pool" if k else ""
        numbers.append(Number(f"{tokens[chosen].sum():,.0f}", "tokens to train on", f"{share} of the pool’s{each}"))
    agreement = next((name for name in ("utility", "cos/target") if name in values), None)
    conflict = next((name for name in ("overlap", "risk", "conflict") if name in values), None)
    medians, place = [agreement] if agreement else [], len(numbers)
    if conflict == "overlap":
        medians.append(conflict)
    elif conflict:
        numbers.append(
            Number(
                wording.percent(_share_above_zero(values[conflict][chosen])),
                "push against general knowledge",
                f"{wording.percent(_share_above_zero(values[conflict]))} of the pool",
            )
        )
    rest = [name for name in ("score", "loss", "norm", "completion_tokens", *values) if name in values]
    medians += [name for name in dict.fromkeys(rest) if name not in (agreement, conflict, "tokens")]
    cost = _cost(page.stages)
    for name in medians[: 5 - len(numbers) - bool(cost)]:
        c = facts.compare(name, values[name], chosen)
        at = place if name == agreement else len(numbers)
        numbers.insert(
            at,
            Number(
                wording.number(c.chosen[1]), f"median {wording.label(name).name}", f"{wording.number(c.pool[1])} in the pool"
            ),
        )
    if len(numbers) + len(cost) < 5:
        left_out = len(page.excluded)
        numbers.append(Number(f"{left_out:,}", "could not be used", f"of {n + left_out:,} that were given"))
    return numbers + cost


def _cost(stages: Sequence[Stage]) -> list[Number]:
    wall = [s.wall_seconds for s in stages if s.wall_seconds is not None]
    cpu = [s.cpu_seconds for s in stages if s.cpu_seconds is not None]
    if not wall:
        return []
    return [
        Number(wording.duration(sum(wall)), "to choose them", f"{wording.duration(sum(cpu)) if cpu else '–'} of processor time")
    ]
