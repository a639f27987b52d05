from __future__ import annotations

import shutil
from pathlib import Path

import torch
from safetensors.torch import save_file

from gradsieve.gradients.adam import SAFE
from gradsieve.models import find_model, hash_weights, weight_count


def test_moments_beside_the_weights_are_none_of_them(tiny_model: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny_model, folder)
    facts = weight_count(folder), hash_weights(folder), find_model(folder).weights
    assert facts[0] == sum(p.numel() for p in find_model(folder).load(torch.float32, "cpu").parameters())
    save_file({"exp_avg/w": torch.ones(7)}, folder / SAFE)
    assert (weight_count(folder), hash_weights(folder), find_model(folder).weights) == facts
    (folder / SAFE).rename(folder / "more.safetensors")
    assert weight_count(folder) == facts[0] + 7
    assert facts[1] != hash_weights(folder)
    assert facts[2] != find_model(folder).weights
