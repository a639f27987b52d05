"""What a forward pass alone gives of every example: its loss, and the mean of its last hidden states."""

from __future__ import annotations

from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor, nn

from gradsieve.errors import ModelError
from gradsieve.gradients.head import LOGIT_FLOATS, Head, Supervised
from gradsieve.gradients.parameters import unwrap
from gradsieve.gradients.settings import Batch, Block, EngineSettings


class ForwardEngine:
    """Takes `loss` and, on request, hidden states of examples without a backward pass; a context manager.

    Args:
        model: A causal language model of transformers, or a PEFT model around one. In eval mode while the engine is open.
        settings: `hidden` and `reduction` are read.

    Raises:
        ModelError: The model's head does something our loss does not know.
    """

    def __init__(self, model: nn.Module, settings: EngineSettings) -> None:
        self.settings = settings
        self.model: Any = unwrap(model)
        self.head = Head(self.model)
        self._modes: list[tuple[nn.Module, bool]] = []

    def __enter__(self) -> Self:
        self._modes = [(module, module.training) for module in self.model.modules()]
        self.model.eval()
        ids = torch.tensor([[1, 2, 3, 4]], device=self.head.module.weight.device)
        with torch.no_grad():
            ours = self.head.logits(self.model.base_model(input_ids=ids, use_cache=False)[0][0])
            theirs = self.model(input_ids=ids, use_cache=False).logits[0]
        try:
            require_same_logits(self.model, ours, theirs.to(ours.dtype))
        except ModelError:
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for module, training in self._modes:
            module.training = training

    @torch.no_grad()
    def block(self, batch: Batch) -> Block:
        """Returns the columns `loss` and `completion_tokens` and the hidden states of a batch; its sketches are 0 wide.

        An example without supervised positions has a NaN loss, as in `GradientEngine.block`.
        """
        hidden: Tensor = self.model.base_model(input_ids=batch.input_ids, use_cache=False)[0]
        supervised = Supervised.of(batch.labels, self.settings.reduction, self.head.dtype)
        nll = self._nll(hidden[supervised.example, supervised.position], supervised)
        counts = torch.bincount(supervised.example, minlength=len(hidden)).double()
        loss = torch.zeros_like(counts).index_add_(0, supervised.example, nll.double()) / counts
        states = pooled(hidden, batch.lengths) if self.settings.hidden else None
        return Block(hidden.new_empty(len(hidden), 0, dtype=torch.float32), {"loss": loss, "completion_tokens": counts}, states)

    def _nll(self, picked: Tensor, supervised: Supervised) -> Tensor:
        rows = max(1, LOGIT_FLOATS // self.head.module.weight.shape[0])
        parts = [
            nn.functional.cross_entropy(self.head.logits(h), target, reduction="none")
            for h, target in zip(picked.split(rows), supervised.target.split(rows), strict=True)
        ]
        return torch.cat(parts) if parts else picked.new_zeros(0)


def pooled(hidden: Tensor, lengths: Tensor | None) -> Tensor:
    """Returns Σ_t t·h_t / Σ_t t over each example's tokens, summed in float32 or better: float32 [B, D].

    The position-weighted mean of Muennighoff (2022), arXiv:2202.08904: under causal attention later tokens have seen more.

    Args:
        hidden: Last hidden states [B, T, D].
        lengths: Tokens of each example before padding, int64 [B]; None where none is padded.
    """
    B, T, _ = hidden.shape
    place = torch.arange(1, T + 1, device=hidden.device).expand(B, T)
    weight = place if lengths is None else place * (place <= lengths[:, None])
    wide = torch.promote_types(hidden.dtype, torch.float32)
    share = weight.to(wide) / weight.sum(1, keepdim=True).to(wide)
    return (share[:, None, :] @ hidden.to(wide))[:, 0].float()


def require_same_logits(model: nn.Module, ours: Tensor, theirs: Tensor) -> None:
    """Raises ModelError unless our head on the last hidden states gives the model's own logits, and finite ones."""
    if not theirs.isfinite().all():
        raise ModelError(
            f"{type(model).__name__} must give finite logits, got NaN or infinity for tokens 1 to 4; "
            "its weights are damaged, or too large for its dtype"
        )
    if not torch.allclose(ours, theirs, rtol=1e-2, atol=1e-2 * float(theirs.abs().max())):
        raise ModelError(
            f"the output of {type(model).__name__} must be its LM head on the last hidden states, got logits that "
            f"differ by {float((ours - theirs).abs().max()):.3g}; this architecture's head is not supported yet"
        )
