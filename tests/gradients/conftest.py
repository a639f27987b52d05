"""The naive twin of the engine: one backward pass per example in float64, and every quantity from the whole gradient.

Nothing here shares code with the engine but `SketchPlan`, whose matrices define the projection.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    LlamaConfig,
    PretrainedConfig,
    Qwen2Config,
    Qwen3Config,
    set_seed,
)

from gradsieve.gradients.accumulator import Batch
from gradsieve.gradients.sketch import SketchPlan

VOCABULARY = 97
SMALL: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.2,  # the usual 0.02 leaves a net this small nearly linear
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
CONFIGS: dict[str, Callable[[], PretrainedConfig]] = {
    "llama": lambda: LlamaConfig(**SMALL, tie_word_embeddings=False),
    "llama-tied": lambda: LlamaConfig(**SMALL, tie_word_embeddings=True, attention_bias=True, mlp_bias=True),
    "gpt2": lambda: GPT2Config(
        vocab_size=VOCABULARY,
        n_embd=32,
        n_layer=2,
        n_head=4,
        n_positions=64,
        initializer_range=0.2,
        bos_token_id=1,
        eos_token_id=2,
    ),
    "qwen2": lambda: Qwen2Config(**SMALL, tie_word_embeddings=True),
    "qwen3": lambda: Qwen3Config(**SMALL, head_dim=8, tie_word_embeddings=False),
}
CONV1D = ("c_attn.weight", "c_proj.weight", "c_fc.weight")  # GPT-2 stores these as [d_in, d_out]
SAME_INPUT = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))


@dataclass(frozen=True)
class Row:
    """One example: its tokens without padding, labels unshifted."""

    ids: Tensor
    labels: Tensor


@dataclass(frozen=True)
class Naive:
    """Loss and whole gradient per example, float64, laid out [d_out, d_in]; vectors are [n, 1].

    Attributes:
        losses: One per example.
        gradients: Per example by parameter name. The LM head and the embedding come apart even where their weights are tied.
        ends: The names of the embedding's and the head's weight.
        tied: Whether the two are one parameter.
    """

    losses: list[float]
    gradients: list[dict[str, Tensor]]
    ends: tuple[str, str]
    tied: bool

    def merged(self, z: int, names: Iterable[str]) -> dict[str, Tensor]:
        """The gradient by parameter: tied weights are one."""
        merged: dict[str, Tensor] = {}
        for name in names:
            key = "tied" if self.tied and name in self.ends else name
            merged[key] = merged[key] + self.gradients[z][name] if key in merged else self.gradients[z][name]
        return merged

    def dot(self, z: int, direction: Mapping[str, Tensor], names: Iterable[str]) -> float:
        return sum(float((g * direction[key]).sum()) for key, g in self.merged(z, names).items())

    def norm(self, z: int, names: Iterable[str]) -> float:
        return self.dot(z, self.merged(z, names), names) ** 0.5

    def mean(self, names: Sequence[str], rows: Sequence[int] | None = None) -> dict[str, Tensor]:
        chosen = [self.merged(z, names) for z in (rows if rows is not None else range(len(self.losses)))]
        return {key: torch.stack([g[key] for g in chosen]).mean(0) for key in chosen[0]}

    def sketch(self, z: int, names: Sequence[str], plan: SketchPlan) -> Tensor:
        """Σ P_outᵀ G P_in over the parameters, folded to d numbers."""
        cells = torch.zeros(plan.side, plan.side, dtype=torch.float64)
        for name in names:
            G, key = self.gradients[z][name], "tied" if self.tied and name in self.ends else name
            if G.shape[1] == 1:
                place, sign = plan.vector_buckets(name, len(G))
                cells.view(-1).index_add_(0, place, G[:, 0] * sign)
            else:
                left = plan.projection(f"{key}/out", G.shape[0]).double()
                right = plan.projection(f"{first_reader(key, names)}/in", G.shape[1]).double()
                cells += left.T @ G @ right
        order, sign = plan.fold()
        flat = torch.cat([cells.flatten(), torch.zeros(1, dtype=torch.float64)])
        return (flat[order] * sign).view(plan.dim, -1).sum(1)


def first_reader(name: str, names: Sequence[str]) -> str:
    """The first chosen weight that reads the same tensor: its name seeds the shared projection."""
    for family in SAME_INPUT:
        mine = next((f".{part}." for part in family if f".{part}." in name), None)
        if mine is not None and "lora_B" not in name:
            readers = (name.replace(mine, f".{part}.") for part in family)
            return next(reader for reader in readers if reader in names)
    return name


def naive(model: nn.Module, rows: Sequence[Row], reduction: str = "mean") -> Naive:
    """One float64 forward and backward per example, with a loss of its own."""
    twin: Any = copy.deepcopy(model).double().eval().requires_grad_(True)
    head, embedding = twin.get_output_embeddings(), twin.get_input_embeddings()
    tied = head.weight is embedding.weight
    if tied:
        head.weight = nn.Parameter(head.weight.detach().clone())
    ends = tuple(next(name for name, p in twin.named_parameters() if p is end.weight) for end in (embedding, head))
    losses, gradients = [], []
    for row in rows:
        twin.zero_grad()
        scores = twin(input_ids=row.ids[None], use_cache=False).logits[0, :-1].log_softmax(-1)
        target = row.labels[1:]
        nll = -scores[target != -100].gather(1, target[target != -100][:, None]).sum()
        (nll / (target != -100).sum() if reduction == "mean" else nll).backward()
        losses.append(float(nll.detach() / (target != -100).sum()))
        gradients.append({name: laid_out(name, p) for name, p in twin.named_parameters()})
    return Naive(losses, gradients, (ends[0], ends[1]), tied)


def laid_out(name: str, parameter: nn.Parameter) -> Tensor:
    g = parameter.grad if parameter.grad is not None else torch.zeros_like(parameter)
    g = g.T if name.endswith(CONV1D) and g.ndim == 2 else g
    return g.detach().clone() if g.ndim > 1 else g.detach().clone()[:, None]


def build_model(name: str, dtype: torch.dtype = torch.float32, seed: int = 0) -> Any:
    """A tiny model of a family, with every bias and scale moved off its start value."""
    set_seed(seed)
    model = AutoModelForCausalLM.from_config(CONFIGS[name]())
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter += 0.2 * torch.randn_like(parameter)
    return model.to(dtype)


def draw_rows(lengths: Sequence[int], seed: int = 0) -> list[Row]:
    """Examples with a masked prompt; every other one has a second masked turn."""
    rng = torch.Generator().manual_seed(seed)
    rows = []
    for z, length in enumerate(lengths):
        ids = torch.randint(3, VOCABULARY, (length,), generator=rng)
        labels = ids.clone()
        labels[: 1 + length // 3] = -100
        if z % 2:
            labels[length // 2 : length // 2 + 2] = -100
        rows.append(Row(ids, labels))
    return rows


def pad(rows: Sequence[Row], to: int | None = None) -> Batch:
    width = to or max(len(row.ids) for row in rows)
    ids, labels = torch.zeros(len(rows), width, dtype=torch.int64), torch.full((len(rows), width), -100)
    for z, row in enumerate(rows):
        ids[z, : len(row.ids)], labels[z, : len(row.ids)] = row.ids, row.labels
    return Batch(ids, labels)


@dataclass(frozen=True)
class Twin:
    """What the tests need from this file."""

    naive: Callable[..., Naive] = naive
    model: Callable[..., Any] = build_model
    rows: Callable[..., list[Row]] = draw_rows
    pad: Callable[..., Batch] = pad
    vocabulary: int = VOCABULARY
    families: tuple[str, ...] = field(default_factory=lambda: tuple(CONFIGS))


@pytest.fixture(scope="session")
def twin() -> Twin:
    return Twin()
