from __future__ import annotations

import copy
import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from gradsieve.data import Tokens
from gradsieve.errors import InvalidArgument, ModelError
from gradsieve.evaluate import TestSet, keep_base, measure, network
from gradsieve.evaluate.likelihood import _divergence, likelihood

KINDS = ("llama", "gpt2")


@pytest.fixture
def rows(tokens_of: Any, questions: Any, facts: Any) -> list[Tokens]:
    return tokens_of(questions + facts)


@pytest.mark.parametrize("kind", KINDS)
def test_values_are_those_of_one_example_at_a_time_in_float64(
    kind: str, rows: list[Tokens], tiny: Any, naive_log_p: Any
) -> None:
    model, base = tiny(kind), tiny(kind, seed=5)
    found = likelihood(model, rows, base=base, kl=True, batch_tokens=400)
    nll, right, kl, row = [], [], [], []
    for i, tokens in enumerate(rows):
        log_p, target = naive_log_p(model, tokens)
        log_b, _ = naive_log_p(base, tokens)
        for t, y in enumerate(target.tolist()):
            row.append(i)
            nll.append(-float(log_p[t, y]))
            right.append(int(log_p[t].argmax()) == y)
            kl.append(sum(math.exp(b) * (b - p) for b, p in zip(log_b[t].tolist(), log_p[t].tolist(), strict=True)))
    assert found.row.tolist() == row
    assert found.right.tolist() == right
    torch.testing.assert_close(found.nll, torch.tensor(nll, dtype=torch.float64), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found.kl, torch.tensor(kl, dtype=torch.float64), rtol=1e-4, atol=1e-5)
    assert found.kl is not None
    assert found.kl.max() > 0.1, "the two models differ"


@pytest.mark.parametrize("kind", KINDS)
def test_padding_and_batches_do_not_change_a_value(
    kind: str, rows: list[Tokens], monkeypatch: pytest.MonkeyPatch, tiny: Any
) -> None:
    model, base = tiny(kind).double(), tiny(kind, seed=5).double()
    together = likelihood(model, rows, base=base, kl=True, batch_tokens=10_000)
    monkeypatch.setattr(network, "LOGIT_FLOATS", 259 * 7)  # seven positions at a time
    alone = [likelihood(model, [tokens], base=base, kl=True, batch_tokens=1) for tokens in rows]
    for name in ("nll", "right", "kl"):
        torch.testing.assert_close(
            getattr(together, name), torch.cat([getattr(one, name) for one in alone]), rtol=1e-12, atol=1e-12
        )


def test_logits_of_more_positions_than_the_limit_never_exist(
    rows: list[Tokens], monkeypatch: pytest.MonkeyPatch, tiny: Any
) -> None:
    sizes: list[int] = []
    monkeypatch.setattr(network, "LOGIT_FLOATS", 259 * 7)
    model = tiny()
    model.get_output_embeddings().register_forward_hook(lambda m, a, out: sizes.append(out.numel()))
    likelihood(model, rows)
    assert max(sizes) <= 259 * 7


@pytest.mark.parametrize("targets", [("q_proj", "down_proj"), ("lm_head", "v_proj")])
def test_a_model_without_its_adapters_is_its_own_base(
    targets: tuple[str, ...], rows: list[Tokens], tiny: Any, adapted: Any
) -> None:
    base = tiny()
    model = adapted(copy.deepcopy(base), targets=targets)
    own = likelihood(model, rows, kl=True)
    separate = likelihood(model, rows, base=base, kl=True)
    assert own.kl is not None
    assert separate.kl is not None
    assert torch.equal(own.kl, separate.kl)
    assert own.kl.min() > -1e-6
    assert own.kl.max() > 0.01
    merged = likelihood(copy.deepcopy(model).merge_and_unload(), rows, base=base, kl=True)
    torch.testing.assert_close(own.kl, merged.kl, rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(own.nll, merged.nll, rtol=1e-4, atol=1e-5)


def test_a_model_is_its_own_base_at_no_distance(rows: list[Tokens], tiny: Any) -> None:
    model = tiny()
    found = likelihood(model, rows, base=model, kl=True)
    assert found.kl is not None
    assert found.kl.abs().max() == 0


def test_tokens_that_the_base_rules_out_add_nothing() -> None:
    base = torch.tensor([[0.5, 0.5, 0.0]]).log()
    model = torch.tensor([[0.25, 0.75, 0.0]]).log()
    by_hand = 0.5 * np.log(0.5 / 0.25) + 0.5 * np.log(0.5 / 0.75)
    assert _divergence(base, model).item() == pytest.approx(by_hand, rel=1e-6)
    assert _divergence(base, torch.tensor([[0.0, 1.0, 0.0]]).log()).item() == math.inf, (
        "of what the base may say, a thing ruled out"
    )
    assert _divergence(torch.cat([base, base * math.nan]), torch.cat([model, model])).isnan().tolist() == [False, True]


def test_a_soft_cap_and_a_factor_of_the_head_count(rows: list[Tokens]) -> None:
    from transformers import Gemma2Config, Gemma2ForCausalLM

    torch.manual_seed(0)
    shape: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = Gemma2Config(
        vocab_size=259, num_key_value_heads=2, head_dim=8, final_logit_softcapping=1.0, initializer_range=0.3, **shape
    )
    model = Gemma2ForCausalLM(config).eval()
    tokens = rows[0]
    ids = torch.from_numpy(tokens.input_ids).long()[None]
    with torch.no_grad():
        log_p = torch.log_softmax(model(input_ids=ids).logits[0], -1)
    places = np.flatnonzero(tokens.labels != -100)
    by_hand = torch.tensor([-float(log_p[t - 1, int(tokens.labels[t])]) for t in places], dtype=torch.float64)
    torch.testing.assert_close(likelihood(model, [tokens]).nll, by_hand, rtol=1e-5, atol=1e-5)


def test_a_model_is_left_as_it_was(rows: list[Tokens], tiny: Any, adapted: Any) -> None:
    model = adapted(tiny()).train()
    model.base_model.model.lm_head.eval()
    frozen = [parameter for name, parameter in model.named_parameters() if "layers.0" in name and "lora" in name]
    for parameter in frozen:
        parameter.requires_grad_(False)
    modes = [m.training for m in model.modules()]
    likelihood(model, rows, kl=True)
    assert [m.training for m in model.modules()] == modes
    assert not any(parameter.requires_grad for parameter in frozen)
    loss = model(input_ids=torch.arange(3, 9)[None], labels=torch.arange(3, 9)[None]).loss
    loss.backward()
    assert any(p.grad is not None for p in model.parameters())


def test_dropout_is_off_while_it_is_measured(rows: list[Tokens], tiny: Any) -> None:
    model = tiny("gpt2", resid_pdrop=0.5, embd_pdrop=0.5)
    quiet = likelihood(model, rows)
    assert torch.equal(likelihood(model.train(), rows).nll, quiet.nll)


def test_progress_ends_at_all_tokens(rows: list[Tokens], tiny: Any) -> None:
    seen: list[tuple[str, int, int]] = []
    likelihood(tiny(), rows, batch_tokens=300, stage="x", progress=lambda *report: seen.append(report))
    total = sum(len(tokens.input_ids) for tokens in rows)
    assert seen[-1] == ("x", total, total)
    assert len(seen) > 1


def test_kl_without_a_base_is_refused(rows: list[Tokens], tiny: Any) -> None:
    with pytest.raises(InvalidArgument, match="base must be given for KL"):
        likelihood(tiny(), rows, kl=True)


def test_a_base_of_another_vocabulary_is_refused(rows: list[Tokens], tiny: Any) -> None:
    base = tiny()
    base.resize_token_embeddings(300, mean_resizing=False)
    with pytest.raises(InvalidArgument, match="vocabulary"):
        likelihood(tiny(), rows, base=base, kl=True)


def test_a_broken_model_is_named_and_its_values_are_never_returned(rows: list[Tokens], tiny: Any) -> None:
    model = tiny()
    model.model.embed_tokens.weight.data[int(rows[0].input_ids[20])] = float("nan")  # not among the tokens it is tried on
    with pytest.raises(ModelError, match="finite losses"):
        likelihood(model, rows)
    model.model.norm.weight.data.fill_(float("inf"))
    with pytest.raises(ModelError, match="finite logits"):
        likelihood(model, rows)


def test_an_unknown_head_is_refused(rows: list[Tokens], tiny: Any) -> None:
    model = tiny()
    model.register_forward_hook(lambda module, args, output: replace(output, logits=output.logits * 3))
    with pytest.raises(ModelError, match="head is not supported"):
        likelihood(model, rows)


def test_adapters_that_lengthen_the_prompt_are_refused(rows: list[Tokens], tiny: Any, with_peft: Any) -> None:
    from peft import PromptTuningConfig

    model = with_peft(tiny(), PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"))
    with pytest.raises(ModelError, match="adds tokens to the prompt"):
        likelihood(model, rows)


@pytest.mark.parametrize("wrapped", [False, True])
def test_a_kept_base_gives_the_same_kl_without_its_model(
    wrapped: bool, tiny: Any, adapted: Any, questions: Any, facts: Any, tokenizer: Any
) -> None:
    sets = [TestSet.of(name, "target", rows, tokenizer) for name, rows in (("math", questions), ("facts", facts))]
    base = tiny().double()
    model = adapted(copy.deepcopy(base), targets=("lm_head", "v_proj"))
    expected = measure(model, sets, tokenizer=tokenizer, base=base, metrics=["kl", "loss"])
    kept = keep_base(model if wrapped else base, sets, batch_tokens=300)
    with torch.no_grad():
        base.lm_head.weight.zero_()  # trained in place since
    found = measure(model, sets, tokenizer=tokenizer, base=kept, metrics=["kl", "loss"])
    for name in expected:
        torch.testing.assert_close(found[name]["kl"], expected[name]["kl"], rtol=1e-9, atol=1e-12)
        assert torch.equal(found[name]["loss"], expected[name]["loss"])
    assert found["math"]["kl"].min() > 0.01


def test_a_base_kept_of_a_model_whose_head_is_trained_whole_has_the_old_head(
    tiny: Any, with_peft: Any, facts: Any, tokenizer: Any
) -> None:
    from peft import LoraConfig

    sets = [TestSet.of("facts", "target", facts, tokenizer)]
    base = tiny().double()
    config = LoraConfig(r=2, target_modules=["v_proj"], modules_to_save=["lm_head"], task_type="CAUSAL_LM")
    model = with_peft(copy.deepcopy(base), config)
    with torch.no_grad():
        model.get_output_embeddings().modules_to_save["default"].weight.mul_(2)
    expected = measure(model, sets, tokenizer=tokenizer, base=base, metrics=["kl"])["facts"]["kl"]
    found = measure(model, sets, tokenizer=tokenizer, base=keep_base(model, sets), metrics=["kl"])["facts"]["kl"]
    assert expected.min() > 0.01
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)


def test_a_kept_base_knows_its_own_sets_only(tiny: Any, questions: Any, facts: Any, tokenizer: Any) -> None:
    math, other = (TestSet.of(name, "target", rows, tokenizer) for name, rows in (("math", questions), ("facts", facts)))
    kept = keep_base(tiny(), [math])
    with pytest.raises(InvalidArgument, match="base must be kept for the sets that are measured, got 4 items it lacks"):
        measure(tiny(), [other], tokenizer=tokenizer, base=kept, metrics=["kl"])
