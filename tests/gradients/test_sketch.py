from __future__ import annotations

import hashlib
import math
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gradsieve.errors import InvalidArgument
from gradsieve.gradients.sketch import SketchPlan, add_entries


def digest(tensor: torch.Tensor) -> str:
    return hashlib.sha256(tensor.contiguous().numpy().tobytes()).hexdigest()[:16]


@given(dim=st.integers(16, 65536))
def test_the_cells_hold_at_least_d_numbers_and_little_more_above_4096(dim: int) -> None:
    plan = SketchPlan(dim)
    k_out, k_in = plan.sides
    assert k_out == 4 * k_in
    assert k_in % 16 == 0
    assert plan.cells == k_out * k_in >= dim
    assert (k_out, k_in) == (128, 32) if dim <= 4096 else (k_out - 64) * (k_in - 16) < dim


@pytest.mark.parametrize("dim", [15, 0, -1, 65537])
def test_a_size_out_of_range_is_refused(dim: int) -> None:
    with pytest.raises(InvalidArgument, match=rf"dim must lie in \[16, 65536\], got {dim}"):
        SketchPlan(dim)


@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 10), name=st.text(min_size=1, max_size=8), size=st.integers(1, 70))
def test_projections_are_signs_of_one_size_and_follow_from_seed_name_and_axis(seed: int, name: str, size: int) -> None:
    for axis, side in (("out", 128), ("in", 32)):
        P = SketchPlan(1024, seed).projection(name, axis, size)
        assert P.shape == (size, side)
        assert torch.equal(P.abs(), torch.full_like(P, 1 / 8))
        assert torch.equal(P, SketchPlan(4096, seed).projection(name, axis, size))
        assert not torch.equal(P, SketchPlan(1024, seed + 1).projection(name, axis, size))
        assert not torch.equal(P, SketchPlan(1024, seed).projection(name + "'", axis, size))
    assert not torch.equal(P[0], SketchPlan(1024, seed).projection(name, "out", size).flatten()[:32])


def test_the_side_that_gradients_share_least_is_projected_wider() -> None:
    # Strangers on one side and the same on the other: the strangers' side makes the error.
    rng = torch.Generator().manual_seed(0)
    x, y, shared = (torch.nn.functional.normalize(torch.randn(300, generator=rng), dim=0) for _ in range(3))
    errors = {"out": list[float](), "in": list[float]()}
    for seed in range(200):
        plan = SketchPlan(4096, seed)
        P, Q = (plan.projection("w", axis, 300) for axis in ("out", "in"))
        for axis, (left, right) in {"out": (P, Q), "in": (Q, P)}.items():
            a, b = torch.outer(left.T @ x, right.T @ shared), torch.outer(left.T @ y, right.T @ shared)
            errors[axis].append(float((a * b).sum() - x @ y))
    spread = {axis: torch.tensor(found).square().mean().sqrt().item() for axis, found in errors.items()}
    assert spread["out"] == pytest.approx(128**-0.5, rel=0.2)
    assert spread["in"] == pytest.approx(32**-0.5, rel=0.2)


def test_rows_of_a_projection_are_nearly_orthogonal_and_signs_balanced() -> None:
    P = SketchPlan(4096).projection("layer", "out", 2000)
    assert abs(P.sum().item() * 8 / P.numel() ** 0.5) < 4
    gram = P @ P.T / 2  # rows of length √2 here and √½ at the other side
    off = gram[~torch.eye(2000, dtype=torch.bool)]
    assert off.mean().abs() < 1e-3
    assert off.square().mean().sqrt().item() == pytest.approx(128**-0.5, rel=0.02)


@pytest.mark.parametrize("dim", [16, 100, 1024, 4096, 5000])
def test_the_fold_uses_every_cell_once_in_buckets_of_one_size(dim: int) -> None:
    plan = SketchPlan(dim)
    order, sign = plan.fold()
    cells = plan.cells
    assert len(order) == len(sign) == math.ceil(cells / dim) * dim
    assert torch.equal(order[order < cells].sort().values, torch.arange(cells))
    assert (order[order >= cells] == cells).all()
    assert torch.equal(sign.abs(), torch.ones(len(sign)))


def test_the_fold_and_the_vector_sketch_keep_inner_products_in_the_mean() -> None:
    rng = torch.Generator().manual_seed(0)
    u, v = torch.randn(2, 4096, generator=rng, dtype=torch.float64)
    v += 0.1 * u
    folded, hashed = [], []
    for seed in range(150):
        plan = SketchPlan(64, seed)
        order, sign = plan.fold()
        folded.append(torch.dot(*((x[order] * sign).view(64, -1).sum(1) for x in (u, v))))
        cell, sign = plan.vector_buckets("bias", 300)
        parts = [torch.zeros(4096, dtype=torch.float64).index_add_(0, cell, x[:300] * sign) for x in (u, v)]
        hashed.append(torch.dot(*parts))
    for samples, truth in ((torch.stack(folded), u @ v), (torch.stack(hashed), u[:300] @ v[:300])):
        assert abs(samples.mean() - truth) < 4 * samples.std() / math.sqrt(150)


@settings(max_examples=40, deadline=None)
@given(d=st.integers(1, 9), n=st.integers(0, 40), start=st.integers(0, 8))
def test_entries_go_round_the_cells(d: int, n: int, start: int) -> None:
    G, cells = torch.arange(2.0 * n).view(2, n), torch.ones(2, d)
    add_entries(cells, G, start % d)
    expected = torch.ones(2, d).index_add_(1, (start % d + torch.arange(n)) % d, G)
    assert torch.equal(cells, expected)


@pytest.mark.parametrize("shape", [(300, 300), (576, 576), (256, 1024), (128, 4096)])
def test_the_widest_sketch_has_the_noise_of_its_size_for_gradients_of_rank_one(shape: tuple[int, int]) -> None:
    rng = torch.Generator().manual_seed(1)
    n, d_in = shape
    u, v, x = (torch.nn.functional.normalize(torch.randn(k, generator=rng, dtype=torch.float64), dim=0) for k in (n, d_in, n))
    G, H = torch.outer(u, v), torch.outer(0.6 * u + 0.8 * x, v)  # a shared input direction, as layers have
    errors = []
    for seed in range(40):
        plan = SketchPlan(65536, seed)
        assert plan.entrywise
        signs = plan.signs("w/out", n)[:, None] * plan.signs("w/in", d_in)
        cells = torch.zeros(2, 65521, dtype=torch.float64)
        add_entries(cells, (torch.stack([G, H]) * signs).flatten(1), plan.offset("w"))
        errors.append(float(cells[0] @ cells[1] - (G * H).sum()))
        some = torch.tensor([n - 1, 0])  # the same places, row by row
        by_place = torch.zeros(65521, dtype=torch.float64)
        by_place.index_add_(0, plan.places("w", torch.arange(n), d_in).flatten(), (G * signs).flatten())
        assert torch.allclose(by_place, cells[0], atol=1e-15)
        assert torch.equal(plan.places("w", some, d_in)[0], plan.places("w", torch.arange(n), d_in)[-1])
    error = torch.tensor(errors)
    assert error.square().mean().sqrt() < 1.5 * 65536**-0.5  # from both sides with k = 256: about 0.06; modulo 65,536: 0.2
    assert error.mean().abs() < 4 * error.std() / 40**0.5


def test_signs_are_the_same_on_every_machine() -> None:
    # A store of one machine must be readable beside that of another; if these change, stores lose their meaning.
    plan = SketchPlan(1024, seed=3)
    order, sign = plan.fold()
    cell, bucket_sign = plan.vector_buckets("norm", 100)
    found = [digest(part) for part in (plan.projection("q_proj", "in", 576), order, sign, cell, bucket_sign)]
    assert found == EXPECTED
    wide = SketchPlan(65536, seed=3)
    assert (wide.offset("q_proj"), digest(wide.signs("q_proj/in", 576))) == (44369, "51f6df06a008aa64")


EXPECTED = ["5348b5c934065131", "da838b7859b704dc", "1f5572c699d704b8", "00c2291bd2285373", "77f5a67f4c71b8cd"]


def test_another_process_draws_the_same_signs() -> None:
    code = (
        "from gradsieve.gradients.sketch import SketchPlan; import hashlib;"
        "print(hashlib.sha256(SketchPlan(64, 7).projection('x', 'in', 33).numpy().tobytes()).hexdigest()[:16])"
    )
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()
    assert printed == digest(SketchPlan(64, 7).projection("x", "in", 33))
