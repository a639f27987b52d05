"""Gains by the source of the test's items, of cells that are made up."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np

from gradsieve.compare.records import write_items

SCRIPT = Path(__file__).parents[2] / "studies" / "by_source.py"
SOURCES = ["acts"] * 6 + ["courts"] * 5 + ["news"] * 2


def test_each_source_has_the_gain_over_random_of_its_own_items(tmp_path: Path) -> None:
    data, results = tmp_path / "law", tmp_path / "results"
    data.mkdir()
    rows = [{"id": f"t{i}", "source": f"{source}/x"} for i, source in enumerate(SOURCES)]
    (data / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in reversed(rows)))
    rng, lines = np.random.default_rng(0), []
    level = rng.normal(3, 1, len(SOURCES))
    taught = {"random": (0.0, 0.0, 0.0), "good": (0.3, -0.2, 9.0), "other": (0.3, 0.3, 0.3), "few": (0.1, 0.1, 0.1)}
    for arm, by_source in taught.items():
        for seed in range(2 if arm == "few" else 3):
            name, budget = f"{arm}-{seed}", "5%" if arm == "other" else "20%"
            gain = np.array([dict(zip(("acts", "courts", "news"), by_source, strict=True))[source] for source in SOURCES])
            values = {"law": {"loss": level - gain + rng.normal(0, 0.001, len(SOURCES))}}
            (results / "cells" / name).mkdir(parents=True)
            write_items(results / "cells" / name / "items.parquet", {"law": [row["id"] for row in rows]}, values)
            lines.append({"cell": name, "arm": arm, "budget": budget, "seed": seed})
    write_items(_made(results / "cells" / "base") / "items.parquet", {"law": [row["id"] for row in rows]}, values)
    lines.append({"cell": "base", "arm": "base", "budget": None, "seed": None})
    (results / "results.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    command = [sys.executable, str(SCRIPT), "--data", str(data), "--results", str(results)]
    head, _, *found = subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()
    assert head == "| arm | acts (6 items) | courts (5 items) |"
    assert len(found) == 1
    assert found[0].startswith("| good | **+0.3")
    assert "| **−0.2" in found[0] or "| **−0.19" in found[0]


def _made(folder: Path) -> Path:
    folder.mkdir(parents=True)
    return folder
