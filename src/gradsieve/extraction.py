"""Examples to gradients in a store: what its rows depend on, and the units that are still missing."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from gradsieve.clock import Progress, silent
from gradsieve.compute import ComputeSettings, token_batches
from gradsieve.data import TokenSet
from gradsieve.data.batches import plan_units
from gradsieve.errors import StoreError
from gradsieve.gradients.engine import GradientEngine
from gradsieve.gradients.fitting import Fitting, Say
from gradsieve.gradients.forward import ForwardEngine
from gradsieve.gradients.settings import Block
from gradsieve.memory import Trimmer
from gradsieve.models import ModelSource, tokenizer_hash
from gradsieve.references import Source, digest_of
from gradsieve.store import GradientStore, Manifest, Unit

log = logging.getLogger(__name__)
ENGINE_VERSION = 5  # raised whenever the numbers of a row change


def manifest(model: ModelSource, compute: ComputeSettings, references: Mapping[str, Source]) -> Manifest:
    """Returns what a store's rows depend on beside the examples."""
    engine = compute.engine
    shared = {
        "model": model.weights,
        "tokenizer": tokenizer_hash(model.tokenizer),
        "engine": ENGINE_VERSION,
        "dtype": str(compute.dtype).removeprefix("torch."),
        "max_length": compute.max_length,
    }
    shared |= {"hidden": True} if engine.hidden else {}
    if not engine.gradients:
        return Manifest({**shared, "gradients": False, "references": {}})
    return Manifest(
        shared
        | {
            "params": engine.params,
            "reduction": engine.reduction,
            "direction": "adam, LESS form" if engine.less_form else engine.direction,
            "sketch": {"dim": engine.sketch.dim, "seed": engine.sketch.seed},
            "columns": {"norms": engine.norms, "signals": engine.signals, "layers": engine.layers},
            "reference_products": compute.form if references else "none",
            "references": {name: digest_of(source) for name, source in sorted(references.items())},
        }
    )


def reusable(directory: Path, wanted: Manifest) -> Manifest:
    """Returns the manifest to open a store with: its own where it only has *more* than wanted.

    More are further references, hidden states that nobody asked for, or gradients where a forward pass would do.
    """
    try:
        there = Manifest.read(directory)
    except StoreError:
        return wanted
    kept = {name: there.settings["references"].get(name) for name in wanted.settings["references"]}
    settings = {**there.settings, "references": kept}
    if "gradients" not in settings:
        settings["reference_products"] = there.settings.get("reference_products") if kept else "none"
    if not wanted.settings.get("hidden"):
        settings.pop("hidden", None)
    if "gradients" in wanted.settings and "gradients" not in settings:
        settings = {name: settings.get(name) for name in wanted.settings} | {"gradients": False}
    return there if Manifest(settings).fingerprint == wanted.fingerprint else wanted


def for_store(compute: ComputeSettings, store: GradientStore) -> ComputeSettings:
    """Returns the settings with all that this store's rows hold, which may be more than is wanted of them."""
    settings = store.manifest.settings
    return replace(compute, engine=replace(compute.engine, hidden="hidden" in settings, gradients="gradients" not in settings))


def fill(
    store: GradientStore,
    examples: TokenSet,
    pending: Sequence[Unit],
    engine: GradientEngine | ForwardEngine,
    compute: ComputeSettings,
    progress: Progress = silent,
    say: Say = log.warning,
) -> int:
    """Computes and commits the pending units; returns the bytes written. A kill loses the unit at work and no other.

    Batches that do not fit in memory are split, which `say` is told.

    Raises:
        StoreError: A unit holds examples of another, unfinished run.
    """
    tokens = dict(zip(examples.keys, examples.tokens, strict=True))
    for unit in pending:
        if any(key not in tokens for key in unit.keys):
            raise StoreError(
                f"store {store.directory} must be finished with the examples it was begun with, got unit {unit.number} with "
                f"others than {examples.name}'s; run that command again first, or choose another --store"
            )
    cost = {key: len(t.input_ids) for key, t in tokens.items()}
    total, done, written = sum(cost[key] for unit in pending for key in unit.keys), 0, 0
    stage = f"{'gradients' if compute.engine.gradients else 'forward pass'} of the {examples.name}"
    trim, fitting = Trimmer(), Fitting(engine.block, say)
    for unit in pending:
        blocks: list[Block] = []
        for batch, count in token_batches([tokens[key] for key in unit.keys], compute.batch_tokens, compute.device):
            blocks += fitting.blocks(batch)
            done += count
            progress(stage, done, total)
            trim()
        columns = {name: torch.cat([block.columns[name] for block in blocks]) for name in blocks[0].columns}
        store.commit(unit, _matrices(blocks), columns)
        written += store.shard(unit.number).stat().st_size
    return written


def _matrices(blocks: Sequence[Block]) -> dict[str, torch.Tensor]:
    """Returns what was taken: sketches under the checkpoint's name, hidden states under theirs."""
    found = {"base": torch.cat([block.sketch for block in blocks])} if blocks[0].sketch.shape[1] else {}
    hidden = [block.hidden for block in blocks if block.hidden is not None]
    return found | ({"hidden": torch.cat(hidden)} if hidden else {})


def plan(store: GradientStore, examples: TokenSet, compute: ComputeSettings) -> list[Unit]:
    """Returns the units that the examples need, longest examples first."""
    lengths = examples.lengths

    def cut(positions: list[int]) -> list[list[int]]:
        units = plan_units([lengths[i] for i in positions], [examples.keys[i] for i in positions], compute.unit_tokens)
        return [[positions[i] for i in unit] for unit in units]

    return store.plan(examples.keys, cut)
