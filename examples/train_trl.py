"""Trains a model with TRL's own SFTTrainer on a selection, on exactly the tokens its gradients were taken of.

    python examples/train_trl.py out/ --model path/or/hub-id --out trained/   # out/ is the folder of `gradsieve select`

TRL would apply the chat template itself and put the loss elsewhere: on all tokens of `messages`, or on what the template
writes after the last answer. A dataset that already has `input_ids` and `labels` passes through it unchanged.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer

from gradsieve.data import tokenize
from gradsieve.data.template import read_template
from gradsieve.export import read_chosen


def make_trainer(run: Path, model: str, out: Path, *, keep_order: bool, cpu: bool) -> Any:
    """Returns TRL's trainer with OGS's recipe: LoRA 16 on all linear layers, batch 64, 3 epochs."""
    chosen = read_chosen(run)  # its examples, whatever the shapes of the pool's files, and how their gradients were taken
    template = read_template(chosen.record["job"]["chat_template"])
    max_length = chosen.record["job"]["max_length"]
    tokenizer = AutoTokenizer.from_pretrained(model)
    done = tokenize(chosen.examples, tokenizer, max_length=max_length, chat_template=template)
    for excluded in done.excluded:
        print(f"left out {excluded.id}: {excluded.reason}")
    data = Dataset.from_dict(
        {"input_ids": [t.input_ids.tolist() for t in done.tokens], "labels": [t.labels.tolist() for t in done.tokens]}
    )
    settings = SFTConfig(
        output_dir=str(out),
        max_length=None,  # cut already, at the end, as TRL would
        packing=False,  # an example is a row
        shuffle_dataset=False,
        train_sampling_strategy="sequential" if keep_order else "random",
        learning_rate=2e-4,
        lr_scheduler_type="cosine",
        warmup_steps=0.1,
        weight_decay=0.01,
        num_train_epochs=3,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=16,
        bf16=not cpu,
        use_cpu=cpu,
        report_to="none",
    )
    adapters = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
    base = AutoModelForCausalLM.from_pretrained(model, dtype="auto")
    return SFTTrainer(base, settings, train_dataset=data, processing_class=tokenizer, peft_config=adapters)


def main(arguments: Sequence[str] | None = None) -> None:
    """Trains and saves the adapters and the tokenizer."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="the --out of `gradsieve select`")
    parser.add_argument("--model", required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--keep-order", action="store_true", help="train in the order of the selection")
    parser.add_argument("--cpu", action="store_true")
    options = parser.parse_args(arguments)
    trainer = make_trainer(options.run, options.model, options.out, keep_order=options.keep_order, cpu=options.cpu)
    trainer.train()
    trainer.save_model(str(options.out))


if __name__ == "__main__":
    main()
