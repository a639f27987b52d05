"""How a training runs: its seed and random states, what trackers see, no network, no output, its checkpoints."""

import dataclasses
import json
import random
import socket
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from gradsieve.errors import InvalidArgument, MissingExtra
from gradsieve.train import finetune
from gradsieve.train.checks import deciding

from .conftest import FULL, PLAIN, examples, gpt2, llama


def test_the_seed_decides_and_the_callers_random_states_stay(tmp_path: Path) -> None:
    recipe = dataclasses.replace(PLAIN, order="shuffled", dropout=0.2)

    def losses(name: str, seed: int) -> tuple[float, ...]:
        torch.manual_seed(len(name))
        trained = finetune(model, examples(6), dataclasses.replace(recipe, seed=seed), tmp_path / name)
        trained.restore()
        return trained.losses

    model = llama()
    states = random.getstate(), np.random.get_state()[1].tolist()  # type: ignore[index]  # noqa: NPY002
    assert losses("a", 1) == losses("other", 1)
    assert losses("b", 2) != losses("c", 3)
    assert (random.getstate(), np.random.get_state()[1].tolist()) == states  # type: ignore[index]  # noqa: NPY002


def test_a_run_with_dropout_goes_on_with_the_same_micro_batches_only(tmp_path: Path) -> None:
    plain, dropping, tokens = PLAIN, dataclasses.replace(PLAIN, dropout=0.2), examples(6)
    other = [dataclasses.replace(recipe, micro_batch=1) for recipe in (plain, dropping)]
    model = llama()
    for name, recipe in (("plain", plain), ("dropping", dropping)):
        finetune(model, tokens, recipe, tmp_path / name).restore()
    finetune(model, tokens, other[0], tmp_path / "plain").restore()
    with pytest.raises(InvalidArgument, match="micro_batch 2 there, 1 here"):
        finetune(model, tokens, other[1], tmp_path / "dropping")
    assert "micro_batch" not in deciding(plain.to_mapping())  # the fingerprints of earlier runs stay what they were


def test_the_anchors_gradient_is_part_of_what_surgery_takes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from gradsieve.train.trainer import PlannedTrainer

    taken = PlannedTrainer._gradient

    def slow(*arguments: Any) -> Any:
        time.sleep(0.1)
        return taken(*arguments)

    monkeypatch.setattr(PlannedTrainer, "_gradient", slow)
    recipe = dataclasses.replace(PLAIN, surgery="agem", anchor_batch=2)
    trained = finetune(llama(), examples(6), recipe, tmp_path, anchor=examples(3, 5))
    assert 0.1 * trained.steps < trained.surgery_seconds < trained.seconds


def test_what_tensorboard_reads_is_kept_beside_the_checkpoints(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reading = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    recipe = dataclasses.replace(PLAIN, report_to=("tensorboard",))
    for folder, elsewhere in ((tmp_path / "a", None), (tmp_path / "b", tmp_path / "logs")):
        if elsewhere:
            monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(elsewhere))
        trained = finetune(llama(), examples(6), recipe, folder)
        log = reading.EventAccumulator(str(elsewhere or folder / "tensorboard")).Reload()
        assert [event.value for event in log.Scalars("train/loss")] == pytest.approx(trained.losses)
    assert not (tmp_path / "b" / "tensorboard").exists()


def test_each_training_is_a_run_of_its_own_in_wandb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from types import SimpleNamespace

    from transformers import TrainerCallback, integrations
    from transformers.integrations import integration_utils

    runs: list[str] = []
    wandb = SimpleNamespace(run=None, finish=lambda: setattr(wandb, "run", None))

    class Tracker(TrainerCallback):  # type: ignore[misc]
        def on_train_begin(self, args: Any, *_: Any, **__: Any) -> None:
            if wandb.run is None:
                wandb.run = args.run_name
                runs.append(args.run_name)

    monkeypatch.setitem(sys.modules, "wandb", wandb)
    monkeypatch.setitem(integration_utils.INTEGRATION_TO_CALLBACK, "wandb", Tracker)
    monkeypatch.setattr(integrations, "get_available_reporting_integrations", lambda: ["wandb"])
    recipe = dataclasses.replace(PLAIN, report_to=("wandb",))
    finetune(llama(), examples(6), recipe, tmp_path / "first")
    finetune(llama(), examples(6), recipe, tmp_path / "second", name="the second")
    assert runs == ["first", "the second"]
    assert wandb.run is None
    wandb.run = "the caller's"
    finetune(llama(), examples(6), recipe, tmp_path / "third")
    assert (runs[2:], wandb.run) == ([], "the caller's")


def test_a_tracker_that_is_named_gets_every_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import TrainerCallback, integrations
    from transformers.integrations import integration_utils

    seen: list[dict[str, float]] = []

    class Tracker(TrainerCallback):  # type: ignore[misc]
        def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float], **_: Any) -> None:
            seen.append(logs)

    monkeypatch.setitem(integration_utils.INTEGRATION_TO_CALLBACK, "tensorboard", Tracker)
    monkeypatch.setattr(integrations, "get_available_reporting_integrations", lambda: ["tensorboard"])
    recipe = dataclasses.replace(PLAIN, report_to=("tensorboard",))
    trained = finetune(llama(), examples(6), recipe, tmp_path)
    steps = [logs for logs in seen if "loss" in logs]
    assert tuple(logs["loss"] for logs in steps) == trained.losses
    assert [logs["epoch"] for logs in steps] == pytest.approx([4 / 6, 1, 10 / 6, 2])
    assert [logs["learning_rate"] for logs in steps][:2] == pytest.approx([0.0, 1e-2])
    with pytest.raises(MissingExtra, match="report_to names wandb, which is not installed; pip install wandb"):
        finetune(llama(), examples(6), dataclasses.replace(PLAIN, report_to=("wandb",)), tmp_path)
    with pytest.raises(InvalidArgument, match="report_to must name trackers of transformers, got 'wandbx'"):
        finetune(llama(), examples(6), dataclasses.replace(PLAIN, report_to=("wandbx",)), tmp_path)


def test_no_network_is_needed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import peft.utils.save_and_load
    import trl.trainer.base_trainer

    asked: list[Any] = []
    monkeypatch.setattr(socket.socket, "connect", lambda *address: asked.append(address))
    monkeypatch.setattr(socket, "getaddrinfo", lambda *address, **_: asked.append(address))
    monkeypatch.setattr(trl.trainer.base_trainer, "send_telemetry", lambda **sent: asked.append(sent))
    monkeypatch.setattr(peft.utils.save_and_load, "check_file_exists_on_hf_hub", lambda *file: asked.append(file))
    monkeypatch.delenv("CI", raising=False)
    model = llama()
    model.name_or_path = "somebody/a-model"  # as one from the hub is called
    finetune(model, examples(4), dataclasses.replace(PLAIN, save_epochs=True), tmp_path).restore()
    assert asked == []


def test_a_run_prints_and_warns_of_nothing(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    model = gpt2()
    model.config.pad_token_id = 2
    finetune(model, examples(4), FULL, tmp_path)
    assert model.config.pad_token_id == 2
    assert capfd.readouterr() == ("", "")


def test_epochs_leave_checkpoints_with_the_optimizer_and_their_mean_rate(tmp_path: Path) -> None:
    model = llama()
    recipe = dataclasses.replace(PLAIN, save_epochs=True, save_steps=1, epochs=2, schedule="constant")
    trained = finetune(model, examples(6), recipe, tmp_path)
    assert [(c.folder.name, c.epoch) for c in trained.checkpoints] == [("checkpoint-2", 1.0), ("checkpoint-4", 2.0)]
    assert [c.learning_rate for c in trained.checkpoints] == pytest.approx([(0 + 1e-2) / 2, 1e-2])
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["checkpoint-2", "checkpoint-4"]
    last = trained.checkpoints[-1].folder
    names = json.loads((last / "parameters.json").read_text())
    state = torch.load(last / "optimizer.pt", weights_only=True)["state"]
    shapes = dict(trained.model.named_parameters())
    assert [tuple(state[i]["exp_avg"].shape) for i in range(len(names))] == [tuple(shapes[name].shape) for name in names]
    assert len(names) == sum(p.requires_grad for p in trained.model.parameters())
    trained.restore()
