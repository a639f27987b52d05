from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gradsieve.errors import InvalidArgument
from gradsieve.train.plan import epoch_ends, make_plan, micro_batches
from gradsieve.train.recipe import Recipe


def data_of(recipe: Recipe, n: int) -> list[int]:
    return [row for step in make_plan(recipe, n) for row in step.rows]


@given(st.integers(1, 40), st.integers(1, 12), st.integers(1, 4), st.sampled_from(["shuffled", "selection"]))
def test_by_epochs_every_pass_sees_every_example_once(n: int, batch: int, epochs: int, order: str) -> None:
    recipe = Recipe(batch=batch, epochs=epochs, order=order)  # type: ignore[arg-type]
    plan = make_plan(recipe, n)
    rows = [row for step in plan for row in step.rows]
    assert len(plan) == epochs * -(-n // batch)
    for start in range(0, len(rows), n):
        assert sorted(rows[start : start + n]) == list(range(n))
    assert all(len(step.rows) <= batch for step in plan)
    ends = epoch_ends(plan)
    assert [plan[end - 1].epoch for end in ends] == pytest.approx(range(1, epochs + 1))


@given(st.integers(1, 40), st.integers(1, 12), st.integers(1, 30))
def test_by_steps_there_are_so_many_full_ones_and_use_is_even(n: int, batch: int, steps: int) -> None:
    plan = make_plan(Recipe(batch=batch, steps=steps), n)
    assert [len(step.rows) for step in plan] == [batch] * steps
    times = Counter(row for step in plan for row in step.rows)
    assert max(times.values()) - min(times[row] for row in range(n)) <= 1
    assert plan[-1].epoch == pytest.approx(steps * batch / n)
    assert epoch_ends(plan)[-1] == steps


def test_selection_order_is_that_of_the_data_in_each_pass() -> None:
    assert data_of(Recipe(batch=2, epochs=2, order="selection"), 3) == [0, 1, 2] * 2
    assert data_of(Recipe(batch=2, steps=4, order="selection"), 3) == [0, 1, 2, 0, 1, 2, 0, 1]


def test_shuffled_passes_differ_and_follow_the_seed() -> None:
    once, again = data_of(Recipe(seed=1, epochs=2), 30), data_of(Recipe(seed=1, epochs=2), 30)
    assert once == again
    assert once[:30] != once[30:]
    assert once != data_of(Recipe(seed=2, epochs=2), 30)
    assert once[:30] != list(range(30))


def test_replay_takes_its_share_of_each_batch_and_no_step_more() -> None:
    plan = make_plan(Recipe(batch=10, steps=6, replay_share=0.3), data=20, replay=5)
    for step in plan:
        assert sum(row >= 20 for row in step.rows) == 3
        assert len(step.rows) == 10
    replayed = [row for step in plan for row in step.rows if row >= 20]
    assert sorted(replayed[:5]) == [20, 21, 22, 23, 24]
    assert plan[-1].epoch == pytest.approx(6 * 7 / 20)


def test_replay_by_epochs_adds_to_each_step_and_passes_stay_whole() -> None:
    plan = make_plan(Recipe(batch=4, epochs=1, replay_share=0.5), data=5, replay=3)
    own = [[row for row in step.rows if row < 5] for step in plan]
    assert [len(rows) for rows in own] == [2, 2, 1]
    assert [len(step.rows) for step in plan] == [4, 4, 2]
    assert sorted(row for rows in own for row in rows) == list(range(5))


def test_anchors_are_drawn_for_surgery_only() -> None:
    assert all(step.anchors == () for step in make_plan(Recipe(steps=2), 5, anchors=4))
    plan = make_plan(Recipe(steps=2, surgery="agem", batch=3, anchor_batch=2), data=5, replay=2, anchors=4)
    assert sorted(row for step in plan for row in step.anchors) == [7, 8, 9, 10]
    assert len(make_plan(Recipe(steps=1, surgery="agem", batch=3), 5, anchors=4)[0].anchors) == 3


def test_the_draws_do_not_follow_one_another() -> None:
    plan = make_plan(Recipe(batch=40, steps=1, replay_share=0.5, surgery="pcgrad", anchor_batch=20), 20, 20, 20)
    own, replayed, anchors = plan[0].rows[:20], plan[0].rows[20:], plan[0].anchors
    assert [row - 20 for row in replayed] != list(own)
    assert [row - 40 for row in anchors] != list(own)
    assert [row - 20 for row in anchors] != list(replayed)


def test_the_order_of_the_data_is_that_without_replay_or_surgery() -> None:
    plain = data_of(Recipe(batch=4, epochs=2), 9)
    mixed = make_plan(Recipe(batch=8, epochs=2, replay_share=0.5, surgery="agem"), 9, 3, 3)
    assert [row for step in mixed for row in step.rows if row < 9] == plain


def test_epochs_that_end_within_a_step_or_several_at_once_are_found() -> None:
    assert epoch_ends(make_plan(Recipe(batch=4, steps=5), 10)) == [3, 5]
    assert epoch_ends(make_plan(Recipe(batch=4, steps=6), 10)) == [3, 5, 6]
    assert epoch_ends(make_plan(Recipe(batch=9, steps=2), 4)) == [1, 2]


def test_micro_batches_hold_each_row_once_longest_first() -> None:
    lengths = [3, 9, 4, 9, 1]
    assert micro_batches([4, 0, 1, 2, 3], lengths, 2) == [(1, 3), (2, 0), (4,)]


@pytest.mark.parametrize(
    ("recipe", "name"),
    [(Recipe(batch=4, replay_share=0.5), "replay"), (Recipe(surgery="agem"), "anchors"), (Recipe(steps=1), "data")],
)
def test_where_there_is_nothing_to_draw_from_it_is_said_so(recipe: Recipe, name: str) -> None:
    with pytest.raises(InvalidArgument, match=f"^{name} must be at least 1 where the recipe draws "):
        make_plan(recipe, 0 if name == "data" else 5)
