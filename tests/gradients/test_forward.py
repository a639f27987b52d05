"""The forward pass alone, and the hidden states that it and the gradient engine take, against transformers and a loop."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from gradsieve.errors import ModelError
from gradsieve.gradients.engine import GradientEngine
from gradsieve.gradients.forward import ForwardEngine, pooled
from gradsieve.gradients.settings import EngineSettings
from gradsieve.gradients.sketch import SketchPlan

SETTINGS = EngineSettings(sketch=SketchPlan(64), hidden=True)


def pooled_naive(model, ids):
    """The position-weighted mean of one example's last hidden states, as transformers gives them."""
    with torch.no_grad():
        states = model(input_ids=ids[None], output_hidden_states=True, use_cache=False).hidden_states[-1][0].double()
    total = sum((t + 1) * h for t, h in enumerate(states))
    return total / sum(range(1, len(ids) + 1))


def batch_of(twin, rows):
    return dataclasses.replace(twin.pad(rows), lengths=torch.tensor([len(row.ids) for row in rows]))


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_hidden_states_are_those_of_each_example_alone_whatever_the_padding(family, twin):
    model, rows = twin.model(family).eval(), twin.rows([5, 19, 12, 2])
    expected = torch.stack([pooled_naive(model, row.ids) for row in rows])
    with ForwardEngine(model, SETTINGS) as engine:
        alone = engine.block(batch_of(twin, rows))
    with GradientEngine(model, SETTINGS) as engine:
        beside = engine.block(batch_of(twin, rows))
    assert torch.allclose(alone.hidden.double(), expected, atol=1e-5)
    assert torch.allclose(beside.hidden, alone.hidden, atol=1e-6)
    assert alone.hidden.dtype == torch.float32
    assert alone.sketch.shape == (4, 0)
    assert beside.sketch.shape == (4, 64)


def test_the_loss_is_that_of_the_gradient_engine(twin):
    model, rows = twin.model("llama"), twin.rows([5, 19, 12, 30])
    with GradientEngine(model, SETTINGS) as engine:
        expected = engine.block(batch_of(twin, rows)).columns
    with ForwardEngine(model, SETTINGS) as engine:
        ours = engine.block(batch_of(twin, rows)).columns
    assert ours.keys() == {"loss", "completion_tokens"}
    for name, values in ours.items():
        assert torch.allclose(values, expected[name], rtol=1e-5)


def test_an_example_without_loss_has_none_and_nothing_is_taken_that_was_not_asked_for(twin):
    model, batch = twin.model("llama"), batch_of(twin, twin.rows([5, 9]))
    batch.labels[0] = -100
    with ForwardEngine(model, dataclasses.replace(SETTINGS, hidden=False)) as engine:
        block = engine.block(batch)
    assert block.columns["loss"].isnan().tolist() == [True, False]
    assert block.hidden is None


def test_the_model_is_given_back_as_it_was(twin):
    model = twin.model("llama").train()
    with ForwardEngine(model, SETTINGS) as engine:
        assert not model.training
        engine.block(batch_of(twin, twin.rows([4])))
    assert model.training
    assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())


def test_a_head_that_is_not_ours_is_refused_and_the_model_given_back(twin):
    model = twin.model("llama").train()
    with torch.no_grad():
        model.lm_head.weight[3] = torch.nan
    with pytest.raises(ModelError, match="must give finite logits"), ForwardEngine(model, SETTINGS):
        pass
    assert model.training


def test_later_tokens_weigh_more_and_half_precision_is_summed_in_full():
    states = torch.tensor([[[1.0], [2.0], [4.0], [99.0]]])
    assert pooled(states, torch.tensor([3])).item() == pytest.approx((1 + 4 + 12) / 6)
    assert pooled(states, None).item() == pytest.approx((1 + 4 + 12 + 396) / 10)
    long = torch.full((1, 5000, 1), 1.0009765625)
    assert pooled(long.bfloat16().float(), None).item() == pytest.approx(pooled(long.bfloat16(), None).item(), rel=1e-6)
    assert pooled(long.half(), None).item() == pytest.approx(1.0009765625, rel=1e-6)
