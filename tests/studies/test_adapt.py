"""The model that the adapted study starts from: trained on nothing that the study looks at, and saved with what it learnt."""

import gzip
import json
import runpy
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

STUDIES = Path(__file__).parents[2] / "studies"


def rows(name: str, count: int) -> list[dict[str, Any]]:
    letters = "abcdefghij"
    words = [" ".join(f"{name}{letters[i % 10]}{letters[i // 10]}{letters[k]}" for k in range(6)) for i in range(count)]
    return [{"id": f"{name}-{i}", "prompt": f"What is {text}?", "completion": f"{text}."} for i, text in enumerate(words)]


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path]:
    sets, data = tmp_path / "sets", tmp_path / "data"
    sets.mkdir()
    data.mkdir()
    anchor = []
    for name in ("general", "math"):
        train, test = rows(name, 24), rows(f"{name}test", 4)
        anchor += train[:8]
        with gzip.open(sets / f"{name}.train.jsonl.gz", "wt") as file:
            file.writelines(json.dumps(row) + "\n" for row in [*train, {**test[0], "id": f"{name}-stolen"}])
        (data / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in test))
    (data / "anchor.jsonl").write_text("".join(json.dumps(row) + "\n" for row in anchor))
    return sets, data


@pytest.fixture
def adapt(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    monkeypatch.syspath_prepend(STUDIES)
    return runpy.run_path(str(STUDIES / "adapt.py"))


def test_the_rows_are_in_no_anchor_and_no_test(folders: tuple[Path, Path], adapt: dict[str, Any]) -> None:
    ids = [example.id for example in adapt["lessons"](*folders, 16)]
    assert sorted(ids) == sorted(f"{name}-{i}" for name in ("general", "math") for i in range(8, 24))
    with pytest.raises(SystemExit, match="general must have 17 usable rows, got 16"):
        adapt["lessons"](*folders, 17)


def test_the_model_is_saved_with_what_it_learnt(
    folders: tuple[Path, Path], adapt: dict[str, Any], tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "adapted"
    arguments = ["--source", folders[0], "--data", folders[1], "--out", out, "--model", tiny_model, "--rows", 8]
    monkeypatch.setattr(sys, "argv", ["adapt.py", *map(str, arguments)])
    adapt["main"]()
    before, after = (AutoModelForCausalLM.from_pretrained(folder).eval() for folder in (tiny_model, out))
    assert (out / "tokenizer.json").exists()
    assert after.state_dict().keys() == before.state_dict().keys()
    ids = torch.arange(12)[None]
    with torch.no_grad():
        changed = (after(ids).logits - before(ids).logits).abs().max()
    assert changed > 1e-5
