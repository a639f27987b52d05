"""What many tests share: a tiny model in a folder, and small data files."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--device", default=None, help="where test_devices.py computes: cuda, cpu; an accelerator by default")


def tiny_tokenizer() -> Any:
    """A byte-level tokenizer of 256 letters and the ChatML marks."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    marks = ["<|im_start|>", "<|im_end|>", "<|pad|>"]
    vocabulary = {letter: i for i, letter in enumerate([*marks, *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(marks)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|pad|>")
    fast.chat_template = CHATML
    return fast


@pytest.fixture(scope="session")
def contrast() -> Callable[[str, str], float]:
    """Returns WCAG 2's contrast of two colours, `#rrggbb` each."""

    def luminance(colour: str) -> float:
        channels = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [c / 12.92 if c <= 0.04045 else float(((c + 0.055) / 1.055) ** 2.4) for c in channels]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    def of(a: str, b: str) -> float:
        high, low = sorted((luminance(a), luminance(b)), reverse=True)
        return (high + 0.05) / (low + 0.05)

    return of


@pytest.fixture(autouse=True)
def _stores_of_their_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs without a folder keep their gradients below the test's own, not in the user's cache; the demo model is shared."""
    from gradsieve import run

    monkeypatch.setattr(run, "cache_dir", lambda: tmp_path / "cache")


@pytest.fixture(scope="session")
def tiny_llama() -> Callable[..., Any]:
    """Makes a two-layer Llama of 30,000 random parameters for the tiny tokenizer; `changes` are to its configuration."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    def make(**changes: Any) -> Any:
        torch.manual_seed(0)
        usual: dict[str, Any] = {
            "vocab_size": len(tiny_tokenizer()),
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 2048,
            "eos_token_id": 1,
            "pad_token_id": 2,
            "bos_token_id": None,
            "initializer_range": 0.3,
        }
        return LlamaForCausalLM(LlamaConfig(**usual | changes))

    return make


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory, tiny_llama: Callable[..., Any]) -> Path:
    """A folder with the tiny Llama and its tokenizer."""
    folder = tmp_path_factory.mktemp("tiny-model")
    tiny_llama().save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def write_data(tmp_path: Path) -> Callable[..., Path]:
    """Writes n small question-answer examples, different for each name, as prompt/completion lines."""

    def write(name: str, n: int, **fields: Any) -> Path:
        path = tmp_path / f"{name}.jsonl"
        rows = [
            {
                "id": f"{name}-{i}",
                "prompt": f"{name} asks: what is {i} plus {i + 3}?",
                "completion": f"It is {2 * i + 3}, says {name}. The answer is {2 * i + 3}." + " Sure." * (i % 4),
                **fields,
            }
            for i in range(n)
        ]
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return path

    return write


@pytest.fixture
def data(write_data: Callable[..., Path]) -> dict[str, str]:
    """Files with a pool of 24, six targets and six anchors, which share nothing."""
    return {
        "pool": str(write_data("pool", 24)),
        "target": str(write_data("target", 6)),
        "anchor": str(write_data("anchor", 6, category="arithmetic")),
    }
