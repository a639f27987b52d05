"""The sums of one batch: every layer's (input, output gradient) becomes sketch, norms, extremes, products with references.

Sums are kept in float32 or better: cells (the summed sketches) [B, k_out, k_in], statistics per group of parameters, products
with the references [B, r].
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from gradsieve.gradients import layers, vocabulary
from gradsieve.gradients.directions import WIDE, MeanGradient, References
from gradsieve.gradients.extremes import Ranked, smallest_and_largest
from gradsieve.gradients.head import Errors, Supervised
from gradsieve.gradients.parameters import Site
from gradsieve.gradients.readings import Reading
from gradsieve.gradients.settings import Block
from gradsieve.gradients.sketch import PLACES, SketchPlan, add_entries
from gradsieve.gradients.statistics import Statistics
from gradsieve.gradients.tools import Tools

MOMENTS = ("norm", "mean", "sd")
EXTREMES = ("norm", "mean", "sd", "max", "min")
SIGNALS = ("embedding", "lm_head")
EVERY = slice(None)


class Sums:
    """The sums of one batch of B examples. With `mean`, gradients are added up over examples, and sketched if it says so.

    Attributes:
        groups: Statistics per group: "" is φ, then `embedding`, `lm_head`, then single parameters.
        counts: Completion tokens per example, float64 [B].
        norm: Whether ‖g‖ is taken.
        adam: What turns gradients into Γ, where that is wanted.
    """

    def __init__(self, tools: Tools, batch: int, mean: MeanGradient | None = None) -> None:
        self.tools, self.mean = tools, mean
        self.references = References() if mean is not None else tools.references
        self.adam = tools.adam if mean is None else None
        self.norm = tools.settings.norms or tools.moments or mean is not None
        self.extremes = tools.extremes and mean is None
        self.moments = tools.moments and mean is None
        self.groups = {"": Statistics(batch, sum(site.parameter.numel() for site in tools.sites), tools.device)}
        if tools.settings.signals and mean is None:
            for name, weight in zip(SIGNALS, (tools.embedding.weight, tools.head.module.weight), strict=True):
                self.groups[name] = Statistics(batch, weight.numel(), tools.device)
        self.counts = torch.zeros(batch, dtype=torch.float64, device=tools.device)
        plans = tools.plans if mean is None else tools.plans[: int(mean.sketched)]
        self._cells = {plan: torch.zeros(batch, *plan.sides, dtype=tools.dtype, device=tools.device) for plan in plans}
        self._factored = {plan: cells for plan, cells in self._cells.items() if not plan.entrywise}
        self._dots = torch.zeros(batch, len(self.references.names), dtype=torch.float64, device=tools.device)
        self._loss = torch.zeros(batch, dtype=torch.float64, device=tools.device)
        self._cross: dict[int, tuple[Tensor, Tensor]] = {}

    def sketch(self) -> Tensor:
        """Returns the finished sketches, float32 [B, d]."""
        plan = self.tools.settings.sketch
        return self.tools.fold(plan, self._cells[plan])

    def block(self) -> Block:
        """Returns the finished sketches and columns."""
        columns = {"loss": self._loss, "completion_tokens": self.counts}
        if self.tools.settings.norms:
            columns |= self.groups[""].columns(("norm",), "")
        for group, statistics in self.groups.items():
            if group in SIGNALS:
                columns |= statistics.columns(EXTREMES, group)
            elif group:
                columns |= statistics.columns(EXTREMES if self.extremes else MOMENTS, group)
        if self.references.wide is not None:
            wide = self.tools.fold(self.references.wide, self._cells[self.references.wide])
            self._dots += wide.double() @ self.references.tensors[WIDE][:, 0].double().T
        columns |= {f"dot/{name}": self._dots[:, i] for i, name in enumerate(self.references.names)}
        return Block(self.sketch(), columns)

    def way(self, site: Site, length: int, sharers: int) -> layers.Way:
        """Returns how a linear layer's quantities are taken from inputs of this length."""
        if self.adam is not None:
            return layers.Way(products=True, sketch_products=True)
        d_out, d_in = site.product_shape
        entrywise = any(plan.entrywise for plan in self._cells)
        way = layers.choose_way(
            length,
            d_out,
            d_in,
            sharers,
            sides=tuple(plan.sides for plan in self._factored),
            norm=self.norm,
            extremes=self.extremes,
            references=len(self.references.names) if self.references.full else 0,
            half=site.parameter.dtype.itemsize < 4,
        )
        return replace(way, products=True) if entrywise else way

    def groups_of(self, site: Site | None, end: str | None = None) -> list[Statistics]:
        """Returns the groups that a site's gradient belongs to: φ and its own where it is chosen, and its end's signals."""
        groups = [self.groups[end]] if end in self.groups else []
        if site is not None:
            groups.append(self.groups[""])
            if self.moments and site.shape[1] > 1:
                if site.name not in self.groups:
                    self.groups[site.name] = Statistics(len(self._loss), site.parameter.numel(), self.tools.device)
                groups.append(self.groups[site.name])
        return groups

    # -- layers ------------------------------------------------------------------------------------------------------

    def prepare(self, reading: Reading, a: Tensor) -> None:
        """Makes all that a reading's layers want of a [B, T, d_in] where none of them wants the tensor itself."""
        for plan in self._factored:
            self._project(plan, reading, a)
        if self.norm:
            self._gram(reading, a)
        if self.moments:
            self._input_sums(reading, a)

    def add_linear(
        self, site: Site, reading: Reading, a: Tensor | None, b: Tensor, part: slice = EVERY, rows: slice | Tensor = EVERY
    ) -> None:
        """Adds a linear layer: G = Σ_t b_t a_tᵀ.

        Args:
            site: The weight.
            reading: What the layer read.
            a: Its input [b, T, d_in], or None where the reading is prepared.
            b: Output gradient [b, T, d_out].
            part: The rows of the parameter's gradient that are meant (one of several experts).
            rows: The examples that are meant.
        """
        groups = self.groups_of(site)
        way = self.way(site, b.shape[1], reading.sharers)
        if self.mean is not None:
            assert a is not None
            self.mean.add_product(site.name, b.flatten(0, 1), a.flatten(0, 1), part)
        for plan, cells in self._factored.items() if not way.sketch_products else ():
            left = b @ self.tools.projection(plan, site.name, "out", site.shape[0], b.dtype)[part]
            cells[rows] += torch.bmm(left.mT, self._project(plan, reading, a))
        if self.moments and self.adam is None:
            total = (b.sum(2) * self._input_sums(reading, a)).sum(1, dtype=torch.float64)
            for group in groups:
                group.total[rows] += total
        if way.products:
            assert a is not None
            self._add_products(site, reading.name, way, a, b, groups, part, rows)
            return
        if self.norm:
            squares = layers.squared_norm_by_gram(self._gram(reading, a), b)
            for group in groups:
                group.squares[rows] += squares
        if self.references.full:
            assert a is not None
            self._dots[rows] += layers.dots_around(a, b, self.references.of(site.name)[:, part])
        if self.extremes:
            smallest, largest = smallest_and_largest(self._rank(reading, a), Ranked.of(b))
            for group in groups:
                group.extend(smallest, largest, rows)

    def _project(self, plan: SketchPlan, reading: Reading, a: Tensor | None) -> Tensor:
        if plan not in reading.projected:
            assert a is not None
            reading.projected[plan] = a @ self.tools.projection(plan, reading.name, "in", a.shape[2], a.dtype)
        return reading.projected[plan]

    def _gram(self, reading: Reading, a: Tensor | None) -> list[Tensor]:
        if reading.gram is None:
            assert a is not None
            reading.gram = layers.doubled(layers.gram(a))
        return reading.gram

    def _input_sums(self, reading: Reading, a: Tensor | None) -> Tensor:
        if reading.sums is None:
            assert a is not None
            reading.sums = a.sum(2)
        return reading.sums

    def _rank(self, reading: Reading, a: Tensor | None) -> Ranked:
        if reading.ranked is None:
            assert a is not None
            reading.ranked = Ranked.of(a)
        return reading.ranked

    def _add_products(
        self,
        site: Site,
        reader: str,
        way: layers.Way,
        a: Tensor,
        b: Tensor,
        groups: Sequence[Statistics],
        part: slice,
        rows: slice | Tensor,
    ) -> None:
        """Adds what is taken from the per-example gradients themselves, tile by tile."""
        tools, references = self.tools, self.references.of(site.name)[:, part]
        members = torch.arange(len(self._loss), device=tools.device)[rows]
        for some, columns, G in layers.product_tiles(a, b, tools.memory):
            mine = members[some]
            if self.adam is not None:
                G = self.adam.of(site.name, G, columns)
                for group in groups if self.moments else ():
                    group.total[mine] += G.sum((1, 2), dtype=torch.float64)
            if self.norm:
                squares = layers.squared_norm(G)
                for group in groups:
                    group.squares[mine] += squares
            if self.extremes:
                smallest, largest = layers.extremes(G)
                for group in groups:
                    group.extend(smallest, largest, mine)
            if len(references):
                self._dots[mine] += layers.dots(G, references[:, columns].to(G.dtype))
            for plan, cells in self._factored.items() if way.sketch_products else ():
                left = tools.projection(plan, site.name, "out", site.shape[0], G.dtype)[part][columns]
                cells[mine] += layers.sketch_of(G, left, tools.projection(plan, reader, "in", a.shape[2], G.dtype))
            self._add_entries(site, G, mine, (part.start or 0) + columns.start)  # last: it may change the tile

    def _add_entries(self, site: Site, G: Tensor, members: Tensor, row: int = 0) -> None:
        """Adds part of a gradient [b, n, d_in], from this row of the whole on, to the entrywise sketches; overwrites it."""
        for plan, cells in self._cells.items():
            if plan.entrywise:
                start, rows, columns = self.tools.entries(plan, self.tools.key(site), site.shape)
                signed = G.mul_(rows[row : row + G.shape[1], None].to(G.dtype)).mul_(columns.to(G.dtype))
                own = cells.flatten(1)[members]
                add_entries(own[:, :PLACES], signed.flatten(1).to(own.dtype), (start + row * site.shape[1]) % PLACES)
                cells.flatten(1)[members] = own

    def add_whole(self, site: Site, G: Tensor) -> None:
        """Adds the gradients of a small parameter themselves, [B, …] in the parameter's own shape."""
        tools, name = self.tools, site.name
        G = G.to(tools.dtype).reshape(len(G), *site.shape)
        if self.adam is not None:
            G = self.adam.of(name, G)
        if self.mean is not None:
            self.mean.tensors[name] += G.sum(0)
        for plan, cells in self._cells.items():
            if plan.entrywise and site.shape[1] > 1:
                self._add_entries(site, G.clone(), torch.arange(len(G), device=G.device))
            elif site.shape[1] > 1:
                left = tools.projection(plan, name, "out", site.shape[0], G.dtype)
                cells += layers.sketch_of(G, left, tools.projection(plan, name, "in", site.shape[1], G.dtype))
            else:
                cell, sign = tools.buckets(plan, name, site.shape[0])
                cells.view(len(G), -1).index_add_(1, cell, G[:, :, 0] * sign)
        if self.references.full:
            self._dots += layers.dots(G, self.references.of(name).to(G.dtype))
        for group in self.groups_of(site):
            group.squares += G.flatten(1).square().sum(1, dtype=torch.float64)
            group.total += G.flatten(1).sum(1, dtype=torch.float64)
            group.extend(G.flatten(1).amin(1), G.flatten(1).amax(1))

    def add_embedding(self, site: Site, ids: Tensor, b: Tensor) -> None:
        """Adds an embedding: the gradient's row of a token is the sum of b [B, T, D] where it stands in ids [B or 1, T]."""
        tools, end = self.tools, self.tools.end(site)
        chosen = site if any(site is own for own in tools.sites) else None
        b, ids = b.to(tools.dtype), ids.expand(len(b), -1)
        padding = getattr(site.owner, "padding_idx", None)
        if padding is not None:  # autograd gives that token's row no gradient, wherever it stands
            b = b.masked_fill((ids == padding)[..., None], 0)
        if chosen is not None and self.mean is not None:
            self.mean.tensors[tools.key(site)].index_add_(0, ids.flatten(), b.flatten(0, 1))
        if chosen is not None:
            key = tools.key(site)
            self._add_embedding_entries(site, ids, b)
            for plan, cells in self._factored.items():
                left = tools.projection(plan, key, "out", site.shape[0], b.dtype)[ids]
                cells.baddbmm_(left.mT, b @ tools.projection(plan, key, "in", b.shape[2], b.dtype))
            for i, R in enumerate(self.references.of(key)):
                self._dots[:, i] += (R[ids] * b).sum(2).sum(1, dtype=torch.float64)
        if (chosen is not None and self.norm) or end in self.groups:
            example, _, token_rows = layers.embedding_rows(ids, b)
            own = layers.row_statistics(example, token_rows, len(b), site.shape)
            for group in self.groups_of(chosen, end):
                group.merge(own)
        for z, (e, h) in self._cross.items() if chosen is not None and end == "embedding" else ():
            self.groups[""].squares[z] += 2 * (e.to(b.dtype) * (h.to(b.dtype) @ b[z].T)).sum(dtype=torch.float64)

    def _add_embedding_entries(self, site: Site, ids: Tensor, b: Tensor) -> None:
        """Adds an embedding's gradient to the entrywise sketches."""
        key = self.tools.key(site)
        for plan, cells in self._cells.items():
            if plan.entrywise:
                example, token, token_rows = layers.embedding_rows(ids, b)
                _, rows, columns = self.tools.entries(plan, key, site.shape)
                place = example[:, None] * plan.dim + plan.places(key, token, site.shape[1])
                signed = token_rows * rows[token, None] * columns
                cells.view(-1).index_add_(0, place.flatten(), signed.to(cells.dtype).flatten())

    # -- the head ----------------------------------------------------------------------------------------------------

    def add_head(self, hidden: Tensor, supervised: Supervised, input_ids: Tensor) -> Tensor:
        """Adds the loss and the head's own gradient; returns the loss's gradient at the hidden states [N, D]."""
        tools = self.tools
        weight = tools.chosen("lm_head")
        bias = next((site for site in tools.sites if site.owner is tools.head.module and site.kind == "bias"), None)

        errors_of_runs: list[Tensor] = []  # [B, V], one: the runs' sum

        def on_run(first: int, last: int, error: Tensor, h: Tensor) -> None:
            if bias is not None:
                own = self._per_example(supervised, first, last, error).to(tools.dtype)
                errors_of_runs[:] = [own + before for before in errors_of_runs] or [own]
            if weight is not None:
                self._add_head_run(weight, supervised, first, last, error, h)

        def on_example(z: int, h: Tensor, errors: Errors) -> None:
            self._add_head_example(weight, z, h, errors, input_ids[z])

        nll, gradient = tools.head.backward(
            hidden,
            supervised,
            on_run if weight is not None or bias is not None else None,
            on_example if "lm_head" in self.groups or (weight is not None and self.norm) else None,
        )
        if bias is not None:
            self.add_whole(bias, errors_of_runs[0])
        self.counts += torch.bincount(supervised.example, minlength=len(self._loss))
        self._loss.index_add_(0, supervised.example, nll.double()).div_(self.counts)
        return gradient

    def _per_example(self, supervised: Supervised, first: int, last: int, error: Tensor) -> Tensor:
        """Returns each example's weighted sum of errors in this run of positions, [B, V]."""
        owner = error.new_zeros(len(self._loss), last - first)
        positions = torch.arange(last - first, device=error.device)
        owner[supervised.example[first:last], positions] = supervised.weight[first:last].to(error.dtype)
        return owner @ error

    def _add_head_run(self, site: Site, supervised: Supervised, first: int, last: int, error: Tensor, h: Tensor) -> None:
        """Adds a run of positions: G = Σ_t e_t h_tᵀ."""
        tools, key = self.tools, self.tools.key(site)
        if self.mean is not None:
            self.mean.add_product(key, error, h)
        for z, run in supervised.inside(first, last) if len(self._factored) < len(self._cells) else ():
            own = torch.tensor([z], device=h.device)
            for part in tools.head.tiles(h.shape[1]):
                self._add_entries(site, (error[run, part].T @ h[run])[None], own, part.start)
        for plan, cells in self._factored.items():
            left = error @ tools.projection(plan, key, "out", error.shape[1], error.dtype)
            right = h @ tools.projection(plan, key, "in", h.shape[1], h.dtype)
            for z, run in supervised.inside(first, last):
                cells[z] += left[run].T @ right[run]
        for i, R in enumerate(self.references.of(key)):
            products = (error @ R).mul_(h).sum(1, dtype=tools.dtype)
            self._dots[:, i].index_add_(0, supervised.example[first:last], products.double())

    def _add_head_example(self, weight: Site | None, z: int, h: Tensor, errors: Errors, ids: Tensor) -> None:
        """Adds one example's head gradient to the statistics."""
        tools = self.tools
        own = Statistics(1, tools.head.module.weight.numel(), tools.device)
        squares, total = vocabulary.squared_norm_and_total(h, errors, tools.head.tiles(len(h)))
        own.squares += squares
        own.total += total
        if "lm_head" in self.groups or self.extremes:
            smallest, largest = vocabulary.extremes(h, errors, tools.head.tiles(len(h)))
            own.extend(smallest[None], largest[None])
        for group in self.groups_of(weight, "lm_head"):
            group.merge(own, z)
        if weight is not None and tools.tied and tools.chosen("embedding") is not None:
            self._cross[z] = errors(ids), h
