from collections.abc import Callable
from typing import Any

import pytest
import torch

from gradsieve.data import IGNORE, Tokens
from gradsieve.train.loss import example_losses

from .conftest import examples, llama


def loss_naive(model: Any, tokens: Tokens) -> torch.Tensor:
    """The mean over completion tokens of -log p(y_t | y_<t), one example, all logits, token by token."""
    ids = torch.from_numpy(tokens.input_ids).long()
    log_p = model(input_ids=ids[None]).logits[0].log_softmax(-1)
    terms = [-log_p[t - 1, ids[t]] for t in range(1, len(ids)) if tokens.labels[t] != IGNORE]
    return torch.stack(terms).mean()


def batch(tokens: list[Tokens]) -> dict[str, torch.Tensor]:
    from torch.nn.utils.rnn import pad_sequence

    ids = [torch.from_numpy(t.input_ids).long() for t in tokens]
    return {
        "input_ids": pad_sequence(ids, batch_first=True, padding_value=0),
        "attention_mask": pad_sequence([torch.ones_like(i) for i in ids], batch_first=True),
        "labels": pad_sequence([torch.from_numpy(t.labels).long() for t in tokens], batch_first=True, padding_value=IGNORE),
    }


def test_a_batch_has_the_losses_of_its_examples_one_by_one(make_model: Callable[..., Any]) -> None:
    model, tokens = make_model(torch.float64), examples(5)
    losses = example_losses(model, **batch(tokens))
    assert losses.dtype == torch.float64
    assert losses.tolist() == pytest.approx([loss_naive(model, t).item() for t in tokens], abs=1e-12)


def test_tied_embeddings_get_both_parts_of_their_gradient() -> None:
    model, tokens = llama(torch.float64, tied=True), examples(3)
    example_losses(model, **batch(tokens)).sum().backward()
    fast = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    sum(loss_naive(model, t) for t in tokens).backward()  # type: ignore[union-attr]
    for name, p in model.named_parameters():
        torch.testing.assert_close(fast[name], p.grad, atol=1e-12, rtol=1e-9)


def test_a_label_on_the_first_token_is_not_learned_and_half_precision_is_summed_in_float32() -> None:
    model, tokens = llama(torch.bfloat16), examples(2)
    first = [Tokens(t.input_ids, t.labels.copy(), False) for t in tokens]
    for t in first:
        t.labels[0] = t.input_ids[0]
    losses = example_losses(model, **batch(first))
    assert losses.dtype == torch.float32
    assert losses.tolist() == example_losses(model, **batch(tokens)).tolist()


def test_the_model_is_left_without_hooks_even_after_an_error() -> None:
    model = llama()
    example_losses(model, **batch(examples(1)))
    with pytest.raises(IndexError):
        example_losses(model, **{**batch(examples(1)), "input_ids": torch.full((1, 3), 9999)})
    assert not model.lm_head._forward_pre_hooks
    assert model(input_ids=torch.ones(1, 3, dtype=torch.long)).logits.shape[1] == 3
