from __future__ import annotations

import pytest

from gradsieve.overhead import overhead


def test_by_hand() -> None:
    # 100 tokens through forward and backward, 20 in training steps, 60 forward only, by a model of half the size
    spent = overhead(100, 20, 60, pool=[10, 20, 30], chosen=[10], ratio=0.5)
    assert spent.choosing == 0.5 * (100 + 20 + 30)
    assert (spent.whole, spent.chosen) == (180, 30)
    assert "41.7% of the work of 3 epochs of LoRA training on the whole pool, and 250% of 3 epochs" in str(spent)


def test_a_pass_over_the_pool_is_a_third_of_the_training_it_is_for() -> None:
    spent = overhead(60, 0, 0, pool=[10, 20, 30], chosen=[30])
    assert spent.choosing / spent.whole == pytest.approx(1 / 3)


def test_where_nothing_is_chosen_there_is_no_second_denominator() -> None:
    spent = overhead(60, 0, 0, pool=[10, 20, 30], chosen=[])
    assert str(spent).endswith("33.3% of the work of 3 epochs of LoRA training on the whole pool, and none is chosen")
