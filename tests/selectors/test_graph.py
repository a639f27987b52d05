"""Neighbour lists against a plain sort, with ties and with every way of making them."""

from __future__ import annotations

import sys

import pytest
import torch

from gradsieve.errors import InvalidArgument, MissingExtra
from gradsieve.selectors import graph as module
from gradsieve.selectors.directions import Directions, unit_rows
from gradsieve.selectors.graph import exact_graph, faiss_lists, follow, lists_on_demand
from gradsieve.selectors.ranking import id_order
from gradsieve.types import ArrayGradients


def pool(n, d, seed, copies=0):
    torch.manual_seed(seed)
    G = torch.randn(n, d) + torch.randn(d)
    if copies:
        G[torch.randperm(n)[:copies]] = G[0].clone()
    ids = [f"{i:05d}" for i in torch.randperm(n).tolist()]
    gradients = ArrayGradients(ids, G)
    return gradients, Directions.of(gradients), id_order(ids)


def neighbours_naive(gradients, row, width):
    U = unit_rows(gradients.sketch)
    others = [j for j in range(len(U)) if j != row]
    others.sort(key=lambda j: (-float((U[row] * U[j]).sum()), gradients.ids[j]))
    return others[: width or None]


def collected(neighbours, row):
    return torch.cat([*neighbours(row), torch.zeros(0, dtype=torch.long)]).tolist()


@pytest.mark.parametrize("width", [1, 7, 0])
@pytest.mark.parametrize(("n", "d", "copies"), [(60, 5, 0), (60, 4, 25), (700, 16, 300), (2, 3, 0), (1, 3, 0)])
def test_lists_on_demand_are_those_of_a_sort_even_among_copies(n, d, copies, width):
    gradients, directions, by_id = pool(n, d, n + copies, copies)
    neighbours = lists_on_demand(directions, by_id, width)
    for row in range(0, n, max(1, n // 12)):
        assert collected(neighbours, row) == neighbours_naive(gradients, row, width)


def test_lists_come_in_pieces_when_all_are_asked_for():
    _, directions, by_id = pool(3000, 8, 0)
    assert len(list(lists_on_demand(directions, by_id, 0)(5))) > 1


@pytest.mark.parametrize("block", [1, 7, 256])
@pytest.mark.parametrize("copies", [0, 40])
def test_a_graph_of_all_rows_has_the_same_lists(block, copies):
    _, directions, by_id = pool(90, 6, 1, copies)
    graph = exact_graph(directions, by_id, 9, block)
    assert graph.dtype == torch.int32
    demand = lists_on_demand(directions, by_id, 9)
    for row in range(90):
        assert collected(follow(graph), row) == collected(demand, row)


def test_sketches_that_are_not_held_in_memory_give_the_same_lists(monkeypatch):
    gradients, directions, by_id = pool(80, 6, 2)
    monkeypatch.setattr("gradsieve.selectors.directions.CACHE_BYTES", 0)
    streamed = Directions.of(gradients)
    assert streamed.cache is None
    for row in (0, 41):
        assert collected(lists_on_demand(streamed, by_id, 6), row) == collected(lists_on_demand(directions, by_id, 6), row)
    with pytest.raises(InvalidArgument, match="needs their sketches in memory"):
        exact_graph(streamed, by_id, 6)


def test_faiss_is_refused_for_small_pools():
    _, directions, by_id = pool(50, 6, 3)
    with pytest.raises(InvalidArgument, match=r"graph must be exact below 10000 candidates .* got faiss with 50"):
        faiss_lists(directions, by_id, 5)


def test_without_faiss_the_message_has_the_command(monkeypatch):
    monkeypatch.setitem(sys.modules, "faiss", None)
    monkeypatch.setattr(module, "FAISS_FROM", 10)
    _, directions, by_id = pool(50, 6, 3)
    with pytest.raises(MissingExtra, match=r"pip install 'gradsieve\[ann\]'"):
        faiss_lists(directions, by_id, 5)


def test_faiss_finds_nearly_all_and_orders_them_exactly(monkeypatch):
    pytest.importorskip("faiss")
    monkeypatch.setattr(module, "FAISS_FROM", 10)
    gradients, directions, by_id = pool(2500, 6, 4)
    neighbours = faiss_lists(directions, by_id, 10)
    found = 0
    for row in range(0, 2500, 100):
        got, true = collected(neighbours, row), neighbours_naive(gradients, row, 0)
        found += len(set(got) & set(true[:10]))
        assert row not in got
        assert got == sorted(got, key=true.index)
    assert found > 0.5 * 250


def test_what_faiss_finds_does_not_depend_on_the_order_of_the_pool(monkeypatch):
    pytest.importorskip("faiss")
    monkeypatch.setattr(module, "FAISS_FROM", 10)
    gradients, directions, by_id = pool(900, 6, 5)
    other = torch.randperm(900)
    shuffled = ArrayGradients([gradients.ids[i] for i in other], gradients.sketch[other])
    one = faiss_lists(directions, by_id, 10)
    two = faiss_lists(Directions.of(shuffled), id_order(shuffled.ids), 10)
    for place in (0, 100, 899):
        row = int(other[place])
        names = [gradients.ids[i] for i in collected(one, row)]
        assert [shuffled.ids[i] for i in collected(two, place)] == names
