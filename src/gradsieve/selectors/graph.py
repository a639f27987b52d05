"""Nearest neighbours of examples in gradient direction: what the walk of G2IS follows.

A walk looks at the neighbours of the few rows that it visits, so lists are made when they are asked for: one pass over the
pool, O(nd), for each visited row. A graph of all rows takes O(n²d), but matrix products, and pays off when a large part of
the pool is visited. Both give the same lists: pairs are screened in float32, and ordered by exact products (see
`directions`), equal ones by id.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from gradsieve.errors import InvalidArgument, MissingExtra
from gradsieve.selectors.directions import Directions

Neighbours = Callable[[int], Iterator[Tensor]]
"""Gives the neighbours of a row, nearest first, in pieces of any length (int64 [p]); never the row itself."""

FAISS_FROM = 10_000
"""Candidates from which on an inverted file is offered; below, exact products are faster."""
VISITS = 8
"""A graph of all rows is made when more than one in this many rows may be visited: a matrix product takes about a tenth of
the time per number of a matrix-vector product, which is bound by memory."""


def lists_on_demand(directions: Directions, by_id: Tensor, width: int) -> Neighbours:
    """Returns exact neighbours that are computed when a row is visited; O(nd) a row, n numbers in memory.

    Args:
        directions: Unit sketches of the pool.
        by_id: Its rows in the order of their ids: int64 [n].
        width: Neighbours of a row; 0 for all.
    """
    rank = _rank(by_id)

    def neighbours(row: int) -> Iterator[Tensor]:
        similar = _screen(directions, row)
        similar[row] = -torch.inf
        left = min(width or len(rank), len(rank) - 1)
        for piece in _descending(directions, rank, row, similar, 2 * left if width else 256):
            yield piece[:left]
            left -= len(piece)
            if left <= 0:
                return

    return neighbours


def exact_graph(directions: Directions, by_id: Tensor, width: int, block: int = 256) -> Tensor:
    """Returns the `width` nearest neighbours of every row, nearest first: int32 [n, width]; O(n²d), blocks of `block` rows.

    Args:
        directions: Unit sketches of the pool, small enough to be held (see `CACHE_BYTES`).
        by_id: Its rows in the order of their ids: int64 [n].
        width: Neighbours of a row, in [1, n - 1].
        block: Rows whose products with all others are in memory at once (float32 [block, n]).
    """
    U, rank = directions.cache, _rank(by_id)
    if U is None:
        raise InvalidArgument(f"a graph of all {len(rank)} rows needs their sketches in memory; use lists on demand")
    graph = torch.empty(len(rank), width, dtype=torch.int32)
    for rows in torch.arange(len(rank)).split(block):
        S = U[rows] @ U.T
        S[torch.arange(len(rows)), rows] = -torch.inf
        for row, similar in zip(rows.tolist(), S, strict=True):
            pieces = _descending(directions, rank, row, similar, 2 * width)
            found = next(pieces)
            while len(found) < width:
                found = torch.cat([found, next(pieces)])
            graph[row] = found[:width]
    return graph


def follow(graph: Tensor) -> Neighbours:
    """Returns the neighbours that a graph (integer [n, width], each row nearest first) gives."""
    return lambda row: iter((graph[row].long(),))


def faiss_lists(directions: Directions, by_id: Tensor, width: int) -> Neighbours:
    """Returns approximate neighbours from an inverted file of faiss.

    A sixteenth of its √n cells is searched for each visited row. The file holds another copy of the sketches, as float16: 2nd
    bytes. Those it finds are in exact order.

    Args:
        directions: Unit sketches of the pool.
        by_id: Its rows in the order of their ids: int64 [n].
        width: Neighbours of a row, at least 1.

    Raises:
        MissingExtra: faiss is not installed.
        InvalidArgument: There are fewer than `FAISS_FROM` rows.
    """
    n = len(by_id)
    if n < FAISS_FROM:
        raise InvalidArgument(f"graph must be exact below {FAISS_FROM} candidates (it is faster there), got faiss with {n}")
    index = _inverted_file(directions, by_id)
    rank = _rank(by_id)

    def neighbours(row: int) -> Iterator[Tensor]:
        found = torch.from_numpy(index.search(directions.rows(torch.tensor([row])).float().numpy(), width + 1)[1][0])
        yield _in_order(directions, rank, row, found[(found >= 0) & (found != row)])[0][:width]

    return neighbours


def _inverted_file(directions: Directions, by_id: Tensor) -> Any:
    try:
        faiss = import_module("faiss")
    except ImportError:
        raise MissingExtra("graph faiss needs the package faiss; pip install 'gradsieve[ann]', or use graph exact") from None
    d, cells = directions.gradients.dim, int(len(by_id) ** 0.5)
    half = faiss.ScalarQuantizer.QT_fp16
    index = faiss.IndexIVFScalarQuantizer(faiss.IndexFlatIP(d), d, cells, half, faiss.METRIC_INNER_PRODUCT, False)
    index.nprobe = max(1, cells // 16)
    sample = by_id[torch.randperm(len(by_id), generator=torch.Generator().manual_seed(0))[: 40 * cells]]
    index.train(directions.rows(sample).float().numpy())
    for rows, U in directions.blocks():
        index.add_with_ids(U.float().numpy(), rows.numpy())
    return index


def _screen(directions: Directions, row: int) -> Tensor:
    """Returns the products of all rows with one of them, to float32 rounding: float32 [n]."""
    u = directions.rows(torch.tensor([row]))[0]
    if directions.cache is not None:
        return directions.cache @ u.float()
    return directions.products(u[:, None])[:, 0].float()


def _descending(directions: Directions, rank: Tensor, row: int, similar: Tensor, first: int) -> Iterator[Tensor]:
    """Yields the other rows by descending exact product with `row`, ties by rank, a piece at a time.

    The `width` largest screened products are made exact. A float32 product of unit rows errs by less than ε = d·2⁻²³, so all
    that are above the smallest of these by ε come before every row that is not among them, and are yielded; then the width
    grows.

    Args:
        directions: Unit sketches.
        rank: Place of each row in the order of ids: int64 [n].
        row: The row whose neighbours are wanted.
        similar: Screened products, float32 [n], -inf for `row` itself.
        first: Width of the first piece.
    """
    n, width, done = len(similar), max(first, 1), 0
    slack = directions.gradients.dim * 2.0**-23
    while done < n - 1:
        top = similar.topk(min(width, n - 1))
        order, exact = _in_order(directions, rank, row, top.indices)
        sure = n - 1 if width >= n - 1 else int((exact > float(top.values[-1]) + slack).sum())
        if sure > done:
            yield order[done:sure]
            done = sure
        width *= 4


def _in_order(directions: Directions, rank: Tensor, row: int, rows: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the rows by descending exact product with `row`, ties by rank, and the products: int64 [p], float64 [p]."""
    rows = rows[rank[rows].argsort()]
    u = directions.rows(torch.tensor([row]))[0]
    exact = torch.cat([directions.rows(part) @ u for part in rows.split(4096)])
    best = exact.sort(descending=True, stable=True)
    return rows[best.indices], best.values


def _rank(by_id: Tensor) -> Tensor:
    rank = torch.empty_like(by_id)
    rank[by_id] = torch.arange(len(by_id))
    return rank
