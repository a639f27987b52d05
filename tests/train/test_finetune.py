"""Training against a loop written out: one backward per example, AdamW and the schedule by hand."""

import dataclasses
import json
import math
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import SafetensorError

from gradsieve.data import IGNORE, Tokens
from gradsieve.errors import DataError, InvalidArgument, MissingExtra, ModelError
from gradsieve.train import Recipe, finetune
from gradsieve.train.lending import _checkpoints_activations

from .conftest import examples, gpt2, llama
from .test_loss import loss_naive

PLAIN = Recipe(batch=4, micro_batch=2, epochs=2, order="selection", learning_rate=1e-2, device="cpu", save_steps=99)
FULL = dataclasses.replace(PLAIN, tuning="full")
SHARED = dataclasses.replace(FULL, batch=5, order="shuffled", surgery="agem", anchor_batch=3)  # a batch of 1 at the end


def gradient_naive(model: Any, tokens: Sequence[Tokens], weights: Sequence[float]) -> dict[str, torch.Tensor]:
    """Returns (1/B) sum_i w_i grad l(z_i), one backward per example."""
    total: dict[str, torch.Tensor] = {}
    for example, weight in zip(tokens, weights, strict=True):
        model.zero_grad()
        loss_naive(model, example).backward()
        for name, p in model.named_parameters():
            total[name] = total.get(name, 0) + weight * p.grad / len(tokens)
    return total


def train_naive(
    model: Any,
    steps: Sequence[Sequence[tuple[Tokens, float]]],
    *,
    rate: float,
    warmup: int,
    clip: float = 1.0,
    decay: float = 0.01,
    surgery: Callable[[int, dict[str, torch.Tensor]], dict[str, torch.Tensor]] = lambda _, g: g,
) -> None:
    """AdamW (Loshchilov & Hutter 2019) with a cosine that starts after a linear warm-up."""
    m = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    v = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    for t, step in enumerate(steps):
        g = surgery(t, gradient_naive(model, [z for z, _ in step], [w for _, w in step]))
        norm = torch.stack([x.square().sum() for x in g.values()]).sum().sqrt()
        scale = min(1.0, clip / (float(norm) + 1e-6)) if clip else 1.0
        after = (t - warmup) / max(1, len(steps) - warmup)
        eta = rate * (t / warmup if t < warmup else 0.5 * (1 + math.cos(math.pi * after)))
        with torch.no_grad():
            for name, p in model.named_parameters():
                m[name] = 0.9 * m[name] + 0.1 * g[name] * scale
                v[name] = 0.999 * v[name] + 0.001 * (g[name] * scale) ** 2
                decays = decay if p.ndim > 1 else 0.0
                p -= eta * decays * p
                p -= eta * (m[name] / (1 - 0.9 ** (t + 1))) / ((v[name] / (1 - 0.999 ** (t + 1))).sqrt() + 1e-8)


def assert_same(model: Any, twin: Any, atol: float = 1e-9) -> None:
    for (name, p), q in zip(model.named_parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p.detach(), q.detach(), atol=atol, rtol=0, msg=lambda text, name=name: f"{name}: {text}")


# -- the step is that of the gradients -----------------------------------------------------------------------------------


def test_training_is_the_loop_written_out(make_model: Callable[..., Any], tmp_path: Path) -> None:
    model, twin, tokens = make_model(torch.float64), make_model(torch.float64), examples(6)
    weights = [0.5, 0.0, 2.0, 1.0, 1.5, 4.0]
    trained = finetune(model, tokens, FULL, tmp_path, weights=weights)
    pairs = [(z, w / 1.5) for z, w in zip(tokens, weights, strict=True)]  # mean weight 1
    train_naive(twin, [pairs[:4], pairs[4:]] * 2, rate=1e-2, warmup=1)
    assert_same(model, twin, atol=1e-9 if make_model is gpt2 else 1e-6)  # Llama's norms are taken in float32
    assert trained.model is model
    assert trained.steps == 4
    assert trained.epochs == 2
    assert trained.tokens == 2 * sum(len(t.input_ids) for t in tokens)


def test_unweighted_steps_without_clipping_or_decay(tmp_path: Path) -> None:
    model, twin, tokens = gpt2(torch.float64), gpt2(torch.float64), examples(5)
    recipe = dataclasses.replace(FULL, epochs=None, steps=3, max_grad_norm=0.0, weight_decay=0.0, warmup=0.0)
    trained = finetune(model, tokens, recipe, tmp_path)
    cycle = [(z, 1.0) for z in tokens] * 3
    train_naive(twin, [cycle[0:4], cycle[4:8], cycle[8:12]], rate=1e-2, warmup=0, clip=0.0, decay=0.0)
    assert_same(model, twin)
    assert (trained.steps, trained.epochs) == (3, 12 / 5)
    start = gpt2(torch.float64)
    assert trained.losses[0] == pytest.approx(np.mean([loss_naive(start, z).item() for z in tokens[:4]]), abs=1e-6)


def test_the_size_of_micro_batches_and_padding_do_not_matter(tmp_path: Path) -> None:
    results = []
    for size in (1, 3, 64):
        model = gpt2(torch.float64)
        finetune(model, examples(6), dataclasses.replace(FULL, micro_batch=size), tmp_path / str(size))
        results.append(model)
    assert_same(results[0], results[1])
    assert_same(results[0], results[2])


@pytest.mark.parametrize("surgery", ["agem", "pcgrad"])
def test_surgery_in_the_step_is_that_on_gradients_written_out(surgery: Any, tmp_path: Path) -> None:
    from .test_surgery import agem_naive, pcgrad_naive

    model, twin, tokens = gpt2(torch.float64), gpt2(torch.float64), examples(4)
    # The same prompts with other answers: some steps conflict.
    anchor = [Tokens(z.input_ids, z.labels, False) for z in examples(3, seed=5)]
    recipe = dataclasses.replace(FULL, epochs=6, surgery=surgery, anchor_batch=3, warmup=0.0)
    trained = finetune(model, tokens, recipe, tmp_path, anchor=anchor)
    conflicts = 0

    def operate(_: int, g: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        nonlocal conflicts
        r = gradient_naive(twin, anchor, [1.0] * 3)
        flat = [torch.cat([x[name].flatten() for name in g]).numpy() for x in (g, r)]
        conflicts += bool(flat[0] @ flat[1] < 0)
        operated = agem_naive(*flat) if surgery == "agem" else pcgrad_naive(flat)
        sizes = [x.numel() for x in g.values()]
        pieces = torch.from_numpy(operated).split(sizes)
        return {name: piece.reshape(x.shape) for (name, x), piece in zip(g.items(), pieces, strict=True)}

    train_naive(twin, [[(z, 1.0) for z in tokens]] * 6, rate=1e-2, warmup=0, surgery=operate)
    assert_same(model, twin)
    assert trained.conflicts == conflicts
    assert 0 < trained.surgery_seconds < trained.seconds


def test_a_batch_mixes_replayed_examples_in(tmp_path: Path) -> None:
    from gradsieve.train.plan import make_plan

    model, twin, tokens, replay = gpt2(torch.float64), gpt2(torch.float64), examples(6), examples(3, seed=7)
    recipe = dataclasses.replace(FULL, epochs=None, steps=3, replay_share=0.5)
    finetune(model, tokens, recipe, tmp_path, replay=replay, weights=[3.0] * 6)
    everything = [(z, 1.0) for z in [*tokens, *replay]]
    train_naive(twin, [[everything[row] for row in step.rows] for step in make_plan(recipe, 6, 3)], rate=1e-2, warmup=1)
    assert_same(model, twin)


# -- adapters ------------------------------------------------------------------------------------------------------------


def state_of(model: Any) -> dict[str, Any]:
    return {
        "weights": {name: tensor.clone() for name, tensor in model.state_dict().items()},
        "modules": [(name, type(module)) for name, module in model.named_modules()],
        "requires": [p.requires_grad for p in model.parameters()],
        "training": [module.training for module in model.modules()],
        "checkpointing": _checkpoints_activations(model),
        "config": model.config.to_dict(),
        "generation": model.generation_config.to_dict(),
        "attributes": sorted(name for name in vars(model) if name != "_is_hf_initialized"),
        "hooks": [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()],
    }


def assert_untouched(model: Any, before: dict[str, Any]) -> None:
    after = state_of(model)
    assert all(torch.equal(before["weights"][name], tensor) for name, tensor in after.pop("weights").items())
    assert after == {key: value for key, value in before.items() if key != "weights"}


@pytest.mark.parametrize(
    ("make_model", "extra"),
    [(llama, {}), (gpt2, {"gradient_checkpointing": True, "dtype": "bfloat16", "dropout": 0.1})],
    ids=["llama", "gpt2, with everything on"],
)
def test_adapters_learn_and_come_off_without_a_trace(
    make_model: Callable[..., Any], extra: dict[str, Any], tmp_path: Path
) -> None:
    model, tokens = make_model().train(not extra), examples(6)
    model.lm_head.weight.requires_grad_(False)
    next(model.base_model.children()).train(bool(extra))  # a part in another mode than the rest
    before = state_of(model)
    recipe = dataclasses.replace(PLAIN, epochs=8, rank=4, **extra)
    first = finetune(model, tokens, recipe, tmp_path / "first")
    assert not first.model.training
    assert sum(first.losses[-2:]) < sum(first.losses[:2])
    adapted = {name.split(".lora_")[0].split(".")[-1] for name in first.model.state_dict() if "lora_A" in name}
    assert "lm_head" not in adapted
    assert len(adapted) == (7 if "llama" in type(model).__name__.lower() else 3)
    probe = {"input_ids": torch.arange(3, 9)[None]}
    with torch.no_grad():
        changed = first.model(**probe).logits
    assert first.restore() is model
    assert_untouched(model, before)
    loaded = finetune(model, tokens, recipe, tmp_path / "first")
    with torch.no_grad():
        assert torch.equal(loaded.model(**probe).logits, changed)
    assert (loaded.losses, loaded.seconds, loaded.steps) == (first.losses, first.seconds, first.steps)
    loaded.restore()
    assert_untouched(model, before)
    second = finetune(model, tokens, recipe, tmp_path / "second")
    assert second.losses == first.losses
    second.restore()


def test_an_error_in_the_middle_takes_the_adapters_off(tmp_path: Path) -> None:
    model, tokens = llama(), examples(6)
    before = state_of(model)

    def interrupt(stage: str, done: int, total: int) -> None:
        if done > total / 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        finetune(model, tokens, PLAIN, tmp_path, progress=interrupt)
    assert_untouched(model, before)


def test_an_error_after_the_last_step_or_while_loading_takes_the_adapters_off(tmp_path: Path) -> None:
    model, tokens = llama(), examples(4)
    before = state_of(model)
    finetune(model, tokens, PLAIN, tmp_path).restore()
    weights = tmp_path / "model" / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    with pytest.raises(SafetensorError):
        finetune(model, tokens, PLAIN, tmp_path)
    assert_untouched(model, before)

    def block(stage: str, done: int, total: int) -> None:
        (tmp_path / "full" / "trained.json").mkdir(exist_ok=True)  # so that it cannot be written

    with pytest.raises(DataError, match=r"trained\.json: cannot be written"):
        finetune(model, tokens, PLAIN, tmp_path / "full", progress=block)
    assert_untouched(model, before)


def test_a_model_that_recomputes_activations_still_does_afterwards(tmp_path: Path) -> None:
    model = llama()
    getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
    before = state_of(model)
    finetune(model, examples(4), PLAIN, tmp_path).restore()
    assert before["checkpointing"]
    assert_untouched(model, before)


def test_full_training_leaves_a_plain_model_that_cannot_be_restored(tmp_path: Path) -> None:
    model = llama()
    trained = finetune(model, examples(5), FULL, tmp_path)
    assert "forward" not in vars(model)
    with pytest.raises(InvalidArgument, match="load the model again"):
        trained.restore()
    fresh = llama()
    again = finetune(fresh, examples(5), FULL, tmp_path)
    assert_same(fresh, model, atol=0)
    assert again.losses == trained.losses


# -- the run -------------------------------------------------------------------------------------------------------------


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
    assert len(done) == 12 - 6
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


# -- what is refused -----------------------------------------------------------------------------------------------------


def test_a_folder_of_another_run_is_refused(tmp_path: Path) -> None:
    model = llama()
    finetune(model, examples(4), PLAIN, tmp_path).restore()
    with pytest.raises(InvalidArgument, match="where rank 16 there, 8 here; name another folder"):
        finetune(model, examples(4), dataclasses.replace(PLAIN, rank=8, micro_batch=3, save_steps=1), tmp_path)
    with pytest.raises(InvalidArgument, match="where model, examples or weights differ"):
        finetune(model, examples(5), PLAIN, tmp_path)
    with pytest.raises(InvalidArgument, match="where model, examples or weights differ"):
        finetune(model, examples(4), PLAIN, tmp_path, weights=[1, 2, 1, 1])
    with pytest.raises(InvalidArgument, match="where model, examples or weights differ"):
        finetune(gpt2(), examples(4), PLAIN, tmp_path)


def test_arguments_that_do_not_fit_each_other_are_refused(tmp_path: Path) -> None:
    model, some = llama(), examples(2)

    def refused(match: str, kind: type[Exception] = InvalidArgument, **changes: Any) -> None:
        arguments = {"model": model, "tokens": some, "recipe": PLAIN, "out": tmp_path, **changes}
        with pytest.raises(kind, match=match):
            finetune(**arguments)

    refused("tokens must hold at least one example", tokens=[])
    refused("weights must be one per example", weights=[1.0])
    refused("weights must be finite, at least 0 and not all 0", weights=[0.0, 0.0])
    refused("weights must be finite, at least 0 and not all 0, got -1 to 1", weights=[1.0, -1.0])
    refused("anchor must hold examples with surgery agem", recipe=dataclasses.replace(PLAIN, surgery="agem"))
    refused("anchor must be empty with surgery none", anchor=some)
    refused("replay must hold examples with replay_share 0.5", recipe=dataclasses.replace(PLAIN, replay_share=0.5))
    refused("replay must be empty with replay_share 0", replay=some)
    refused("warmup must leave a step", recipe=dataclasses.replace(PLAIN, epochs=1))
    refused("full tuning needs float32 weights", ModelError, model=llama(torch.bfloat16), recipe=FULL)
    refused("must be a plain model of transformers", ModelError, model=torch.nn.Linear(2, 2))
    masked = Tokens(some[0].input_ids, np.full_like(some[0].labels, IGNORE), False)
    refused(r"replay\[1\] must have a completion token", DataError, replay=[some[0], masked])


def test_a_model_that_still_has_adapters_is_refused(tmp_path: Path) -> None:
    model = llama()
    trained = finetune(model, examples(4), PLAIN, tmp_path / "one")
    with pytest.raises(ModelError, match=r"call restore\(\)"):
        finetune(model, examples(4), PLAIN, tmp_path / "two")
    with pytest.raises(ModelError, match="plain model"):
        finetune(trained.model, examples(4), PLAIN, tmp_path / "two")


def test_a_loss_that_is_no_number_ends_the_run(tmp_path: Path) -> None:
    model = llama()
    with torch.no_grad():
        model.model.norm.weight.fill_(float("nan"))
    with pytest.raises(ModelError, match="the training loss must be finite, got nan at step 1; lower learning_rate"):
        finetune(model, examples(4), PLAIN, tmp_path)


def test_a_missing_package_names_its_cure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import importlib.util

    find, model = importlib.util.find_spec, llama()
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "trl" else find(name, *rest))
    with pytest.raises(MissingExtra, match=r"needs the package trl, .*pip install 'gradsieve\[train\]'"):
        finetune(model, examples(4), PLAIN, tmp_path)
