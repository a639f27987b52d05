"""What per-example gradients cost, in multiples of the least that any method must do.

    python benchmarks/extract.py                 the demo model, all layers: 8 x 128, 4 x 256 tokens, log-normal lengths
    python benchmarks/extract.py --quick         six layers, 4 x 128, below two minutes
    python benchmarks/extract.py --json FILE     the same table for machines

FLOOR is a forward and an activation-only backward pass with a loss head that makes logits at supervised positions only: what
every method needs that wants each layer's input and output gradient. A plain training step is transformers' own loss and
`backward()`. Half of every example is prompt.

All rows are run in turn in one process, `--repeats` times, and each is divided by FLOOR (and by the plain step) *of the same
turn*; the table shows medians, so that a slow moment of the machine falls on all rows alike. Times are CPU times of all threads
(wall times on a GPU). Memory is the allocator's peak above what was held before. Errors are the largest relative ones of all
exact columns, against one float64 `backward()` per example for two examples, and of their sketches against a float64 run.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import os
import platform
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gradsieve.gradients.directions import References
from gradsieve.gradients.engine import GradientEngine
from gradsieve.gradients.parameters import Site, choose_parameters
from gradsieve.gradients.settings import Batch, Block, EngineSettings

EVERYTHING = "linear,embedding,lm-head"
BATCH_TOKENS = 1024
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float64": torch.float64}
Run = Callable[[], object]


@dataclass
class Row:
    """One way to do it, and what was measured.

    Attributes:
        name: What the table says.
        run: Does all batches once.
        around: Opened before and closed after each run, outside the clock (hooks on the model).
        check: Returns the largest relative error, where the row claims to be exact.
        seconds: One per turn.
        peak_mib: The allocator's peak above what was held before.
    """

    name: str
    run: Run
    around: Callable[[], AbstractContextManager[object]] = nullcontext
    check: Callable[[], float] | None = None
    seconds: list[float] = field(default_factory=list)
    peak_mib: float = math.nan
    error: float | None = None


# -- data --------------------------------------------------------------------------------------------------------------


def draw_batches(shape: str, vocabulary: int, device: str) -> list[Batch]:
    """Batches of random tokens: `8x128` is 8 examples of 128 tokens; `lognormal` 24 sorted examples of mean length 149."""
    rng = torch.Generator().manual_seed(0)
    if shape == "lognormal":
        drawn = (torch.randn(24, generator=rng) * 0.7 + math.log(149) - 0.7**2 / 2).exp()
        lengths = sorted(int(x) for x in drawn.clamp(16, 512))
    else:
        count, length = (int(part) for part in shape.split("x"))
        lengths = [length] * count
    batches, members = [], list[int]()
    for length in lengths:
        if members and length * (len(members) + 1) > max(BATCH_TOKENS, lengths[0]):
            batches.append(fill(members, vocabulary, rng, device))
            members = []
        members.append(length)
    return [*batches, fill(members, vocabulary, rng, device)]


def fill(lengths: Sequence[int], vocabulary: int, rng: torch.Generator, device: str) -> Batch:
    ids = torch.zeros(len(lengths), max(lengths), dtype=torch.int64)
    labels = torch.full_like(ids, -100)
    for z, length in enumerate(lengths):
        ids[z, :length] = torch.randint(5, vocabulary, (length,), generator=rng)
        labels[z, length // 2 : length] = ids[z, length // 2 : length]
    return Batch(ids.to(device), labels.to(device))


def examples_of(batches: Sequence[Batch]) -> list[Batch]:
    """Every example on its own, without padding."""
    singles = []
    for batch in batches:
        for ids, labels in zip(batch.input_ids, batch.labels, strict=True):
            length = int((labels != -100).nonzero()[-1]) + 1
            singles.append(Batch(ids[None, :length], labels[None, :length]))
    return singles


# -- the ways ----------------------------------------------------------------------------------------------------------


def floor(model: Any, batch: Batch) -> None:
    """Forward and activation-only backward: no weight gradients, no logits of prompt positions."""
    model.requires_grad_(False)
    hook = model.get_input_embeddings().register_forward_hook(lambda module, args, output: output.requires_grad_(True))
    hidden = model.base_model(input_ids=batch.input_ids, use_cache=False)[0]
    hook.remove()
    example, position = (batch.labels[:, 1:] != -100).nonzero(as_tuple=True)
    target = batch.labels[:, 1:][example, position]
    gradient = torch.zeros_like(hidden)
    weight = model.get_output_embeddings().weight
    for first in range(0, len(target), 256):
        run = slice(first, first + 256)
        logits = hidden.detach()[example[run], position[run]] @ weight.T
        for part, right in zip(logits.split(8), target[run].split(8), strict=True):  # eight rows stay in the cache
            error = part.float().log_softmax(1).exp_() if part.dtype == torch.bfloat16 else part.log_softmax(1).exp_()
            part.copy_(error.scatter_add_(1, right[:, None], torch.full_like(error[:, :1], -1)))
        gradient[example[run], position[run]] = logits @ weight
    hidden.backward(gradient)


def plain_step(model: Any, batch: Batch) -> None:
    """An ordinary training step without its optimizer."""
    model(input_ids=batch.input_ids, labels=batch.labels, use_cache=False).loss.backward()
    model.zero_grad(set_to_none=True)


def less_style(model: Any, singles: Sequence[Batch], dim: int = 1024) -> None:
    """One full gradient per example, then a projection as cheap as can be: one pass over it."""
    weights = list({id(site.parameter): site.parameter for site in choose_parameters(model, EVERYTHING)}.values())
    signs = torch.randint(0, 2, (max(w.numel() for w in weights) // dim + 1,), device=weights[0].device)
    signs = signs.to(weights[0].dtype).mul_(2).sub_(1)
    for single in singles:
        model(input_ids=single.input_ids, labels=single.labels, use_cache=False).loss.backward()
        sketch = torch.zeros(dim, dtype=weights[0].dtype, device=weights[0].device)
        for w in weights:
            assert w.grad is not None
            whole = w.numel() // dim
            sketch += signs[:whole] @ w.grad.flatten()[: whole * dim].view(whole, dim)
        model.zero_grad(set_to_none=True)


def all_batches(step: Callable[[Batch], object], batches: Sequence[Batch]) -> Run:
    def run() -> None:
        for batch in batches:
            step(batch)

    return run


def trainable(run: Run, module: nn.Module, adapters: bool = False) -> Run:
    """Makes the parameters trainable first: other rows leave them frozen."""

    def prepared() -> None:
        for name, parameter in module.named_parameters():
            parameter.requires_grad_(not adapters or "lora_" in name)
        run()

    return prepared


def lora_of(model: Any) -> Any:
    """The model with adapters on every linear layer, B away from its zero start."""
    from peft import LoraConfig, get_peft_model

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        adapted = get_peft_model(copy.deepcopy(model), LoraConfig(r=16, lora_alpha=32, target_modules="all-linear"))
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.02)
    return adapted


def draw_references(model: Any) -> dict[int, References]:
    """One and four reference directions over the linear layers: mean gradients of short random examples."""
    found = {}
    for count in (1, 4):
        means = {}
        with GradientEngine(model, EngineSettings("linear")) as engine:
            for i in range(count):
                ids = torch.arange(64, device=model.device).view(2, 32) * 7 + 1000 * i
                means[f"r{i}"] = engine.mean_gradient([Batch(ids, ids)])
        found[count] = References.stack(means)
    return found


def rows_for(model: Any, batches: Sequence[Batch], with_lora: bool, check: bool) -> list[Row]:
    """All rows; FLOOR and the plain step first."""
    references, singles = draw_references(model), examples_of(batches)
    truth = Truth(model, EVERYTHING) if check else None

    def ours(name: str, settings: EngineSettings, refer: References | None = None) -> Row:
        return engine_row(name, model, batches, settings, refer, truth)

    rows = [
        Row("FLOOR: forward, activation-only backward", all_batches(lambda batch: floor(model, batch), batches)),
        Row("plain training step", trainable(all_batches(lambda batch: plain_step(model, batch), batches), model)),
        ours("sketch of linear, head, embedding", EngineSettings(EVERYTHING, norms=False, signals=False)),
        ours("  + norm, mean, sd per layer", EngineSettings(EVERYTHING, layers="moments", signals=False)),
        ours("  + max, min per layer", EngineSettings(EVERYTHING, layers="extremes", signals=False)),
        ours("sketch of linear", EngineSettings("linear", norms=False, signals=False)),
        ours("  + norm", EngineSettings("linear", signals=False)),
        ours("  + norm, signals of embedding and head", EngineSettings("linear")),
        ours("  + norm, 1 reference", EngineSettings("linear", signals=False), references[1]),
        ours("  + norm, 4 references", EngineSettings("linear", signals=False), references[4]),
        ours("sketch and norm of last:4", EngineSettings("last:4", signals=False)),
        ours("sketch and norm of lm-head", EngineSettings("lm-head", signals=False)),
        Row("LESS-style loop, batch 1", trainable(lambda: less_style(model, singles), model)),
    ]
    if with_lora:
        adapted = lora_of(model)
        step = all_batches(lambda batch: plain_step(adapted, batch), batches)
        own_truth = Truth(adapted.get_base_model(), "lora") if check else None
        rows += [
            Row("LoRA training step", trainable(step, adapted, adapters=True)),
            engine_row("sketch and norm of LoRA", adapted, batches, EngineSettings("lora", signals=False), None, own_truth),
        ]
    return rows


def engine_row(
    name: str,
    model: Any,
    batches: Sequence[Batch],
    settings: EngineSettings,
    references: References | None,
    truth: Truth | None,
) -> Row:
    engine = GradientEngine(model, settings, references)
    check = (lambda: largest_error(engine, settings, references, truth)) if truth else None
    return Row(name, all_batches(engine.block, batches), lambda: engine, check)


# -- exactness ---------------------------------------------------------------------------------------------------------


class Truth:
    """Two short examples, their whole gradients by a float64 loop, and a float64 copy of the model."""

    def __init__(self, model: Any, spec: str) -> None:
        rng = torch.Generator().manual_seed(1)
        self.examples = [fill([length], model.config.vocab_size, rng, str(model.device)) for length in (40, 64)]
        self.twin = copy.deepcopy(model).double().eval()
        sites = choose_parameters(self.twin, spec)
        self.tied = self.twin.get_input_embeddings().weight is self.twin.get_output_embeddings().weight
        untied = copy.deepcopy(self.twin) if self.tied else self.twin
        if self.tied:
            untied.get_output_embeddings().weight = nn.Parameter(untied.get_output_embeddings().weight.detach().clone())
        self.gradients = [self._loop(untied, single, sites) for single in self.examples]

    @staticmethod
    def _loop(twin: Any, single: Batch, sites: Sequence[Site]) -> dict[str, Tensor]:
        """One float64 backward with a loss of its own: gradient [d_out, d_in] per site; a tied weight's parts stay apart."""
        twin.requires_grad_(True)
        logits = twin(input_ids=single.input_ids, use_cache=False).logits[0, :-1]
        torch.autograd.backward(nn.functional.cross_entropy(logits, single.labels[0, 1:]))
        gradients = {}
        for site in sites:
            g = twin.get_parameter(site.name).grad
            gradients[site.name] = g.T.clone() if site.kind == "transposed" else g.clone()
        twin.zero_grad(set_to_none=True)
        return gradients


def largest_error(engine: GradientEngine, settings: EngineSettings, references: References | None, truth: Truth) -> float:
    """The largest relative error of an engine; mean and sd relative to the root mean square, max and min to the larger."""
    with GradientEngine(truth.twin, EngineSettings(settings.params, settings.sketch, norms=False, signals=False)) as exact:
        sketches = [exact.block(single).sketch.double() for single in truth.examples]
    with engine:
        blocks = [engine.block(single) for single in truth.examples]
    errors = []
    for block, sketch, every in zip(blocks, sketches, truth.gradients, strict=True):
        errors.append(float((block.sketch.double() - sketch).norm() / sketch.norm()))
        gradients = {site.name: every[site.name] for site in engine.sites}
        errors += column_errors(block, gradients, engine.sites, settings, references, truth.tied)
    return max(errors)


def column_errors(
    block: Block,
    gradients: dict[str, Tensor],
    sites: Sequence[Site],
    settings: EngineSettings,
    references: References | None,
    tied: bool,
) -> list[float]:
    ends = {site.kind: site.name for site in sites if site.kind in ("embedding", "head")}
    square = sum(float(g.square().sum()) for g in gradients.values())
    if len(ends) == 2 and tied:
        square += 2 * float((gradients[ends["embedding"]] * gradients[ends["head"]]).sum())
    errors = []
    if settings.norms:
        errors.append(abs(float(block.columns["norm"][0]) / square**0.5 - 1))
    for name, g in gradients.items() if settings.layers != "none" else ():
        rms, extreme = float(g.square().mean().sqrt()), float(g.abs().max())
        truth = {
            "norm": (float(g.norm()), float(g.norm())),
            "mean": (float(g.mean()), rms),
            "sd": (float(g.std(correction=0)), rms),
        }
        if settings.layers == "extremes":
            truth |= {"max": (float(g.max()), extreme), "min": (float(g.min()), extreme)}
        for column, (value, scale) in truth.items():
            if f"{column}/{name}" in block.columns:
                errors.append(abs(float(block.columns[f"{column}/{name}"][0]) - value) / scale)
    for i, name in enumerate(references.names if references else ()):
        assert references is not None
        value = sum(float((g * references.tensors[key][i]).sum()) for key, g in gradients.items())
        errors.append(abs(float(block.columns[f"dot/{name}"][0]) - value) / square**0.5)
    return errors


# -- measuring ---------------------------------------------------------------------------------------------------------


def clock(device: str) -> float:
    if device.startswith("cuda"):
        torch.cuda.synchronize()
        return time.perf_counter()
    return time.process_time() if device == "cpu" else time.perf_counter()


@contextmanager
def quiet() -> Iterator[None]:
    """Silences what the profiler's native code writes to standard error."""
    sys.stderr.flush()
    saved, sink = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(sink, 2)
        yield
    finally:
        os.dup2(saved, 2)
        os.close(sink)
        os.close(saved)


def peak_mib(run: Run, device: str) -> float:
    """The allocator's peak while `run` runs, above what was held before."""
    if device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    with quiet(), torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        run()
    events: Any = profile.profiler.kineto_results.events()
    held = most = 0
    for event in sorted((e for e in events if e.name() == "[memory]"), key=lambda e: e.start_ns()):
        held += event.nbytes()
        most = max(most, held)
    return most / 2**20


def measure(rows: Sequence[Row], repeats: int, device: str) -> None:
    """Runs all rows in turn: once to warm up (and for memory and errors), then `repeats` times on the clock."""
    for row in rows:
        with row.around():
            row.peak_mib = peak_mib(row.run, device)
        if row.check:
            row.error = row.check()
    for turn in range(repeats):
        for row in rows:
            with row.around():
                start = clock(device)
                row.run()
                row.seconds.append(clock(device) - start)
        print(f"turn {turn + 1} of {repeats}: FLOOR {rows[0].seconds[-1]:.2f} s", file=sys.stderr)


def over(row: Row, base: Row) -> float:
    return statistics.median(mine / theirs for mine, theirs in zip(row.seconds, base.seconds, strict=True))


def table(shape: str, rows: Sequence[Row]) -> list[dict[str, Any]]:
    print(f"\n{shape}: FLOOR {statistics.median(rows[0].seconds):.2f} s")
    print(f"{'':44}{'/ FLOOR':>9}{'/ plain':>9}{'peak MiB':>10}{'max rel. error':>16}")
    found = []
    for row in rows:
        floors, plains = over(row, rows[0]), over(row, rows[1])
        error = f"{row.error:.1e}" if row.error is not None else ""
        print(f"{row.name:44}{floors:9.2f}{plains:9.2f}{row.peak_mib:10.0f}{error:>16}")
        found.append(
            {"shape": shape, "name": row.name.strip(), "over_floor": floors, "over_plain": plains}
            | {"peak_mib": row.peak_mib, "max_rel_error": row.error, "seconds": statistics.median(row.seconds)}
        )
    lora = [row for row in rows if "LoRA" in row.name]
    if lora:
        print(f"LoRA: per-example gradients take {over(lora[1], lora[0]):.2f} x a LoRA training step")
    return found


def load(source: str, layers: int | None, dtype: torch.dtype, device: str) -> Any:
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    if source == "demo":
        from gradsieve.demo.model import demo_model_dir

        source = str(demo_model_dir())
    model = AutoModelForCausalLM.from_pretrained(source, dtype=dtype, **({"num_hidden_layers": layers} if layers else {}))
    return model.to(device).train()


def machine(device: str) -> dict[str, Any]:
    name = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        name = next((line.split(":")[1].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line), name)
    if device.startswith("cuda"):
        name = torch.cuda.get_device_name(device)
    return {"processor": name, "system": platform.platform(), "threads": torch.get_num_threads(), "device": device}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo", help="a local folder or hub id; the demo model by default")
    parser.add_argument("--shape", nargs="+", help="8x128 (examples x tokens) or lognormal; several may be given")
    parser.add_argument("--layers", type=int, help="keep only the first so many layers")
    parser.add_argument("--quick", action="store_true", help="six layers, 4x128, three turns")
    parser.add_argument("--repeats", type=int, help="turns on the clock (5; with --quick 3)")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", choices=DTYPES, default="float32")
    parser.add_argument("--no-check", action="store_true", help="leave out the comparison with float64 loops")
    parser.add_argument("--no-lora", action="store_true", help="leave out the LoRA rows")
    parser.add_argument("--json", type=Path, help="write the table to this file")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    layers = options.layers or (6 if options.quick else None)
    shapes = options.shape or (["4x128"] if options.quick else ["8x128", "4x256", "lognormal"])
    repeats = options.repeats or (3 if options.quick else 5)
    model = load(options.model, layers, DTYPES[options.dtype], options.device)
    found = []
    for number, shape in enumerate(shapes):
        batches = draw_batches(shape, model.config.vocab_size, options.device)
        rows = rows_for(model, batches, not options.no_lora, check=not options.no_check and number == 0)
        measure(rows, repeats, options.device)
        found += table(shape, rows)
    if options.json:
        import transformers

        versions = {"python": platform.python_version(), "torch": torch.__version__, "transformers": transformers.__version__}
        facts = {"layers": model.config.num_hidden_layers, "dtype": options.dtype, "repeats": repeats}
        report = {"rows": found, "machine": machine(options.device) | facts, "versions": versions}
        options.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
