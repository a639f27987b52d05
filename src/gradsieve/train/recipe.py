"""How a model is fine-tuned: one frozen dataclass, written to YAML and read from it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal, get_args, get_origin, get_type_hints

from gradsieve.errors import InvalidArgument
from gradsieve.types import SEEDS

Tuning = Literal["lora", "full"]
Schedule = Literal["cosine", "linear", "constant"]
Order = Literal["shuffled", "selection"]
Surgery = Literal["none", "agem", "pcgrad"]
Precision = Literal["model", "bfloat16"]
Device = Literal["auto", "cpu"]

EPOCHS = 3
RATES: Mapping[Tuning, float] = {"lora": 2e-4, "full": 2e-5}


@dataclass(frozen=True, slots=True)
class Recipe:
    """Settings of one training run; the defaults are OGS's recipe (arXiv:2602.06359).

    Attributes:
        tuning: `lora` trains adapters on all linear layers but the LM head; `full` trains every weight, in place.
        rank: Rank of the adapters.
        alpha: Their scale: updates are multiplied by alpha / rank.
        dropout: Dropout before the adapters, in [0, 1).
        learning_rate: Peak rate of AdamW; None is 2e-4 for lora and 2e-5 for full (weights that are trained directly
            want a smaller one).
        schedule: What follows the warm-up: `cosine` or `linear` to 0, or `constant`.
        warmup: Share of the steps over which the rate rises from 0.
        weight_decay: Decoupled weight decay; biases and norm scales are exempt.
        batch: Examples per optimizer step over all processes, replayed ones included.
        micro_batch: Examples per forward pass of one process: memory, and results by rounding only, unless there is dropout
            (here or in the model's configuration), whose draws differ, or its positions go by the longest example of a batch.
        epochs: Passes over the data (equal repetition); None is 3, or as many as `steps` needs.
        steps: Exactly so many optimizer steps of full batches, cycling through the data (equal steps).
        max_grad_norm: Longer gradients are scaled to this norm; 0 never scales.
        order: `shuffled` anew in each epoch, or `selection`: as given, in each epoch.
        save_epochs: Keep a checkpoint with the optimizer's state after each epoch (LESS reads them).
        save_steps: Steps between the points a killed run goes on from; None is a tenth of the run.
        report_to: Trackers that transformers knows: tensorboard, wandb, trackio, …
        dtype: `model` computes in the type of the weights, `bfloat16` in mixed precision.
        device: `auto` takes the accelerator if there is one, `cpu` never does.
        gradient_checkpointing: Recompute activations in the backward pass: a third slower, much less memory.
        surgery: What is done to a step's gradient that opposes the anchor's: nothing, A-GEM or PCGrad.
        anchor_batch: Anchor examples per step of surgery; None is `batch`.
        replay_share: Share of each batch that is drawn from the replay examples instead of the data, in [0, 1).
        seed: Of the adapters' start, the order, the draws and dropout; below 2**32.
    """

    tuning: Tuning = "lora"
    rank: int = 16
    alpha: float = 32.0
    dropout: float = 0.0
    learning_rate: float | None = None
    schedule: Schedule = "cosine"
    warmup: float = 0.1
    weight_decay: float = 0.01
    batch: int = 64
    micro_batch: int = 8
    epochs: int | None = None
    steps: int | None = None
    max_grad_norm: float = 1.0
    order: Order = "shuffled"
    save_epochs: bool = False
    save_steps: int | None = None
    report_to: tuple[str, ...] = ()
    dtype: Precision = "model"
    device: Device = "auto"
    gradient_checkpointing: bool = False
    surgery: Surgery = "none"
    anchor_batch: int | None = None
    replay_share: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        for name, kind in _kinds().items():
            _check_type(name, getattr(self, name), kind)
        for name in ("rank", "batch", "micro_batch", "epochs", "steps", "save_steps", "anchor_batch"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise InvalidArgument(f"{name} must be at least 1, got {value}")
        for name in ("alpha", "learning_rate"):
            value = getattr(self, name)
            if value is not None and not 0 < value < float("inf"):
                raise InvalidArgument(f"{name} must be above 0 and finite, got {value}")
        for name in ("dropout", "warmup", "replay_share"):
            if not 0 <= getattr(self, name) < 1:
                raise InvalidArgument(f"{name} must lie in [0, 1), got {getattr(self, name)}")
        for name in ("weight_decay", "max_grad_norm"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise InvalidArgument(f"{name} must be at least 0 and finite, got {getattr(self, name)}")
        if not 0 <= self.seed < SEEDS:
            raise InvalidArgument(f"seed must lie in [0, {SEEDS}), got {self.seed}")
        if self.epochs is not None and self.steps is not None:
            raise InvalidArgument(
                f"epochs must be left out where steps is set, got epochs {self.epochs} and steps {self.steps}; set one"
            )
        if self.replay_share > 0 and not 1 <= self.replayed < self.batch:
            raise InvalidArgument(
                f"replay_share must make at least one replayed and one other example of a batch of {self.batch}, "
                f"got {self.replay_share}; raise batch"
            )

    @property
    def rate(self) -> float:
        """The peak learning rate that is used."""
        return RATES[self.tuning] if self.learning_rate is None else self.learning_rate

    @property
    def passes(self) -> int | None:
        """Epochs of the run, None where `steps` rules."""
        return (EPOCHS if self.epochs is None else self.epochs) if self.steps is None else None

    @property
    def replayed(self) -> int:
        """Replayed examples in a full batch."""
        return round(self.replay_share * self.batch)

    def to_mapping(self) -> dict[str, Any]:
        """Returns all settings as plain values, for YAML and JSON."""
        return {**dataclasses.asdict(self), "report_to": list(self.report_to)}

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any]) -> Recipe:
        """Returns the recipe of settings read from YAML or JSON; those left out have their default.

        Raises:
            InvalidArgument: A key is unknown, or a value breaks its rule.
        """
        kinds = _kinds()
        unknown = sorted(set(map(str, values)) - set(kinds))
        if unknown:
            raise InvalidArgument(f"recipe must have keys among {', '.join(kinds)}, got {', '.join(unknown)}; mend the name")
        return cls(**{name: _from_yaml(value, kinds[name]) for name, value in values.items()})

    def to_yaml(self) -> str:
        """Returns the recipe as YAML."""
        import yaml

        return str(yaml.safe_dump(self.to_mapping(), sort_keys=False))

    @classmethod
    def from_yaml(cls, text: str) -> Recipe:
        """Returns the recipe written as a YAML mapping.

        Raises:
            InvalidArgument: It is not one, a key is unknown, or a value breaks its rule.
        """
        import yaml

        try:
            values = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise InvalidArgument(f"recipe must be YAML, got an error: {error}") from None
        if not isinstance(values, dict):
            raise InvalidArgument(f"recipe must be a mapping of settings, got {type(values).__name__}")
        return cls.from_mapping(values)


@cache
def _kinds() -> dict[str, Any]:
    return get_type_hints(Recipe)


def _from_yaml(value: Any, kind: Any) -> Any:
    """Undoes what YAML 1.1 does to numbers (2e-4 is text to it) and tuples."""
    kinds = get_args(kind) or (kind,)
    if isinstance(value, str) and float in kinds:
        try:
            return float(value)
        except ValueError:
            return value  # the recipe's own check names the setting
    if get_origin(kind) is tuple and isinstance(value, list):
        return tuple(value)
    return float(value) if type(value) is int and float in kinds else value


def _check_type(name: str, value: Any, kind: Any) -> None:
    origin, choices = get_origin(kind), get_args(kind)
    if origin is Literal:
        if value not in choices:
            raise InvalidArgument(f"{name} must be one of {', '.join(choices)}, got {value!r}")
    elif origin is tuple:
        if not isinstance(value, tuple) or not all(isinstance(item, str) for item in value):
            raise InvalidArgument(f"{name} must be a list of names, got {value!r}")
    else:
        allowed = choices or (kind,)
        numbers = (*allowed, int) if float in allowed else allowed
        if not isinstance(value, numbers) or (isinstance(value, bool) and bool not in allowed):
            words = " or ".join("nothing" if item is type(None) else item.__name__ for item in allowed)
            raise InvalidArgument(f"{name} must be {words}, got {value!r}")
