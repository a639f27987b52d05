"""A model that has learnt how the general and the mathematical set answer, to start a comparison from.

    python studies/adapt.py --source SETS --data DATA --out MODEL

The untouched model does not know the style of these sets and learns it from any answers at all, so that their loss falls
whatever it is trained on, and hides what is lost. This one is trained on rows of both train parts that are not, or nearly, in
DATA's anchor or in a test: LoRA, two passes, merged. Killed, it goes on. SETS and DATA as in prepare.py.
"""

from __future__ import annotations

import argparse
import random
from pathlib import Path

import torch
from peft import PeftModel

from gradsieve.data import TokenSet
from gradsieve.foreign import known_renames
from gradsieve.models import find_model
from gradsieve.terminal import Terminal
from gradsieve.train import Recipe, finetune
from gradsieve.types import Example
from prepare import ABILITIES, apart, example, read

LENGTH = 256
ROWS = 200
"""Of each set."""
RECIPE = Recipe(learning_rate=5e-4, batch=8, micro_batch=2, epochs=2)


def main() -> None:
    """Trains the model and saves it."""
    parser = argparse.ArgumentParser(description="A model that has learnt how the general and the mathematical set answer.")
    parser.add_argument("--source", type=Path, required=True, help="folder with general.train.jsonl.gz and so on")
    parser.add_argument("--data", type=Path, required=True, help="what prepare.py wrote")
    parser.add_argument("--out", type=Path, required=True, help="folder of the model")
    parser.add_argument("--model", default="demo", help="folder or hub id of the model to begin with")
    parser.add_argument("--rows", type=int, default=ROWS, help="rows of each set")
    arguments = parser.parse_args()
    source = find_model(arguments.model)
    examples = lessons(arguments.source, arguments.data, arguments.rows)
    tokens = TokenSet.of("lessons", examples, source.tokenizer, max_length=LENGTH)
    for note in tokens.remarks(LENGTH):
        print(f"note: {note}")
    model = source.load(torch.float32, "cpu")
    with Terminal() as terminal:
        trained = finetune(model, tokens.tokens, RECIPE, arguments.out / "training", progress=terminal.progress)
    with known_renames():
        merged = PeftModel.from_pretrained(trained.restore(), trained.folder).merge_and_unload()
    merged.save_pretrained(arguments.out)
    source.tokenizer.save_pretrained(arguments.out)
    print(f"{len(tokens.kept)} rows, {trained.steps} steps: the model is in {arguments.out}")


def lessons(source: Path, data: Path, rows: int) -> list[Example]:
    """Returns the rows to train on, set by set: none is in the anchor or in a test."""
    walls = {name: read(data / f"{name}.jsonl") for name in ("anchor", *ABILITIES)}
    found = []
    for name in ABILITIES:
        usable = apart(read(source / f"{name}.train.jsonl.gz"), walls)
        if len(usable) < rows:
            raise SystemExit(f"{name} must have {rows} usable rows, got {len(usable)}; give fewer --rows")
        found += [example(row, row["id"]) for row in random.Random(f"adapt/{name}").sample(usable, rows)]
    return found


if __name__ == "__main__":
    main()
