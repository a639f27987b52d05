"""The slow way, to settle doubt: one float64 forward and backward pass per example, every number from the whole gradient.

It shares with the engine which parameters are meant (`choose_parameters`) and which projection (`SketchPlan`), nothing else.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from gradsieve.gradients.parameters import Site, choose_parameters, unwrap
from gradsieve.gradients.settings import EngineSettings
from gradsieve.gradients.sketch import SketchPlan

ENDS = ("embedding", "lm_head")


@dataclass(frozen=True, eq=False)
class Truth:
    """One example's numbers.

    Attributes:
        columns: As a block's, products with unit references included; float64.
        scales: What an error of a column is measured against.
        sketch: float64 [d].
    """

    columns: Mapping[str, float]
    scales: Mapping[str, float]
    sketch: Tensor


class Loop:
    """Takes gradients example by example. Changes the model it is given: tied weights come apart, so that their gradients do.

    Args:
        model: A causal language model in float64, on the CPU.
        settings: What to take.
        references: Unit directions by name, float64, each by parameter name [d_out, d_in] (`tied` for tied weights).
    """

    def __init__(self, model: nn.Module, settings: EngineSettings, references: Mapping[str, Mapping[str, Tensor]]) -> None:
        self.model: Any = unwrap(model).eval().requires_grad_(False)
        self.settings, self.references = settings, references
        if hasattr(self.model.config, "_experts_implementation"):
            self.model.config._experts_implementation = "eager"  # the others have no float64
        head, embedding = self.model.get_output_embeddings(), self.model.get_input_embeddings()
        self._tied = head.weight is embedding.weight
        if self._tied:
            head.weight = nn.Parameter(head.weight.detach().clone(), requires_grad=False)
        self._owners = {"embedding": embedding, "lm_head": head}
        self.sites = choose_parameters(self.model, settings.params)
        self._watched = {site.name: site for site in self.sites}
        for end in ENDS if settings.signals else ():
            for site in choose_parameters(self.model, "embedding" if end == "embedding" else "lm-head"):
                if site.owner is self._owners[end]:
                    self._watched[site.name] = site
        for site in self._watched.values():
            site.parameter.requires_grad_(True)

    def example(self, input_ids: Sequence[int], labels: Sequence[int]) -> Truth:
        """Returns an example's numbers.

        Args:
            input_ids: Its tokens.
            labels: As many, -100 where there is no loss; unshifted.
        """
        for site in self._watched.values():
            site.parameter.grad = None
        names, hooks, kept = self._watch_readers()
        try:
            scores = self.model(input_ids=torch.tensor([list(input_ids)]), use_cache=False).logits[0, :-1].log_softmax(-1)
        finally:
            for hook in hooks:
                hook.remove()
        kept.clear()
        target = torch.tensor(list(labels))[1:]
        at = target != -100
        nll = -scores[at].gather(1, target[at][:, None]).sum()
        (nll / at.sum() if self.settings.reduction == "mean" else nll).backward()
        gradients = {name: _laid_out(site) for name, site in self._watched.items()}
        own = self._merged({site.name: gradients[site.name] for site in self.sites})
        norm = sum(float(torch.linalg.vector_norm(g)) ** 2 for g in own.values()) ** 0.5
        columns = {"loss": float(nll.detach() / at.sum()), "completion_tokens": float(at.sum()), "norm": norm}
        scales = {"loss": abs(columns["loss"]), "completion_tokens": 1.0, "norm": norm}
        for name, r in self.references.items():
            columns[f"dot/{name}"] = sum(float((g * r[key]).sum()) for key, g in own.items())
            scales[f"dot/{name}"] = norm
        for name, g in gradients.items():
            group = next((end for end, owner in self._owners.items() if self._watched[name].owner is owner), name)
            _add_statistics(columns, scales, group, g)
        return Truth(columns, scales, self._sketch(gradients, names))

    def _merged(self, gradients: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Returns gradients by parameter: tied weights are one."""
        merged: dict[str, Tensor] = {}
        for name, g in gradients.items():
            key = self._key(self._watched[name])
            merged[key] = merged[key] + g if key in merged else g
        return merged

    def _key(self, site: Site) -> str:
        at_end = site.parameter.ndim == 2 and site.owner in self._owners.values()
        return "tied" if self._tied and at_end else site.name

    def _watch_readers(self) -> tuple[dict[str, str], list[Any], list[Tensor]]:
        """Watches which linear layers read the same tensor: the first of them names the projection of all."""
        names: dict[str, str] = {}
        first: dict[tuple[int, ...], str] = {}
        kept: list[Tensor] = []  # so that no other tensor gets its place

        def watch(site: Site) -> Any:
            def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
                kept.append(args[0])
                key = args[0].data_ptr(), *args[0].shape, *args[0].stride()
                names[site.name] = first.setdefault(key, site.name)

            return site.owner.register_forward_pre_hook(hook)

        return names, [watch(site) for site in self.sites if site.is_linear], kept

    def _sketch(self, gradients: Mapping[str, Tensor], readers: Mapping[str, str]) -> Tensor:
        """Returns Σ P_outᵀ G P_in over the parameters, or their signed entries at their places, folded to d numbers."""
        plan: SketchPlan = self.settings.sketch
        cells = torch.zeros(*plan.sides, dtype=torch.float64)
        for site in self.sites:
            G, key = gradients[site.name], self._key(site)
            if G.shape[1] == 1:
                place, sign = plan.vector_buckets(site.name, len(G))
                cells.view(-1).index_add_(0, place, G[:, 0] * sign)
            elif plan.entrywise:
                sign = plan.signs(f"{key}/out", len(G))[:, None] * plan.signs(f"{key}/in", G.shape[1])
                place = plan.places(key, torch.arange(len(G)), G.shape[1])
                cells.view(-1).index_add_(0, place.flatten(), (G * sign).flatten())
            else:
                left = plan.projection(key, "out", G.shape[0]).double()
                cells += left.T @ G @ plan.projection(readers.get(site.name, key), "in", G.shape[1]).double()
        order, sign = plan.fold()
        flat = torch.cat([cells.flatten(), torch.zeros(1, dtype=torch.float64)])
        return (flat[order] * sign).view(plan.dim, -1).sum(1)


def _laid_out(site: Site) -> Tensor:
    """Returns the gradient of a site's parameter with outputs as rows, experts one above the other."""
    g = site.parameter.grad if site.parameter.grad is not None else torch.zeros_like(site.parameter)
    return (g.mT if site.kind in ("transposed", "expert_transposed") else g).reshape(site.shape)


def _add_statistics(columns: dict[str, float], scales: dict[str, float], group: str, g: Tensor) -> None:
    """Adds norm, mean, sd, max and min: errors of mean and sd are measured against the root mean square."""
    norm, mean = float(torch.linalg.vector_norm(g)), float(g.mean())
    low, high = (float(end) for end in g.aminmax())
    largest, rms = max(-low, high), norm / g.numel() ** 0.5
    values = {"norm": norm, "mean": mean, "sd": max(rms**2 - mean**2, 0.0) ** 0.5, "max": high, "min": low}
    against = {"norm": norm, "mean": rms, "sd": rms, "max": largest, "min": largest}
    columns |= {f"{name}/{group}": value for name, value in values.items()}
    scales |= {f"{name}/{group}": value for name, value in against.items()}
