"""Every number of the engine against one float64 backward pass per example."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers.models.llama.modeling_llama import LlamaMLP

from gradsieve.gradients import head as head_file
from gradsieve.gradients.directions import References
from gradsieve.gradients.engine import GradientEngine
from gradsieve.gradients.layers import Way, choose_way
from gradsieve.gradients.settings import Block, EngineSettings
from gradsieve.gradients.sketch import SketchPlan

LENGTHS = (14, 9, 11, 17)
FULL: dict[str, Any] = {"layers": "extremes", "signals": True, "norms": True}
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-11}
KEYS_AND_GATES = "re:layers.1.*(k_proj|gate_proj)"
PARAMS = ("linear", "all", "last:1", "lm-head", "embedding", "vectors", KEYS_AND_GATES, "linear,embedding,lm-head")

FAMILIES = ("llama", "llama-tied", "gpt2", "qwen2", "qwen3")
CASES = [(f, spec) for f in FAMILIES for spec in PARAMS if (f, spec) != ("gpt2", KEYS_AND_GATES)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(("family", "spec"), CASES)
def test_everything_equals_one_float64_backward_per_example(twin: Any, family: str, spec: str, dtype: torch.dtype) -> None:
    model = twin.model(family, dtype)
    twin.compare(model, spec, twin.names(model, spec), twin.rows(LENGTHS), TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_lora_gradients_equal_the_loop(twin: Any, family: str, dtype: torch.dtype) -> None:
    options = {"target_modules": ["c_attn", "c_proj", "c_fc"], "fan_in_fan_out": True} if family == "gpt2" else {}
    model = twin.lora(twin.model(family, dtype), dtype, **options)
    base = model.get_base_model()
    for spec in ("auto", "lora"):
        twin.compare(base, spec, twin.names(base, "lora"), twin.rows(LENGTHS), TOLERANCE[dtype])
    with GradientEngine(model) as engine:  # the wrapper itself will do
        assert {site.name for site in engine.sites} == set(twin.names(base, "lora"))


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_reduction_scales_the_gradient_and_not_the_loss(twin: Any, reduction: Any) -> None:
    model, rows = twin.model("llama"), twin.rows(LENGTHS)
    true = twin.naive(model, rows, reduction)
    with GradientEngine(model, EngineSettings(reduction=reduction)) as engine:
        block = engine.block(twin.pad(rows))
    names = twin.names(model, "linear")
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
@pytest.mark.parametrize("family", ["llama", "llama-tied", "llama-head-bias"])
def test_examples_longer_than_a_run_of_logits_are_exact(
    twin: Any, family: str, positions: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(head_file, "LOGIT_FLOATS", positions * twin.vocabulary)
    monkeypatch.setattr(head_file, "TILE_FLOATS", 100)  # a few tokens of the vocabulary at a time
    model = twin.model(family.removesuffix("-head-bias"))
    if family.endswith("bias"):
        model.lm_head.bias = nn.Parameter(torch.randn(twin.vocabulary))
    twin.compare(model, "all", twin.names(model, "all"), twin.rows(LENGTHS), 1e-5)


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.* is deprecated:FutureWarning")  # peft calls the old name
def test_references_are_kept_in_the_heads_type_and_serve_layers_of_another(twin: Any) -> None:
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(twin.model("llama").to(torch.bfloat16), LoraConfig(r=4, target_modules="all-linear"))
    rows = twin.rows((3, 5))
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            assert parameter.dtype == torch.float32
            torch.nn.init.normal_(parameter)
    with GradientEngine(model, EngineSettings(signals=False)) as engine:
        mean = engine.mean_gradient([twin.pad(rows)])
    references = References.stack({"mean": mean})
    found = []
    for way in (True, False):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("gradsieve.gradients.layers.choose_way", lambda *_, way=way, **__: Way(way, False))
            with GradientEngine(model, EngineSettings(signals=False), references) as engine:
                found.append(engine.block(twin.pad(rows)).columns["dot/mean"])
    assert torch.allclose(*found, rtol=0.02)


def test_products_are_made_in_pieces_where_a_layer_is_large(twin: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gradsieve.gradients.layers.TILE_FLOATS", 32 * 32 * 2)
    model = twin.model("llama")
    twin.compare(model, "linear", twin.names(model, "linear"), twin.rows(LENGTHS), 1e-5)


def test_long_sequences_take_norms_from_products_and_short_ones_from_gram_matrices(twin: Any) -> None:
    model, rows = twin.model("llama", torch.float64), twin.rows((60, 41))
    true = twin.naive(model, rows)
    with GradientEngine(model, EngineSettings(params="linear", layers="moments")) as engine:
        for mine in ([0], [1], [0, 1]):
            block = engine.block(twin.pad([rows[z] for z in mine]))
            for at, z in enumerate(mine):
                for name in twin.names(model, "linear"):
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
    names = twin.names(model, "all")
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
    names = twin.names(model, "linear")
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
    names, true, plan = twin.names(model, spec), twin.naive(model, rows), SketchPlan(256)
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


def test_a_call_the_loss_does_not_depend_on_adds_nothing(twin: Any) -> None:
    model = twin.model("llama", torch.float64)
    model.model.layers[1].mlp.__class__ = Wasteful
    twin.compare(model, "linear", twin.names(model, "linear"), twin.rows(LENGTHS), 1e-11)


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
    true, names = twin.naive(model, rows), twin.names(model, "linear")
    r = true.mean(names, [0, 1])
    length = sum(float(g.square().sum()) for g in r.values()) ** 0.5
    assert found.tolist() == pytest.approx([true.dot(z, r, names) / length for z in range(3)], rel=1e-9)


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
