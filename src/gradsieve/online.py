"""Gradients recorded while a model trains: those of each example just before the step of the last pass that trains on it."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from gradsieve.compute import ComputeSettings
from gradsieve.data import TokenSet
from gradsieve.extraction import fill
from gradsieve.gradients.engine import GradientEngine
from gradsieve.gradients.fitting import Say
from gradsieve.store import GradientStore
from gradsieve.train.plan import Step


class Recorder:
    """Fills a store with one shard per step, before the step; steps that are there already, of a killed run, are left alone.

    The model is in eval mode while it is recorded, without dropout, and gets back the mode and the flags that it had.

    Args:
        store: Where to.
        part: What is trained on, in the numbering of the plan. An example that stands there twice is recorded once, at the
            first of its steps.
        plan: All steps of the training; those of the last pass are recorded.
        compute: How gradients are taken.
        say: Is told of batches that did not fit in memory.
    """

    def __init__(self, store: GradientStore, part: TokenSet, plan: Sequence[Step], compute: ComputeSettings, say: Say) -> None:
        self.store, self.part, self.compute, self.say = store, part, compute, say
        self.rows = _first_rows(part, plan)
        units = store.plan(part.keys, lambda _: list(self.rows.values()))
        self.units = dict(zip(self.rows, units, strict=True))
        self._engine: GradientEngine | None = None

    def __call__(self, model: nn.Module, number: int) -> None:
        """Records the examples of step `number`, from 0, at the model as it is."""
        if number not in self.units or not self.store.pending([self.units[number]]):
            return
        if self._engine is None:
            self._engine = GradientEngine(model, self.compute.engine, checkpointing=self.compute.checkpointing)
        own = self.part.restricted(self.part.name, self.rows[number])
        with self._engine as engine:
            fill(self.store, own, [self.units[number]], engine, self.compute, say=self.say)

    def missing(self) -> int:
        """Returns how many steps are not recorded."""
        return len(self.store.pending(list(self.units.values())))


def _first_rows(part: TokenSet, plan: Sequence[Step]) -> dict[int, list[int]]:
    """Returns the rows of each step of the last pass, longest first, of equal examples the first one met."""
    complete = round(plan[-1].epoch) - 1
    lengths = part.lengths
    rows: dict[int, list[int]] = {}
    met: set[bytes] = set()
    for number, step in enumerate(plan):
        if step.epoch <= complete + 1e-9:
            continue
        for row in step.rows:
            if part.keys[row] not in met:
                met.add(part.keys[row])
                rows.setdefault(number, []).append(row)
    return {number: sorted(own, key=lambda row: (-lengths[row], part.keys[row])) for number, own in rows.items()}
