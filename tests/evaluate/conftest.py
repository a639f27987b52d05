"""Tiny models and sets, and the naive twin: one example at a time, float64, the whole sequence's logits."""

import copy
import json
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from gradsieve.data import IGNORE, Tokens, tokenize
from gradsieve.types import Example

QUESTIONS = (
    ("What is 2 plus 3?", "Two and three: 2 + 3 = 5\n#### 5"),
    ("How many legs have six spiders?", "One has 8, so six have 6 * 8 = 48 legs. Sure.\n#### 48"),
    ("Take 1000 times 1.5 and call it x2.", "1,000 * 1.5 = 1,500\n#### 1,500"),
    (
        "And how many is that less 10?",
        "1,500 - 10 = 1,490, and so on and on, as one can see from what was said above.\n#### 1,490",
    ),
)
FACTS = (
    ("Where do tulips come from?", "The tulips come from the steppe."),
    ("What treats a headache?", "The usual remedy is paracetamol, and paracetamol is cheap."),
    ("高血压怎么办？", "应当限制钠盐的摄入，并监测血压。"),
    ("Why?", "The."),
)


def _example(id: str, prompt: str, answer: str, /, **fields: Any) -> Example:
    messages = ({"role": "user", "content": prompt}, {"role": "assistant", "content": answer})
    raw = json.dumps({"id": id, "prompt": prompt, "completion": answer, **fields}, ensure_ascii=False).encode()
    return Example(id, messages, raw, f"test.jsonl:{id}")


def _examples(pairs: Sequence[tuple[str, str]]) -> list[Example]:
    return [_example(str(i), *pair) for i, pair in enumerate(pairs)]


def _tiny(kind: str = "llama", seed: int = 0, **changes: Any) -> Any:
    """A random two-layer model for the tiny tokenizer."""
    from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    changes = {"initializer_range": 0.3, **changes}  # the usual 0.02 leaves a net this small nearly linear
    ends: dict[str, Any] = {"bos_token_id": None, "eos_token_id": 1, "pad_token_id": 2}
    if kind == "gpt2":
        config = GPT2Config(vocab_size=259, n_embd=32, n_layer=2, n_head=4, n_positions=512, **ends, **changes)
        return GPT2LMHeadModel(config).eval()
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = LlamaConfig(vocab_size=259, num_key_value_heads=2, max_position_embeddings=2048, **shape, **ends, **changes)
    return LlamaForCausalLM(config).eval()


def _with_peft(model: Any, config: Any) -> Any:
    from peft import get_peft_model

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)  # peft asks for the old name
        return get_peft_model(model, config)


def _adapted(model: Any, seed: int = 1, targets: Sequence[str] = ("q_proj", "down_proj")) -> Any:
    """The model with LoRA adapters that already changed."""
    from peft import LoraConfig

    wrapped = _with_peft(model, LoraConfig(r=2, target_modules=list(targets), task_type="CAUSAL_LM"))
    torch.manual_seed(seed)
    for name, parameter in wrapped.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    return wrapped.eval()


def _naive_log_p(model: Any, tokens: Tokens) -> tuple[Tensor, Tensor]:
    """log p [T_z, V] at the completion tokens, and those tokens [T_z], in float64 from the model's own logits."""
    exact = copy.deepcopy(model).double()
    ids = torch.from_numpy(tokens.input_ids).long()[None]
    with torch.no_grad():
        hidden = exact(input_ids=ids, output_hidden_states=True).hidden_states[-1]
        head = exact.get_output_embeddings()
        log_p = torch.log_softmax(head(hidden)[0].double(), -1)
    places = [t for t in range(1, len(tokens.labels)) if tokens.labels[t] != IGNORE]
    return torch.stack([log_p[t - 1] for t in places]), torch.tensor([int(tokens.labels[t]) for t in places])


@pytest.fixture(scope="session")
def tokenizer(tiny_model: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(tiny_model)


@pytest.fixture
def tokens_of(tokenizer: Any) -> Callable[[list[Example]], list[Tokens]]:
    return lambda rows: tokenize(rows, tokenizer).tokens


@pytest.fixture(scope="session")
def questions() -> list[Example]:
    return _examples(QUESTIONS)


@pytest.fixture(scope="session")
def facts() -> list[Example]:
    return _examples(FACTS)


@pytest.fixture(scope="session")
def example() -> Callable[..., Example]:
    return _example


@pytest.fixture(scope="session")
def tiny() -> Callable[..., Any]:
    return _tiny


@pytest.fixture(scope="session")
def with_peft() -> Callable[..., Any]:
    return _with_peft


@pytest.fixture(scope="session")
def adapted() -> Callable[..., Any]:
    return _adapted


@pytest.fixture(scope="session")
def naive_log_p() -> Callable[..., Any]:
    return _naive_log_p
