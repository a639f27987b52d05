"""How well sketches keep the cosines between real gradients, at equal bytes, ours beside two other layouts.

    python benchmarks/sketch.py                 the demo model, all layers, 32 examples of its pool and anchor
    python benchmarks/sketch.py --json FILE     the same table for machines

The truth is the Gram matrix of the whole gradients of all linear layers, layer by layer from materialised gradients. Errors
are those of the cosines of all pairs; rmse over pairs and seeds. Ours come from the engine itself; the others' layouts are
made here from the same gradients:

    concatenated    k x k numbers per layer side by side, as bergson stores them (its default is k = 16)
    dense           one dense random sign matrix over all parameters, as TRAK projects; d times p signs, slow to draw
    coordinates     random entries of the gradient

Numbers are stored as float16, two bytes each, in every layout.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from gradsieve.data import IGNORE, tokenize
from gradsieve.data.batches import pad
from gradsieve.gradients.engine import GradientEngine
from gradsieve.gradients.parameters import choose_parameters
from gradsieve.gradients.settings import Batch, EngineSettings
from gradsieve.gradients.sketch import SketchPlan
from measuring import machine, versions
from ways import load

COLUMNS_AT_ONCE = 1 << 14


@dataclass
class Layout:
    """A way to shorten gradients, fed layer by layer.

    Attributes:
        name: What the table says.
        add: Takes a layer's number and gradients [n, d_out, d_in].
        parts: What it keeps, [n, …] each.
        summed: Whether the parts are added up, or stand side by side.
    """

    name: str
    add: Callable[[Layout, int, Tensor], Tensor]
    summed: bool
    parts: list[Tensor] = field(default_factory=list)

    def take(self, layer: int, G: Tensor) -> None:
        """Takes a layer in."""
        part = self.add(self, layer, G)
        if self.summed and self.parts:
            self.parts[0] += part
        else:
            self.parts.append(part)

    def rows(self) -> Tensor:
        """The shortened gradients, [n, numbers]."""
        return torch.cat(self.parts, 1)


def concatenated(side: int) -> Layout:
    """side x side numbers per layer from sign matrices on both sides."""

    def add(layout: Layout, layer: int, G: Tensor) -> Tensor:
        rng = np.random.Generator(np.random.Philox(key=layer))
        left, right = (signs(rng, size, side) / math.sqrt(side) for size in G.shape[1:])
        return torch.matmul(left.T, torch.matmul(G, right)).flatten(1)

    return Layout(f"concatenated {side} x {side} per layer", add, summed=False)


def dense(dim: int) -> Layout:
    """dim numbers from one dense sign matrix over all parameters, drawn in pieces and dropped."""

    def add(layout: Layout, layer: int, G: Tensor) -> Tensor:
        rng = np.random.Generator(np.random.SFC64(layer))
        flat, total = G.flatten(1), torch.zeros(len(G), dim)
        for columns in flat.split(COLUMNS_AT_ONCE, 1):
            total.addmm_(columns, signs(rng, columns.shape[1], dim))
        return total / math.sqrt(dim)

    return Layout(f"dense, d = {dim}", add, summed=True)


def coordinates(dim: int, entries: int) -> Layout:
    """dim random entries, drawn layer by layer in proportion."""

    def add(layout: Layout, layer: int, G: Tensor) -> Tensor:
        rng = torch.Generator().manual_seed(layer)
        flat = G.flatten(1)
        return flat[:, torch.randint(flat.shape[1], (round(dim * flat.shape[1] / entries),), generator=rng)]

    return Layout(f"random coordinates, d = {dim}", add, summed=False)


def signs(rng: np.random.Generator, rows: int, columns: int) -> Tensor:
    """A matrix of random signs, float32."""
    packed = np.frombuffer(rng.bytes(rows * columns // 8 + 1), dtype=np.uint8)
    return torch.from_numpy(np.unpackbits(packed, count=rows * columns).astype(np.float32)).mul_(2).sub_(1).view(rows, columns)


# -- gradients ---------------------------------------------------------------------------------------------------------


def real_batch(count: int, source: str, device: str) -> Batch:
    """`count` examples of the demo, half of its pool and half of its anchor, under the model's chat template."""
    from transformers import AutoTokenizer

    from gradsieve.demo.model import demo_model_dir
    from gradsieve.demo.pool import demo_set

    tokenizer = AutoTokenizer.from_pretrained(str(demo_model_dir()) if source == "demo" else source)
    pool, anchor = demo_set("pool"), demo_set("anchor")
    examples = pool[:: len(pool) // (count // 2)][: count // 2] + anchor[:: len(anchor) // (count // 2)][: count // 2]
    tokens = tokenize(examples, tokenizer, max_length=128).tokens
    return Batch(pad([t.input_ids for t in tokens], 0).to(device), pad([t.labels for t in tokens], IGNORE).to(device))


def stream(model: Any, batch: Batch, takers: Sequence[Callable[[int, Tensor], None]]) -> None:
    """Gives every linear layer's gradients [n, d_out, d_in] to the takers, one layer at a time, by plain hooks."""
    model.eval().requires_grad_(False)
    model.get_input_embeddings().requires_grad_(True)
    sites = [site for site in choose_parameters(model, "linear") if site.kind == "matrix"]

    def watch(number: int, module: nn.Module) -> torch.utils.hooks.RemovableHandle:
        def forward(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
            a = args[0].detach()

            def backward(b: Tensor) -> None:
                G = torch.bmm(b.mT, a).cpu()  # the layouts are made on the processor
                for take in takers:
                    take(number, G)

            output.register_hook(backward)

        return module.register_forward_hook(forward)

    hooks = [watch(number, site.owner) for number, site in enumerate(sites)]
    example, position = (batch.labels[:, 1:] != IGNORE).nonzero(as_tuple=True)
    hidden = model.base_model(input_ids=batch.input_ids, use_cache=False)[0][example, position]
    nll = nn.functional.cross_entropy(
        model.get_output_embeddings()(hidden), batch.labels[:, 1:][example, position], reduction="none"
    )
    (nll / torch.bincount(example)[example]).sum().backward()
    model.zero_grad(set_to_none=True)
    for hook in hooks:
        hook.remove()


def cosines(gram: Tensor) -> Tensor:
    """The cosines of all pairs, from a Gram matrix."""
    length = gram.diagonal().sqrt()
    pairs = torch.triu_indices(len(gram), len(gram), 1)
    cosine: Tensor = (gram / length[:, None] / length)[pairs[0], pairs[1]]
    return cosine


def cosines_of(rows: Tensor) -> Tensor:
    """The cosines of all pairs of rows."""
    return cosines(rows.double() @ rows.double().T)


# -- the table ---------------------------------------------------------------------------------------------------------


def ours(model: Any, batch: Batch, dim: int, seeds: int, exact: Tensor) -> dict[str, Any]:
    """Our sketches' errors over seeds, and what float16 adds to them."""
    errors, stored = [], []
    for seed in range(seeds):
        with GradientEngine(model, EngineSettings("linear", SketchPlan(dim, seed), norms=False, signals=False)) as engine:
            rows = engine.block(batch).sketch.cpu()
        errors.append(cosines_of(rows) - exact)
        stored.append(cosines_of(rows.half()) - cosines_of(rows))
    error = torch.stack(errors)
    bias = error.mean(0) / (error.std(0) / math.sqrt(seeds))
    return {
        "name": f"gradsieve, d = {dim}",
        "numbers": dim,
        "rmse": rms(error),
        "bias": float(error.mean()),
        "pairs_beyond_3_standard_errors": float((bias.abs() > 3).double().mean()),
        "float16": float(torch.stack(stored).abs().max()),
        "seeds": seeds,
    }


def rms(errors: Tensor) -> float:
    """Root mean square."""
    return float(errors.square().mean().sqrt())


def measure(model: Any, batch: Batch, dims: Sequence[int], seeds: int, dense_dims: Sequence[int]) -> list[dict[str, Any]]:
    """All rows of the table."""
    entries = sum(math.prod(site.shape) for site in choose_parameters(model, "linear") if site.kind == "matrix")
    layouts = [concatenated(side) for side in (2, 4, 16)]
    layouts += [dense(dim) for dim in dense_dims] + [coordinates(dim, entries) for dim in dims]
    gram = torch.zeros(len(batch.input_ids), len(batch.input_ids), dtype=torch.float64)

    def take_gram(layer: int, G: Tensor) -> None:
        for part in G.flatten(1).split(1 << 16, 1):
            gram.add_(part.double() @ part.double().T)

    stream(model, batch, [take_gram, *(layout.take for layout in layouts)])
    exact = cosines(gram)
    rows = [ours(model, batch, dim, seeds, exact) for dim in dims]
    for layout in layouts:
        found = layout.rows()
        stored = float((cosines_of(found.half()) - cosines_of(found)).abs().max())
        rows.append({"name": layout.name, "numbers": found.shape[1], "rmse": rms(cosines_of(found) - exact), "float16": stored})
    print(f"cosines of {len(exact)} pairs: mean {float(exact.mean()):.3f}, sd {float(exact.std()):.3f}")
    return rows


def main() -> None:
    """Measures, prints, writes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo", help="a local folder or hub id; the demo model by default")
    parser.add_argument("--layers", type=int, help="keep only the first so many layers")
    parser.add_argument("--examples", type=int, default=32)
    parser.add_argument("--dim", type=int, nargs="+", default=[1024, 4096])
    parser.add_argument("--dense", type=int, nargs="*", default=[], help="also dense projections of these sizes, minutes each")
    parser.add_argument("--seeds", type=int, default=8)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path, help="write the table to this file")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    start = time.perf_counter()
    model = load(options.model, options.layers, torch.float32, options.device)
    batch = real_batch(options.examples, options.model, options.device)
    rows = measure(model, batch, options.dim, options.seeds, options.dense)
    print(f"{'':36}{'numbers':>9}{'bytes':>9}{'rmse':>9}{'1/sqrt(d)':>11}{'float16 adds':>14}{'mean error':>12}")
    for row in rows:
        bias = f"{row['bias']:12.1e}" if "bias" in row else ""
        theory = f"{row['numbers'] ** -0.5:11.4f}"
        print(
            f"{row['name']:36}{row['numbers']:9,}{2 * row['numbers']:9,}{row['rmse']:9.4f}{theory}{row['float16']:14.1e}{bias}"
        )
    print(f"{time.perf_counter() - start:.0f} s")
    if options.json:
        report = {"rows": rows, "machine": machine(options.device), "versions": versions("torch", "transformers")}
        options.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
