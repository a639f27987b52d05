"""Other libraries, as they ship: each makes what it makes of every example's gradient of the decoder's linear layers.

They are an optional group (`peers.txt` says how to install it). One that is not installed, or fails, is listed with its reason.

    bergson     16 x 16 numbers per layer, concatenated; the documented in-memory collector
    dattri-llm  LoGRA with 16 x 16 per layer, on frozen weights, the cheaper of its two representations
    Opacus      whole per-example gradients in memory, nothing made of them
    TRAK        the dense projection that LESS uses where there is no GPU; timed on a part of the weights, `dense_projection`
"""

from __future__ import annotations

import logging
import re
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, redirect_stderr
from io import StringIO
from pathlib import Path
from typing import Any

import torch

from gradsieve.gradients.parameters import choose_parameters
from gradsieve.gradients.settings import Batch
from measuring import Row, Run

SIDE = 16
Prepared = tuple[Run, Callable[[], AbstractContextManager[object]]]


def peer_rows(folder: Path, model: Any, batches: Sequence[Batch], wanted: re.Pattern[str]) -> tuple[list[Row], dict[str, str]]:
    """Returns a row for each peer that runs on the first batch, and the reason of each that does not.

    Args:
        folder: Where they are installed; searched after everything else, so that the environment's own packages win.
        model: The model of the other rows.
        batches: Theirs too.
        wanted: Rows to take, by name.
    """
    if str(folder) not in sys.path:
        sys.path.append(str(folder))
    rows, missing = [], {}
    for name, prepare in PEERS.items():
        if not wanted.search(name):
            continue
        try:
            trial, around = prepare(model, batches[:1])
            with around():
                trial()
            rows.append(Row(name, *prepare(model, batches)))
        except Exception as error:  # whatever a foreign package may raise is a reason not to list figures for it
            missing[name] = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
    return rows, missing


def dense_projection(folder: Path, weights: int, examples: int, dim: int = 1024, part: int = 128) -> float:
    """Returns the processor seconds in which TRAK projects gradients of `weights` numbers: `part` times those of a `part`-th.

    The projector draws its dense matrix anew for every call, block by block, and multiplies: both grow with the weights.
    """
    if str(folder) not in sys.path:
        sys.path.append(str(folder))
    from trak.projectors import BasicProjector, ProjectionType  # type: ignore[import-not-found]

    count = max(1, weights // part)
    projector = BasicProjector(count, dim, 0, ProjectionType.rademacher, torch.device("cpu"))
    gradients = torch.randn(examples, count)
    started = time.process_time()
    projector.project(gradients, 0)
    return (time.process_time() - started) * weights / count


def linear_names(model: Any) -> list[str]:
    """The decoder's linear layers, by name in the whole model."""
    return [site.name.removesuffix(".weight") for site in choose_parameters(model, "linear") if site.kind == "matrix"]


def activations_only(model: Any) -> None:
    """Freezes all but the embedding, as bergson's and dattri-llm's own code does."""
    model.train().requires_grad_(False)
    model.get_input_embeddings().requires_grad_(True)


@contextmanager
def silent() -> Iterator[None]:
    """Keeps progress bars and warnings of others out of the table."""
    with warnings.catch_warnings(), redirect_stderr(StringIO()):
        warnings.simplefilter("ignore")
        logging.disable(logging.WARNING)
        try:
            yield
        finally:
            logging.disable(logging.NOTSET)


def bergson(model: Any, batches: Sequence[Batch]) -> Prepared:
    """`InMemoryCollector` under `CollectorComputer`, Rademacher projections of 16 x 16 per layer."""
    from bergson import CollectorComputer, GradientProcessor, IndexConfig, InMemoryCollector
    from datasets import Dataset

    rows, indices = list[dict[str, list[int]]](), list[list[int]]()
    for batch in batches:
        indices.append(list(range(len(rows), len(rows) + len(batch.input_ids))))
        for ids, labels in zip(batch.input_ids.tolist(), batch.labels.tolist(), strict=True):
            rows.append({"input_ids": ids, "labels": labels})
    data = Dataset.from_list(rows)
    processor = GradientProcessor(projection_dim=SIDE)
    folder = tempfile.mkdtemp()
    Path(folder, "run.part").mkdir()

    def run() -> None:
        activations_only(model)
        cfg = IndexConfig(run_path=f"{folder}/run", projection_dim=SIDE, loss_reduction="mean")
        collector = InMemoryCollector(model=model.base_model, data=data, cfg=cfg, processor=processor)
        computer = CollectorComputer(model, data, collector=collector, batches=indices, cfg=cfg)
        computer.run_with_collector_hooks("benchmark")

    return run, silent


def dattri_llm(model: Any, batches: Sequence[Batch]) -> Prepared:
    """`HookManager` with a LoGRA projection, on frozen weights with a trainable embedding, as its documents advise."""
    from dattri_llm import HookManager, HookManagerConfig

    projection = {"proj_dim": SIDE, "proj_max_batch_size": 8, "proj_type": "rademacher"}
    config = HookManagerConfig(
        linear_io=[f"^{re.escape(name)}$" for name in linear_names(model)],
        projection_kwargs={"__default__": projection},
        capture_style="auto",
        include_frozen=True,
    )
    held = list[Any]()

    @contextmanager
    def hooked() -> Iterator[None]:
        with silent():
            activations_only(model)
            manager = HookManager(model, config)
            held.append(manager)
            try:
                with manager.collect():
                    yield
            finally:
                held.pop().remove()

    def run() -> None:
        for batch in batches:
            model(input_ids=batch.input_ids, labels=batch.labels, use_cache=False).loss.backward()
            model.zero_grad(set_to_none=True)
            held[-1].get_gradient()

    return run, hooked


def opacus(model: Any, batches: Sequence[Batch]) -> Prepared:
    """`GradSampleModule` over the linear layers; all else is frozen."""
    from opacus import GradSampleModule

    weights = {f"{name}.weight" for name in linear_names(model)}
    held = list[Any]()

    @contextmanager
    def wrapped() -> Iterator[None]:
        with silent():
            model.train()
            for name, parameter in model.named_parameters():
                parameter.requires_grad_(name in weights)
            held.append(GradSampleModule(model, strict=False))
            try:
                yield
            finally:
                wrapper = held.pop()
                wrapper.remove_hooks()
                wrapper.zero_grad(set_to_none=True)
                for parameter in model.parameters():
                    for attribute in ("grad_sample", "_forward_counter", "_current_grad_sample"):
                        if hasattr(parameter, attribute):
                            delattr(parameter, attribute)

    def run() -> None:
        for batch in batches:
            held[-1](input_ids=batch.input_ids, labels=batch.labels, use_cache=False).loss.backward()
            held[-1].zero_grad(set_to_none=True)

    return run, wrapped


PEERS: dict[str, Callable[[Any, Sequence[Batch]], Prepared]] = {
    "bergson, 16 x 16 per layer": bergson,
    "dattri-llm, LoGRA 16 x 16 per layer": dattri_llm,
    "Opacus, whole gradients": opacus,
}
