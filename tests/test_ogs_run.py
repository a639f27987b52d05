"""OGS from files to terminal and report: what the user must know is said in both, with its cure, and the trace is drawn."""

from __future__ import annotations

import html
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import gradsieve as gs
from gradsieve.cli import run
from gradsieve.models import find_model
from gradsieve.navigation import split_anchor
from gradsieve.outputs import page
from gradsieve.report import facts
from gradsieve.report.content import content
from gradsieve.train.navigator import LoRANavigator

Write = Callable[..., Path]
QUICK = ("--clusters", "3", "--updates", "2", "--episodes", "3", "--batch", "2")


@pytest.fixture
def words(write_data: Write, tiny_model: Path, tmp_path: Path) -> list[str]:
    """The part of a command that all runs share; the pool agrees with its anchor, so that risk is zero for it."""
    data = {"pool": write_data("pool", 24), "target": write_data("target", 6), "anchor": write_data("anchor", 6)}
    files = [word for role, path in data.items() for word in (f"--{role}", str(path))]
    return [
        "--model",
        str(tiny_model),
        *files,
        "--budget",
        "8",
        "--dim",
        "256",
        "--dtype",
        "float32",
        "--out",
        str(tmp_path / "o"),
    ]


def shown(path: Path) -> str:
    """The text of a report without its tags, in one line."""
    return " ".join(html.unescape(re.sub(r"<[^>]+>", " ", path.read_text())).split())


@pytest.mark.parametrize("method", [["ogs", *QUICK, "--epsilon", "1000"], ["ogs-static", "--risk", "conflict"]])
def test_warnings_stand_in_terminal_and_report_with_their_cure(
    method: list[str], words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gradsieve.selectors.reading.RELIABLE", 1.1)  # then no reference is reliable
    monkeypatch.setenv("COLUMNS", "400")
    assert run(["select", *method, *words]) == 0
    terminal, report = " ".join(capsys.readouterr().out.split()), shown(tmp_path / "o" / "report.html")
    notes = json.loads((tmp_path / "o" / "run.json").read_text())["notes"]
    for what, cure in (
        ("λ not binding:", r"to let it[:,] (use .* or )?a lower --"),
        (r"risk is zero for (9\d|100)% of the candidates", "--risk overlap or --against contrast"),
        (r"the reference 'anchor' is unreliable: its signal share is -?[\d.]+ .* with 6 examples", "give more of them"),
        (r"the reference 'target' is unreliable: .* with 6 examples", "give more of them"),
        ("the anchor has 6 usable examples", "300 to 500 in all"),
    ):
        (note,) = [note for note in notes if re.search(f"^{what}", note)]
        assert re.search(cure, note), note
        assert f"note: {note}" in terminal
        assert note in report
    both = r"overhead: choosing is [\d.]+% of the work of 3 epochs of LoRA training on the whole pool, and \d+% of 3 epochs on"
    for text in (terminal, report):
        assert re.search(both, text)
        assert re.search(r"anchor 6 -?[\d.−]+ [\d.–−]+ target 6 ", text)  # the reliability of every reference
    assert re.search(r"Rank correlation with answer length: .*utility [+-][\d.]+", terminal)
    assert "length correlation: utility" in report


def test_the_report_draws_the_trace_and_what_was_foreseen_beside_what_was_done(
    write_data: Write, tiny_model: Path, tmp_path: Path
) -> None:
    quick: dict[str, Any] = {"clusters": 3, "updates": 3, "episodes": 3, "batch": 2, "measurements": 2}
    sets = {name: str(write_data(name, n)) for name, n in (("pool", 20), ("target", 5), ("anchor", 6))}
    result = gs.select(
        "ogs", settings=quick | {"fidelity": "navigator"}, model=str(tiny_model), budget="9", out=tmp_path / "o", dim=256,
        dtype="float32", replay=(str(write_data("general", 8)),), navigator_rate=1e-2, **sets,
    )  # fmt: skip
    trace, drawn = result.selection.trace, page(result)
    panels = facts.step_panels(drawn)
    for name in ("cluster", "reward", "cost", "examples"):  # of every draw
        assert panels[name][""].tolist() == trace["steps"][name]
        assert len(panels[name][""]) == 5
    for name in ("lambda", "reward", "cost"):  # of every round of training
        assert f"training: {name}" in panels
    assert panels["training: lambda"][""].tolist() == trace["training"]["lambda"]
    for name in ("reward", "cost"):
        beside = panels[f"navigator: {name}"]
        assert set(beside) == {"measured", "simulated, as made", "simulated, scaled"}
        assert beside["measured"].tolist() == trace["navigator"][f"{name}/measured"]
    whole = content(drawn)
    assert {panel.name for panel in whole["figures"]["steps"]} >= {"cluster", "reward", "cost", "navigator: cost"}
    columns, rows = whole["tables"]["navigator_rounds"]
    assert {"cost, simulated", "cost, measured"} <= set(columns)
    assert [name for name, _ in rows] == ["round 1", "round 2"]
    assert {name for name, _ in whole["tables"]["measured"][1]} == {"ogs", "threshold", "random"}
    share = sum(example.id.startswith("general") for example in result.examples) / 9
    assert whole["recorded"]["replay_share"] == pytest.approx(share)
    names = dict(whole["tables"]["reference directions"][1])
    assert names["anchor"][0] == result.references["anchor"].count == 3  # the other three measure forgetting
    report = shown(tmp_path / "o" / "report.html")
    assert "replay share" in report
    assert "navigator: cost" in report
    sizes = trace["steps"]["examples"]
    assert sum(sizes) == 9
    assert set(sizes) <= {1, 2}  # a cluster's last draw may be short, so that the size of a batch does not follow from `batch`


def test_a_smaller_navigator_counts_by_its_size(write_data: Write, tiny_model: Path, tiny_llama: Any, tmp_path: Path) -> None:
    import shutil

    small = tmp_path / "small"
    shutil.copytree(tiny_model, small)
    tiny_llama(num_hidden_layers=1).save_pretrained(small)
    sets = {name: str(write_data(name, 8)) for name in ("pool", "target", "anchor")}
    common: dict[str, Any] = {"budget": "4", "dim": 256, "dtype": "float32", **sets}
    own = gs.select("orth-only", model=str(tiny_model), **common).overhead
    given = gs.select("orth-only", model=str(tiny_model), navigator=str(small), **common).overhead
    assert own is not None
    assert given is not None
    loaded = [find_model(str(folder)).load(torch.float32, "cpu") for folder in (small, tiny_model)]
    weights = [sum(parameter.numel() for parameter in model.parameters()) for model in loaded]
    assert weights[0] < 0.9 * weights[1]
    assert given.choosing == pytest.approx(own.choosing * weights[0] / weights[1])
    assert given.whole == own.whole
    with pytest.raises(gs.InvalidArgument, match="--model must name"):  # what the work is held against
        gs.select("orth-only", navigator=str(small), **common)


@pytest.mark.parametrize(("constraint", "passes"), [("kl", 2), ("loss", 1)])
def test_what_the_navigator_did_is_in_the_overhead(
    constraint: str, passes: int, write_data: Write, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained: list[int] = []
    step = LoRANavigator.step
    held: list[Any] = []

    def counted(navigator: LoRANavigator, rows: torch.Tensor) -> None:
        trained.append(sum(len(navigator._candidates[row].input_ids) for row in rows.tolist()))
        step(navigator, rows)

    monkeypatch.setattr(LoRANavigator, "step", counted)
    monkeypatch.setattr("gradsieve.run.split_anchor", lambda anchor: held.append(split_anchor(anchor)) or held[0])
    settings = {"clusters": 2, "updates": 1, "episodes": 2, "batch": 3, "measurements": 2, "fidelity": "navigator"}
    sets = {name: str(write_data(name, n)) for name, n in (("pool", 12), ("target", 4), ("anchor", 5))}
    result = gs.select(
        "ogs",
        settings={**settings, "constraint": constraint},
        model=str(tiny_model),
        budget="6",
        dim=256,
        dtype="float32",
        **sets,
    )
    assert result.overhead is not None
    pool, target, reference = (sum(result.sets[role].lengths) for role in ("pool", "target", "anchor"))
    gradients = pool + 2 * target + 2 * reference  # their own, and those of the references
    measured = 10 * (target + passes * sum(held[0][1].lengths))  # twice (start, two places), then twice (start, end)
    assert result.overhead.choosing == pytest.approx(gradients + sum(trained) + measured / 2)
