"""Random problems that have everything a selector can read."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from gradsieve.types import ArrayGradients, Problem, Reference

EMBEDDING = "embedding:sentence-transformers/all-MiniLM-L6-v2"
GROUPS = ("embedding", "lm_head")


def _gradients(count: int, size: int, shared: Tensor, rng: torch.Generator) -> Tensor:
    """Draws rows that share a direction, come in three topics, and differ in norm."""
    topics = torch.randn(3, size, generator=rng, dtype=torch.float64)
    G = 0.5 * shared + 0.7 * topics[torch.arange(count) % 3] + torch.randn(count, size, generator=rng, dtype=torch.float64)
    return G * (0.3 * torch.randn(count, 1, generator=rng, dtype=torch.float64)).exp()


def _lengths(count: int, rng: torch.Generator) -> dict[str, Tensor]:
    completion = torch.randint(3, 60, (count,), generator=rng)
    return {"completion_tokens": completion, "tokens": completion + torch.randint(2, 30, (count,), generator=rng)}


def _statistics(count: int, rng: torch.Generator) -> dict[str, Tensor]:
    columns = {}
    for group in GROUPS:
        G = torch.randn(count, 50, generator=rng, dtype=torch.float64) * torch.rand(count, 1, generator=rng).add(0.2).double()
        G = G - G.mean(1, keepdim=True) if group == "lm_head" else G
        columns |= {f"norm/{group}": G.norm(dim=1), f"max/{group}": G.amax(1), f"min/{group}": G.amin(1)}
        columns |= {f"sd/{group}": G.std(1, correction=0), f"mean/{group}": G.mean(1)}
    columns["mean/lm_head"] = torch.zeros(count, dtype=torch.float64)
    return columns


def build_problem(n: int, d: int = 16, m: int = 6, seed: int = 0, checkpoints: int = 1) -> Problem:
    """Returns a problem whose columns and sketches come from the same gradients of size p = 3d.

    The pool has n rows with ids in no order, every column of the docstring of `gradsieve.types`, and the references target,
    anchor, anchor:{math,knowledge}, contrast/anchor:{math,knowledge}, contrast/target. There are m targets and m + 2 anchors.
    Each has hidden states of width p // 2.
    """
    rng = torch.Generator().manual_seed(seed)
    p, half = 3 * d, m // 2 + 1
    shared = torch.randn(p, generator=rng, dtype=torch.float64)
    G, T, A, wrong = (_gradients(count, p, shared, rng) for count in (n, m, m + 2, m + 2))
    means = {"target": T.mean(0), "anchor": A.mean(0), "contrast/target": T.mean(0) - wrong[:m].mean(0)}
    means["unit/anchor"] = (A / A.norm(dim=1, keepdim=True)).mean(0)
    for name, part in (("math", slice(None, half)), ("knowledge", slice(half, None))):
        means |= {f"anchor:{name}": A[part].mean(0), f"contrast/anchor:{name}": A[part].mean(0) - wrong[part].mean(0)}
    projections = [torch.randn(p, d, generator=rng, dtype=torch.float64) / d**0.5 for _ in range(checkpoints)]

    def part(prefix: str, H: Tensor) -> ArrayGradients:
        count = len(H)
        columns = dict(ArrayGradients.from_matrix(H, references=means).columns) | _lengths(count, rng) | _statistics(count, rng)
        columns["loss"] = torch.rand(count, generator=rng, dtype=torch.float64) * 3
        columns["loss/alone"] = columns["loss"] + torch.rand(count, generator=rng, dtype=torch.float64)
        columns["bm25/target"] = torch.rand(count, generator=rng, dtype=torch.float64)
        columns["meta/rating"] = (5 * columns["bm25/target"]).ceil()
        names = torch.randperm(count, generator=rng).tolist()
        sketch = {"base" if c == 0 else f"epoch{c}": (H @ S).float() for c, S in enumerate(projections)}
        hidden = (H[:, : p // 2] + torch.randn(count, p // 2, generator=rng, dtype=torch.float64)).float()
        return ArrayGradients([f"{prefix}-{i:05d}" for i in names], sketch, columns, {"hidden": hidden, EMBEDDING: -hidden})

    cosines = {a: {b: float(r @ s / (r.norm() * s.norm())) for b, s in means.items()} for a, r in means.items()}
    references = {name: Reference(float(r.norm()), 400, 0.9, cosines[name]) for name, r in means.items()}
    return Problem(part("pool", G), part("target", T), part("anchor", A), references)


@pytest.fixture(scope="session")
def make_problem() -> Callable[..., Problem]:
    """`build_problem(n, d=16, m=6, seed=0, checkpoints=1)`; of session scope, so that hypothesis may use it."""
    return build_problem
