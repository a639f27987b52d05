"""What goes into the gradient engine and what comes out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

from torch import Tensor

from gradsieve.errors import InvalidArgument
from gradsieve.gradients.sketch import SketchPlan


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
        direction: `sgd`: sketches, norms, products and the statistics of parameters are those of the gradient g; `adam`: of
            Γ(z), see `gradsieve.gradients.adam`. Reference directions and `signals` are of plain gradients either way.
        less_form: Whether Γ is taken as the LESS code has it.
        hidden: Whether the position-weighted mean of the last hidden states is taken.
        gradients: Whether gradients are taken; without them a forward pass gives `loss` and hidden states.
    """

    params: str = "auto"
    sketch: SketchPlan = field(default_factory=SketchPlan)
    reduction: Literal["mean", "sum"] = "mean"
    norms: bool = True
    signals: bool = True
    layers: Literal["none", "moments", "extremes"] = "none"
    direction: Literal["sgd", "adam"] = "sgd"
    less_form: bool = False
    hidden: bool = False
    gradients: bool = True

    def __post_init__(self) -> None:
        if self.less_form and self.direction != "adam":
            raise InvalidArgument(f"less_form must go with direction adam, got {self.direction}; leave it out")


def plain(settings: EngineSettings) -> EngineSettings:
    """Returns the settings with plain gradients for their direction: those of references."""
    return replace(settings, direction="sgd", less_form=False)


@dataclass(frozen=True, slots=True)
class Batch:
    """Padded examples, padding on the right: a causal model then needs no attention mask.

    Attributes:
        input_ids: int64 [B, T].
        labels: int64 [B, T], -100 where there is no loss; unshifted, as transformers has them.
        scale: float [B], a factor on each example's gradient; None for 1.
        position_ids: int64 [B, T], for packed rows: where positions begin anew, attention does too. None for 0, 1, 2, …
        lengths: Tokens of each example before padding, int64 [B]: what the mean of hidden states goes over. None: no padding.
    """

    input_ids: Tensor
    labels: Tensor
    scale: Tensor | None = None
    position_ids: Tensor | None = None
    lengths: Tensor | None = None


@dataclass(frozen=True, slots=True)
class Block:
    """What the engine makes of one batch.

    Attributes:
        sketch: float32 [B, d]; d is 0 without gradients.
        columns: float64 [B] by name: `loss`, `completion_tokens`, `norm`, `norm/lm_head`, `dot/…` with unit references, …
        hidden: Position-weighted mean of the last hidden states, float32 [B, D], where it was asked for.
    """

    sketch: Tensor
    columns: Mapping[str, Tensor]
    hidden: Tensor | None = None
