"""What stands for the abilities to keep: the anchor's mean gradient in three weightings, its categories, their subspace.

Everything here comes from exact products: `dot/anchor`, `dot/unit/anchor`, one `dot/anchor:CATEGORY` each, and the cosines of
the category directions u_c with each other (`Reference.cosines`). With M = [u_1 … u_C] and its Gram matrix MᵀM = V S² Vᵀ the
thin SVD of Eq. OGS-4 needs no direction itself: M = U S Vᵀ, so that Uᵀg = S⁻¹ Vᵀ (Mᵀg), and Mᵀg is a row of the columns.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Literal

import torch
from torch import Tensor

from gradsieve.errors import InvalidArgument
from gradsieve.selectors.reading import cosines, matching
from gradsieve.types import Gradients, Problem

Normalize = Literal["none", "example", "category"]

RECOMMENDED = 300
"""Anchor examples below which a note recommends more (the source works with 400)."""

_COLUMN = {"none": "dot/anchor", "example": "dot/unit/anchor", "category": "dot/anchor:*"}


def anchor_column(normalize: Normalize) -> str:
    """Returns the column (or pattern) that `anchor_cosine` reads."""
    return _COLUMN[normalize]


def anchor_cosine(problem: Problem, normalize: Normalize) -> Tensor:
    """Returns every candidate's cosine with the anchor direction (Eq. OGS-1): float64 [n], NaN where the gradient is zero.

    Args:
        problem: Holds the products, and for "category" the cosines between the category directions.
        normalize: How the anchor's gradients are averaged: "none": as they are; "example": each scaled to unit norm, so that no
            gradient rules by its length; "category": each category's mean scaled to unit norm, so that none rules by its
            number or length: g = Σ_c u_c and ‖g‖² = Σ_cc' <u_c, u_c'>.

    Raises:
        InvalidArgument: The category directions cancel each other, or their cosines are not known.
    """
    pool = problem.candidates
    if normalize != "category":
        return cosines(pool, _COLUMN[normalize].removeprefix("dot/"))
    names = categories(pool)
    length = float(gram(problem, names).sum())
    if not length > 1e-9:
        raise InvalidArgument("normalize must be none or example where the category directions cancel each other, got category")
    total: Tensor = torch.stack([cosines(pool, name) for name in names]).sum(0)
    return total / math.sqrt(length)


def worst_conflict(pool: Gradients) -> Tensor:
    """Returns Conf_max(z) = max_c -cos(g_z, g_c) over the anchor's categories c (Eq. OGS-4): float64 [n]."""
    return torch.stack([-cosines(pool, name) for name in categories(pool)]).amax(0)


def subspace_orth(problem: Problem, energy: float) -> tuple[Tensor, int]:
    """Returns Orth_r(z) = 1 - ‖U_rᵀ g_z‖/‖g_z‖ (Eq. OGS-4), float64 [n], and r.

    U_r are the left singular vectors of the unit category means that together hold at least `energy` of their squared length;
    of equal singular values all or none are taken. With one category it is 1 - |cos(g_z, g_c)|, Eq. OGS-2. O(n C²).

    Args:
        problem: Holds the products and the cosines between the category directions.
        energy: Share above 0, at most 1.
    """
    names = categories(problem.candidates)
    squares, V = torch.linalg.eigh(gram(problem, names))
    squares, V = squares.flip(0), V.flip(1)
    real = squares > 1e-9 * squares[0]  # directions that repeat others span nothing new
    squares, V = squares[real], V[:, real]
    share = squares.cumsum(0) / squares.sum()
    r = min(int((share < energy - 1e-12).sum()) + 1, len(squares))
    r = int((squares > squares[r - 1] * (1 - 1e-9)).sum())
    within = torch.stack([cosines(problem.candidates, name) for name in names], dim=1) @ (V[:, :r] / squares[:r].sqrt())
    return 1 - within.square().sum(1).sqrt().clamp(max=1), r  # rounding may exceed 1


def categories(pool: Gradients) -> list[str]:
    """Returns the names of the category references, sorted."""
    return [name.removeprefix("dot/") for name in matching(pool, "dot/anchor:*")]


def gram(problem: Problem, names: Sequence[str]) -> Tensor:
    """Returns the cosines of these references with each other: float64 [C, C].

    Raises:
        InvalidArgument: They are not known.
    """
    for name in names:
        known = problem.references[name].cosines if name in problem.references else {}
        for other in names:
            if other not in known:
                raise InvalidArgument(
                    f"the cosine of the references {name!r} and {other!r} must be known, got none; extract them together, or "
                    "give Problem(references=…) with Reference.cosines"
                )
    return torch.tensor([[problem.references[a].cosines[b] for b in names] for a in names], dtype=torch.float64)


def anchor_notes(problem: Problem, references: Iterable[str]) -> list[str]:
    """Returns a note where the anchor examples behind these references are fewer than recommended.

    Args:
        problem: Knows how many examples each reference is the mean of; with a Navigator they are half of the anchor.
        references: Names; those of the target do not count.
    """
    known = {name: problem.references[name].count for name in references if name in problem.references}
    whole = [count for name, count in known.items() if name in ("anchor", "unit/anchor")]
    parts = [count for name, count in known.items() if name.startswith(("anchor:", "contrast/anchor:"))]
    if not whole and not parts:
        return []
    count = max([*whole, sum(parts)])
    halved = problem.navigator is not None  # the other half measures forgetting
    if count >= RECOMMENDED // (1 + halved):
        return []
    has = f"{count} usable examples for its references and about as many held out" if halved else f"{count} usable examples"
    return [f"the anchor has {has}; 300 to 500 in all, from every ability to keep, are recommended"]
