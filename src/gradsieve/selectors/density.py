"""Kernel density of one number per example."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from gradsieve.selectors.ranking import deviation, percentile

EXACT_UP_TO = 10_000
"""Above this many examples the density is computed from bins of 1/32 bandwidth (off by less than 1e-3 of its maximum)."""


def silverman(sample: Tensor) -> float:
    """Returns Silverman's bandwidth 0.9·min(σ, IQR/1.34)·n^(-1/5); σ alone where the middle half is one value; 0 if all are.

    σ is the standard deviation with n - 1 (Silverman 1986, Eq. 3.31).
    """
    n = len(sample)
    if (sample == sample[0]).all():
        return 0.0
    sigma = deviation(sample) * math.sqrt(n / (n - 1))
    iqr = percentile(sample, 75) - percentile(sample, 25)
    return 0.9 * (min(sigma, iqr / 1.34) if iqr > 0 else sigma) * math.pow(n, -0.2)


def density(sample: Tensor, at: Tensor, bandwidth: float) -> Tensor:
    """Returns the Gaussian kernel density of the sample at some points: float64 [q]; O(nq), O(n + q) above `EXACT_UP_TO`.

    Args:
        sample: float64 [n].
        at: Points in the sample's range, widened by at most 5 bandwidths: float64 [q].
        bandwidth: At least 0; 0 stands for a sample of one value, and the density is then 1 everywhere.
    """
    if bandwidth == 0:
        return torch.ones_like(at)
    sample = sample.sort().values  # the sum does not depend on the order of the pool
    points, inverse = at.unique(return_inverse=True)
    scale = len(sample) * bandwidth * math.sqrt(2 * math.pi)
    sums = _kernel_sums if len(sample) <= EXACT_UP_TO else _binned_kernel_sums
    return sums(sample, points, bandwidth)[inverse] / scale


def _kernel_sums(sample: Tensor, at: Tensor, bandwidth: float) -> Tensor:
    blocks = [((x[:, None] - sample) / bandwidth).square().mul_(-0.5).exp_().sum(1) for x in at.split(256)]
    return torch.cat(blocks)


def _binned_kernel_sums(sample: Tensor, at: Tensor, bandwidth: float) -> Tensor:
    """Linear binning at 1/32 bandwidth, the kernel cut at 6 bandwidths, linear interpolation.

    Only bins that something falls into are there, however far apart the sample lies.
    """
    step, reach = bandwidth / 32, 6 * 32

    def place(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Returns the bins on both sides of every x, sorted, the places of these sides among them, and x's way between them."""
        position = (x - sample[0]) / step
        left = position.floor()
        bins, index = torch.cat([left, left + 1]).long().unique(return_inverse=True)
        return bins, index, position - left

    filled, index, part = place(sample)
    mass = torch.bincount(index, torch.cat([1 - part, part]))
    bins, index, part = place(at)
    sums = torch.zeros(len(bins), dtype=torch.float64)
    for shift in range(-reach, reach + 1):
        found = torch.searchsorted(filled, bins - shift).clamp_(max=len(filled) - 1)
        sums += math.exp(-0.5 * (shift / 32) ** 2) * mass[found].where(filled[found] == bins - shift, 0.0)
    left, right = sums[index].chunk(2)
    return left * (1 - part) + right * part
