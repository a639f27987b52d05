from __future__ import annotations

import copy
import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gradsieve.errors import DataError, InvalidArgument, ModelError
from gradsieve.gradients.adam import Moments
from gradsieve.gradients.directions import References
from gradsieve.gradients.engine import GradientEngine
from gradsieve.gradients.settings import EngineSettings
from gradsieve.gradients.sketch import SketchPlan

LENGTHS = (14, 9, 11, 17)


def drawn(model: nn.Module, names: list[str], steps: int = 7) -> Moments:
    rng = torch.Generator().manual_seed(3)
    shapes = {name: dict(model.named_parameters())[name].shape for name in names}
    first = {name: 0.02 * torch.randn(shape, generator=rng) for name, shape in shapes.items()}
    second = {name: 1e-3 * torch.rand(shape, generator=rng).square() for name, shape in shapes.items()}
    return Moments(first, second, dict.fromkeys(names, steps))


def gamma_naive(g: Tensor, m: Tensor, v: Tensor, t: int, less_form: bool) -> Tensor:
    m, v = 0.9 * m.double() + 0.1 * g, 0.999 * v.double() + 0.001 * g**2
    if less_form:
        return m / (v + 1e-8).sqrt()
    return (m / (1 - 0.9 ** (t + 1))) / ((v / (1 - 0.999 ** (t + 1))).sqrt() + 1e-8)


def laid_out(x: Tensor, g: Tensor, transposed: bool) -> Tensor:
    return (x.T if transposed else x).reshape(g.shape)


CASES = [("llama", "lora", None), ("llama", "linear", None), ("gpt2", "linear,vectors", None)]
CASES += [("llama", "lora", {"use_dora": True}), ("gpt2", "lora", {"fan_in_fan_out": True})]


@pytest.mark.parametrize("less_form", [False, True])
@pytest.mark.parametrize("layers", ["none", "moments", "extremes"])
@pytest.mark.parametrize(("family", "spec", "lora"), CASES)
def test_every_number_is_that_of_adam_s_direction(
    twin: Any, family: str, spec: str, lora: dict[str, Any] | None, layers: Any, less_form: bool
) -> None:
    model = twin.model(family, torch.float64)
    if spec == "lora":
        model = twin.lora(model, torch.float64, **(lora or {})).get_base_model()
    rows, plan = twin.rows(LENGTHS), SketchPlan(256, seed=5)
    settings = EngineSettings(spec, plan, layers=layers, direction="adam", less_form=less_form)
    with GradientEngine(model, dataclasses.replace(settings, direction="sgd", less_form=False)) as engine:
        names = [site.name for site in engine.sites]
        kinds = {site.name: site.kind for site in engine.sites}
        plain = References.stack({"r": engine.mean_gradient([twin.pad(rows[:2])])})
    moments = drawn(model, names)
    with GradientEngine(model, settings, moments=moments) as engine:
        references = References.stack({"r": engine.mean_gradient([twin.pad(rows[:2])])})  # of plain gradients
    assert all(torch.equal(references.tensors[name], plain.tensors[name]) for name in names)
    with GradientEngine(model, settings, references, moments=moments) as engine:
        block = engine.block(twin.pad(rows))

    true = twin.naive(model, rows)
    r = true.mean(names, [0, 1])
    length = sum(float(g.square().sum()) for g in r.values()) ** 0.5
    for g in true.gradients:
        for name in names:
            m, v = (laid_out(x[name], g[name], kinds[name] == "transposed") for x in (moments.first, moments.second))
            g[name] = gamma_naive(g[name], m, v, 7, less_form)
    for z in range(len(rows)):
        norm = true.norm(z, names)
        assert block.columns["norm"][z].item() == pytest.approx(norm, rel=1e-9)
        assert block.columns["dot/r"][z].item() == pytest.approx(true.dot(z, r, names) / length, abs=1e-9 * norm)
        assert (block.sketch[z] - true.sketch(z, names, plan)).norm() < 1e-6 * norm
        for name in names if layers != "none" else ():
            G = true.gradients[z][name]
            if G.shape[1] > 1:
                found = {kind: block.columns[f"{kind}/{name}"][z].item() for kind in ("norm", "mean", "sd")}
                assert found == pytest.approx(
                    {"norm": G.norm().item(), "mean": G.mean().item(), "sd": G.std(correction=0).item()}, rel=1e-8, abs=1e-10
                )
                if layers == "extremes":
                    assert block.columns[f"max/{name}"][z].item() == pytest.approx(G.max().item(), rel=1e-9)
        assert block.columns["norm/lm_head"][z].item() == pytest.approx(
            true.gradients[z]["lm_head.weight" if family == "llama" else true.ends[1]].norm().item(), rel=1e-9
        )


def test_the_direction_is_the_step_of_torch_s_adamw(twin: Any) -> None:
    model = twin.model("llama", torch.float64)
    name, rows = "model.layers.1.mlp.down_proj.weight", twin.rows(LENGTHS)
    weight = nn.Parameter(model.get_parameter(name).detach().clone())
    optimizer = torch.optim.AdamW([weight], lr=1.0, weight_decay=0.0)
    rng = torch.Generator().manual_seed(0)
    for _ in range(3):
        weight.grad = 0.03 * torch.randn(weight.shape, generator=rng, dtype=torch.float64)
        optimizer.step()
    state = optimizer.state[weight]
    moments = Moments({name: state["exp_avg"].clone()}, {name: state["exp_avg_sq"].clone()}, {name: 3})
    settings = EngineSettings(f"re:{name}", SketchPlan(256, seed=5), direction="adam")
    with GradientEngine(model, settings, moments=moments) as engine:
        block = engine.block(twin.pad(rows[:1]))
    before = weight.detach().clone()
    weight.grad = twin.naive(model, rows[:1]).gradients[0][name]
    optimizer.step()
    assert block.columns["norm"].item() == pytest.approx((before - weight.detach()).norm().item(), rel=1e-6)


def test_from_nothing_the_direction_is_the_gradient_s_sign(twin: Any) -> None:
    model = twin.model("llama", torch.float64)
    name = "model.layers.1.self_attn.q_proj.weight"
    zeros = torch.zeros_like(model.get_parameter(name))
    moments = Moments({name: zeros}, {name: zeros}, {name: 0})
    settings = EngineSettings(f"re:{name}", direction="adam", layers="extremes")
    with GradientEngine(model, settings, moments=moments) as engine:
        columns = engine.block(twin.pad(twin.rows(LENGTHS))).columns
    assert columns["norm"].tolist() == pytest.approx([zeros.numel() ** 0.5] * 4, rel=1e-3)
    assert columns[f"max/{name}"].tolist() == pytest.approx([1.0] * 4, rel=1e-5)


# -- reading a checkpoint ---------------------------------------------------------------------------------------------


def trained(twin: Any, folder: Path, *, vectors: bool) -> tuple[Any, Any]:
    """A model after two steps of transformers' Trainer, which has saved a checkpoint; with LoRA, or whole."""
    pytest.importorskip("accelerate")
    from transformers import Trainer, TrainingArguments

    model = twin.model("gpt2" if vectors else "llama")
    if not vectors:
        model = twin.lora(model, torch.float32, lora_dropout=0.0)
    rows = [{"input_ids": row.ids, "labels": row.labels} for row in twin.rows((9, 9, 9, 9))]
    arguments = TrainingArguments(
        str(folder), max_steps=2, per_device_train_batch_size=2, save_steps=2, report_to=[], use_cpu=True, disable_tqdm=True
    )
    trainer = Trainer(model, arguments, train_dataset=rows)
    trainer.train()
    return model, trainer.optimizer.optimizer if hasattr(trainer.optimizer, "optimizer") else trainer.optimizer


@pytest.mark.parametrize("vectors", [False, True])
@pytest.mark.filterwarnings("ignore")
def test_a_checkpoint_of_the_trainer_is_matched_by_name(twin: Any, tmp_path: Path, vectors: bool) -> None:
    model, optimizer = trained(twin, tmp_path, vectors=vectors)
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    fresh = copy.deepcopy(base).requires_grad_(False)
    for given in (model, fresh):
        moments = Moments.read(tmp_path / "checkpoint-2", given)
        found = {name for name, p in base.named_parameters() if p in optimizer.state}
        assert found == set(moments.first)
        assert len(found) > 10
        for name, p in base.named_parameters():
            if name in found:
                assert torch.equal(moments.first[name], optimizer.state[p]["exp_avg"]), name
                assert torch.equal(moments.second[name], optimizer.state[p]["exp_avg_sq"])
                assert moments.steps[name] == 2
    with GradientEngine(fresh, EngineSettings(direction="adam"), moments=moments) as engine:
        assert engine.block(twin.pad(twin.rows(LENGTHS))).sketch.isfinite().all()


def saved(model: nn.Module, folder: Path, **changes: Any) -> dict[str, Any]:
    """The optimizer state of a LoRA model as the Trainer writes it, and a file of it."""
    names = [name for name, _ in model.named_parameters() if "lora_" in name]
    moments = drawn(model, names)
    state = {
        i: {"step": torch.tensor(7.0), "exp_avg": moments.first[name], "exp_avg_sq": moments.second[name]}
        for i, name in enumerate(names)
    }
    group = {"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8, "params": list(range(len(names)))}
    content = {"state": state, "param_groups": [group, group | {"params": []}]} | changes
    torch.save(content, folder / "optimizer.pt")
    return content


def test_names_that_were_saved_with_the_state_win_over_the_order(twin: Any, tmp_path: Path) -> None:
    model = twin.lora(twin.model("llama"), torch.float32).get_base_model()
    names = [name for name, _ in model.named_parameters() if "lora_" in name]
    content = saved(model, tmp_path)
    in_order = Moments.read(tmp_path, model)
    named = content["param_groups"][0] | {"param_names": [f"base_model.model.{name}" for name in reversed(names)]}
    content["state"] = {len(names) - 1 - i: entry for i, entry in content["state"].items()}
    torch.save(content | {"param_groups": [named]}, tmp_path / "optimizer.pt")
    by_name = Moments.read(tmp_path, model)
    assert in_order.digest() == by_name.digest() == drawn(model, names).digest()


def test_moments_come_back_from_safetensors_as_they_were_written(twin: Any, tmp_path: Path) -> None:
    model = twin.lora(twin.model("llama"), torch.float32).get_base_model()
    moments = dataclasses.replace(drawn(model, ["model.layers.0.self_attn.q_proj.lora_A.default.weight"]), beta1=0.8)
    moments.write(tmp_path)
    again = Moments.read(tmp_path, model)
    assert again.digest() == moments.digest() != dataclasses.replace(moments, beta1=0.9).digest()
    assert again.beta1 == 0.8


def test_a_state_of_another_model_is_refused_naming_both_sides(twin: Any, tmp_path: Path) -> None:
    model = twin.lora(twin.model("llama"), torch.float32, r=4).get_base_model()
    saved(twin.lora(twin.model("llama"), torch.float32, r=2).get_base_model(), tmp_path)
    message = r"optimizer\.pt: the moments of model\.layers\.0\S+lora_A\S+ must have its shape \[4, 32\], got \[2, 32\]"
    with pytest.raises(ModelError, match=message):
        Moments.read(tmp_path, model)
    saved(twin.lora(twin.model("llama"), torch.float32, target_modules=["q_proj"]).get_base_model(), tmp_path)
    with pytest.raises(ModelError, match=r"as many parameters as the model trains \(\d+, 28, \d+: .*\), got 4"):
        Moments.read(tmp_path, model)
    drawn(model, ["model.layers.0.self_attn.q_proj.lora_A.default.weight"]).write(tmp_path)
    with pytest.raises(ModelError, match=r"moments\.safetensors: model\S+ must be a parameter of the model"):
        Moments.read(tmp_path, twin.model("llama"))


def test_a_file_that_is_no_state_of_adam_is_refused(twin: Any, tmp_path: Path) -> None:
    model = twin.lora(twin.model("llama"), torch.float32).get_base_model()
    with pytest.raises(DataError, match=r"must hold optimizer\.pt or moments\.safetensors, got neither"):
        Moments.read(tmp_path, model)
    (tmp_path / "optimizer.pt").write_bytes(b"not a pickle")
    with pytest.raises(DataError, match=r"optimizer\.pt: must be the state of Adam"):
        Moments.read(tmp_path, model)
    content = saved(model, tmp_path)
    torch.save(content | {"param_groups": [content["param_groups"][0] | {"amsgrad": True}]}, tmp_path / "optimizer.pt")
    with pytest.raises(DataError, match="no amsgrad"):
        Moments.read(tmp_path, model)
    content["state"][0] = {"step": torch.tensor(1.0), "momentum_buffer": torch.zeros(4, 32)}
    torch.save(content, tmp_path / "optimizer.pt")
    with pytest.raises(DataError, match=r"must hold step, exp_avg and exp_avg_sq of model\.\S+, got momentum_buffer, step"):
        Moments.read(tmp_path, model)
    groups = [content["param_groups"][0] | {"params": content["param_groups"][0]["params"][:-1]}, {"params": [27]}]
    saved(model, tmp_path, param_groups=[content["param_groups"][0] | group for group in groups])
    with pytest.raises(ModelError, match=r"must have the Trainer's sizes \[28, 0\], got \[27, 1\]"):
        Moments.read(tmp_path, model)
    (tmp_path / "moments.safetensors").write_bytes(b"nor this")
    with pytest.raises(DataError, match=r"moments\.safetensors: must be a file that Moments\.write made"):
        Moments.read(tmp_path, model)


def test_what_cannot_have_adam_s_direction_is_refused(twin: Any) -> None:
    model = twin.model("llama")
    moments = drawn(model, [name for name, p in model.named_parameters() if "layers.0" in name])
    with pytest.raises(InvalidArgument, match=r"moments must hold every chosen parameter, got \d+ without model\.layers\.1"):
        GradientEngine(model, EngineSettings("linear", direction="adam"), moments=moments)
    with pytest.raises(InvalidArgument, match=r"for Adam's direction, got model\.embed_tokens\.weight \(embedding\)"):
        GradientEngine(model, EngineSettings("embedding", direction="adam"), moments=moments)
    with pytest.raises(InvalidArgument, match="moments must be given for direction adam and no other, got none for adam"):
        GradientEngine(model, EngineSettings(direction="adam"))
    with pytest.raises(InvalidArgument, match="got some for sgd"):
        GradientEngine(model, EngineSettings(), moments=moments)
    with pytest.raises(InvalidArgument, match="less_form must go with direction adam, got sgd"):
        EngineSettings(less_form=True)
