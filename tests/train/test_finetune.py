"""Training against a loop written out: one backward per example, AdamW and the schedule by hand; and what is refused."""

import dataclasses
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from gradsieve.data import IGNORE, Tokens
from gradsieve.errors import DataError, InvalidArgument, MissingExtra, ModelError
from gradsieve.train import finetune

from .conftest import FULL, PLAIN, assert_same, examples, gpt2, llama
from .test_loss import loss_naive


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
