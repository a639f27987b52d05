"""Per-example gradients of a causal language model, one batch at a time, without ever forming a weight gradient per model.

Parameters need no grad; the outputs of the lowest watched layers do, so that backward computes activation gradients only and
stops where nothing is wanted below. A forward hook keeps each watched layer's input a, a tensor hook on its output receives
b, and the pair becomes a sketch, norms, extremes and products with reference directions while it is still in the cache.
The LM head is ours: logits exist only at supervised positions, in chunks.
"""

from __future__ import annotations

from collections.abc import Iterable
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor, nn

from gradsieve.errors import ModelError
from gradsieve.gradients.accumulator import Accumulator, Batch, Block, EngineSettings, Tools
from gradsieve.gradients.directions import MeanGradient, References
from gradsieve.gradients.head import Head, Supervised
from gradsieve.gradients.parameters import Site, choose_parameters, unwrap
from gradsieve.gradients.readings import Trial


class GradientEngine:
    """Takes per-example gradients of one model; a context manager, because it hooks the model.

    Args:
        model: A causal language model of transformers, or a PEFT model around one. In eval mode while the engine is open.
        settings: What to take.
        references: Directions whose exact products with every example's gradient are wanted.

    Raises:
        ModelError: The model's head does something our loss does not know, or a chosen parameter has no rule.
    """

    def __init__(self, model: nn.Module, settings: EngineSettings | None = None, references: References | None = None) -> None:
        self.settings = settings or EngineSettings()
        self.model: Any = unwrap(model)
        self.sites = choose_parameters(self.model, self.settings.params)
        self.head = Head(self.model)
        self._tools = Tools(self.settings, self.head, self.model, self.sites, references)
        self._modes: list[tuple[nn.Module, bool]] = []
        self._flags: list[tuple[Tensor, bool]] = []
        self._hooks: list[torch.utils.hooks.RemovableHandle] = []
        self._pass: Accumulator | Trial | None = None

    def __enter__(self) -> Self:
        self._modes = [(module, module.training) for module in self.model.modules()]
        self._flags = [(parameter, parameter.requires_grad) for parameter in self.model.parameters()]
        self.model.eval().requires_grad_(False)
        watched: dict[nn.Module, list[Site]] = {}
        for site in self._watched_sites():
            watched.setdefault(site.owner, []).append(site)
        for module, sites in watched.items():
            if module is not self.head.module:
                self._hooks.append(module.register_forward_hook(self._forward_hook(sites)))
        try:
            self._try_model()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Takes the hooks off and gives the model back as it was."""
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        for module, training in self._modes:
            module.training = training
        for parameter, flag in self._flags:
            parameter.requires_grad_(flag)

    def block(self, batch: Batch) -> Block:
        """Returns sketches and columns of a batch's examples, in its order.

        A non-finite gradient shows as a non-finite value in the example's sketch or columns, an example without supervised
        positions as a NaN loss: both are the caller's to exclude.
        """
        return self._run(Accumulator(self._tools, batch)).block()

    def mean_gradient(self, batches: Iterable[Batch]) -> MeanGradient:
        """Returns the mean gradient over all examples of the batches (OGS-1), and what its reliability needs."""
        mean = MeanGradient.zeros({self._tools.key(site): site.shape for site in self.sites}, self.head.module.weight)
        for batch in batches:
            state = self._run(Accumulator(self._tools, batch, mean))
            mean.add_norms(state.groups[""].squares, state.counts)
        return mean.finish()

    def _run(self, state: Accumulator) -> Accumulator:
        batch = state.batch
        self._pass = state
        try:
            with torch.enable_grad():
                hidden: Tensor = self.model.base_model(input_ids=batch.input_ids, use_cache=False)[0]
            supervised = Supervised.of(batch.labels, self.settings.reduction, self.head.dtype)
            picked = hidden.detach()[supervised.example, supervised.position]
            gradient = state.head(picked, supervised)
            if hidden.requires_grad:
                full = torch.zeros_like(hidden)
                full[supervised.example, supervised.position] = gradient
                state.backward_runs = True
                torch.autograd.backward(hidden, full)
            state.finish()
        finally:
            self._pass = None
        return state

    def _try_model(self) -> None:
        """Tries the model on four tokens: compares our logits with the model's own, and counts calls."""
        ids = torch.arange(1, 5, device=self.head.module.weight.device)[None]
        with torch.no_grad():
            self._pass = trial = Trial()
            ours = self.head.logits(self.model.base_model(input_ids=ids, use_cache=False)[0][0])
            self._pass, self._tools.repeated = None, trial.repeated()
            theirs = self.model(input_ids=ids, use_cache=False).logits[0].to(ours.dtype)
        if not theirs.isfinite().all():
            raise ModelError(
                f"{type(self.model).__name__} must give finite logits, got NaN or infinity for tokens 1 to 4; "
                "its weights are damaged, or too large for its dtype"
            )
        if not torch.allclose(ours, theirs, rtol=1e-2, atol=1e-2 * float(theirs.abs().max())):
            raise ModelError(
                f"the output of {type(self.model).__name__} must be its LM head on the last hidden states, got logits that "
                f"differ by {float((ours - theirs).abs().max()):.3g}; this architecture's head is not supported yet"
            )

    def _watched_sites(self) -> list[Site]:
        """The chosen sites, and the embedding for its signals where it is not among them."""
        embedding = self.model.get_input_embeddings()
        watched = list(self.sites)
        if self.settings.signals and not any(site.owner is embedding for site in watched):
            watched += [site for site in choose_parameters(self.model, "embedding") if site.owner is embedding]
        return watched

    def _forward_hook(self, sites: list[Site]) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor | None:
            state = self._pass
            if isinstance(state, Trial):
                state.saw(module)
                return None
            if state is None or state.backward_runs:  # a recomputed forward of activation checkpointing
                return None
            rows = len(state.batch.input_ids)
            watched = output
            if not output.requires_grad:  # the lowest layers; cloned, because a leaf must not be overwritten in place
                watched = output.requires_grad_(True).clone()
            if len(output) == 1 < rows:  # learned positions, looked up once and broadcast: each example gets its own
                watched = watched.expand(rows, *output.shape[1:])
            call = state.saw(module, sites, args[0])
            watched.register_hook(lambda gradient: state.receive(call, gradient))
            return watched if watched is not output else None

        return hook
