"""What a method sees of a set of examples: the rows of a store, or none of the model, beside columns of the examples."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping

import torch

from gradsieve.data import TokenSet, row_fields
from gradsieve.data.texts import bm25_scores
from gradsieve.errors import DataError, InvalidArgument
from gradsieve.store import CheckpointGradients, GradientStore, finite_rows
from gradsieve.types import ArrayGradients, Gradients


def number_columns(needs: Collection[str], pool: TokenSet, method: str) -> dict[str, torch.Tensor]:
    """Returns the numbers that come with the pool's examples and that a method reads, float64 [n] by column."""
    numbers = sorted(need for need in needs if need.startswith("meta/"))
    return {need.removesuffix("?"): _numbers(pool, need, method) for need in numbers}


def shared_words(pool: TokenSet, target: TokenSet) -> torch.Tensor:
    """Returns the BM25 score of every example of the pool for the target's words, float64 [n]."""
    own, wanted = ([tokens.examples[i] for i in tokens.kept] for tokens in (pool, target))
    return bm25_scores(own, wanted)


def _numbers(tokens: TokenSet, need: str, method: str) -> torch.Tensor:
    """A number that comes with the examples, `meta/FIELD`; of `meta/FIELD?` NaN where it is missing."""
    field, may_miss, values = need.removeprefix("meta/").removesuffix("?"), need.endswith("?"), []
    for example in (tokens.examples[i] for i in tokens.kept):
        value = row_fields(example).get(field)
        if value is None and may_miss:
            value = math.nan
        elif isinstance(value, bool) or not isinstance(value, int | float):
            raise DataError(f"{example.origin}: field {field!r} must be a number for {method}, got {value!r}")
        values.append(float(value))
    return torch.tensor(values, dtype=torch.float64)


def target_groups(target: TokenSet | None) -> list[str]:
    """Returns the abilities that the target names, where there are at least two; examples that name none are one more."""
    named = {target.examples[i].category or "none" for i in target.kept} if target else set()
    return sorted(named) if len(named) > 1 else []


def group_column(target: TokenSet, groups: list[str]) -> torch.Tensor:
    """Returns the place of each target's ability among the groups, float64 [m]."""
    return torch.tensor([groups.index(target.examples[i].category or "none") for i in target.kept], dtype=torch.float64)


def without_gradients(tokens: TokenSet, columns: Mapping[str, torch.Tensor], extra: Mapping[str, torch.Tensor]) -> Gradients:
    """Returns the rows of a method that reads nothing of the model: ids, token counts, and what else is given."""
    supervised = [int((t.labels[1:] >= 0).sum()) for t in tokens.tokens]
    lengths = {"tokens": torch.tensor(tokens.lengths).double(), "completion_tokens": torch.tensor(supervised).double()}
    return ArrayGradients(tokens.ids, torch.empty(len(tokens.ids), 0), {**lengths, **columns}, extra)


def finite_view(
    stores: Mapping[str, GradientStore],
    tokens: TokenSet,
    columns: Mapping[str, torch.Tensor],
    references: Collection[str],
) -> Gradients:
    """Returns the rows that are finite at every checkpoint.

    Args:
        stores: One per checkpoint.
        tokens: The set whose rows are wanted.
        columns: Of its examples, beside those of the stores: one value per row of `tokens`.
        references: Whose products are shown; a store may hold those of other runs too.

    Raises:
        InvalidArgument: No row is finite.
    """

    def joined(which: list[int] | None = None) -> Gradients:
        take = range(len(tokens.ids)) if which is None else which
        ids, keys = [tokens.ids[row] for row in take], [tokens.keys[row] for row in take]
        own = dict(columns) if which is None else {name: column[which] for name, column in columns.items()}
        views: dict[str, Gradients] = {}
        for name, store in stores.items():
            hidden = {f"dot/{name}" for name in store.manifest.settings["references"] if name not in references}
            views[name] = store.view(ids, keys, own, hidden)
        return next(iter(views.values())) if list(views) == ["base"] else CheckpointGradients(views)

    whole = joined()
    finite = whole.finite if isinstance(whole, CheckpointGradients) else finite_rows(whole)
    if finite.all():
        return whole
    rows = finite.nonzero()[:, 0].tolist()
    if not rows:
        raise InvalidArgument(f"the {tokens.name} must hold a finite gradient, got none; try --dtype float32")
    return joined(rows)
