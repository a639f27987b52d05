from __future__ import annotations

import pytest
import torch

from gradsieve.errors import InvalidArgument
from gradsieve.gradients.directions import SPLITS, MeanGradient, References, halves


def mean_of(rows: torch.Tensor) -> MeanGradient:
    """The mean of gradients of one matrix and one vector, given as rows [n, 8]."""
    mean = MeanGradient.zeros({"w": (2, 3), "b": (2, 1)}, torch.zeros(1, dtype=torch.float64))
    mean.tensors["w"] += rows[:, :6].sum(0).view(2, 3)
    mean.tensors["b"] += rows[:, 6:].sum(0)[:, None]
    mean.add_norms(rows.square().sum(1), torch.ones(len(rows)))
    return mean.finish()


def test_signal_share_by_hand() -> None:
    rows = torch.zeros(2, 8, dtype=torch.float64)
    rows[0, 0], rows[1, 0], rows[1, 7] = 3, 1, 2  # mean (2, 0, …, 1), squared length 5; variance (2, …, 2) = 4
    facts = mean_of(rows).facts()
    assert facts.norm == pytest.approx(5**0.5)
    assert facts.count == 2
    assert facts.signal_share == pytest.approx(1 - (4 / 2) / 5)


def test_equal_gradients_are_all_signal() -> None:
    assert mean_of(torch.ones(5, 8, dtype=torch.float64)).facts().signal_share == pytest.approx(1)


def test_the_mean_signal_share_of_pure_noise_is_about_zero_or_below() -> None:
    rng = torch.Generator().manual_seed(0)
    noise = torch.tensor([mean_of(torch.randn(20, 8, generator=rng, dtype=torch.float64)).noise for _ in range(300)])
    assert noise.mean().item() == pytest.approx(8 / 20, rel=0.05)  # eight coordinates of variance 1, over 20


def test_stacked_references_have_norm_one_and_keep_their_facts() -> None:
    rng = torch.Generator().manual_seed(0)
    means = {name: mean_of(torch.randn(4, 8, generator=rng, dtype=torch.float64)) for name in "ab"}
    whole = {name: torch.cat([mean.tensors["w"].flatten(), mean.tensors["b"].flatten()]) for name, mean in means.items()}
    references = References.stack(means)
    assert references.names == ("a", "b")
    assert not means["a"].tensors  # emptied on the way, to bound the memory
    for i, name in enumerate("ab"):
        stacked = torch.cat([references.tensors["w"][i].flatten(), references.tensors["b"][i].flatten()])
        assert torch.allclose(stacked, whole[name] / whole[name].norm())
        assert references.facts[name].norm == pytest.approx(whole[name].norm().item())


def test_references_know_their_cosines_with_each_other() -> None:
    rng = torch.Generator().manual_seed(1)
    rows = {name: torch.randn(4, 8, generator=rng, dtype=torch.float64) for name in "abc"}
    facts = References.stack({name: mean_of(G) for name, G in rows.items()}).facts
    for a, G in rows.items():
        for b, H in rows.items():
            expected = torch.cosine_similarity(G.mean(0), H.mean(0), dim=0).item()
            assert facts[a].cosines[b] == pytest.approx(expected, abs=1e-12)


def test_no_references_have_no_part_in_any_parameter() -> None:
    assert len(References().of("w")) == 0
    assert References.stack({}).names == ()


def test_a_reference_that_cannot_be_used_is_refused() -> None:
    zeros = torch.zeros(3, 8, dtype=torch.float64)
    with pytest.raises(InvalidArgument, match="reference 'r' must have a gradient above 0"):
        References.stack({"r": mean_of(zeros)})
    with pytest.raises(InvalidArgument, match="at least 2 usable examples, got 1"):
        mean_of(zeros[:1])
    with pytest.raises(InvalidArgument, match="finite"):
        mean_of(zeros + torch.nan)
    with pytest.raises(InvalidArgument, match="completion tokens, got 1 without"):
        MeanGradient({}).add_norms(torch.ones(2), torch.tensor([3.0, 0.0]))


def test_the_halves_of_a_set_are_its_parts() -> None:
    sketches = torch.randn(7, 3, generator=torch.Generator().manual_seed(1))
    splits = halves(sketches)
    assert splits.shape == (SPLITS, 2, 3)
    for first, second in splits:
        assert torch.allclose((4 * first + 3 * second) / 7, sketches.mean(0), atol=1e-6)
        assert not torch.allclose(first, second)
    assert len({tuple(first.tolist()) for first, _ in splits}) == SPLITS
    assert torch.equal(halves(sketches), splits)
