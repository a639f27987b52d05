"""A comparison in the processes of a launcher: all train together, the first does everything else."""

import json
import os
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml

from gradsieve.compare.config import Config, parse_config
from gradsieve.compare.run import Comparison
from gradsieve.errors import InvalidArgument


def results(study: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (study / "results.jsonl").read_text().splitlines()]


LAUNCHER = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")


def test_two_processes_of_a_launcher_train_every_cell_together(content: dict[str, Any], tmp_path: Path) -> None:
    warmed = {"method": "less", "settings": {"warmup_share": 0.5}}  # trains before it chooses, which the first does alone
    content |= {"arms": {"warmed": warmed, "whole": {"method": "random", "recipe": {"tuning": "full"}}}, "seeds": [0]}
    content["recipe"] |= {"learning_rate": 0.01, "warmup": 0}  # seen in what is measured
    path = tmp_path / "small.yaml"
    path.write_text(yaml.safe_dump(content))
    both = Comparison.of(parse_config(content, "small.yaml"))
    both.run(only=["random"])
    ran = subprocess.run([*LAUNCHER, "-m", "gradsieve.cli", "compare", str(path)], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    assert ran.stderr.count("cell 5 of 5: ") == ran.stdout.count("Look at ") == 1
    assert "torch.distributed" not in ran.stderr
    alone = Comparison.of(parse_config(content | {"out": str(tmp_path / "alone")}, "small.yaml"))
    alone.run()
    found = results(both.study)
    assert [one["training"].get("processes") for one in found] == [None, 2, 1, 2, 2]
    for one, other in zip(results(alone.study), found, strict=True):
        assert [one[key] for key in ("cell", "work", "inputs")] == [other[key] for key in ("cell", "work", "inputs")]
        assert (one["selection"] or {}).get("digest") == (other["selection"] or {}).get("digest")
        assert one["training"].get("last_loss", 0.0) == pytest.approx(other["training"].get("last_loss", 0.0), rel=1e-5)
        for test, means in one["means"].items():
            assert other["means"][test] == pytest.approx(means, rel=1e-4, abs=1e-6)
    losses = [one["means"]["asked"]["loss"] for one in found]
    assert min(abs(loss - losses[0]) for loss in losses[1:]) > 1e-2
    assert not list(both.study.glob("cells/*/training"))


def test_a_launcher_that_shards_weights_is_refused(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"WORLD_SIZE": "2", "RANK": "0", "ACCELERATE_USE_FSDP": "true"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(InvalidArgument, match="launched with plain data parallelism, got ACCELERATE_USE_FSDP"):
        Comparison.of(config).run()
    assert not Path(config.out).exists()


TEAM = """
import sys
from gradsieve.compare.team import Team
from gradsieve.errors import GradsieveError, ModelError
failing = sys.argv[1]

def lead(team):
    with team.leading():
        if failing == "first apart": raise ModelError("spoiled")
        with team.training("a cell"):
            if failing == "first": raise ModelError("spoiled")

def assist(team):
    for (cell,) in team.told():
        with team.joined():
            if failing == "other": raise ModelError("spoiled")

try:
    team = Team("cpu")
    (lead if team.first else assist)(team)
except GradsieveError as error:
    sys.exit(str(error))
"""


@pytest.mark.parametrize(
    ("failing", "ended", "says"),
    [("first apart", [True, False], 0), ("first", [True, True], 0), ("other", [True, True], 1)],
)
def test_an_error_in_one_process_ends_all_of_them(failing: str, ended: Sequence[bool], says: int) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    shared = {**os.environ, "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    team = [
        subprocess.Popen(
            [sys.executable, "-c", TEAM, failing],
            env=shared | {"RANK": rank, "LOCAL_RANK": rank},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in "01"
    ]
    told = [process.communicate(timeout=600)[1] for process in team]
    assert [process.returncode != 0 for process in team] == ended, told
    assert "spoiled" in told[says]  # who loses the connection may say so in torch's words, and torch's threads may abort it
