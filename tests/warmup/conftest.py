"""What tests of warm-ups share: settings, data, what a store holds, and models with adapters."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import gradsieve as gs

Write = Callable[..., Path]
EXACT: dict[str, Any] = {"dim": 256, "dtype": "float64", "unit_tokens": 1500, "batch_tokens": 1500}
HALF = {"warmup_share": 0.5, "warmup_epochs": 2}


class Stop(Exception):
    """Somebody pulls the plug."""


def twin() -> Any:
    """The naive gradients of tests/gradients: one backward pass per example in float64."""
    spec = importlib.util.spec_from_file_location("twin", Path(__file__).parents[1] / "gradients" / "conftest.py")
    assert spec is not None
    assert spec.loader is not None
    loaded = importlib.util.module_from_spec(spec)
    sys.modules["twin"] = loaded
    spec.loader.exec_module(loaded)
    return loaded


@pytest.fixture
def data(write_data: Write) -> dict[str, str]:
    return {"pool": str(write_data("pool", 12)), "target": str(write_data("target", 3))}


def warmups(store: Path) -> list[Path]:
    return sorted(store.glob("warmup-*"))


def stages(result: gs.Result) -> list[str]:
    return [cost.stage for cost in result.clock.costs]


def adapted(tiny_model: Path, folder: Path) -> Any:
    """The tiny model in float64 with the adapters of a folder."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float64)
    with pytest.warns(FutureWarning):
        return PeftModel.from_pretrained(model, folder).get_base_model().double().eval()
