"""Embedding: the examples whose sentence embedding is nearest to those of the targets, each target in its turn."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from gradsieve.errors import InvalidArgument
from gradsieve.selectors.rds import nearest_to_targets
from gradsieve.types import Budget, Problem, Selection


@dataclass(frozen=True)
class Embedding:
    """Lets each target example in turn pick the candidate whose text embedding resembles its own most.

    The rule of RDS+ on the embeddings of a separate sentence encoder: the baseline of Ivison et al. 2025, arXiv:2503.01807.
    It does not look at the model to be trained.

    Attributes:
        encoder: Folder or hub id of a sentence-transformers model.
    """

    encoder: str = "sentence-transformers/all-MiniLM-L6-v2"

    title: ClassVar[str] = "Embedding"
    picks_by: ClassVar[str] = "how much an example's text resembles that of one target example, each target in its turn"
    reads: ClassVar[str] = "text of pool and target"
    cost: ClassVar[str] = "O(n m D), D the width of the encoder"
    source: ClassVar[str] = "baseline of Ivison et al. 2025, arXiv:2503.01807"

    def __post_init__(self) -> None:
        if not self.encoder:
            raise InvalidArgument("encoder must name a folder or hub id of a sentence-transformers model, got none")

    @property
    def needs(self) -> frozenset[str]:
        """Embeddings of candidates and targets by this encoder."""
        return frozenset({f"embedding:{self.encoder}", f"embedding:{self.encoder}/targets"})

    def select(self, problem: Problem, budget: Budget, rng: torch.Generator) -> Selection:
        """Returns the examples in the order in which they were taken. `rng` is not used.

        The score is the largest cosine to any target; the trace is that of RDS+.
        """
        return nearest_to_targets(problem, budget, f"embedding:{self.encoder}", self.needs, "embedding")
