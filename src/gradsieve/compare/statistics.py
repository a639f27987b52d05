"""Paired bootstrap over items and seeds: what can be said of a difference, and what cannot.

A set of measurements is a table X [S, I]: S seeds, I test items. The difference of two arms is taken cell by cell, because both
were measured on the same items and trained with the same seeds: D = X_a - X_b, and its estimate is the mean of D.

**BOOT**  Seeds and items are drawn again with replacement, independently of each other (the pigeonhole bootstrap of Owen 2007,
The Annals of Applied Statistics 1(2), for two crossed random factors): with n_s and m_i the counts of a draw,

    D* = Σ_s Σ_i (n_s / S) (m_i / I) D_si

**STRETCH**  and D* is stretched about the mean of D by  t_ν(0.975) √V / (z(0.975) √V*),  V* the variance of D* over all draws:

    V  = max(M_s + M_i - M_e, M_s, M_i) / (S I)     from the mean squares of seeds, items and rest of an S x I table
    ν  = (S I V)² / (M_s²/(S-1) + M_i²/(I-1) + M_e²/((S-1)(I-1)))     its degrees of freedom (Satterthwaite 1946),
                                                                      at least min(S-1, I-1), those of its least known part

(V is M_e / (S I) and ν (S-1)(I-1) where neither seeds nor items differ in their means.)  It is stretched
because a bootstrap of three seeds takes their variance a third too small and knows nothing of how badly three values tell a
variance: where seeds differ more than items, its plain intervals miss the truth 24 % of the time in place of 5 %, the stretched
ones 8 % (measured in the tests). The 2.5 % and 97.5 % quantiles of the stretched D* bound the interval. With one seed nothing
is known of seeds: the interval is that of the items, and whoever reads it must be told.

A comparison is a **win** if its interval lies above 0, a **loss** if below, else a **tie**; all values are turned so that
higher is better. Of fewer than three seeds it is **unjudged**: of one nothing is known of seeds, of two next to nothing. So it
is where a test has a single item, which tells nothing of how items differ.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Literal, get_args

import numpy as np
import numpy.typing as npt

from gradsieve.errors import InvalidArgument

Floats = npt.NDArray[np.float64]
Verdict = Literal["win", "tie", "loss", "unjudged"]
LEVEL = 0.95
JUDGED, JUDGED_ITEMS = 3, 2
"""Seeds, and items of each test, that a judgement needs: of fewer, nothing is known of how runs or items differ."""


@dataclass(frozen=True, slots=True)
class Estimate:
    """A mean difference with its interval.

    Attributes:
        mean: Over seeds and items.
        low: Lower end of the 95 % interval.
        high: Its upper end.
        seeds: Number of seeds, and
        items: number of items it rests on.
        fewest: Items of the smallest test, where it is of several.
    """

    mean: float
    low: float
    high: float
    seeds: int
    items: int
    fewest: int | None = None

    @property
    def verdict(self) -> Verdict:
        """Win, tie or loss of a difference in which higher is better; unjudged of too few seeds, or items of a test."""
        if self.seeds < JUDGED or min(self.items, self.fewest or self.items) < JUDGED_ITEMS:
            return "unjudged"
        return "win" if self.low > 0 else "loss" if self.high < 0 else "tie"


@dataclass(frozen=True, eq=False)
class Draws:
    """One draw of seeds and items for every comparison of a study, so that comparisons can be compared.

    Attributes:
        seeds: How often each seed was drawn, float64 [B, S], rows summing to S.
        seed: Of the draws.
    """

    seeds: Floats
    seed: int

    @classmethod
    def of(cls, seeds: int, resamples: int, seed: int = 0) -> Draws:
        """Returns `resamples` draws of so many seeds."""
        if seeds < 1:
            raise InvalidArgument(f"seeds must be at least 1, got {seeds}")
        generator = np.random.default_rng([seed, 0])
        counts = generator.multinomial(seeds, np.full(seeds, 1 / seeds), size=resamples)
        return cls(counts.astype(np.float64), seed)

    def items(self, name: str, count: int) -> Floats:
        """Returns how often each of `count` items of the test `name` was drawn, float64 [B, I]: equal for equal names."""
        key = [self.seed, 1, count, *name.encode()]
        generator = np.random.default_rng(key)
        return generator.multinomial(count, np.full(count, 1 / count), size=len(self.seeds)).astype(np.float64)


def replicates(table: Floats, draws: Draws, items: Floats) -> Floats:
    """Returns the mean of a table under every draw, stretched: Eq. BOOT and STRETCH, float64 [B]; O(B S I).

    Args:
        table: Differences, [S, I], finite.
        draws: Of the S seeds.
        items: Counts of the I items, [B, I]; see `Draws.items`.
    """
    seeds, count = table.shape
    if draws.seeds.shape[1] != seeds or items.shape != (len(draws.seeds), count):
        raise InvalidArgument(
            f"draws must be of {seeds} seeds and {count} items, got {draws.seeds.shape[1]} and {items.shape[1]}"
        )
    drawn = ((draws.seeds @ table) * items).sum(1) / (seeds * count)
    spread = float(drawn.std())
    if seeds < 2 or count < 2 or spread == 0:
        return np.asarray(drawn)
    mean = float(table.mean())
    return np.asarray(mean + (drawn - mean) * half_width(table) / (_normal() * spread))


def half_width(table: Floats) -> float:
    """Returns t_ν √V of Eq. STRETCH: half the width of the interval that the analysis of variance gives the mean.

    Args:
        table: [S, I], at least two of each.
    """
    from scipy import stats

    seeds, count = table.shape
    mean = table.mean()
    by_seed, by_item = table.mean(1) - mean, table.mean(0) - mean
    rest = table - mean - by_seed[:, None] - by_item[None, :]
    of_seeds = count * np.square(by_seed).sum() / (seeds - 1)
    of_items = seeds * np.square(by_item).sum() / (count - 1)
    of_rest = np.square(rest).sum() / ((seeds - 1) * (count - 1))
    total = max(of_seeds + of_items - of_rest, of_seeds, of_items) or of_rest
    parts = of_seeds**2 / (seeds - 1) + of_items**2 / (count - 1) + of_rest**2 / ((seeds - 1) * (count - 1))
    if parts == 0:
        return 0.0
    freedom = max(total**2 / parts, min(seeds, count) - 1)
    return float(stats.t.ppf((1 + LEVEL) / 2, freedom) * math.sqrt(total / (seeds * count)))


@cache
def _normal() -> float:
    from scipy import stats

    return float(stats.norm.ppf((1 + LEVEL) / 2))


def estimate(table: Floats, draws: Draws, items: Floats) -> Estimate:
    """Returns the mean of a table [S, I] with its 95 % interval; O(B S I)."""
    if not np.isfinite(table).all():
        raise InvalidArgument("table must be finite, got NaN or infinite values; leave those items out")
    return Estimate(float(table.mean()), *interval(replicates(table, draws, items)), *table.shape)


def interval(drawn: Floats) -> tuple[float, float]:
    """Returns between which values the share `LEVEL` of replicates lies, as many below as above."""
    low, high = np.quantile(drawn, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)


def front(gain: Floats, forgetting: Floats) -> npt.NDArray[np.bool_]:
    """Says which arms nobody beats in one respect without being worse in the other: the Pareto front; O(A²) per draw.

    Args:
        gain: Higher is better, [A] or [B, A].
        forgetting: Lower is better, of the same shape.
    """
    g, f = np.atleast_2d(gain), np.atleast_2d(forgetting)
    as_good = (g[:, :, None] >= g[:, None, :]) & (f[:, :, None] <= f[:, None, :])  # [b, i, j]: i is as good as j in both
    better = as_good & ((g[:, :, None] > g[:, None, :]) | (f[:, :, None] < f[:, None, :]))
    on: npt.NDArray[np.bool_] = np.logical_not(better.any(axis=1, keepdims=True))[:, 0]
    return on.reshape(gain.shape)


def tally(verdicts: Sequence[Verdict]) -> dict[Verdict, int]:
    """Returns how many of the verdicts are wins, ties, losses and unjudged."""
    return {kind: verdicts.count(kind) for kind in get_args(Verdict)}
