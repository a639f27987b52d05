"""What the transfer gate says of models whose kinship is known: `python benchmarks/ogs_transfer.py [--examples 200]`.

A model is compared with itself less some of its middle layers (not trained again), with itself at fewer bits a weight, and
with a model of its form whose weights were never trained.
Each line has ρ and its interval, the ρ of fresh weights in the navigator's place, and the interval of what it is better by.
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path
from typing import Any

import torch

from gradsieve.demo.pool import demo_anchor
from gradsieve.models import find_model
from gradsieve.transfer import Transfer, transfer


def pruned(folder: Path, out: Path, drop: int) -> Path:
    """Saves the model without `drop` of its middle layers."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    layers = model.model.layers
    first = (len(layers) - drop) // 2
    kept = [layer for i, layer in enumerate(layers) if not first <= i < first + drop]
    for i, layer in enumerate(kept):
        layer.self_attn.layer_idx = i
    model.model.layers = torch.nn.ModuleList(kept)
    model.config.num_hidden_layers = len(kept)
    if getattr(model.config, "layer_types", None):
        model.config.layer_types = model.config.layer_types[: len(kept)]
    return saved(model, folder, out)


GROUP = 32
"""Weights that share a scale when they are quantised."""


def quantised(folder: Path, out: Path, bits: int) -> Path:
    """Saves the model with the weights of its decoder's linear layers rounded to `bits` bits, symmetric, by groups of a row."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    most = 2 ** (bits - 1) - 1
    for module in model.model.modules():
        if isinstance(module, torch.nn.Linear):
            groups = module.weight.data.view(-1, GROUP)
            scale = groups.abs().amax(1, keepdim=True).clamp(min=1e-12) / most
            groups.copy_((groups / scale).round() * scale)
    return saved(model.to(torch.bfloat16), folder, out)


def untrained(folder: Path, out: Path, layers: int) -> Path:
    """Saves a model of the same form with fresh weights."""
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    config = AutoConfig.from_pretrained(folder)
    config.num_hidden_layers = layers or config.num_hidden_layers
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[: config.num_hidden_layers]
    return saved(AutoModelForCausalLM.from_config(config).to(torch.bfloat16), folder, out)


def saved(model: Any, folder: Path, out: Path) -> Path:
    model.save_pretrained(out)
    for file in folder.iterdir():
        if not (out / file.name).exists() and file.suffix != ".safetensors" and file.is_file():
            shutil.copy(file, out)
    return out


def main() -> None:
    from transformers import AutoConfig

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--examples", type=int, default=200)
    parser.add_argument("--drop", type=int, nargs="*", default=[3, 10])
    parser.add_argument("--bits", type=int, nargs="*", default=[8, 4])
    parser.add_argument("--untrained-layers", type=int, default=0, help="of the model that was never trained; 0 is as many")
    parser.add_argument("--anchor", type=int, default=120, help="examples, half of each ability")
    parser.add_argument("--max-length", type=int, default=256)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "auto"])
    parser.add_argument("--out", type=Path, default=Path("transfer-study"))
    arguments = parser.parse_args()
    folder = find_model(arguments.model).folder
    assert folder is not None
    navigators = {f"{drop} layers fewer": pruned(folder, arguments.out / f"less-{drop}", drop) for drop in arguments.drop}
    navigators |= {f"{bits} bits": quantised(folder, arguments.out / f"bits-{bits}", bits) for bits in arguments.bits}
    navigators["never trained"] = untrained(folder, arguments.out / "untrained", arguments.untrained_layers)
    anchor = arguments.out / "anchor.jsonl"
    general = sorted(demo_anchor(), key=lambda e: (e.category, e.id))
    step = max(1, len(general) // arguments.anchor)
    anchor.write_bytes(b"".join(e.raw + b"\n" for e in general[::step][: arguments.anchor]))
    for name, path in navigators.items():
        out = arguments.out / f"{path.name}-out"
        layers = AutoConfig.from_pretrained(path).num_hidden_layers
        shared = {"model": arguments.out / "model", "untrained": arguments.out / f"fresh-{layers}"}
        for role, gradients in shared.items():  # those of the model, and of fresh weights of one form, are the same each time
            if gradients.exists() and not (out / role).exists():
                shutil.copytree(gradients, out / role)
        verdict = transfer(
            Transfer(
                str(path),
                arguments.model,
                ("demo",),
                (str(anchor),),
                arguments.examples,
                str(out),
                override=True,
                max_length=arguments.max_length,
                dtype=arguments.dtype,
            )
        )
        for role, gradients in shared.items():
            if not gradients.exists():
                shutil.copytree(out / role, gradients)
        (low, high), (least, most) = verdict.interval, verdict.gain
        print(
            f"{name}: {verdict.rho:.3f} [{low:.3f}, {high:.3f}], fresh weights {verdict.untrained:.3f}, better by "
            f"[{least:.3f}, {most:.3f}] {'REFUSED' if verdict.refused else ''}",
            flush=True,
        )


if __name__ == "__main__":
    main()
