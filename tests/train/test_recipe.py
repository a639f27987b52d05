from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gradsieve.errors import InvalidArgument
from gradsieve.train.recipe import Recipe


def test_the_default_is_the_recipe_of_ogs() -> None:
    recipe = Recipe()
    assert (recipe.tuning, recipe.rank, recipe.alpha, recipe.dropout) == ("lora", 16, 32, 0)
    assert (recipe.rate, recipe.schedule, recipe.warmup, recipe.weight_decay) == (2e-4, "cosine", 0.1, 0.01)
    assert (recipe.batch, recipe.passes) == (64, 3)


def test_full_tuning_has_a_smaller_rate_unless_one_is_given() -> None:
    assert Recipe(tuning="full").rate == 2e-5
    assert Recipe(tuning="full", learning_rate=1e-3).rate == 1e-3


def test_steps_take_the_place_of_epochs() -> None:
    assert Recipe(steps=7).passes is None
    assert Recipe(epochs=1).passes == 1
    with pytest.raises(InvalidArgument, match="epochs must be left out where steps is set"):
        Recipe(epochs=1, steps=7)


@given(
    st.fixed_dictionaries(
        {},
        optional={
            "tuning": st.sampled_from(["lora", "full"]),
            "learning_rate": st.none() | st.floats(1e-9, 1),
            "steps": st.none() | st.integers(1, 1000),
            "report_to": st.lists(st.sampled_from(["tensorboard", "wandb"])).map(tuple),
            "seed": st.integers(0, 9),
            "save_epochs": st.booleans(),
        },
    )
)
def test_yaml_gives_the_same_recipe_back(settings: dict[str, Any]) -> None:
    recipe = Recipe(**settings)
    assert Recipe.from_yaml(recipe.to_yaml()) == recipe


def test_yaml_numbers_may_be_written_as_people_write_them() -> None:
    recipe = Recipe.from_yaml("learning_rate: 2e-4\nalpha: 64\nreport_to: [wandb]\n")
    assert (recipe.learning_rate, recipe.alpha, recipe.report_to) == (2e-4, 64.0, ("wandb",))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"learningrate": 1.0}, "recipe must have keys among .* got learningrate"),
        ({"tuning": "qlora"}, "tuning must be one of lora, full, got 'qlora'"),
        ({"rank": 0}, "rank must be at least 1, got 0"),
        ({"rank": 2.5}, "rank must be int, got 2.5"),
        ({"batch": True}, "batch must be int, got True"),
        ({"steps": "many"}, "steps must be int or nothing, got 'many'"),
        ({"learning_rate": "fast"}, "learning_rate must be float or nothing, got 'fast'"),
        ({"learning_rate": 0}, "learning_rate must be above 0"),
        ({"learning_rate": float("nan")}, "learning_rate must be above 0"),
        ({"warmup": 1.0}, r"warmup must lie in \[0, 1\), got 1.0"),
        ({"weight_decay": -1}, "weight_decay must be at least 0"),
        ({"seed": -1}, r"seed must lie in \[0, 4294967296\), got -1"),
        ({"seed": 2**32}, r"seed must lie in \[0, 4294967296\), got 4294967296"),
        ({"report_to": "wandb"}, "report_to must be a list of names"),
        ({"replay_share": 0.001}, "replay_share must make at least one replayed"),
        ({"replay_share": 0.999}, "replay_share must make at least one replayed and one other"),
    ],
)
def test_a_wrong_setting_is_named(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidArgument, match=message):
        Recipe.from_mapping(settings)


@pytest.mark.parametrize(("text", "message"), [("- 1", "mapping"), ("a: [", "YAML")])
def test_text_that_is_no_recipe_is_refused(text: str, message: str) -> None:
    with pytest.raises(InvalidArgument, match=message):
        Recipe.from_yaml(text)
