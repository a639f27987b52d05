"""Sealed files: safetensors with a store's fingerprint and a checksum over names, types, shapes and bytes. A shard is one:

keys                uint8 [b, 16]   hashes of its examples, as planned
sketch/CHECKPOINT   float16 [b, d]  sketch divided by its scale, so that neither large nor small gradients lose digits
scale/CHECKPOINT    float32 [b]
column/NAME         float64 [b]
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
import xxhash
from safetensors import SafetensorError, safe_open
from safetensors.torch import load as load_bytes
from safetensors.torch import save as save_bytes
from torch import Tensor

from gradsieve.errors import StoreCorrupt


def pack_sketch(sketch: Tensor) -> tuple[Tensor, Tensor]:
    """Returns (float16 [b, d], scale float32 [b]) with sketch ≈ half · scale; the scale is a power of two, so exact.

    Rows that are not finite come back as NaN with scale 1.
    """
    largest = sketch.abs().amax(1)
    scale = torch.exp2(torch.ceil(torch.log2(largest.clamp_min(torch.finfo(torch.float32).tiny))))
    scale = torch.where(largest.isfinite() & (largest > 0), scale, torch.ones_like(scale))
    return (sketch / scale[:, None]).half(), scale.float()


def sealed(tensors: Mapping[str, Tensor], fingerprint: str) -> bytes:
    """Returns the content of a sealed file."""
    contiguous = {name: tensor.contiguous() for name, tensor in sorted(tensors.items())}
    return save_bytes(contiguous, _seal(fingerprint, digest(contiguous)))


def key_tensor(keys: Sequence[bytes]) -> Tensor:
    """Returns example hashes as a tensor, uint8 [b, 16]."""
    return torch.from_numpy(np.frombuffer(b"".join(keys), dtype=np.uint8).reshape(-1, 16).copy())


def _seal(fingerprint: str, checksum: str) -> dict[str, str]:
    """The header's metadata: one key, because safetensors writes several in an order that differs from run to run."""
    return {"gradsieve": f"fingerprint {fingerprint} xxh3 {checksum}"}


def digest(tensors: Mapping[str, Tensor]) -> str:
    """Returns the checksum of a shard's content."""
    hasher = xxhash.xxh3_128()
    for name, tensor in sorted(tensors.items()):
        hasher.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        hasher.update(tensor.contiguous().numpy().tobytes())
    return hasher.hexdigest()


def check_shard(path: Path, fingerprint: str, keys: Sequence[bytes]) -> None:
    """Reads every byte of a shard and compares it with what was written.

    Raises:
        StoreCorrupt: It is not this store's shard of these examples, byte for byte.
    """
    there = read_sealed(path, fingerprint).get("keys")
    if there is None or not torch.equal(there, key_tensor(keys)):
        raise StoreCorrupt(f"{path} must hold the examples of its plan, got others; run the extraction again to recompute it")


def read_sealed(path: Path, fingerprint: str, cure: str = "run the extraction again to recompute it") -> dict[str, Tensor]:
    """Reads a sealed file once every byte of it is as it was written.

    Raises:
        StoreCorrupt: It is not, or it is of another store; the message ends in the cure.
    """
    content = path.read_bytes()
    try:
        tensors = load_bytes(content)
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
    except (SafetensorError, ValueError, KeyError, OverflowError) as error:
        raise StoreCorrupt(f"{path} must be a safetensors file, got {error}; {cure}") from None
    words = metadata.get("gradsieve", "").split()
    if words[1:2] != [fingerprint]:
        raise StoreCorrupt(f"{path} must carry the fingerprint {fingerprint}, got {words[1:2]}; {cure}")
    # a flipped byte in the header that still parses shows when the same content is written again
    tensors = dict(sorted(tensors.items()))
    if save_bytes(tensors, _seal(fingerprint, digest(tensors))) != content:
        raise StoreCorrupt(f"{path} must hold the bytes that were written, got others; {cure}")
    return tensors


def read_tensors(path: Path, prefix: str) -> dict[str, Tensor]:
    """Returns the shard's tensors whose names start with `prefix`, keyed by the rest of the name."""
    with safe_open(path, framework="pt") as file:
        return {name[len(prefix) :]: file.get_tensor(name) for name in file.keys() if name.startswith(prefix)}  # noqa: SIM118


def read_sketch(path: Path, checkpoint: str, local: np.ndarray | Tensor | slice = slice(None)) -> Tensor:
    """Returns sketches of a shard's rows, float32 [b, d]."""
    with safe_open(path, framework="pt") as file:
        half, scale = file.get_tensor(f"sketch/{checkpoint}"), file.get_tensor(f"scale/{checkpoint}")
    if isinstance(local, np.ndarray):
        local = torch.from_numpy(local)
    sketch: Tensor = half[local].float() * scale[local, None]
    return sketch
