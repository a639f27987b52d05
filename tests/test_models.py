from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from transformers import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
)

from gradsieve.errors import InvalidArgument, ModelError
from gradsieve.gradients.adam import SAFE
from gradsieve.models import find_model, hash_weights, resolve_device, resolve_dtype, weight_count


def test_moments_beside_the_weights_are_none_of_them(tiny_model: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny_model, folder)
    facts = weight_count(folder), hash_weights(folder), find_model(folder).weights
    assert facts[0] == sum(p.numel() for p in find_model(folder).load(torch.float32, "cpu").parameters())
    save_file({"exp_avg/w": torch.ones(7)}, folder / SAFE)
    assert (weight_count(folder), hash_weights(folder), find_model(folder).weights) == facts
    (folder / SAFE).rename(folder / "more.safetensors")
    assert facts[1] != hash_weights(folder)
    assert facts[2] != find_model(folder).weights


def test_weights_that_lie_there_twice_or_packed_count_once_and_in_full(tmp_path: Path) -> None:
    shape = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    whole = LlamaForCausalLM(LlamaConfig(vocab_size=32, **shape))
    whole.save_pretrained(tmp_path / "whole")
    count = sum(parameter.numel() for parameter in whole.parameters())
    assert weight_count(tmp_path / "whole") == weight_count(whole) == count
    shutil.copy(tmp_path / "whole" / "model.safetensors", tmp_path / "whole" / "consolidated.safetensors")  # as Mistral's
    assert weight_count(tmp_path / "whole") == count
    bnb = pytest.importorskip("bitsandbytes")
    assert weight_count(bnb.nn.Linear4bit(64, 32, bias=False)) == 2048  # not packed yet
    options = {"quantization_config": BitsAndBytesConfig(load_in_4bit=True), "dtype": torch.float32, "device_map": "cpu"}
    packed = AutoModelForCausalLM.from_pretrained(tmp_path / "whole", **options)
    packed.save_pretrained(tmp_path / "packed")
    assert sum(parameter.numel() for parameter in packed.parameters()) < count
    assert weight_count(packed) == weight_count(tmp_path / "packed") == count


def test_another_configuration_is_another_model(tiny_model: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny_model, tmp_path / "model"))
    before = find_model(str(folder)).weights
    config = folder / "config.json"
    config.write_text(config.read_text().replace("rope_theta", "rope_theta_of_old"))
    assert find_model(str(folder)).weights != before


def test_the_last_token_and_the_last_place_are_there(tiny_model: Path, tmp_path: Path) -> None:
    turning = find_model(str(tiny_model))
    count = turning.skeleton().get_input_embeddings().weight.shape[0]  # type: ignore[operator]
    turning.require_places(count - 1, 10**6)  # rotary positions have no end
    with pytest.raises(ModelError, match=f"got token {count} of its tokenizer and {count} embeddings"):
        turning.require_places(count, 1)
    learned = find_model(GPT2LMHeadModel(GPT2Config(n_positions=16, n_embd=16, n_layer=1, n_head=2)), turning.tokenizer)
    learned.require_places(0, 16)
    with pytest.raises(ModelError, match="got 17 in an example and 16 places; lower --max-length to 16"):
        learned.require_places(0, 17)


@pytest.mark.parametrize(
    ("rotary", "most"),
    [
        (
            {
                "rope_type": "longrope",
                "short_factor": [1.0] * 4,
                "long_factor": [2.0] * 4,
                "original_max_position_embeddings": 16,
            },
            16,
        ),
        ({"rope_type": "dynamic", "factor": 2.0}, 32),
    ],
)
def test_positions_that_go_by_the_longest_of_a_batch_are_refused_where_they_do(rotary: dict[str, Any], most: int) -> None:
    shape = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = LlamaConfig(vocab_size=99, max_position_embeddings=32, rope_parameters=rotary, **shape)
    model = LlamaForCausalLM(config).double().eval()
    source = find_model(model, "none is needed")
    own, longer = torch.arange(2, 10), torch.arange(2, 3 + most)
    alone = model(input_ids=own[None]).logits[0]
    for length, same in ((most, True), (most + 1, False)):
        batch = torch.zeros(2, length, dtype=torch.long)
        batch[0, : len(own)], batch[1] = own, longer[:length]
        assert torch.allclose(model(input_ids=batch).logits[0, : len(own)], alone, atol=1e-9) == same
    source.require_places(0, most)
    with pytest.raises(ModelError, match=rf"got an example of {most + 1} tokens: .*; lower --max-length to {most}$"):
        source.require_places(0, most + 1)


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.* is deprecated:FutureWarning")  # peft calls the old name
def test_a_model_object_is_given_back_as_it_was_without_the_adapters_of_a_warm_up(tiny_model: Path, tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    base = AutoModelForCausalLM.from_pretrained(tiny_model)
    get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj"])).save_pretrained(tmp_path)
    live = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.bfloat16).train()
    norm = live.model.norm
    norm.weight = torch.nn.Parameter(torch.full_like(norm.weight, 1.0001, dtype=torch.float32))
    live.lm_head.weight.requires_grad_(False)
    norm.eval()
    before = [(name, p.dtype, p.requires_grad) for name, p in live.named_parameters()]
    source = replace(find_model(live, find_model(tiny_model).tokenizer), adapters=tmp_path)
    with source.opened(torch.bfloat16, "cpu") as adapted:
        assert {p.dtype for name, p in adapted.named_parameters() if "lora_" in name} == {torch.bfloat16}
        assert not any(module.training for module in adapted.modules())
    assert [(name, p.dtype, p.requires_grad) for name, p in live.named_parameters()] == before
    assert torch.equal(norm.weight, torch.full_like(norm.weight, 1.0001))
    assert [module for module in live.modules() if not module.training] == [norm]
    assert not hasattr(live, "peft_config")


def test_sums_in_float64_need_a_device_that_has_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert resolve_device("auto") == "cpu"
    for device in ("mps", "mps:0"):
        with pytest.raises(InvalidArgument, match=f"device must compute in float64, got '{device}', which cannot; use cpu"):
            resolve_device(device)


@pytest.mark.parametrize("content", ["{", "[]", '{"base_model_name_or_path": null}'])
def test_an_adapter_that_names_no_base_is_refused(content: str, tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text(content)
    with pytest.raises(ModelError, match="must name the adapter's base model, got"):
        find_model(str(tmp_path))


def test_bfloat16_is_warned_of_where_the_processor_emulates_it(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("gradsieve.models._fast_bfloat16", lambda device: False)
    assert resolve_dtype("bfloat16", "cpu") == torch.bfloat16
    assert "take float32 or auto" in caplog.text
    caplog.clear()
    assert resolve_dtype("auto", "cpu") == torch.float32
    monkeypatch.setattr("gradsieve.models._fast_bfloat16", lambda device: True)
    assert resolve_dtype("bfloat16", "cpu") == resolve_dtype("auto", "cpu") == torch.bfloat16
    assert not caplog.text
