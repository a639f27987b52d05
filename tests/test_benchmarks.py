"""The benchmark of extraction runs on any causal language model, and what it writes for machines has the promised shape."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

BENCHMARK = Path(__file__).parents[1] / "benchmarks" / "extract.py"


def test_the_table_for_machines_has_every_row_and_exact_columns(tiny_llama: Callable[..., Any], tmp_path: Path) -> None:
    tiny_llama(num_hidden_layers=4, tie_word_embeddings=True, initializer_range=0.2).save_pretrained(tmp_path / "model")
    table = tmp_path / "table.json"
    arguments = [str(BENCHMARK), "--model", str(tmp_path / "model"), "--shape", "2x24", "--repeats", "1"]
    arguments += ["--peers", str(tmp_path), "--json", str(table)]
    run = subprocess.run([sys.executable, *arguments], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-2000:]
    report = json.loads(table.read_text())
    assert {"rows", "machine", "versions"} <= set(report)
    for row in report["rows"]:
        assert {"name", "over_floor", "over_plain", "peak_mib", "max_rel_error"} <= set(row)
        assert row["over_floor"] > 0
        assert row["over_plain"] > 0
        assert not math.isnan(row["peak_mib"])
    errors = {row["name"]: row["max_rel_error"] for row in report["rows"]}
    exact = [name for name, error in errors.items() if error is not None]
    checked = {"+ norm, 4 references", "+ max, min per layer", "sketch and norm of LoRA", "sketch and norm of last:4"}
    assert checked <= set(exact)
    assert all(errors[name] < 1e-4 for name in exact)
    assert {"2x24"} == set(report["ratios"])
    for peer in ("bergson, 16 x 16 per layer", "dattri-llm, LoGRA 16 x 16 per layer", "Opacus, whole gradients"):
        assert peer in errors or "No module named" in report["missing"][peer]
        assert peer in run.stdout
