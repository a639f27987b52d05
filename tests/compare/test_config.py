"""The file of a comparison: every key known, every mistake named by file and key."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from gradsieve.compare.config import Arm, Config, demo_config, load_config, parse_config
from gradsieve.errors import DataError

Content = dict[str, Any]


def changed(content: Content, path: str, value: object) -> Content:
    """A copy in which the entry at `a.b.c` is another."""
    copy = yaml.safe_load(yaml.safe_dump(content))
    place = copy
    *above, last = path.split(".")
    for key in above:
        place = place.setdefault(key, {})
    place[last] = value
    return copy


def test_the_baselines_are_added_and_come_first(config: Config) -> None:
    assert [(arm.name, arm.added) for arm in config.arms] == [
        ("base", True), ("full", True), ("random", True), ("less", False), ("agem", False),
    ]  # fmt: skip


def test_arms_may_be_one_method_with_several_settings(content: Content) -> None:
    arms = {
        "random": None,
        "plain": {"method": "ogs-static", "settings": {"against": "plain", "drop": 20}, "budgets": "50%"},
        "filter": {"method": "ogs-static", "settings": {"form": "filter"}},
        "agem": {"method": "full", "recipe": {"surgery": "agem"}},
    }
    config = parse_config(changed(content, "arms", arms), "x.yaml")
    assert config.arm("plain") == Arm("plain", "ogs-static", {"against": "plain", "drop": 20.0}, ("50%",))
    assert config.arm("filter").settings == {"form": "filter"}
    assert config.arm("agem").recipe == {"surgery": "agem"}
    assert not config.arm("agem").chooses


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("poool", "x", r"x\.yaml: poool must be one of model, pool, .*, got 'poool'"),
        ("recipe.learnig_rate", 1, r"x\.yaml: recipe\.learnig_rate must be one of tuning, rank"),
        ("recipe.batch", "many", r"x\.yaml: recipe\.batch must be a whole number, got 'many'"),
        ("recipe.batch", 0, r"x\.yaml: recipe: batch must be at least 1, got 0"),
        ("recipe.steps", 5, r"x\.yaml: recipe\.steps must be one of"),
        ("recipe.seed", 5, r"x\.yaml: recipe\.seed must be one of"),
        ("recipe.tuning", "lorra", r"x\.yaml: recipe\.tuning must be one of lora, full, got 'lorra'"),
        ("gradients.dimm", 5, r"x\.yaml: gradients\.dimm must be one of"),
        ("gradients.max_length", 5, r"x\.yaml: gradients\.max_length must be one of"),
        ("arms.less.settings.ratess", 1, r"x\.yaml: arms\.less\.settings\.ratess must be one of rates"),
        ("arms.less.setting", {}, r"x\.yaml: arms\.less\.setting must be one of method, settings, budgets, recipe"),
        ("arms.lesss", None, r"x\.yaml: arms\.lesss\.method: method must be one of .*got 'lesss'"),
        ("arms.base", {"method": "less"}, r"arms\.base\.method must be base \(the baseline of that name\), got 'less'"),
        ("arms.full", {"budgets": ["5%"]}, r"arms\.full\.budgets must be left out for full"),
        ("arms.base", {"recipe": {"batch": 2}}, r"arms\.base must be named base and have no recipe"),
        ("arms.full", {"recipe": {"batch": 2}}, r"arms\.full\.recipe must be left out: full is .* name another arm full-…"),
        ("arms.random", {"recipe": {"batch": 2}}, r"arms\.random\.recipe must be left out: random is trained as the compar"),
        ("arms.untouched", {"method": "base"}, r"arms\.untouched must be named base"),
        ("arms.a--b", {"method": "less"}, r"arms must have names of letters, digits, .*got 'a--b'"),
        ("tests.asked.roll", 1, r"tests\.asked\.roll must be one of role, files, limit, metrics"),
        ("tests.asked.role", "domain", r"tests\.asked\.role must be one of target, general, got 'domain'"),
        ("tests.asked.limit", 1, r"tests\.asked: limit must be at least 2, got 1"),
        ("tests.asked", {"role": "target"}, r"tests\.asked\.files must be given"),
        ("tests", {"a": {"role": "general", "files": "a.jsonl"}}, r"x\.yaml: tests must have one with role target, got none"),
        ("metrics", ["los"], r"x\.yaml: metrics must be among loss, .*got 'los'"),
        ("tests.asked.metrics", ["los"], r"x\.yaml: metrics must be among loss, .*got 'los'"),
        ("tasks", {"arc": {"roll": "general"}}, r"tasks\.arc\.roll must be one of role, limit, fewshot"),
        ("tasks", {"arc": {"limit": 1}}, r"tasks\.arc: limit must be at least 2, got 1"),
        ("tasks", {"arc": {"fewshot": -1}}, r"tasks\.arc: fewshot must be at least 0, got -1"),
        ("tasks", {"asked": None}, r"x\.yaml: tasks must have other names than tests, got asked twice"),
        ("max_new_tokens", 0, r"x\.yaml: max_new_tokens must be at least 1, got 0"),
        ("budgets", [], r"x\.yaml: budgets must name at least one"),
        ("budgets", ["5%", "5%"], r"x\.yaml: budgets must differ from each other"),
        ("budgets", ["lots"], r"x\.yaml: budgets: budget must be like 500, 5% or 200000tok, got 'lots'"),
        ("seeds", [0, -1], r"x\.yaml: seeds must be at least 0, got -1"),
        ("seeds", [0, 2**32], r"x\.yaml: seeds must be below 4294967296, got 4294967296"),
        ("seeds", 3, r"x\.yaml: seeds must be a list, each seed by its name, got 3; write \[0, 1, 2\]"),
        ("seeds", [0, 1.5], r"x\.yaml: seeds\[1\] must be a whole number, got 1\.5"),
        ("views", ["equal_stepps"], r"x\.yaml: views\[0\] must be one of equal_steps, equal_repetition"),
        ("steps", 0, r"x\.yaml: steps must be at least 1, got 0"),
        ("near_duplicate", 1.5, r"x\.yaml: near_duplicate must lie in \(0, 1\], got 1\.5"),
        ("resamples", 5, r"x\.yaml: resamples must be at least 100, got 5"),
        ("keep_models", "perhaps", r"x\.yaml: keep_models must be true or false, got 'perhaps'"),
        ("tests.asked.files", "a-{seed}.jsonl", r"tests\.asked\.files must be the same for all seeds"),
        ("pool", "{data}/pool.jsonl", r"x\.yaml: pool names \{data\}/pool\.jsonl, which needs --data DIR"),
    ],
)
def test_a_mistake_is_named_by_file_and_key(
    content: Content, path: str, value: object, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("GRADSIEVE_DATA", raising=False)
    if path.startswith("arms.less."):
        content["arms"]["less"] = {}
    with pytest.raises(DataError, match=message):
        parse_config(changed(content, path, value), "x.yaml")


def test_a_key_that_is_missing_is_named(content: Content) -> None:
    del content["tests"]
    with pytest.raises(DataError, match=r"x\.yaml: tests must be given, got none"):
        parse_config(content, "x.yaml")


def test_numbers_that_yaml_reads_as_text_are_numbers(content: Content) -> None:
    text = yaml.safe_dump(content).replace("\nrecipe:\n", "\nrecipe:\n  learning_rate: 2e-4\n  report_to: trackio\n")
    config = parse_config(yaml.safe_load(text), "x.yaml")
    assert config.recipe["learning_rate"] == 2e-4
    assert config.recipe["report_to"] == ("trackio",)


def test_files_are_read_and_their_mistakes_named(content: Content, tmp_path: Path) -> None:
    path = tmp_path / "x.yaml"
    path.write_text(yaml.safe_dump(content))
    assert load_config(path, out="elsewhere").out == "elsewhere"
    path.write_text("a: [1\n")
    with pytest.raises(DataError, match=r"x\.yaml: must be valid YAML"):
        load_config(path)
    path.write_text("seeds: [1]\nseeds: [2]\n")
    with pytest.raises(DataError, match="the key 'seeds' twice, the second in line 2"):
        load_config(path)
    path.write_text("- 1\n")
    with pytest.raises(DataError, match="the file must hold `key: value` lines"):
        load_config(path)
    with pytest.raises(DataError, match=r"nowhere\.yaml: must be a readable YAML file"):
        load_config(tmp_path / "nowhere.yaml")


def test_data_and_seed_stand_for_folders_and_seeds(content: Content, monkeypatch: pytest.MonkeyPatch) -> None:
    content = changed(content, "pool", ["{data}/pool-{seed}.jsonl", "more.jsonl"])
    config = parse_config(content, "x.yaml", data="/d")
    assert config.files("pool", 3) == ("/d/pool-3.jsonl", "more.jsonl")
    assert config.data_per_seed
    assert not dataclasses.replace(config, pool=("more.jsonl",)).data_per_seed
    monkeypatch.setenv("GRADSIEVE_DATA", "/e")
    assert parse_config(content, "x.yaml").files("pool", 0)[0] == "/e/pool-0.jsonl"


def test_data_stands_for_its_folder_wherever_a_path_is(content: Content) -> None:
    content |= {
        "model": "{data}/model",
        "chat_template": "{data}/t.jinja",
        "tasks": {"a": {"include_path": "{data}/tasks", "limit": 3}, "arc_easy": None},
    }
    config = parse_config(content, "x.yaml", data="/d")
    assert (config.model, config.chat_template, config.tasks["a"].include_path) == ("/d/model", "/d/t.jinja", "/d/tasks")
    assert (config.tasks["a"].limit, config.tasks["arc_easy"].include_path) == (3, None)


def test_the_demo_is_a_file_like_any_other(tmp_path: Path) -> None:
    copy = tmp_path / "copy.yaml"
    copy.write_text(demo_config())
    assert dataclasses.replace(load_config(copy), source="demo.yaml") == load_config("demo")


def test_every_default_passes_its_own_check(config: Config, write_data: Callable[..., Path]) -> None:
    needed = {name: getattr(config, name) for name in ("source", "model", "pool", "tests", "arms", "budgets")}
    assert Config(**needed).seeds == (0, 1, 2)
