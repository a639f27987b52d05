"""What a training leaves of the model: adapters come off without a trace, also after an error; full tuning stays."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError

from gradsieve.errors import DataError, InvalidArgument
from gradsieve.train import finetune
from gradsieve.train.lending import _checkpoints_activations

from .conftest import FULL, PLAIN, assert_same, examples, gpt2, llama


def state_of(model: Any) -> dict[str, Any]:
    return {
        "weights": {name: tensor.clone() for name, tensor in model.state_dict().items()},
        "modules": [(name, type(module)) for name, module in model.named_modules()],
        "requires": [p.requires_grad for p in model.parameters()],
        "training": [module.training for module in model.modules()],
        "checkpointing": _checkpoints_activations(model),
        "config": model.config.to_dict(),
        "generation": model.generation_config.to_dict(),
        "attributes": sorted(name for name in vars(model) if name != "_is_hf_initialized"),
        "hooks": [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()],
    }


def assert_untouched(model: Any, before: dict[str, Any]) -> None:
    after = state_of(model)
    assert all(torch.equal(before["weights"][name], tensor) for name, tensor in after.pop("weights").items())
    assert after == {key: value for key, value in before.items() if key != "weights"}


@pytest.mark.parametrize(
    ("make_model", "extra"),
    [(llama, {}), (gpt2, {"gradient_checkpointing": True, "dtype": "bfloat16", "dropout": 0.1})],
    ids=["llama", "gpt2, with everything on"],
)
def test_adapters_learn_and_come_off_without_a_trace(
    make_model: Callable[..., Any], extra: dict[str, Any], tmp_path: Path
) -> None:
    model, tokens = make_model().train(not extra), examples(6)
    model.lm_head.weight.requires_grad_(False)
    next(model.base_model.children()).train(bool(extra))  # a part in another mode than the rest
    before = state_of(model)
    recipe = dataclasses.replace(PLAIN, epochs=8, rank=4, **extra)
    first = finetune(model, tokens, recipe, tmp_path / "first")
    assert not first.model.training
    assert sum(first.losses[-2:]) < sum(first.losses[:2])
    adapted = {name.split(".lora_")[0].split(".")[-1] for name in first.model.state_dict() if "lora_A" in name}
    assert "lm_head" not in adapted
    assert len(adapted) == (7 if "llama" in type(model).__name__.lower() else 3)
    probe = {"input_ids": torch.arange(3, 9)[None]}
    with torch.no_grad():
        changed = first.model(**probe).logits
    assert first.restore() is model
    assert_untouched(model, before)
    loaded = finetune(model, tokens, recipe, tmp_path / "first")
    with torch.no_grad():
        assert torch.equal(loaded.model(**probe).logits, changed)
    assert (loaded.losses, loaded.seconds, loaded.steps) == (first.losses, first.seconds, first.steps)
    loaded.restore()
    assert_untouched(model, before)
    second = finetune(model, tokens, recipe, tmp_path / "second")
    assert second.losses == first.losses
    second.restore()


def test_an_error_in_the_middle_takes_the_adapters_off(tmp_path: Path) -> None:
    model, tokens = llama(), examples(6)
    before = state_of(model)

    def interrupt(stage: str, done: int, total: int) -> None:
        if done > total / 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        finetune(model, tokens, PLAIN, tmp_path, progress=interrupt)
    assert_untouched(model, before)


def test_an_error_after_the_last_step_or_while_loading_takes_the_adapters_off(tmp_path: Path) -> None:
    model, tokens = llama(), examples(4)
    before = state_of(model)
    finetune(model, tokens, PLAIN, tmp_path).restore()
    weights = tmp_path / "model" / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    with pytest.raises(SafetensorError):
        finetune(model, tokens, PLAIN, tmp_path)
    assert_untouched(model, before)

    def block(stage: str, done: int, total: int) -> None:
        (tmp_path / "full" / "trained.json").mkdir(exist_ok=True)  # so that it cannot be written

    with pytest.raises(DataError, match=r"trained\.json: cannot be written"):
        finetune(model, tokens, PLAIN, tmp_path / "full", progress=block)
    assert_untouched(model, before)


def test_a_model_that_recomputes_activations_still_does_afterwards(tmp_path: Path) -> None:
    model = llama()
    getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
    before = state_of(model)
    finetune(model, examples(4), PLAIN, tmp_path).restore()
    assert before["checkpointing"]
    assert_untouched(model, before)


def test_full_training_leaves_a_plain_model_that_cannot_be_restored(tmp_path: Path) -> None:
    model = llama()
    trained = finetune(model, examples(5), FULL, tmp_path)
    assert "forward" not in vars(model)
    with pytest.raises(InvalidArgument, match="load the model again"):
        trained.restore()
    fresh = llama()
    again = finetune(fresh, examples(5), FULL, tmp_path)
    assert_same(fresh, model, atol=0)
    assert again.losses == trained.losses
