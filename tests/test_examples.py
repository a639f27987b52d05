"""The scripts in examples/ and the function in docs/training.md run as they are, on a tiny model."""

import importlib.util
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from gradsieve import select

ROOT = Path(__file__).parents[1]


def load(name: str) -> Any:
    spec = importlib.util.spec_from_file_location(name, ROOT / "examples" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def chosen_run(tmp_path: Path, tiny_model: Path, write_data: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of a selection out of two files that have a shape each."""
    monkeypatch.setenv("CI", "1")  # TRL's own trainer reports its use unless this is set
    talks = [{"messages": [{"role": "user", "content": f"{i}?"}, {"role": "assistant", "content": "Yes."}]} for i in range(3)]
    file = tmp_path / "talks.jsonl"
    file.write_text("".join(json.dumps(talk) + "\n" for talk in talks))
    pool = [str(write_data("pool", 5)), str(file)]
    select("random", model=str(tiny_model), pool=pool, budget="7", max_length=90).save(tmp_path / "out")
    return tmp_path / "out"


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.* is deprecated:FutureWarning")  # peft calls the old name
def test_trl_trains_on_the_tokens_and_labels_of_the_gradients(chosen_run: Path, tiny_model: Path, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    from gradsieve.data import tokenize
    from gradsieve.export import read_chosen

    example = load("train_trl")
    trainer = example.make_trainer(chosen_run, str(tiny_model), tmp_path / "x", keep_order=True, cpu=True)
    chosen = read_chosen(chosen_run).examples
    assert {len(json.loads(one.raw)) for one in chosen} == {1, 3}
    tokens = tokenize(chosen, AutoTokenizer.from_pretrained(tiny_model), max_length=90).tokens
    assert any(t.truncated for t in tokens)
    seen = [
        (ids[mask.bool()].tolist(), labels[mask.bool()].tolist())
        for batch in trainer.get_train_dataloader()
        for ids, labels, mask in zip(batch["input_ids"], batch["labels"], batch["attention_mask"], strict=True)
    ]
    assert seen == [(t.input_ids.tolist(), t.labels.tolist()) for t in tokens]


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.* is deprecated:FutureWarning")
def test_the_trl_script_leaves_adapters_that_load(chosen_run: Path, tiny_model: Path, tmp_path: Path) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    out = tmp_path / "trained"
    load("train_trl").main([str(chosen_run), "--model", str(tiny_model), "--out", str(out), "--cpu"])
    adapted = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_model), out)
    assert any(p.abs().sum() > 0 for name, p in adapted.named_parameters() if "lora_B" in name)


def test_the_function_in_the_training_guide_runs(
    chosen_run: Path, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    monkeypatch.chdir(tmp_path)
    page = (ROOT / "docs" / "training.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"^```python\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)
    names: dict[str, Any] = {}
    exec(compile(block, "training.md", "exec"), names)
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    assert names["train"](model, AutoTokenizer.from_pretrained(tiny_model)) is model
    assert (tmp_path / "trained" / "model" / "adapter_model.safetensors").exists()


def test_the_training_guide_names_exactly_the_settings_and_their_defaults() -> None:
    import dataclasses

    from gradsieve.train import Recipe

    page = (ROOT / "docs" / "training.md").read_text(encoding="utf-8")
    rows = dict(re.findall(r"^\| `(\w+)` \| `(.*?)` \|", page.partition("## The recipe")[2], re.MULTILINE))
    assert rows == {field.name: str(field.default) for field in dataclasses.fields(Recipe)}
