"""PGM: GRAD-MATCH on mini-batches, part by part, for pools that are too large to match at once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from gradsieve.errors import InvalidArgument
from gradsieve.selectors.dense import finite_blocks, squared_norms
from gradsieve.selectors.gradmatch import Matched, check_match, wanted_gradient
from gradsieve.selectors.omp import Match, match_gradient
from gradsieve.selectors.ranking import id_order
from gradsieve.selectors.reading import require, zero_note
from gradsieve.types import Budget, Gradients, Problem, Selection


@dataclass(frozen=True)
class PGM:
    """Cuts the pool in parts and picks and weights, in each, mini-batches whose gradients add up to the one wanted.

    The pool is shuffled and cut in mini-batches, the mini-batches are dealt to D parts, GRAD-MATCH picks mini-batches of each
    part against the part's own mean gradient or the target's, and the result is their union (Mittal et al. 2022,
    arXiv:2210.16892). The parts know nothing of each other, so that their picks overlap more the more of them there are; the
    trace tells what that costs. Memory and time fall with the size of mini-batches, time also with the number of parts.

    The weight of a mini-batch is spread evenly over its examples, and scaled like GRAD-MATCH's: the weighted mean gradient of
    the selection is about the one wanted. Examples are in the order in which they were picked, part by part in turn.

    Departs from the paper: the part of the budget that a part cannot use goes to the next part.

    Gradients are those of the first checkpoint, as sketches. Memory is 12nd/b bytes for b examples a mini-batch (0.3 GB for
    100,000 x 1024, b = 4).

    Attributes:
        partitions: Number of parts, at least 1; fewer are used, with a note, if the budget is too small to give each a
            mini-batch.
        batch: Examples a mini-batch, at least 1; fewer, with a note, if the budget is smaller.
        match: What each part is matched to: "target", the mean gradient of the examples of the ability you want, or "pool",
            the part's own mean gradient, as in the paper.
        lam: λ ≥ 0 as a share of the mini-batches' mean squared gradient norm. More of it spreads the weight over more of them.
        tolerance: A part ends when what is left to match is at most this share of the gradient's length, in [0, 1).
        curve: Also solve with 1, 2, 4, … parts, so that the trace shows the error over their number; that takes about
            twice the time of 1 part.
    """

    partitions: int = 4
    batch: int = 4
    match: Matched = "target"
    lam: float = 0.5
    tolerance: float = 1e-4
    curve: bool = False

    title: ClassVar[str] = "PGM"
    picks_by: ClassVar[str] = "how well weighted mini-batches match a gradient, part by part of the pool"
    reads: ClassVar[str] = "gradients of pool and target (sketch)"
    cost: ClassVar[str] = "O(n d + n d k / (b² D))"
    source: ClassVar[str] = "Mittal et al. 2022, arXiv:2210.16892"

    def __post_init__(self) -> None:
        check_match(self.match, self.lam, self.tolerance)
        for name, value in (("partitions", self.partitions), ("batch", self.batch)):
            if value < 1:
                raise InvalidArgument(f"{name} must be at least 1, got {value}")

    @property
    def needs(self) -> frozenset[str]:
        """Sketches of the candidates and, to match them, of the targets."""
        return frozenset({"sketch", "targets"} if self.match == "target" else {"sketch"})

    def select(self, problem: Problem, budget: Budget, rng: torch.Generator) -> Selection:
        """Returns the examples of the mini-batches picked; `rng` shuffles the pool.

        The scores are those of an example's mini-batch: its mean gradient's product with the unit of the one wanted. The trace
        holds, per part, how many mini-batches it had and picked, the error at its end and why it ended; and
        `error_by_partitions`: ‖Σ w g - b‖/‖b‖ of the union against the mean gradient b of target or pool, by number of parts
        (1 is GRAD-MATCH on the same mini-batches; with `curve`).
        """
        require(problem, self.needs, "pgm", budget)
        pool = problem.candidates
        by_id = id_order(pool.ids)
        zero = _zero_rows(pool)
        notes = zero_note(pool, zero, "pgm")
        wanted = wanted_gradient(problem, self.match, "pgm")
        limit = budget.limit(pool)
        size = min(self.batch, limit)
        if size < self.batch:
            notes.append(f"mini-batches hold {size} examples, not {self.batch}: the budget is no larger")
        shuffled = by_id[~zero[by_id]]
        shuffled = shuffled[torch.randperm(len(shuffled), generator=rng)]
        batches = [part.sort().values for part in shuffled.split(size)]
        M = _means(pool, batches)
        tokens = pool.columns["tokens"] if budget.tokens is not None else torch.ones(len(by_id), dtype=torch.float64)
        price = torch.stack([tokens[batch].sum() for batch in batches])
        purse = float(limit if budget.tokens is None else budget.tokens)
        parts = max(1, min(self.partitions, int(purse / float(price.mean()))))
        if parts < self.partitions:
            notes.append(f"the pool is cut in {parts} parts, not {self.partitions}: the budget pays for no more mini-batches")
        counts = [2**i for i in range(parts.bit_length()) if 2**i < parts] if self.curve else []
        sizes = torch.tensor([len(batch) for batch in batches], dtype=torch.float64)
        errors = {}
        for count in [*counts, parts]:
            union = self._union(M, sizes, price, purse, count, wanted)
            errors[count] = float((union.weights @ M[union.picks].double() - wanted).norm() / wanted.norm())
        rows = torch.cat([_by_id(batches[i], pool) for i in union.picks.tolist()] or [torch.zeros(0, dtype=torch.long)])
        share = union.weights / sizes[union.picks]
        weights = share.repeat_interleave(sizes[union.picks].long()) * len(rows)
        scores = torch.full((len(by_id),), torch.nan, dtype=torch.float64)
        scores[torch.cat(batches)] = (M.double() @ (wanted / wanted.norm())).repeat_interleave(sizes.long())
        notes += _shortfall(union.found, float(tokens[rows].sum()), len(rows), purse, budget, size)
        trace: dict[str, Any] = {"match": self.match, "parts": union.parts, "error_by_partitions": errors}
        return Selection(rows, weights, scores, trace, tuple(notes))

    def _union(self, M: Tensor, sizes: Tensor, price: Tensor, purse: float, count: int, wanted: Tensor) -> _Union:
        """Returns what `count` parts pick of the mini-batches with mean gradients M [N, d]."""
        ridge = self.lam * float(squared_norms(M).mean())
        found, picks, weights, parts = [], [], [], []
        left = 0.0
        for part in torch.arange(len(M)).tensor_split(count):
            share = float(sizes[part].sum() / sizes.sum())
            own = (sizes[part] @ M[part].double()) / sizes[part].sum()
            b = own if self.match == "pool" else wanted
            if not b.norm() > 0:
                raise InvalidArgument(f"pgm needs a mean gradient of each part to match, got zero in one of {count}; use fewer")
            left += share * purse
            match = match_gradient(
                M[part], b, len(part), ridge=ridge, tolerance=self.tolerance, price=price[part], purse=left + 1e-6
            )
            left -= float(price[part][match.rows].sum())
            found.append(match)
            picks.append(part[match.rows])
            weights.append(share * match.weights)
            error = match.error[-1] if match.error else 1.0
            parts.append({"batches": len(part), "picked": len(match.rows), "error": error, "stop": match.stop})
        turn = torch.cat([torch.arange(len(rows)) for rows in picks]).argsort(stable=True)
        return _Union(torch.cat(picks)[turn], torch.cat(weights)[turn], found, parts)


@dataclass(frozen=True, eq=False)
class _Union:
    """The mini-batches that all parts picked, in turn, with the weights that make the union match."""

    picks: Tensor
    weights: Tensor
    found: Sequence[Match]
    parts: list[dict[str, Any]]


def _zero_rows(pool: Gradients) -> Tensor:
    zero = torch.zeros(len(pool.ids), dtype=torch.bool)
    for rows, sketch in finite_blocks(pool):
        zero[rows] = (sketch == 0).all(1)
    return zero


def _means(pool: Gradients, batches: Sequence[Tensor]) -> Tensor:
    """Returns the mean sketch of every mini-batch, summed in float64: float32 [N, d]."""
    owner = torch.full((len(pool.ids),), -1, dtype=torch.long)
    for i, batch in enumerate(batches):
        owner[batch] = i
    sums = torch.zeros(len(batches), pool.dim, dtype=torch.float64)
    for rows, sketch in finite_blocks(pool):
        mine = owner[rows] >= 0
        sums.index_add_(0, owner[rows[mine]], sketch[mine].double())
    return (sums / torch.tensor([[len(batch)] for batch in batches])).float()


def _by_id(rows: Tensor, pool: Gradients) -> Tensor:
    return torch.tensor(sorted(rows.tolist(), key=pool.ids.__getitem__), dtype=torch.long)


def _shortfall(found: Sequence[Match], spent: float, k: int, purse: float, budget: Budget, size: int) -> list[str]:
    """Returns a note with the cause if the union does not use the budget, else none."""
    if spent >= (purse if budget.tokens is None else 0.95 * purse):
        return []
    early = [match.stop for match in found if match.stop not in ("spent", "limit")]
    cause = f"the next mini-batch of {size} examples is above what is left"
    if early:
        unaligned = early.count("unaligned")
        cause = (
            f"in {len(early)} of {len(found)} parts no further mini-batch helps ({unaligned} have none with a positive product "
            f"with what is left to match, {len(early) - unaligned} are matched)"
        )
    elif all(match.stop == "limit" for match in found):
        cause = "no others are eligible"
    head = f"{k} examples are chosen of the {int(purse)} the budget asks for"
    if budget.tokens is not None:
        head = f"the chosen {k} examples spend {int(spent)} of the budget's {budget.tokens} tokens"
    return [f"{head}: {cause}"]
