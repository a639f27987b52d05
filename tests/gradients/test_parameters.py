from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from gradsieve.errors import InvalidArgument, ModelError
from gradsieve.gradients.parameters import choose_parameters, chosen_size, unwrap


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("last:3", "N at most 2 .* got 3"),
        ("last:0", "params must be made of"),
        ("liner", "params must be made of .* got 'liner'"),
        ("", "params must be made of"),
        ("re:(", "must be a regular expression, got '\\('"),
        ("re:nothing", "must match a parameter, got 're:nothing'"),
        ("linear,re:nothing", "got 're:nothing'"),
        ("lora", "must match a parameter, got 'lora'"),
    ],
)
def test_a_specification_that_means_nothing_is_refused(twin: Any, spec: str, message: str) -> None:
    with pytest.raises(InvalidArgument, match=message):
        choose_parameters(twin.model("llama"), spec)


def test_terms_add_up_in_the_model_s_own_order_without_repeats(twin: Any) -> None:
    model = twin.model("llama-tied")
    names = [name for name, _ in model.named_parameters(remove_duplicate=False)]
    sites = [site.name for site in choose_parameters(model, "lm-head , vectors,linear, last:1,embedding")]
    assert sites == names
    assert [site.name for site in choose_parameters(model, "all")] == names


def test_a_site_s_shape_is_that_of_a_gradient_by_rows_of_output(twin: Any) -> None:
    shapes = {site.name: site.shape for site in choose_parameters(twin.model("gpt2"), "all")}
    assert shapes["transformer.h.0.attn.c_attn.weight"] == (96, 32)  # stored [32, 96]
    assert shapes["transformer.h.0.attn.c_attn.bias"] == (96, 1)
    assert shapes["lm_head.weight"] == (twin.vocabulary, 32)


def test_tied_weights_are_one_in_the_size_of_a_gradient(twin: Any) -> None:
    tied, apart = twin.model("llama-tied"), twin.model("llama")
    assert chosen_size(tied, "embedding,lm-head") == chosen_size(tied, "embedding") == twin.vocabulary * 32
    assert chosen_size(apart, "embedding,lm-head") == 2 * twin.vocabulary * 32
    assert chosen_size(tied, "all") == sum(p.numel() for p in tied.parameters())


def test_auto_is_the_linear_layers_of_a_plain_model(twin: Any) -> None:
    model = twin.model("llama")
    assert choose_parameters(model, "auto") == choose_parameters(model, "linear")
    assert unwrap(model) is model


def test_a_parameter_that_two_modules_hold_is_refused(twin: Any) -> None:
    model = twin.model("llama")
    model.model.layers[1].mlp.down_proj.weight = model.model.layers[0].mlp.down_proj.weight
    message = r"layers\.0\.mlp\.down_proj\.weight must be held by one module, got model\.layers\.1\.mlp\.down_proj\.w"
    for spec in ("linear", "re:layers.0.mlp"):
        with pytest.raises(ModelError, match=message):
            choose_parameters(model, spec)
    assert choose_parameters(model, "re:attn")


def test_terms_mean_the_part_that_reads_text_of_a_model_that_also_sees() -> None:
    from transformers import AutoModelForCausalLM, Gemma3Config

    small = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = small | {"vocab_size": 50, "num_key_value_heads": 1, "head_dim": 8}
    seeing = Gemma3Config(text_config=text, vision_config=small | {"num_hidden_layers": 3, "image_size": 28, "patch_size": 14})
    model = AutoModelForCausalLM.from_config(seeing)
    assert any("vision_tower" in name for name, _ in model.named_parameters())
    linear = [site.name for site in choose_parameters(model, "auto")]
    assert len(linear) == 14
    assert all(name.startswith("model.language_model.layers.") for name in linear)
    assert [site.name for site in choose_parameters(model, "last:1")] == linear[7:]
    assert [site.kind for site in choose_parameters(model, "embedding,lm-head")] == ["embedding", "head"]
    assert "model.vision_tower.head.mlp.fc1.weight" in [site.name for site in choose_parameters(model, "re:vision_tower.*fc1")]
    with pytest.raises(InvalidArgument, match="N at most 2"):
        choose_parameters(model, "last:3")


def test_a_custom_matrix_among_the_linear_layers_is_an_error_and_not_skipped(twin: Any) -> None:
    class Mixer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gate_up_proj = nn.Parameter(torch.zeros(2, 4, 4))
            self.dropout = nn.Dropout()

    model = twin.model("llama")
    model.model.layers[1].mlp.experts = Mixer()
    with pytest.raises(ModelError, match=r"layers\.1\.mlp\.experts\.gate_up_proj must belong .* got Mixer"):
        choose_parameters(model, "linear")
    assert choose_parameters(model, "last:1,embedding".replace("last:1", "re:layers.0.*proj"))
