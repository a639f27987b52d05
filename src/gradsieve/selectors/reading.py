"""What a method reads of its problem, checked before anything is computed."""

from __future__ import annotations

from collections.abc import Iterable
from fnmatch import fnmatchcase
from typing import Any, get_args

import torch
from torch import Tensor

from gradsieve.errors import InvalidArgument
from gradsieve.types import Budget, Gradients, Problem, Reference

RELIABLE = 0.7
"""Signal share and split-half rank correlation below which a reference direction is called unreliable."""

_ANCHOR = "pass a JSONL, or `--anchor demo` for the built-in one"
_CONTRAST = "pass wrong copies with --corrupted FILE, or `--anchor demo` for the built-in ones"
_FLAGS = {
    "targets": ("--target (examples of the ability you want)", "pass a JSONL"),
    "dot/target": ("--target (examples of the ability you want)", "pass a JSONL"),
    "anchors": ("--anchor (general examples it must not forget)", _ANCHOR),
    "dot/anchor": ("--anchor (general examples it must not forget)", _ANCHOR),
    "dot/unit/anchor": ("--anchor (general examples it must not forget)", _ANCHOR),
    "dot/anchor:*": ("--anchor with categories (general examples it must not forget)", _ANCHOR),
    "dot/contrast/anchor:*": ("--anchor with wrong copies (general examples it must not forget)", _CONTRAST),
    "dot/contrast/target": ("--target with wrong copies (examples of the ability you want)", _CONTRAST),
    "sketch": ("the candidates' sketches", "extract them with --dim above 0"),
    "hidden": ("the candidates' last hidden states", "extract them, or add them to `extra` under the name hidden"),
    "hidden/targets": ("--target (examples of the ability you want) with last hidden states", "pass a JSONL"),
    "navigator": ("a live model to train and measure", "give Problem(navigator=…)"),
}


def require(problem: Problem, needs: Iterable[str], method: str, budget: Budget | None = None) -> None:
    """Checks that the problem holds all that a method needs, and that every needed column is usable.

    Args:
        problem: What the method is about to read.
        needs: As in `Selector.needs`; a name with `*` asks for at least one column that matches, `meta/NAME?` for a column
            whose values the method checks itself. A name that a column has stands for that column alone.
        method: The method's name, for the message.
        budget: If given and counted in tokens, the `tokens` column is needed too.

    Raises:
        InvalidArgument: Something is missing (the message names method, thing and cure), a needed column has values that are
            not finite, a norm is negative, or targets or anchors do not share the candidates' sketch size.
    """
    pool = problem.candidates
    if not len(pool.ids):
        raise InvalidArgument("the pool must hold at least one usable candidate, got none")
    asked = set(needs) | ({"tokens"} if budget is not None and budget.tokens is not None else set())
    there = {"sketch": pool.dim > 0, "navigator": problem.navigator is not None}
    there |= {"targets": _any_rows(problem.targets), "anchors": _any_rows(problem.anchors)}
    there |= dict.fromkeys(pool.representations, True)
    if problem.targets is not None and len(problem.targets.ids):
        there |= {f"{name}/targets": True for name in problem.targets.representations}
    unchecked = {need.removesuffix("?") for need in asked if need.startswith("meta/") and need.endswith("?")}
    for need in sorted({need.removesuffix("?") if need.startswith("meta/") else need for need in asked}):
        if not there.get(need, False) and not (need not in there and matching(pool, need)):
            raise InvalidArgument(_missing(pool, need, method))
        for name in sorted(set(matching(pool, need)) - unchecked):
            _check_column(pool, name)
    for part, name in ((problem.targets, "targets"), (problem.anchors, "anchors")):
        if name in asked and part is not None and part.dim != pool.dim:
            raise InvalidArgument(
                f"the sketches of the {name} must have the candidates' size {pool.dim}, got {part.dim}; extract either again"
            )


def check_choice(name: str, value: object, choices: Any) -> None:
    """Raises InvalidArgument unless the value of a field is one of the strings of its `Literal`."""
    if value not in get_args(choices):
        raise InvalidArgument(f"{name} must be one of {', '.join(get_args(choices))}, got {value!r}")


def check_warmup(share: float, epochs: int) -> None:
    """Raises InvalidArgument unless a method can be warmed up like this."""
    if not 0 <= share <= 1:
        raise InvalidArgument(f"warmup_share must lie in [0, 1], got {share}; 0 is no warm-up")
    if epochs < 1:
        raise InvalidArgument(f"warmup_epochs must be at least 1, got {epochs}; write warmup_share 0 for no warm-up")


def matching(gradients: Gradients, pattern: str) -> list[str]:
    """Returns the names of the columns that match the pattern, sorted; of a column's own name that one: it may hold `[`."""
    if pattern in gradients.columns:
        return [pattern]
    return sorted(name for name in gradients.columns if fnmatchcase(name, pattern))


def cosines(gradients: Gradients, reference: str) -> Tensor:
    """Returns the exact cos(g_z, r) of every row with a reference: float64 [n], NaN where the gradient is zero.

    Raises:
        InvalidArgument: The products are larger than a unit reference allows.
    """
    dot, norm = gradients.columns[f"dot/{reference}"], gradients.columns["norm"]
    cosine = torch.where(norm > 0, dot / norm, torch.nan)
    largest = cosine.nan_to_num(0).abs().max().item()
    if largest > 1.05:  # low-precision compute may exceed 1 by about a hundredth
        raise InvalidArgument(
            f"column 'dot/{reference}' must hold products with the unit reference, got a cosine of {largest:.3g}; "
            "divide it by the reference's norm"
        )
    return cosine


def reference_notes(problem: Problem, references: Iterable[str]) -> list[str]:
    """Returns one note for each of these references whose direction is mostly its own sampling noise, or ranks like noise."""
    known = ((name, problem.references[name]) for name in sorted(references) if name in problem.references)
    return [
        f"the reference {name!r} is unreliable: {' and '.join(faults)} (below {RELIABLE}) with {r.count} examples; "
        "give more of them"
        for name, r in known
        if (faults := _faults(r))
    ]


def _faults(reference: Reference) -> list[str]:
    share, halves = reference.signal_share, reference.split_half
    found = [] if share >= RELIABLE else [f"its signal share is {share:.2f}"]
    if halves is not None and not halves >= RELIABLE:
        found.append(f"halves of it rank the pool with a correlation of {halves:.2f}")
    return found


def zero_note(gradients: Gradients, zero: Tensor, method: str, what: str = "candidates", of: str = "gradient") -> list[str]:
    """Returns a note that names the rows left out because their gradient is zero; no note where there are none.

    Args:
        gradients: The pool, or another set.
        zero: bool [n].
        method: The method's name.
        what: What the rows are called.
        of: What of them is zero.

    Raises:
        InvalidArgument: Every row is zero.
    """
    names = sorted(gradients.ids[row] for row in zero.nonzero().flatten().tolist())
    if len(names) == len(gradients.ids):
        raise InvalidArgument(f"{method} needs {of}s with a direction, got zero for all {len(names)} {what}; extract again")
    if not names:
        return []
    shown = ", ".join(names[:3]) + (", …" if len(names) > 3 else "")
    return [f"{len(names)} of {len(gradients.ids)} {what} have a zero {of}, which has no direction; left out: {shown}"]


def _any_rows(gradients: Gradients | None) -> bool:
    return gradients is not None and len(gradients.ids) > 0


def _missing(pool: Gradients, need: str, method: str) -> str:
    if need in _FLAGS:
        what, cure = _FLAGS[need]
        return f"{method} needs {what}, got none; {cure}"
    if need.startswith("embedding:"):
        whose = "--target (examples of the ability you want)" if need.endswith("/targets") else "the candidates"
        return f"{method} needs embeddings of {whose}, got none; add them to `extra` as {need.removesuffix('/targets')}"
    have = ", ".join(sorted(pool.columns)) or "no columns"
    return f"{method} needs the column {need!r} of the candidates, got {have}; extract it, or add it to the columns"


def _check_column(pool: Gradients, name: str) -> None:
    column = pool.columns[name]
    negative = (column < 0) if name == "norm" or name.startswith("norm/") else torch.zeros(len(column), dtype=torch.bool)
    bad = ~column.isfinite() | negative | ((column <= 0) if name == "tokens" else False)
    if bad.any():
        row = int(bad.nonzero()[0])
        rule = "be finite" if not column[row].isfinite() else "not be negative" if negative[row] else "be above 0"
        raise InvalidArgument(f"column {name!r} must {rule}, got {column[row].item()} for {pool.ids[row]!r}; extract it again")
