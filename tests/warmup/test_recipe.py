"""What a warm-up trains: its part of the pool, its recipe, and what is refused."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch

import gradsieve as gs
from gradsieve import warmup as module
from gradsieve.compute import ComputeSettings
from gradsieve.data import TokenSet
from gradsieve.gradients.settings import EngineSettings

from .conftest import EXACT


def test_without_the_packages_that_train_the_cure_is_named_before_anything_is_loaded(
    data: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    real = importlib.util.find_spec
    monkeypatch.setattr(module.importlib.util, "find_spec", lambda name: None if name == "trl" else real(name))
    for method, cure in (("grads", "--probe-epochs 0"), ("less", "--warmup-share 0"), ("g2is", "--warmup-share 0")):
        with pytest.raises(
            gs.MissingExtra, match=rf"^{method} fine-tunes the model .*pip install 'gradsieve\[train\]'.*{cure}"
        ):
            gs.select(method, model="nowhere/at-all", **data, budget="4")


def test_a_recipe_is_read_and_may_not_set_what_the_method_decides(
    data: dict[str, str], tiny_model: Path, tmp_path: Path
) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("batch: 3\nrank: 2\n")
    compute = ComputeSettings(EngineSettings(), torch.float32, "cpu", 100)
    made = module.recipe_of(gs.Warmup(0.5, 2, candidates="adam"), str(recipe), 6, 7, compute)
    assert (made.batch, made.rank, made.epochs, made.tuning, made.seed, made.save_epochs) == (3, 2, 2, "lora", 7, True)
    for wrong, message in (
        ("epochs: 3", "must leave epochs to the method"),
        ("bach: 3", "got bach"),
        ("[", "readable YAML"),
        ("surgery: agem", "must train on the pool alone, .* got surgery agem and replay_share 0 in "),
        ("replay_share: 0.5", "must train on the pool alone, .* got surgery none and replay_share 0.5 in "),
    ):
        recipe.write_text(wrong)
        for settings in ({}, {"online": True}):
            with pytest.raises((gs.InvalidArgument, gs.DataError), match=message):
                gs.select(
                    "grads",
                    settings=settings,
                    model=str(tiny_model),
                    pool=data["pool"],
                    budget="4",
                    warmup_recipe=str(recipe),
                    **EXACT,
                )


@pytest.mark.parametrize(
    ("warmup", "count", "expected"),
    [
        (gs.Warmup(1.0, 1), 24, {"epochs": 1, "save_epochs": False, "warmup": 0.0, "batch": 16}),
        (gs.Warmup(1.0, 5), 32, {"epochs": 5, "save_epochs": False, "warmup": 0.1}),
        (gs.Warmup(1.0, 1, "full"), 24, {"tuning": "full", "dtype": "bfloat16"}),
        (gs.Warmup(1.0, 2, checkpoints="all"), 24, {"save_epochs": True, "dtype": "model", "device": "cpu"}),
    ],
)
def test_the_built_in_recipe(warmup: gs.Warmup, count: int, expected: dict[str, Any]) -> None:
    compute = ComputeSettings(EngineSettings(), torch.bfloat16, "cpu", 100)
    made = module.recipe_of(warmup, None, count, 0, compute).to_mapping()
    assert {key: made[key] for key in expected} == expected


def tokens_of(count: int, order: list[int]) -> TokenSet:
    examples = [gs.Example(f"{i:02d}", (), b"", "memory") for i in order]
    from gradsieve.data import Tokens

    tokens = [Tokens(torch.tensor([i]).numpy(), torch.tensor([i]).numpy(), False) for i in order]
    return TokenSet("pool", examples, list(range(count)), tokens, [b""] * count, [])


def test_the_part_is_drawn_at_random_in_the_order_of_the_ids() -> None:
    forth, back = tokens_of(30, list(range(30))), tokens_of(30, list(range(29, -1, -1)))
    drawn = [int(t.input_ids[0]) for t in module.part_of(forth, 0.2, 0).tokens]
    assert len(drawn) == 6
    assert drawn == sorted(drawn)
    assert drawn == [int(t.input_ids[0]) for t in module.part_of(back, 0.2, 0).tokens]
    assert drawn != [int(t.input_ids[0]) for t in module.part_of(forth, 0.2, 1).tokens]
    assert len(module.part_of(forth, 0.01, 0).kept) == 1  # rounded up
    assert len(module.part_of(forth, 0.1, 0).kept) == 3
    assert len(module.part_of(forth, 1.0, 0).kept) == 30


@pytest.mark.parametrize(("wrong", "message"), [({"share": 0.0}, r"\(0, 1\], got 0"), ({"epochs": 0}, "at least 1, got 0")])
def test_a_warm_up_that_is_none_is_refused(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(gs.InvalidArgument, match=message):
        gs.Warmup(**({"share": 0.1, "epochs": 1} | wrong))
