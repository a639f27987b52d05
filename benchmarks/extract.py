"""What per-example gradients cost, in multiples of the least that any method must do.

    python benchmarks/extract.py                 the demo model, all layers: 8 x 128, 4 x 256 tokens, log-normal lengths
    python benchmarks/extract.py --quick         six layers, 3 x 128, below two minutes
    python benchmarks/extract.py --only PATTERN  the rows whose names match, beside FLOOR and the training step
    python benchmarks/extract.py --peers DIR     with other libraries, installed as peers.txt says
    python benchmarks/extract.py --json FILE     the same table for machines

FLOOR is a forward and an activation-only backward pass with a loss head that makes logits at supervised positions only: what
every method needs that wants each layer's input and output gradient. A plain training step is transformers' own loss and
`backward()`. Half of every example is prompt.

All rows are run in turn in one process, `--repeats` times, and each is divided by FLOOR (and by the plain step) *of the same
turn*; the table shows medians, so that a slow moment of the machine falls on all rows alike. Times are CPU times of all threads
(wall times on a GPU). Memory is the allocator's peak above what was held before. Errors are the largest of all columns and of
the sketches, against one float64 `backward()` for each of two examples (with `--quick` of one), on the scales of `gradsieve
extract --check`.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from gradsieve.gradients.directions import References
from gradsieve.gradients.engine import GradientEngine
from gradsieve.gradients.settings import Batch, EngineSettings
from gradsieve.models import resolve_dtype
from measuring import Row, machine, measure, over, versions
from peers import PEERS, dense_projection, peer_rows
from truth import Truth, largest_error
from ways import (
    EVERYTHING,
    all_batches,
    draw_batches,
    draw_references,
    draw_wide_references,
    examples_of,
    floor,
    less_style,
    load,
    lora_of,
    plain_step,
    trainable,
)

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float64": torch.float64}
SKETCH, MOMENTS, EXTREMES = "sketch of linear, head, embedding", "  + norm, mean, sd per layer", "  + max, min per layer"
LINEAR, NORM, SIGNALS = "sketch of linear", "  + norm", "  + norm, signals of embedding and head"
ONE, FOUR, BOTH = "  + norm, 1 reference", "  + norm, 4 references", "  + max, min, 4 references"
EXTREME = "  + norm, max, min"
WIDE = "  + norm, 4 references as wide sketches"
CHECKED = {False: (40, 64), True: (48,)}  # lengths of the examples that are compared with float64 loops, with --quick or not
DENSE = "LESS-style loop with TRAK's projection"
LESS, LORA_STEP, LORA = "LESS-style loop, batch 1", "LoRA training step", "sketch and norm of LoRA"
HALF_FLOOR, HALF = "FLOOR in bfloat16", "sketch of linear in bfloat16"

WAYS = {
    SKETCH: EngineSettings(EVERYTHING, norms=False, signals=False),
    MOMENTS: EngineSettings(EVERYTHING, layers="moments", signals=False),
    EXTREMES: EngineSettings(EVERYTHING, layers="extremes", signals=False),
    LINEAR: EngineSettings("linear", norms=False, signals=False),
    NORM: EngineSettings("linear", signals=False),
    SIGNALS: EngineSettings("linear"),
    ONE: EngineSettings("linear", signals=False),
    FOUR: EngineSettings("linear", signals=False),
    WIDE: EngineSettings("linear", signals=False),
    EXTREME: EngineSettings("linear", layers="extremes", signals=False),
    BOTH: EngineSettings("linear", layers="extremes", signals=False),
    "sketch and norm of last:4": EngineSettings("last:4", signals=False),
    "sketch and norm of lm-head": EngineSettings("lm-head", signals=False),
    "sketch and norm of re:down_proj": EngineSettings("re:down_proj", signals=False),
}


def rows_for(
    model: Any, batches: Sequence[Batch], options: argparse.Namespace, check: bool
) -> tuple[list[Row], dict[str, str]]:
    """All rows that are asked for, FLOOR and the plain step first; and the peers that cannot run, with their reasons."""
    wanted = re.compile(options.only)
    names = [name for name in WAYS if wanted.search(name)]
    one, four = draw_references(model) if {ONE, FOUR, BOTH} & set(names) else (None, None)
    references = {ONE: one, FOUR: four, BOTH: four, WIDE: draw_wide_references(model) if WIDE in names else None}
    truth = Truth(model, CHECKED[options.quick]) if check and names else None
    rows = [
        Row("FLOOR: forward, activation-only backward", all_batches(lambda batch: floor(model, batch), batches)),
        Row("plain training step", trainable(all_batches(lambda batch: plain_step(model, batch), batches), model)),
    ]
    for name in names:  # products with wide sketches are estimates
        rows.append(engine_row(name, model, batches, WAYS[name], references.get(name), None if name == WIDE else truth))
    if wanted.search(LESS):
        singles = examples_of(batches)
        rows.append(Row(LESS, trainable(lambda: less_style(model, singles), model)))
    if wanted.search(LORA):
        rows += lora_rows(model, batches, CHECKED[options.quick] if check else None)
    if (
        wanted.search(HALF)
        and options.dtype == "float32"
        and options.device == "cpu"
        and resolve_dtype("auto", "cpu") == torch.bfloat16
    ):
        rows += half_rows(model, batches)
    found, missing = peer_rows(options.peers, model, batches, wanted) if options.peers else ([], {})
    return rows + found, missing


def lora_rows(model: Any, batches: Sequence[Batch], checked: Sequence[int] | None) -> list[Row]:
    """A LoRA training step, and its per-example gradients, checked on examples of these lengths."""
    adapted = lora_of(model)
    step = all_batches(lambda batch: plain_step(adapted, batch), batches)
    truth = Truth(adapted, checked) if checked else None
    return [
        Row(LORA_STEP, trainable(step, adapted, adapters=True)),
        engine_row(LORA, adapted, batches, EngineSettings("lora", signals=False), None, truth),
    ]


def half_rows(model: Any, batches: Sequence[Batch]) -> list[Row]:
    """The floor and the sketch of the linear layers on a bfloat16 copy of the model."""
    import copy

    half = copy.deepcopy(model).to(torch.bfloat16)
    return [
        Row(HALF_FLOOR, all_batches(lambda batch: floor(half, batch), batches)),
        engine_row(HALF, half, batches, WAYS[LINEAR], None, None),
    ]


def engine_row(
    name: str,
    model: Any,
    batches: Sequence[Batch],
    settings: EngineSettings,
    references: References | None,
    truth: Truth | None,
) -> Row:
    """One row of ours."""
    engine = GradientEngine(model, settings, references)
    check = (lambda: largest_error(engine, references, truth)) if truth else None
    return Row(name, all_batches(engine.block, batches), lambda: engine, check)


def ratios(rows: Sequence[Row]) -> dict[str, float]:
    """What the rows say about each other, where both were run."""
    by_name = {row.name: row for row in rows}
    floors = {name: over(row, rows[0]) for name, row in by_name.items()}
    found = {}
    for title, name, base in (
        ("LESS-style loop / sketch", LESS, SKETCH),
        ("LoRA gradients / LoRA step", LORA, LORA_STEP),
        ("bfloat16 / float32, FLOOR", HALF_FLOOR, rows[0].name),
        ("bfloat16 / float32, sketch", HALF, LINEAR),
        *((f"{name.split(',')[0]} / sketch of linear", name, LINEAR) for name in PEERS),
    ):
        if name in by_name and base in by_name:
            found[title] = over(by_name[name], by_name[base])
    for title, name, base, share in (
        ("first reference, in FLOORs", ONE, NORM, 1),
        ("4 references as wide sketches, in FLOORs", WIDE, NORM, 1),
        ("each further reference, in FLOORs", FOUR, ONE, 3),
        ("4 references beside max and min, in FLOORs", BOTH, EXTREME, 1),
        ("signals of embedding and head, in FLOORs", SIGNALS, NORM, 1),
    ):
        if name in by_name and base in by_name:
            found[title] = (floors[name] - floors[base]) / share
    return found


def add_dense_loop(
    rows: Sequence[Row], model: Any, batches: Sequence[Batch], peers: Path, found: dict[str, float], missing: dict[str, str]
) -> None:
    """Adds the time of a loop that projects as LESS does on a processor, in those of a sketch; see `dense_projection`."""
    seconds = {row.name: statistics.median(row.seconds) for row in rows}
    if not {LESS, SKETCH} <= set(seconds):
        return
    weights = sum(parameter.numel() for parameter in model.parameters())
    try:
        projection = dense_projection(peers, weights, sum(len(batch.input_ids) for batch in batches))
    except ImportError as error:
        missing[DENSE] = f"{type(error).__name__}: {error}"
        return
    found[f"{DENSE} / sketch"] = (seconds[LESS] + projection) / seconds[SKETCH]


def table(shape: str, rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Prints the rows of one shape; returns them for machines."""
    print(f"\n{shape}: FLOOR {statistics.median(rows[0].seconds):.2f} s")
    print(f"{'':44}{'/ FLOOR':>9}{'/ plain':>9}{'peak MiB':>10}{'max rel. error':>16}")
    found = []
    for row in rows:
        floors, plains = over(row, rows[0]), over(row, rows[1])
        error = f"{row.error:.1e}" if row.error is not None else ""
        print(f"{row.name:44}{floors:9.2f}{plains:9.2f}{row.peak_mib:10.0f}{error:>16}".rstrip())
        found.append(
            {"shape": shape, "name": row.name.strip(), "over_floor": floors, "over_plain": plains}
            | {"peak_mib": row.peak_mib, "max_rel_error": row.error, "seconds": statistics.median(row.seconds)}
        )
    return found


def arguments() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo", help="a local folder or hub id; the demo model by default")
    parser.add_argument("--shape", nargs="+", help="8x128 (examples x tokens) or lognormal; several may be given")
    parser.add_argument("--layers", type=int, help="keep only the first so many layers")
    parser.add_argument("--quick", action="store_true", help="six layers, 3x128, three turns")
    parser.add_argument("--only", default="", metavar="PATTERN", help="a regular expression: rows whose names it finds")
    parser.add_argument("--peers", type=Path, help="the folder that other libraries were installed in")
    parser.add_argument("--repeats", type=int, help="turns on the clock (5; with --quick 3)")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", choices=DTYPES, default="float32")
    parser.add_argument("--no-check", action="store_true", help="leave out the comparison with float64 loops")
    parser.add_argument("--json", type=Path, help="write the table to this file")
    return parser


def main() -> None:
    """Measures, prints, writes."""
    options = arguments().parse_args()
    torch.set_num_threads(options.threads)
    warnings.simplefilter("ignore", FutureWarning)
    layers = options.layers or (6 if options.quick else None)
    shapes = options.shape or (["3x128"] if options.quick else ["8x128", "4x256", "lognormal"])
    repeats = options.repeats or (3 if options.quick else 5)
    model = load(options.model, layers, DTYPES[options.dtype], options.device)
    found, summary = list[dict[str, Any]](), {}
    missing: dict[str, str] = {}
    for number, shape in enumerate(shapes):
        batches = draw_batches(shape, model.config.vocab_size, options.device)
        rows, missing = rows_for(model, batches, options, check=not options.no_check and number == 0)
        measure(rows, repeats, options.device)
        found += table(shape, rows)
        summary[shape] = ratios(rows)
        if options.peers and number == 0:
            add_dense_loop(rows, model, batches, options.peers, summary[shape], missing)
        for title, value in summary[shape].items():
            print(f"{title}: {value:.2f}")
        for name, reason in missing.items():
            print(f"{name}: cannot run here ({reason})")
    if options.json:
        facts = {"layers": model.config.num_hidden_layers, "dtype": options.dtype, "repeats": repeats}
        report = {
            "rows": found,
            "ratios": summary,
            "missing": missing,
            "machine": machine(options.device) | facts,
            "versions": versions("torch", "transformers", "peft", "bergson", "dattri-llm", "opacus"),
        }
        options.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
