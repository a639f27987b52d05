from __future__ import annotations

import copy
import math
from typing import Any

import numpy as np
import pytest
import torch

from gradsieve.errors import InvalidArgument
from gradsieve.evaluate import Suite, TestSet, measure
from gradsieve.evaluate.completion import Completion
from gradsieve.evaluate.keys import marks


@pytest.fixture
def suite(questions: Any, facts: Any, example: Any, tokenizer: Any) -> Suite:
    choices = ["red", "a rather long answer", "blue"]
    items = [example(f"c{i}", f"Which colour, {i}?", "red", choices=choices, answer=i % 3) for i in range(9)]
    return Suite.of(tokenizer, target={"facts": facts, "colours": items}, general={"math": questions})


def test_metrics_are_those_of_one_example_at_a_time_in_float64(
    suite: Suite, tiny: Any, naive_log_p: Any, tokenizer: Any
) -> None:
    model, base = tiny(), tiny(seed=5)
    found = measure(model, suite, tokenizer=tokenizer, base=base, batch_tokens=500)
    for test in suite:
        at, marked = 0, marks([Completion.of(t, tokenizer) for t in test.tokens], worked=test.kind == "worked")
        for i, tokens in enumerate(test.tokens):
            log_p, target = naive_log_p(model, tokens)
            log_b, _ = naive_log_p(base, tokens)
            count = len(target)
            nll = -log_p[range(count), target]
            right = (log_p.argmax(1) == target).double()
            key, number = marked.key[at : at + count], marked.number[at : at + count]
            at += count
            expected = {
                "loss": nll.mean(),
                "nll": nll.sum(),
                "tokens": torch.tensor(float(count)),
                "key_loss": nll[key].mean(),
                "key_accuracy": right[key].mean(),
                "number_accuracy": right[number].mean(),
                "kl": (log_b.exp() * (log_b - log_p)).sum(1).mean(),
            }
            for name, value in expected.items():
                assert found[test.name][name].dtype == torch.float64
                torch.testing.assert_close(found[test.name][name][i], value.double(), rtol=1e-4, atol=1e-5, equal_nan=True)


def test_an_item_without_key_or_number_has_none(suite: Suite, tiny: Any, tokenizer: Any) -> None:
    found = measure(tiny(), suite, tokenizer=tokenizer)
    assert found["facts"]["key_loss"].isnan().tolist() == [False, False, False, True]
    assert found["facts"]["number_accuracy"].isnan().all()
    assert not found["math"]["number_accuracy"].isnan().any()


def test_accuracies_are_those_of_the_greedy_choice(suite: Suite, tiny: Any, tokenizer: Any) -> None:
    """A model that always says 5: right on every 5, wrong on all other digits."""
    model = tiny()
    five = tokenizer.convert_tokens_to_ids("5")
    with torch.no_grad():
        model.lm_head.weight.zero_()
        model.lm_head.bias = torch.nn.Parameter(torch.zeros(259).index_fill(0, torch.tensor([five]), 3.0))
    found = measure(model, suite, tokenizer=tokenizer)["math"]
    assert found["key_accuracy"].tolist() == [1.0, 0.0, 0.2, 0.0]  # 5; 48; 1,500; 1,490: the comma belongs to the number
    assert found["number_accuracy"].tolist() == [2 / 4, 0.0, 3 / 14, 1 / 14]
    log_total = math.log(258 + math.exp(3.0))
    assert found["key_loss"].tolist() == pytest.approx([log_total - 3.0, log_total, log_total - 3 / 5, log_total])


def test_choices_are_solved_by_hand(example: Any, tokenizer: Any, tiny: Any) -> None:
    """A model that gives each token its own fixed probability: the longer option loses as a whole and wins per token."""
    model = tiny()
    logits = torch.zeros(259)
    logits[tokenizer.convert_tokens_to_ids("a")] = 4.0
    logits[1] = 1.0  # end of turn
    with torch.no_grad():
        model.lm_head.weight.zero_()
        model.lm_head.bias = torch.nn.Parameter(logits)
    nll = -torch.log_softmax(logits, 0)
    a, b, end = (float(nll[tokenizer.convert_tokens_to_ids(t)]) for t in ("a", "b", "<|im_end|>"))
    sums = [b + end, 8 * a + end, a + b + end]
    means = [sums[0] / 2, sums[1] / 9, sums[2] / 3]
    rows = [example(str(i), f"Q{i}", "b", choices=["b", "aaaaaaaa", "ab"], answer=i) for i in range(3)]
    found = measure(model, [TestSet.of("t", "target", rows, tokenizer)], tokenizer=tokenizer)["t"]
    assert (int(np.argmin(sums)), int(np.argmin(means))) == (1, 1) or sums.index(min(sums)) != means.index(min(means))
    assert found["choice"].tolist() == [float(i == int(np.argmin(sums))) for i in range(3)]
    assert found["choice_norm"].tolist() == [float(i == int(np.argmin(means))) for i in range(3)]


def test_equal_options_count_for_the_first(example: Any, tokenizer: Any, tiny: Any) -> None:
    rows = [example(str(i), "Same?", "x", choices=["x", "x", "x"], answer=i) for i in range(3)]
    found = measure(tiny(), [TestSet.of("t", "target", rows, tokenizer)], tokenizer=tokenizer, metrics=["choice"])
    assert found["t"]["choice"].tolist() == [1.0, 0.0, 0.0]


def test_only_what_was_asked_for_is_there(suite: Suite, tiny: Any, adapted: Any, tokenizer: Any) -> None:
    model = tiny()
    found = measure(model, suite, tokenizer=tokenizer, metrics=["tokens", "choice"])
    assert {name: list(values) for name, values in found.items()} == {
        "facts": ["tokens"],
        "colours": ["tokens", "choice"],
        "math": ["tokens"],
    }
    assert "kl" not in measure(model, suite, tokenizer=tokenizer)["math"]
    assert "kl" in measure(adapted(copy.deepcopy(model)), suite, tokenizer=tokenizer)["math"]
    assert "choice" not in measure(model, suite, tokenizer=tokenizer)["math"]


def test_an_adapted_model_has_its_base_within(suite: Suite, tiny: Any, adapted: Any, tokenizer: Any) -> None:
    base = tiny()
    model = adapted(copy.deepcopy(base))
    own, separate = (measure(model, suite, tokenizer=tokenizer, base=b, metrics=["kl"]) for b in (None, base))
    for name in own:
        assert torch.equal(own[name]["kl"], separate[name]["kl"])
        assert (own[name]["kl"] > 0.01).all()


def test_wrong_requests_are_refused(suite: Suite, tiny: Any, tokenizer: Any) -> None:
    with pytest.raises(InvalidArgument, match=r"metrics must be among loss, .*, got 'los'"):
        measure(tiny(), suite, tokenizer=tokenizer, metrics=["los"])  # type: ignore[list-item]
    with pytest.raises(InvalidArgument, match="base must be given for KL"):
        measure(tiny(), suite, tokenizer=tokenizer, metrics=["kl"])
    with pytest.raises(InvalidArgument, match="sets must have different names, got math, math"):
        measure(tiny(), [suite.sets[2]] * 2, tokenizer=tokenizer)
