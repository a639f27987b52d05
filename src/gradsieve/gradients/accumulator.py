"""One batch on its way through the model: every layer's (input, output gradient) becomes sketch, norms, extremes, products.

Sums are kept in float32 or better: cells (the summed k x k sketches) [B, k, k], statistics per group of parameters, products
with the references [B, r].
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor, nn

from gradsieve.errors import ModelError
from gradsieve.gradients import layers
from gradsieve.gradients.directions import MeanGradient, References
from gradsieve.gradients.head import Errors, Head, Supervised
from gradsieve.gradients.parameters import Site
from gradsieve.gradients.sketch import SketchPlan
from gradsieve.gradients.statistics import Statistics

PRODUCT_FLOATS = 1 << 23  # per-example products of one layer are made for as many examples at once as stay below this
READERS = 4  # inputs remembered for sharing: with norms or adapters in between, q, k and v are this many layers apart
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
        self, settings: EngineSettings, head: Head, embedding: nn.Embedding, sites: list[Site], references: References | None
    ) -> None:
        self.settings = settings
        self.head = head
        self.embedding = embedding
        self.tied = embedding.weight is head.module.weight
        self.sites = sites
        self.references = references or References()
        self.device = head.module.weight.device
        self.dtype = head.dtype
        self.extremes = settings.layers == "extremes"
        self.moments = settings.layers != "none"
        self._projections: dict[tuple[str, torch.dtype], Tensor] = {}
        self._fold = tuple(part.to(self.device) for part in settings.sketch.fold())
        self._buffer = torch.empty(0)

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

    def buffer(self, shape: tuple[int, int, int], dtype: torch.dtype) -> Tensor:
        """Returns reused memory: fresh large temporaries cost more than the products in them."""
        need = shape[0] * shape[1] * shape[2]
        if self._buffer.numel() < need or self._buffer.dtype != dtype:
            self._buffer = torch.empty(need, dtype=dtype, device=self.device)
        return self._buffer[:need].view(shape)

    def fold(self, cells: Tensor) -> Tensor:
        """Folds k x k cells [B, k, k] to float32 [B, d]."""
        order, sign = self._fold
        flat = nn.functional.pad(cells.flatten(1), (0, 1))
        return (flat[:, order] * sign).view(len(cells), self.settings.sketch.dim, -1).sum(2).float()


class _Input:
    """A layer's input a [B, T, d_in] and the work on it that layers reading the same tensor share."""

    def __init__(self, tensor: Tensor, name: str) -> None:
        self.tensor = tensor
        self.version = tensor._version
        self.name = name
        self.sharers = 1
        self.projected: Tensor | None = None
        self.gram: Tensor | None = None

    def is_on(self, tensor: Tensor) -> bool:
        """Says whether a tensor is this input: the same memory read in the same way."""
        mine = self.tensor
        return mine is tensor or (
            mine.data_ptr() == tensor.data_ptr()
            and mine.shape == tensor.shape
            and mine.stride() == tensor.stride()
            and mine.dtype == tensor.dtype
        )


@dataclass(eq=False, slots=True)
class Call:
    """One call of a watched layer; `gradient` arrives in the backward pass, if the loss depends on this call at all."""

    module: nn.Module
    sites: list[Site]
    entry: _Input
    gradient: Tensor | None = None


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
        self.backward_runs = False
        self.groups = {"": Statistics(B, sum(site.parameter.numel() for site in tools.sites), tools.device)}
        if tools.settings.signals and mean is None:
            for name, weight in zip(SIGNALS, (tools.embedding.weight, tools.head.module.weight), strict=True):
                self.groups[name] = Statistics(B, weight.numel(), tools.device)
        self._cells = torch.zeros(B, k, k, dtype=tools.dtype, device=tools.device)
        self._dots = torch.zeros(B, len(tools.references.names), dtype=torch.float64, device=tools.device)
        self._loss = torch.zeros(B, dtype=torch.float64, device=tools.device)
        self.counts = torch.zeros(B, dtype=torch.float64, device=tools.device)
        self._calls: dict[nn.Module, list[Call]] = {}
        self._recent: deque[_Input] = deque(maxlen=READERS)
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
        columns |= {f"dot/{name}": self._dots[:, i] for i, name in enumerate(self.tools.references.names)}
        return Block(self.tools.fold(self._cells), columns)

    # -- forward -----------------------------------------------------------------------------------------------------

    def saw(self, module: nn.Module, sites: list[Site], tensor: Tensor) -> Call:
        """Keeps a layer's input. Layers close to each other that read the same tensor (q, k, v; gate, up) share it."""
        entry = next((entry for entry in self._recent if entry.is_on(tensor)), None)
        if entry is None:
            entry = _Input(tensor.detach(), sites[0].name)
            self._recent.append(entry)
        else:
            entry.sharers += 1
        call = Call(module, sites, entry)
        self._calls.setdefault(module, []).append(call)
        return call

    # -- the head ----------------------------------------------------------------------------------------------------

    def head(self, hidden: Tensor, supervised: Supervised) -> Tensor:
        """Takes the loss and the head's own gradient; returns the loss's gradient at the hidden states [N, D]."""
        tools = self.tools
        self._recent.clear()
        weight = tools.chosen("lm_head")
        bias = next((site for site in tools.sites if site.owner is tools.head.module and site.kind == "bias"), None)

        def on_errors(first: int, last: int, error: Tensor) -> None:
            example, h = supervised.example[first:last], hidden[first:last].to(error.dtype)
            if bias is not None:
                self._vector(bias, error.new_zeros(len(self._loss), error.shape[1]).index_add_(0, example, error))
            if weight is not None and self.mean is not None:
                self.mean.tensors[tools.key(weight)].addmm_(error.T, h)
            elif weight is not None:
                left = error @ tools.projection(f"{tools.key(weight)}/out", error.shape[1], error.dtype)
                right = h @ tools.projection(f"{tools.key(weight)}/in", h.shape[1], h.dtype)
                for z, count in zip(*example.unique_consecutive(return_counts=True), strict=True):
                    mine = slice(int((example < z).sum()), int((example < z).sum() + count))
                    self._cells[z].addmm_(left[mine].T, right[mine])

        wants_example = "lm_head" in self.groups or weight is not None
        nll, gradient = tools.head.backward(
            hidden,
            supervised,
            on_errors if weight is not None or bias is not None else None,
            (lambda z, h, errors: self._head_example(weight, z, h, errors)) if wants_example else None,
        )
        self.counts += torch.bincount(supervised.example, minlength=len(self._loss))
        self._loss.index_add_(0, supervised.example, nll.double()).div_(self.counts)
        return gradient

    def _head_example(self, weight: Site | None, z: int, hidden: Tensor, errors: Errors) -> None:
        """Adds one example's head gradient G = eᵀh to statistics and products, tile by tile of the vocabulary."""
        tools, h = self.tools, hidden.to(self.tools.dtype)
        references = tools.references.of(tools.key(weight)) if weight is not None and self.mean is None else None
        own = Statistics(1, tools.head.module.weight.numel(), tools.device)
        gram, sums = h @ h.T, h.sum(1)
        for part in tools.head.tiles(len(h)):
            e = errors(part)
            own.squares += ((e @ e.T) * gram).sum(dtype=torch.float64)
            own.total += (e.sum(1) @ sums).double()
            if "lm_head" in self.groups or references is not None or tools.extremes:
                G = torch.mm(e.T, h, out=tools.buffer((1, e.shape[1], h.shape[1]), h.dtype)[0])
                smallest, largest = G.aminmax()
                own.extend(smallest[None], largest[None])
                if references is not None:
                    self._dots[z] += (references[:, part].flatten(1) @ G.flatten()).double()
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
        inputs = [self._unchanged(call) for call in calls]
        outputs = [call.gradient for call in calls if call.gradient is not None]
        entry, b = calls[0].entry, outputs[0]
        if len(calls) > 1:  # a module called twice: its gradient is the sum over both calls, as if T were longer
            entry, b = _Input(torch.cat(inputs, 1), sites[0].name), torch.cat(outputs, 1)
        scales = [site for site in sites if site.kind == "scale"]
        if scales:
            gradients = layers.module_gradients(module, [site.name.rpartition(".")[2] for site in scales], entry.tensor, b)
            for site, g in zip(scales, gradients, strict=True):
                self._vector(site, g)
        for site in sites:
            if site.kind == "embedding":
                self._embedding(site, entry.tensor, b)
            elif site.kind == "bias":
                self._vector(site, b.reshape(len(self._loss), -1, b.shape[-1]).sum(1, dtype=self.tools.dtype))
            elif site.kind in ("matrix", "transposed"):
                self._matrix(site, entry, b)

    def _matrix(self, site: Site, entry: _Input, b: Tensor) -> None:
        """Adds a linear layer: G = Σ_t b_t a_tᵀ."""
        tools, (d_out, d_in) = self.tools, site.shape
        a, b = self._by_example(site, entry.tensor, d_in), self._by_example(site, b, d_out)
        if self.mean is not None:
            self.mean.tensors[site.name].addmm_(b.flatten(0, 1).T.to(tools.dtype), a.flatten(0, 1).to(tools.dtype))
        else:
            if entry.projected is None:
                entry.projected = a @ tools.projection(f"{entry.name}/in", d_in, a.dtype)
            left = b @ tools.projection(f"{site.name}/out", d_out, b.dtype)
            self._cells.baddbmm_(left.mT.to(tools.dtype), entry.projected.to(tools.dtype))
        self._matrix_statistics(site, entry, a, b)

    def _matrix_statistics(self, site: Site, entry: _Input, a: Tensor, b: Tensor) -> None:
        tools, (d_out, d_in) = self.tools, site.shape
        references = tools.references.of(site.name) if self.mean is None else None
        groups = self._groups_of(site, None)
        need_norm = tools.settings.norms or self.mean is not None or tools.moments
        materialise = references is not None or tools.extremes
        if tools.moments:
            total = (b.sum(2, dtype=torch.float64) * a.sum(2, dtype=torch.float64)).sum(1)
            for group in groups:
                group.total += total
        if not materialise and need_norm and layers.gram_is_cheaper(a.shape[1], d_out, d_in, entry.sharers):
            if entry.gram is None:
                entry.gram = torch.bmm(a, a.mT)
            squares = layers.squared_norm_by_gram(entry.gram, b)
            for group in groups:
                group.squares += squares
        elif need_norm or materialise:
            step = max(1, PRODUCT_FLOATS // (d_out * d_in))
            for first in range(0, len(a), step):
                rows = slice(first, first + step)
                self._products(layers.product(a[rows], b[rows], tools), rows, groups, references)

    def _products(self, G: Tensor, rows: slice, groups: list[Statistics], references: Tensor | None) -> None:
        """Adds what needs the per-example products themselves, [rows, d_out, d_in]."""
        squares = layers.squared_norm(G)
        for group in groups:
            group.squares[rows] += squares
        if self.tools.extremes:
            smallest, largest = layers.extremes(G)
            for group in groups:
                group.extend(smallest, largest, rows)
        if references is not None:
            self._dots[rows] += (G.flatten(1) @ references.flatten(1).T).double()

    def _vector(self, site: Site, g: Tensor) -> None:
        """Adds a bias's or scale's gradient, [B, n]."""
        tools, key = self.tools, site.name
        g = g.to(tools.dtype)
        if self.mean is not None:
            self.mean.tensors[key] += g.sum(0)[:, None]
        else:
            cell, sign = (part.to(tools.device) for part in tools.settings.sketch.vector_buckets(key, g.shape[1]))
            self._cells.view(len(g), -1).index_add_(1, cell, g * sign.to(g.dtype))
            references = tools.references.of(key)
            if references is not None:
                self._dots += (g @ references[:, :, 0].T).double()
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
        example, token, rows = layers.embedding_rows(ids, b)
        if chosen is not None and self.mean is not None:
            self.mean.tensors[tools.key(site)].index_add_(0, token, rows)
        elif chosen is not None:
            key = tools.key(site)
            left = tools.projection(f"{key}/out", site.shape[0], b.dtype)[ids]
            self._cells.baddbmm_(left.mT, b @ tools.projection(f"{key}/in", b.shape[2], b.dtype))
            references = tools.references.of(key)
            if references is not None:
                products = torch.stack([(r[token] * rows).sum(1, dtype=torch.float64) for r in references], 1)
                self._dots.index_add_(0, example, products)
        own = layers.row_statistics(example, rows, len(b), site.shape)
        for group in self._groups_of(chosen, end):
            group.merge(own)
        for z, (e, h) in self._cross.items() if chosen is not None and end == "embedding" else ():
            self.groups[""].squares[z] += 2 * (e * (h @ b[z].T)).sum(dtype=torch.float64)

    def _unchanged(self, call: Call) -> Tensor:
        """Returns a call's input, having made sure that it is still what the layer read."""
        if call.entry.tensor._version != call.entry.version:
            raise ModelError(
                f"the input of {call.sites[0].name} must stay as it is until the backward pass, got one that the model "
                "overwrites in place; leave the layer out with --params re:PATTERN"
            )
        return call.entry.tensor

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
