"""What is refused before the first cell is run: leaks, and what would fail in its cell."""

import json
from pathlib import Path
from typing import Any

import pytest

from gradsieve.compare.config import parse_config
from gradsieve.compare.run import Comparison
from gradsieve.errors import GradsieveError, InvalidArgument


def test_examples_that_leak_are_refused_or_dropped_and_listed(content: dict[str, Any], tmp_path: Path) -> None:
    pool = Path(content["pool"])
    line = json.loads(Path(content["tests"]["asked"]["files"]).read_text().splitlines()[0]) | {"id": "stolen"}
    pool.write_text(pool.read_text() + json.dumps(line) + "\n")
    config = parse_config(content, "x.yaml")
    with pytest.raises(InvalidArgument, match=r"pool .*pool\.jsonl:25 \(stolen\): the same as test asked .*asked\.jsonl:1"):
        Comparison.of(config)
    comparison = Comparison.of(config, drop_leaks=True)
    assert len(comparison.material.sides(0).pool) == 24
    comparison.run(minutes=0)
    listed = [json.loads(text) for text in (comparison.study / "leaks.jsonl").read_text().splitlines()]
    assert [(leak["id"], leak["kind"]) for leak in listed] == [("stolen", "same")]
    assert any("leaks.jsonl" in note for note in comparison.material.notes)
    pool.write_text("".join(pool.read_text().splitlines(keepends=True)[:-1]))
    Comparison.of(config).run(minutes=0)
    assert not (comparison.study / "leaks.jsonl").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"recipe": {"surgery": "agem"}, "anchor": None},
            "x.yaml: anchor must be given for surgery and replay of full--0--equ",
        ),
        ({"recipe": {"replay_share": 0.5}, "anchor": None}, "x.yaml: anchor must be given for surgery and replay of full--0"),
        ({"arms": {"x": {"method": "random", "recipe": {"replay_share": 0.1}}}}, "x.yaml: x--25pct--0.*replay_share must make"),
        (
            {"views": ["equal_repetition"], "steps": None, "recipe": {"batch": 64, "epochs": 1}},
            "x.yaml: full--0--equal_repetition: warmup must leave a step at the full rate, got 0.1 of 1 steps; set it to 0",
        ),
        (
            {"views": ["equal_repetition"], "steps": None, "recipe": {"batch": 6, "epochs": 1}},  # 4 steps of the whole pool
            "x.yaml: random--25pct--0--equal_repetition: warmup must leave a step at the full rate, got 0.1 of 1 steps",
        ),
        ({"recipe": {"report_to": ["trackerx"]}}, "x.yaml: full--0--equal_steps: report_to must name trackers"),
        ({"recipe": {"tuning": "full"}, "dtype": "bfloat16"}, "x.yaml: full--0.*full tuning needs float32.*dtype: float32"),
        ({"metrics": ["kl"]}, r"x.yaml: metrics must hold one that asked \(kind worked\) has besides kl, got kl; add loss"),
        ({"metrics": ["loss", "choice_norm"]}, "x.yaml: metrics must each be of some test's kind, got choice_norm for asked"),
        ({"metrics": ["loss", "choice"]}, "x.yaml: metrics must each be of some test's kind, got choice for asked"),
        ({"tasks": {"arc_eazy": None}}, "tasks must be known to lm-eval, got 'arc_eazy'; did you mean arc_easy"),
    ],
)
def test_what_would_fail_in_its_cell_is_refused_before_any_is_run(
    content: dict[str, Any], changes: dict[str, Any], message: str
) -> None:
    changed = {name: value for name, value in (content | changes).items() if value is not None}
    if "arms" not in changes:
        changed["arms"] = {"random": None}
    with pytest.raises(GradsieveError, match=message):
        Comparison.of(parse_config(changed, "x.yaml"))


def test_a_role_that_an_arm_reads_must_be_there(content: dict[str, Any]) -> None:
    del content["target"]
    content["arms"] = {"less": None}
    with pytest.raises(InvalidArgument, match=r"x\.yaml: target must be given for the arm less, got none"):
        Comparison.of(parse_config(content, "x.yaml"))
    content |= {"arms": {"replay": {"method": "random", "recipe": {"replay_share": 0.5}}}, "target": content.get("anchor")}
    del content["anchor"]
    with pytest.raises(
        InvalidArgument,
        match=r"x\.yaml: anchor must be given for surgery and replay of replay--25pct--0--equal_steps, got none",
    ):
        Comparison.of(parse_config(content, "x.yaml"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"budgets": ["5000"]},
            r"x\.yaml: budgets, in seed 0: budget must lie in \[1, 24\] \(the candidates\), got 5000; lower it",
        ),
        ({"budgets": ["1%"]}, r"x\.yaml: budgets, in seed 0: budget must be at least one example, got 1% of 24 candidates"),
        ({"budgets": ["5tok"]}, r"x\.yaml: budgets, in seed 0: budget must hold the shortest candidate"),
        ({"arms": {"less": {"budgets": ["25"]}}}, r"x\.yaml: arms\.less\.budgets, in seed 0: budget must lie in \[1, 24\]"),
        ({"gradients": {"dim": 0}}, r"x\.yaml: gradients: dim must lie in \[16, 65536\], got 0"),
        ({"gradients": {"batch_tokens": 0}}, r"x\.yaml: gradients: batch_tokens must be at least 1, got 0"),
        ({"gradients": {"unit_tokens": -3}}, r"x\.yaml: gradients: unit_tokens must be at least 1, got -3"),
        (
            {"gradients": {"dedup": "near", "dedup_threshold": 5}},
            r"x\.yaml: gradients: .*dedup.threshold must lie in \(0, 1\], got 5",
        ),
        ({"gradients": {"params": "lorra"}}, r"x\.yaml: gradients: params must be made of .*, got 'lorra'"),
        ({"gradients": {"warmup_recipe": "no.yaml"}}, r"x\.yaml: gradients: no\.yaml: must be a readable YAML file"),
        ({"gradients": {"corrupted": "no.jsonl"}}, r"x\.yaml: gradients: .*no\.jsonl"),
        ({"gradients": {"navigator": "/nowhere"}}, r"x\.yaml: gradients: .*/nowhere"),
    ],
)
def test_what_would_fail_in_a_choice_is_refused_before_a_model_is_loaded(
    content: dict[str, Any], changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(GradsieveError, match=message):
        Comparison.of(parse_config(content | {"arms": {"less": None}} | changes, "x.yaml"))


def test_budgets_are_paid_by_the_pool_without_its_copies(content: dict[str, Any]) -> None:
    pool = Path(content["pool"])
    lines = pool.read_text().splitlines(keepends=True)
    pool.write_text("".join([*lines, *(line.replace('"pool-', '"copy-') for line in lines[:6])]))
    content["budgets"] = ["30"]
    content["arms"] = {"random": None}
    Comparison.of(parse_config(content, "x.yaml"))
    content["gradients"]["dedup"] = "exact"
    with pytest.raises(InvalidArgument, match=r"x\.yaml: budgets, in seed 0: budget must lie in \[1, 24\] .*, got 30; lower"):
        Comparison.of(parse_config(content, "x.yaml"))


def test_a_warm_up_recipe_leaves_a_step_at_the_full_rate(content: dict[str, Any], tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    content["arms"] = {"less": {"settings": {"warmup_share": 0.5, "warmup_epochs": 4}}}  # 12 examples, 4 times
    content["gradients"]["warmup_recipe"] = str(recipe)
    recipe.write_text("batch: 8\nwarmup: 0.8\n")  # 8 steps, 7 of them before the full rate
    Comparison.of(parse_config(content, "x.yaml"))
    recipe.write_text("batch: 16\nwarmup: 0.8\n")
    with pytest.raises(InvalidArgument, match=r"x\.yaml: gradients: warmup must leave a step at the full rate, got 0\.8 of 4 "):
        Comparison.of(parse_config(content, "x.yaml"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"views": ["equal_repetition"], "steps": 60},
            "steps must be left out where views has no equal_steps, .*, got 60; rem",
        ),
        (
            {"recipe": {"epochs": 7}},
            r"recipe\.epochs must be left out in the view equal_steps where steps is set, got 7; remove",
        ),
        (
            {"arms": {"x": {"method": "random", "recipe": {"epochs": 2}}}},
            r"arms\.x\.recipe\.epochs must be left out in the view",
        ),
        ({"recipe": {"anchor_batch": 3}}, r"recipe\.anchor_batch must be left out where no arm has surgery, got 3; remove it"),
        (
            {"arms": {"x": {"method": "random", "recipe": {"anchor_batch": 3}}}},
            r"arms\.x\.recipe\.anchor_batch must be left out of an arm without surgery, got 3",
        ),
        ({"gradients": {"warmup_recipe": "no.yaml"}}, r"gradients\.warmup_recipe must be left out where no method trains the"),
        ({"gradients": {"replay": "more.jsonl"}}, r"gradients\.replay must be left out where arms choose from the pool alone"),
        ({"metrics": ["loss", "kl"], "tests": "asked"}, "metrics must hold kl only with a test of role general, got none"),
    ],
)
def test_settings_that_nothing_would_come_of_are_refused(
    content: dict[str, Any], changes: dict[str, Any], message: str
) -> None:
    changed = content | {"arms": {"random": None}} | changes
    if changed["tests"] == "asked":
        changed["tests"] = {"asked": content["tests"]["asked"]}
    with pytest.raises(GradsieveError, match=f"x.yaml: {message}"):
        Comparison.of(parse_config(changed, "x.yaml"))


def test_a_test_has_at_least_two_items(content: dict[str, Any]) -> None:
    path = Path(content["tests"]["sums"]["files"])
    path.write_text(path.read_text().splitlines()[0] + "\n")
    with pytest.raises(InvalidArgument, match=r"x\.yaml: tests\.sums must have at least 2 usable items, got 1"):
        Comparison.of(parse_config(content, "x.yaml"))


@pytest.mark.parametrize(
    ("role", "test", "arm", "message"),
    [
        ("target", "asked", "less", "target must have an example for the arm less, got none in seed 0, as all that leak"),
        ("anchor", "sums", "agem", "anchor must have an example for surgery and replay of agem--25pct--0--equal_steps, g"),
    ],
)
def test_a_side_that_dropped_leaks_leave_empty_is_refused(
    content: dict[str, Any], role: str, test: str, arm: str, message: str
) -> None:
    Path(content["tests"][test]["files"]).write_text(Path(content[role]).read_text())
    content["tests"][test].pop("limit", None)
    content["arms"] = {arm: content["arms"][arm]}
    with pytest.raises(InvalidArgument, match=f"x.yaml: {message}"):
        Comparison.of(parse_config(content, "x.yaml"), drop_leaks=True)
