"""What a cell takes, from what others took."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from gradsieve.compare.cells import Cell
from gradsieve.compare.config import BASE, Config
from gradsieve.compare.material import Material
from gradsieve.compare.subsets import Subset
from gradsieve.compare.training import make_job
from gradsieve.types import Budget


@dataclass(frozen=True, slots=True)
class Speed:
    """What things take on this machine.

    Attributes:
        train: Seconds per token of training.
        examine: Seconds of evaluation and generation of one model.
        examined_base: The same of the untouched model, which needs no KL.
    """

    train: float
    examine: float
    examined_base: float

    @classmethod
    def of_finished(cls, records: Sequence[Mapping[str, Any]]) -> Speed:
        """Returns the mean of finished cells; zeros where there are none."""
        own = [record for record in records if "same_as" not in record]
        trained = [record for record in own if record["training"]]
        tokens = sum(record["training"]["tokens"] for record in trained)
        spent = sum(record["seconds"]["train"] - record["training"]["surgery_seconds"] for record in trained)
        base = _mean([_examined(record) for record in own if not record["training"]])
        examine = _mean([_examined(record) for record in trained]) if trained else 2 * base
        return cls(spent / tokens if tokens else 0.0, examine, base)


def _examined(record: Mapping[str, Any]) -> float:
    return float(record["seconds"]["evaluate"] + record["seconds"]["generate"])


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else 0.0


def predicted(material: Material, cell: Cell, config: Config, speed: Speed) -> float:
    """Returns about how many seconds a cell takes, its selection and gradients not counted."""
    if cell.arm == BASE:
        return speed.examined_base
    return speed.train * training_tokens(material, cell, config) + speed.examine


def training_tokens(material: Material, cell: Cell, config: Config) -> int:
    """Returns about how many tokens a cell trains on: of examples of mean length, as many as the budget allows."""
    assert cell.seed is not None
    by_length, count = material.trainable(cell.seed).by_length, expected_examples(material, cell)
    ids = [by_length[(2 * i + 1) * len(by_length) // (2 * count)] for i in range(count)]
    return make_job(material, cell, config.arm(cell.arm), Subset(tuple(ids), (1.0,) * count)).trained_tokens


def expected_examples(material: Material, cell: Cell) -> int:
    """Returns about how many examples a cell trains on: of tokens, as many examples of mean length."""
    assert cell.seed is not None
    lengths = material.trainable(cell.seed).pool.lengths
    pool = len(lengths)
    if cell.budget is None:
        return pool
    budget = Budget.parse(cell.budget)
    if budget.tokens is not None:
        return max(1, round(budget.tokens * pool / sum(lengths)))
    return budget.examples or int((budget.share or 1.0) * pool + 1e-9)
