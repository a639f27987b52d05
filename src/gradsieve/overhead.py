"""What choosing costs beside the training it is for, with both denominators that one may mean.

Work is counted in token passes, forward and backward once: what gradients are taken with, and what an adapter is trained with
(about 4 floating-point operations per weight and token: no weight gradients in either). A forward pass is half of one. A
Navigator of another size counts by its number of weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

EPOCHS = 3
"""Of the training that is compared with: OGS's recipe (2026, arXiv:2602.06359)."""


@dataclass(frozen=True, slots=True)
class Overhead:
    """The work of choosing, in token passes of the model that is to be trained.

    Attributes:
        choosing: Of everything that was needed, gradients that a store already held included.
        whole: Of training on the whole pool.
        chosen: Of training on the chosen examples.
    """

    choosing: float
    whole: float
    chosen: float

    def __str__(self) -> str:
        beside = (
            f"{self.choosing / self.chosen:.0%} of {EPOCHS} epochs on the chosen examples" if self.chosen else "none is chosen"
        )
        return (
            f"overhead: choosing is {self.choosing / self.whole:.1%} of the work of {EPOCHS} epochs of LoRA training on the "
            f"whole pool, and {beside}"
        )


def overhead(
    gradient_passes: float,
    trained_tokens: int,
    measured_tokens: int,
    pool: Sequence[int],
    chosen: Sequence[int],
    ratio: float = 1.0,
) -> Overhead:
    """Returns the work of choosing.

    Args:
        gradient_passes: Of taking gradients: of pool, references, target and anchor, and of a warm-up before.
        trained_tokens: Tokens that a Navigator was trained on.
        measured_tokens: Tokens that went through forward passes only.
        pool: Lengths of the usable pool in tokens.
        chosen: Lengths of the chosen examples.
        ratio: Weights of the scoring model over weights of the model that is to be trained.
    """
    choosing = ratio * (gradient_passes + trained_tokens + measured_tokens / 2)
    return Overhead(choosing, float(EPOCHS * sum(pool)), float(EPOCHS * sum(chosen)))
