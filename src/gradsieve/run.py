"""A run up to the choice: read, check, take the gradients that are missing, and show them to a method."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from gradsieve.atomic import require_writable
from gradsieve.check import Compared
from gradsieve.check import check as check_rows
from gradsieve.clock import Clock, Progress
from gradsieve.compute import ComputeSettings, form_note, with_form
from gradsieve.data import Excluded, TokenSet
from gradsieve.data.corrupt import Corruption, corrupt
from gradsieve.data.dedup import check_dedup, find_duplicates
from gradsieve.data.template import read_template
from gradsieve.data.texts import embeddings
from gradsieve.demo import cache_dir
from gradsieve.errors import InvalidArgument
from gradsieve.extraction import manifest
from gradsieve.filling import Filling
from gradsieve.gradients.settings import EngineSettings
from gradsieve.gradients.sketch import SketchPlan
from gradsieve.inputs import Inputs, read_inputs
from gradsieve.job import Data, Job
from gradsieve.models import ModelSource, dtype_name, find_model, resolve_device, resolve_dtype, weight_count
from gradsieve.navigation import CountPasses, make_navigator, navigator_passes, split_anchor
from gradsieve.needs import reads_gradients, reads_model
from gradsieve.overhead import Overhead, overhead
from gradsieve.references import (
    Contrast,
    Source,
    contrast,
    gradient_tokens,
    read_halves,
    reference_sources,
)
from gradsieve.selectors.ranking import split_half
from gradsieve.store import GradientStore
from gradsieve.train.navigator import LoRANavigator, NavigatorSettings
from gradsieve.types import Budget, Gradients, Problem, Selection, Selector, Warmup
from gradsieve.views import finite_view, group_column, number_columns, shared_words, target_groups, without_gradients
from gradsieve.warmup import Stop, part_of, require_training, stops_of, training_passes

DEFAULT_BATCH = 1024  # tokens


@dataclass(eq=False)
class Run:
    """One run of the main job up to the choice: everything that can be checked is checked before the model is loaded."""

    job: Job
    name: str
    needs: frozenset[str]
    out: Path | None
    progress: Progress
    warmup: Warmup | None = None
    thin: Callable[[TokenSet], TokenSet] | None = None  # takes part of every set: an estimate runs on little
    clock: Clock = field(default_factory=Clock)
    notes: list[str] = field(default_factory=list)
    sets: dict[str, TokenSet] = field(default_factory=dict)
    inputs: Inputs = field(default_factory=Inputs)
    held_out: TokenSet | None = None
    navigator: LoRANavigator | None = None
    passes: Mapping[str, float] = field(default_factory=dict)  # see `_passes`
    trained_weights: int = 0
    alone: torch.Tensor | None = None

    @classmethod
    def of(cls, job: Job, name: str, selector: Selector, out: Path | None, progress: Progress) -> Run:
        """Returns the run of a method."""
        return cls(job, name, selector.needs, out, progress, getattr(selector, "warmup", None))

    def problem(self, data: Mapping[str, Data], model: Any, tokenizer: Any) -> Problem:
        """Reads, extracts what is missing, and returns what a method may look at."""
        template = self._prepare(data, model, tokenizer)
        if not any(reads_model(need) for need in self.needs):
            return self._without_model()
        return self._gradients(self.source, self.compute, template)

    def work(self, data: Mapping[str, Data], model: Any, tokenizer: Any) -> dict[str, float]:
        """Returns what `problem` would compute from nothing, in token passes (`gradsieve.overhead`); no model is loaded."""
        template = self._prepare(data, model, tokenizer)
        if not any(reads_model(need) for need in self.needs):
            return {}
        return self._passes(self._reference_sources(self.source, self.compute, template))

    def navigator_work(self, passes: CountPasses | None) -> dict[str, float]:
        """Returns what a method would train and measure its Navigator on, in token passes; nothing without one."""
        if passes is None or self.held_out is None:
            return {}
        pool, target, job = self.sets["pool"], self.sets["target"], self.job
        budget = Budget.parse(job.budget)
        return {"navigator": navigator_passes(passes, pool, target, self.held_out, budget, job.navigator_warmup)}

    def _prepare(self, data: Mapping[str, Data], model: Any, tokenizer: Any) -> str | None:
        """Reads and checks everything but the model's weights; returns the chat template that replaces the model's own."""
        job, budget = self.job, Budget.parse(self.job.budget)
        check_dedup(job.dedup, job.dedup_threshold)
        with self.clock.stage("reading"):
            self.inputs = read_inputs(job, self.name, self.needs, data)
            examples = self.inputs.examples
            self.notes += self.inputs.notes
            if budget.examples is not None and budget.examples > len(examples["pool"]):
                raise InvalidArgument(f"budget must lie in [1, {len(examples['pool'])}] (the pool), got {budget}; lower it")
            if self.out is not None:
                require_writable(self.out)
            if self.warmup is not None:
                require_training(self.name, self.warmup)
        with self.clock.stage("tokens"):
            self.source = source = self._find_model(model, tokenizer)
            device, dtype = self._where(source)
            template = read_template(job.chat_template)
            for role, part in examples.items():
                tokens = TokenSet.of(role, part, source.tokenizer, max_length=job.max_length, chat_template=template)
                tokens.require_usable()
                self.notes += [note for note in tokens.remarks(job.max_length) if note not in self.notes]
                self.sets[role] = self.thin(tokens) if self.thin else tokens
            if any(reads_model(need) for need in self.needs):
                every = [tokens.input_ids for part in self.sets.values() for tokens in part.tokens]
                source.require_places(max(int(ids.max()) for ids in every), max(map(len, every)))
        if job.dedup != "off":
            self._drop_duplicates()
        if "navigator" in self.needs:
            self.sets["anchor"], self.held_out = split_anchor(self.sets["anchor"])
            self.notes.append(
                f"the anchor was split: {len(self.sets['anchor'].kept)} examples give the references, and forgetting is "
                f"measured on the other {len(self.held_out.kept)}"
            )
        gradients = any(reads_gradients(need) for need in self.needs)
        if any(need.startswith("embedding:") for need in self.needs) and any(reads_model(need) for need in self.needs):
            raise InvalidArgument(f"{self.name} must read embeddings alone, got needs of the model beside them; read `hidden`")
        engine = EngineSettings(
            params=job.params,
            sketch=SketchPlan(job.dim, job.seed),
            reduction=job.reduction,
            hidden=not gradients or "hidden" in self.needs,
            gradients=gradients,
        )
        self.compute = ComputeSettings(
            engine,
            dtype,
            device,
            job.max_length,
            DEFAULT_BATCH if job.batch_tokens == "auto" else job.batch_tokens,
            job.unit_tokens,
            job.checkpointing,
            job.reference_memory,
        )
        self.job = dataclasses.replace(job, dtype=dtype_name(dtype), device=device)
        return template

    def overhead(self, candidates: Gradients, selection: Selection) -> Overhead | None:
        """Returns what choosing cost beside training; None where no gradient was taken."""
        if not self.passes or not self.compute.engine.gradients:
            return None
        tokens = candidates.columns["tokens"]
        trained = self.navigator.trained_tokens if self.navigator is not None else 0
        measured = 0
        if self.navigator is not None and self.held_out is not None:
            calls, held = self.navigator.measured, sum(self.held_out.lengths)
            measured = calls.total() * (sum(self.sets["target"].lengths) + held) + calls["kl"] * held  # the base model's too
        ratio = 1.0
        if self.job.navigator:
            ratio = weight_count(self.job.navigator) / self.trained_weights
        return overhead(
            sum(self.passes.values()), trained, measured, tokens.int().tolist(), tokens[selection.rows].int().tolist(), ratio
        )

    def _drop_duplicates(self) -> None:
        """Leaves out the usable examples of the pool that repeat another usable one, each with the reason."""
        pool, job = self.sets["pool"], self.job
        with self.clock.stage("duplicates"):
            usable = [pool.examples[position] for position in pool.kept]
            found = find_duplicates(usable, job.dedup, job.dedup_threshold)
        self.sets["pool"] = pool.without({duplicate.position: duplicate.reason(usable) for duplicate in found})
        kept = len({duplicate.of for duplicate in found})
        self.notes.append(
            f"{len(found)} of {len(usable)} usable examples of the pool repeat one of {kept} others and were left out "
            f"({job.dedup}{f', {job.dedup_threshold:g}' if job.dedup == 'near' else ''}); of each group the smallest id stays"
        )

    def check(self, candidates: Gradients, count: int) -> list[Compared]:
        """Compares random rows of the pool with float64 loops."""
        with self.clock.stage("check"):
            return check_rows(
                candidates,
                count,
                self.sets["pool"],
                self.source,
                self.compute,
                self.references,
                self.job.seed,
                self.progress,
            )

    def excluded(self, candidates: Gradients) -> list[Excluded]:
        """Returns every example of the pool that is not among the candidates, with the reason."""
        pool, finite = self.sets["pool"], set(candidates.ids)
        reason = "its gradient is not finite (NaN or infinite)"
        own = ((position, pool.examples[position].id) for position in pool.kept)
        not_finite = [Excluded(position, id, reason) for position, id in own if id not in finite]
        return sorted([*pool.excluded, *not_finite], key=lambda excluded: excluded.position)

    # -- what needs no model ---------------------------------------------------------------------------------------

    def _columns(self) -> dict[str, torch.Tensor]:
        """The pool's columns that do not come with its gradients: of its texts, and the loss of answers alone."""
        columns = number_columns(self.needs, self.sets["pool"], self.name)
        if "bm25/target" in self.needs:
            with self.clock.stage("words"):
                columns["bm25/target"] = shared_words(self.sets["pool"], self.sets["target"])
        if self.alone is not None:
            columns["loss/alone"] = self.alone
        return columns

    def _without_model(self) -> Problem:
        """What a method may look at that needs no pass of the model."""
        encoders = {need for need in self.needs if need.startswith("embedding:")}
        views = {}
        for role in ("pool", "target"):
            mark = "" if role == "pool" else f"/{role}s"
            own = {need.removesuffix(mark) for need in encoders if need.endswith("/targets") == bool(mark)}
            if role == "pool" or own:
                tokens = self.sets[role]
                extra = {name: self._embedded(tokens, name.removeprefix("embedding:")) for name in sorted(own)}
                views[role] = without_gradients(tokens, self._columns() if role == "pool" else {}, extra)
        return Problem(views["pool"], views.get("target"))

    def _embedded(self, tokens: TokenSet, encoder: str) -> torch.Tensor:
        with self.clock.stage(f"embeddings of the {tokens.name}"):
            return embeddings([tokens.examples[i] for i in tokens.kept], encoder, self.compute.device)

    def _find_model(self, model: Any, tokenizer: Any) -> ModelSource:
        if isinstance(model, str) and not model:
            raise InvalidArgument("--model must name a folder, a hub id or `demo`, got none")
        if self.job.navigator:
            self.trained_weights = weight_count(model)
            self.notes.append(
                f"the navigator {self.job.navigator} did the scoring; ask `gradsieve transfer` whether it may choose for "
                f"{self.job.model}"
            )
            return find_model(self.job.navigator, tokenizer, trust_remote_code=self.job.trust_remote_code)
        return find_model(model, tokenizer, trust_remote_code=self.job.trust_remote_code)

    def _where(self, source: ModelSource) -> tuple[str, torch.dtype]:
        """Returns device and compute type: those of a model object where there is one, else what the job asks for."""
        if source.live is not None:
            weight = next(source.live.parameters())
            return str(weight.device), weight.dtype
        device = resolve_device(self.job.device)
        return device, resolve_dtype(self.job.dtype, device)

    # -- gradients ---------------------------------------------------------------------------------------------------

    def _gradients(self, source: ModelSource, compute: ComputeSettings, template: str | None) -> Problem:
        self.references = references = self._reference_sources(source, compute, template)
        self.passes = self._passes(references)
        self.compute = compute = with_form(source, compute, len(references))
        root = self._store_folder(manifest(source, compute, references).fingerprint)
        stops, rates = [Stop("base", source, root, compute)], dict[str, float]()
        if self.warmup is not None:
            warmed = stops_of(
                self.warmup,
                source,
                self.sets["pool"],
                self.job.warmup_recipe,
                self.job.seed,
                compute,
                root,
                self.clock,
                self.progress,
                self.notes.append,
            )
            stops, rates = warmed.stops, warmed.rates
            self.notes.append(warmed.note)
            stops = [dataclasses.replace(stop, compute=with_form(stop.source, compute, len(references))) for stop in stops]
        if wide := next((stop for stop in stops if stop.compute.form == "wide sketch"), None):
            self.notes.append(form_note(wide.source, wide.compute, len(references)))
        filling = Filling(self.sets, self._roles(), self.job.batch_tokens, self.clock, self.progress, self.notes.append)
        if "loss/alone" in self.needs:
            self.alone = filling.answers_alone(source, compute, root)
        filled = {stop.name: filling.filled(stop, references, alone=len(stops) == 1) for stop in stops}
        self.job = dataclasses.replace(self.job, batch_tokens=filling.batch_tokens)
        views = {
            role: self._view({name: stores[role] for name, (stores, _) in filled.items()}, self.sets[role], references)
            for role in self._roles()
        }
        facts = filled[stops[-1].name][1]
        shown = {name: fact for name, fact in facts.items() if name in references}
        known = {name: half for name, half in read_halves(filled[stops[-1].name][0]["pool"]).items() if name in shown}
        if known and compute.engine.direction == "sgd" and len(stops) == 1:
            for name, rho in split_half(views["pool"], known).items():
                shown[name] = dataclasses.replace(shown[name], split_half=rho)
        groups = target_groups(self.sets.get("target"))
        if "navigator" in self.needs:
            self.navigator = self._make_navigator(source.load(compute.dtype, compute.device), views["pool"])
        return Problem(
            views["pool"], views.get("target"), views.get("anchor"), shown, self.navigator, rates=rates, groups=groups
        )

    def _passes(self, references: Mapping[str, Source]) -> dict[str, float]:
        """What the stores are to hold, in token passes (`gradsieve.overhead`): by set, of `references` and of the `warm-up`."""
        tokens = {role: sum(self.sets[role].lengths) for role in self._roles()} | {"references": gradient_tokens(references)}
        times = 1.0 if self.compute.engine.gradients else 0.5
        found: dict[str, float] = {}
        if self.warmup is not None:
            part = part_of(self.sets["pool"], self.warmup.share, self.job.seed)
            found["warm-up"] = training_passes(self.warmup, sum(part.lengths))
            times *= self.warmup.stops
        found |= {name: times * count for name, count in tokens.items()}
        if "loss/alone" in self.needs:
            found["pool alone"] = sum(self.sets["pool"].alone().lengths) / 2
        return found

    def _roles(self) -> list[str]:
        """The sets whose gradients are taken."""
        return ["pool", *(role for role in ("target", "anchor") if {f"{role}s", f"hidden/{role}s"} & self.needs)]

    def _make_navigator(self, model: torch.nn.Module, pool: Gradients) -> LoRANavigator:
        """Loads a model of its own: the engine's may be the caller's, and is gone where the store was full."""
        assert self.held_out is not None
        tokens = dict(zip(self.sets["pool"].ids, self.sets["pool"].tokens, strict=True))
        settings = NavigatorSettings(
            learning_rate=self.job.navigator_rate,
            warmup=self.job.navigator_warmup,
            batch_tokens=DEFAULT_BATCH if self.job.batch_tokens == "auto" else self.job.batch_tokens,
            seed=self.job.seed,
        )
        candidates = [tokens[id] for id in pool.ids]
        return make_navigator(model, candidates, self.sets["target"], self.held_out, self.source.tokenizer, settings)

    def _store_folder(self, fingerprint: str) -> Path:
        """The folder asked for, or `store` beside the results, or one of the cache, so that a run in memory can go on too."""
        if self.job.store:
            return Path(self.job.store)
        return self.out / "store" if self.out else cache_dir() / "stores" / fingerprint

    def _reference_sources(self, source: ModelSource, compute: ComputeSettings, template: str | None) -> dict[str, Source]:
        return reference_sources(self.needs, self.sets, lambda part: self._contrast(part, source, compute, template))

    def _contrast(self, part: TokenSet, source: ModelSource, compute: ComputeSettings, template: str | None) -> Contrast:
        usable = [part.examples[i] for i in part.kept]
        copies = self.inputs.corrupted
        given = [(example, copies[example.id]) for example in usable if example.id in copies]
        corruption = (
            Corruption(given, [example for example in usable if example.id not in copies], "given")
            if given
            else corrupt(usable, self.job.corruption, seed=self.job.seed)
        )
        made, notes = contrast(corruption, part.name, source, compute, template)
        self.notes += notes
        return made

    def _view(self, stores: Mapping[str, GradientStore], tokens: TokenSet, references: Collection[str]) -> Gradients:
        """The rows of a set that are finite, with its columns."""
        columns = {"tokens": torch.tensor(tokens.lengths, dtype=torch.float64)}
        if tokens.name == "pool":
            columns |= self._columns()
            if replayed := self.inputs.replayed:
                columns["replay"] = torch.tensor([float(id in replayed) for id in tokens.ids], dtype=torch.float64)
        elif tokens.name == "target" and (groups := target_groups(tokens)):
            columns["group"] = group_column(tokens, groups)
        view = finite_view(stores, tokens, columns, references)
        missing = len(tokens.ids) - len(view.ids)
        if missing and tokens.name != "pool":  # the pool's are in excluded.jsonl
            self.notes.append(f"{missing} of the {tokens.name}'s gradients are not finite and were left out")
        return view
