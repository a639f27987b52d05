"""LoRA layers run in fewer steps: the same output and gradients as PEFT's own, and only where nothing else happens."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from gradsieve.gradients.adapters import Adapter
from gradsieve.gradients.engine import GradientEngine
from gradsieve.gradients.settings import EngineSettings


class Net(nn.Module):
    """One linear layer."""

    def __init__(self, bias: bool) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 5, bias=bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x)


def adapted(bias: bool = False, **config: Any) -> Any:
    torch.manual_seed(0)
    model = get_peft_model(
        Net(bias), LoraConfig(r=3, lora_alpha=7, target_modules=["layer"], init_lora_weights=False, **config)
    )
    return model.double().base_model.model.layer


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", [(2, 4, 6), (4, 6)])
def test_output_and_gradients_are_those_of_peft(bias: bool, shape: tuple[int, ...]) -> None:
    module = adapted(bias)
    adapter = Adapter.of(module)
    assert adapter is not None
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    theirs = module(x)
    weight = torch.randn_like(theirs)
    expected = torch.autograd.grad((theirs * weight).sum(), [x, adapter.down.weight])
    ours = adapter.output(x, adapter.down(x) * adapter.scaling)
    assert torch.allclose(ours, theirs)
    for mine, other in zip(torch.autograd.grad((ours * weight).sum(), [x, adapter.down.weight]), expected, strict=True):
        assert torch.allclose(mine, other)


def test_an_input_without_a_gradient_gets_none() -> None:
    adapter = Adapter.of(adapted())
    assert adapter is not None
    u = torch.randn(2, 4, 3, dtype=torch.float64, requires_grad=True)
    adapter.output(torch.randn(2, 4, 6, dtype=torch.float64), u).sum().backward()
    assert torch.allclose(u.grad, adapter.up.weight.sum(0).expand_as(u))  # type: ignore[arg-type]


@pytest.mark.parametrize("config", [{"use_dora": True}, {"lora_bias": True}])
def test_a_layer_that_does_more_is_left_to_peft(config: dict[str, Any]) -> None:
    assert Adapter.of(adapted(bias=True, **config)) is None


def test_a_merged_disabled_or_mixed_layer_is_left_to_peft() -> None:
    module = adapted()
    module.merge()
    assert Adapter.of(module) is None
    module.unmerge()
    module.enable_adapters(False)
    assert Adapter.of(module) is None
    module.enable_adapters(True)
    assert Adapter.of(module) is not None
    module.base_layer.float()
    assert Adapter.of(module) is None
    assert Adapter.of(nn.Linear(2, 2)) is None


def test_two_active_adapters_are_left_to_peft() -> None:
    module = adapted()
    module.update_layer("second", r=2, lora_alpha=2, config=LoraConfig(r=2, target_modules=["layer"]))
    module.set_adapter(["default", "second"])
    assert Adapter.of(module) is None


def test_the_engine_runs_plain_layers_this_way_and_gives_them_back(twin: Any) -> None:
    model = twin.lora(twin.model("llama-tied"), torch.float32).get_base_model()
    calls = []
    for name, module in model.named_modules():
        if name.endswith("lora_B.default"):
            module.register_forward_hook(lambda module, args, output: calls.append(module))
    batch = twin.pad(twin.rows((5, 7)))
    with GradientEngine(model, EngineSettings("lora", signals=False)) as engine:
        engine.block(batch)
        assert not calls
    model(input_ids=batch.input_ids)
    assert calls
