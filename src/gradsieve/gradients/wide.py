"""Reference directions where full gradients do not fit: wide sketches, made per batch, multiplied and dropped.

<g, r> is estimated by <Sg, Sr> with d = 65,536: unbiased, with an error of a cosine of about 1/√d = 0.004, because matrices are
sketched entry by entry (`gradsieve.gradients.sketch`). Each layer's gradient is formed per example, as exact products have it
too. A direction then takes 256 KiB instead of one number per parameter, for any model.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch

from gradsieve.gradients.directions import WIDE, MeanGradient
from gradsieve.gradients.settings import Block, EngineSettings
from gradsieve.gradients.sketch import LARGEST, SketchPlan

DIM = LARGEST


def wide_plan(sketch: SketchPlan) -> SketchPlan:
    """Returns the wide projection that goes with a sketch: the same seed."""
    return SketchPlan(DIM, sketch.seed)


def wide_settings(settings: EngineSettings) -> EngineSettings:
    """Returns the settings of an engine whose blocks `mean_sketch` adds up: nothing but wide sketches and norms."""
    return EngineSettings(settings.params, wide_plan(settings.sketch), settings.reduction, norms=True, signals=False)


def mean_sketch(blocks: Iterable[Block], *, sketched: bool = False) -> MeanGradient:
    """Returns the wide sketch of a set's mean gradient (OGS-1) with its norm, count and noise.

    Args:
        blocks: Of all examples, from an engine with `wide_settings`.
        sketched: Whether to keep every example's sketch too, for the variance of paired differences.
    """
    mean = MeanGradient({WIDE: torch.zeros(1, DIM, dtype=torch.float64)}, sketched=sketched)
    for block in blocks:
        mean.tensors[WIDE] = mean.tensors[WIDE].to(block.sketch.device)
        mean.tensors[WIDE] += block.sketch.sum(0, dtype=torch.float64)
        mean.add_norms(block.columns["norm"].square(), block.columns["completion_tokens"])
        if sketched:
            mean.sketches.append(block.sketch)
    return mean.finish()
