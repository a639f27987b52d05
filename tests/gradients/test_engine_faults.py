"""What the engine refuses, what one bad example does to the others, and how the model is given back."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.models.llama.modeling_llama import LlamaMLP

from gradsieve.errors import InvalidArgument, ModelError
from gradsieve.gradients.engine import GradientEngine
from gradsieve.gradients.settings import Batch, EngineSettings

LENGTHS = (14, 9, 11, 17)
FULL: dict[str, Any] = {"layers": "extremes", "signals": True, "norms": True}


@pytest.mark.parametrize("fault", [None, "block", "forward"])
def test_the_model_is_given_back_as_it_was(twin: Any, fault: str | None) -> None:
    model = twin.model("llama").train()
    model.model.layers[0].eval()
    model.model.layers[1].requires_grad_(False)
    flags = [parameter.requires_grad for parameter in model.parameters()]
    modes = [module.training for module in model.modules()]
    weights = [parameter.detach().clone() for parameter in model.parameters()]
    batch = twin.pad(twin.rows(LENGTHS))
    try:
        with GradientEngine(model, EngineSettings("all", **FULL)) as engine:
            engine.block(batch)
            if fault == "block":
                raise KeyboardInterrupt
            if fault == "forward":
                engine.block(Batch(batch.input_ids + 10_000, batch.labels))
    except (KeyboardInterrupt, IndexError):
        assert fault
    assert [parameter.requires_grad for parameter in model.parameters()] == flags
    assert [module.training for module in model.modules()] == modes
    assert not any(module._forward_hooks for module in model.modules())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(torch.equal(a, b) for a, b in zip(weights, model.parameters(), strict=True))


def test_a_block_after_an_error_is_as_if_nothing_had_happened(twin: Any) -> None:
    model, batch = twin.model("llama"), twin.pad(twin.rows(LENGTHS))
    with GradientEngine(model, EngineSettings("all", **FULL)) as engine:
        before = engine.block(batch)
        with pytest.raises(IndexError):
            engine.block(Batch(batch.input_ids + 10_000, batch.labels))
        after = engine.block(batch)
    assert torch.equal(before.sketch, after.sketch)


def test_an_example_without_supervised_tokens_is_nan_and_harms_no_other(twin: Any) -> None:
    model, rows = twin.model("llama"), twin.rows((9, 12))
    empty = type(rows[0])(rows[0].ids, torch.full_like(rows[0].labels, -100))
    with GradientEngine(model, EngineSettings("all", **FULL)) as engine:
        block, alone = engine.block(twin.pad([empty, rows[1]])), engine.block(twin.pad([rows[1]]))
        nothing = engine.block(twin.pad([empty]))
        with pytest.raises(InvalidArgument, match="completion tokens"):
            engine.mean_gradient([twin.pad([empty, rows[1]])])
    assert block.columns["loss"][0].isnan()
    assert nothing.columns["loss"].isnan().all()
    assert block.columns["completion_tokens"].tolist() == [0.0, float((rows[1].labels[1:] != -100).sum())]
    for name, column in block.columns.items():
        assert torch.allclose(column[1], alone.columns[name][0], rtol=1e-4, atol=1e-6), name
    assert torch.allclose(block.sketch[1], alone.sketch[0], rtol=1e-4, atol=1e-5)


def test_a_non_finite_gradient_shows_in_its_row_and_in_no_other(twin: Any) -> None:
    model, rows = twin.model("llama"), twin.rows((9, 12))
    rows[0].ids[4] = poison = 0  # no drawn token
    with torch.no_grad():
        model.model.embed_tokens.weight[poison] = torch.inf
    with GradientEngine(model) as engine:
        block = engine.block(twin.pad(rows))
        with pytest.raises(InvalidArgument, match="finite"):
            engine.mean_gradient([twin.pad(rows)])
    assert not block.columns["norm"][0].isfinite()
    assert not block.sketch[0].isfinite().all()
    assert block.sketch[1].isfinite().all()
    assert block.columns["norm"][1].isfinite()


class Odd(nn.Module):
    """A layer with a weight and no rule."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Parameter(torch.eye(32))
        self.dropout = nn.Dropout()

    def forward(self, hidden: Tensor) -> Tensor:
        return hidden @ self.mix


def test_a_parameter_without_a_rule_is_named_and_can_be_left_out(twin: Any) -> None:
    model = twin.model("llama")
    model.model.layers[0].mlp.act_fn = nn.Sequential(nn.SiLU())
    model.model.layers[0].post_attention_layernorm = Odd()
    with pytest.raises(ModelError, match=r"model\.layers\.0\.post_attention_layernorm\.mix .*--params"):
        GradientEngine(model, EngineSettings("all"))
    with GradientEngine(model, EngineSettings("re:q_proj")) as engine:
        assert len(engine.sites) == 2


class Mean(nn.Module):
    """A layer that mixes examples."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(32))

    def forward(self, hidden: Tensor) -> Tensor:
        return self.scale * (hidden - hidden.mean(0))


def test_a_module_that_mixes_examples_is_refused_where_its_parameters_are_wanted(twin: Any) -> None:
    model = twin.model("llama")
    model.model.layers[0].post_attention_layernorm = Mean()
    with pytest.raises(ModelError, match=r"post_attention_layernorm\.scale .* Mean, which mixes examples; .* --params"):
        GradientEngine(model, EngineSettings("vectors")).__enter__()
    with GradientEngine(model, EngineSettings("linear")) as engine:
        assert engine.sites


def test_a_head_that_does_more_than_a_product_is_refused(twin: Any) -> None:
    model = twin.model("llama")
    model.lm_head.register_forward_hook(lambda module, args, output: output * 3)
    with pytest.raises(ModelError, match="output of LlamaForCausalLM"), GradientEngine(model):
        pass
    assert all(parameter.requires_grad for parameter in model.parameters())


class Overwriting(LlamaMLP):
    """Changes what a layer has read."""

    def forward(self, x: Tensor) -> Tensor:
        gate = self.act_fn(self.gate_proj(x))
        return self.down_proj(gate * self.up_proj(x.mul_(2)))


@pytest.mark.parametrize("layers", ["none", "extremes"])
def test_an_input_that_the_model_overwrites_is_an_error(twin: Any, layers: Any) -> None:
    model = twin.model("llama")
    model.model.layers[1].mlp.__class__ = Overwriting
    message = r"input of model\.layers\.1\.mlp\.gate_proj\.weight must stay"
    with GradientEngine(model, EngineSettings("linear", layers=layers)) as engine, pytest.raises(ModelError, match=message):
        engine.block(twin.pad(twin.rows(LENGTHS)))


def test_an_output_that_the_model_overwrites_is_none(twin: Any) -> None:
    def double(module: nn.Module, args: tuple[Tensor]) -> None:
        args[0].mul_(2)

    model = twin.model("llama", torch.float64)
    model.model.layers[0].register_forward_pre_hook(double)
    twin.compare(model, "embedding", twin.names(model, "embedding"), twin.rows(LENGTHS), 1e-11)
