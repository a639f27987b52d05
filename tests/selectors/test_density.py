import math
import time

import pytest
import scipy.stats
import torch
from hypothesis import given
from hypothesis import strategies as st

from gradsieve.selectors import density as module
from gradsieve.selectors.density import density, silverman


def sample(n, seed=0):
    """Two humps and a heavy tail."""
    rng = torch.Generator().manual_seed(seed)
    x = torch.randn(n, generator=rng, dtype=torch.float64)
    return torch.where(torch.arange(n) % 3 == 0, 4 + 0.3 * x, x) + (torch.arange(n) % 97 == 0) * 3 * x


def scipy_density(x, at, h):
    return torch.from_numpy(scipy.stats.gaussian_kde(x.numpy(), bw_method=h / x.std().item())(at.numpy()))


def test_bandwidth_by_hand():
    # sd = √2.5, quartiles 2 and 4: 2/1.34 < √2.5
    assert silverman(torch.tensor([1.0, 2, 3, 4, 5])) == pytest.approx(0.9 * (2 / 1.34) * 5**-0.2)
    # Quartiles 0 and 8, sd = 4.6 < 8/1.34
    x = torch.tensor([0.0, 0, 0, 8, 8, 8, 4])
    assert silverman(x) == pytest.approx(0.9 * min(x.double().std().item(), 8 / 1.34) * 7**-0.2)
    assert x.double().std().item() < 8 / 1.34
    # Most are equal: the middle half is one value
    x = torch.tensor([1.0] * 9 + [3.0])
    assert silverman(x) == pytest.approx(0.9 * x.double().std().item() * 10**-0.2)
    assert silverman(torch.tensor([2.5, 2.5])) == silverman(torch.tensor([2.5])) == 0.0


@given(st.integers(2, 60), st.integers(0, 99), st.floats(0.05, 3))
def test_density_is_scipys(n, seed, h):
    x = sample(n, seed)
    at = torch.linspace(x.min() - 2 * h, x.max() + 2 * h, 33, dtype=torch.float64)
    assert torch.allclose(density(x, at, h), scipy_density(x, at, h), rtol=1e-9, atol=1e-300)


def test_the_binned_density_is_scipys_within_a_thousandth():
    x = sample(12_000)
    h = silverman(x)
    assert len(x) > module.EXACT_UP_TO
    at = torch.cat([x[::40], torch.linspace(x.min() - 3 * h, x.max() + 3 * h, 100, dtype=torch.float64)])
    exact = scipy_density(x, at, h)
    error = (density(x, at, h) - exact).abs()
    assert error.max() / exact.max() < 1e-3
    assert (error / exact)[: len(x[::40])].max() < 2e-3  # where there are samples, however few


def test_a_sample_of_which_most_is_one_value_takes_no_bin_for_every_gap():
    x = torch.randn(12_000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x[:7200] *= 1e-4
    at, h, started = x[::300], silverman(x), time.perf_counter()
    exact, found = scipy_density(x, at, h), density(x, x, h)[::300]
    assert time.perf_counter() - started < 10  # seven million bins took half a minute
    assert (found - exact).abs().max() / exact.max() < 1e-3


def test_the_order_of_the_sample_does_not_change_a_bit():
    for n in (500, 12_000):
        x = sample(n)
        other = torch.randperm(n, generator=torch.Generator().manual_seed(3))
        assert torch.equal(density(x, x, 0.2)[other], density(x[other], x[other], 0.2))


def test_a_sample_of_one_value_has_the_same_density_everywhere():
    assert density(torch.tensor([2.0, 2.0]), torch.tensor([2.0, 3.0]), 0.0).tolist() == [1.0, 1.0]


def test_a_single_kernel_is_the_normal_density():
    peak = density(torch.zeros(1, dtype=torch.float64), torch.tensor([0.0, 0.5], dtype=torch.float64), 0.5)
    assert peak.tolist() == pytest.approx([1 / (0.5 * math.sqrt(2 * math.pi)), math.exp(-0.5) / (0.5 * math.sqrt(2 * math.pi))])


def test_a_million_examples_take_at_most_two_seconds():
    x = sample(10**6)
    started = time.process_time()
    density(x, x, silverman(x))
    assert time.process_time() - started < 2
