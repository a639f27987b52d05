"""One batch on its way through the model: what arrives when, until a layer's input and output gradient are both there.

In the forward pass every watched layer's input arrives, in the backward pass its output gradient; a layer is added to the sums
as soon as it has both. Inside a checkpointed block the inputs arrive in the backward pass too, when the block is run again.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from gradsieve.errors import ModelError
from gradsieve.gradients import experts, modules
from gradsieve.gradients.directions import MeanGradient
from gradsieve.gradients.head import Supervised
from gradsieve.gradients.parameters import Site
from gradsieve.gradients.readings import Call, Reading, Routing, joined
from gradsieve.gradients.settings import Batch
from gradsieve.gradients.sums import Sums
from gradsieve.gradients.tools import Tools

READERS = 4  # readings remembered for sharing: with norms or adapters in between, q, k and v are this many layers apart


class Accumulator:
    """Takes in what arrives of one batch, and adds it to the sums.

    Attributes:
        batch: The batch.
        sums: Its sums.
        backward_runs: True once forward is over.
        paused: True while modules are run again for their own sake: nothing that then arrives counts.
        hooks: Those on tensors of the graph.
        hidden: The examples' pooled hidden states, where they are taken.
    """

    def __init__(self, tools: Tools, batch: Batch, mean: MeanGradient | None = None) -> None:
        self.tools, self.batch = tools, batch
        self.sums = Sums(tools, len(batch.input_ids), mean)
        self.backward_runs = False
        self.paused = False
        self.hooks: list[torch.utils.hooks.RemovableHandle] = []
        self.hidden: torch.Tensor | None = None
        self._calls: dict[nn.Module, list[Call]] = {}
        self._recent: deque[Reading] = deque()
        self._region: int | None = None
        self._met: dict[tuple[nn.Module, str], int] = {}
        self._late: list[nn.Module] = []
        self._awaited: dict[tuple[int, nn.Module, str, int], Call] = {}

    def release(self) -> None:
        """Takes the hooks off the graph: they hold this object, which holds tensors of the graph, a whole batch in a circle."""
        for hook in self.hooks:
            hook.remove()
        self.hooks.clear()
        self._calls.clear()
        self._recent.clear()
        self._awaited.clear()

    # -- inputs ------------------------------------------------------------------------------------------------------

    def enter(self, region: int) -> None:
        """Begins a checkpointed block, in the forward pass or again in the backward pass."""
        self.settle()
        self._region = region
        self._met.clear()

    def leave(self) -> None:
        """Ends a checkpointed block."""
        self.settle()
        self._region = None

    def saw(
        self,
        module: nn.Module,
        sites: list[Site],
        tensor: Tensor,
        *,
        outputs: int = 1,
        routing: Routing | None = None,
        arguments: tuple[tuple[Any, ...], Mapping[str, Any]] = ((), {}),
    ) -> Call | None:
        """Takes a layer's input; returns its call, or None where nothing counts."""
        if self.paused or (self._region is None and self.backward_runs):
            return None
        call = Call(module, sites, None, outputs)
        if self._region is not None:
            place = self._met.get((module, sites[0].name), 0)
            self._met[module, sites[0].name] = place + 1
            key = self._region, module, sites[0].name, place
            if not self.backward_runs:
                self._awaited[key] = call
                self._calls.setdefault(module, []).append(call)
                return call
            call = self._awaited.pop(key)
        else:
            self._calls.setdefault(module, []).append(call)
        call.routing, call.arguments = routing, arguments
        call.reading = self._reading(sites[0].name, tensor)
        call.reading.calls.append(call)
        if not self.backward_runs:
            return call
        self._late.append(module)  # not added here, where autograd is running the block again for itself
        return call

    def _reading(self, name: str, tensor: Tensor) -> Reading:
        """Returns the reading of a tensor. Layers close to each other that read the same one (q, k, v; gate, up) share it."""
        for reading in self._recent:
            if reading.is_of(tensor):
                reading.sharers += 1
                self._recent.remove(reading)  # to its end
                self._recent.append(reading)
                return reading
        reading = Reading(tensor, name)
        self._recent.append(reading)
        if len(self._recent) > READERS:
            self._let_go(self._recent.popleft())
        return reading

    def settle(self) -> None:
        """Forgets whom a next layer could share its input with."""
        while self._recent:
            self._let_go(self._recent.popleft())

    def _let_go(self, reading: Reading) -> None:
        """Frees a tensor that all readers have read, where its projection and Gram matrix are all that is wanted of it."""
        calls, reading.calls = reading.calls, []  # they point back at the reading, and would keep it alive
        if any(self._needs_tensor(call, reading.sharers) for call in calls):
            if not self.backward_runs and all(self._added_at_once(call) for call in calls):
                reading.rely_on_graph()
            return
        sites = [site for call in calls for site in call.sites if site.is_linear]
        if sites and not reading.gone:
            self.sums.prepare(reading, self._by_example(sites[0], reading.tensor, sites[0].shape[1]))
        reading.let_go()

    def _needs_tensor(self, call: Call, sharers: int) -> bool:
        sums, length = self.sums, self.batch.input_ids.shape[1]
        if sums.mean is not None or sums.extremes or sums.references.full or call.module in self.tools.repeated:
            return True
        return any(sums.way(site, length, sharers).products if site.is_linear else site.kind != "bias" for site in call.sites)

    def _added_at_once(self, call: Call) -> bool:
        """Says whether a call is added to the sums when its gradient arrives, while the graph before it is still there."""
        return call.module not in self.tools.repeated and all(site.is_linear or site.kind == "bias" for site in call.sites)

    # -- output gradients --------------------------------------------------------------------------------------------

    def head(self, hidden: Tensor, supervised: Supervised) -> Tensor:
        """Takes the last hidden states [N, D] at supervised positions; returns the loss's gradient at them."""
        self.settle()
        return self.sums.add_head(hidden, supervised, self.batch.input_ids)

    def receive(self, call: Call, number: int, gradient: Tensor) -> None:
        """Takes the gradient of a call's output; once every call of the layer has all, adds the layer to the sums."""
        call.gradients[number] = gradient
        self._advance(call.module)
        while self._late:
            self._advance(self._late.pop())

    def _advance(self, module: nn.Module) -> None:
        if module in self._calls and all(call.complete for call in self._calls[module]):
            self._add(calls := self._calls.pop(module))
            for call in calls:
                call.forget()  # the graph's hooks hold the call as long as the graph is there

    def finish(self) -> None:
        """Adds the layers of which the loss depends on some calls or outputs only; the others' gradient is zero."""
        for calls in self._calls.values():
            if met := [call for call in calls if call.gradients]:
                self._add(met)
        self._calls.clear()

    def _add(self, calls: list[Call]) -> None:
        sites = calls[0].sites
        for call in calls:
            if call.reading is None:
                raise ModelError(
                    f"the block of {sites[0].name} must be run again in the backward pass, got none; switch checkpointing off"
                )
        if any(site.kind == "module" for site in sites):
            self._add_modules(calls)
        elif calls[0].routing is not None:
            self._add_experts(calls)
        elif any(site.kind == "embedding" for site in sites):
            reading, b = joined(calls)
            self.sums.add_embedding(sites[0], reading.tensor, b)
        else:
            self._add_linear(sites, *joined(calls))

    def _add_linear(self, sites: list[Site], reading: Reading, b: Tensor) -> None:
        for site in sites:
            if site.kind == "bias":
                self.sums.add_whole(site, b.reshape(len(self.batch.input_ids), -1, b.shape[-1]).sum(1, dtype=self.tools.dtype))
            elif site.is_linear:
                a = None if reading.gone else self._by_example(site, reading.tensor, site.shape[1])
                self.sums.add_linear(site, reading, a, self._by_example(site, b, site.shape[0]))

    def _add_modules(self, calls: list[Call]) -> None:
        """Adds small modules by running them again, each call's gradient to those of the others."""
        sites = calls[0].sites
        names = [site.name.rpartition(".")[2] for site in sites]
        self.paused = True
        try:
            found = [modules.gradients(call, names, len(self.batch.input_ids)) for call in calls]
        finally:
            self.paused = False
        for site, each in zip(sites, zip(*found, strict=True), strict=True):
            self.sums.add_whole(site, torch.stack(each).sum(0))

    def _add_experts(self, calls: list[Call]) -> None:
        """Adds fused experts, one after the other: the tokens of an example that went to an expert are that layer's input."""
        batch = len(self.batch.input_ids)
        for call in calls:
            assert call.reading is not None
            assert call.routing is not None
            for site in call.sites:
                self._add_routed(site, call.reading.tensor, call.gradients[0], call.routing, batch)

    def _add_routed(self, site: Site, a: Tensor, b: Tensor, routing: Routing, batch: int) -> None:
        whole_bias = torch.zeros(batch, len(routing.counts), b.shape[1], dtype=self.tools.dtype, device=b.device)
        met = torch.zeros(batch, dtype=torch.int64, device=b.device)
        first = 0
        for e, count in enumerate(routing.counts):
            rows = slice(first, first + count)
            first += count
            if not count:
                continue
            example = routing.example[rows]
            if site.kind == "expert_bias":
                whole_bias[:, e].index_add_(0, example, b[rows].to(whole_bias.dtype))
                continue
            counts = torch.bincount(example, minlength=batch)
            present = counts.nonzero()[:, 0]
            met += counts > 0
            place = torch.searchsorted(present, example)
            own = [experts.padded(x[rows], place, counts[present]) for x in (a, b)]
            part = slice(e * b.shape[1], (e + 1) * b.shape[1])
            self.sums.add_linear(site, Reading(own[0], site.name), own[0], own[1], part, present)
        if site.kind == "expert_bias":
            self.sums.add_whole(site, whole_bias)
            return
        zero = torch.zeros(int((met < len(routing.counts)).sum()), device=b.device)
        for group in self.sums.groups_of(site):  # an expert that never ran for an example has a gradient of zeros
            group.extend(zero, zero, (met < len(routing.counts)).nonzero()[:, 0])

    def _by_example(self, site: Site, x: Tensor, width: int) -> Tensor:
        """Returns a layer's input or output gradient as [B, T, width]; some models flatten the first two."""
        B, T = self.batch.input_ids.shape
        if x.ndim == 3 and len(x) == B:
            return x
        if x.numel() == B * T * width:
            return x.reshape(B, -1, width)
        raise ModelError(
            f"the input of {site.name} must have one row per token of the batch, got {list(x.shape)} for a batch of "
            f"{[B, T]}; leave the layer out with --params re:PATTERN"
        )
