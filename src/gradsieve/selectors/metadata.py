"""Metadata: a number that came with the examples, as a selection rule."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from gradsieve.errors import InvalidArgument
from gradsieve.selectors.ranking import best_first, exact_mean, id_order, length_check, pay, percentile, quantile_strata, spread
from gradsieve.selectors.reading import check_choice, require
from gradsieve.types import Budget, Gradients, Problem, Selection

Prefer = Literal["high", "low"]
Missing = Literal["refuse", "drop", "median"]


@dataclass(frozen=True)
class Metadata:
    """Picks the examples with the highest value of a number that is known about them, such as a rating or a citation count.

    The quality marks that come with a corpus (journal impact factor, citations, stars) as a selection rule (Laï-king & Paroubek
    2024, arXiv:2409.02725). It reads the column `meta/NAME` of the candidates: the field NAME of each row of the pool.

    Attributes:
        column: NAME.
        prefer: "high" picks the largest values first, "low" the smallest.
        at_least: Quantile of the column, in [0, 1), below which examples are left out; quantiles are those of the values that
            are there.
        at_most: Quantile, above at_least and at most 1, above which they are left out.
        bins: Choose evenly from so many quantile bins of what is left, the preferred first within each; 1 is no bins.
        missing: What becomes of examples without the number: "refuse" (an error that names one), "drop" (left out, with a
            note), "median" (they count as the median of the others).
    """

    column: str = "rating"
    prefer: Prefer = "high"
    at_least: float = 0.0
    at_most: float = 1.0
    bins: int = 1
    missing: Missing = "refuse"

    title: ClassVar[str] = "Metadata"
    picks_by: ClassVar[str] = "a number that comes with the examples"
    reads: ClassVar[str] = "a field of the pool's rows"
    cost: ClassVar[str] = "O(n log n)"
    source: ClassVar[str] = "Laï-king & Paroubek 2024, arXiv:2409.02725"

    def __post_init__(self) -> None:
        if not self.column or set(self.column) & set("*?["):
            raise InvalidArgument(f"column must name one number of the examples, got {self.column!r}; write for example rating")
        check_choice("prefer", self.prefer, Prefer)
        check_choice("missing", self.missing, Missing)
        if not 0 <= self.at_least < self.at_most <= 1:
            raise InvalidArgument(
                "at_least and at_most must be quantiles with 0 <= at_least < at_most <= 1, "
                f"got {self.at_least} and {self.at_most}"
            )
        if self.bins < 1:
            raise InvalidArgument(f"bins must be at least 1, got {self.bins}; 1 is no bins")

    @property
    def needs(self) -> frozenset[str]:
        """The column, in which numbers may be missing unless that is refused."""
        return frozenset({f"meta/{self.column}" + "?" * (self.missing != "refuse")})

    def select(self, problem: Problem, budget: Budget, rng: torch.Generator) -> Selection:
        """Returns the examples by the column, which is the score (minus it for "low"). `rng` is not used.

        The trace holds the mean of the chosen and of the pool, the values between which one may choose, and how many had none.
        """
        pool = problem.candidates
        require(problem, self.needs, "metadata", budget)
        values, notes = self._filled(pool)
        low, high = (percentile(pool.columns[f"meta/{self.column}"], 100 * q) for q in (self.at_least, self.at_most))
        outside = (values < low) | (values > high)
        if outside.any():
            notes.append(
                f"{int(outside.sum())} of {len(values)} examples are left out: their {self.column} lies outside "
                f"{low:g} to {high:g} (quantiles {self.at_least:g} to {self.at_most:g})"
            )
        scores = (values if self.prefer == "high" else -values).masked_fill(outside, torch.nan)
        by_id = id_order(pool.ids)
        order = best_first(scores, by_id)
        if self.bins > 1:
            open_ = by_id[~scores[by_id].isnan()]
            strata = torch.zeros(len(values), dtype=torch.long)
            strata[open_] = quantile_strata(values[open_], self.bins, torch.arange(len(open_)))
            order = spread(order, strata)
        rows, shortfall = pay(order, pool, budget)
        correlation, length_notes = length_check({"score": scores}, pool)
        trace = {
            "mean": exact_mean(values[rows]) if len(rows) else None,
            "pool_mean": exact_mean(values),
            "between": [low, high],
            "missing": int(pool.columns[f"meta/{self.column}"].isnan().sum()),
            "length_correlation": correlation,
        }
        weights = torch.ones(len(rows), dtype=torch.float64)
        return Selection(rows, weights, scores, trace, (*notes, *length_notes, *shortfall))

    def _filled(self, pool: Gradients) -> tuple[Tensor, list[str]]:
        """Returns the column, the median where a value is missing or NaN to drop the row, and a note where one is."""
        values = pool.columns[f"meta/{self.column}"].clone()
        gone = values.isnan()
        if values.isinf().any():
            row = int(values.isinf().nonzero()[0])
            raise InvalidArgument(f"column 'meta/{self.column}' must be finite, got {values[row].item()} for {pool.ids[row]!r}")
        if gone.all():
            raise InvalidArgument(
                f"metadata needs a number {self.column!r} in at least one example, got none; name another column"
            )
        if not gone.any():
            return values, []
        median = percentile(values, 50)
        what = "are left out" if self.missing == "drop" else f"count as the median, {median:g}"
        names = sorted(pool.ids[row] for row in gone.nonzero().flatten().tolist())
        shown = ", ".join(names[:3]) + (", …" if len(names) > 3 else "")
        if self.missing == "median":
            values[gone] = median
        return values, [f"{len(names)} of {len(values)} examples have no {self.column} and {what}: {shown}"]
