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
        ({"recipe": {"surgery": "agem"}, "anchor": None}, "x.yaml: full--0--equal_steps: anchor must be given for surgery and"),
        ({"recipe": {"replay_share": 0.5}, "anchor": None}, "x.yaml: full--0--equal_steps: anchor must be given for surgery"),
        ({"arms": {"x": {"method": "random", "recipe": {"replay_share": 0.1}}}}, "x.yaml: x--25pct--0.*replay_share must make"),
        (
            {"views": ["equal_repetition"], "recipe": {"batch": 64, "epochs": 1}},
            "x.yaml: full--0--equal_repetition: warmup must leave a step at the full rate, got 0.1 of 1 steps; set it to 0",
        ),
        (
            {"views": ["equal_repetition"], "recipe": {"batch": 6, "epochs": 1}},  # 4 steps of the whole pool
            "x.yaml: random--25pct--0--equal_repetition: warmup must leave a step at the full rate, got 0.1 of 1 steps",
        ),
        ({"recipe": {"report_to": ["trackerx"]}}, "x.yaml: full--0--equal_steps: report_to must name trackers"),
        ({"recipe": {"tuning": "full"}, "dtype": "bfloat16"}, "x.yaml: full--0.*full tuning needs float32.*dtype: float32"),
        ({"metrics": ["kl"]}, r"x.yaml: metrics must hold one that asked \(kind worked\) has besides kl, got kl; add loss"),
        ({"metrics": ["loss", "choice_norm"]}, "x.yaml: metrics must each be of some test's kind, got choice_norm for asked"),
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
        InvalidArgument, match=r"x\.yaml: replay--25pct--0--equal_steps: anchor must be given for surgery and rep"
    ):
        Comparison.of(parse_config(content, "x.yaml"))
