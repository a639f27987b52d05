"""What made the rows of a store. Its hash is the store's fingerprint; a store is only opened by who asks for the same."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import xxhash

from gradsieve.atomic import write_atomically
from gradsieve.errors import StoreError, StoreMismatch

NAME = "store.json"
FORMAT = 2


@dataclass(frozen=True)
class Manifest:
    """The settings of a store, plain JSON values.

    Attributes:
        settings: Everything the rows depend on beside the examples: model, tokenizer, parameters, sketch, references, …
    """

    settings: Mapping[str, Any]

    @property
    def fingerprint(self) -> str:
        """Hash of the settings, 32 hex digits."""
        text = json.dumps({"format": FORMAT, **self.settings}, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
        return xxhash.xxh3_128_hexdigest(text.encode())

    def write(self, directory: Path) -> None:
        """Writes `store.json`, whole or not at all."""
        text = json.dumps({"format": FORMAT, "settings": dict(self.settings)}, indent=2, sort_keys=True, ensure_ascii=False)
        write_atomically(directory / NAME, text.encode() + b"\n")

    @classmethod
    def read(cls, directory: Path) -> Manifest:
        """Reads `store.json`.

        Raises:
            StoreError: There is none, or it was written by another format of gradsieve.
        """
        path = directory / NAME
        try:
            content = json.loads(path.read_bytes())
            if content["format"] != FORMAT:
                raise StoreError(f"{path} must have format {FORMAT}, got {content['format']}; extract again into a new folder")
            return cls(content["settings"])
        except FileNotFoundError:
            raise StoreError(f"{directory} must be a gradient store, got a folder without {NAME}") from None
        except OSError as error:
            raise StoreError(f"{directory} must be a gradient store, got {error.strerror}; name the store's folder") from None
        except (ValueError, KeyError, TypeError) as error:
            raise StoreError(f"{path} must be the manifest of a store, got broken JSON ({error}); delete the store") from None

    def require(self, wanted: Manifest, directory: Path) -> None:
        """Refuses a store that was made with other settings.

        Raises:
            StoreMismatch: With both sides of every setting that differs.
        """
        if self.fingerprint == wanted.fingerprint:
            return
        mine, theirs = _flat(self.settings), _flat(wanted.settings)
        differing = [key for key in sorted({*mine, *theirs}) if mine.get(key) != theirs.get(key)]
        sides = "; ".join(f"{key} {_show(mine.get(key))} in the store, {_show(theirs.get(key))} asked for" for key in differing)
        raise StoreMismatch(
            f"store {directory} must match what is asked for, got {sides}; choose another --store, or delete this one"
        )


def _flat(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in settings.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat


def _show(value: Any) -> str:
    return "absent" if value is None else str(value)
