"""Reference directions: mean gradients of sets of examples, and contrasts of right and wrong ones."""

from __future__ import annotations

import json
import logging
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace

import numpy as np
import torch

from gradsieve.clock import Progress, silent
from gradsieve.compute import ComputeSettings, token_batches
from gradsieve.data import IGNORE, Tokens, TokenSet
from gradsieve.data.batches import plan_units
from gradsieve.data.corrupt import Corruption
from gradsieve.errors import InvalidArgument
from gradsieve.gradients.directions import MeanGradient, References, UnitDirection, halves
from gradsieve.gradients.engine import GradientEngine
from gradsieve.gradients.fitting import Say, restarted
from gradsieve.gradients.settings import Batch, plain
from gradsieve.gradients.wide import mean_sketch, wide_settings
from gradsieve.memory import Trimmer
from gradsieve.models import ModelSource
from gradsieve.store import GradientStore
from gradsieve.types import Reference

log = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class Contrast:
    """Right examples and wrong copies of the same prompts (OGS-10), in the same order.

    Attributes:
        right: The examples.
        wrong: Their copies.
        exchanged: Whether one's wrong answer may be another's right one.
    """

    right: TokenSet
    wrong: TokenSet
    exchanged: bool = True


@dataclass(frozen=True, eq=False)
class UnitMean:
    """A set of which every example counts by its direction alone: Σ g/‖g‖, so that no gradient rules by its length."""

    examples: TokenSet


Source = TokenSet | Contrast | UnitMean

_HALF = "half/"


def reference_sources(
    needs: Collection[str], sets: Mapping[str, TokenSet], contrast_of: Callable[[TokenSet], Contrast]
) -> dict[str, Source]:
    """Returns the sets behind every reference that a method reads; `*` stands for all that can be made.

    A target's contrast is measured beside the anchor's: it finds wrong answers of the domain itself.

    Args:
        needs: Of the method (`gradsieve.types.Selector`).
        sets: The usable examples by role: `target`, `anchor`.
        contrast_of: Makes the contrast of a set.

    Raises:
        InvalidArgument: A set has fewer than 2 usable examples.
    """
    found: dict[str, Source] = {}
    if "dot/target" in needs:
        found["target"] = sets["target"]
    if "dot/anchor" in needs:
        found["anchor"] = sets["anchor"]
    if "dot/unit/anchor" in needs:
        found["unit/anchor"] = UnitMean(sets["anchor"])
    by_category = any("anchor:" in need or need == "dot/contrast/*" for need in needs)
    parts = _categories(sets["anchor"]) if by_category and "anchor" in sets else {}
    for category, part in parts.items():
        if "dot/anchor:*" in needs:
            found[f"anchor:{category}"] = part
        if {"dot/contrast/anchor:*", "dot/contrast/*"} & set(needs):
            found[f"contrast/anchor:{category}"] = contrast_of(part)
    if "target" in sets and any(need.startswith("dot/contrast/") for need in needs):
        found["contrast/target"] = contrast_of(sets["target"])
    for source in found.values():
        if isinstance(source, TokenSet):
            source.require_usable(2)
    return found


def _categories(anchor: TokenSet) -> dict[str, TokenSet]:
    labels = [anchor.examples[i].category or "general" for i in anchor.kept]
    return {
        label: anchor.restricted(f"anchor:{label}", [i for i, own in enumerate(labels) if own == label])
        for label in sorted(set(labels))
    }


def contrast(
    corruption: Corruption, name: str, model: ModelSource, compute: ComputeSettings, template: str | None
) -> tuple[Contrast, list[str]]:
    """Returns the contrast of a set and its wrong copies, and what the user must know of it."""
    sides = (
        [
            TokenSet.of(name, side, model.tokenizer, max_length=compute.max_length, chat_template=template)
            for side in zip(*corruption.pairs, strict=True)
        ]
        if corruption.pairs
        else []
    )
    if not sides:
        raise InvalidArgument(
            f"{name} must have answers that {corruption.how!r} can corrupt, got none; choose another --corruption"
        )
    both = sorted(set(sides[0].kept) & set(sides[1].kept))
    at = [{position: i for i, position in enumerate(side.kept)} for side in sides]
    right, wrong = (side.restricted(name, [own[position] for position in both]) for side, own in zip(sides, at, strict=True))
    right.require_usable(2)
    total = len(corruption.pairs) + len(corruption.skipped)
    left_out = total - len(both)
    exchanged = corruption.how not in ("numbers", "negate", "option")  # of copies that were given nothing is known
    made, notes = Contrast(right, wrong, exchanged), []
    if left_out:
        notes.append(
            f"{left_out} of {total} examples of {name} could not be corrupted ({corruption.how}); its contrast lacks them"
        )
    if len(linked(made)) == 1:
        notes.append(
            f"all {len(both)} pairs of the contrast of {name} share answers: its signal share is that of single pairs, and no "
            "split-half correlation is known; give examples with more different answers"
        )
    return made, notes


def token_sets(source: Source) -> tuple[TokenSet, ...]:
    """Returns the sets that a reference is made of."""
    if isinstance(source, TokenSet):
        return (source,)
    return (source.examples,) if isinstance(source, UnitMean) else (source.right, source.wrong)


def gradient_tokens(sources: Mapping[str, Source]) -> int:
    """Returns how many tokens go through the model to measure references: of each set once, where rows are normalised twice."""
    once = {side.digest(): sum(side.lengths) for source in sources.values() for side in token_sets(source)}
    again = [sum(source.examples.lengths) for source in sources.values() if isinstance(source, UnitMean)]
    return sum(once.values()) + sum(again)


def digest_of(source: Source) -> str:
    """Returns a hash of what a reference is made of."""
    if isinstance(source, TokenSet):
        return source.digest()
    if isinstance(source, UnitMean):
        return f"unit rows of {source.examples.digest()}"
    return f"{source.right.digest()} against {source.wrong.digest()}"


def measure_references(
    model: torch.nn.Module,
    compute: ComputeSettings,
    sources: Mapping[str, Source],
    progress: Progress = silent,
    say: Say = log.warning,
) -> References:
    """Returns the unit directions of mean gradients (OGS-1) and contrasts (OGS-10); a set is measured once.

    Args:
        model: The model.
        compute: How gradients are taken.
        sources: The examples behind every reference.
        progress: Is told how far it is.
        say: Is told of batches that did not fit in memory.
    """
    uses = Counter(side.digest() for source in sources.values() for side in token_sets(source))
    paired = {side.digest() for source in sources.values() if isinstance(source, Contrast) for side in token_sets(source)}
    total = gradient_tokens(sources)
    wide = compute.form == "wide sketch"
    settings = wide_settings(compute.engine) if wide else plain(compute.engine)
    begun, trim = 0, Trimmer()
    measured: dict[str, tuple[MeanGradient, dict[bytes, int]]] = {}
    units: dict[str, UnitDirection] = {}
    split: dict[str, torch.Tensor] = {}

    def counted(ordered: Sequence[Tokens], batch_tokens: int, scale: torch.Tensor | None) -> Iterator[Batch]:
        first, done = 0, begun
        for batch, count in token_batches(ordered, batch_tokens, compute.device):
            rows = len(batch.input_ids)
            yield batch if scale is None else replace(batch, scale=scale[first : first + rows])
            first, done = first + rows, done + count
            progress("references", done, total)
            trim()

    def average(
        ordered: Sequence[Tokens], engine: GradientEngine, *, scale: torch.Tensor | None = None, sketched: bool = False
    ) -> MeanGradient:
        nonlocal begun

        def run(batch_tokens: int) -> MeanGradient:
            given = counted(ordered, batch_tokens, scale)
            if wide:
                return mean_sketch(map(engine.block, given), sketched=sketched)
            return engine.mean_gradient(given, sketched=sketched)

        longest = max(len(tokens.input_ids) for tokens in ordered)
        found = restarted(run, compute.batch_tokens, longest, torch.device(compute.device), say)
        begun += sum(len(tokens.input_ids) for tokens in ordered)
        return found

    def mean(side: TokenSet, engine: GradientEngine) -> tuple[MeanGradient, dict[bytes, int]]:
        """Returns the mean, and for every example's key the place at which it was added."""
        digest = side.digest()
        if digest not in measured:
            order = _longest_first(side)
            place = {side.keys[i]: j for j, i in enumerate(order)}
            measured[digest] = average([side.tokens[i] for i in order], engine, sketched=digest in paired or not wide), place
        uses[digest] -= 1
        return measured[digest] if uses[digest] else measured.pop(digest)

    def direction(source: Source, engine: GradientEngine) -> tuple[MeanGradient, list[torch.Tensor]]:
        """Returns the direction, and the sketches of what it is the mean of where they are kept."""
        if isinstance(source, TokenSet):
            whole = mean(source, engine)[0]
            return whole, whole.sketches
        if isinstance(source, UnitMean):
            side = source.examples
            plain, place = mean(side, engine)
            order = _longest_first(side)
            norms = torch.cat(plain.squares)[[place[side.keys[i]] for i in order]].sqrt()
            if not norms.all():
                raise InvalidArgument(
                    f"{side.name} must have gradients above 0 to be normalised, got one of 0; drop that example"
                )
            whole = average([side.tokens[i] for i in order], engine, scale=1 / norms, sketched=not wide)
            return whole, whole.sketches
        (right, first), (wrong, second) = mean(source.right, engine), mean(source.wrong, engine)
        pairs: tuple[torch.Tensor, ...] = _in_order(right, first, source.right), _in_order(wrong, second, source.wrong)
        units = linked(source)
        if len(units) == 1:
            return right.minus(wrong, pairs), []
        sizes = torch.tensor([len(unit) for unit in units], device=pairs[0].device)
        pairs = tuple(torch.stack([side[unit].mean(0) for unit in units]) for side in pairs)
        weighted = (pairs[0] - pairs[1]) * (sizes * len(units) / sizes.sum())[:, None]
        return right.minus(wrong, pairs, sizes), [weighted]

    with GradientEngine(model, settings, checkpointing=compute.checkpointing) as engine:
        for name, source in sources.items():
            whole, sketches = direction(source, engine)
            units[name] = UnitDirection.of(name, whole)
            if sketches and not wide:  # the candidates' own sketches are narrow
                split[name] = halves(torch.cat(sketches)).cpu()
    return replace(References.of_units(units, settings.sketch if wide else None), halves=split)


def linked(source: Contrast) -> list[list[int]]:
    """Returns the positions of a contrast's pairs in groups that share answers, in an order that follows from their keys.

    Where answers are exchanged, the right answer of one pair is the wrong one of another: what the two add to the contrast is
    not independent, and neither a variance nor a split may come between them.
    """
    if not source.exchanged:
        return [[i] for i in sorted(range(len(source.right.tokens)), key=lambda i: source.right.keys[i])]
    first: dict[bytes, int] = {}
    group = list(range(len(source.right.tokens)))
    for side in (source.right, source.wrong):
        for i, tokens in enumerate(side.tokens):
            labels = np.asarray(tokens.labels)
            j = first.setdefault(labels[labels != IGNORE].tobytes(), i)
            old, new = group[i], group[j]
            if old != new:
                group = [new if own == old else own for own in group]
    units: dict[int, list[int]] = {}
    for i in sorted(range(len(group)), key=lambda i: source.right.keys[i]):
        units.setdefault(group[i], []).append(i)
    return list(units.values())


def _longest_first(side: TokenSet) -> list[int]:
    return [int(i) for i in plan_units(side.lengths, side.keys, sum(side.lengths) + 1)[0]]


def _in_order(mean: MeanGradient, place: Mapping[bytes, int], side: TokenSet) -> torch.Tensor:
    """Returns the sketches in the order of the set, from their places in the order of adding."""
    return torch.cat(mean.sketches)[[place[key] for key in side.keys]]


def write_facts(store: GradientStore, references: References) -> None:
    """Keeps what is known about the references beside the rows that were multiplied with them: facts, and sketched halves."""
    facts = json.dumps({name: asdict(fact) for name, fact in references.facts.items()}, sort_keys=True).encode()
    halves = {f"{_HALF}{name}": half for name, half in references.halves.items()}
    store.keep("references", {"facts": torch.frombuffer(bytearray(facts), dtype=torch.uint8), **halves})


def read_facts(store: GradientStore) -> dict[str, Reference]:
    """Returns the facts of `write_facts`, empty where there are none."""
    kept = store.kept("references")
    facts = json.loads(kept["facts"].numpy().tobytes()) if kept else {}
    return {name: Reference(**fact) for name, fact in facts.items()}


def read_halves(store: GradientStore) -> dict[str, torch.Tensor]:
    """Returns the sketched halves of `write_facts`, float32 [splits, 2, d] by reference; empty where there are none."""
    kept = store.kept("references").items()
    return {name.removeprefix(_HALF): half for name, half in kept if name.startswith(_HALF)}
