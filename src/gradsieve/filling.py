"""The stores of a run: opened, and filled with what they lack."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from gradsieve.batch_size import best_size, try_sizes
from gradsieve.batch_size import describe as describe_sizes
from gradsieve.clock import Clock, Progress
from gradsieve.compute import ComputeSettings
from gradsieve.data import TokenSet
from gradsieve.errors import StoreMismatch
from gradsieve.extraction import fill, for_store, manifest, plan, reusable
from gradsieve.gradients.engine import GradientEngine
from gradsieve.gradients.fitting import Say
from gradsieve.gradients.forward import ForwardEngine
from gradsieve.gradients.settings import plain
from gradsieve.models import ModelSource
from gradsieve.references import Source, measure_references, read_facts, write_facts
from gradsieve.store import GradientStore, Unit
from gradsieve.types import Reference
from gradsieve.warmup import Stop


@dataclass(eq=False)
class Filling:
    """Takes what the stores of a run lack.

    Attributes:
        sets: All examples as tokens, by role.
        roles: Those whose gradients are taken.
        batch_tokens: Tokens in one batch; `auto` until a good number was found by trying.
        clock: Gets a stage for all that takes long.
        progress: Is told how far a stage is.
        say: Is told what the user must know.
    """

    sets: Mapping[str, TokenSet]
    roles: Sequence[str]
    batch_tokens: int | Literal["auto"]
    clock: Clock
    progress: Progress
    say: Say

    def answers_alone(self, source: ModelSource, compute: ComputeSettings, root: Path) -> torch.Tensor:
        """The loss of every answer without its question, float64 [n], from a forward pass with a folder of its own."""
        tokens = self.sets["pool"].alone()
        own = dataclasses.replace(compute, engine=dataclasses.replace(compute.engine, gradients=False, hidden=False))
        store = GradientStore(root / "alone" / "pool", manifest(source, own, {}))
        if units := store.pending(plan(store, tokens, own)):
            stage = self.clock.stage("forward pass of the answers alone")
            with stage as written, source.opened(own.dtype, own.device) as model, ForwardEngine(model, own.engine) as engine:
                written.append(fill(store, tokens, units, engine, own, self.progress, self.say))
        return store.view(tokens.ids, tokens.keys).columns["loss"]

    def filled(
        self, stop: Stop, references: Mapping[str, Source], *, alone: bool
    ) -> tuple[dict[str, GradientStore], dict[str, Reference]]:
        """Returns the stores of one checkpoint, once nothing is missing in them, and what is known about the references."""
        stores: dict[str, GradientStore] = {}
        pending = {}
        for role in self.roles:
            stores[role] = self._open(stop, role, references)
            pending[role] = stores[role].pending(plan(stores[role], self.sets[role], stop.compute))
        facts = read_facts(stores["pool"])
        if any(pending.values()):
            extra = set(stores["pool"].manifest.settings["references"]) - set(references)
            if pending["pool"] and extra:
                raise StoreMismatch(
                    f"store {stop.root / 'pool'} must be finished with the references it was begun with, got a run without "
                    f"{', '.join(sorted(extra))}; run that method again first, or choose another --store"
                )
            facts |= self._fill(stop, references, stores, pending, "" if alone else f" ({stop.name})")
        return stores, facts

    def _open(self, stop: Stop, role: str, references: Mapping[str, Source]) -> GradientStore:
        """Opens a role's store. A forward pass has a folder of its own, unless gradients with all it gives are there."""
        folder, wanted = stop.root / role, stop.manifest(role, references)
        there = reusable(folder, wanted)
        if stop.compute.engine.gradients or there is not wanted:
            return GradientStore(folder, there)
        folder = stop.root / "forward" / role
        return GradientStore(folder, reusable(folder, wanted))

    def _best_batch_size(self, model: torch.nn.Module, compute: ComputeSettings, pending: Mapping[str, Sequence[Unit]]) -> int:
        """Returns the batch size that was found best on the largest set that is to be computed."""
        role = max(pending, key=lambda role: sum(len(unit.keys) for unit in pending[role]))
        wanted = {key for unit in pending[role] for key in unit.keys}
        mine = [t for key, t in zip(self.sets[role].keys, self.sets[role].tokens, strict=True) if key in wanted]
        mine.sort(key=lambda tokens: -len(tokens.input_ids))
        with (
            self.clock.stage("trying batch sizes"),
            GradientEngine(model, plain(compute.engine), checkpointing=compute.checkpointing) as engine,
        ):
            rates = try_sizes(engine, mine, compute.unit_tokens, compute.device)
        self.say(describe_sizes(rates))
        return best_size(rates)

    def _fill(
        self,
        stop: Stop,
        references: Mapping[str, Source],
        stores: Mapping[str, GradientStore],
        pending: Mapping[str, Sequence[Unit]],
        where: str,
    ) -> Mapping[str, Reference]:
        stacked, compute = None, stop.compute
        with ExitStack() as stack:
            with self.clock.stage(f"loading the model{where}"):
                model = stack.enter_context(stop.source.opened(compute.dtype, compute.device))
            if self.batch_tokens == "auto":
                self.batch_tokens = self._best_batch_size(model, compute, pending)
            compute = dataclasses.replace(compute, batch_tokens=self.batch_tokens)
            if pending["pool"] and references:
                with self.clock.stage(f"references{where}"):
                    stacked = measure_references(model, compute, references, self.progress, self.say)
                    write_facts(stores["pool"], stacked)
            for role, units in pending.items():
                if units:
                    own = dataclasses.replace(for_store(stop.settings(role), stores[role]), batch_tokens=compute.batch_tokens)
                    what = "gradients" if own.engine.gradients else "forward pass"
                    with (
                        self.clock.stage(f"{what} of the {role}{where}") as written,
                        stop.engine(role, model, stacked, own) as engine,
                    ):
                        written.append(fill(stores[role], self.sets[role], units, engine, own, self.progress, self.say))
        return stacked.facts if stacked else {}
