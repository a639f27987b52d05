"""What an optimizer step costs: our trainer beside TRL's own, with surgery, in bfloat16; each in a process of its own.

    python benchmarks/training.py                 the demo model, LoRA 16, 3 steps of 32 medical examples; about ten minutes
    python benchmarks/training.py --json FILE     the same for machines

Same model, examples, micro-batches of 8 and adapters. The first step, which warms caches up, is not counted. TRL's loss is the
mean over a batch's tokens, ours over examples: the work should be the same. Seconds are the processor's, over all threads.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from gradsieve.data import Tokens, tokenize
from gradsieve.demo import demo_set
from gradsieve.models import find_model
from gradsieve.train import Recipe, finetune
from measuring import machine, versions

WAYS: dict[str, dict[str, Any]] = {
    "TRL's SFTTrainer": {"trl": True},
    "ours": {},
    "ours, A-GEM with as many anchor examples": {"surgery": "agem"},
    "ours, PCGrad with as many anchor examples": {"surgery": "pcgrad"},
    "ours, a quarter of the batch replayed": {"replay_share": 0.25},
    "ours, bfloat16": {"dtype": "bfloat16"},
}
MICRO, STEPS = 8, 3


def with_ours(model: Any, tokens: Sequence[Tokens], anchor: Sequence[Tokens], settings: dict[str, Any], out: Path) -> float:
    """Returns the processor seconds of the counted steps."""
    recipe = Recipe(
        batch=len(tokens) // STEPS, micro_batch=MICRO, steps=STEPS, warmup=0.0, save_steps=STEPS + 1, device="cpu", **settings
    )
    marks: list[float] = []
    finetune(
        model,
        tokens,
        recipe,
        out,
        anchor=anchor if recipe.surgery != "none" else (),
        replay=anchor if recipe.replay_share > 0 else (),
        progress=lambda *_: marks.append(time.process_time()),
    )
    return marks[-1] - marks[0]


def with_trl(model: Any, tokenizer: Any, tokens: Sequence[Tokens], out: Path) -> float:
    """Returns the processor seconds of the counted steps."""
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import TrainerCallback
    from trl import SFTConfig, SFTTrainer

    marks: list[float] = []

    class Marks(TrainerCallback):  # type: ignore[misc]
        def on_step_end(self, *_: Any, **__: Any) -> None:
            marks.append(time.process_time())

    settings = SFTConfig(
        output_dir=str(out),
        per_device_train_batch_size=MICRO,
        gradient_accumulation_steps=len(tokens) // STEPS // MICRO,
        num_train_epochs=1,
        learning_rate=2e-4,
        bf16=False,
        use_cpu=True,
        activation_checkpointing=False,
        report_to="none",
        disable_tqdm=True,
        save_strategy="no",
        max_length=None,
    )
    data = Dataset.from_dict(
        {"input_ids": [t.input_ids.tolist() for t in tokens], "labels": [t.labels.tolist() for t in tokens]}
    )
    adapters = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
    SFTTrainer(
        model, settings, train_dataset=data, processing_class=tokenizer, peft_config=adapters, callbacks=[Marks()]
    ).train()
    return marks[-1] - marks[0]


def measure(settings: dict[str, Any], batch: int) -> dict[str, float]:
    """Returns what one way took, in this process."""
    source = find_model("demo")
    model = source.load(torch.float32, "cpu")
    tokens = tokenize(demo_set("pool")[: batch * STEPS], source.tokenizer).tokens
    anchor = tokenize(demo_set("anchor")[:60], source.tokenizer).tokens
    with tempfile.TemporaryDirectory() as folder:
        run: Callable[[], float]
        if settings.get("trl"):
            run = lambda: with_trl(model, source.tokenizer, tokens, Path(folder))  # noqa: E731
        else:
            run = lambda: with_ours(model, tokens, anchor, settings, Path(folder))  # noqa: E731
        seconds = run()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    return {"seconds per step": seconds / (STEPS - 1), "peak GiB": peak}


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--way", choices=list(WAYS), help="measure one way in this process and print it as JSON")
    parser.add_argument("--batch", type=int, default=32, help="examples per step, a multiple of 8")
    options = parser.parse_args()
    if options.way:
        warnings.simplefilter("ignore")
        print(json.dumps(measure(WAYS[options.way], options.batch)))
        return
    print(f"{machine('cpu')}; {versions()}")
    rows = {}
    for way in WAYS:
        command = [sys.executable, __file__, "--way", way, "--batch", str(options.batch)]
        ran = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "CI": "1"}, check=True)
        rows[way] = json.loads(ran.stdout.splitlines()[-1])
        print(f"{way:40s} {rows[way]['seconds per step']:8.1f} s per step {rows[way]['peak GiB']:6.2f} GiB", flush=True)
    if options.json:
        options.json.write_text(json.dumps({"machine": machine("cpu"), "versions": versions(), "ways": rows}, indent=1))


if __name__ == "__main__":
    main()
