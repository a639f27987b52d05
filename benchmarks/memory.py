"""How much memory per-example gradients take beyond the model, against the floor and a training step.

    python benchmarks/memory.py                 the demo model, all layers, 4 examples of 64, 128, 256 and 512 tokens
    python benchmarks/memory.py --json FILE     the same table for machines

FLOOR and the plain step are those of extract.py. Peaks are the allocator's, above what was held before; a run on the shortest
length comes first, so that projections and buffers that stay are not counted. With activation checkpointing, each block's
activations are computed again in the backward pass: by transformers for FLOOR and the plain step, by the engine for ours.
"""

from __future__ import annotations

import argparse
import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from gradsieve.gradients.engine import GradientEngine
from gradsieve.gradients.settings import Batch, EngineSettings
from measuring import machine, peak_mib, versions
from ways import EVERYTHING, draw_batches, floor, load, plain_step, trainable

SETTINGS = {
    "sketch of linear, head, embedding": EngineSettings(EVERYTHING, norms=False, signals=False),
    "  + norm, mean, sd per layer": EngineSettings(EVERYTHING, layers="moments", signals=False),
    "  + max, min per layer": EngineSettings(EVERYTHING, layers="extremes", signals=False),
}
FLOOR, PLAIN = "FLOOR", "plain training step"


def peaks(model: Any, batches: list[Batch], device: str, checkpointing: bool) -> dict[str, list[float]]:
    """Returns each way's peaks, MiB, one per batch."""
    model.train()
    if checkpointing:
        model.gradient_checkpointing_enable()
    found: dict[str, list[float]] = {
        FLOOR: [peak_mib(lambda: floor(model, batch), device) for batch in batches],  # noqa: B023
        PLAIN: [peak_mib(trainable(step_of(model, batch), model), device) for batch in batches],
    }
    if checkpointing:
        model.gradient_checkpointing_disable()
    for name, settings in SETTINGS.items():
        with GradientEngine(model, settings, checkpointing=checkpointing) as engine:
            engine.block(batches[0])
            found[name] = [peak_mib(lambda: engine.block(batch), device) for batch in batches]  # noqa: B023
    return found


def step_of(model: Any, batch: Batch) -> Callable[[], None]:
    """A training step on one batch."""
    return lambda: plain_step(model, batch)


def table(title: str, found: dict[str, list[float]], lengths: list[int], plain: list[float]) -> list[dict[str, Any]]:
    """Prints peaks by length and their ratios at the longest; returns them for machines."""
    print(
        f"\n{title}\n{'peak MiB at T =':40}" + "".join(f"{length:8}" for length in lengths) + f"{'/ FLOOR':>10}{'/ plain':>9}"
    )
    rows = []
    for name, values in found.items():
        floors, plains = values[-1] / found[FLOOR][-1], values[-1] / plain[-1]
        print(f"{name:40}" + "".join(f"{value:8.0f}" for value in values) + f"{floors:10.2f}{plains:9.2f}")
        by_length = dict(zip(lengths, values, strict=True))
        rows.append({"table": title, "name": name.strip(), "peak_mib": by_length, "over_floor": floors, "over_plain": plains})
    return rows


def main() -> None:
    """Measures, prints, writes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo", help="a local folder or hub id; the demo model by default")
    parser.add_argument("--layers", type=int, help="keep only the first so many layers")
    parser.add_argument("--lengths", type=int, nargs="+", default=[64, 128, 256, 512])
    parser.add_argument("--examples", type=int, default=4)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json", type=Path, help="write the table to this file")
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore", FutureWarning)
    model = load(options.model, options.layers, torch.float32, options.device)
    batches = []
    for length in options.lengths:
        batch = draw_batches(f"1x{length}", model.config.vocab_size, options.device)[0]
        ids, labels = (x.expand(options.examples, -1).contiguous() for x in (batch.input_ids, batch.labels))
        batches.append(Batch(ids, labels))
    kept = peaks(model, batches, options.device, checkpointing=False)
    rows = table("activations kept", kept, options.lengths, kept[PLAIN])
    again = peaks(model, batches, options.device, checkpointing=True)
    rows += table("activation checkpointing (/ plain: without it)", again, options.lengths, kept[PLAIN])
    if options.json:
        report = {"rows": rows, "machine": machine(options.device), "versions": versions("torch", "transformers")}
        options.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
