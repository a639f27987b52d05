"""Adam's direction Γ(z): the step that AdamW would take at a checkpoint if example z were its next batch (METHODS 0, LESS).

    m' = β1 m + (1-β1) g_z,   v' = β2 v + (1-β2) g_z²,   Γ(z) = m̂' / (√v̂' + ε),   m̂' = m'/(1-β1^(t+1)),  v̂' likewise

m, v and t come from a checkpoint's optimizer. Γ is element-wise, so it needs the per-example gradient itself: it is made tile
by tile where that is in the cache. Xia et al. (2024), arXiv:2402.04333, section 3.1; their code has m'/√(v' + ε), without bias
correction, which `less_form` gives for comparison.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import xxhash
from torch import Tensor, nn

from gradsieve.errors import DataError, InvalidArgument, ModelError
from gradsieve.gradients.parameters import Site, unwrap

SAFE, PICKLED = "moments.safetensors", "optimizer.pt"
FIRST, SECOND = "exp_avg", "exp_avg_sq"
NO_DECAY = ("bias", "layernorm", "rmsnorm", r"(?:^|\.)norm(?:$|\.)", r"_norm(?:$|\.)")
"""What transformers' Trainer puts in its second group of parameters, beside every LayerNorm."""
CURE = "name the checkpoint that this model comes from"
ELEMENTWISE = ("matrix", "transposed", "bias", "module")


@dataclass(frozen=True, eq=False)
class Moments:
    """The state of AdamW at a checkpoint, by parameter name as `unwrap(model).named_parameters()` has it.

    Attributes:
        first: m, float32, in the parameter's own shape.
        second: v, likewise, ≥ 0.
        steps: t, steps taken.
        beta1: Decay of m.
        beta2: Decay of v.
        epsilon: ε.
    """

    first: Mapping[str, Tensor]
    second: Mapping[str, Tensor]
    steps: Mapping[str, int]
    beta1: float = 0.9
    beta2: float = 0.999
    epsilon: float = 1e-8

    @classmethod
    def read(cls, folder: Path, model: nn.Module) -> Moments:
        """Returns the moments of a checkpoint: `moments.safetensors` (see `write`), else the Trainer's `optimizer.pt`.

        A state of the Trainer holds numbers in place of names. Where it was not saved with names, the numbers follow the
        Trainer's own order of the model's trainable parameters, and every shape is compared.

        Raises:
            DataError: The folder holds neither, or the file is not the state of Adam or AdamW.
            ModelError: The state does not fit the model; both sides are named.
        """
        if (folder / SAFE).exists():
            return cls._read_safe(folder / SAFE, model)
        if (folder / PICKLED).exists():
            return cls._read_trainer(folder / PICKLED, model)
        raise DataError(f"{folder}: must hold {PICKLED} or {SAFE}, got neither; save checkpoints with their optimizer state")

    @classmethod
    def _read_safe(cls, path: Path, model: nn.Module) -> Moments:
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(path, framework="pt") as file:
                facts = file.metadata() or {}
                tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
            numbers = [float(facts[key]) for key in ("beta1", "beta2", "epsilon")]
            first, second, steps = (_under(f"{kind}/", tensors) for kind in (FIRST, SECOND, "step"))
        except (SafetensorError, OSError, KeyError, ValueError) as error:
            raise DataError(f"{path}: must be a file that Moments.write made, got {error}") from None
        counted = {name: int(step) for name, step in steps.items()}
        return cls(first, second, counted, *numbers)._fitting(path, model)

    @classmethod
    def _read_trainer(cls, path: Path, model: nn.Module) -> Moments:
        import pickle

        try:
            content: Any = torch.load(path, map_location="cpu", weights_only=True)
            state, groups = content["state"], content["param_groups"]
            betas = {(*group["betas"], group["eps"]) for group in groups}
        except (pickle.UnpicklingError, RuntimeError, EOFError, KeyError, TypeError) as error:
            raise DataError(f"{path}: must be the state of Adam or AdamW, got {str(error).partition(chr(10))[0]}") from None
        if len(betas) != 1 or any(group.get("amsgrad") for group in groups):
            raise DataError(f"{path}: must have one (β1, β2, ε) for all parameters and no amsgrad, got {sorted(betas)}")
        names = _names_by_number(path, groups, model)
        mine = {names[number]: entry for number, entry in state.items()}
        if strange := next((name for name, entry in mine.items() if not {FIRST, SECOND, "step"} <= set(entry)), None):
            keys = ", ".join(sorted(map(str, mine[strange])))
            raise DataError(f"{path}: must hold step, {FIRST} and {SECOND} of {strange}, got {keys}; train with AdamW")
        first, second = ({name: entry[kind].float() for name, entry in mine.items()} for kind in (FIRST, SECOND))
        steps = {name: int(entry["step"]) for name, entry in mine.items()}
        return cls(first, second, steps, *betas.pop())._fitting(path, model)

    def _fitting(self, path: Path, model: nn.Module) -> Moments:
        """Returns itself once every tensor has the shape of the parameter it is named after."""
        parameters = dict(unwrap(model).named_parameters())
        for name, m in self.first.items():
            if name not in parameters:
                raise ModelError(f"{path}: {name} must be a parameter of the model, got none of that name; {CURE}")
            both = list(m.shape), list(self.second[name].shape)
            if both != (list(parameters[name].shape),) * 2:
                raise ModelError(
                    f"{path}: the moments of {name} must have its shape {list(parameters[name].shape)}, got {both[0]} and "
                    f"{both[1]}; {CURE}"
                )
        return self

    def write(self, folder: Path) -> None:
        """Writes `moments.safetensors`: `exp_avg/NAME`, `exp_avg_sq/NAME` and `step/NAME`, constants in its metadata."""
        from safetensors.torch import save_file

        tensors = {f"{FIRST}/{name}": m.contiguous() for name, m in self.first.items()}
        tensors |= {f"{SECOND}/{name}": v.contiguous() for name, v in self.second.items()}
        tensors |= {f"step/{name}": torch.tensor(step) for name, step in self.steps.items()}
        facts = {"beta1": repr(self.beta1), "beta2": repr(self.beta2), "epsilon": repr(self.epsilon)}
        save_file(tensors, folder / SAFE, facts)

    def digest(self) -> str:
        """Returns a hash of everything that Γ depends on: what a store's manifest holds of the moments."""
        hasher = xxhash.xxh3_128(repr((self.beta1, self.beta2, self.epsilon)).encode())
        for name in sorted(self.first):
            hasher.update(f"{name} {self.steps[name]}\n".encode())
            for tensor in (self.first[name], self.second[name]):
                hasher.update(tensor.detach().cpu().float().contiguous().numpy().tobytes())
        return hasher.hexdigest()


class AdamDirection:
    """Turns per-example gradients into Γ.

    Args:
        moments: The optimizer's state.
        sites: The chosen parameters φ.
        less_form: Whether Γ = m'/√(v' + ε), as the LESS code has it.
        device: Where gradients are.
        dtype: What Γ is computed in.

    Raises:
        InvalidArgument: A parameter has no moments, or its whole per-example gradient is never formed.
    """

    def __init__(
        self, moments: Moments, sites: Sequence[Site], less_form: bool, device: torch.device, dtype: torch.dtype
    ) -> None:
        self._moments, self._less_form, self._dtype = moments, less_form, dtype
        self._first: dict[str, Tensor] = {}
        self._second: dict[str, Tensor] = {}
        for site in sites:
            if site.kind not in ELEMENTWISE:
                raise InvalidArgument(
                    f"params must be linear layers, LoRA matrices or vectors for Adam's direction, got {site.name} "
                    f"({site.kind}); use --params lora or linear"
                )
            if site.name not in moments.first:
                raise InvalidArgument(
                    f"moments must hold every chosen parameter, got {len(moments.first)} without {site.name}; choose --params "
                    "that were trained"
                )
            m, v = (own[site.name].to(device, dtype) for own in (moments.first, moments.second))
            turned = site.kind == "transposed"
            self._first[site.name] = (m.T if turned else m).reshape(site.shape)
            self._second[site.name] = (v.T if turned else v).reshape(site.shape)

    def of(self, name: str, G: Tensor, rows: slice = slice(None)) -> Tensor:
        """Returns Γ [B, n, d_in] of some rows of a parameter's per-example gradients G [B, n, d_in]; O(B n d_in)."""
        moments, G = self._moments, G.to(self._dtype)
        beta1, beta2, t = moments.beta1, moments.beta2, moments.steps[name] + 1
        m = torch.lerp(self._first[name][rows], G, 1 - beta1)
        v = torch.lerp(self._second[name][rows], G.square(), 1 - beta2)
        if self._less_form:
            return m.div_(v.add_(moments.epsilon).sqrt_())
        return m.div_(v.div_(1 - beta2**t).sqrt_().add_(moments.epsilon)).div_(1 - beta1**t)


def _under(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}


def _names_by_number(path: Path, groups: Sequence[Mapping[str, Any]], model: nn.Module) -> dict[int, str]:
    """Returns the parameter names behind an optimizer's numbers, as saved with it or in the Trainer's order."""
    numbers = [number for group in groups for number in group["params"]]
    if all("param_names" in group for group in groups):
        named = [name for group in groups for name in group["param_names"]]
        return dict(zip(numbers, (_unwrapped(name) for name in named), strict=True))
    names = _trainable(path, len(numbers), model)
    split = [names]
    if len(groups) == 2:
        from transformers.trainer_pt_utils import get_parameter_names

        decayed = set(get_parameter_names(unwrap(model), [nn.LayerNorm], list(NO_DECAY)))
        split = [[name for name in names if (name in decayed) == first] for first in (True, False)]
    sizes, found = [len(part) for part in split], [len(group["params"]) for group in groups]
    if sizes != found:
        raise ModelError(f"{path}: its groups of parameters must have the Trainer's sizes {sizes}, got {found}; {CURE}")
    return dict(zip(numbers, (name for part in split for name in part), strict=True))


def _unwrapped(name: str) -> str:
    """Returns a name without the prefixes of wrappers: DistributedDataParallel's and PEFT's."""
    return name.removeprefix("module.").removeprefix("base_model.model.")


def _trainable(path: Path, count: int, model: nn.Module) -> list[str]:
    """Returns the names of the parameters that were trained: those that require grad, the adapters, or all, by their number."""
    named = list(unwrap(model).named_parameters())
    adapters = [name for name, _ in named if "lora_" in name or "modules_to_save" in name]
    candidates = [[name for name, p in named if p.requires_grad], adapters, [name for name, _ in named]]
    for names in candidates:
        if len(names) == count:
            return names
    sizes = ", ".join(str(len(names)) for names in candidates)
    raise ModelError(
        f"{path}: must hold the state of as many parameters as the model trains ({sizes}: with grad, adapters, all), got "
        f"{count}; {CURE}"
    )
