"""Numbers and names → words: how the page writes a value, a column, a text."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass

_SUPERSCRIPT = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")
# C0 controls, DEL and C1 have no place in HTML; they are shown as their pictures, lone surrogates as U+FFFD,
# and so are the two that no XML document may hold.
_VISIBLE = {c: chr(0x2400 + c) for c in range(32) if c not in (9, 10, 13)} | {127: "␡"}
_VISIBLE |= dict.fromkeys([*range(0x80, 0xA0), *range(0xD800, 0xE000), 0xFFFE, 0xFFFF], "�")


@dataclass(frozen=True, slots=True)
class Label:
    """What a column is called on the page.

    Attributes:
        name: A noun for headings and axes.
        gloss: What it measures, in a few words; empty where the name says it.
        more: How a larger value compares, `conflict more`, and
        less: how a smaller one does, `conflict less`.
    """

    name: str
    gloss: str = ""
    more: str = ""
    less: str = ""


_LABELS = {
    "utility": Label(
        "utility", "agreement of the gradient with the target", "agree more with the target", "agree less with the target"
    ),
    "risk": Label("conflict", "push against general knowledge, 0 where there is none", "conflict more", "conflict less"),
    "overlap": Label(
        "overlap",
        "size of the cosine to general knowledge, for or against it",
        "touch general knowledge more",
        "touch general knowledge less",
    ),
    "conflict": Label(
        "signed conflict",
        "minus the cosine to the anchor; above 0 it pushes against general knowledge",
        "conflict more",
        "conflict less",
    ),
    "cos/target": Label(
        "cosine to target",
        "agreement of the gradient with the target",
        "agree more with the target",
        "agree less with the target",
    ),
    "score": Label("score", "the method’s own, higher is better", "score higher", "score lower"),
    "loss": Label("loss", "nats per answer token, before training", "are harder for the model", "are easier for the model"),
    "tokens": Label("length", "tokens of the whole example", "are longer", "are shorter"),
    "completion_tokens": Label("answer length", "tokens that carry loss", "have longer answers", "have shorter answers"),
    "draw": Label("draw", "the step of the policy that took it"),
    "norm": Label("gradient norm", "", "have larger gradients", "have smaller gradients"),
}
_STATISTICS = {"norm": "norm", "max": "maximum", "min": "minimum", "mean": "mean", "sd": "sd"}


def label(key: str) -> Label:
    """Returns the label of a column: a known one, a composed one (`max/lm_head`), or its own name."""
    if key in _LABELS:
        return _LABELS[key]
    head, _, tail = key.partition("/")
    if head == "cos" and tail:
        return Label(f"cosine to {tail}")
    if head == "dot" and tail:
        return Label(f"product with {tail}", "with the unit vector of that direction")
    if head in _STATISTICS and tail:
        return Label(f"{tail.replace('_', ' ')}: {_STATISTICS[head]}", "of the gradient of these parameters")
    return Label(key.replace("_", " "))


def number(value: float | None) -> str:
    """Returns a value in three digits (whole numbers in full): `1,204`, `0.0312`, `−3.4×10⁻⁷`, `–` for None and NaN."""
    if value is None or math.isnan(value):
        return "–"
    if math.isinf(value):
        return "∞" if value > 0 else "−∞"
    size = abs(value)
    if size != 0 and not 1e-3 <= size < 1e7:
        mantissa, exponent = f"{value:.2e}".split("e")
        text = f"{mantissa.rstrip('0').rstrip('.')}×10{superscript(int(exponent))}"
    elif size >= 999.5 or size == int(size):
        text = f"{value:,.0f}"
    else:
        text = f"{value:.3g}"
    return text.replace("-", "−")


def superscript(exponent: int) -> str:
    """Returns an exponent in raised digits."""
    return str(exponent).translate(_SUPERSCRIPT)


def percent(share: float | None) -> str:
    """Returns a share of one as `9.7%`; one decimal below 10 %, and never `0%` for something that is there."""
    if share is None or math.isnan(share):
        return "–"
    if 0 < abs(share) < 0.0005:
        return "under 0.1%"
    return f"{share:.1%}".replace(".0%", "%") if abs(share) < 0.0995 else f"{share:.0%}"


def duration(seconds: float | None) -> str:
    """Returns a time as `0.42 s`, `38 s`, `3 min 20 s`, `2 h 5 min`, `–` for None and NaN."""
    if seconds is None or math.isnan(seconds):
        return "–"
    if seconds < 59.5:
        return f"{seconds:.2g} s" if seconds < 9.95 else f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s" if rest else f"{minutes} min"
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours} h {minutes} min" if minutes else f"{hours} h"


def size(count: float | None) -> str:
    """Returns a number of bytes as `812 B`, `1.4 MB`, in powers of 1000; `–` for None."""
    if count is None:
        return "–"
    for unit in ("B", "kB", "MB", "GB"):
        if count < 999.5:
            return f"{count:.0f} B" if unit == "B" else f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"


def setting(value: object) -> str:
    """Returns a hyper-parameter or recorded value as it would be written in YAML; numbers as `number` writes them."""
    if isinstance(value, bool) or value is None:
        return json.dumps(value)
    if isinstance(value, int):
        return str(value)
    if isinstance(value, float):
        return repr(value)
    if isinstance(value, str):
        return value
    if isinstance(value, (list, tuple)):
        return ", ".join(setting(v) for v in value) or "none"
    return str(value)


def visible(text: str) -> str:
    """Returns the text with control characters as their pictures (␀, ␛) and lone surrogates as U+FFFD."""
    return text.replace("\r\n", "\n").replace("\r", "\n").translate(_VISIBLE)


def joined(parts: list[str]) -> str:
    """Returns `a`, `a and b`, `a, b and c`."""
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}" if parts else ""


def counted(count: int, singular: str, plural: str | None = None) -> str:
    """Returns `1 example`, `1,204 examples`."""
    return f"{count:,} {singular if count == 1 else plural or singular + 's'}"
