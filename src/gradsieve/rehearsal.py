"""What a selection would fail with, found before its model is loaded."""

from __future__ import annotations

import math
from collections.abc import Mapping

from gradsieve.clock import silent
from gradsieve.data.dedup import check_dedup
from gradsieve.gradients.parameters import chosen_size
from gradsieve.job import Data, Job
from gradsieve.pipeline import find_method
from gradsieve.run import Run
from gradsieve.train.checks import check_warmup
from gradsieve.types import Selector
from gradsieve.warmup import part_size, recipe_of


def rehearse(method: Selector, job: Job, data: Mapping[str, Data], usable: int) -> None:
    """Reads and checks all that taking gradients begins with; duplicates are not looked for.

    Args:
        method: Whose needs count.
        job: How gradients are taken, with which model.
        data: `pool`, of which few examples will do, and where there are any `target` and `anchor`.
        usable: How many examples of the whole pool can be used.

    Raises:
        GradsieveError: The gradients could not be taken.
    """
    check_dedup(job.dedup, job.dedup_threshold)
    name, selector = find_method(method)
    run = Run.of(job, name, selector, None, silent)
    run.work(data, job.model, None)
    if run.warmup is not None:
        trained = part_size(run.warmup.share, usable)
        recipe = recipe_of(run.warmup, job.warmup_recipe, trained, job.seed, run.compute)
        check_warmup(recipe, run.warmup.epochs * math.ceil(trained / recipe.batch))
    if job.params != "auto" and "lora" not in job.params:  # LoRA matrices may come with a warm-up
        chosen_size(run.source.skeleton(), job.params)
