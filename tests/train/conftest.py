"""Tiny random models, examples and recipes to train them on."""

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from gradsieve.data import IGNORE, Tokens
from gradsieve.train import Recipe

VOCABULARY = 64
PLAIN = Recipe(batch=4, micro_batch=2, epochs=2, order="selection", learning_rate=1e-2, device="cpu", save_steps=99)
FULL = dataclasses.replace(PLAIN, tuning="full")


def llama(dtype: torch.dtype = torch.float32, tied: bool = False) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        tie_word_embeddings=tied,
        bos_token_id=None,
        eos_token_id=1,
        pad_token_id=2,
        initializer_range=0.3,
    )
    return LlamaForCausalLM(config).to(dtype)


def gpt2(dtype: torch.dtype = torch.float32, dropout: float = 0.0) -> Any:
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=VOCABULARY,
        n_embd=16,
        n_layer=2,
        n_head=2,
        n_positions=64,
        resid_pdrop=dropout,
        embd_pdrop=dropout,
        attn_pdrop=0.0,
        bos_token_id=1,
        eos_token_id=1,
        initializer_range=0.3,
    )
    return GPT2LMHeadModel(config).to(dtype)


MODELS: dict[str, Callable[..., Any]] = {"llama": llama, "gpt2": gpt2}


def examples(count: int, seed: int = 0) -> list[Tokens]:
    """Examples of different length whose prompt is masked, and one of whose middle tokens too."""
    rng = np.random.default_rng(seed)
    made = []
    for _ in range(count):
        ids = rng.integers(3, VOCABULARY, int(rng.integers(6, 14))).astype(np.int32)
        labels = ids.copy()
        labels[: int(rng.integers(1, 4))] = IGNORE
        labels[4] = IGNORE
        made.append(Tokens(ids, labels, False))
    return made


def assert_same(model: Any, twin: Any, atol: float = 1e-9) -> None:
    for (name, p), q in zip(model.named_parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p.detach(), q.detach(), atol=atol, rtol=0, msg=lambda text, name=name: f"{name}: {text}")


@pytest.fixture(params=list(MODELS))
def make_model(request: pytest.FixtureRequest) -> Callable[..., Any]:
    return MODELS[request.param]
