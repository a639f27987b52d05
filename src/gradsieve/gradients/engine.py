"""Per-example gradients of a causal language model, one batch at a time, without ever forming a weight gradient per model.

Parameters need no grad; the outputs of the lowest watched layers do, so that backward computes activation gradients only and
stops where nothing is wanted below. A forward hook keeps each watched layer's input a, a tensor hook on its output receives
b, and the pair becomes a sketch, norms, extremes and products with reference directions while it is still in the cache.
The LM head is ours: logits exist only at supervised positions, in chunks.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterable, Mapping
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop

from gradsieve.errors import InvalidArgument, ModelError
from gradsieve.gradients import experts, modules
from gradsieve.gradients.accumulator import Accumulator
from gradsieve.gradients.adam import Moments
from gradsieve.gradients.adapters import Adapter
from gradsieve.gradients.directions import MeanGradient, References
from gradsieve.gradients.forward import pooled, require_same_logits
from gradsieve.gradients.head import Head, Supervised
from gradsieve.gradients.parameters import CURE, Site, choose_parameters, is_fused, unwrap
from gradsieve.gradients.readings import Call, Routing
from gradsieve.gradients.settings import Batch, Block, EngineSettings
from gradsieve.gradients.tools import Tools

TRIAL = ((1, 2, 3, 4), (2, 1, 4, 3))  # token ids


class GradientEngine:
    """Takes per-example gradients of one model; a context manager, because it hooks the model.

    Args:
        model: A causal language model of transformers, or a PEFT model around one. In eval mode while the engine is open.
        settings: What to take.
        references: Directions whose exact products with every example's gradient are wanted.
        checkpointing: Whether to keep no activations inside the decoder's blocks and run each again in the backward pass:
            the same numbers for about a third more time and much less memory.
        moments: The optimizer's state that Adam's direction starts from; needed for `settings.direction` `adam`.

    Raises:
        ModelError: The model's head does something our loss does not know, or a chosen parameter has no rule.
        InvalidArgument: `settings.params` matches nothing, `checkpointing` is on for a model without blocks, or `moments`
            do not go with direction and parameters.
    """

    def __init__(
        self,
        model: nn.Module,
        settings: EngineSettings | None = None,
        references: References | None = None,
        *,
        checkpointing: bool = False,
        moments: Moments | None = None,
    ) -> None:
        self.settings = settings or EngineSettings()
        if (self.settings.direction == "adam") != (moments is not None):
            got = "none" if moments is None else "some"
            raise InvalidArgument(
                f"moments must be given for direction adam and no other, got {got} for {self.settings.direction}"
            )
        self.model: Any = unwrap(model)
        self.sites = choose_parameters(self.model, self.settings.params)
        self.head = Head(self.model)
        self._tools = Tools(self.settings, self.head, self.model, self.sites, references, moments)
        self._blocks = _blocks(self.model) if checkpointing else []
        self._modes: list[tuple[nn.Module, bool]] = []
        self._flags: list[tuple[Tensor, bool]] = []
        self._hooks: list[torch.utils.hooks.RemovableHandle] = []
        self._forwards: list[tuple[nn.Module, Any]] = []
        self._pass: Accumulator | _Trial | None = None

    def __enter__(self) -> Self:
        self._modes = [(module, module.training) for module in self.model.modules()]
        self._flags = [(parameter, parameter.requires_grad) for parameter in self.model.parameters()]
        try:
            self.model.eval().requires_grad_(False)
            _keep_differentiable(self.model)
            watched: dict[nn.Module, list[Site]] = {}
            for site in self._watched_sites():
                watched.setdefault(site.owner, []).append(site)
            for module, adapter in self._adapters(watched):
                self._replace_forward(module, self._adapter_forward(adapter, watched.pop(adapter.up)))
            for module, sites in watched.items():
                if module is not self.head.module:
                    self._watch(module, sites)
            for block in self._blocks:
                self._replace_forward(block, self._checkpointed(block))
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
        for module, forward in self._forwards:
            del module.forward
            if forward is not None:
                module.forward = forward
        self._hooks.clear()
        self._forwards.clear()
        for module, training in self._modes:
            module.training = training
        for parameter, flag in self._flags:
            parameter.requires_grad_(flag)

    def block(self, batch: Batch) -> Block:
        """Returns sketches and columns of a batch's examples, in its order.

        A non-finite gradient shows as a non-finite value in the example's sketch or columns, an example without supervised
        positions as a NaN loss: both are the caller's to exclude.
        """
        state = self._run(Accumulator(self._tools, batch))
        return dataclasses.replace(state.sums.block(), hidden=state.hidden)

    def mean_gradient(self, batches: Iterable[Batch], *, sketched: bool = False) -> MeanGradient:
        """Returns the mean gradient over all examples of the batches (OGS-1), and what its reliability needs.

        It is the mean of plain gradients whatever the direction: LESS compares Γ of the pool with g of the target.

        Args:
            batches: The examples; a batch's `scale` weights them.
            sketched: Whether to keep every example's sketch too, for the variance of paired differences.
        """
        shapes = {self._tools.key(site): site.shape for site in self.sites}
        mean = MeanGradient.zeros(shapes, self.head.module.weight, sketched=sketched)
        for batch in batches:
            sums = self._run(Accumulator(self._tools, batch, mean)).sums
            mean.add_norms(sums.groups[""].squares, sums.counts)
            if sketched:
                mean.sketches.append(sums.sketch())
        return mean.finish()

    def _run(self, state: Accumulator) -> Accumulator:
        batch = state.batch
        self._pass = state
        try:
            with torch.enable_grad(), set_checkpoint_early_stop(False):  # else a block's last layers would not run again
                places = {} if batch.position_ids is None else {"position_ids": batch.position_ids}
                hidden: Tensor = self.model.base_model(input_ids=batch.input_ids, use_cache=False, **places)[0]
            if self.settings.hidden and state.sums.mean is None:
                state.hidden = pooled(hidden.detach(), batch.lengths)
            supervised = Supervised.of(batch.labels, self.settings.reduction, self.head.dtype, batch.scale)
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
            state.release()
        return state

    def _try_model(self) -> None:
        """Tries the model on a few tokens: compares our logits with its own, counts calls, tries to run modules again."""
        ids = torch.tensor(TRIAL, device=self.head.module.weight.device)
        with torch.no_grad():
            self._pass = trial = _Trial()
            try:
                ours = self.head.logits(self.model.base_model(input_ids=ids, use_cache=False)[0][0])
            finally:
                self._pass = None
            theirs = self.model(input_ids=ids, use_cache=False).logits[0].to(ours.dtype)
        self._refuse_calls(trial)
        self._tools.repeated = frozenset(module for module, count in trial.counts.items() if count > 1)
        require_same_logits(self.model, ours, theirs)

    def _refuse_calls(self, trial: _Trial) -> None:
        """Refuses sites whose module was not called, so that hooks see nothing of them, and experts that were called twice."""
        for site in self._watched_sites():
            if site.kind.startswith("expert") and trial.counts.get(site.owner, 0) > 1:
                raise ModelError(
                    f"parameter {site.name} must belong to experts that the model calls once, got {trial.counts[site.owner]} "
                    f"calls of one {type(site.owner).__name__}; {CURE}"
                )
            if site.owner is not self.head.module and site.owner not in trial.counts and ".experts." not in site.name:
                raise ModelError(
                    f"parameter {site.name} must belong to a layer that the model calls, got {type(site.owner).__name__}, "
                    f"which it does not; {CURE}"
                )

    def _watched_sites(self) -> list[Site]:
        """The chosen sites, and the embedding for its signals where it is not among them."""
        embedding = self.model.get_input_embeddings()
        watched = list(self.sites)
        if self.settings.signals and not any(site.owner is embedding for site in watched):
            watched += [site for site in choose_parameters(self.model, "embedding") if site.owner is embedding]
        return watched

    # -- watching ----------------------------------------------------------------------------------------------------

    def _watch(self, module: nn.Module, sites: list[Site]) -> None:
        if is_fused(module):
            self._replace_forward(module, self._experts_forward(module, sites))
        elif isinstance(module, nn.Embedding):
            self._replace_forward(module, self._embedding_forward(module, sites))
        elif any(site.kind == "module" for site in sites):
            self._hooks.append(module.register_forward_hook(self._module_hook(sites), with_kwargs=True))
        else:
            self._hooks.append(module.register_forward_hook(self._linear_hook(sites)))

    def _adapters(self, watched: Mapping[nn.Module, list[Site]]) -> list[tuple[nn.Module, Adapter]]:
        """Returns the LoRA layers of which both matrices are watched, and nothing else."""
        found = ((module, Adapter.of(module)) for module in self.model.modules())
        return [
            (module, adapter)
            for module, adapter in found
            if adapter is not None and adapter.base not in watched and adapter.down in watched and adapter.up in watched
        ]

    def _replace_forward(self, module: nn.Module, forward: Callable[..., Any]) -> None:
        self._forwards.append((module, module.__dict__.get("forward")))
        module.forward = forward

    def _watched(self, output: Tensor, call: Call | None, number: int = 0, own: bool = False) -> Tensor:
        """Returns a layer's output, its gradient reported to the batch under way.

        Args:
            output: The output.
            call: Whose it is; None where nothing is watched.
            number: Which of the call's outputs it is.
            own: Whether what the layer itself does with the output later on is to be left out.
        """
        state = self._pass
        if call is None or not isinstance(state, Accumulator):
            return output
        rows = len(state.batch.input_ids)
        if not output.requires_grad:  # the lowest layers; cloned, because a leaf must not be overwritten in place
            output = output.requires_grad_(True).clone()
        elif own:
            output = output.clone()
        if len(output) == 1 < rows:  # learned positions, looked up once and broadcast: each example gets its own
            output = output.expand(rows, *output.shape[1:])
        if not state.backward_runs:  # in a block run again, everything but this is to be as it was
            state.hooks.append(output.register_hook(lambda gradient: state.receive(call, number, gradient)))
        return output

    def _seen(self, module: nn.Module, sites: list[Site], tensor: Tensor, **more: Any) -> Call | None:
        state = self._pass
        if isinstance(state, _Trial):
            state.saw(module)
            return None
        if state is None or not torch.is_grad_enabled():  # without autograd there is no gradient to come
            return None
        return state.saw(module, sites, tensor, **more)

    def _linear_hook(self, sites: list[Site]) -> Callable[..., Any]:
        def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> Tensor:
            if not isinstance(output, Tensor):
                kind = type(module).__name__
                raise ModelError(f"parameter {sites[0].name} must belong to a layer that gives one tensor, got {kind}; {CURE}")
            return self._watched(output, self._seen(module, sites, args[0]))

        return hook

    def _module_hook(self, sites: list[Site]) -> Callable[..., Any]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
            if isinstance(self._pass, _Trial):
                self._try_module(module, sites, args, kwargs, output)
            outputs = modules.tensors_of(output)
            call = self._seen(module, sites, args[0], outputs=len(outputs), arguments=(args, kwargs))
            if not isinstance(output, tuple):
                return self._watched(output, call)
            return tuple(self._watched(x, call, i, own=True) if i in outputs else x for i, x in enumerate(output))

        return hook

    def _try_module(
        self, module: nn.Module, sites: list[Site], args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> None:
        trial, self._pass = self._pass, None  # what is run here does not count
        try:
            separable = modules.is_separable(module, args, kwargs, output, len(TRIAL))
        except RuntimeError:  # it cannot be run for one example, such as a layer that keeps a state between calls
            separable = False
        finally:
            self._pass = trial
        if not separable:
            raise ModelError(
                f"parameter {sites[0].name} must belong to a layer gradsieve has a rule for, got {type(module).__name__}, "
                f"which mixes examples; {CURE}"
            )

    def _adapter_forward(self, adapter: Adapter, sites: list[Site]) -> Callable[..., Any]:
        def forward(x: Tensor) -> Tensor:
            scaled = adapter.down(x) * adapter.scaling
            return self._watched(adapter.output(x, scaled), self._seen(adapter.up, sites, scaled))

        return forward

    def _embedding_forward(self, module: nn.Embedding, sites: list[Site]) -> Callable[..., Any]:
        original = module.forward

        def looked_up(ids: Tensor, rows: Tensor) -> Tensor:
            return self._watched(rows, self._seen(module, sites, ids))

        def forward(*args: Any, **kwargs: Any) -> Any:
            with _Lookup(looked_up):
                return original(*args, **kwargs)

        return forward

    def _experts_forward(self, module: nn.Module, sites: list[Site]) -> Callable[..., Any]:
        original = module.forward

        def watch(name: str, x: Tensor, output: Tensor, routing: Routing) -> Tensor:
            mine = [site for site in sites if site.name.rpartition(".")[2] in (name, f"{name}_bias")]
            return self._watched(output, self._seen(module, mine, x, routing=routing)) if mine else output

        def forward(hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Any:
            state = self._pass
            if not isinstance(state, Accumulator):
                if isinstance(state, _Trial):
                    state.saw(module)
                return original(hidden_states, top_k_index, top_k_weights)
            return experts.run(module, hidden_states, top_k_index, top_k_weights, len(state.batch.input_ids), watch)

        return forward

    def _checkpointed(self, block: nn.Module) -> Callable[..., Any]:
        original, regions = block.forward, itertools.count()
        number = self._blocks.index(block)

        def forward(*args: Any, **kwargs: Any) -> Any:
            state = self._pass
            if not isinstance(state, Accumulator):
                return original(*args, **kwargs)
            region = next(regions) * len(self._blocks) + number

            def run(*inner: Any) -> Any:
                state.enter(region)
                try:
                    return original(*inner, **kwargs)
                finally:
                    state.leave()

            return checkpoint(run, *args, use_reentrant=False, preserve_rng_state=False)

        return forward


class _Trial:
    """Counts how often each watched module is called."""

    def __init__(self) -> None:
        self.counts: dict[nn.Module, int] = {}

    def saw(self, module: nn.Module) -> None:
        """Counts a call."""
        self.counts[module] = self.counts.get(module, 0) + 1


class _Lookup(TorchFunctionMode):
    """Shows (ids, rows) of an embedding's table look-up, whatever the module does before and after it."""

    def __init__(self, looked_up: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self._looked_up = looked_up

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        return self._looked_up(args[0], output) if func is nn.functional.embedding else output


def _keep_differentiable(model: nn.Module) -> None:
    """Keeps 4-bit layers of bitsandbytes from being packed for inference, which eval mode allows and no gradient passes.

    Raises:
        ModelError: That has happened already.
    """
    for name, module in model.named_modules():
        if type(module).__name__ == "Linear4bit":
            if getattr(getattr(module.weight, "quant_state", None), "packing_format_for_cpu", False):
                raise ModelError(
                    f"{name} must have 4-bit weights that gradients pass through, got weights that bitsandbytes has packed for "
                    "inference; load the model again, and take gradients before anything else"
                )
            module.training = True  # it has no dropout: this is all that the mode means there


def _blocks(model: nn.Module) -> list[nn.Module]:
    """Returns the model's decoder blocks: what transformers itself would checkpoint, the outermost of it."""
    from transformers.modeling_layers import GradientCheckpointingLayer

    found: list[nn.Module] = []
    inside: set[nn.Module] = set()
    for module in model.modules():
        if isinstance(module, GradientCheckpointingLayer) and module not in inside:
            found.append(module)
            inside |= set(module.modules())
    if not found:
        raise InvalidArgument(f"checkpointing must be off for a model without decoder blocks, got {type(model).__name__}")
    return found
