from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers as hf
from torch import nn

from gradsieve.errors import InvalidArgument, ModelError
from gradsieve.gradients import experts
from gradsieve.gradients.engine import GradientEngine
from gradsieve.gradients.settings import Batch, EngineSettings
from gradsieve.gradients.sketch import SketchPlan

V = 97
LENGTHS = (14, 9, 11, 17)
TOKENS: dict[str, Any] = {"vocab_size": V, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
TOKENS["initializer_range"] = 0.2
SMALL: dict[str, Any] = TOKENS | {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
}
NO_KV: dict[str, Any] = {key: value for key, value in SMALL.items() if key not in ("num_key_value_heads", "head_dim")}
EXPERTS: dict[str, Any] = SMALL | {"num_experts_per_tok": 2, "moe_intermediate_size": 24, "num_experts": 4}
FAMILIES: dict[str, Callable[[], Any]] = {
    "mistral": lambda: hf.MistralConfig(**SMALL, sliding_window=5),
    "gemma": lambda: hf.GemmaConfig(**SMALL),
    "gemma2": lambda: hf.Gemma2Config(**SMALL, sliding_window=5, final_logit_softcapping=3.0, query_pre_attn_scalar=8),
    "gemma3": lambda: hf.Gemma3TextConfig(**SMALL, sliding_window=5, sliding_window_pattern=2, query_pre_attn_scalar=8),
    "phi3": lambda: hf.Phi3Config(**(SMALL | {"tie_word_embeddings": False})),
    "phi": lambda: hf.PhiConfig(**NO_KV),
    "opt": lambda: hf.OPTConfig(
        **TOKENS, hidden_size=32, ffn_dim=48, num_hidden_layers=2, num_attention_heads=4, word_embed_proj_dim=24, init_std=0.2
    ),
    "gpt-neox": lambda: hf.GPTNeoXConfig(**NO_KV),
    "gpt-neox-sequential": lambda: hf.GPTNeoXConfig(**NO_KV, use_parallel_residual=False, tie_word_embeddings=True),
    "falcon": lambda: hf.FalconConfig(**TOKENS, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, bias=True),
    "falcon-new": lambda: hf.FalconConfig(
        **TOKENS, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_kv_heads=2, new_decoder_architecture=True
    ),
    "bloom": lambda: hf.BloomConfig(**TOKENS, hidden_size=32, n_layer=2, n_head=4),
    "granite": lambda: hf.GraniteConfig(**SMALL, logits_scaling=4.0, embedding_multiplier=3.0, residual_multiplier=0.5),
    "cohere": lambda: hf.CohereConfig(**SMALL, logit_scale=0.25),
    "olmo": lambda: hf.OlmoConfig(**SMALL),
    "olmo2": lambda: hf.Olmo2Config(**SMALL),
    "starcoder2": lambda: hf.Starcoder2Config(**SMALL),
    "mixtral": lambda: hf.MixtralConfig(**SMALL, num_experts_per_tok=2, num_local_experts=4),
    "qwen2-moe": lambda: hf.Qwen2MoeConfig(**EXPERTS, shared_expert_intermediate_size=16),
    "qwen3-moe": lambda: hf.Qwen3MoeConfig(**EXPERTS, norm_topk_prob=True),
    "gpt-oss": lambda: hf.GptOssConfig(**SMALL, num_local_experts=4, num_experts_per_tok=2, sliding_window=5),
}
MIXTURES = ("mixtral", "qwen2-moe", "qwen3-moe", "gpt-oss")


def build(family: str, dtype: torch.dtype = torch.float64) -> Any:
    hf.set_seed(0)
    config = FAMILIES[family]()
    config._experts_implementation = "eager"  # the others have no float64
    model = hf.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += (0.2 if parameter.ndim == 1 else 0.05) * torch.randn_like(parameter)
    return model.to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_every_parameter_of_every_family_equals_the_loop(twin: Any, family: str, dtype: torch.dtype) -> None:
    model = build(family, dtype)
    names = [name for name, _ in model.named_parameters(remove_duplicate=False) if "sinks" not in name]
    spec = "linear,embedding,lm-head,vectors" if family == "gpt-oss" else "all"
    # some families round to float32 inside even where the model is float64
    tolerance = 3e-5 if dtype == torch.float32 else 1e-6 if family in ("gemma2", "bloom") else 1e-9
    twin.compare(model, spec, names, twin.rows(LENGTHS), tolerance)


@pytest.mark.parametrize("family", MIXTURES)
@pytest.mark.parametrize("layers", ["none", "moments"])
def test_linear_includes_experts_and_routers(twin: Any, family: str, layers: str) -> None:
    model = build(family)
    names = [n for n, p in model.named_parameters() if not any(part in n for part in ("norm", "embed", "lm_head", "sinks"))]
    assert any("experts.gate_up_proj" in name for name in names)
    twin.compare(model, "linear", names, twin.rows(LENGTHS), 1e-9, layers=layers)


@pytest.mark.parametrize("spec", ["re:experts.down_proj$", "re:experts.gate_up_proj_bias", "re:mlp.router"])
def test_parts_of_a_mixture_can_be_chosen(twin: Any, spec: str) -> None:
    model = build("gpt-oss")
    names = [n for n, p in model.named_parameters() if re.search(spec[3:], n)]
    twin.compare(model, spec, names, twin.rows(LENGTHS), 1e-9)


def test_a_parameter_of_an_attention_layer_itself_has_no_rule() -> None:
    with pytest.raises(
        ModelError, match=r"self_attn\.sinks must belong to a layer gradsieve has a rule for, got GptOssAttention"
    ):
        GradientEngine(build("gpt-oss"), EngineSettings("all"))


def test_tokens_of_each_example_go_to_their_own_experts(twin: Any) -> None:
    model = build("mixtral")
    with torch.no_grad():  # one expert for tokens below 50, another for the rest
        model.model.embed_tokens.weight[:, 0] = 20.0 * (1 - 2 * (torch.arange(V) < 50).double())
        for layer in model.model.layers:
            layer.input_layernorm.weight.zero_()
            layer.mlp.gate.weight.zero_()
            layer.mlp.gate.weight[0, 0], layer.mlp.gate.weight[1, 0] = 5.0, -5.0
    rows = twin.rows((9, 12))
    rows[0].ids[:], rows[1].ids[:] = rows[0].ids % 45 + 3, rows[1].ids % 45 + 51
    for row in rows:
        row.labels[row.labels != -100] = row.ids[row.labels != -100]
    name = "model.layers.0.mlp.experts.down_proj"
    assert [twin.naive(model, rows).gradients[z][name].view(4, -1).norm(dim=1).argmax().item() for z in (0, 1)] == [1, 0]
    names = [f"model.layers.{i}.mlp.experts.{part}_proj" for i in (0, 1) for part in ("gate_up", "down")]
    twin.compare(model, "re:experts", names, rows * 2, 1e-9)


@pytest.mark.parametrize("tile", [1, 1 << 20], ids=["tiles of rows", "whole"])
def test_the_widest_sketch_of_experts_has_their_entries_at_their_places(
    twin: Any, tile: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gradsieve.gradients.layers.TILE_FLOATS", tile)
    model, rows, plan = build("mixtral"), twin.rows(LENGTHS), SketchPlan(65536, seed=3)
    with GradientEngine(model, EngineSettings("linear", plan, signals=False)) as engine:
        names, block = [site.name for site in engine.sites], engine.block(twin.pad(rows))
    true = twin.naive(model, rows)
    for z in range(len(rows)):
        assert (block.sketch[z] - true.sketch(z, names, plan)).norm() < 1e-6 * true.norm(z, names)


def test_experts_spread_over_devices_are_refused() -> None:
    model = build("mixtral")
    model.model.layers[0].mlp.experts._is_expert_parallel = True
    hidden, index = torch.zeros(4, 32), torch.zeros(4, 2, dtype=torch.int64)
    with pytest.raises(ModelError, match="every token of the batch on one device"):
        experts.run(model.model.layers[0].mlp.experts, hidden, index, torch.ones(4, 2), 2, lambda name, x, y, routing: y)


@pytest.mark.parametrize("layers", ["none", "extremes"])
@pytest.mark.parametrize("family", ["mistral", "gemma2", "phi3", "opt", "falcon", "qwen3-moe"])
def test_checkpointing_changes_no_number(twin: Any, family: str, layers: str) -> None:
    model = build(family, torch.float32)
    names = [name for name, _ in model.named_parameters(remove_duplicate=False)]
    twin.compare(model, "all", names, twin.rows(LENGTHS), 3e-5, layers=layers, checkpointing=True)
    assert not any("forward" in vars(module) for module in model.modules())


def test_a_model_without_blocks_cannot_be_checkpointed(twin: Any) -> None:
    model = build("mistral")
    model.model.layers = nn.ModuleList()
    with pytest.raises(InvalidArgument, match="checkpointing must be off for a model without decoder blocks"):
        GradientEngine(model, EngineSettings("embedding"), checkpointing=True)


def test_experts_that_are_called_twice_are_refused(twin: Any) -> None:
    model = build("mixtral")
    model.model.layers[1] = model.model.layers[0]
    with pytest.raises(ModelError, match=r"experts\.gate_up_proj must belong to experts that the model calls once, got 2 c"):
        GradientEngine(model, EngineSettings("re:experts", signals=False)).__enter__()
    twin.compare(model, "re:attn", [n for n, _ in model.named_parameters() if "attn" in n], twin.rows(LENGTHS), 1e-5)


def test_layers_that_give_more_than_a_tensor_or_keep_a_state_are_refused_by_name() -> None:
    class Pair(torch.nn.Linear):
        def forward(self, input: torch.Tensor) -> Any:
            return super().forward(input), None

    class Stateful(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = torch.nn.Parameter(torch.ones(1))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.seen = getattr(self, "seen", x).view_as(x)
            return self.scale * x

    for layer, message in (
        (
            Pair(32, 32, bias=False),
            r"mlp\.extra\.weight must belong to a layer that gives one tensor, got Pair; name the",
        ),
        (Stateful(), r"mlp\.extra\.scale must belong to a layer gradsieve has a rule for, got Stateful, which mixes examples"),
    ):
        model = build("mistral")
        mlp = model.model.layers[0].mlp
        mlp.extra = layer.double()
        mlp.register_forward_pre_hook(lambda mlp, args: (mlp.extra(args[0]), None)[1])
        with (
            pytest.raises(ModelError, match=message),
            GradientEngine(model, EngineSettings("re:extra", signals=False)) as engine,
        ):
            engine.block(Batch(torch.ones(2, 5, dtype=torch.int64), torch.ones(2, 5, dtype=torch.int64)))


def test_a_block_shared_by_two_depths_is_checkpointed_twice(twin: Any) -> None:
    model = build("mistral", torch.float32)
    model.model.layers[1] = model.model.layers[0]
    names = [name for name, _ in model.named_parameters()]
    twin.compare(model, "all", names, twin.rows(LENGTHS), 3e-5, checkpointing=True)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("variant", [{"use_rslora": True}, {"use_dora": True}], ids=str)
def test_variants_of_lora_equal_the_loop(twin: Any, variant: dict[str, Any], checkpointing: bool) -> None:
    base = twin.lora(build("mistral", torch.float32), torch.float32, **variant).get_base_model()
    names = [name for name, _ in base.named_parameters() if "lora_" in name]
    assert ("use_dora" in variant) == any("magnitude" in name for name in names)
    twin.compare(base, "auto", names, twin.rows(LENGTHS), 3e-5, checkpointing=checkpointing)


class Int8(nn.Module):
    """A frozen linear layer whose weights are stored as int8, one scale a row: what quantised bases do, on any device."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        scale = linear.weight.detach().abs().amax(1, keepdim=True) / 127
        self.weight = nn.Parameter((linear.weight.detach() / scale).round().to(torch.int8), requires_grad=False)
        self.register_buffer("scale", scale)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(x, self.weight.to(x.dtype) * self.scale)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("variant", [{}, {"use_rslora": True}], ids=str)
def test_adapters_of_an_int8_base_equal_the_loop(twin: Any, variant: dict[str, Any], checkpointing: bool) -> None:
    base = twin.lora(build("mistral", torch.float32), torch.float32, **variant).get_base_model()
    for module in list(base.modules()):
        if hasattr(module, "base_layer"):
            module.base_layer = Int8(module.base_layer)
    names = [name for name, _ in base.named_parameters() if "lora_" in name]
    assert sum(p.dtype == torch.int8 for p in base.parameters()) == len(names) // 2
    twin.compare(base, "auto", names, twin.rows(LENGTHS), 3e-5, checkpointing=checkpointing)


def quantised(twin: Any, bits: int) -> Any:
    """LoRA on a base of bitsandbytes, on the processor."""
    bnb = pytest.importorskip("bitsandbytes")
    hf.set_seed(0)  # rows come in blocks of 32
    wider = {"hidden_size": 64, "intermediate_size": 128, "head_dim": 16}
    model = hf.AutoModelForCausalLM.from_config(hf.MistralConfig(**(SMALL | wider)))
    for name, linear in list(model.named_modules()):
        if isinstance(linear, nn.Linear) and name != "lm_head":
            shape = linear.in_features, linear.out_features
            if bits == 4:
                layer = bnb.nn.Linear4bit(*shape, bias=False, quant_type="nf4")
                layer.weight = bnb.nn.Params4bit(linear.weight.data.clone(), requires_grad=False, quant_type="nf4")
            else:
                layer = bnb.nn.Linear8bitLt(*shape, bias=False, has_fp16_weights=False)
                layer.weight = bnb.nn.Int8Params(linear.weight.data.clone(), requires_grad=False, has_fp16_weights=False)
            parent, _, short = name.rpartition(".")
            setattr(model.get_submodule(parent), short, layer.to("cpu"))
    base = twin.lora(model, torch.float32).get_base_model()
    assert {torch.uint8 if bits == 4 else torch.int8} < {p.dtype for p in base.parameters()}
    return base


def test_adapters_of_a_4_bit_base_equal_the_loop_over_its_weights(twin: Any) -> None:
    base, rows = quantised(twin, 4), twin.rows(LENGTHS)
    with GradientEngine(base, EngineSettings("lora", signals=False)) as engine:
        names, norms = [site.name for site in engine.sites], engine.block(twin.pad(rows)).columns["norm"]
        assert all(torch.equal(norms, engine.block(twin.pad(rows)).columns["norm"]) for _ in range(2))
    import bitsandbytes as bnb

    for module in list(base.modules()):
        if hasattr(module, "base_layer"):
            weight = module.base_layer.weight
            plain = nn.Linear(module.base_layer.in_features, module.base_layer.out_features, bias=False)
            plain.weight = nn.Parameter(bnb.functional.dequantize_4bit(weight.data, weight.quant_state))
            module.base_layer = plain
    true = twin.naive(base, rows)
    assert norms.tolist() == pytest.approx([true.norm(z, names) for z in range(len(rows))], rel=1e-4)


def test_4_bit_weights_packed_for_inference_are_refused(twin: Any) -> None:
    base = quantised(twin, 4)
    if not base.model.layers[0].self_attn.q_proj.base_layer.support_avx512bf16_for_cpu:
        pytest.skip("this processor does not pack them")
    with torch.no_grad():
        base.eval()(input_ids=torch.tensor([[5, 6, 7]]))
    with (
        pytest.raises(ModelError, match=r"q_proj\.base_layer must have 4-bit weights that gradients pass through"),
        GradientEngine(base),
    ):
        pass


def test_adapters_of_an_8_bit_base_equal_one_backward_per_example(twin: Any) -> None:
    base, rows = quantised(twin, 8), twin.rows(LENGTHS)
    with GradientEngine(base, EngineSettings("lora", signals=False)) as engine:
        names, norms = [site.name for site in engine.sites], engine.block(twin.pad(rows)).columns["norm"]
    own = [base.get_parameter(name).requires_grad_(True) for name in names]
    base.eval()  # its inputs are quantised too, whatever their type: the loop is in float32
    for z, row in enumerate(rows):
        scores = base(input_ids=row.ids[None], use_cache=False).logits[0, :-1].log_softmax(-1)
        at = row.labels[1:] != -100
        gradients = torch.autograd.grad(-scores[at].gather(1, row.labels[1:][at][:, None]).mean(), own)
        assert norms[z].item() == pytest.approx(sum(g.double().square().sum().item() for g in gradients) ** 0.5, rel=1e-5)


def test_weights_of_an_int8_base_have_no_gradient_and_are_refused(twin: Any) -> None:
    base = twin.lora(build("mistral", torch.float32), torch.float32).get_base_model()
    layer = base.model.layers[0].self_attn.q_proj
    layer.base_layer = Int8(layer.base_layer)
    message = r"q_proj\.base_layer\.weight must belong to a layer gradsieve has a rule for, got Int8; .*--params"
    with pytest.raises(ModelError, match=message):
        GradientEngine(base, EngineSettings("linear"))


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("family", ["mistral", "gemma2", "phi3", "qwen3-moe"])  # windows of five tokens in the first two
def test_packed_rows_attend_within_their_parts(twin: Any, family: str, checkpointing: bool) -> None:
    model, rows = build(family), twin.rows((14, 9, 17, 11))
    pairs = [rows[:2], rows[2:]]
    packed = twin.pad(
        [type(rows[0])(*(torch.cat([getattr(row, x) for row in pair]) for x in ("ids", "labels"))) for pair in pairs]
    )
    places = torch.zeros_like(packed.input_ids)
    for z, pair in enumerate(pairs):
        both = torch.cat([torch.arange(len(row.ids)) for row in pair])
        places[z, : len(both)] = both
        places[z, len(both) :] = torch.arange(places.shape[1] - len(both))  # padding is a part of its own
    settings = EngineSettings("linear", SketchPlan(256, seed=5), "sum", signals=False)
    with GradientEngine(model, settings, checkpointing=checkpointing) as engine:
        names, block = [site.name for site in engine.sites], engine.block(dataclasses.replace(packed, position_ids=places))
    true = twin.naive(model, rows, "sum")
    for z in (0, 1):
        own = [true.merged(i, names) for i in (2 * z, 2 * z + 1)]
        norm = sum(float((own[0][key] + own[1][key]).square().sum()) for key in own[0]) ** 0.5
        sketch = sum(true.sketch(i, names, settings.sketch) for i in (2 * z, 2 * z + 1))
        assert block.columns["norm"][z].item() == pytest.approx(norm, rel=1e-6)
        assert (block.sketch[z] - sketch).norm() < 1e-5 * norm


def test_adapters_of_the_embedding_are_refused(twin: Any) -> None:
    from peft import LoraConfig

    model = twin.lora(build("mistral"), torch.float64, config=LoraConfig(r=2, target_modules=["embed_tokens"]))
    message = r"embed_tokens\.lora_embedding_A\.default must belong to a layer that the model calls"
    with pytest.raises(ModelError, match=message), GradientEngine(model):
        pass


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"modules_to_save": ["input_layernorm"]}, r"layernorm\.modules_to_save\.default\.weight .* got one of ModulesToSave"),
        ({"trainable_token_indices": [3]}, r"token_adapter\.trainable_tokens_delta\.default must be a LoRA matrix"),
        ({"kind": "VeraConfig"}, r"q_proj\.vera_lambda_b\.default must be .*; name what to take, such as --params lora"),
        ({"kind": "OFTConfig", "r": 4, "oft_block_size": 0}, r"q_proj\.oft_R\.default\.weight must be a LoRA matrix"),
        ({"kind": "PromptTuningConfig", "num_virtual_tokens": 3}, "PromptTuningConfig, which adds tokens to the prompt"),
    ],
)
def test_what_peft_trains_beside_lora_is_not_left_out_in_silence(twin: Any, config: dict[str, Any], message: str) -> None:
    import peft

    kind = getattr(peft, config.get("kind", "LoraConfig"))
    place = {"task_type": "CAUSAL_LM"} if kind is peft.PromptTuningConfig else {"target_modules": ["q_proj"]}
    options = {key: value for key, value in config.items() if key != "kind"}
    model = twin.lora(build("mistral"), torch.float64, config=kind(**place, **options))
    with pytest.raises(ModelError, match=message):
        GradientEngine(model)
    if "modules_to_save" in config:
        names = [name for name, p in model.get_base_model().named_parameters() if p.requires_grad]
        twin.compare(model.get_base_model(), "lora,re:modules_to_save", names, twin.rows(LENGTHS), 1e-9)


@pytest.mark.parametrize(("family", "layer", "refused"), [("opt", "q_proj", True), ("mistral", "q_proj", False)])
def test_biases_that_peft_trains_beside_lora_are_not_left_out_in_silence(
    twin: Any, family: str, layer: str, refused: bool
) -> None:
    from peft import LoraConfig

    config = LoraConfig(r=2, target_modules=[layer], bias="lora_only")
    model = twin.lora(build(family), torch.float64, config=config)
    if not refused:  # there are none
        GradientEngine(model)
        return
    with pytest.raises(ModelError, match=r"got bias='lora_only': biases beside them; name what to take"):
        GradientEngine(model)
    names = [name for name, p in model.get_base_model().named_parameters() if p.requires_grad]
    assert any(name.endswith("bias") for name in names)
    twin.compare(model.get_base_model(), r"lora,re:base_layer\.bias$", names, twin.rows(LENGTHS), 1e-9)


def test_adapters_of_the_head_are_refused(twin: Any) -> None:
    from peft import LoraConfig

    model = twin.lora(build("mistral"), torch.float64, config=LoraConfig(r=2, target_modules=["lm_head"]))
    with pytest.raises(ModelError, match="merge adapters of the LM head"):
        GradientEngine(model)


@pytest.mark.parametrize("spec", ["linear", "last:1", "lora"])
def test_checkpointed_blocks_may_be_the_lowest_that_are_watched(twin: Any, spec: str) -> None:
    model = build("mistral", torch.float32)
    model = twin.lora(model, torch.float32).get_base_model() if spec == "lora" else model
    rows, found = twin.rows(LENGTHS), []
    for checkpointing in (False, True):
        with GradientEngine(model, EngineSettings(spec, signals=False), checkpointing=checkpointing) as engine:
            found.append(engine.block(twin.pad(rows)))
    assert torch.allclose(found[0].sketch, found[1].sketch, rtol=1e-4, atol=1e-5)
    assert torch.allclose(found[0].columns["norm"], found[1].columns["norm"], rtol=1e-5)
