"""One batch on its way through the model: every layer's (input, output gradient) becomes sketch, norms, extremes, products.

Sums are kept in float32 or better: cells (the summed k x k sketches) [B, k, k], statistics per group of parameters, products
with the references [B, r].
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from gradsieve.errors import ModelError
from gradsieve.gradients import layers, vocabulary
from gradsieve.gradients.directions import MeanGradient, References
from gradsieve.gradients.head import Errors, Head, Supervised
from gradsieve.gradients.parameters import Site
from gradsieve.gradients.readings import Call, Reading, joined
from gradsieve.gradients.sketch import SketchPlan
from gradsieve.gradients.statistics import Statistics

READERS = 4  # readings remembered for sharing: with norms or adapters in between, q, k and v are this many layers apart
MOMENTS = ("norm", "mean", "sd")
EXTREMES = ("norm", "mean", "sd", "max", "min")
SIGNALS = ("embedding", "lm_head")


@dataclass(frozen=True, slots=True)
class EngineSettings:
    """What to take from each example; part of a store's fingerprint.

    Attributes:
        params: The parameters φ, see `gradsieve.gradients.parameters`.
        sketch: Size and seed of the projection.
        reduction: `mean` or `sum` of the completion tokens' losses.
        norms: Whether ‖g‖ is taken exactly.
        signals: Whether the embedding's and the LM head's norm, mean, sd, max and min are taken (GRADS-1).
        layers: Statistics of every single parameter as columns: `none`, `moments` (norm, mean, sd) or `extremes` (and
            max, min).
    """

    params: str = "auto"
    sketch: SketchPlan = field(default_factory=SketchPlan)
    reduction: Literal["mean", "sum"] = "mean"
    norms: bool = True
    signals: bool = True
    layers: Literal["none", "moments", "extremes"] = "none"


@dataclass(frozen=True, slots=True)
class Batch:
    """Padded examples, padding on the right: a causal model then needs no attention mask.

    Attributes:
        input_ids: int64 [B, T].
        labels: int64 [B, T], -100 where there is no loss; unshifted, as transformers has them.
    """

    input_ids: Tensor
    labels: Tensor


@dataclass(frozen=True, slots=True)
class Block:
    """What the engine makes of one batch.

    Attributes:
        sketch: float32 [B, d].
        columns: float64 [B] by name: `loss`, `completion_tokens`, `norm`, `norm/lm_head`, `dot/…` with unit references, …
    """

    sketch: Tensor
    columns: Mapping[str, Tensor]


class Tools:
    """What all batches share: projections, references, reused memory."""

    def __init__(
        self, settings: EngineSettings, head: Head, model: Any, sites: list[Site], references: References | None
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


class Accumulator:
    """The sums of one batch. With `mean` given, gradients are added up over examples instead of sketched.

    Attributes:
        groups: Statistics per group: "" is φ, then `embedding`, `lm_head`, then single parameters.
        backward_runs: True once forward is over.
        counts: Completion tokens per example, float64 [B].
    """

    def __init__(self, tools: Tools, batch: Batch, mean: MeanGradient | None = None) -> None:
        B, k = len(batch.input_ids), tools.settings.sketch.side
        self.tools, self.batch, self.mean = tools, batch, mean
        self.references = References() if mean is not None else tools.references
        self.norm = tools.settings.norms or tools.moments or mean is not None
        self.backward_runs = False
        self.groups = {"": Statistics(B, sum(site.parameter.numel() for site in tools.sites), tools.device)}
        if tools.settings.signals and mean is None:
            for name, weight in zip(SIGNALS, (tools.embedding.weight, tools.head.module.weight), strict=True):
                self.groups[name] = Statistics(B, weight.numel(), tools.device)
        self.counts = torch.zeros(B, dtype=torch.float64, device=tools.device)
        self._cells = torch.zeros(B, k, k, dtype=tools.dtype, device=tools.device)
        self._dots = torch.zeros(B, len(self.references.names), dtype=torch.float64, device=tools.device)
        self._loss = torch.zeros(B, dtype=torch.float64, device=tools.device)
        self._calls: dict[nn.Module, list[Call]] = {}
        self._recent: deque[Reading] = deque()
        self._cross: dict[int, tuple[Tensor, Tensor]] = {}

    def block(self) -> Block:
        """Returns the finished sketches and columns."""
        columns = {"loss": self._loss, "completion_tokens": self.counts}
        if self.tools.settings.norms:
            columns |= self.groups[""].columns(("norm",), "")
        for group, statistics in self.groups.items():
            if group in SIGNALS:
                columns |= statistics.columns(EXTREMES, group)
            elif group:
                columns |= statistics.columns(EXTREMES if self.tools.extremes else MOMENTS, group)
        columns |= {f"dot/{name}": self._dots[:, i] for i, name in enumerate(self.references.names)}
        return Block(self.tools.fold(self._cells), columns)

    # -- forward -----------------------------------------------------------------------------------------------------

    def saw(self, module: nn.Module, sites: list[Site], tensor: Tensor) -> Call:
        """Keeps a layer's input. Layers close to each other that read the same tensor (q, k, v; gate, up) share it."""
        reading = next((reading for reading in self._recent if reading.is_of(tensor)), None)
        if reading is None:
            reading = Reading(tensor, sites[0].name)
            self._recent.append(reading)
            if len(self._recent) > READERS:
                self._settle(self._recent.popleft())
        else:
            reading.sharers += 1
        call = Call(module, sites, reading)
        reading.calls.append(call)
        self._calls.setdefault(module, []).append(call)
        return call

    def _settle(self, reading: Reading) -> None:
        """Lets a tensor go that all readers have read, where its projection and Gram matrix are all that is wanted of it."""
        calls, reading.calls = reading.calls, []  # they point back at the reading, and would keep it alive
        if any(self._needs_tensor(call) for call in calls):
            return
        sites = [site for call in calls for site in call.sites if site.kind in ("matrix", "transposed")]
        if sites:
            a = self._by_example(sites[0], reading.tensor, sites[0].shape[1])
            self._project(reading, a)
            if self.norm:
                self._gram(reading, a)
            if self.tools.moments:
                self._sums(reading, a)
        reading.let_go()

    def _needs_tensor(self, call: Call) -> bool:
        if self.mean is not None or call.module in self.tools.repeated:
            return True
        kinds = {site.kind for site in call.sites}
        if kinds & {"scale", "embedding"}:
            return True
        return any(
            way.products or self.references.names
            for way in (self._way(site, call.reading.sharers) for site in call.sites if site.kind in ("matrix", "transposed"))
        )

    def _way(self, site: Site, sharers: int, calls: int = 1) -> layers.Way:
        return layers.choose_way(
            self.batch.input_ids.shape[1] * calls,
            *site.shape,
            sharers,
            side=self.tools.settings.sketch.side if self.mean is None else 0,
            norm=self.norm,
            extremes=self.tools.extremes and self.mean is None,
            references=len(self.references.names),
            half=site.parameter.dtype.itemsize < 4,
        )

    # -- the head ----------------------------------------------------------------------------------------------------

    def head(self, hidden: Tensor, supervised: Supervised) -> Tensor:
        """Takes the loss and the head's own gradient; returns the loss's gradient at the hidden states [N, D]."""
        tools = self.tools
        while self._recent:
            self._settle(self._recent.popleft())
        weight = tools.chosen("lm_head")
        bias = next((site for site in tools.sites if site.owner is tools.head.module and site.kind == "bias"), None)

        def on_run(first: int, last: int, error: Tensor, h: Tensor) -> None:
            if bias is not None:
                self._vector(bias, self._per_example(supervised, first, last, error))
            if weight is not None:
                self._head_weight(weight, supervised, first, last, error, h)

        whole = "lm_head" in self.groups or (weight is not None and self.norm)
        nll, gradient = tools.head.backward(
            hidden,
            supervised,
            on_run if weight is not None or bias is not None else None,
            (lambda z, h, errors: self._head_example(weight, z, h, errors)) if whole else None,
        )
        self.counts += torch.bincount(supervised.example, minlength=len(self._loss))
        self._loss.index_add_(0, supervised.example, nll.double()).div_(self.counts)
        return gradient

    def _per_example(self, supervised: Supervised, first: int, last: int, error: Tensor) -> Tensor:
        """Returns each example's weighted sum of errors in this run of positions, [B, V]."""
        owner = error.new_zeros(len(self._loss), last - first)
        rows = torch.arange(last - first, device=error.device)
        owner[supervised.example[first:last], rows] = supervised.weight[first:last].to(error.dtype)
        return owner @ error

    def _head_weight(self, site: Site, supervised: Supervised, first: int, last: int, error: Tensor, h: Tensor) -> None:
        """Adds a run of positions: G = Σ_t e_t h_tᵀ."""
        tools, key = self.tools, self.tools.key(site)
        if self.mean is not None:
            self.mean.add_product(key, error, h)
            return
        left = error @ tools.projection(f"{key}/out", error.shape[1], error.dtype)
        right = h @ tools.projection(f"{key}/in", h.shape[1], h.dtype)
        for z, rows in supervised.inside(first, last):
            self._cells[z] += left[rows].T @ right[rows]
        for i, R in enumerate(self.references.of(key)):
            products = (error @ R).mul_(h).sum(1, dtype=torch.float32 if h.dtype.itemsize < 4 else h.dtype)
            self._dots[:, i].index_add_(0, supervised.example[first:last], products.double())

    def _head_example(self, weight: Site | None, z: int, h: Tensor, errors: Errors) -> None:
        """Adds one example's head gradient to the statistics."""
        tools = self.tools
        own = Statistics(1, tools.head.module.weight.numel(), tools.device)
        squares, total = vocabulary.squared_norm_and_total(h, errors, tools.head.tiles(len(h)))
        own.squares += squares
        own.total += total
        if "lm_head" in self.groups or (tools.extremes and self.mean is None):
            smallest, largest = vocabulary.extremes(h, errors, tools.head.tiles(len(h)))
            own.extend(smallest[None], largest[None])
        for group in self._groups_of(weight, "lm_head"):
            group.merge(own, z)
        if weight is not None and tools.tied and tools.chosen("embedding") is not None:
            self._cross[z] = errors(self.batch.input_ids[z]), h

    def _groups_of(self, site: Site | None, end: str | None) -> list[Statistics]:
        """The groups that a site's gradient belongs to: φ and its own where it is chosen, and its end's signals."""
        groups = [self.groups[end]] if end in self.groups else []
        if site is not None:
            groups.append(self.groups[""])
            if self.tools.moments and self.mean is None and site.kind not in ("bias", "scale"):
                groups.append(self._own_group(site))
        return groups

    def _own_group(self, site: Site) -> Statistics:
        if site.name not in self.groups:
            self.groups[site.name] = Statistics(len(self._loss), site.parameter.numel(), self.tools.device)
        return self.groups[site.name]

    # -- the layers --------------------------------------------------------------------------------------------------

    def receive(self, call: Call, gradient: Tensor) -> None:
        """Takes a call's output gradient; once every call of the layer has its own, adds the layer to the sums."""
        call.gradient = gradient
        if all(other.gradient is not None for other in self._calls[call.module]):
            self._add(self._calls.pop(call.module))

    def finish(self) -> None:
        """Adds the layers of which the loss depends on some calls only; the others' gradient is zero."""
        for calls in self._calls.values():
            if met := [call for call in calls if call.gradient is not None]:
                self._add(met)
        self._calls.clear()

    def _add(self, calls: list[Call]) -> None:
        module, sites = calls[0].module, calls[0].sites
        reading, b = joined(calls)
        scales = [site for site in sites if site.kind == "scale"]
        if scales:
            names = [site.name.rpartition(".")[2] for site in scales]
            for site, g in zip(scales, layers.module_gradients(module, names, reading.tensor, b), strict=True):
                self._vector(site, g)
        for site in sites:
            if site.kind == "embedding":
                self._embedding(site, reading.tensor, b)
            elif site.kind == "bias":
                self._vector(site, b.reshape(len(self._loss), -1, b.shape[-1]).sum(1, dtype=self.tools.dtype))
            elif site.kind in ("matrix", "transposed"):
                self._matrix(site, reading, self._by_example(site, b, site.shape[0]))

    def _matrix(self, site: Site, reading: Reading, b: Tensor) -> None:
        """Adds a linear layer: G = Σ_t b_t a_tᵀ."""
        T, groups = self.batch.input_ids.shape[1], self._groups_of(site, None)
        way = self._way(site, reading.sharers, b.shape[1] // T)
        a = None if reading.gone else self._by_example(site, reading.tensor, site.shape[1])
        if self.mean is not None:
            assert a is not None
            self.mean.add_product(site.name, b.flatten(0, 1), a.flatten(0, 1))
        elif not way.sketch_products:
            left = b @ self.tools.projection(f"{site.name}/out", b.shape[2], b.dtype)
            if self._cells.dtype == left.dtype:
                self._cells.baddbmm_(left.mT, self._project(reading, a))
            else:
                self._cells += torch.bmm(left.mT, self._project(reading, a))
        if self.tools.moments and self.mean is None:
            total = (b.sum(2) * self._sums(reading, a)).sum(1, dtype=torch.float64)
            for group in groups:
                group.total += total
        if way.products:
            assert a is not None
            self._products(site, reading.name, way, a, b, groups)
            return
        if self.norm:
            squares = layers.squared_norm_by_gram(self._gram(reading, a), b)
            for group in groups:
                group.squares += squares
        if self.references.names:
            assert a is not None
            self._dots += layers.dots_around(a, b, self.references.of(site.name))

    def _project(self, reading: Reading, a: Tensor | None) -> Tensor:
        if reading.projected is None:
            assert a is not None
            reading.projected = a @ self.tools.projection(f"{reading.name}/in", a.shape[2], a.dtype)
        return reading.projected

    def _gram(self, reading: Reading, a: Tensor | None) -> Tensor:
        if reading.gram is None:
            assert a is not None
            reading.gram = torch.bmm(a, a.mT)
        return reading.gram

    def _sums(self, reading: Reading, a: Tensor | None) -> Tensor:
        if reading.sums is None:
            assert a is not None
            reading.sums = a.sum(2)
        return reading.sums

    def _products(self, site: Site, reader: str, way: layers.Way, a: Tensor, b: Tensor, groups: list[Statistics]) -> None:
        """Adds what is taken from the per-example gradients themselves, tile by tile."""
        tools, references = self.tools, self.references.of(site.name)
        for rows, part, G in layers.product_tiles(a, b, tools.memory):
            if self.norm:
                squares = layers.squared_norm(G)
                for group in groups:
                    group.squares[rows] += squares
            if tools.extremes and self.mean is None:
                smallest, largest = layers.extremes(G)
                for group in groups:
                    group.extend(smallest, largest, rows)
            if len(references):
                self._dots[rows] += layers.dots(G, references[:, part])
            if way.sketch_products and self.mean is None:
                left = tools.projection(f"{site.name}/out", b.shape[2], b.dtype)[part]
                self._cells[rows] += layers.sketch_of(G, left, tools.projection(f"{reader}/in", a.shape[2], a.dtype))

    def _vector(self, site: Site, g: Tensor) -> None:
        """Adds a bias's or scale's gradient, [B, n]."""
        tools, key = self.tools, site.name
        g = g.to(tools.dtype)
        if self.mean is not None:
            self.mean.tensors[key] += g.sum(0)[:, None]
        else:
            cell, sign = tools.buckets(key, g.shape[1])
            self._cells.view(len(g), -1).index_add_(1, cell, g * sign)
            if self.references.names:
                self._dots += (g @ self.references.of(key)[:, :, 0].T.to(g.dtype)).double()
        for group in self._groups_of(site, None):
            group.squares += g.square().sum(1, dtype=torch.float64)
            group.total += g.sum(1, dtype=torch.float64)
            group.extend(g.amin(1), g.amax(1))

    def _embedding(self, site: Site, ids: Tensor, b: Tensor) -> None:
        """Adds an embedding: the gradient's row of a token is the sum of b where the token stands."""
        tools, end = self.tools, self.tools.end(site)
        scale = getattr(site.owner, "embed_scale", None)  # Gemma 3 multiplies inside the module
        b = b.to(tools.dtype) if scale is None else b.to(tools.dtype) * scale
        chosen = site if any(site is own for own in tools.sites) else None
        ids = ids.expand(len(b), -1)
        if chosen is not None and self.mean is not None:
            self.mean.tensors[tools.key(site)].index_add_(0, ids.flatten(), b.flatten(0, 1))
        elif chosen is not None:
            key = tools.key(site)
            left = tools.projection(f"{key}/out", site.shape[0], b.dtype)[ids]
            self._cells.baddbmm_(left.mT, b @ tools.projection(f"{key}/in", b.shape[2], b.dtype))
            for i, R in enumerate(self.references.of(key)):
                self._dots[:, i] += (R[ids] * b).sum(2).sum(1, dtype=torch.float64)
        groups = self._groups_of(chosen, end)
        if (chosen is not None and self.norm) or end in self.groups:
            example, _, rows = layers.embedding_rows(ids, b)
            own = layers.row_statistics(example, rows, len(b), site.shape)
            for group in groups:
                group.merge(own)
        for z, (e, h) in self._cross.items() if chosen is not None and end == "embedding" else ():
            self.groups[""].squares[z] += 2 * (e.to(b.dtype) * (h.to(b.dtype) @ b[z].T)).sum(dtype=torch.float64)

    def _by_example(self, site: Site, x: Tensor, width: int) -> Tensor:
        """Returns a layer's input or output gradient as [B, T, width]; some models flatten the first two."""
        if x.ndim == 3 and len(x) == len(self._loss):
            return x
        if x.numel() == self.batch.input_ids.numel() * width:
            return x.reshape(len(self._loss), -1, width)
        raise ModelError(
            f"the input of {site.name} must have one row per token of the batch, got {list(x.shape)} for a batch of "
            f"{list(self.batch.input_ids.shape)}; leave the layer out with --params re:PATTERN"
        )
