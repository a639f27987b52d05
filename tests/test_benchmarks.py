"""Benchmarks run on any causal language model; what they write for machines has the promised shape."""

from __future__ import annotations

import json
import math
import runpy
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from gradsieve import models
from gradsieve.selectors.ogs import OGS
from gradsieve.selectors.ogs_policy import PPO, train
from gradsieve.store import GradientStore
from gradsieve.types import Budget

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


def test_selecting_is_measured_from_a_store_that_it_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of two methods, one of them with a setting: they choose a tenth, and what they cost is there for machines."""
    small = ["--rows", "300", "--dim", "32", "--budget", "10%", "--folder", str(tmp_path)]
    small += ["--json", str(tmp_path / "table.json")]
    methods = ["--methods", "rds", "ogs-static utility=each"]
    command = [sys.executable, str(BENCHMARK.with_name("selection.py")), *small, *methods]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-2000:]
    lines = json.loads((tmp_path / "table.json").read_text())
    assert [(line["what"], line["n"], line["k"]) for line in lines] == [("rds", 300, 30), ("ogs-static utility=each", 300, 30)]
    assert all(line["peak"] >= line["before"] > 0 for line in lines)
    monkeypatch.setenv("GRADSIEVE_BENCHMARK", str(tmp_path))
    made, rows = runpy.run_path(str(BENCHMARK.with_name("selection.py"))), torch.arange(300)
    written, drawn = made["stored"](300, 32).candidates, made["problem_of"](300, 32).candidates
    assert list(written.ids) == list(drawn.ids)
    assert torch.equal(written.rows(rows).float(), drawn.rows(rows).float())


@pytest.mark.parametrize(("flags", "dtype"), [([], "float32"), (["--dtype", "auto"], "bfloat16")])
def test_the_navigator_is_compared_in_the_same_numbers_everywhere(
    flags: list[str], dtype: str, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setattr(models, "_fast_bfloat16", lambda _: True)
    small = ["--pool", "40", "--subsets", "6", "--size", "8", "--anchors", "12", "--targets", "6", "--out", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["ogs_navigator.py", "--model", str(tiny_model), *small, *flags])
    runpy.run_path(str(BENCHMARK.with_name("ogs_navigator.py")), run_name="__main__")
    assert GradientStore.open(tmp_path / "store" / "pool").manifest.settings["dtype"] == dtype
    assert f", {dtype}, learning rate" in capsys.readouterr().out


def test_the_simulator_takes_5000_steps_a_second_and_a_policy_a_minute_at_most() -> None:
    """At K = 16, d = 1024. A policy's time depends on clusters, references and steps, not on the size of the pool."""
    made = runpy.run_path(str(BENCHMARK.with_name("ogs.py")))
    env = OGS(clusters=16).environment(made["big"](2000), Budget(examples=1000), torch.Generator().manual_seed(0))
    assert max(made["steps_per_second"](env.simulator, 64) for _ in range(3)) >= 5000  # other work may take the processor
    ppo, start = PPO(updates=2), time.process_time()
    train(env.simulator, ppo, torch.Generator().manual_seed(0))
    assert (time.process_time() - start) / ppo.updates * PPO.updates <= 60
