"""Mean gradients, contrasts and their noise against float64 loops."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from gradsieve.gradients.directions import MeanGradient, References
from gradsieve.gradients.engine import GradientEngine
from gradsieve.gradients.settings import EngineSettings
from gradsieve.gradients.sketch import SketchPlan


@pytest.mark.parametrize("spec", ["linear", "all"])
def test_a_mean_gradient_is_the_mean_of_the_loop_and_knows_its_noise(twin: Any, spec: str) -> None:
    model, rows = twin.model("llama-tied", torch.float64), twin.rows((14, 9, 11, 17, 5))
    names, true = twin.names(model, spec), twin.naive(model, rows)
    with GradientEngine(model, EngineSettings(params=spec)) as engine:
        mean = engine.mean_gradient([twin.pad(rows[:3]), twin.pad(rows[3:])])
    expected = true.mean(names)
    assert set(mean.tensors) == set(expected)
    for key, g in expected.items():
        assert torch.allclose(mean.tensors[key], g, rtol=1e-9, atol=1e-12)
    length = sum(float(g.square().sum()) for g in expected.values())
    spread = [true.norm(z, names) ** 2 - 2 * true.dot(z, expected, names) + length for z in range(5)]
    facts = mean.facts()
    assert facts.count == 5
    assert facts.norm == pytest.approx(length**0.5, rel=1e-9)
    assert facts.signal_share == pytest.approx(1 - (sum(spread) / 4 / 5) / length, rel=1e-8)


def test_a_contrast_is_a_difference_with_the_noise_of_both(twin: Any) -> None:
    model, rows = twin.model("llama", torch.float64), twin.rows((14, 9, 11, 17))
    with GradientEngine(model) as engine:
        left, right = (engine.mean_gradient([twin.pad(part)]) for part in (rows[:2], rows[2:]))
        expected = {key: tensor - right.tensors[key] for key, tensor in left.tensors.items()}
        noise = left.noise + right.noise
        contrast = left.minus(right)
        for key, tensor in contrast.tensors.items():
            assert torch.equal(tensor, expected[key])
        assert contrast.facts().count == 2
        assert contrast.facts().signal_share == pytest.approx(1 - noise / contrast.squared_norm())
        references = References.stack({"contrast": contrast, "left": left})
    assert references.names == ("contrast", "left")
    lengths = torch.stack([tensor.square().sum((1, 2)) for tensor in references.tensors.values()]).sum(0)
    assert torch.allclose(lengths, torch.ones(2, dtype=torch.float64))


def test_a_contrast_of_pairs_has_the_noise_of_their_differences(twin: Any) -> None:
    model, rows, copies = twin.model("llama", torch.float64), twin.rows((14, 9, 11, 17)), twin.rows((13, 9, 12, 17))
    names = twin.names(model, "linear")
    with GradientEngine(model, EngineSettings("linear", SketchPlan(4096, 0))) as engine:
        sides = [engine.mean_gradient([twin.pad(part)], sketched=True) for part in (rows, copies)]
        blocks = [engine.block(twin.pad(part)) for part in (rows, copies)]
    pairs = torch.cat(sides[0].sketches), torch.cat(sides[1].sketches)
    assert all(torch.allclose(pair, block.sketch, rtol=1e-5, atol=1e-7) for pair, block in zip(pairs, blocks, strict=True))
    true = twin.naive(model, [*rows, *copies])
    whole = [torch.cat([g.flatten() for g in true.merged(z, names).values()]) for z in range(8)]
    differences = torch.stack(whole[:4]) - torch.stack(whole[4:])
    spread = float((differences - differences.mean(0)).square().sum())
    contrast = sides[0].minus(sides[1], pairs)
    assert contrast.noise == pytest.approx(spread / 3 / 4, rel=0.15)  # the sketch's own error: √(2/4096) a row


def test_the_noise_of_groups_of_pairs_does_not_hang_on_their_sizes() -> None:
    rng, sizes = torch.Generator().manual_seed(0), torch.tensor([64, *[2] * 18])
    noises = []
    for _ in range(300):  # the mean of 100 independent differences of variance 40 has 0.4
        rows = torch.randn(100, 40, generator=rng)
        groups = torch.stack([part.mean(0) for part in rows.split(sizes.tolist())])
        left, right = (MeanGradient({"w": m}, 100, 0.0, torch.float32) for m in (rows.mean(0)[None], torch.zeros(1, 40)))
        noises.append(left.minus(right, (groups, torch.zeros_like(groups)), sizes).noise)
    assert sum(noises) / len(noises) == pytest.approx(0.4, rel=0.05)


def test_a_scaled_example_counts_that_much(twin: Any) -> None:
    model, rows = twin.model("llama-tied", torch.float64), twin.rows((14, 9, 11))
    names, true, scale = twin.names(model, "all"), twin.naive(model, rows), torch.tensor([0.5, 2.0, 0.0])
    with GradientEngine(model, EngineSettings(params="all")) as engine:
        batch = twin.pad(rows)
        mean = engine.mean_gradient([replace(batch, scale=scale)])
    parts = [true.merged(z, names) for z in range(3)]
    for key, tensor in mean.tensors.items():
        expected = sum(s * part[key] for s, part in zip(scale.tolist(), parts, strict=True)) / 3
        assert torch.allclose(tensor, expected, rtol=1e-9, atol=1e-12)
    assert torch.cat(mean.squares)[1].sqrt() == pytest.approx(2 * true.norm(1, names), rel=1e-9)
