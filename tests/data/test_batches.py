import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gradsieve.compute import BATCH_TOKENS
from gradsieve.data.batches import batches, pad, plan_units
from gradsieve.errors import InvalidArgument
from gradsieve.job import Job

LENGTHS = st.lists(st.integers(1, 300), min_size=0, max_size=60)


def keys_of(lengths: list[int]) -> list[bytes]:
    return [f"{i:04d}".encode() for i in range(len(lengths))]


@given(lengths=LENGTHS, unit=st.integers(1, 1000))
def test_units_hold_every_example_once_longest_first(lengths: list[int], unit: int) -> None:
    units = plan_units(lengths, keys_of(lengths), unit)
    order = [i for part in units for i in part.tolist()]
    assert sorted(order) == list(range(len(lengths)))
    assert [lengths[i] for i in order] == sorted(lengths, reverse=True)
    assert all(len(part) for part in units)
    assert all(sum(lengths[i] for i in part) < unit + max(lengths) for part in units)


def test_units_do_not_depend_on_the_order_of_the_input() -> None:
    lengths = [5, 9, 5, 5, 7, 9]
    keys = keys_of(lengths)
    reverse = plan_units(lengths[::-1], keys[::-1], 12)
    assert [[keys[i] for i in u] for u in plan_units(lengths, keys, 12)] == [[keys[::-1][i] for i in u] for u in reverse]


@given(lengths=LENGTHS, most=st.integers(1, 600))
def test_batches_stay_within_their_size_and_cover_all(lengths: list[int], most: int) -> None:
    lengths = sorted(lengths, reverse=True)
    runs = list(batches(lengths, most))
    assert [i for run in runs for i in range(len(lengths))[run]] == list(range(len(lengths)))
    for run in runs:
        inside = lengths[run]
        assert len(inside) == 1 or len(inside) * max(inside) <= most


@pytest.mark.parametrize("sigma", [0.5, 0.7])  # 0.7 is that of benchmarks/extract.py
def test_padding_of_a_log_normal_pool_is_below_one_percent(sigma: float) -> None:
    rng = np.random.default_rng(0)
    lengths = np.clip(rng.lognormal(np.log(130), sigma, 4000), 8, 1024).astype(int).tolist()
    units = plan_units(lengths, keys_of(lengths), Job.unit_tokens)
    padded = real = 0
    for unit in units:
        inside = [lengths[i] for i in unit]
        for run in batches(inside, BATCH_TOKENS):
            padded += len(inside[run]) * max(inside[run])
            real += sum(inside[run])
    assert padded / real - 1 < 0.01


def test_padding_stands_on_the_right() -> None:
    assert pad([np.array([1, 2, 3]), np.array([4])], 0).tolist() == [[1, 2, 3], [4, 0, 0]]


def test_a_unit_must_hold_a_token() -> None:
    with pytest.raises(InvalidArgument, match="unit_tokens must be at least 1"):
        plan_units([1], [b"a"], 0)
