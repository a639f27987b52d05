import json
from pathlib import Path

import pytest

from gradsieve import cli
from gradsieve.demo_run import SETTINGS
from gradsieve.selectors import SELECTORS


@pytest.mark.demo
def test_demo_is_accepted_wherever_a_model_or_a_file_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "job.yaml").write_text("model: demo\npool: demo:40\ntarget: demo:4\nwarmup_share: 0\n")
    assert (
        cli.run(["select", "less", "--config", str(tmp_path / "job.yaml"), "--budget", "10", "--out", str(tmp_path / "o")]) == 0
    )
    assert "less chose 10 of 40 examples." in capsys.readouterr().out
    rows = [json.loads(line) for line in (tmp_path / "o" / "selected.jsonl").read_text().splitlines()]
    assert all(row["planted"] != "false-arithmetic" for row in rows)  # nothing in the target resembles it
    assert json.loads((tmp_path / "o" / "run.json").read_text())["inputs"]["pool"]["files"] == ["demo:40"]


def test_the_table_counts_kinds_and_means(capsys: pytest.CaptureFixture[str]) -> None:
    from types import SimpleNamespace

    import torch
    from rich.console import Console

    import gradsieve as gs
    from gradsieve.demo_run import kinds_table

    kinds = ["clean", "clean", "swapped", "off-domain"]
    pool = [gs.Example(str(i), (), json.dumps({"planted": kind}).encode(), "memory") for i, kind in enumerate(kinds)]
    selection = gs.Selection(
        torch.tensor([0, 2]), torch.ones(2), torch.zeros(4), {"utility": [0.5, 0.1, 0.3, 0.1], "risk": [0.0, None, 0.2, 0.4]}
    )
    result = SimpleNamespace(
        sets={"pool": SimpleNamespace(examples=pool)}, pool=SimpleNamespace(ids=["0", "1", "2", "3"]), selection=selection
    )
    Console(width=120).print(kinds_table(result))  # type: ignore[arg-type]
    shown = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["clean", "2", "50.0%", "1", "50.0%"] in shown
    assert ["swapped", "1", "25.0%", "1", "50.0%"] in shown
    assert ["mean", "utility", "0.2500", "0.4000"] in shown
    assert ["mean", "risk", "0.2000", "0.1000"] in shown


def test_the_demos_settings_are_those_of_its_methods() -> None:
    for method, settings in SETTINGS.items():
        SELECTORS[method](**settings)
