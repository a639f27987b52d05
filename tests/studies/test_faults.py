"""The table of planted faults that a study's arms chose, counted by hand."""

import json
import runpy
from pathlib import Path

SCRIPT = Path(__file__).parents[2] / "studies" / "faults.py"


def test_faults_are_counted_by_arm_and_averaged_over_its_seeds(tmp_path: Path) -> None:
    for seed, planted in enumerate((["clean", "swapped", "clean"], ["clean", "off-domain", "swapped"])):
        rows = [json.dumps({"id": f"{i}", "planted": kind}) for i, kind in enumerate(planted)]
        (tmp_path / f"pool-{seed}.jsonl").write_text("\n".join(rows) + "\n")
    cells = [("base", "base", None, None, []), ("a--0", "a", "20%", 0, ["0", "1"]), ("a--1", "a", "20%", 1, ["1", "2"])]
    cells += [("a--5", "a", "5%", 0, ["2"])]
    lines = []
    for name, arm, budget, seed, ids in cells:
        training = {"tokens": 120 * (1 + (seed or 0)), "epochs": 3.0}
        lines.append(json.dumps({"cell": name, "arm": arm, "budget": budget, "seed": seed, "training": training}))
        (tmp_path / "cells" / name).mkdir(parents=True)
        (tmp_path / "cells" / name / "selection.json").write_text(json.dumps({"ids": ids}))
    (tmp_path / "results.jsonl").write_text("\n".join(lines) + "\n")
    made = runpy.run_path(str(SCRIPT))
    assert made["table"](tmp_path, tmp_path, "20%") == [["a", "2", "0.5", "1.0", "0.5", "0.0", "0.0", "0.0", "30"]]
