"""The nouns of gradsieve: what flows from one package to the next.

    Example ──► (gradients/ + store/) ──► Gradients ──► Problem ──► Selector ──► Selection

Selectors see a `Problem` and nothing else: no model, no tokenizer, no disk. `ArrayGradients` turns plain matrices into a
`Gradients`, so that every selector also works on gradients that somebody else computed.

Columns of a `Gradients` (exact per-row scalars, float64 [n]); a selector names those it reads in `needs`:

    loss                 mean negative log-likelihood of the completion tokens (nats per token)
    loss/alone           the same without the prompt
    bm25/target          how well the words match those of the targets, in [0, 1]
    tokens               length of the whole sequence after truncation: what training on the row costs
    completion_tokens    tokens that carry loss
    meta/FIELD           a number that came with the row
    norm                 ‖g‖ over the chosen parameters
    norm/G max/G min/G mean/G sd/G
                         statistics of the gradient of parameter group G; G is `embedding` or `lm_head`
    group                targets only: the number of the group (0, 1, …) that an example belongs to
    dot/R                <g, r/‖r‖>: the exact product with the UNIT vector of reference R, so that cos(g, r) = dot/R / norm

Reference names R: `target`, `anchor` (all categories together), `unit/anchor` (the mean of unit gradients in place of
gradients), `anchor:CATEGORY`, `contrast/anchor:CATEGORY`, `contrast/target`.

Representations of a `Gradients` (matrices beside the sketches, read by name where a checkpoint's name is asked for):

    hidden               position-weighted mean of the last hidden states, float32 [n, D]
    embedding:ENCODER    embedding of the text by a sentence-transformers model, float32 [n, D]
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from decimal import Decimal
from typing import Any, ClassVar, Literal, Protocol, runtime_checkable

import torch
from torch import Tensor

from gradsieve.errors import InvalidArgument

REPRESENTATIONS = ("hidden",)
SEEDS = 2**32
"""How many seeds there are: trainers seed NumPy too, which takes no larger ones."""


@dataclass(frozen=True, slots=True)
class Example:
    """One conversation, and exactly the bytes it came from.

    Attributes:
        id: The user's id, or one made from the content's hash. Unique within a pool.
        messages: Turns in order, each with at least `role` and `content`; the last is an assistant turn.
        raw: The example as it was given, as one JSON line without its newline.
        origin: Where it came from, `file:line`, for error messages.
        category: The ability it stands for (anchors), or None.
    """

    id: str
    messages: tuple[Mapping[str, Any], ...]
    raw: bytes
    origin: str
    category: str | None = None


class Gradients(Protocol):
    """Per-example gradients of one set of examples, as a selector sees them.

    Attributes:
        ids: One id per row; ties break on it.
        dim: Sketch size d.
        columns: Exact per-row scalars by name, float64 [n] (see the module docstring).
        checkpoints: Names of the model checkpoints the sketches were taken at; none if `dim` is 0.
        representations: Names of the matrices that are there beside the sketches (see the module docstring).
    """

    @property
    def ids(self) -> Sequence[str]: ...
    @property
    def dim(self) -> int: ...
    @property
    def columns(self) -> Mapping[str, Tensor]: ...
    @property
    def checkpoints(self) -> Sequence[str]: ...
    @property
    def representations(self) -> Sequence[str]: ...

    def blocks(self, checkpoint: str | None = None) -> Iterator[tuple[Tensor, Tensor]]:
        """Yields (rows int64 [b], sketches float32 [b, d]) until every row came once, in any order.

        Args:
            checkpoint: One of `checkpoints`, the first by default, or one of `representations`, which have their own width.
        """
        ...

    def rows(self, index: Tensor, checkpoint: str | None = None) -> Tensor:
        """Returns the sketches of the rows in `index` (int64 [k]), in that order: float32 [k, d]; names as for `blocks`."""
        ...


@dataclass(frozen=True, eq=False)
class ArrayGradients:
    """`Gradients` of matrices in memory.

    Attributes:
        ids: One unique id per row.
        sketch: float [n, d], or one such matrix per checkpoint by name.
        columns: Scalars by name, [n] each.
        extra: Representations by name, float [n, D] each.
    """

    ids: Sequence[str]
    sketch: Tensor | Mapping[str, Tensor]
    columns: Mapping[str, Tensor] = field(default_factory=dict)
    extra: Mapping[str, Tensor] = field(default_factory=dict)
    block_rows: ClassVar[int] = 4096

    def __post_init__(self) -> None:
        n = len(self.ids)
        if len(set(self.ids)) != n:
            raise InvalidArgument(f"ids must be unique, got {n - len(set(self.ids))} repeated of {n}; rename them")
        if both := set(self._sketches()) & set(self.extra):
            raise InvalidArgument(f"extra must have names that no checkpoint has, got {', '.join(sorted(both))}; rename them")
        for name, matrix in self._matrices().items():
            if matrix.ndim != 2 or len(matrix) != n:
                raise InvalidArgument(f"sketch {name!r} must be [{n}, d] (one row per id), got {list(matrix.shape)}")
        for name, column in self.columns.items():
            if column.shape != (n,):
                raise InvalidArgument(f"column {name!r} must be [{n}] (one value per id), got {list(column.shape)}")
        object.__setattr__(self, "columns", {name: column.double() for name, column in self.columns.items()})

    def _sketches(self) -> Mapping[str, Tensor]:
        return {"base": self.sketch} if isinstance(self.sketch, Tensor) else self.sketch

    def _matrices(self) -> Mapping[str, Tensor]:
        return {**self._sketches(), **self.extra}

    @classmethod
    def from_matrix(
        cls, gradients: Tensor, ids: Sequence[str] | None = None, references: Mapping[str, Tensor] | None = None
    ) -> ArrayGradients:
        """Returns the gradients of a plain matrix with its `norm` column and, per reference, its `dot/…` column.

        Args:
            gradients: float [n, d].
            ids: One per row; "0", "1", … by default.
            references: Directions [d] by name, for example `{"target": T.mean(0), "anchor": A.mean(0)}`.
        """
        G = gradients.double()
        columns = {"norm": G.square().sum(1).sqrt()}
        for name, r in (references or {}).items():
            norm = r.double().square().sum().sqrt()
            if not norm > 0:
                raise InvalidArgument(f"reference {name!r} must have a positive norm, got {norm.item()}")
            columns[f"dot/{name}"] = G @ (r.double() / norm)
        return cls(ids if ids is not None else [str(i) for i in range(len(G))], gradients, columns)

    @property
    def dim(self) -> int:
        return next(iter(self._sketches().values())).shape[1]

    @property
    def checkpoints(self) -> Sequence[str]:
        return tuple(self._sketches())

    @property
    def representations(self) -> Sequence[str]:
        return tuple(self.extra)

    def blocks(self, checkpoint: str | None = None) -> Iterator[tuple[Tensor, Tensor]]:
        matrix = self._matrices()[checkpoint or self.checkpoints[0]]
        for rows in torch.arange(len(matrix)).split(self.block_rows):
            yield rows, matrix[rows].float()

    def rows(self, index: Tensor, checkpoint: str | None = None) -> Tensor:
        return self._matrices()[checkpoint or self.checkpoints[0]][index].float()


@dataclass(frozen=True, slots=True)
class Reference:
    """What is known about a reference direction r beside its products.

    Attributes:
        norm: ‖r‖.
        count: Examples it is the mean of (for a contrast: correct ones; as many corrupted ones stand against them).
        signal_share: 1 - (mean per-example variance / count) / ‖r‖²: near 1 where the mean stands out of its own
            sampling noise, near or below 0 where it is mostly noise. For a contrast the variance is that of the differences
            between an example and its own corrupted copy.
        cosines: Cosine with every reference that was measured together with this one, itself included, by name.
        split_half: Rank correlation of the scores that two random halves of its examples give the candidates, mean over some
            splits, on sketches; None where it was not measured (without sketches of plain gradients).
    """

    norm: float
    count: int
    signal_share: float
    cosines: Mapping[str, float] = field(default_factory=dict)
    split_half: float | None = None


Cost = Literal["kl", "loss", "key"]
"""What is counted as forgetting: KL divergence from the base model, mean loss, mean loss of answer-bearing tokens."""


class Navigator(Protocol):
    """A live model that OGS may train and measure; implemented in `gradsieve.train.navigator`."""

    def reset(self) -> None:
        """Puts weights and optimizer back to the start of an episode."""
        ...

    def step(self, rows: Tensor) -> None:
        """Takes one optimizer step on these candidate rows (int64 [b])."""
        ...

    def losses(self, cost: Cost) -> tuple[float, float]:
        """Returns (L_dom, L_gen) as the model stands: the target's mean loss, and the cost on the anchor's hold-out."""
        ...


@dataclass(frozen=True)
class Problem:
    """All that a selector may look at.

    Attributes:
        candidates: Gradients of the pool, n rows.
        targets: Gradients of examples of the wanted ability, m rows.
        anchors: Gradients of general examples that must not be forgotten.
        references: Facts about the references behind the candidates' `dot/…` columns, by the name after the slash.
        navigator: A live model, for OGS only.
        rates: Learning rate of each checkpoint of the gradients, by name, where a warm-up made them.
        groups: Names of the targets' groups, in the order of the numbers in their `group` column.
    """

    candidates: Gradients
    targets: Gradients | None = None
    anchors: Gradients | None = None
    references: Mapping[str, Reference] = field(default_factory=dict)
    navigator: Navigator | None = None
    rates: Mapping[str, float] = field(default_factory=dict)
    groups: Sequence[str] = ()


@dataclass(frozen=True, slots=True)
class Budget:
    """How much to choose: a number of examples, a share of the candidates, or a number of tokens. Exactly one is set."""

    examples: int | None = None
    share: float | None = None
    tokens: int | None = None

    def __post_init__(self) -> None:
        given = [v for v in (self.examples, self.share, self.tokens) if v is not None]
        if len(given) != 1:
            raise InvalidArgument(f"budget must set one of examples, share, tokens, got {len(given)} of them")
        if not given[0] > 0:
            raise InvalidArgument(f"budget must be above 0, got {given[0]}; write 500, 5% or 200000tok")
        if self.share is not None and self.share > 1:
            raise InvalidArgument(f"budget must be at most 100%, got {self.share:.0%}")

    @classmethod
    def parse(cls, text: str | int | Budget) -> Budget:
        """Returns the budget written as `500` (examples), `5%` (of the candidates) or `200000tok` (tokens)."""
        if isinstance(text, Budget):
            return text
        match = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?)\s*(%|tok)?", str(text).strip().replace("_", ""))
        if not match:
            raise InvalidArgument(f"budget must be like 500, 5% or 200000tok, got {text!r}")
        number, unit = match.groups()
        if unit == "%":
            return cls(share=float(number) / 100)
        if "." in number:
            raise InvalidArgument(f"budget must be a whole number unless it ends in %, got {text!r}")
        return cls(tokens=int(number)) if unit == "tok" else cls(examples=int(number))

    def __str__(self) -> str:
        if self.share is not None:
            percent = Decimal(f"{self.share * 100:.12g}")  # 12 digits: 7 %, not 7.000000000000001 %
            return f"{percent.normalize():f}%"
        return f"{self.tokens}tok" if self.tokens is not None else str(self.examples)

    def limit(self, candidates: Gradients) -> int:
        """Returns the largest number of examples this budget can mean for these candidates (an upper bound for tokens).

        Raises:
            InvalidArgument: It is above the candidates, or less than one example.
        """
        n = len(candidates.ids)
        if n == 0:
            raise InvalidArgument("the pool must hold at least one usable candidate, got none")
        if self.share is not None:
            k = math.floor(self.share * n + 1e-9)
            if k == 0:
                raise InvalidArgument(f"budget must be at least one example, got {self} of {n} candidates; raise it")
            return k
        if self.examples is not None:
            if self.examples > n:
                raise InvalidArgument(f"budget must lie in [1, {n}] (the candidates), got {self.examples}; lower it")
            return self.examples
        tokens = candidates.columns["tokens"]
        assert self.tokens is not None
        if self.tokens > tokens.sum():
            raise InvalidArgument(f"budget must be at most {int(tokens.sum())}tok (all candidates), got {self}; lower it")
        ascending = tokens.sort().values.cumsum(0)
        k = int((ascending <= self.tokens).sum())
        if k == 0:
            raise InvalidArgument(f"budget must hold the shortest candidate ({int(tokens.min())} tokens), got {self}")
        return k

    def take(self, order: Tensor, candidates: Gradients) -> Tensor:
        """Returns the rows of `order` (best first) that this budget pays for.

        Of a budget in tokens every row is paid for that what is left still covers; one that it does not cover is passed over.
        """
        limit = self.limit(candidates)
        if self.tokens is None:
            return order[:limit]
        price = candidates.columns["tokens"][order]
        head = int((price.cumsum(0) <= self.tokens).sum())
        left = self.tokens - price[:head].sum().item()
        further = head + (price[head:] <= left).nonzero()[:, 0]
        later = []
        for place, cost in zip(further.tolist(), price[further].tolist(), strict=True):
            if cost <= left:
                later.append(place)
                left -= cost
        return torch.cat([order[:head], order[torch.tensor(later, dtype=torch.long)]])


def _numbers(entry: object, count: int) -> bool:
    return isinstance(entry, list) and len(entry) == count and all(v is None or isinstance(v, int | float) for v in entry)


@dataclass(frozen=True, eq=False)
class Selection:
    """What a selector chose.

    Attributes:
        rows: int64 [k], best first, unique; k never exceeds the budget.
        weights: float64 [k], at least 0; all 1 where the method has none.
        scores: float64 [n], higher is better, NaN where the method gives none.
        trace: Numbers per step, per setting or per row, for plots (plain lists and floats).
        notes: Sentences the user must read: a constraint that did not bind, a shortfall and its cause.
        per_row: Names of the trace's entries that have a number per row (None where there is none), as plain lists: they
            become columns of scores.parquet and of the report. A list that is not named here is one per step, however long.

    Raises:
        InvalidArgument: `per_row` names no such list.
    """

    rows: Tensor
    weights: Tensor
    scores: Tensor
    trace: Mapping[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    per_row: Collection[str] = ()

    def __post_init__(self) -> None:
        n = len(self.scores)
        for name in self.per_row:
            if not _numbers(self.trace.get(name), n):
                raise InvalidArgument(
                    f"per_row must name lists of {n} numbers in the trace (one per row), got {name!r}; leave others out"
                )


@dataclass(frozen=True, slots=True)
class Warmup:
    """How the model is fine-tuned on the pool before its gradients are taken; its weights serve for these alone.

    Attributes:
        share: Share of the usable pool that it is trained on, drawn at random, in (0, 1].
        epochs: Passes over that part, at least 1.
        tuning: What is trained: "lora", adapters on all linear layers, or "full", all weights.
        checkpoints: Where gradients are taken: "last", after the last pass; "all", after every pass; "online", within the last
            pass, of each example just before the step that trains on it (of plain gradients, with a share of 1 only).
        candidates: What is taken of the candidates: "plain" gradients; "adam", Adam's direction with the moments of the
            warm-up; "less", the same as the authors' code of LESS has it. Of targets and anchors always plain gradients.
        without: The flag that does without a warm-up, for messages.
    """

    share: float
    epochs: int
    tuning: Literal["lora", "full"] = "lora"
    checkpoints: Literal["last", "all", "online"] = "last"
    candidates: Literal["plain", "adam", "less"] = "plain"
    without: str = "--warmup-share 0"

    def __post_init__(self) -> None:
        if not 0 < self.share <= 1:
            raise InvalidArgument(f"share of a warm-up must lie in (0, 1], got {self.share}")
        if self.epochs < 1:
            raise InvalidArgument(f"epochs of a warm-up must be at least 1, got {self.epochs}")
        if self.checkpoints == "online" and (self.share < 1 or self.candidates != "plain"):
            raise InvalidArgument(
                "checkpoints online of a warm-up must go with share 1 and plain gradients, "
                f"got share {self.share:g} and {self.candidates}"
            )

    @property
    def stops(self) -> int:
        """At how many sets of weights gradients are taken."""
        return self.epochs if self.checkpoints == "all" else 1


@runtime_checkable
class Selector(Protocol):
    """A method: a frozen dataclass whose fields are its hyper-parameters, flags and YAML keys.

    `needs` names what it reads, so that exactly that is extracted: columns (`norm`, `dot/target`, `max/lm_head`, …),
    `sketch` (the candidates' sketches), `targets`, `anchors` (their sketches), `hidden`, `hidden/targets` (a representation
    of candidates and of targets), `navigator`. `dot/contrast/anchor:*` and `dot/anchor:*` stand for one column per category
    of the anchor, `meta/FIELD` for a number that each row of the pool has, `meta/FIELD?` for one that rows may lack (NaN).

    Of the numbers in the `trace` of its `Selection`, those that stand per row of the pool are named in `per_row`.

    A method whose gradients are taken after a warm-up of the model has a property `warmup` besides, a `Warmup` or None.
    """

    @property
    def needs(self) -> frozenset[str]: ...

    def select(self, problem: Problem, budget: Budget, rng: torch.Generator) -> Selection: ...
