"""What the names in a method's `needs` ask of a run: sets of examples, passes of the model (`types.Selector` lists them)."""

from __future__ import annotations

from gradsieve.types import Selector


def asks_for(selector: Selector) -> str:
    """Returns what a method must be given beside a pool, and what it does with the model, in words."""
    needs = selector.needs
    given = [role for role in ("target", "anchor") if any(reads_set(need, role) for need in needs)]
    first = ["trains first"] if getattr(selector, "warmup", None) is not None else []
    return "; ".join(part for part in (", ".join(given), ", ".join([*first, _passes(needs)])) if part)


def _passes(needs: frozenset[str]) -> str:
    if any(reads_gradients(need) for need in needs):
        return "gradients"
    return "forward pass" if any(reads_model(need) for need in needs) else "no pass of the model"


def reads_model(need: str) -> bool:
    """Says whether a need cannot be met without a pass of the model."""
    return not (need in ("tokens", "completion_tokens") or need.startswith(("meta/", "bm25/", "embedding:")))


def reads_gradients(need: str) -> bool:
    """Says whether a need cannot be met without a backward pass."""
    return reads_model(need) and not need.startswith(("loss", "hidden"))


def reads_set(need: str, role: str) -> bool:
    """Says whether a need cannot be met without the examples of this role."""
    starts = (f"dot/{role}", f"dot/unit/{role}", f"dot/contrast/{role}")
    return need in (f"{role}s", f"bm25/{role}") or need.endswith(f"/{role}s") or need.startswith(starts)
