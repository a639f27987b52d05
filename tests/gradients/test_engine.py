from __future__ import annotations

import contextlib
import gc
import math
import weakref
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers.models.llama.modeling_llama import LlamaMLP

from gradsieve.errors import InvalidArgument, ModelError
from gradsieve.gradients import accumulator
from gradsieve.gradients import engine as engine_module
from gradsieve.gradients import head as head_file
from gradsieve.gradients.accumulator import Accumulator
from gradsieve.gradients.directions import References
from gradsieve.gradients.engine import GradientEngine
from gradsieve.gradients.layers import choose_way
from gradsieve.gradients.readings import Reading
from gradsieve.gradients.settings import Batch, Block, EngineSettings
from gradsieve.gradients.sketch import SketchPlan
from gradsieve.gradients.sums import Sums

LENGTHS = (14, 9, 11, 17)
FULL: dict[str, Any] = {"layers": "extremes", "signals": True, "norms": True}
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-11}
KEYS_AND_GATES = "re:layers.1.*(k_proj|gate_proj)"
PARAMS = ("linear", "all", "last:1", "lm-head", "embedding", "vectors", KEYS_AND_GATES, "linear,embedding,lm-head")

FAMILIES = ("llama", "llama-tied", "gpt2", "qwen2", "qwen3")
CASES = [(f, spec) for f in FAMILIES for spec in PARAMS if (f, spec) != ("gpt2", KEYS_AND_GATES)]


def chosen_names(model: nn.Module, spec: str) -> list[str]:
    """What a specification means, said once more and without the code under test."""
    ends = ("embed_tokens.weight", "wte.weight", "lm_head.weight")
    vector = [name for name, p in model.named_parameters(remove_duplicate=False) if p.ndim == 1]
    names = [name for name, _ in model.named_parameters(remove_duplicate=False)]
    linear = [n for n in names if "norm" not in n and "ln_" not in n and "wpe" not in n and not n.endswith(ends)]
    picked = {
        "all": names,
        "linear": linear,
        "last:1": [n for n in linear if "layers.1." in n or ".h.1." in n],
        "lm-head": ["lm_head.weight"],
        "embedding": [n for n in names if n.endswith(ends[:2]) or "wpe" in n],
        "vectors": vector,
        KEYS_AND_GATES: [n for n in linear if "layers.1" in n and ("k_proj" in n or "gate_proj" in n)],
        "linear,embedding,lm-head": [n for n in names if n in linear or n.endswith(ends) or "wpe" in n],
        "lora": [n for n in names if "lora_" in n],
    }
    return picked[spec]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(("family", "spec"), CASES)
def test_everything_equals_one_float64_backward_per_example(twin: Any, family: str, spec: str, dtype: torch.dtype) -> None:
    model = twin.model(family, dtype)
    twin.compare(model, spec, chosen_names(model, spec), twin.rows(LENGTHS), TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_lora_gradients_equal_the_loop(twin: Any, family: str, dtype: torch.dtype) -> None:
    options = {"target_modules": ["c_attn", "c_proj", "c_fc"], "fan_in_fan_out": True} if family == "gpt2" else {}
    model = twin.lora(twin.model(family, dtype), dtype, **options)
    base = model.get_base_model()
    for spec in ("auto", "lora"):
        twin.compare(base, spec, chosen_names(base, "lora"), twin.rows(LENGTHS), TOLERANCE[dtype])
    with GradientEngine(model) as engine:  # the wrapper itself will do
        assert {site.name for site in engine.sites} == set(chosen_names(base, "lora"))


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_reduction_scales_the_gradient_and_not_the_loss(twin: Any, reduction: Any) -> None:
    model, rows = twin.model("llama"), twin.rows(LENGTHS)
    true = twin.naive(model, rows, reduction)
    with GradientEngine(model, EngineSettings(reduction=reduction)) as engine:
        block = engine.block(twin.pad(rows))
    names = chosen_names(model, "linear")
    for z in range(len(rows)):
        assert block.columns["norm"][z].item() == pytest.approx(true.norm(z, names), rel=1e-5)
        assert block.columns["loss"][z].item() == pytest.approx(true.losses[z], rel=1e-5)


@pytest.fixture(scope="module")
def open_engine(twin: Any) -> Iterator[tuple[GradientEngine, list[Any], Block]]:
    """An engine that takes everything, a pool of rows, and each row's block on its own."""
    model, rows = twin.model("llama-tied", torch.float64), twin.rows((5, 21, 8, 13, 3, 16))
    options = EngineSettings(params="all", sketch=SketchPlan(64), **FULL)
    with GradientEngine(model, options) as engine:
        references = References.stack({"r": engine.mean_gradient([twin.pad(rows)])})
    with GradientEngine(model, options, references) as engine:
        single = [engine.block(twin.pad([row])) for row in rows]
        columns = {name: torch.cat([block.columns[name] for block in single]) for name in single[0].columns}
        yield engine, rows, Block(torch.cat([block.sketch for block in single]), columns)


@settings(max_examples=25, deadline=None)
@given(order=st.lists(st.integers(0, 5), min_size=1, max_size=6), padding=st.integers(0, 9))
def test_a_row_does_not_depend_on_its_batch_order_or_padding(
    twin: Any, open_engine: tuple[GradientEngine, list[Any], Block], order: list[int], padding: int
) -> None:
    engine, rows, single = open_engine
    batch = [rows[z] for z in order]
    block = engine.block(twin.pad(batch, to=max(len(row.ids) for row in batch) + padding))
    assert torch.allclose(block.sketch, single.sketch[order], rtol=1e-5, atol=1e-6)
    assert set(block.columns) == set(single.columns)
    for name, column in block.columns.items():
        assert torch.allclose(column, single.columns[name][order], rtol=1e-9, atol=1e-10), name


@pytest.mark.parametrize("positions", [1, 4, 7, 20])
@pytest.mark.parametrize("family", ["llama", "llama-tied"])
def test_examples_longer_than_a_run_of_logits_are_exact(
    twin: Any, family: str, positions: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(head_file, "LOGIT_FLOATS", positions * twin.vocabulary)
    monkeypatch.setattr(head_file, "TILE_FLOATS", 100)  # a few tokens of the vocabulary at a time
    model = twin.model(family)
    twin.compare(model, "all", chosen_names(model, "all"), twin.rows(LENGTHS), 1e-5)


def test_products_are_made_in_pieces_where_a_layer_is_large(twin: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gradsieve.gradients.layers.TILE_FLOATS", 32 * 32 * 2)
    model = twin.model("llama")
    twin.compare(model, "linear", chosen_names(model, "linear"), twin.rows(LENGTHS), 1e-5)


def test_long_sequences_take_norms_from_products_and_short_ones_from_gram_matrices(twin: Any) -> None:
    model, rows = twin.model("llama", torch.float64), twin.rows((60, 41))
    true = twin.naive(model, rows)
    with GradientEngine(model, EngineSettings(params="linear", layers="moments")) as engine:
        for mine in ([0], [1], [0, 1]):
            block = engine.block(twin.pad([rows[z] for z in mine]))
            for at, z in enumerate(mine):
                for name in chosen_names(model, "linear"):
                    assert block.columns[f"norm/{name}"][at].item() == pytest.approx(
                        true.gradients[z][name].norm().item(), rel=1e-9
                    )


def test_the_tied_norm_has_its_cross_term(twin: Any) -> None:
    model, rows = twin.model("llama-tied", torch.float64), twin.rows(LENGTHS)
    true = twin.naive(model, rows)
    with GradientEngine(model, EngineSettings(params="embedding,lm-head")) as engine:
        columns = engine.block(twin.pad(rows)).columns
    for z in range(len(rows)):
        E, H = (true.gradients[z][end] for end in true.ends)
        assert columns["norm"][z].item() == pytest.approx((E + H).norm().item(), rel=1e-9)
        assert abs((E * H).sum()) > 1e-3 * (E + H).square().sum()  # the term is there to be missed


@pytest.mark.parametrize(("dim", "seeds"), [(16, 120), (4096, 60)], ids=["folded", "projected only"])
def test_sketches_are_unbiased_over_seeds(twin: Any, dim: int, seeds: int) -> None:
    model, rows = twin.model("llama-tied", torch.float64), twin.rows((6, 7))
    names = chosen_names(model, "all")
    true = twin.naive(model, rows)
    g, h = (torch.cat([part.flatten() for part in true.merged(z, names).values()]) for z in (0, 1))
    truth = torch.stack([g @ h, g @ g, h @ h])
    samples = []
    for seed in range(seeds):
        with GradientEngine(model, EngineSettings("all", SketchPlan(dim, seed), norms=False, signals=False)) as engine:
            s, t = engine.block(twin.pad(rows)).sketch.double()
        samples.append(torch.stack([s @ t, s @ s, t @ t]))
    found = torch.stack(samples)
    error = (found.mean(0) - truth) / (found.std(0) / math.sqrt(len(found)))
    assert error.abs().max() < 4, f"{error} standard errors off"
    assert found.std(0).max() > 0.1 * truth.abs().min()  # seeds do change the projection


@pytest.mark.parametrize("dim", [64, 1024, 4096])
def test_the_error_of_a_cosine_is_about_one_over_the_root_of_d(twin: Any, dim: int) -> None:
    model, rows = twin.model("llama"), twin.rows([12] * 16)
    names = chosen_names(model, "linear")
    true = twin.naive(model, rows)
    G = torch.stack([torch.cat([part.flatten() for part in true.merged(z, names).values()]) for z in range(16)])
    exact = nn.functional.normalize(G) @ nn.functional.normalize(G).T
    errors = []
    for seed in range(8):
        with GradientEngine(model, EngineSettings("linear", SketchPlan(dim, seed), norms=False, signals=False)) as engine:
            s = nn.functional.normalize(engine.block(twin.pad(rows)).sketch.double())
        errors.append((s @ s.T - exact)[~torch.eye(16, dtype=torch.bool)])
    assert torch.cat(errors).square().mean().sqrt() < 1.6 / math.sqrt(dim)


def test_threads_change_nothing_but_rounding(twin: Any) -> None:
    model, rows = twin.model("llama"), twin.rows((40, 33, 58))
    before = torch.get_num_threads()
    found = []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            with GradientEngine(model, EngineSettings("all", **FULL)) as engine:
                found.append(engine.block(twin.pad(rows)))
    finally:
        torch.set_num_threads(before)
    assert torch.allclose(found[0].sketch, found[1].sketch, rtol=1e-4, atol=1e-5)
    assert all(
        torch.allclose(found[0].columns[name], found[1].columns[name], rtol=1e-4, atol=1e-6) for name in found[0].columns
    )


@pytest.mark.parametrize("spec", ["linear", "all"])
def test_a_mean_gradient_is_the_mean_of_the_loop_and_knows_its_noise(twin: Any, spec: str) -> None:
    model, rows = twin.model("llama-tied", torch.float64), twin.rows((14, 9, 11, 17, 5))
    names, true = chosen_names(model, spec), twin.naive(model, rows)
    with GradientEngine(model, EngineSettings(params=spec)) as engine:
        mean = engine.mean_gradient([twin.pad(rows[:3]), twin.pad(rows[3:])])
    expected = true.mean(names)
    assert set(mean.tensors) == set(expected)
    for key, g in expected.items():
        assert torch.allclose(mean.tensors[key], g, rtol=1e-9, atol=1e-12)
    length = sum(float(g.square().sum()) for g in expected.values())
    spread = [true.norm(z, names) ** 2 - 2 * true.dot(z, expected, names) + length for z in range(5)]
    facts = mean.facts()
    assert facts.count == 5
    assert facts.norm == pytest.approx(length**0.5, rel=1e-9)
    assert facts.signal_share == pytest.approx(1 - (sum(spread) / 4 / 5) / length, rel=1e-8)


def test_a_contrast_is_a_difference_with_the_noise_of_both(twin: Any) -> None:
    model, rows = twin.model("llama", torch.float64), twin.rows((14, 9, 11, 17))
    with GradientEngine(model) as engine:
        left, right = (engine.mean_gradient([twin.pad(part)]) for part in (rows[:2], rows[2:]))
        expected = {key: tensor - right.tensors[key] for key, tensor in left.tensors.items()}
        noise = left.noise + right.noise
        contrast = left.minus(right)
        for key, tensor in contrast.tensors.items():
            assert torch.equal(tensor, expected[key])
        assert contrast.facts().count == 2
        assert contrast.facts().signal_share == pytest.approx(1 - noise / contrast.squared_norm())
        references = References.stack({"contrast": contrast, "left": left})
    assert references.names == ("contrast", "left")
    lengths = torch.stack([tensor.square().sum((1, 2)) for tensor in references.tensors.values()]).sum(0)
    assert torch.allclose(lengths, torch.ones(2, dtype=torch.float64))


def test_a_contrast_of_pairs_has_the_noise_of_their_differences(twin: Any) -> None:
    model, rows, copies = twin.model("llama", torch.float64), twin.rows((14, 9, 11, 17)), twin.rows((13, 9, 12, 17))
    names = chosen_names(model, "linear")
    with GradientEngine(model, EngineSettings("linear", SketchPlan(4096, 0))) as engine:
        sides = [engine.mean_gradient([twin.pad(part)], sketched=True) for part in (rows, copies)]
        blocks = [engine.block(twin.pad(part)) for part in (rows, copies)]
    pairs = torch.cat(sides[0].sketches), torch.cat(sides[1].sketches)
    assert all(torch.allclose(pair, block.sketch, rtol=1e-5, atol=1e-7) for pair, block in zip(pairs, blocks, strict=True))
    true = twin.naive(model, [*rows, *copies])
    whole = [torch.cat([g.flatten() for g in true.merged(z, names).values()]) for z in range(8)]
    differences = torch.stack(whole[:4]) - torch.stack(whole[4:])
    spread = float((differences - differences.mean(0)).square().sum())
    contrast = sides[0].minus(sides[1], pairs)
    assert contrast.noise == pytest.approx(spread / 3 / 4, rel=0.15)  # the sketch's own error: √(2/4096) a row


def test_a_scaled_example_counts_that_much(twin: Any) -> None:
    model, rows = twin.model("llama-tied", torch.float64), twin.rows((14, 9, 11))
    names, true, scale = chosen_names(model, "all"), twin.naive(model, rows), torch.tensor([0.5, 2.0, 0.0])
    with GradientEngine(model, EngineSettings(params="all")) as engine:
        batch = twin.pad(rows)
        mean = engine.mean_gradient([replace(batch, scale=scale)])
    parts = [true.merged(z, names) for z in range(3)]
    for key, tensor in mean.tensors.items():
        expected = sum(s * part[key] for s, part in zip(scale.tolist(), parts, strict=True)) / 3
        assert torch.allclose(tensor, expected, rtol=1e-9, atol=1e-12)
    assert torch.cat(mean.squares)[1].sqrt() == pytest.approx(2 * true.norm(1, names), rel=1e-9)


@pytest.mark.parametrize("fault", [None, "block", "forward"])
def test_the_model_is_given_back_as_it_was(twin: Any, fault: str | None) -> None:
    model = twin.model("llama").train()
    model.model.layers[0].eval()
    model.model.layers[1].requires_grad_(False)
    flags = [parameter.requires_grad for parameter in model.parameters()]
    modes = [module.training for module in model.modules()]
    weights = [parameter.detach().clone() for parameter in model.parameters()]
    batch = twin.pad(twin.rows(LENGTHS))
    try:
        with GradientEngine(model, EngineSettings("all", **FULL)) as engine:
            engine.block(batch)
            if fault == "block":
                raise KeyboardInterrupt
            if fault == "forward":
                engine.block(Batch(batch.input_ids + 10_000, batch.labels))
    except (KeyboardInterrupt, IndexError):
        assert fault
    assert [parameter.requires_grad for parameter in model.parameters()] == flags
    assert [module.training for module in model.modules()] == modes
    assert not any(module._forward_hooks for module in model.modules())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(torch.equal(a, b) for a, b in zip(weights, model.parameters(), strict=True))


def test_a_block_after_an_error_is_as_if_nothing_had_happened(twin: Any) -> None:
    model, batch = twin.model("llama"), twin.pad(twin.rows(LENGTHS))
    with GradientEngine(model, EngineSettings("all", **FULL)) as engine:
        before = engine.block(batch)
        with pytest.raises(IndexError):
            engine.block(Batch(batch.input_ids + 10_000, batch.labels))
        after = engine.block(batch)
    assert torch.equal(before.sketch, after.sketch)


def test_an_example_without_supervised_tokens_is_nan_and_harms_no_other(twin: Any) -> None:
    model, rows = twin.model("llama"), twin.rows((9, 12))
    empty = type(rows[0])(rows[0].ids, torch.full_like(rows[0].labels, -100))
    with GradientEngine(model, EngineSettings("all", **FULL)) as engine:
        block, alone = engine.block(twin.pad([empty, rows[1]])), engine.block(twin.pad([rows[1]]))
        nothing = engine.block(twin.pad([empty]))
        with pytest.raises(InvalidArgument, match="completion tokens"):
            engine.mean_gradient([twin.pad([empty, rows[1]])])
    assert block.columns["loss"][0].isnan()
    assert nothing.columns["loss"].isnan().all()
    assert block.columns["completion_tokens"].tolist() == [0.0, float((rows[1].labels[1:] != -100).sum())]
    for name, column in block.columns.items():
        assert torch.allclose(column[1], alone.columns[name][0], rtol=1e-4, atol=1e-6), name
    assert torch.allclose(block.sketch[1], alone.sketch[0], rtol=1e-4, atol=1e-5)


def test_a_non_finite_gradient_shows_in_its_row_and_in_no_other(twin: Any) -> None:
    model, rows = twin.model("llama"), twin.rows((9, 12))
    rows[0].ids[4] = poison = 0  # no drawn token
    with torch.no_grad():
        model.model.embed_tokens.weight[poison] = torch.inf
    with GradientEngine(model) as engine:
        block = engine.block(twin.pad(rows))
        with pytest.raises(InvalidArgument, match="finite"):
            engine.mean_gradient([twin.pad(rows)])
    assert not block.columns["norm"][0].isfinite()
    assert not block.sketch[0].isfinite().all()
    assert block.sketch[1].isfinite().all()
    assert block.columns["norm"][1].isfinite()


class Odd(nn.Module):
    """A layer with a weight and no rule."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Parameter(torch.eye(32))
        self.dropout = nn.Dropout()

    def forward(self, hidden: Tensor) -> Tensor:
        return hidden @ self.mix


def test_a_parameter_without_a_rule_is_named_and_can_be_left_out(twin: Any) -> None:
    model = twin.model("llama")
    model.model.layers[0].mlp.act_fn = nn.Sequential(nn.SiLU())
    model.model.layers[0].post_attention_layernorm = Odd()
    with pytest.raises(ModelError, match=r"model\.layers\.0\.post_attention_layernorm\.mix .*--params"):
        GradientEngine(model, EngineSettings("all"))
    with GradientEngine(model, EngineSettings("re:q_proj")) as engine:
        assert len(engine.sites) == 2


class Mean(nn.Module):
    """A layer that mixes examples."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(32))

    def forward(self, hidden: Tensor) -> Tensor:
        return self.scale * (hidden - hidden.mean(0))


def test_a_module_that_mixes_examples_is_refused_where_its_parameters_are_wanted(twin: Any) -> None:
    model = twin.model("llama")
    model.model.layers[0].post_attention_layernorm = Mean()
    with pytest.raises(ModelError, match=r"post_attention_layernorm\.scale .* Mean, which mixes examples; .* --params"):
        GradientEngine(model, EngineSettings("vectors")).__enter__()
    with GradientEngine(model, EngineSettings("linear")) as engine:
        assert engine.sites


def test_a_head_that_does_more_than_a_product_is_refused(twin: Any) -> None:
    model = twin.model("llama")
    model.lm_head.register_forward_hook(lambda module, args, output: output * 3)
    with pytest.raises(ModelError, match="output of LlamaForCausalLM"), GradientEngine(model):
        pass
    assert all(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize(
    ("spec", "lowest"),
    [("linear", 0), ("last:1", 1), ("re:layers.1.*down_proj", 1), ("lora", 0), ("re:layers.1.*lora_", 1), ("lm-head", None)],
)
def test_backward_stops_below_the_lowest_chosen_layer(twin: Any, spec: str, lowest: int | None) -> None:
    model = twin.model("llama")
    if "lora" in spec:
        model = twin.lora(model, torch.float32).get_base_model()
    reached: dict[int, bool] = {}
    for i, layer in enumerate(model.model.layers):
        layer.mlp.register_forward_hook(lambda module, args, output, i=i: reached.update({i: output.requires_grad}))
    with GradientEngine(model, EngineSettings(spec, signals=False)) as engine:
        engine.block(twin.pad(twin.rows(LENGTHS)))
    assert reached == {i: lowest is not None and i >= lowest for i in (0, 1)}


@pytest.mark.parametrize("spec", ["linear", "all"])
def test_bfloat16_stays_near_the_float64_loop(twin: Any, spec: str) -> None:
    model, rows = twin.model("llama-tied", torch.bfloat16), twin.rows(LENGTHS)
    names, true, plan = chosen_names(model, spec), twin.naive(model, rows), SketchPlan(256)
    with GradientEngine(model, EngineSettings(spec, plan, **FULL)) as engine:
        references = References.stack({"r": engine.mean_gradient([twin.pad(rows)])})
    assert all(tensor.dtype == torch.bfloat16 for tensor in references.tensors.values())
    with GradientEngine(model, EngineSettings(spec, plan, **FULL), references) as engine:
        block = engine.block(twin.pad(rows))
    r = true.mean(names)
    length = sum(float(g.square().sum()) for g in r.values()) ** 0.5
    for z in range(len(rows)):
        norm = true.norm(z, names)
        assert block.columns["loss"][z].item() == pytest.approx(true.losses[z], rel=2e-2)
        assert block.columns["norm"][z].item() == pytest.approx(norm, rel=4e-2)
        assert (block.sketch[z].double() - true.sketch(z, names, plan)).norm() < 0.1 * norm
        assert abs(block.columns["dot/r"][z].item() - true.dot(z, r, names) / length) < 4e-2 * norm
        for end, name in zip(("embedding", "lm_head"), true.ends, strict=True):
            G = true.gradients[z][name]
            assert block.columns[f"max/{end}"][z].item() == pytest.approx(G.max().item(), abs=0.05 * G.abs().max().item())


def test_a_module_called_twice_adds_up_both_calls(twin: Any) -> None:
    model = twin.model("llama", torch.float64)
    model.model.layers[1].mlp = model.model.layers[0].mlp
    names = [name for name, _ in model.named_parameters()]
    twin.compare(model, "all", names, twin.rows(LENGTHS), 1e-11)


class Wasteful(LlamaMLP):
    """Calls a layer once more than the loss depends on."""

    def forward(self, x: Tensor) -> Tensor:
        self.gate_proj(torch.ones_like(x))
        return super().forward(x)


class Overwriting(LlamaMLP):
    """Changes what a layer has read."""

    def forward(self, x: Tensor) -> Tensor:
        gate = self.act_fn(self.gate_proj(x))
        return self.down_proj(gate * self.up_proj(x.mul_(2)))


def test_a_call_the_loss_does_not_depend_on_adds_nothing(twin: Any) -> None:
    model = twin.model("llama", torch.float64)
    model.model.layers[1].mlp.__class__ = Wasteful
    twin.compare(model, "linear", chosen_names(model, "linear"), twin.rows(LENGTHS), 1e-11)


@pytest.mark.parametrize("layers", ["none", "extremes"])
def test_an_input_that_the_model_overwrites_is_an_error(twin: Any, layers: Any) -> None:
    model = twin.model("llama")
    model.model.layers[1].mlp.__class__ = Overwriting
    message = r"input of model\.layers\.1\.mlp\.gate_proj\.weight must stay"
    with GradientEngine(model, EngineSettings("linear", layers=layers)) as engine, pytest.raises(ModelError, match=message):
        engine.block(twin.pad(twin.rows(LENGTHS)))


def test_an_output_that_the_model_overwrites_is_none(twin: Any) -> None:
    def double(module: nn.Module, args: tuple[Tensor]) -> None:
        args[0].mul_(2)

    model = twin.model("llama", torch.float64)
    model.model.layers[0].register_forward_pre_hook(double)
    twin.compare(model, "embedding", chosen_names(model, "embedding"), twin.rows(LENGTHS), 1e-11)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("fault", [False, True])
def test_nothing_of_a_batch_outlives_it(twin: Any, checkpointing: bool, fault: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(self: Sums, *args: Any) -> None:
        raise RuntimeError("on purpose")

    model, batch = twin.model("llama"), twin.pad(twin.rows((33, 41)))
    with GradientEngine(model, EngineSettings("all", **FULL), checkpointing=checkpointing) as engine:
        engine.block(batch)
        if fault:
            monkeypatch.setattr(Sums, "add_embedding", fail)
        gc.collect()
        gc.disable()
        try:
            before = sum(issubclass(type(item), Tensor) for item in gc.get_objects())
            with contextlib.suppress(RuntimeError):
                engine.block(batch)
            left = sum(issubclass(type(item), Tensor) for item in gc.get_objects()) - before
        finally:
            gc.enable()
    assert left <= 2


def test_a_batch_is_let_go_without_the_garbage_collector(twin: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    kept: list[weakref.ref[Any]] = []

    class Watched(accumulator.Accumulator):
        def __init__(self, *arguments: Any) -> None:
            super().__init__(*arguments)
            kept.append(weakref.ref(self))

        def saw(self, *arguments: Any, **more: Any) -> Any:
            call = super().saw(*arguments, **more)
            if call is not None and call.reading is not None:
                kept.append(weakref.ref(call.reading))
            return call

    monkeypatch.setattr(engine_module, "Accumulator", Watched)
    batch = twin.pad(twin.rows((9, 12)))
    gc.collect()
    gc.disable()
    try:
        with GradientEngine(twin.model("llama"), EngineSettings(params="all")) as opened:
            opened.block(batch)
            opened.mean_gradient([batch])
            alive = [reference() for reference in kept if reference() is not None]
    finally:
        gc.enable()
    assert len(kept) > 20
    assert alive == []


def shapes_of(model: nn.Module) -> set[tuple[int, int]]:
    return {(p.shape[0], p.shape[1]) for name, p in model.named_parameters() if "proj" in name and p.ndim == 2}


def test_products_around_the_gradient_add_up_over_layers(twin: Any) -> None:
    model, rows = twin.model("llama", torch.float64), twin.rows((6, 5, 6))
    settings = EngineSettings("linear", SketchPlan(256, seed=5), norms=False, signals=False)
    facts: dict[str, Any] = {"sides": ((128, 32),), "norm": False, "extremes": False, "references": 1, "half": False}
    ways = [choose_way(6, *shape, sharers, **facts) for shape in shapes_of(model) for sharers in (1, 2, 3)]
    assert not any(way.products for way in ways)
    with GradientEngine(model, settings) as engine:
        references = References.stack({"r": engine.mean_gradient([twin.pad(rows[:2])])})
    with GradientEngine(model, settings, references) as engine:
        found = engine.block(twin.pad(rows)).columns["dot/r"]
    true, names = twin.naive(model, rows), chosen_names(model, "linear")
    r = true.mean(names, [0, 1])
    length = sum(float(g.square().sum()) for g in r.values()) ** 0.5
    assert found.tolist() == pytest.approx([true.dot(z, r, names) / length for z in range(3)], rel=1e-9)


def test_a_module_called_twice_keeps_what_it_read_where_gram_matrices_would_do(twin: Any) -> None:
    model, rows = twin.model("llama", torch.float64), twin.rows((6, 5, 6))
    model.model.layers[1].mlp = model.model.layers[0].mlp
    settings = EngineSettings("linear", SketchPlan(256, seed=5), signals=False)
    facts: dict[str, Any] = {"sides": ((128, 32),), "norm": True, "extremes": False, "references": 0, "half": False}
    for length in (6, 12):
        ways = [choose_way(length, *shape, sharers, **facts) for shape in shapes_of(model) for sharers in (1, 2, 3)]
        assert not any(way.products for way in ways)
    with GradientEngine(model, settings) as engine:
        names, block = [site.name for site in engine.sites], engine.block(twin.pad(rows))
    true = twin.naive(model, rows)
    for z in range(len(rows)):
        assert block.columns["norm"][z].item() == pytest.approx(true.norm(z, names), rel=1e-9)
        assert (block.sketch[z] - true.sketch(z, names, settings.sketch)).norm() < 1e-6 * true.norm(z, names)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_layer_frees_what_it_read_and_received_as_soon_as_it_is_added(
    twin: Any, checkpointing: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, rows = twin.model("llama", torch.float64), twin.rows((6, 5, 6))
    held: list[int] = []

    def finish(state: Accumulator) -> None:
        held.append(sum(type(one) is Reading for one in gc.get_objects()))

    monkeypatch.setattr(Accumulator, "finish", finish)
    settings = EngineSettings("linear", SketchPlan(256, seed=5), layers="extremes", signals=False)
    with GradientEngine(model, settings, checkpointing=checkpointing) as engine:
        engine.block(twin.pad(rows))
    assert held == [0]


def test_what_a_gated_layer_reads_is_not_kept_beside_its_factors(twin: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model, rows = twin.model("llama", torch.float64), twin.rows((6, 5, 6))
    kept: dict[str, bool] = {}
    head = Accumulator.head

    def looked_at(state: Accumulator, *args: Any) -> torch.Tensor:
        done = head(state, *args)
        readings = [one for one in gc.get_objects() if type(one) is Reading]
        kept.update({reading.name: reading._tensor is not None for reading in readings if not reading.gone})
        return done

    monkeypatch.setattr(Accumulator, "head", looked_at)
    settings = EngineSettings("linear", SketchPlan(256, seed=5), layers="extremes", signals=False)
    with GradientEngine(model, settings) as engine:
        block = engine.block(twin.pad(rows))
    assert {name.split(".")[-2] for name, there in kept.items() if not there} == {"down_proj"}
    assert any(kept.values())
    name = "model.layers.0.mlp.down_proj.weight"
    true = twin.naive(model, rows)
    for z in range(len(rows)):
        assert block.columns[f"max/{name}"][z].item() == pytest.approx(float(true.gradients[z][name].max()), rel=1e-9)


def test_the_row_of_the_padding_token_gets_no_gradient_from_the_embedding(twin: Any) -> None:
    model, rows = twin.model("llama", torch.float64), twin.rows((6, 5))
    embedding = model.get_input_embeddings()
    embedding.padding_idx = int(rows[0].ids[2])  # as models whose end of turn pads, too
    with GradientEngine(model, EngineSettings("embedding", SketchPlan(256, seed=5))) as engine:
        block = engine.block(twin.pad(rows))
    ids, labels = rows[0].ids[None], rows[0].labels[None]
    model.requires_grad_(True)
    model(input_ids=ids, labels=labels, use_cache=False).loss.backward()
    assert embedding.weight.grad[embedding.padding_idx].count_nonzero() == 0
    for name in ("norm", "norm/embedding"):
        assert block.columns[name][0].item() == pytest.approx(embedding.weight.grad.norm().item(), rel=1e-6)
