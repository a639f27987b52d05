from __future__ import annotations

import runpy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from gradsieve.errors import ModelError
from gradsieve.gradients import head as head_file
from gradsieve.gradients import vocabulary as vocabulary_file
from gradsieve.gradients.engine import GradientEngine
from gradsieve.gradients.head import Head, Supervised
from gradsieve.gradients.settings import Batch, EngineSettings

MEASURING = Path(__file__).parents[2] / "benchmarks" / "measuring.py"

CONFIGS: list[dict[str, float]] = [{}, {"logits_scaling": 4.0}, {"logit_scale": 0.25}, {"final_logit_softcapping": 2.0}]


def fake(config: dict[str, float], bias: bool = True, vocabulary: int = 23, width: int = 5) -> Any:
    torch.manual_seed(0)
    linear = nn.Linear(width, vocabulary, bias=bias, dtype=torch.float64)
    linear.weight.data.mul_(3)
    return SimpleNamespace(get_output_embeddings=lambda: linear, config=SimpleNamespace(**config))


def rows(lengths: list[int], vocabulary: int = 23) -> Tensor:
    labels = torch.full((len(lengths), max(lengths) + 3), -100)
    for z, length in enumerate(lengths):
        labels[z, 2 : 2 + length] = torch.arange(length) * 7 % vocabulary
    return labels


@pytest.mark.parametrize(
    "config", [{}, {"logits_scaling": 4.0}, {"logit_scale": 0.25}, {"final_logit_softcapping": 2.0}], ids=str
)
@pytest.mark.parametrize("most", [1, 3, 100])
def test_loss_and_gradients_equal_autograd(config: dict[str, float], most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(head_file, "LOGIT_FLOATS", 23 * most)
    model, labels = fake(config), rows([4, 0, 7, 1])
    head, linear = Head(model), model.get_output_embeddings()
    hidden = torch.randn(labels.shape[0], labels.shape[1], 5, dtype=torch.float64, requires_grad=True)
    logits = linear(hidden) / config.get("logits_scaling", 1.0) * config.get("logit_scale", 1.0)
    if cap := config.get("final_logit_softcapping"):
        logits = cap * torch.tanh(logits / cap)
    true = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), reduction="none").view(4, -1)
    counts = (labels != -100).sum(1).clamp_min(1)
    (true.sum(1) / counts).sum().backward()

    found = {z: torch.zeros_like(linear.weight) for z in (0, 2, 3)}

    def on_example(z: int, h: Tensor, errors: head_file.Errors) -> None:
        for part in head.tiles(len(h)):
            found[z][part] += errors(part).T @ h
        ids = torch.tensor([0, 5, 7, 5])
        assert torch.allclose(errors(ids).T @ h, found[z][ids])

    supervised = Supervised.of(labels, "mean", torch.float64)
    picked = hidden.detach()[supervised.example, supervised.position]
    with torch.no_grad():
        nll, gradient = head.backward(picked, supervised, None, on_example)
    assert torch.allclose(nll, true.detach()[supervised.example, supervised.position])
    assert hidden.grad is not None
    assert torch.allclose(gradient, hidden.grad[supervised.example, supervised.position])
    assert torch.allclose(sum(found.values(), torch.zeros(23, 5, dtype=torch.float64)), linear.weight.grad)


def test_runs_hold_whole_examples_where_they_fit_and_every_position_once() -> None:
    supervised = Supervised.of(rows([4, 0, 9, 2, 3, 1]), "mean", torch.float32)
    runs = list(supervised.runs(5))
    assert [whole for _, _, whole in runs] == [[0], [], [], [3, 4], [5]]
    assert [(first, last) for first, last, _ in runs] == [(0, 4), (4, 9), (9, 13), (13, 18), (18, 19)]


def test_positions_are_those_that_predict_and_weights_sum_to_one() -> None:
    labels = torch.tensor([[7, -100, 5, 6], [-100, -100, -100, 3]])  # the first label of a row has nothing before it
    supervised = Supervised.of(labels, "mean", torch.float64)
    assert supervised.example.tolist() == [0, 0, 1]
    assert supervised.position.tolist() == [1, 2, 2]
    assert supervised.target.tolist() == [5, 6, 3]
    assert supervised.weight.tolist() == [0.5, 0.5, 1.0]
    assert supervised.spans == [(0, 2), (2, 3)]
    assert Supervised.of(labels, "sum", torch.float64).weight.tolist() == [1.0, 1.0, 1.0]


def test_an_output_layer_that_is_not_linear_is_refused() -> None:
    with pytest.raises(ModelError, match=r"must be nn\.Linear, got Sequential"):
        Head(SimpleNamespace(get_output_embeddings=lambda: nn.Sequential(), config=SimpleNamespace()))


def test_memory_does_not_grow_with_the_vocabulary_times_anything(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(head_file, "LOGIT_FLOATS", 1 << 18)  # 8 of an example's 24 positions, 32 with the smaller vocabulary
    monkeypatch.setattr(head_file, "TILE_FLOATS", 1 << 16)
    monkeypatch.setattr(head_file, "ROWS", 1)
    monkeypatch.setattr(vocabulary_file, "ROWS_AT_ONCE", 256)
    peak_mib = runpy.run_path(str(MEASURING))["peak_mib"]
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    settings, peaks = EngineSettings("linear,embedding,lm-head"), dict[tuple[int, int], float]()
    torch.manual_seed(0)
    for vocabulary in (8192, 32768):
        model = LlamaForCausalLM(LlamaConfig(vocab_size=vocabulary, tie_word_embeddings=False, **sizes))
        for rows in (1, 4):
            ids = torch.randint(5, 8192, (rows, 32))
            labels = ids.clone()
            labels[:, :8] = -100
            with GradientEngine(model, settings) as engine:
                engine.block(Batch(ids, labels))  # projections and room for logits, which stay
                peaks[vocabulary, rows] = peak_mib(lambda: engine.block(Batch(ids, labels)), "cpu")  # noqa: B023
            assert engine.head._memory.numel() <= 1 << 18
    for rows in (1, 4):  # a few numbers per token of the vocabulary; logits of a single example would be 2.25 MiB more
        assert peaks[32768, rows] - peaks[8192, rows] < 1
