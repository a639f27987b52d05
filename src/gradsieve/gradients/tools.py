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
        self.device = head.module.weight.device
        self.dtype = head.dtype
        self.extremes = settings.layers == "extremes"
        self.moments = settings.layers != "none"
        self.adam = AdamDirection(moments, sites, settings.less_form, self.device, self.dtype) if moments else None
        self.repeated: frozenset[nn.Module] = frozenset()
        self._projections: dict[tuple[str, torch.dtype], Tensor] = {}
        self._buckets: dict[str, tuple[Tensor, Tensor]] = {}
        self._fold = tuple(part.to(self.device) for part in settings.sketch.fold())
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

    def projection(self, name: str, size: int, dtype: torch.dtype) -> Tensor:
        """Returns the sign matrix of one axis, [size, k], made once."""
        if (name, dtype) not in self._projections:
            self._projections[name, dtype] = self.settings.sketch.projection(name, size).to(self.device, dtype)
        return self._projections[name, dtype]

    def buckets(self, name: str, size: int) -> tuple[Tensor, Tensor]:
        """Returns the CountSketch of a parameter vector: cells int64 [size] and signs [size], made once."""
        if name not in self._buckets:
            cell, sign = self.settings.sketch.vector_buckets(name, size)
            self._buckets[name] = cell.to(self.device), sign.to(self.device, self.dtype)
        return self._buckets[name]

    def memory(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Returns reused memory: fresh large temporaries cost more than the products in them."""
        need = torch.Size(shape).numel()
        if dtype not in self._buffer or self._buffer[dtype].numel() < need:
            self._buffer[dtype] = torch.empty(need, dtype=dtype, device=self.device)
        return self._buffer[dtype][:need].view(shape)

    def fold(self, cells: Tensor) -> Tensor:
        """Folds k x k cells [B, k, k] to float32 [B, d]."""
        order, sign = self._fold
        flat = nn.functional.pad(cells.flatten(1), (0, 1))
        return (flat[:, order] * sign).view(len(cells), self.settings.sketch.dim, -1).sum(2).float()
