"""The naive twin of the engine: one backward pass per example in float64, and every quantity from the whole gradient.

Nothing here shares code with the engine but `SketchPlan`, whose matrices define the projection.
"""

from __future__ import annotations

import copy
import warnings
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

from gradsieve.gradients.directions import References
from gradsieve.gradients.engine import GradientEngine
from gradsieve.gradients.settings import Batch, Block, EngineSettings
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
        model: The float64 copy.
    """

    losses: list[float]
    gradients: list[dict[str, Tensor]]
    ends: tuple[str, str]
    tied: bool
    model: nn.Module

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
        """Σ P_outᵀ G P_in over the parameters, or G's signed entries at their places, folded to d numbers."""
        readers = {} if set(names) <= set(self.ends) else first_readers(self.model, names)
        readers = {name: reader for name, reader in readers.items() if name not in self.ends}
        cells = torch.zeros(*plan.sides, dtype=torch.float64)
        for name in names:
            G, key = self.gradients[z][name], "tied" if self.tied and name in self.ends else name
            if G.shape[1] == 1:
                place, sign = plan.vector_buckets(name, len(G))
                cells.view(-1).index_add_(0, place, G[:, 0] * sign)
            elif plan.entrywise:
                i, j = (torch.arange(n) for n in G.shape)
                place = (plan.offset(key) + i[:, None] * G.shape[1] + j) % 65521
                sign = plan.signs(f"{key}/out", len(i))[:, None] * plan.signs(f"{key}/in", len(j))
                cells.view(-1).index_add_(0, place.flatten(), (G * sign).flatten())
            else:
                left = plan.projection(key, "out", G.shape[0]).double()
                right = plan.projection(readers.get(name, key), "in", G.shape[1]).double()
                cells += left.T @ G @ right
        order, sign = plan.fold()
        flat = torch.cat([cells.flatten(), torch.zeros(1, dtype=torch.float64)])
        return (flat[order] * sign).view(plan.dim, -1).sum(1)


def first_readers(model: nn.Module, names: Sequence[str]) -> dict[str, str]:
    """The first chosen linear layer that reads the same tensor as this one, by weight: its name seeds their projection."""
    first: dict[tuple[int, ...], str] = {}
    readers, kept, hooks = {}, [], []

    def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
        kept.append(args[0])  # so that no later tensor gets its place
        mine = [name for name, p in module.named_parameters(recurse=False) if f"{prefixes[module]}.{name}" in names]
        if mine:
            key = args[0].data_ptr(), *args[0].shape, *args[0].stride()
            readers[f"{prefixes[module]}.weight"] = first.setdefault(key, f"{prefixes[module]}.{mine[0]}")

    prefixes = {module: prefix for prefix, module in model.named_modules()}
    for module, prefix in prefixes.items():
        if (isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D") and prefix:
            hooks.append(module.register_forward_pre_hook(hook))
    with torch.no_grad():
        model(input_ids=torch.tensor([[5, 6, 7]]), use_cache=False)
    for handle in hooks:
        handle.remove()
    return readers


def naive(model: nn.Module, rows: Sequence[Row], reduction: str = "mean") -> Naive:
    """One float64 forward and backward per example, with a loss of its own."""
    twin: Any = copy.deepcopy(model).double().eval()
    for parameter in twin.parameters():
        parameter.requires_grad_(parameter.is_floating_point())
    head, embedding = twin.get_output_embeddings(), twin.get_input_embeddings()
    tied = head.weight is embedding.weight
    if tied:
        head.weight = nn.Parameter(head.weight.detach().clone())
    ends = tuple(next(name for name, p in twin.named_parameters() if p is end.weight) for end in (embedding, head))
    owner = {name: twin.get_submodule(name.rpartition(".")[0]) for name, _ in twin.named_parameters()}
    losses, gradients = [], []
    for row in rows:
        twin.zero_grad()
        scores = twin(input_ids=row.ids[None], use_cache=False).logits[0, :-1].log_softmax(-1)
        target = row.labels[1:]
        nll = -scores[target != -100].gather(1, target[target != -100][:, None]).sum()
        (nll / (target != -100).sum() if reduction == "mean" else nll).backward()
        losses.append(float(nll.detach() / (target != -100).sum()))
        gradients.append({name: laid_out(name, p, owner[name]) for name, p in twin.named_parameters() if p.requires_grad})
    return Naive(losses, gradients, (ends[0], ends[1]), tied, twin)


def laid_out(name: str, parameter: nn.Parameter, owner: Any) -> Tensor:
    """The gradient with outputs as rows; experts one above the other."""
    g = parameter.grad.clone() if parameter.grad is not None else torch.zeros_like(parameter)
    if type(owner).__name__ == "Conv1D" and g.ndim == 2:
        return g.T
    if g.ndim == 1 or name.endswith("_proj_bias"):
        return g.flatten()[:, None]
    if g.ndim == 3 and owner.is_transposed:
        g = g.mT
    return g.flatten(0, -2)


def build_model(name: str, dtype: torch.dtype = torch.float32, seed: int = 0) -> Any:
    """A tiny model of a family, with every bias and scale moved off its start value."""
    set_seed(seed)
    model = AutoModelForCausalLM.from_config(CONFIGS[name]())
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter += 0.2 * torch.randn_like(parameter)
    return model.to(dtype)


def adapted(model: Any, dtype: torch.dtype, config: Any = None, **options: Any) -> Any:
    """The model with LoRA adapters after random steps: at the start B is zero, and with it the gradient of A."""
    from peft import LoraConfig, get_peft_model

    config = config or LoraConfig(**({"r": 4, "lora_alpha": 8, "lora_dropout": 0.1, "target_modules": "all-linear"} | options))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)  # peft asks for the old name
        model = get_peft_model(model, config)
    rng = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name or "magnitude" in name:
                parameter += 0.1 * torch.randn(parameter.shape, generator=rng, dtype=dtype)
    return model


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


def close(ours: Tensor | float, true: Tensor | float, scale: float, tolerance: float) -> bool:
    error = torch.as_tensor(ours, dtype=torch.float64) - torch.as_tensor(true, dtype=torch.float64)
    return bool(error.abs().max() <= tolerance * scale)


def assert_same_statistics(
    columns: dict[str, Tensor], z: int, group: str, G: Tensor, tolerance: float, layers: str = "extremes"
) -> None:
    """Norm, max and min to a relative error, mean and sd to one of the root mean square."""
    rms = float(G.square().mean().sqrt())
    for name, true, scale in (
        ("norm", G.norm(), float(G.norm())),
        ("mean", G.mean(), rms),
        ("sd", G.std(correction=0), rms),
        ("max", G.max(), float(G.abs().max())),
        ("min", G.min(), float(G.abs().max())),
    ):
        if layers == "none" or (layers == "moments" and name in ("max", "min")):
            assert f"{name}/{group}" not in columns
            continue
        ours = columns[f"{name}/{group}"][z]
        assert close(ours, true, scale, tolerance), f"{name}/{group}: {ours} is not {true}"


def assert_matches_loop(
    model: Any, spec: str, names: list[str], rows: list[Row], tolerance: float, *, layers: Any = "extremes", **options: Any
) -> Block:
    """Everything a block holds, against one float64 backward per example."""
    true, plan = naive(model, rows), SketchPlan(256, seed=5)
    halves = [[0, 1], [2, 3]]
    settings = EngineSettings(params=spec, sketch=plan, layers=layers)
    with GradientEngine(model, settings, **options) as engine:
        assert [site.name for site in engine.sites] == names
        means = {f"r{i}": engine.mean_gradient([pad([rows[z] for z in half])]) for i, half in enumerate(halves)}
    with GradientEngine(model, settings, References.stack(means), **options) as engine:
        block = engine.block(pad(rows))
    for z in range(len(rows)):
        norm = true.norm(z, names)
        assert close(block.columns["loss"][z], true.losses[z], true.losses[z], tolerance)
        assert block.columns["completion_tokens"][z] == (rows[z].labels[1:] != -100).sum()
        assert close(block.columns["norm"][z], norm, norm, tolerance)
        assert close(block.sketch[z], true.sketch(z, names, plan), norm, max(tolerance, 1e-6))  # stored in float32
        for end, name in zip(("embedding", "lm_head"), true.ends, strict=True):
            assert_same_statistics(block.columns, z, end, true.gradients[z][name], tolerance)
        for name in names:
            if true.gradients[z][name].shape[1] > 1:
                assert_same_statistics(block.columns, z, name, true.gradients[z][name], tolerance, layers)
        for i, half in enumerate(halves):
            r = true.mean(names, half)
            length = sum(float(g.square().sum()) for g in r.values()) ** 0.5
            assert close(block.columns[f"dot/r{i}"][z], true.dot(z, r, names) / length, norm, tolerance)
    return block


def chosen_names(model: nn.Module, spec: str) -> list[str]:
    """What a specification means, said once more and without the code under test."""
    ends = ("embed_tokens.weight", "wte.weight", "lm_head.weight")
    vector = [name for name, p in model.named_parameters(remove_duplicate=False) if p.ndim == 1]
    names = [name for name, _ in model.named_parameters(remove_duplicate=False)]
    linear = [n for n in names if "norm" not in n and "ln_" not in n and "wpe" not in n and not n.endswith(ends)]
    picked = {
        "all": names,
        "linear": linear,
        "last:1": [n for n in linear if "layers.1." in n or ".h.1." in n],
        "lm-head": ["lm_head.weight"],
        "embedding": [n for n in names if n.endswith(ends[:2]) or "wpe" in n],
        "vectors": vector,
        "re:layers.1.*(k_proj|gate_proj)": [n for n in linear if "layers.1" in n and ("k_proj" in n or "gate_proj" in n)],
        "linear,embedding,lm-head": [n for n in names if n in linear or n.endswith(ends) or "wpe" in n],
        "lora": [n for n in names if "lora_" in n],
    }
    return picked[spec]


@dataclass(frozen=True)
class Twin:
    """What the tests need from this file."""

    naive: Callable[..., Naive] = naive
    model: Callable[..., Any] = build_model
    rows: Callable[..., list[Row]] = draw_rows
    pad: Callable[..., Batch] = pad
    compare: Callable[..., Block] = assert_matches_loop
    lora: Callable[..., Any] = adapted
    names: Callable[..., list[str]] = chosen_names
    vocabulary: int = VOCABULARY
    families: tuple[str, ...] = field(default_factory=lambda: tuple(CONFIGS))


@pytest.fixture(scope="session")
def twin() -> Twin:
    return Twin()
