"""Find, load and identify models: a local folder, a hub id, `demo`, or a model object already in memory."""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import xxhash

from gradsieve.errors import InvalidArgument, ModelError
from gradsieve.foreign import known_renames

log = logging.getLogger(__name__)

DType = Literal["auto", "float32", "bfloat16", "float64"]
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json", "spiece.model")
_MOMENTS = "moments.safetensors"  # what `gradsieve.gradients.adam` writes


@dataclass(frozen=True, eq=False)
class ModelSource:
    """A model that can be loaded, known by what it is made of.

    Attributes:
        name: As the user gave it.
        folder: Where its files are; None for a model object.
        tokenizer: Its tokenizer.
        weights: Hash of its weights and configuration, 32 hex digits.
        live: The model object, where the user gave one.
        adapters: Folder of LoRA adapters to put on it, made by a warm-up.
    """

    name: str
    folder: Path | None
    tokenizer: Any
    weights: str
    live: torch.nn.Module | None = None
    adapters: Path | None = None

    @contextmanager
    def opened(self, dtype: torch.dtype, device: str) -> Iterator[torch.nn.Module]:
        """Gives the model, with its adapters if it has any; takes these off again, and leaves a model object as it was."""
        model = self.load(dtype, device)
        if self.adapters is None:
            yield model
            return
        from peft import PeftModel

        if not (self.adapters / "adapter_config.json").exists():
            raise ModelError(
                f"{self.adapters} must hold the adapters of a warm-up, got none; remove the folder above it, run again"
            )
        modes = [(module, module.training) for module in model.modules()]
        trained = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
        with known_renames():
            adapted = PeftModel.from_pretrained(model, str(self.adapters), autocast_adapter_dtype=False).eval()
        for name, parameter in adapted.named_parameters():
            if "lora_" in name:
                parameter.data = parameter.data.to(dtype)
        try:
            yield adapted
        finally:
            adapted.unload()
            if hasattr(model, "peft_config"):
                del model.peft_config
            for module, training in modes:
                module.training = training
            for parameter, requires in trained:
                parameter.requires_grad_(requires)

    def load(self, dtype: torch.dtype, device: str) -> torch.nn.Module:
        """Returns the model, in eval mode.

        Raises:
            ModelError: transformers or PEFT cannot load it.
        """
        if self.live is not None:
            return self.live
        from safetensors import SafetensorError
        from transformers import AutoModelForCausalLM
        from transformers.utils import logging as transformers_logging

        transformers_logging.disable_progress_bar()
        assert self.folder is not None
        try:
            model = AutoModelForCausalLM.from_pretrained(self.folder, dtype=dtype, use_safetensors=True, device_map=None)
        except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
            raise ModelError(f"{self.name} could not be loaded as a causal language model: {_first_line(error)}") from error
        return model.to(device).eval()  # type: ignore[no-any-return]

    def require_places(self, largest: int, longest: int) -> None:
        """Refuses a token or a position that the model has no embedding of, or whose embedding would be its batch's.

        Args:
            largest: Token of the largest number.
            longest: Tokens of the longest example.

        Raises:
            ModelError: The model has fewer embeddings, fewer learned positions, or rotary ones that turn at other speeds in a
                batch with so long an example.
        """
        model: Any = self.skeleton()
        words = model.get_input_embeddings()
        if largest >= (count := words.weight.shape[0]):
            raise ModelError(
                f"model {self.name} must have an embedding of every token, got token {largest} of its tokenizer and {count} "
                "embeddings; give the tokenizer that it was trained with, or resize its embeddings"
            )
        most = getattr(model.config, "max_position_embeddings", None) or math.inf
        learned = [m for m in model.modules() if isinstance(m, torch.nn.Embedding) and m is not words]
        if longest > most and any(m.num_embeddings >= most for m in learned):
            raise ModelError(
                f"model {self.name} must have a place for every token, got {longest} in an example and {most} places; lower "
                f"--max-length to {most}"
            )
        for kind, most in _own_places(model.config.get_text_config()):
            if longest > most:
                raise ModelError(
                    f"model {self.name} must place an example's tokens alike in any batch, got an example of {longest} tokens: "
                    f"above {most}, its positions ({kind}) go by the longest of the batch; lower --max-length to {most}"
                )

    def skeleton(self) -> torch.nn.Module:
        """Returns the model without its weights: names and shapes of all parameters, on the meta device.

        Raises:
            ModelError: transformers or PEFT cannot build it.
        """
        if self.live is not None and self.adapters is None:
            return self.live
        from transformers import AutoConfig, AutoModelForCausalLM

        base = _adapter_base(self.folder) if self.folder is not None else None
        adapters = self.adapters or (self.folder if base is not None else None)
        try:
            with torch.device("meta"):
                config: Any = AutoConfig.from_pretrained(base or self.folder) if self.live is None else self.live.config
                model: torch.nn.Module = AutoModelForCausalLM.from_config(config)
                if adapters is not None:
                    from peft import PeftConfig, inject_adapter_in_model

                    model = inject_adapter_in_model(PeftConfig.from_pretrained(str(adapters)), model)
        except (OSError, ValueError, KeyError, RuntimeError) as error:
            raise ModelError(f"{self.name} could not be built from its configuration: {_first_line(error)}") from error
        return model


def _own_places(config: Any) -> Iterator[tuple[str, int]]:
    """Yields the kinds of rotary positions that depend on a batch's longest example, and up to which length they do not."""
    rotary = getattr(config, "rope_parameters", None) or {}
    for own in (rotary, *(part for part in rotary.values() if isinstance(part, dict))):  # of all layers, or by their type
        kind = own.get("rope_type", "default")
        if kind == "longrope":
            yield kind, own.get("original_max_position_embeddings", config.max_position_embeddings)
        elif "dynamic" in kind:
            yield kind, config.max_position_embeddings


def untrained(source: ModelSource, seed: int, dtype: torch.dtype, device: str) -> torch.nn.Module:
    """Returns a model of the same form with fresh weights, as its class draws them before any training; without adapters."""
    from transformers import AutoModelForCausalLM

    config: Any = source.skeleton().config
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed + 2_147_483_647)  # far from the seeds a user's own untrained model would have
        model: torch.nn.Module = AutoModelForCausalLM.from_config(config)
    return model.to(device, dtype).eval()


def hash_weights(folder: Path) -> str:
    """Returns a hash of the weights in a folder, 32 hex digits."""
    hasher = xxhash.xxh3_128()
    for file in _weight_files(folder):
        _hash_file(hasher, file)
    return str(hasher.hexdigest())


def weight_count(model: str | Path | torch.nn.Module) -> int:
    """Returns the number of weights of a model: of a folder from its configuration alone, of 4-bit layers as before packing.

    Raises:
        ModelError: There is no such model, or it cannot be built.
    """
    if not isinstance(model, torch.nn.Module):
        model = ModelSource(str(model), _folder(str(model)), None, "").skeleton()
    return sum(math.prod((getattr(weight, "quant_state", None) or weight).shape) for weight in model.parameters())


def find_model(model: str | Path | torch.nn.Module, tokenizer: Any = None, *, trust_remote_code: bool = False) -> ModelSource:
    """Returns a model's files, tokenizer and hash, without loading its weights.

    Args:
        model: A folder, a hub id, `demo`, or a model object (then `tokenizer` must be given).
        tokenizer: A tokenizer to use in place of the model's own.
        trust_remote_code: Let a tokenizer run code that comes with it.

    Raises:
        ModelError: There is no such model, it lacks a tokenizer, or its weights are not safetensors.
    """
    if isinstance(model, torch.nn.Module):
        if tokenizer is None:
            raise InvalidArgument("tokenizer must be given with a model object, got none; pass tokenizer=…")
        return ModelSource(type(model).__name__, None, tokenizer, _hash_state(model), model)
    folder = _folder(str(model))
    if tokenizer is None:
        tokenizer = _load_tokenizer(folder, str(model), trust_remote_code)
    return ModelSource(str(model), folder, tokenizer, _hash_files(folder, str(model)))


def resolve_dtype(dtype: DType, device: str) -> torch.dtype:
    """Returns the compute type; `auto` is bfloat16 where the hardware multiplies it natively, else float32.

    A warning is logged where bfloat16 is asked for of a processor that has no instructions for it.
    """
    if dtype == "auto":
        dtype = "bfloat16" if _fast_bfloat16(device) else "float32"
    elif dtype == "bfloat16" and device == "cpu" and not _fast_bfloat16(device):
        log.warning("bfloat16 is many times slower than float32 on this processor, which emulates it; take float32 or auto")
    return {"float32": torch.float32, "bfloat16": torch.bfloat16, "float64": torch.float64}[dtype]


def dtype_name(dtype: torch.dtype) -> DType:
    """Returns the name that `resolve_dtype` knows a type by.

    Raises:
        InvalidArgument: A model has another type.
    """
    names: dict[torch.dtype, DType] = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float64: "float64"}
    if dtype not in names:
        raise InvalidArgument(f"the model must be in float32, bfloat16 or float64, got {dtype}; convert it with model.to(…)")
    return names[dtype]


def resolve_device(device: str) -> str:
    """Returns the device; `auto` is CUDA, then the CPU: sums are taken in float64, which MPS has not.

    Raises:
        InvalidArgument: There is no such device here, or it is one of MPS.
    """
    if device.partition(":")[0] == "mps":
        raise InvalidArgument(f"device must compute in float64, got {device!r}, which cannot; use cpu")
    if device != "auto":
        try:
            torch.empty(0, device=device)
        except (RuntimeError, AssertionError) as error:
            raise InvalidArgument(f"device must be usable here, got {device!r} ({_first_line(error)}); try cpu") from None
        return device
    return "cuda" if torch.cuda.is_available() else "cpu"


def tokenizer_hash(tokenizer: Any) -> str:
    """Returns a hash of what turns text into ids."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    text = backend.to_str() if backend is not None else repr(sorted(tokenizer.get_vocab().items()))
    return xxhash.xxh3_128_hexdigest(text.encode())


def _fast_bfloat16(device: str) -> bool:
    if device.startswith("cuda"):
        return bool(torch.cuda.is_bf16_supported())
    return device == "cpu" and bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


def _folder(name: str) -> Path:
    if name == "demo":
        from gradsieve.demo import demo_model_dir

        return demo_model_dir()
    path = Path(name).expanduser()
    if path.is_dir():
        return path
    if path.exists():
        raise ModelError(f"model must be a folder or a hub id, got the file {name}; name the folder it is in")
    if name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise ModelError(f"model must be a folder, a hub id or demo, got {name!r}, which does not exist; check the path")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    patterns = ["*.safetensors", "*.json", "tokenizer*", "*.model", "*.jinja", "*.txt"]
    try:
        return Path(snapshot_download(name, allow_patterns=patterns))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise ModelError(
            f"model {name!r} must be a folder that exists, a hub id or demo; there is no such folder, and the hub says: "
            f"{_first_line(error)}"
        ) from None


def _load_tokenizer(folder: Path, name: str, trust_remote_code: bool) -> Any:
    from transformers import AutoTokenizer

    home = _adapter_base(folder) or folder
    if not any((place / file).exists() for place in (folder, home) for file in _TOKENIZER_FILES):
        raise ModelError(f"model {name} must have a tokenizer beside it, got a folder without tokenizer.json; save one there")
    place = folder if any((folder / file).exists() for file in _TOKENIZER_FILES) else home
    try:
        return AutoTokenizer.from_pretrained(place, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ModelError(f"the tokenizer of {name} could not be loaded: {_first_line(error)}") from error


def _adapter_base(folder: Path) -> Path | None:
    """Returns the base model's folder where `folder` holds a PEFT adapter."""
    import json

    config = folder / "adapter_config.json"
    if not config.exists():
        return None
    try:
        base = json.loads(config.read_text(encoding="utf-8"))["base_model_name_or_path"]
    except (ValueError, KeyError, TypeError) as error:
        raise ModelError(f"{config} must name the adapter's base model, got {error!r}; save the adapter again") from None
    if not isinstance(base, str):
        raise ModelError(
            f"{config} must name the adapter's base model, got {base!r} as base_model_name_or_path; write it there"
        )
    return _folder(base)


def _hash_files(folder: Path, name: str) -> str:
    base = _adapter_base(folder)
    files = _weight_files(folder)
    if not files:
        other = [file.name for file in (*folder.glob("*.bin"), *folder.glob("*.pt"))]
        got = f"only {', '.join(other[:3])}, which can run code when loaded" if other else "a folder without weights"
        raise ModelError(f"model {name} must have safetensors weights, got {got}; save it with model.save_pretrained")
    hasher = xxhash.xxh3_128()
    configs = [file for file in (folder / "config.json", folder / "adapter_config.json") if file.exists()]
    if not configs:
        raise ModelError(f"model {name} must have a config.json, got a folder without one; save it with model.save_pretrained")
    for file in [*configs, *files]:
        _hash_file(hasher, file)
    return hasher.hexdigest() + (_hash_files(base, str(base)) if base is not None else "")


def _weight_files(folder: Path) -> list[Path]:
    """Returns the safetensors files of a folder, without Adam's moments, which may stand beside them."""
    return [file for file in sorted(folder.glob("*.safetensors")) if file.name != _MOMENTS]


def _hash_file(hasher: Any, file: Path) -> None:
    hasher.update(f"{file.name} {os.path.getsize(file)}\n".encode())
    with open(file, "rb") as stream:
        while chunk := stream.read(1 << 24):
            hasher.update(chunk)


def _hash_state(model: torch.nn.Module) -> str:
    hasher = xxhash.xxh3_128()
    for name, tensor in sorted(model.state_dict().items()):
        data = tensor.detach().cpu().contiguous()
        hasher.update(f"{name} {data.dtype} {list(data.shape)}\n".encode())
        hasher.update(data.flatten().view(torch.uint8).numpy().tobytes())
    return hasher.hexdigest()


def _first_line(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0] or type(error).__name__
