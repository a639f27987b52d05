"""Which parameters φ the gradient is taken over, and the rule that covers each.

A specification is a comma-separated list of terms:

    linear      every linear layer of the decoder, without the LM head: nn.Linear, GPT-2's Conv1D, fused experts and their
                routers; biases included
    embedding   the input embedding (and learned position embeddings)
    lm-head     the output layer
    vectors     biases and the scales of normalisation layers
    all         all of these
    lora        every LoRA matrix of a PEFT model
    last:N      `linear`, in the last N decoder blocks only; the backward pass stops there
    re:PATTERN  parameters whose full name matches the regular expression (re.search)
    auto        `lora` for a PEFT model, else `linear`; refused where PEFT trains anything beside LoRA matrices

Of a model that sees or hears too, all but re:PATTERN mean the part that reads text.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor, nn

from gradsieve.errors import InvalidArgument, ModelError

CURE = "name the layers to take, such as --params re:'attn|mlp'"
LARGEST_MODULE = 1 << 20  # a module run again needs its gradient per example in memory
Kind = Literal["matrix", "transposed", "bias", "embedding", "head", "module", "expert", "expert_transposed", "expert_bias"]


@dataclass(frozen=True, slots=True)
class Site:
    """One parameter, and how its per-example gradient is made.

    Attributes:
        name: The parameter's name in the model.
        owner: The module whose input and output gradient are watched.
        kind: `matrix` [d_out, d_in], `transposed` (Conv1D's [d_in, d_out]), `bias`, `embedding`, `head`, `expert`
            [E, d_out, d_in], `expert_transposed` [E, d_in, d_out], `expert_bias` [E, d_out], or `module` (parameters of a
            small module that is run again: normalisation, router).
        parameter: The parameter itself.
    """

    name: str
    owner: nn.Module
    kind: Kind
    parameter: Tensor

    @property
    def shape(self) -> tuple[int, int]:
        """(d_out, d_in) of the gradient as this package lays it out; vectors are (n, 1), experts one above the other."""
        if self.parameter.ndim == 1 or self.kind == "expert_bias":
            return self.parameter.numel(), 1
        if self.kind == "transposed":
            return self.parameter.shape[1], self.parameter.shape[0]
        d_in = self.parameter.shape[1] if self.kind == "expert_transposed" else self.parameter.shape[-1]
        return self.parameter.numel() // d_in, d_in

    @property
    def product_shape(self) -> tuple[int, int]:
        """(d_out, d_in) of one product b aᵀ: of one expert, where there are several."""
        rows, columns = self.shape
        return (rows // len(self.parameter) if self.kind.startswith("expert") else rows), columns

    @property
    def is_linear(self) -> bool:
        """Whether it is the weight of one linear layer of the decoder."""
        return self.kind in ("matrix", "transposed")


def unwrap(model: Any) -> Any:
    """Returns the transformers model inside a PEFT wrapper, or the model itself.

    Raises:
        ModelError: The wrapper adds tokens to the prompt, which the model inside knows nothing of.
    """
    config = getattr(model, "active_peft_config", None)
    if config is not None and config.is_prompt_learning:
        name = type(config).__name__
        raise ModelError(f"adapters must change layers (LoRA and its kin), got {name}, which adds tokens to the prompt")
    get_base = getattr(model, "get_base_model", None)
    return get_base() if callable(get_base) else model


def is_fused(module: nn.Module) -> bool:
    """Says whether a module is a fused experts layer as transformers lays them out."""
    return all(hasattr(module, name) for name in ("has_gate", "has_bias", "is_transposed", "_apply_gate"))


def is_small(module: nn.Module, parameter: Tensor) -> bool:
    """Says whether a parameter's module can be run again for each example: no children, and not large."""
    return not any(True for _ in module.children()) and parameter.numel() <= LARGEST_MODULE


def is_adapted(model: nn.Module) -> bool:
    """Says whether the model carries LoRA matrices."""
    return any("lora_" in name for name, _ in model.named_parameters())


def choose_parameters(model: nn.Module, spec: str) -> list[Site]:
    """Returns the sites that `spec` names, in the model's own order.

    Raises:
        InvalidArgument: A term is unknown, or the specification matches no parameter.
        ModelError: A chosen parameter has no rule.
    """
    if spec == "auto":
        _require_lora_alone(model)
        spec = "lora" if is_adapted(model) else "linear"
    sites = _sites(model)
    of_text = _of_text(model, sites)
    chosen: dict[str, Site | str] = {}
    for term in (part.strip() for part in spec.split(",")):
        meant = sites if term.startswith("re:") else of_text
        matches = _term(term, meant, model)
        found = {name: site for name, site in meant.items() if matches(name, site)}
        if not found:
            raise InvalidArgument(f"params must match a parameter, got {term!r}, which matches none of {len(meant)}")
        chosen |= found
    for name, site in chosen.items():
        if isinstance(site, str):
            raise ModelError(f"parameter {name} must belong to a layer gradsieve has a rule for, got {site}; {CURE}")
    found_sites = [site for name, site in sites.items() if name in chosen and isinstance(site, Site)]
    _refuse_shared(found_sites, sites)
    return found_sites


def _of_text(model: nn.Module, sites: dict[str, Site | str]) -> dict[str, Site | str]:
    """Returns the sites of the decoder of text, its embedding and its head; all where there is nothing beside it."""
    config: Any = model.config
    if config.get_text_config(decoder=True) is config:
        return sites
    decoder = model.get_decoder()  # type: ignore[operator]
    prefix = next(f"{name}." for name, module in model.named_modules() if module is decoder)
    head = model.get_output_embeddings()  # type: ignore[operator]
    ends = {id(module) for module in (model.get_input_embeddings(), head)}  # type: ignore[operator]
    return {
        name: site
        for name, site in sites.items()
        if name.startswith(prefix) or (isinstance(site, Site) and id(site.owner) in ends)
    }


def _refuse_shared(chosen: list[Site], sites: dict[str, Site | str]) -> None:
    """Refuses a parameter that two modules hold, whose gradient is the sum of both; tied ends of a model are one anyway."""
    holders: dict[int, list[Site]] = {}
    for site in sites.values():
        if isinstance(site, Site) and site.kind not in ("head", "embedding"):
            holders.setdefault(id(site.parameter), []).append(site)
    for site in chosen:
        others = [other.name for other in holders.get(id(site.parameter), []) if other is not site]
        if others:
            raise ModelError(f"parameter {site.name} must be held by one module, got {others[0]} that is the same; {CURE}")


def _require_lora_alone(model: nn.Module) -> None:
    """Raises ModelError where PEFT trains something beside LoRA matrices: neither `lora` nor `linear` would have it."""
    for prefix, module in model.named_modules():
        others = [short for short in getattr(module, "adapter_layer_names", ()) if not short.startswith("lora_")]
        for name, _ in module.named_parameters():
            if any(name.startswith(f"{short}.") for short in others):
                raise ModelError(
                    f"parameter {prefix}.{name} must be a LoRA matrix for --params auto, got one of {type(module).__name__}; "
                    "name what to take, such as --params lora, linear or re:PATTERN"
                )
    for config in getattr(model, "peft_config", {}).values():
        trained = getattr(config, "bias", "none")
        if trained != "none" and any(name.endswith(".bias") for name, _ in model.named_parameters()):
            raise ModelError(
                f"adapters must train LoRA matrices alone for --params auto, got bias={trained!r}: biases beside them; name "
                "what to take, such as --params lora or re:'lora_|bias$'"
            )


def chosen_size(model: nn.Module, spec: str) -> int:
    """Returns the numbers in one gradient over the parameters that `spec` names; tied weights count once."""
    sites = choose_parameters(unwrap(model), spec)
    return sum({id(site.parameter): site.parameter.numel() for site in sites}.values())


def _sites(model: nn.Module) -> dict[str, Site | str]:
    """Returns every parameter's site by name; a parameter without a rule has its module's class name instead."""
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()  # type: ignore[operator]
    table: dict[str, Site | str] = {}
    for prefix, module in model.named_modules():
        for short, parameter in module.named_parameters(recurse=False):
            name = f"{prefix}.{short}" if prefix else short
            kind = _kind(module, short, parameter, embedding, head)
            table[name] = Site(name, module, kind, parameter) if kind else type(module).__name__
    return table


def _kind(module: nn.Module, short: str, parameter: Tensor, embedding: nn.Module, head: nn.Module | None) -> Kind | None:
    if module is head:
        return "head" if short == "weight" else "bias"
    if module is embedding or isinstance(module, nn.Embedding):
        return "embedding"
    if not parameter.is_floating_point():
        return None
    if isinstance(module, nn.Linear) and short in ("weight", "bias"):
        return "matrix" if short == "weight" else "bias"
    if type(module).__name__ == "Conv1D" and short in ("weight", "bias"):
        return "transposed" if short == "weight" else "bias"
    if is_fused(module):
        transposed: Any = module.is_transposed
        kinds: dict[int, Kind] = {2: "expert_bias", 3: "expert_transposed" if transposed else "expert"}
        return kinds.get(parameter.ndim)
    return "module" if is_small(module, parameter) else None


def _term(term: str, sites: dict[str, Site | str], model: nn.Module) -> Callable[[str, Site | str], bool]:
    head = model.get_output_embeddings()  # type: ignore[operator]

    def linear(name: str, site: Site | str) -> bool:
        if isinstance(site, str):
            return ".experts." in name or ".mlp." in name or "proj" in name
        if site.owner is head or "lora_" in name or site.kind in ("embedding", "head"):
            return False
        return site.kind != "module" or any(own.ndim == 2 for own in site.owner.parameters(recurse=False))  # a router

    kinds: dict[str, Callable[[str, Site | str], bool]] = {
        "linear": linear,
        "embedding": lambda _, site: isinstance(site, Site) and site.kind == "embedding",
        "lm-head": lambda _, site: isinstance(site, Site) and site.owner is head,
        "vectors": lambda _, site: isinstance(site, Site) and site.shape[1] == 1,
        "all": lambda *_: True,
        "lora": lambda name, _: "lora_" in name,
    }
    if term in kinds:
        return kinds[term]
    if match := re.fullmatch(r"last:([1-9]\d*)", term):
        keep = int(match[1])
        blocks = sorted({block for name in sites if (block := _block(name)) is not None})
        if keep > len(blocks):
            raise InvalidArgument(f"params last:N must have N at most {len(blocks)} (the decoder blocks), got {keep}")
        last = set(blocks[-keep:])
        return lambda name, site: _block(name) in last and linear(name, site)
    if term.startswith("re:"):
        try:
            pattern = re.compile(term[3:])
        except re.error as error:
            raise InvalidArgument(f"params re:PATTERN must be a regular expression, got {term[3:]!r}: {error}") from None
        return lambda name, _: bool(pattern.search(name))
    raise InvalidArgument(f"params must be made of {', '.join(kinds)}, last:N, re:PATTERN or auto, got {term!r}")


def _block(name: str) -> int | None:
    match = re.search(r"\.(\d+)\.", name)
    return int(match[1]) if match else None
