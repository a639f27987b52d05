"""A run that was killed, or has two processes, ends where an undisturbed one in one process ends."""

import dataclasses
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from gradsieve.train import finetune

from .conftest import FULL, PLAIN, assert_same, examples, gpt2, llama

SHARED = dataclasses.replace(FULL, batch=5, order="shuffled", surgery="agem", anchor_batch=3)  # a batch of 1 at the end


def test_a_killed_run_goes_on_to_the_same_weights(tmp_path: Path) -> None:
    script = tmp_path / "killed.py"
    script.write_text(
        "import os, signal, sys\n"
        "from pathlib import Path\n"
        "from gradsieve.train import finetune\n"
        "from tests_train import examples, llama, recipe\n"
        "def kill(stage, done, total):\n"
        "    if done > 0.6 * total: os.kill(os.getpid(), signal.SIGKILL)\n"
        "finetune(llama(), examples(10), recipe, Path(sys.argv[1]), progress=kill)\n"
    )
    helper = Path(__file__).with_name("conftest.py").read_text()
    helper += "\nfrom gradsieve.train import Recipe\n"
    recipe = dataclasses.replace(PLAIN, order="shuffled", dropout=0.3, epochs=4, save_steps=2)
    (tmp_path / "tests_train.py").write_text(helper + f"recipe = {recipe!r}\n")
    killed = subprocess.run([sys.executable, str(script), str(tmp_path / "run")], capture_output=True, text=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert not (tmp_path / "run" / "trained.json").exists()
    left = sorted(path.name for path in (tmp_path / "run" / "checkpoints").glob("checkpoint-*"))
    assert left == ["checkpoint-6"]
    (tmp_path / "run" / "checkpoints" / "checkpoint-8").mkdir()  # as if it had been killed while it saved
    done: list[int] = []
    resumed = finetune(llama(), examples(10), recipe, tmp_path / "run", progress=lambda _, d, t: done.append(d))
    straight = finetune(llama(), examples(10), recipe, tmp_path / "straight")
    assert len(done) == 2 * (12 - 6)  # before and after each step
    assert resumed.losses == straight.losses
    assert resumed.tokens == straight.tokens == done[-1]
    assert_same(resumed.model, straight.model, atol=0)
    assert list((tmp_path / "run" / "checkpoints").glob("checkpoint-*")) == []


def test_two_processes_train_what_one_trains(tmp_path: Path) -> None:
    here = Path(__file__).parent
    script = tmp_path / "two.py"
    script.write_text(
        f"import sys\nsys.path.insert(0, {str(here)!r})\n"
        "from pathlib import Path\n"
        "import torch\n"
        "from conftest import examples, gpt2\n"
        "from gradsieve.train import Recipe, finetune\n"
        f"recipe = {SHARED!r}\n"
        "finetune(gpt2(torch.float64), examples(11), recipe, Path(sys.argv[1]), anchor=examples(3, 5), weights=range(11))\n"
        f"recipe = {dataclasses.replace(SHARED, surgery='pcgrad')!r}\n"
        "model = gpt2(torch.float64, dropout=0.2)\n"
        "finetune(model, examples(11), recipe, Path(sys.argv[1] + '-dropout'), anchor=examples(3, 5))\n"
        "weights = torch.cat([p.detach().flatten() for p in model.parameters()])\n"
        "torch.save(weights, sys.argv[1] + f'-weights-{torch.distributed.get_rank()}')\n"
    )
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script)]
    ran = subprocess.run([*command, str(tmp_path / "two")], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    one, two = gpt2(torch.float64), gpt2(torch.float64)
    alone = finetune(one, examples(11), SHARED, tmp_path / "one", anchor=examples(3, 5), weights=range(11))
    both = finetune(two, examples(11), SHARED, tmp_path / "two", anchor=examples(3, 5), weights=range(11))  # loads it
    assert_same(two, one)
    assert both.losses == pytest.approx(alone.losses, rel=1e-5)
    assert (both.conflicts, both.tokens) == (alone.conflicts, alone.tokens)
    assert both.conflicts > 0
    first, second = (torch.load(tmp_path / f"two-weights-{rank}", weights_only=True) for rank in (0, 1))
    assert torch.equal(first, second)  # though each process drops other units
