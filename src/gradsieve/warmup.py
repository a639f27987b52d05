"""Warm-ups: a model fine-tuned on part of the pool before its gradients are taken, in a folder beside the gradients.

    STORE/warmup-KEY/training/       the run, in which a killed one goes on
    STORE/warmup-KEY/warmup.json     its checkpoints, and what it cost: written last
    STORE/warmup-KEY/epoch-N/        gradients taken at a checkpoint: pool, target, anchor
    STORE/warmup-KEY/online/pool     gradients recorded while it was trained

KEY is a hash of model, examples, recipe and number format, so that a store holds any number of warm-ups, and every run that
wants one of them again finds it. The trained weights serve for the gradients alone: nothing else is trained from them.
"""

from __future__ import annotations

import copy
import importlib.util
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import xxhash

from gradsieve.atomic import write_json
from gradsieve.clock import Clock, Progress
from gradsieve.compute import ComputeSettings
from gradsieve.data import Tokens, TokenSet
from gradsieve.errors import DataError, InvalidArgument, MissingExtra
from gradsieve.extraction import manifest
from gradsieve.gradients.adam import PICKLED, SAFE, Moments
from gradsieve.gradients.directions import References
from gradsieve.gradients.engine import GradientEngine
from gradsieve.gradients.fitting import Say
from gradsieve.gradients.forward import ForwardEngine
from gradsieve.models import ModelSource, hash_weights, tokenizer_hash
from gradsieve.online import Recorder
from gradsieve.store import GradientStore, Manifest
from gradsieve.train.checks import deciding
from gradsieve.types import Warmup

if TYPE_CHECKING:
    from gradsieve.train import Recipe

DONE, TRAINING = "warmup.json", "training"
BATCH = 16
"""Examples per optimizer step: warm-ups are short, and 64 would leave a small pool a handful of steps."""
FULL_RATE = 10
"""Steps from which on the learning rate rises over the recipe's warm-up; shorter runs have the full rate at once."""
FULL_WORK = 1.5
"""Work of training all weights in passes of adapters: 6 operations per weight and token, not 4."""
OWN = ("tuning", "epochs", "steps", "save_epochs", "seed")
"""Settings of a recipe that the method or the job decides."""


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """Where gradients are taken.

    Attributes:
        name: `epoch-1`, …
        folder: Adapters or model, below the warm-up's folder.
        weights: Hash of what is in it.
        rate: Mean learning rate of its pass.
        moments: Hash of Adam's moments, None where none were kept.
    """

    name: str
    folder: str
    weights: str
    rate: float
    moments: str | None


@dataclass(frozen=True, slots=True)
class Done:
    """A finished warm-up.

    Attributes:
        examples: How many it was trained on.
        pool: How many there were.
        steps: Optimizer steps.
        seconds: On the clock, in steps and checkpoints.
        cpu_seconds: Processor seconds.
        checkpoints: After every pass, or the end alone, as the recipe says.
        recording: The part of `seconds` in which gradients were recorded.
    """

    examples: int
    pool: int
    steps: int
    seconds: float
    cpu_seconds: float
    checkpoints: tuple[Checkpoint, ...]
    recording: float = 0.0

    def note(self, warmup: Warmup) -> str:
        """Returns what the user must know of it."""
        passes = f"{warmup.epochs} epoch" + "s" * (warmup.epochs > 1)
        trained = (
            f"a warm-up: {passes} of {self.examples} of the {self.pool} usable examples "
            f"({warmup.tuning}, {self.steps} steps, {self.seconds:.1f} s"
        )
        if warmup.checkpoints != "online":
            return f"gradients were taken after {trained}); its weights serve for nothing else"
        return (
            f"gradients were recorded within {trained}, {self.recording:.1f} s of them for recording): each example's before "
            "the step of the last pass that trains on it, so at different weights; these serve for nothing else"
        )


def require_training(method: str, warmup: Warmup) -> None:
    """Raises MissingExtra where the packages that train are not installed."""
    for package in ("trl", "accelerate"):
        if importlib.util.find_spec(package) is None:
            raise MissingExtra(
                f"{method} fine-tunes the model before it takes gradients, which needs the package {package}; "
                f"pip install 'gradsieve[train]', or take them at the model as it is with {warmup.without}"
            )


def recipe_of(warmup: Warmup, path: str | None, count: int, seed: int, compute: ComputeSettings) -> Recipe:
    """Returns how a warm-up on `count` examples is trained: the file's recipe, or OGS's in batches of `BATCH`.

    Raises:
        DataError: The file cannot be read.
        InvalidArgument: It is no recipe, sets what the method decides, or asks for more than the pool.
    """
    import yaml

    from gradsieve.train import Recipe

    own = Recipe(batch=BATCH)
    if path is not None:
        try:
            text = Path(path).read_text(encoding="utf-8")
            given = yaml.safe_load(text)
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            raise DataError(f"{path}: must be a readable YAML file, got {error}") from None
        if taken := [name for name in OWN if isinstance(given, dict) and name in given]:
            raise InvalidArgument(f"warmup_recipe must leave {', '.join(taken)} to the method and the job, got it in {path}")
        own = Recipe.from_yaml(text)
        if own.surgery != "none" or own.replay_share > 0:
            raise InvalidArgument(
                "warmup_recipe must train on the pool alone, without anchor or replay examples, got surgery "
                f"{own.surgery} and replay_share {own.replay_share:g} in {path}; take them out"
            )
    steps = warmup.epochs * math.ceil(count / own.batch)
    half = warmup.tuning == "full" and compute.dtype == torch.bfloat16
    return replace(
        own,
        tuning=warmup.tuning,
        epochs=warmup.epochs,
        save_epochs=warmup.candidates != "plain" or warmup.checkpoints == "all",
        seed=seed,
        warmup=own.warmup if path is not None or steps >= FULL_RATE else 0.0,
        dtype="bfloat16" if half else own.dtype,
        device="cpu" if compute.device == "cpu" else own.device,
    )


def part_of(pool: TokenSet, share: float, seed: int) -> TokenSet:
    """Returns a random share of the pool, rounded up, in the order of the ids: the same for any order of the pool."""
    ids = pool.ids
    by_id = sorted(range(len(ids)), key=ids.__getitem__)
    drawn = torch.randperm(len(by_id), generator=torch.Generator().manual_seed(seed))[: part_size(share, len(by_id))]
    return pool.restricted(pool.name, [by_id[place] for place in drawn.sort().values.tolist()])


def part_size(share: float, count: int) -> int:
    """Returns how many examples a share of `count` is, rounded up."""
    return math.ceil(share * count - 1e-9)


def training_passes(warmup: Warmup, tokens: int) -> float:
    """Returns the work of a warm-up on examples of so many tokens, in token passes (`gradsieve.overhead`)."""
    return warmup.epochs * tokens * (FULL_WORK if warmup.tuning == "full" else 1.0)


def folder_of(
    root: Path, source: ModelSource, tokens: Sequence[Tokens], recipe: Recipe, compute: ComputeSettings, online: bool = False
) -> Path:
    """Returns the folder of a warm-up: its name is a hash of all that decides the outcome, recorded gradients included."""
    facts = {
        "model": source.weights,
        "tokenizer": tokenizer_hash(source.tokenizer),
        "recipe": deciding(recipe.to_mapping()),
        "dtype": str(compute.dtype),
    }
    facts |= {"recorded": manifest(source, compute, {}).fingerprint} if online else {}
    hasher = xxhash.xxh3_64(json.dumps(facts, sort_keys=True).encode())
    for example in tokens:
        for part in (example.input_ids, example.labels):
            hasher.update(f"{len(part)}\n".encode() + torch.as_tensor(part, dtype=torch.int64).numpy().tobytes())
    return root / f"warmup-{hasher.hexdigest()}"


def warm_up(
    warmup: Warmup,
    source: ModelSource,
    tokens: Sequence[Tokens],
    pool: int,
    recipe: Recipe,
    compute: ComputeSettings,
    folder: Path,
    clock: Clock,
    progress: Progress,
    recorder: Recorder | None = None,
) -> Done:
    """Trains the model in `folder`, goes on where a killed run stopped, or returns the finished one.

    Args:
        warmup: What the method asks for.
        source: The model; it is not changed.
        tokens: What it is trained on.
        pool: How many examples these were drawn from.
        recipe: How.
        compute: Number format and device.
        folder: See `folder_of`.
        clock: Gets the stages `loading the model (warm-up)` and `warm-up` if there is something to train.
        progress: Is told how many tokens are done.
        recorder: Takes gradients before the steps.
    """
    if (folder / DONE).exists():
        return _read(folder / DONE)
    with clock.stage("loading the model (warm-up)"):
        import gradsieve.train.trainer  # noqa: F401  # trl takes seconds, which are none of the training
        from gradsieve.train import finetune

        model = _trainable(source, warmup, compute)
    with clock.stage("warm-up") as written:
        trained = finetune(
            model,
            tokens,
            recipe,
            folder / TRAINING,
            progress=lambda _, done, total: progress("warm-up", done, total),
            watch=recorder,
        )
        try:
            kept = [(f"epoch-{c.epoch:g}", c.folder, c.learning_rate) for c in trained.checkpoints]
            if not kept:
                kept = [(f"epoch-{warmup.epochs}", trained.folder, recipe.rate)]
            checkpoints = []
            for name, own, rate in kept:
                moments = Moments.read(own, trained.model).digest() if recipe.save_epochs else None
                checkpoints.append(Checkpoint(name, str(own.relative_to(folder)), hash_weights(own), rate, moments))
        finally:
            if warmup.tuning == "lora":
                trained.restore()
        spent = trained.seconds, trained.cpu_seconds
        done = Done(len(tokens), pool, trained.steps, *spent, tuple(checkpoints), trained.watch_seconds)
        written.append(sum(file.stat().st_size for file in (folder / TRAINING).rglob("*") if file.is_file()))
    write_json(folder / DONE, asdict(done))
    return done


def _trainable(source: ModelSource, warmup: Warmup, compute: ComputeSettings) -> torch.nn.Module:
    """Returns the model to train: a model object itself for adapters, which are taken off again, and a copy for full tuning."""
    if warmup.tuning == "lora":
        return source.load(compute.dtype, compute.device)
    wide = compute.dtype if compute.dtype == torch.float64 else torch.float32
    return copy.deepcopy(source.live).to(wide) if source.live is not None else source.load(wide, compute.device)


def _read(path: Path) -> Done:
    try:
        facts: dict[str, Any] = json.loads(path.read_bytes())
        return Done(**{**facts, "checkpoints": tuple(Checkpoint(**c) for c in facts["checkpoints"])})
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path}: must be the record of a warm-up, got {error}; remove the folder to make it again") from None


@dataclass(frozen=True, eq=False)
class Stop:
    """A model at which gradients are taken, and where they go.

    Attributes:
        name: `base`, or the checkpoint of a warm-up.
        source: The model there.
        root: Folder of the stores of pool, target and anchor.
        compute: How gradients are taken; of the pool possibly as Adam's direction.
        candidates: What is taken of the pool, as in `Warmup`.
        moments: Folder of Adam's moments and their hash, where they are wanted.
    """

    name: str
    source: ModelSource
    root: Path
    compute: ComputeSettings
    candidates: str = "plain"
    moments: tuple[Path, str] | None = None

    def settings(self, role: str) -> ComputeSettings:
        """Returns how gradients of a set are taken here: Adam's direction is the pool's alone."""
        if role != "pool" or self.moments is None:
            return self.compute
        engine = replace(self.compute.engine, direction="adam", less_form=self.candidates == "less")
        return replace(self.compute, engine=engine)

    def manifest(self, role: str, references: Mapping[str, Any]) -> Manifest:
        """Returns what the rows of a set depend on here."""
        own = manifest(self.source, self.settings(role), references if role == "pool" else {})
        return own if role != "pool" or self.moments is None else Manifest({**own.settings, "moments": self.moments[1]})

    def engine(
        self, role: str, model: torch.nn.Module, references: References | None, compute: ComputeSettings
    ) -> GradientEngine | ForwardEngine:
        """Returns the engine for a set with these settings of its store; the model is the one of `source`."""
        if not compute.engine.gradients:
            return ForwardEngine(model, compute.engine)
        moments = moments_of(*self.moments, model) if role == "pool" and self.moments is not None else None
        return GradientEngine(
            model,
            compute.engine,
            references if role == "pool" else None,
            checkpointing=compute.checkpointing,
            moments=moments,
        )


@dataclass(frozen=True, eq=False)
class Warmed:
    """What a warm-up leaves.

    Attributes:
        stops: The checkpoints at which gradients are taken.
        rates: Their learning rates by name.
        note: What the user must know of it.
    """

    stops: list[Stop]
    rates: dict[str, float]
    note: str


def stops_of(
    warmup: Warmup,
    source: ModelSource,
    pool: TokenSet,
    recipe_file: str | None,
    seed: int,
    compute: ComputeSettings,
    root: Path,
    clock: Clock,
    progress: Progress,
    say: Say,
) -> Warmed:
    """Returns the checkpoints of a warm-up, which is trained if it is not there yet."""
    part = part_of(pool, warmup.share, seed)
    tokens, online = part.tokens, warmup.checkpoints == "online"
    recipe = recipe_of(warmup, recipe_file, len(tokens), seed, compute)
    folder = folder_of(root, source, tokens, recipe, compute, online)
    weights = f"{source.weights}+{folder.name}"  # of many steps, which this name stands for
    recorded = Stop("online", replace(source, weights=weights), folder / "online", compute)
    recorder = recorder_of(recorded, part, recipe, say) if online else None
    done = warm_up(warmup, source, tokens, len(pool.kept), recipe, compute, folder, clock, progress, recorder)
    if recorder is not None:
        if missing := recorder.missing():
            raise DataError(
                f"{recorded.root}: must hold the gradients that the warm-up recorded, got {missing} of its steps missing or "
                f"broken; remove {folder} and run the same command again, which records them"
            )
        end = done.checkpoints[-1]
        model = replace(source_at(folder / end.folder, end, source, warmup), weights=weights)
        return Warmed([replace(recorded, source=model)], {recorded.name: end.rate}, done.note(warmup))
    stops = []
    wanted = done.checkpoints if warmup.checkpoints == "all" else done.checkpoints[-1:]
    for checkpoint in wanted:
        own = folder / checkpoint.folder
        moments = (own, checkpoint.moments) if warmup.candidates != "plain" and checkpoint.moments is not None else None
        place = folder / checkpoint.name
        stops.append(
            Stop(checkpoint.name, source_at(own, checkpoint, source, warmup), place, compute, warmup.candidates, moments)
        )
    return Warmed(stops, {checkpoint.name: checkpoint.rate for checkpoint in wanted}, done.note(warmup))


def recorder_of(stop: Stop, part: TokenSet, recipe: Recipe, say: Say) -> Recorder:
    """Returns what fills the store of a stop while the part of the pool is trained on."""
    from gradsieve.train.plan import make_plan

    store = GradientStore(stop.root / "pool", stop.manifest("pool", {}))
    return Recorder(store, part, make_plan(recipe, len(part.tokens)), stop.compute, say)


def source_at(folder: Path, checkpoint: Checkpoint, source: ModelSource, warmup: Warmup) -> ModelSource:
    """Returns the model as it was at a checkpoint."""
    weights = f"{source.weights}+{checkpoint.weights}"
    if warmup.tuning == "lora":
        return replace(source, weights=weights, adapters=folder)
    return replace(source, weights=weights, folder=folder, live=None)


def moments_of(folder: Path, digest: str, model: torch.nn.Module) -> Moments:
    """Returns Adam's moments of a checkpoint.

    Raises:
        DataError: They are gone, or are not those that the warm-up left.
    """
    above = next(parent for parent in folder.parents if parent.name.startswith("warmup-"))
    cure = f"remove {above} and run the same command again, which makes them"
    if not any((folder / name).exists() for name in (SAFE, PICKLED)):
        raise DataError(f"{folder}: must hold Adam's moments of the warm-up, {PICKLED} or {SAFE}, got neither; {cure}")
    moments = Moments.read(folder, model)
    if moments.digest() != digest:
        raise DataError(f"{folder}: must hold the moments that the warm-up left, got others; {cure}")
    return moments
