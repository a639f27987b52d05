"""A comparison of tiny models in which every arm trains in a fraction of a second."""

import json
from pathlib import Path
from typing import Any

import pytest

from gradsieve.compare.config import Config, parse_config
from gradsieve.compare.run import Comparison

Content = dict[str, Any]


def small_content(folder: Path, tiny_model: Path) -> Content:
    """What a small comparison's YAML file says; its data are written to the folder."""
    sizes = {"pool": 24, "target": 6, "anchor": 8, "asked": 8, "sums": 6}
    for name, count in sizes.items():
        rows = [
            {
                "id": f"{name}-{i}",
                "prompt": f"{name} asks: what is {i} plus {i + 3}?",
                "completion": f"It is {2 * i + 3}, says {name}. The answer is {2 * i + 3}." + " Sure." * (i % 4),
                **({"category": "arithmetic"} if name == "anchor" else {}),
            }
            for i in range(count)
        ]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {
        "model": str(tiny_model),
        "pool": str(folder / "pool.jsonl"),
        "target": str(folder / "target.jsonl"),
        "anchor": str(folder / "anchor.jsonl"),
        "tests": {
            "asked": {"role": "target", "files": str(folder / "asked.jsonl")},
            "sums": {"role": "general", "files": str(folder / "sums.jsonl"), "limit": 4},
        },
        "arms": {"less": None, "agem": {"method": "random", "recipe": {"surgery": "agem", "anchor_batch": 2}}},
        "budgets": ["25%"],
        "seeds": [0, 1],
        "views": ["equal_steps"],
        "steps": 2,
        "recipe": {"batch": 4, "rank": 2},
        "gradients": {"dim": 256, "unit_tokens": 400, "batch_tokens": 200},
        "dtype": "float32",
        "metrics": ["loss", "key_accuracy", "kl"],
        "generations": 1,
        "resamples": 200,
        "out": str(folder / "study"),
    }


@pytest.fixture
def content(tiny_model: Path, tmp_path: Path) -> Content:
    return small_content(tmp_path, tiny_model)


@pytest.fixture
def config(content: Content) -> Config:
    return parse_config(content, "small.yaml")


@pytest.fixture(scope="session")
def finished(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Comparison:
    """A comparison that was run to its end; tests only read it."""
    config = parse_config(small_content(tmp_path_factory.mktemp("finished"), tiny_model), "small.yaml")
    comparison = Comparison.of(config)
    comparison.run()
    return comparison
