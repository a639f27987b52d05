"""A live model that takes real optimizer steps and goes back to its start: the world that the OGS simulator imitates.

LoRA adapters on a frozen base, AdamW, one step per drawn batch: the loop is our own and short, because an episode is a few
dozen steps and its start is restored a few times, without loading anything again.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor, nn

from gradsieve.data import IGNORE, Tokens
from gradsieve.data.batches import batches, pad
from gradsieve.errors import InvalidArgument, ModelError
from gradsieve.foreign import known_renames, own_randomness
from gradsieve.train.adapters import lora_config
from gradsieve.train.lending import Before
from gradsieve.train.loss import example_losses
from gradsieve.types import Cost

Measure = Callable[[nn.Module, Cost], tuple[float, float]]
"""(model with adapters, what L_gen is) → (L_dom, L_gen)"""


@dataclass(frozen=True, slots=True)
class NavigatorSettings:
    """How a Navigator is trained.

    Attributes:
        rank: Of the adapters on all linear layers but the LM head.
        alpha: Their scale: updates are multiplied by alpha / rank.
        learning_rate: Of AdamW, constant over an episode.
        weight_decay: Decoupled weight decay of the adapters.
        max_grad_norm: Longer gradients are scaled to this norm.
        warmup: Steps on random candidates, before the first episode; every episode starts after them. At 0 half of the
            adapters' gradients are zero in the first step.
        warmup_batch: Candidates of such a step.
        batch_tokens: Padded tokens in one forward pass: memory, not results.
        seed: Of the adapters' start and the warm-up's draws.
    """

    rank: int = 16
    alpha: float = 32.0
    learning_rate: float = 2e-4
    weight_decay: float = 0.01
    max_grad_norm: float = 1.0
    warmup: int = 0
    warmup_batch: int = 8
    batch_tokens: int = 2048
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("rank", "warmup_batch", "batch_tokens"):
            if getattr(self, name) < 1:
                raise InvalidArgument(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("alpha", "learning_rate", "max_grad_norm"):
            if not 0 < getattr(self, name) < float("inf"):
                raise InvalidArgument(f"{name} must be above 0 and finite, got {getattr(self, name)}")
        for name in ("weight_decay", "warmup"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise InvalidArgument(f"{name} must be at least 0 and finite, got {getattr(self, name)}")


class LoRANavigator:
    """A `gradsieve.types.Navigator`; a context manager, because it puts adapters into the model and takes them off again.

    Args:
        model: A causal language model without adapters; its own weights never change.
        candidates: Tokens of every row of the pool.
        measure: Measures the model as it stands; it must leave it as it was.
        settings: How it is trained.

    Attributes:
        trained_tokens: Tokens without padding that went through a forward and backward pass so far, the warm-up's included.
        measured: How often `measure` was called for each cost.
    """

    def __init__(
        self, model: nn.Module, candidates: Sequence[Tokens], measure: Measure, settings: NavigatorSettings | None = None
    ) -> None:
        self.settings = settings or NavigatorSettings()
        self.trained_tokens = 0
        self.measured: Counter[Cost] = Counter()
        self._candidates, self._measure = candidates, measure
        if hasattr(model, "peft_config"):
            raise ModelError("the Navigator must be a model without adapters, got one that has some; merge them first")
        self._before = Before.of(model)
        try:
            self._live: Any = _with_adapters(model, self.settings)
            self._live.eval()  # nothing is dropped out: a step is a function of the rows
            self._trained = [parameter for parameter in self._live.parameters() if parameter.requires_grad]
            self._optimizer = torch.optim.AdamW(
                self._trained, lr=self.settings.learning_rate, weight_decay=self.settings.weight_decay
            )
            self._start = [parameter.detach().clone() for parameter in self._trained]
            self._warm_up()
        except BaseException:  # nobody gets a Navigator to close
            self.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Takes the adapters off and gives the model back as it was."""
        self._before.restore()

    def reset(self) -> None:
        """Puts adapters and optimizer back to the start of an episode."""
        with torch.no_grad():
            for parameter, start in zip(self._trained, self._start, strict=True):
                parameter.copy_(start)
        self._optimizer.state.clear()

    def step(self, rows: Tensor) -> None:
        """Takes one AdamW step on the mean loss of these candidates (int64 [b]).

        Raises:
            ModelError: The loss is not finite.
        """
        chosen = [self._candidates[row] for row in rows.tolist()]
        if not chosen:
            raise InvalidArgument("a step must have at least one row, got none")
        self._optimizer.zero_grad()
        for part in self._parts(chosen):
            total = self._losses(part).sum() / len(chosen)
            if not total.isfinite():
                raise ModelError("the Navigator's loss must be finite, got NaN or infinity; lower learning_rate or use float32")
            total.backward()
        nn.utils.clip_grad_norm_(self._trained, self.settings.max_grad_norm)
        self._optimizer.step()
        self.trained_tokens += sum(len(tokens.input_ids) for tokens in chosen)

    def losses(self, cost: Cost) -> tuple[float, float]:
        """Returns (L_dom, L_gen) of the model as it stands."""
        self.measured[cost] += 1
        return self._measure(self._live, cost)

    def _warm_up(self) -> None:
        if not self.settings.warmup:
            return
        rng = torch.Generator().manual_seed(self.settings.seed)
        for _ in range(self.settings.warmup):
            self.step(torch.randperm(len(self._candidates), generator=rng)[: self.settings.warmup_batch])
        self._start = [parameter.detach().clone() for parameter in self._trained]
        self._optimizer.state.clear()

    def _parts(self, chosen: Sequence[Tokens]) -> Iterator[list[Tokens]]:
        ordered = sorted(chosen, key=lambda tokens: -len(tokens.input_ids))
        for run in batches([len(tokens.input_ids) for tokens in ordered], self.settings.batch_tokens):
            yield ordered[run]

    def _losses(self, part: Sequence[Tokens]) -> Tensor:
        device = self._trained[0].device
        ids = pad([tokens.input_ids for tokens in part], 0).to(device)
        labels = pad([tokens.labels for tokens in part], IGNORE).to(device)
        lengths = torch.tensor([len(tokens.input_ids) for tokens in part], device=device)
        mask = (torch.arange(ids.shape[1], device=device) < lengths[:, None]).long()
        return example_losses(self._live, ids, mask, labels)


def _with_adapters(model: nn.Module, settings: NavigatorSettings) -> Any:
    """Returns the model with LoRA adapters, whose start depends on the seed alone."""
    from peft import get_peft_model

    with own_randomness(), known_renames():
        torch.manual_seed(settings.seed)
        return get_peft_model(model, lora_config(model, settings.rank, settings.alpha))
