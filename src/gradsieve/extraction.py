"""Examples to gradients in a store: token sets, reference directions, and the units that are still missing."""

from __future__ import annotations

import json
import logging
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import xxhash
from safetensors.torch import load as deserialize
from safetensors.torch import save as serialize

from gradsieve.atomic import write_atomically
from gradsieve.clock import Progress, silent
from gradsieve.data import IGNORE, Excluded, Tokens, tokenize
from gradsieve.data.batches import batches, pad, plan_units
from gradsieve.data.corrupt import Corruption
from gradsieve.errors import InvalidArgument, StoreError
from gradsieve.gradients.directions import MeanGradient, References, UnitDirection, halves
from gradsieve.gradients.engine import GradientEngine
from gradsieve.gradients.fitting import Fitting, Say, restarted
from gradsieve.gradients.forward import ForwardEngine
from gradsieve.gradients.parameters import chosen_size
from gradsieve.gradients.settings import Batch, Block, EngineSettings, plain
from gradsieve.gradients.wide import DIM, mean_sketch, wide_settings
from gradsieve.memory import Trimmer
from gradsieve.models import ModelSource, tokenizer_hash
from gradsieve.store import GradientStore, Manifest, Unit
from gradsieve.types import Example, Reference

log = logging.getLogger(__name__)
Form = Literal["exact", "wide sketch"]
ENGINE_VERSION = 3  # raised whenever the numbers of a row change
REFERENCE_MEMORY = 8192  # MiB
BATCH_TOKENS = 1024


@dataclass(frozen=True, eq=False)
class TokenSet:
    """A set of examples as the model will see them.

    Attributes:
        name: Its role: `pool`, `target`, `anchor`, …
        examples: All of them, as read.
        kept: Positions of the usable ones.
        tokens: Tokens and labels of the usable ones.
        keys: Hash of tokens and labels of each usable one, 16 bytes: examples with equal keys have equal gradients.
        excluded: The others, with the reason.
        notes: What the user should know about the template.
    """

    name: str
    examples: Sequence[Example]
    kept: list[int]
    tokens: list[Tokens]
    keys: list[bytes]
    excluded: list[Excluded]
    notes: tuple[str, ...] = ()

    @classmethod
    def of(
        cls, name: str, examples: Sequence[Example], tokenizer: Any, *, max_length: int, chat_template: str | None = None
    ) -> TokenSet:
        """Returns the examples tokenised with the model's template and a loss on assistant turns only."""
        done = tokenize(examples, tokenizer, max_length=max_length, chat_template=chat_template)
        keys = [_key(tokens) for tokens in done.tokens]
        return cls(name, examples, done.kept, done.tokens, keys, done.excluded, done.notes)

    @property
    def ids(self) -> list[str]:
        """Ids of the usable examples."""
        return [self.examples[i].id for i in self.kept]

    @property
    def lengths(self) -> list[int]:
        """Tokens per usable example."""
        return [len(tokens.input_ids) for tokens in self.tokens]

    def require_usable(self, least: int = 1) -> None:
        """Raises InvalidArgument unless at least `least` examples are usable."""
        if len(self.kept) < least:
            why = f"; the first: {self.excluded[0].reason}" if self.excluded else ""
            raise InvalidArgument(f"{self.name} must hold at least {least} usable examples, got {len(self.kept)}{why}")

    def remarks(self, max_length: int) -> list[str]:
        """Returns what the user must know of examples left out or cut; the pool's exclusions have a file of their own."""
        remarks = list(self.notes)
        if self.excluded and self.name != "pool":
            remarks.append(
                f"{len(self.excluded)} of {len(self.examples)} examples of the {self.name} could not be used; the first, "
                f"{self.excluded[0].id}: {self.excluded[0].reason}"
            )
        if cut := sum(tokens.truncated for tokens in self.tokens):
            remarks.append(
                f"{cut} of {len(self.examples)} examples of the {self.name} are longer than {max_length} tokens and were cut "
                "at the end; raise --max-length to keep them whole"
            )
        return remarks

    def restricted(self, name: str, positions: Sequence[int]) -> TokenSet:
        """Returns the usable examples at `positions` (into `kept`) as a set of their own."""
        return TokenSet(
            name,
            self.examples,
            [self.kept[i] for i in positions],
            [self.tokens[i] for i in positions],
            [self.keys[i] for i in positions],
            [],
        )

    def without(self, reasons: Mapping[int, str]) -> TokenSet:
        """Returns the set with some usable examples (positions into `kept`) excluded for a reason."""
        rest = [i for i in range(len(self.kept)) if i not in reasons]
        gone = [Excluded(self.kept[i], self.examples[self.kept[i]].id, reason) for i, reason in reasons.items()]
        excluded = sorted([*self.excluded, *gone], key=lambda e: e.position)
        return replace(self.restricted(self.name, rest), excluded=excluded, notes=self.notes)

    def alone(self) -> TokenSet:
        """Returns the usable examples without their prompts: the first token of each, then its completion with loss on it."""
        short = []
        for tokens in self.tokens:
            said = 1 + np.flatnonzero(tokens.labels[1:] != IGNORE)
            ids = tokens.input_ids[np.concatenate([[0], said])]
            short.append(Tokens(ids, np.concatenate([[IGNORE], ids[1:]]).astype(ids.dtype), tokens.truncated))
        return TokenSet(f"{self.name}'s answers alone", self.examples, self.kept, short, [_key(t) for t in short], [])

    def digest(self) -> str:
        """Returns a hash of the set, whatever its order."""
        return xxhash.xxh3_128_hexdigest(b"".join(sorted(self.keys)))


def _key(tokens: Tokens) -> bytes:
    ids, labels = np.asarray(tokens.input_ids, np.int32), np.asarray(tokens.labels, np.int32)
    return xxhash.xxh3_128_digest(ids.tobytes() + labels.tobytes())


@dataclass(frozen=True, slots=True)
class ComputeSettings:
    """How gradients are computed.

    Attributes:
        engine: What is taken from each example.
        dtype: Compute type.
        device: Where.
        max_length: Tokens per example, the rest is cut off at the end.
        batch_tokens: Padded tokens in one batch; changes a row by rounding only, so it is no part of a store's fingerprint.
        unit_tokens: Tokens in one shard.
        checkpointing: Whether activations are made again in the backward pass in place of being kept; likewise.
        reference_memory: MiB that full gradients of the references may take; above it they are wide sketches.
        form: Which of the two they are, see `with_form`.
    """

    engine: EngineSettings
    dtype: torch.dtype
    device: str
    max_length: int
    batch_tokens: int = BATCH_TOKENS
    unit_tokens: int = 8192
    checkpointing: bool = False
    reference_memory: int = REFERENCE_MEMORY
    form: Form = "exact"

    def __post_init__(self) -> None:
        for name, least in (("batch_tokens", 1), ("unit_tokens", 1), ("max_length", 1), ("reference_memory", 0)):
            if getattr(self, name) < least:
                raise InvalidArgument(f"{name} must be at least {least}, got {getattr(self, name)}")


@dataclass(frozen=True, eq=False)
class Contrast:
    """Right examples and wrong copies of the same prompts (OGS-10), in the same order."""

    right: TokenSet
    wrong: TokenSet


@dataclass(frozen=True, eq=False)
class UnitMean:
    """A set of which every example counts by its direction alone: Σ g/‖g‖, so that no gradient rules by its length."""

    examples: TokenSet


Source = TokenSet | Contrast | UnitMean


def contrast(
    corruption: Corruption, name: str, model: ModelSource, compute: ComputeSettings, template: str | None
) -> tuple[Contrast, str | None]:
    """Returns the contrast of a set and its wrong copies, and a note where some examples had to be left out."""
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
    note = f"{left_out} of {total} examples of {name} could not be corrupted ({corruption.how}); its contrast lacks them"
    return Contrast(right, wrong), note if left_out else None


def with_form(model: ModelSource, compute: ComputeSettings, count: int) -> ComputeSettings:
    """Returns the settings with products with `count` references exact where their full gradients fit, else by wide sketches.

    It is decided from the model's shapes alone, before it is loaded and the same on every machine.
    """
    fits = not count or _reference_bytes(model, compute, count) <= compute.reference_memory << 20
    return replace(compute, form="exact" if fits else "wide sketch")


def _reference_bytes(model: ModelSource, compute: ComputeSettings, count: int) -> int:
    return chosen_size(model.skeleton(), compute.engine.params) * compute.dtype.itemsize * count


def form_note(model: ModelSource, compute: ComputeSettings, count: int) -> str:
    """Returns what the user must know where references are wide sketches."""
    size = _reference_bytes(model, compute, count)
    return (
        f"the full gradients of {count} references take {size >> 20} MiB, more than --reference-memory "
        f"{compute.reference_memory}: products with them are estimated from sketches of {DIM} numbers"
    )


def manifest(model: ModelSource, compute: ComputeSettings, references: Mapping[str, Source]) -> Manifest:
    """Returns what a store's rows depend on beside the examples."""
    engine = compute.engine
    shared = {
        "model": model.weights,
        "tokenizer": tokenizer_hash(model.tokenizer),
        "engine": ENGINE_VERSION,
        "dtype": str(compute.dtype).removeprefix("torch."),
        "max_length": compute.max_length,
    }
    shared |= {"hidden": True} if engine.hidden else {}
    if not engine.gradients:
        return Manifest({**shared, "gradients": False, "references": {}})
    return Manifest(
        shared
        | {
            "params": engine.params,
            "reduction": engine.reduction,
            "direction": "adam, LESS form" if engine.less_form else engine.direction,
            "sketch": {"dim": engine.sketch.dim, "seed": engine.sketch.seed},
            "columns": {"norms": engine.norms, "signals": engine.signals, "layers": engine.layers},
            "reference_products": compute.form if references else "none",
            "references": {name: _reference_digest(source) for name, source in sorted(references.items())},
        }
    )


def _reference_digest(source: Source) -> str:
    if isinstance(source, TokenSet):
        return source.digest()
    if isinstance(source, UnitMean):
        return f"unit rows of {source.examples.digest()}"
    return f"{source.right.digest()} against {source.wrong.digest()}"


def reusable(directory: Path, wanted: Manifest) -> Manifest:
    """Returns the manifest to open a store with: its own where it only has *more* than wanted.

    More are further references, hidden states that nobody asked for, or gradients where a forward pass would do.
    """
    try:
        there = Manifest.read(directory)
    except StoreError:
        return wanted
    kept = {name: there.settings["references"].get(name) for name in wanted.settings["references"]}
    settings = {**there.settings, "references": kept}
    if "gradients" not in settings:
        settings["reference_products"] = there.settings.get("reference_products") if kept else "none"
    if not wanted.settings.get("hidden"):
        settings.pop("hidden", None)
    if "gradients" in wanted.settings and "gradients" not in settings:
        settings = {name: settings.get(name) for name in wanted.settings} | {"gradients": False}
    return there if Manifest(settings).fingerprint == wanted.fingerprint else wanted


def for_store(compute: ComputeSettings, store: GradientStore) -> ComputeSettings:
    """Returns the settings with all that this store's rows hold, which may be more than is wanted of them."""
    settings = store.manifest.settings
    return replace(compute, engine=replace(compute.engine, hidden="hidden" in settings, gradients="gradients" not in settings))


def token_batches(tokens: Sequence[Tokens], batch_tokens: int, device: str) -> Iterator[tuple[Batch, int]]:
    """Yields batches of examples that stand longest first, each with its number of tokens without padding."""
    lengths = [len(t.input_ids) for t in tokens]
    for run in batches(lengths, batch_tokens):
        ids, labels = pad([t.input_ids for t in tokens[run]], 0), pad([t.labels for t in tokens[run]], IGNORE)
        yield Batch(ids.to(device), labels.to(device), lengths=torch.tensor(lengths[run], device=device)), sum(lengths[run])


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
    sides = [side for source in sources.values() for side in token_sets(source)]
    uses = Counter(side.digest() for side in sides)
    paired = {side.digest() for source in sources.values() if isinstance(source, Contrast) for side in token_sets(source)}
    total = sum(sum(side.lengths) for side in {side.digest(): side for side in sides}.values())
    total += sum(sum(source.examples.lengths) for source in sources.values() if isinstance(source, UnitMean))
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
        if len(units) > 1:
            pairs = tuple(torch.stack([side[unit].mean(0) for unit in units]) for side in pairs)
        return right.minus(wrong, pairs), [pairs[0] - pairs[1]] if len(units) > 1 else []

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


def token_sets(source: Source) -> tuple[TokenSet, ...]:
    """Returns the sets that a reference is made of."""
    if isinstance(source, TokenSet):
        return (source,)
    return (source.examples,) if isinstance(source, UnitMean) else (source.right, source.wrong)


def fill(
    store: GradientStore,
    examples: TokenSet,
    pending: Sequence[Unit],
    engine: GradientEngine | ForwardEngine,
    compute: ComputeSettings,
    progress: Progress = silent,
    say: Say = log.warning,
) -> int:
    """Computes and commits the pending units; returns the bytes written. A kill loses the unit at work and no other.

    Batches that do not fit in memory are split, which `say` is told.

    Raises:
        StoreError: A unit holds examples of another, unfinished run.
    """
    tokens = dict(zip(examples.keys, examples.tokens, strict=True))
    for unit in pending:
        if any(key not in tokens for key in unit.keys):
            raise StoreError(
                f"store {store.directory} must be finished with the examples it was begun with, got unit {unit.number} with "
                f"others than {examples.name}'s; run that command again first, or choose another --store"
            )
    cost = {key: len(t.input_ids) for key, t in tokens.items()}
    total, done, written = sum(cost[key] for unit in pending for key in unit.keys), 0, 0
    stage = f"{'gradients' if compute.engine.gradients else 'forward pass'} of the {examples.name}"
    trim, fitting = Trimmer(), Fitting(engine.block, say)
    for unit in pending:
        blocks: list[Block] = []
        for batch, count in token_batches([tokens[key] for key in unit.keys], compute.batch_tokens, compute.device):
            blocks += fitting.blocks(batch)
            done += count
            progress(stage, done, total)
            trim()
        columns = {name: torch.cat([block.columns[name] for block in blocks]) for name in blocks[0].columns}
        store.commit(unit, _matrices(blocks), columns)
        written += store.shard(unit.number).stat().st_size
    return written


def _matrices(blocks: Sequence[Block]) -> dict[str, torch.Tensor]:
    """Returns what was taken: sketches under the checkpoint's name, hidden states under theirs."""
    found = {"base": torch.cat([block.sketch for block in blocks])} if blocks[0].sketch.shape[1] else {}
    hidden = [block.hidden for block in blocks if block.hidden is not None]
    return found | ({"hidden": torch.cat(hidden)} if hidden else {})


def plan(store: GradientStore, examples: TokenSet, compute: ComputeSettings) -> list[Unit]:
    """Returns the units that the examples need, longest examples first."""
    lengths = examples.lengths

    def cut(positions: list[int]) -> list[list[int]]:
        units = plan_units([lengths[i] for i in positions], [examples.keys[i] for i in positions], compute.unit_tokens)
        return [[positions[i] for i in unit] for unit in units]

    return store.plan(examples.keys, cut)


def write_facts(store: GradientStore, references: References) -> None:
    """Keeps what is known about the references beside the rows that were multiplied with them: facts, and sketched halves."""
    if references.halves:
        write_atomically(store.directory / "halves.safetensors", serialize(dict(references.halves)))
    content = {name: asdict(fact) for name, fact in references.facts.items()}
    write_atomically(store.directory / "references.json", json.dumps(content, indent=2, sort_keys=True).encode() + b"\n")


def read_facts(store: GradientStore) -> dict[str, Reference]:
    """Returns the facts of `write_facts`, empty where there are none."""
    path = store.directory / "references.json"
    return {name: Reference(**fact) for name, fact in json.loads(path.read_bytes()).items()} if path.exists() else {}


def read_halves(store: GradientStore) -> dict[str, torch.Tensor]:
    """Returns the sketched halves of `write_facts`, float32 [splits, 2, d] by reference; empty where there are none."""
    path = store.directory / "halves.safetensors"
    return deserialize(path.read_bytes()) if path.exists() else {}
