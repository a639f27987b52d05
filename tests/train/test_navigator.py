"""The Navigator takes AdamW's steps on the loss whose gradients were taken, and goes back to its start."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from gradsieve.data import IGNORE, Tokens
from gradsieve.errors import InvalidArgument, ModelError
from gradsieve.train.navigator import LoRANavigator, NavigatorSettings
from gradsieve.types import Navigator


def rows(count: int, seed: int = 0) -> list[Tokens]:
    rng = np.random.default_rng(seed)
    made = []
    for _ in range(count):
        length = int(rng.integers(6, 20))
        ids = rng.integers(3, 200, length).astype(np.int32)
        labels = ids.copy()
        labels[: int(rng.integers(1, length - 2))] = IGNORE
        made.append(Tokens(ids, labels, False))
    return made


def load(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def naive_loss(model: Any, tokens: Tokens) -> Tensor:
    """Mean over the labels of -log p, by transformers' own loss, one example at a time."""
    ids, labels = (torch.from_numpy(x.astype(np.int64))[None] for x in (tokens.input_ids, tokens.labels))
    loss: Tensor = model(input_ids=ids, labels=labels).loss
    return loss


def measure_of(part: list[Tokens]) -> Any:
    def measure(model: torch.nn.Module, cost: str) -> tuple[float, float]:
        with torch.no_grad():
            losses = [float(naive_loss(model, tokens)) for tokens in part]
        return sum(losses[:2]) / 2, sum(losses[2:]) / (len(losses) - 2)

    return measure


def adapters(navigator: LoRANavigator) -> list[Tensor]:
    return [parameter.detach().clone() for parameter in navigator._trained]


def test_steps_are_those_of_adamw_on_the_mean_of_the_examples_losses(tiny_model):
    pool = rows(7)
    settings = NavigatorSettings(rank=2, alpha=4.0, learning_rate=1e-2, max_grad_norm=1e9, batch_tokens=24, seed=3)
    with LoRANavigator(load(tiny_model), pool, measure_of(pool), settings) as navigator:
        ours = []
        for batch in ([0, 4, 2], [5], [1, 6]):
            navigator.step(torch.tensor(batch))
            ours.append(adapters(navigator))
    with LoRANavigator(load(tiny_model), pool, measure_of(pool), settings) as twin:
        optimizer = torch.optim.AdamW(twin._trained, lr=1e-2, weight_decay=0.01)
        for batch, expected in zip(([0, 4, 2], [5], [1, 6]), ours, strict=True):
            optimizer.zero_grad()
            torch.stack([naive_loss(twin._live, pool[row]) for row in batch]).mean().backward()
            optimizer.step()
            for a, b in zip(twin._trained, expected, strict=True):
                assert torch.allclose(a, b, rtol=1e-4, atol=2e-5)


def test_a_long_gradient_is_shortened(tiny_model):
    pool = rows(4)
    taken = []
    for limit in (1e9, 1e-9):
        settings = NavigatorSettings(rank=2, max_grad_norm=limit)
        with LoRANavigator(load(tiny_model), pool, measure_of(pool), settings) as navigator:
            navigator.step(torch.tensor([0, 1]))
            taken.append(torch.cat([parameter.grad.flatten() for parameter in navigator._trained]).norm())
    assert taken[0] > 1e-3
    assert taken[1] <= 1.01e-9


def test_reset_is_the_start_again_exactly(tiny_model):
    pool = rows(6)
    with LoRANavigator(load(tiny_model), pool, measure_of(pool), NavigatorSettings(rank=2, learning_rate=1e-2)) as navigator:
        start, before = adapters(navigator), navigator.losses("loss")

        def episode() -> tuple[float, float]:
            navigator.step(torch.tensor([0, 1]))
            navigator.step(torch.tensor([2, 3]))
            return navigator.losses("loss")

        first = episode()
        assert first[0] < before[0]  # what is measured is what was trained on
        navigator.reset()
        assert all(torch.equal(a, b) for a, b in zip(adapters(navigator), start, strict=True))
        assert navigator.losses("loss") == before
        assert episode() == first  # the optimizer has forgotten too
        assert navigator.measured == {"loss": 4}
        assert navigator.trained_tokens == 2 * sum(len(pool[row].input_ids) for row in range(4))


def test_a_warm_up_moves_the_start_and_depends_on_the_seed(tiny_model):
    pool = rows(9)

    def start(**settings: Any) -> list[Tensor]:
        with LoRANavigator(load(tiny_model), pool, measure_of(pool), NavigatorSettings(rank=2, **settings)) as navigator:
            begun = adapters(navigator)
            navigator.step(torch.tensor([0]))
            navigator.reset()
            assert all(torch.equal(a, b) for a, b in zip(adapters(navigator), begun, strict=True))
            assert not navigator._optimizer.state
            return begun

    cold, warm, again, other = start(), start(warmup=3), start(warmup=3), start(warmup=3, seed=1)
    assert sum(not p.any() for p in cold) == len(cold) / 2  # B is zero
    assert all(p.any() for p in warm)
    assert all(torch.equal(a, b) for a, b in zip(warm, again, strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(warm, other, strict=True))


def test_the_model_is_given_back_as_it_was(tiny_model):
    model, pool = load(tiny_model).train(), rows(4)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    state = torch.get_rng_state()
    with LoRANavigator(model, pool, measure_of(pool), NavigatorSettings(learning_rate=1e-1)) as navigator:
        navigator.step(torch.tensor([0, 1]))
    assert torch.equal(torch.get_rng_state(), state)
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    assert model.training
    assert all(parameter.requires_grad for parameter in model.parameters())
    protocol: Navigator = navigator
    assert protocol is navigator


def test_a_warm_up_that_fails_takes_the_adapters_off(tiny_model):
    model, pool = load(tiny_model), rows(4)
    names = [name for name, _ in model.named_modules()]
    with torch.no_grad():
        model.model.norm.weight.fill_(torch.nan)
    with pytest.raises(ModelError, match="loss must be finite"):
        LoRANavigator(model, pool, measure_of(pool), NavigatorSettings(warmup=1))
    assert [name for name, _ in model.named_modules()] == names
    assert not hasattr(model, "peft_config")
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_what_cannot_be_trained_is_refused(tiny_model):
    pool = rows(3)
    with LoRANavigator(load(tiny_model), pool, measure_of(pool)) as navigator:
        with pytest.raises(InvalidArgument, match="at least one row"):
            navigator.step(torch.tensor([], dtype=torch.int64))
        with pytest.raises(ModelError, match="without adapters"):
            LoRANavigator(navigator._live, pool, measure_of(pool))
        with torch.no_grad():
            navigator._trained[0].fill_(torch.nan)
        with pytest.raises(ModelError, match="loss must be finite"):
            navigator.step(torch.tensor([0]))


@pytest.mark.parametrize(
    ("name", "value"), [("rank", 0), ("batch_tokens", 0), ("learning_rate", 0.0), ("max_grad_norm", -1.0), ("warmup", -1)]
)
def test_settings_that_mean_nothing_are_refused(name, value):
    with pytest.raises(InvalidArgument, match=f"{name} must be"):
        NavigatorSettings(**{name: value})
