"""Greedy generation: what a model answers to each item's prompt, up to its end of turn.

The prompt of an item is what stands before its last labelled turn, generation header included. Batches are padded on the
left; every step takes the likeliest token (equal logits: the smaller id), whatever the model's own settings say.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from gradsieve.clock import Progress, silent
from gradsieve.data.batches import batches
from gradsieve.errors import InvalidArgument
from gradsieve.evaluate.completion import Completion, decode
from gradsieve.evaluate.network import evaluating
from gradsieve.gradients.parameters import unwrap


@dataclass(frozen=True, slots=True)
class Generated:
    """What a model wrote.

    Attributes:
        text: Without special tokens.
        tokens: How many it wrote, the end of turn included.
        stopped: Whether it came to an end of its own; else it was cut off at the limit.
    """

    text: str
    tokens: int
    stopped: bool


def generate(
    model: nn.Module,
    prompts: Sequence[NDArray[np.int32]],
    *,
    tokenizer: Any,
    stop: Sequence[int],
    max_new_tokens: int = 256,
    batch_tokens: int = 4096,
    device: str | None = None,
    stage: str = "generate",
    progress: Progress = silent,
) -> list[Generated]:
    """Returns the greedy continuation of every prompt, in their order.

    Args:
        model: A causal language model of transformers, or a PEFT model around one; left as it was.
        prompts: Token ids, without padding.
        tokenizer: Turns tokens into text.
        stop: Tokens that end a text; see `stop_tokens`.
        max_new_tokens: Where a text is cut off.
        batch_tokens: Padded tokens at once, new ones included.
        device: Where the token ids go; None is where the model's embedding is.
        stage: The name that `progress` is given.
        progress: Is told of tokens done: `max_new_tokens` for each text, however soon it ended.

    Raises:
        InvalidArgument: `max_new_tokens` is below 1, there is no stop token, or a prompt and its text do not fit.
    """
    if max_new_tokens < 1:
        raise InvalidArgument(f"max_new_tokens must be at least 1, got {max_new_tokens}")
    if not stop:
        raise InvalidArgument("stop must name at least one token that ends a text, got none; give the tokenizer an eos_token")
    inner: Any = unwrap(model)
    _check_length(inner, prompts, max_new_tokens)
    place = device or inner.get_input_embeddings().weight.device
    order = sorted(range(len(prompts)), key=lambda i: (-len(prompts[i]), i))
    written: dict[int, Generated] = {}
    with evaluating(model), _greedy(inner, stop, max_new_tokens):
        for part in batches([len(prompts[i]) + max_new_tokens for i in order], batch_tokens):
            ids, mask = _padded_left([prompts[i] for i in order[part]], stop[0])
            out: Tensor = inner.generate(input_ids=ids.to(place), attention_mask=mask.to(place))
            for i, new in zip(order[part], out[:, ids.shape[1] :].tolist(), strict=True):
                written[i] = _cut(new, stop, tokenizer)
            progress(stage, len(written) * max_new_tokens, len(prompts) * max_new_tokens)
    return [written[i] for i in range(len(prompts))]


def stop_tokens(model: nn.Module, items: Sequence[Completion], tokenizer: Any) -> list[int]:
    """Returns the tokens that end a text: the tokenizer's and the model's, and the special tokens that end the items' turns."""
    config = unwrap(model).generation_config
    ends = config.eos_token_id if config is not None else None
    found = {tokenizer.eos_token_id, *(ends if isinstance(ends, list) else [ends])}
    found |= {item.last_id for item in items if item.last_id in tokenizer.all_special_ids}
    return sorted(token for token in found if token is not None)


@contextmanager
def _greedy(inner: Any, stop: Sequence[int], max_new_tokens: int) -> Iterator[None]:
    """Gives the model plain greedy settings, and its own back: `generate` would mix these into whatever it is passed."""
    from transformers import GenerationConfig

    before = inner.generation_config
    inner.generation_config = GenerationConfig(
        max_new_tokens=max_new_tokens, do_sample=False, num_beams=1, eos_token_id=list(stop), pad_token_id=stop[0]
    )
    try:
        yield
    finally:
        inner.generation_config = before


def _padded_left(rows: Sequence[NDArray[np.int32]], value: int) -> tuple[Tensor, Tensor]:
    """Returns ids and mask, int64 [B, T]."""
    longest = max(len(row) for row in rows)
    ids = torch.full((len(rows), longest), value)
    mask = torch.zeros_like(ids)
    for i, row in enumerate(rows):
        ids[i, longest - len(row) :] = torch.from_numpy(row.astype(np.int64))
        mask[i, longest - len(row) :] = 1
    return ids, mask


def _cut(new: list[int], stop: Sequence[int], tokenizer: Any) -> Generated:
    end = next((i for i, token in enumerate(new) if token in stop), None)
    kept = new if end is None else new[:end]
    return Generated(decode(kept, tokenizer), len(kept) + (end is not None), end is not None)


def _check_length(inner: Any, prompts: Sequence[NDArray[np.int32]], max_new_tokens: int) -> None:
    room = getattr(inner.config.get_text_config(), "max_position_embeddings", None)
    for i, prompt in enumerate(prompts):
        if not len(prompt):
            raise InvalidArgument(f"prompt {i} must hold at least one token, got none; give the item a question")
        if room is not None and len(prompt) + max_new_tokens > room:
            got = f"{len(prompt)} + {max_new_tokens}"
            raise InvalidArgument(
                f"prompt {i} and its text must fit into the model ({room} tokens), got {got}; lower max_new_tokens"
            )
