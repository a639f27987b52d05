"""What all batches of one engine share: projections, references, reused memory."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from gradsieve.gradients.adam import AdamDirection, Moments
from gradsieve.gradients.directions import References
from gradsieve.gradients.head import Head
from gradsieve.gradients.parameters import Site
from gradsieve.gradients.settings import EngineSettings
from gradsieve.gradients.sketch import Axis, SketchPlan


class Tools:
    """What all batches share: projections, references, reused memory."""

    def __init__(
        self,
        settings: EngineSettings,
        head: Head,
        model: Any,
        sites: list[Site],
        references: References | None,
        moments: Moments | None,
    ) -> None:
        self.settings = settings
        self.head = head
        self.embedding: nn.Embedding = model.get_input_embeddings()
        self.tied = self.embedding.weight is head.module.weight
        self.sites = sites
        self.references = references or References()
        wide = self.references.wide
        self.plans: tuple[SketchPlan, ...] = (settings.sketch,) if wide is None else (settings.sketch, wide)
        self.device = head.module.weight.device
        self.dtype = head.dtype
        self.extremes = settings.layers == "extremes"
        self.moments = settings.layers != "none"
        self.adam = AdamDirection(moments, sites, settings.less_form, self.device, self.dtype) if moments else None
        self.repeated: frozenset[nn.Module] = frozenset()
        self._projections: dict[tuple[SketchPlan, str, Axis, torch.dtype], Tensor] = {}
        self._buckets: dict[tuple[SketchPlan, str], tuple[Tensor, Tensor]] = {}
        self._entries: dict[tuple[SketchPlan, str], tuple[int, Tensor, Tensor]] = {}
        self._folds = {plan: tuple(part.to(self.device) for part in plan.fold()) for plan in self.plans}
        self._buffer: dict[torch.dtype, Tensor] = {}

    def key(self, site: Site) -> str:
        """Returns the name of the parameter: tied weights are one, whichever end the site stands at."""
        return "tied" if self.tied and self.end(site) else site.name

    def end(self, site: Site) -> str | None:
        """Returns `embedding` or `lm_head` where the site is that group's weight, else None."""
        if site.kind == "head":
            return "lm_head"
        return "embedding" if site.owner is self.embedding else None

    def chosen(self, end: str) -> Site | None:
        """Returns the site of an end where it belongs to φ."""
        return next((site for site in self.sites if self.end(site) == end), None)

    def projection(self, plan: SketchPlan, name: str, axis: Axis, size: int, dtype: torch.dtype) -> Tensor:
        """Returns the sign matrix of one axis, [size, k_axis], made once."""
        key = plan, name, axis, dtype
        if key not in self._projections:
            self._projections[key] = plan.projection(name, axis, size).to(self.device, dtype)
        return self._projections[key]

    def buckets(self, plan: SketchPlan, name: str, size: int) -> tuple[Tensor, Tensor]:
        """Returns the CountSketch of a parameter vector: cells int64 [size] and signs [size], made once."""
        if (plan, name) not in self._buckets:
            cell, sign = plan.vector_buckets(name, size)
            self._buckets[plan, name] = cell.to(self.device), sign.to(self.device, self.dtype)
        return self._buckets[plan, name]

    def entries(self, plan: SketchPlan, name: str, shape: tuple[int, int]) -> tuple[int, Tensor, Tensor]:
        """Returns where a matrix's first entry goes in an entrywise sketch, and signs of its rows and columns, made once."""
        if (plan, name) not in self._entries:
            rows, columns = (plan.signs(f"{name}/{axis}", n) for axis, n in zip(("out", "in"), shape, strict=True))
            self._entries[plan, name] = (
                plan.offset(name), rows.to(self.device, self.dtype), columns.to(self.device, self.dtype)
            )  # fmt: skip
        return self._entries[plan, name]

    def memory(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Returns reused memory: fresh large temporaries cost more than the products in them."""
        need = torch.Size(shape).numel()
        if dtype not in self._buffer or self._buffer[dtype].numel() < need:
            self._buffer[dtype] = torch.empty(need, dtype=dtype, device=self.device)
        return self._buffer[dtype][:need].view(shape)

    def fold(self, plan: SketchPlan, cells: Tensor) -> Tensor:
        """Folds cells [B, k_out, k_in] to float32 [B, d]."""
        order, sign = self._folds[plan]
        flat = nn.functional.pad(cells.flatten(1), (0, 1))
        return (flat[:, order] * sign).view(len(cells), plan.dim, -1).sum(2).float()
