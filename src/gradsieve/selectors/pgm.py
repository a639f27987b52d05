"""PGM: GRAD-MATCH on mini-batches, part by part, for pools that are too large to match at once."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from gradsieve.errors import InvalidArgument
from gradsieve.selectors.dense import finite_blocks, squared_norms
from gradsieve.selectors.g2is import largest_remainder
from gradsieve.selectors.gradmatch import Matched, check_match, wanted_gradient
from gradsieve.selectors.omp import Match, match_gradient
from gradsieve.selectors.ranking import id_order, length_check
from gradsieve.selectors.reading import require, zero_note
from gradsieve.types import Budget, Gradients, Problem, Selection

SUM_BYTES = 1 << 29
"""Size of the sums that one pass over the sketches fills."""


@dataclass(frozen=True)
class PGM:
    """Cuts the pool in parts and picks and weights, in each, mini-batches whose gradients add up to the one wanted.

    The pool is shuffled and cut in mini-batches, the mini-batches are dealt to D parts, GRAD-MATCH picks mini-batches of each
    part against the part's own mean gradient or the target's, and the result is their union (Mittal et al. 2022,
    arXiv:2210.16892). The parts know nothing of each other, so that their picks overlap more the more of them there are; the
    trace tells what that costs. Memory and time fall with the size of mini-batches, time also with the number of parts.

    The weight of a mini-batch is spread evenly over its examples, and scaled like GRAD-MATCH's: the weighted mean gradient of
    the selection is about the one wanted. Examples are in the order in which they were picked, part by part in turn.

    Departs from the paper: λ is a share of the part's own mean squared gradient norm.

    Gradients are those of the first checkpoint, as sketches, which stay where they are: a pass over them sums the mini-batches
    of as many parts as have at most 0.5 GB of sums together, so that memory is 0.75 GB, or 12nd/(bD) bytes for one part of D
    if that is more, beside some 60 bytes for each example.

    Attributes:
        partitions: Number of parts, at least 1; fewer are used, with a note, if the budget is too small to give each a
            mini-batch.
        batch: Examples a mini-batch, at least 1; fewer, with a note, if the budget is smaller.
        match: What each part is matched to: "target", the mean gradient of the examples of the ability you want, or "pool",
            the part's own mean gradient, as in the paper.
        lam: λ ≥ 0 as a share of the part's mean squared mini-batch gradient norm. More of it spreads the weight over more of
            them.
        tolerance: A part ends when what is left to match is at most this share of the gradient's length, in [0, 1).
        curve: Also solve with 1, 2, 4, … parts, so that the trace shows the error over their number; that takes about
            twice the time of 1 part, and the memory of 1 part.
        workers: Parts that are solved at the same time, in threads; 0 for as many as torch has threads. It changes nothing but
            the time.
    """

    partitions: int = 4
    batch: int = 4
    match: Matched = "target"
    lam: float = 0.5
    tolerance: float = 1e-4
    curve: bool = False
    workers: int = 0

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
        if self.workers < 0:
            raise InvalidArgument(f"workers must be at least 0, got {self.workers}; 0 takes as many as torch has threads")

    @property
    def needs(self) -> frozenset[str]:
        """Sketches of the candidates and, to match them, of the targets."""
        return frozenset({"sketch", "targets"} if self.match == "target" else {"sketch"})

    def select(self, problem: Problem, budget: Budget, rng: torch.Generator) -> Selection:
        """Returns the examples of the mini-batches picked; `rng` shuffles the pool.

        The scores are those of an example's mini-batch: its mean gradient's product with the unit of the one wanted. The trace
        holds, per part, how many mini-batches it had and picked, the error at its end and why it ended; and
        `error_by_partitions`: ‖Σ w g - b‖/‖b‖ of the union against the mean gradient b of target or pool, by number of parts
        (1 is GRAD-MATCH on the same mini-batches; with `curve`, which also draws them side by side in the report).
        """
        require(problem, self.needs, "pgm", budget)
        pool = problem.candidates
        zero = _zero_rows(pool)
        notes = zero_note(pool, zero, "pgm")
        wanted = wanted_gradient(problem, self.match, "pgm")
        limit = budget.limit(pool)
        size = min(self.batch, limit)
        if size < self.batch:
            notes.append(f"mini-batches hold {size} examples, not {self.batch}: the budget is no larger")
        by_id = id_order(pool.ids)
        shuffled = by_id[~zero[by_id]]
        deal = _Deal(pool, shuffled[torch.randperm(len(shuffled), generator=rng)], size, budget)
        parts = max(1, min(self.partitions, int(deal.purse / float(deal.price.mean()))))
        if parts < self.partitions:
            notes.append(f"the pool is cut in {parts} parts, not {self.partitions}: the budget pays for no more mini-batches")
        counts = [2**i for i in range(parts.bit_length()) if 2**i < parts] if self.curve else []
        scores = torch.full((len(by_id),), torch.nan, dtype=torch.float64)
        unions = {count: self._union(deal, count, wanted, scores) for count in [*counts, parts]}
        union = unions[parts]
        rows = torch.cat([_by_id(deal.rows(i), pool) for i in union.picks.tolist()] or [torch.zeros(0, dtype=torch.long)])
        share = union.weights / deal.sizes[union.picks]
        weights = share.repeat_interleave(deal.sizes[union.picks].long()) * len(rows)
        spent = float(deal.price[union.picks].sum())
        correlation, length_notes = length_check({"score": scores}, pool)
        notes += [*length_notes, *_shortfall(union.found, spent, len(rows), deal.purse, budget, size)]
        errors = {count: float((own.reached - wanted).norm() / wanted.norm()) for count, own in unions.items()}
        trace: dict[str, Any] = {"match": self.match, "parts": union.parts, "error_by_partitions": errors}
        trace["length_correlation"] = correlation
        if counts:  # the choice first, as the report's bars have it
            trace["bars"] = {
                "error by number of parts": {f"{c} parts" if c > 1 else "1 part": errors[c] for c in [parts, *counts]}
            }
        return Selection(rows, weights, scores, trace, tuple(notes))

    def _union(self, deal: _Deal, count: int, wanted: Tensor, scores: Tensor) -> _Union:
        """Returns what `count` parts pick, and fills in the scores of all rows.

        The parts come in groups whose gradients are summed in one pass over the sketches; those of a group are solved at once.
        """
        parts = torch.arange(len(deal.sizes)).tensor_split(count)
        purses = deal.shares(parts)
        found: list[Match] = []
        reached = torch.zeros_like(wanted)
        facts = []
        for group in _groups([len(part) for part in parts], SUM_BYTES // (8 * deal.pool.dim)):
            first, last = int(parts[group[0]][0]), int(parts[group[-1]][-1]) + 1
            M = deal.means(first, last)
            along = _products(M, wanted / wanted.norm())
            scores[deal.rows(first, last)] = along.repeat_interleave(deal.sizes[first:last].long())

            def solve(p: int, M: Tensor = M, first: int = first) -> Match:
                own = M[int(parts[p][0]) - first : int(parts[p][-1]) + 1 - first]  # a part is a run: no copy
                return self._solve(deal, parts[p], own, purses[p], wanted, count)

            with ThreadPoolExecutor(self.workers or torch.get_num_threads()) as threads:
                solved = list(threads.map(solve, group))
            for p, match in zip(group, solved, strict=True):
                part = parts[p]
                share = float(deal.sizes[part].sum() / deal.sizes.sum())
                reached += share * match.weights @ M[part[match.rows] - first].double()
                error = match.error[-1] if match.error else 1.0
                facts.append({"batches": len(part), "picked": len(match.rows), "error": error, "stop": match.stop})
                found.append(dataclasses.replace(match, rows=part[match.rows], weights=share * match.weights))
        turn = torch.cat([torch.arange(len(match.rows)) for match in found]).argsort(stable=True)
        picks, weights = (torch.cat(part)[turn] for part in ([m.rows for m in found], [m.weights for m in found]))
        return _Union(picks, weights, found, facts, reached)

    def _solve(self, deal: _Deal, part: Tensor, M: Tensor, purse: float, wanted: Tensor, count: int) -> Match:
        """Returns what one part picks of its mini-batches with mean gradients M [len(part), d]."""
        sizes = deal.sizes[part]
        b = _weighted_sum(M, sizes) / sizes.sum() if self.match == "pool" else wanted
        if not b.norm() > 0:
            raise InvalidArgument(f"pgm needs a mean gradient of each part to match, got zero in one of {count}; use fewer")
        ridge = self.lam * float(squared_norms(M).mean())
        price, tolerance = deal.price[part], self.tolerance
        return match_gradient(M, b, len(part), ridge=ridge, tolerance=tolerance, price=price, purse=purse + 1e-6)


@dataclass(frozen=True, eq=False)
class _Union:
    """The mini-batches that all parts picked, in turn, with the weights that make the union match; and what it reaches."""

    picks: Tensor
    weights: Tensor
    found: Sequence[Match]
    parts: list[dict[str, Any]]
    reached: Tensor


class _Deal:
    """The shuffled pool in mini-batches of `size` rows, the last one with what is left.

    Attributes:
        sizes: Rows of each, float64 [N].
        price: What each costs of the budget, float64 [N].
        purse: The budget.
    """

    def __init__(self, pool: Gradients, shuffled: Tensor, size: int, budget: Budget) -> None:
        self.pool, self._shuffled, self._size = pool, shuffled, size
        owner = torch.arange(len(shuffled)) // size
        self.sizes = owner.bincount().double()
        self._owner = torch.full((len(pool.ids),), -1, dtype=torch.long)
        self._owner[shuffled] = owner
        self._of_tokens = budget.tokens is not None
        cost = pool.columns["tokens"][shuffled] if self._of_tokens else torch.ones(len(shuffled), dtype=torch.float64)
        self.price = torch.zeros_like(self.sizes).index_add_(0, owner, cost)
        self.purse = float(budget.tokens if budget.tokens is not None else budget.limit(pool))

    def rows(self, first: int, last: int | None = None) -> Tensor:
        """Returns the rows of mini-batch `first`, or of those from `first` to before `last`."""
        return self._shuffled[first * self._size : (first + 1 if last is None else last) * self._size]

    def shares(self, parts: Sequence[Tensor]) -> list[float]:
        """Returns each part's share of the purse: tokens, or whole mini-batches by largest remainder.

        What is left of the latter is the last part's, which has the mini-batch that may hold fewer.
        """
        if self.purse >= float(self.price.sum()):
            return [float(self.price[part].sum()) for part in parts]
        weights = torch.tensor([float(self.sizes[part].sum() / self.sizes.sum()) for part in parts])
        if self._of_tokens:
            return [weight * self.purse for weight in weights.tolist()]
        whole, left = divmod(int(self.purse), self._size)
        shares = [float(self._size * count) for count in largest_remainder(whole, weights)]
        return [*shares[:-1], shares[-1] + left]

    def means(self, first: int, last: int) -> Tensor:
        """Returns the mean sketches of mini-batches [first, last), summed in float64 in one pass: float32 [last - first, d]."""
        sums = torch.zeros(last - first, self.pool.dim, dtype=torch.float64)
        for rows, sketch in finite_blocks(self.pool):
            owner = self._owner[rows]
            mine = (owner >= first) & (owner < last)
            sums.index_add_(0, owner[mine] - first, sketch[mine].double())
        return sums.div_(self.sizes[first:last, None]).float()


def _products(M: Tensor, v: Tensor) -> Tensor:
    """Returns <m, v> of every row of M [r, d]: float64 [r]; by rows, since a matrix product's last digit is the group's."""
    return torch.cat([(part.double() * v).sum(1) for part in M.split(4096)])


def _weighted_sum(M: Tensor, sizes: Tensor) -> Tensor:
    """Returns Σ size·m over the rows of M [r, d], in float64 a piece at a time: [d]."""
    total = torch.zeros(M.shape[1], dtype=torch.float64)
    for part, size in zip(M.split(4096), sizes.split(4096), strict=True):
        total += size @ part.double()
    return total


def _groups(sizes: Sequence[int], most: int) -> list[list[int]]:
    """Returns runs of parts that have at most `most` mini-batches together, or are one part."""
    groups: list[list[int]] = []
    held = 0
    for p, size in enumerate(sizes):
        if not groups or held + size > most:
            groups.append([])
            held = 0
        groups[-1].append(p)
        held += size
    return groups


def _zero_rows(pool: Gradients) -> Tensor:
    zero = torch.zeros(len(pool.ids), dtype=torch.bool)
    for rows, sketch in finite_blocks(pool):
        zero[rows] = (sketch == 0).all(1)
    return zero


def _by_id(rows: Tensor, pool: Gradients) -> Tensor:
    return torch.tensor(sorted(rows.tolist(), key=pool.ids.__getitem__), dtype=torch.long)


def _shortfall(found: Sequence[Match], spent: float, k: int, purse: float, budget: Budget, size: int) -> list[str]:
    """Returns a note with the cause if the union does not use the budget, else none."""
    if spent >= (purse if budget.tokens is None else 0.95 * purse):
        return []
    early = [match.stop for match in found if match.stop not in ("spent", "limit")]
    cause = f"no mini-batch of {size} examples that would help costs as little as is left to its part"
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
