"""Whether the mean loss hides forgetting: the demo model before and after training on arithmetic that is wrong throughout.

    python benchmarks/forgetting.py [--steps 30] [--items 40] [--json FILE]

The training set is word problems of the planted faults' templates, every step worked with the wrong operation. The tests are
the demo's: correct word problems of other templates, facts, and definitions. Metrics are those of gradsieve.evaluate; KL is
from the model before, in nats per token. The last lines say what measuring cost, in CPU seconds per 1,000 tokens.
"""

from __future__ import annotations

import argparse
import json
import random
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from gradsieve.data import tokenize
from gradsieve.demo import arithmetic
from gradsieve.demo.pool import demo_general, demo_test
from gradsieve.evaluate import LOSSES, Suite, measure
from gradsieve.models import find_model
from gradsieve.train import Recipe, finetune
from gradsieve.types import Example

COLUMNS = ("loss", "key_loss", "key_accuracy", "number_accuracy", "kl")


def wrong_arithmetic(count: int) -> list[Example]:
    """Returns word problems whose every step is worked with the wrong operation."""
    rows = []
    for i, problem in enumerate(arithmetic.false_problems(count, random.Random(0))):
        turns = ({"role": "user", "content": problem.question}, {"role": "assistant", "content": problem.answer})
        rows.append(Example(f"wrong-{i}", turns, b"{}", "forgetting.py"))
    return rows


def means(model: Any, suite: Suite, tokenizer: Any) -> dict[str, dict[str, float]]:
    """Returns the mean of every metric over the items that have it, by test."""
    found = measure(model, suite, tokenizer=tokenizer)
    return {test: {name: float(values.nanmean()) for name, values in metrics.items()} for test, metrics in found.items()}


def cost(model: Any, suite: Suite, tokenizer: Any) -> dict[str, float]:
    """Returns the CPU seconds per 1,000 tokens of losses alone, and of losses with KL."""
    tokens = sum(len(row.input_ids) for test in suite for row in test.tokens)
    seconds = {}
    for name, metrics in (("losses", LOSSES), ("losses and KL", (*LOSSES, "kl"))):
        start = time.process_time()
        measure(model, suite, tokenizer=tokenizer, metrics=metrics)
        seconds[name] = 1000 * (time.process_time() - start) / tokens
    return seconds


def main() -> None:
    """Trains, measures, prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--items", type=int, default=40)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    source = find_model("demo")
    model, tokenizer = source.load(torch.float32, "cpu"), source.tokenizer
    general: dict[str, list[Example]] = {name: demo_general(name, size=options.items) for name in ("arithmetic", "knowledge")}
    suite = Suite.of(tokenizer, target={"definitions": demo_test(size=options.items)}, general=general)
    recipe = Recipe(steps=options.steps, batch=8, learning_rate=2e-4, schedule="constant", warmup=0.0)
    rows = tokenize(wrong_arithmetic(8 * options.steps), tokenizer).tokens
    found: dict[str, Any] = {"before": means(model, suite, tokenizer)}
    with tempfile.TemporaryDirectory() as folder:
        trained = finetune(model, rows, recipe, Path(folder) / "run").model
    found |= {"after": means(trained, suite, tokenizer), "cost": cost(trained, suite, tokenizer)}
    print(f"{'':24}" + "".join(f"{name:>17}" for name in COLUMNS))
    for test in (test.name for test in suite):
        for when in ("before", "after"):
            cells = (found[when][test].get(name, 0.0 if name == "kl" else float("nan")) for name in COLUMNS)
            print(f"{test + ', ' + when:24}" + "".join(f"{cell:17.3f}" for cell in cells))
    for name, seconds in found["cost"].items():
        print(f"{name}: {seconds:.2f} CPU seconds per 1,000 tokens")
    if options.json:
        options.json.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
