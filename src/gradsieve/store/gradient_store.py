"""A directory of immutable shards; the listing is the journal.

    STORE/store.json                     the manifest
    STORE/plans/00000000.safetensors     example hashes in order, and where units end: written before the first shard of it
    STORE/shards/00000042.safetensors    one unit
    STORE/references.safetensors         what is known of the references that the rows were multiplied with

A killed run leaves whole shards and no others, so the same command computes what is missing. Examples that a store does not
know yet get a further plan; examples that are no longer asked for stay, and are not shown.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from gradsieve.atomic import write_atomically, write_new
from gradsieve.errors import StoreCorrupt, StoreError
from gradsieve.store.manifest import NAME, Manifest
from gradsieve.store.shards import check_shard, key_tensor, pack_sketch, read_sealed, read_sketch, read_tensors, sealed
from gradsieve.types import REPRESENTATIONS

log = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class Unit:
    """What is computed, committed and retried as one.

    Attributes:
        number: Its shard's number.
        keys: Example hashes, 16 bytes each, in order.
    """

    number: int
    keys: list[bytes]


class GradientStore:
    """A store on disk, opened for one manifest.

    Args:
        directory: Made if it is not there.
        manifest: What the rows must have been made with.

    Raises:
        StoreMismatch: The directory holds a store made with other settings.
    """

    def __init__(self, directory: str | Path, manifest: Manifest) -> None:
        self.directory = Path(directory)
        self.manifest = manifest
        if (self.directory / NAME).exists():
            Manifest.read(self.directory).require(manifest, self.directory)
            return
        if self.directory.exists() and not self.directory.is_dir():
            raise StoreError(f"store {self.directory} must be a store or an empty folder, got a file; name another")
        if self.directory.exists() and any(self.directory.iterdir()):
            raise StoreError(
                f"store {self.directory} must be a store or an empty folder, got one with other files; name another"
            )
        try:
            (self.directory / "shards").mkdir(parents=True, exist_ok=True)
            (self.directory / "plans").mkdir(exist_ok=True)
        except OSError as error:
            raise StoreError(f"store {self.directory} could not be made: {error.strerror}; choose another folder") from None
        manifest.write(self.directory)

    @classmethod
    def open(cls, directory: str | Path) -> GradientStore:
        """Opens whatever store is there, with its own manifest."""
        return cls(directory, Manifest.read(Path(directory)))

    def shard(self, number: int) -> Path:
        """Returns the path of a unit's shard."""
        return self.directory / "shards" / f"{number:08d}.safetensors"

    def units(self) -> list[Unit]:
        """Returns all planned units, computed or not.

        Raises:
            StoreCorrupt: A plan is not as it was written.
        """
        units: list[Unit] = []
        for path in self._plans():
            plan = read_sealed(path, self.manifest.fingerprint, "delete the store and run the extraction again")
            keys = [bytes(key) for key in plan["keys"].numpy()]
            start = 0
            for end in plan["ends"].tolist():
                units.append(Unit(len(units), keys[start:end]))
                start = end
        return units

    def _plans(self) -> list[Path]:
        return sorted((self.directory / "plans").glob("[0-9]*.safetensors"))

    def plan(self, keys: Sequence[bytes], cut: Callable[[list[int]], list[list[int]]]) -> list[Unit]:
        """Returns the units that `keys` need, planning those the store does not know yet.

        Args:
            keys: Example hashes; repeated ones are planned once.
            cut: Cuts new examples (positions into `keys`) into units.
        """
        first_of = {key: i for i, key in reversed(list(enumerate(keys)))}
        while True:
            plans, units = self._plans(), self.units()
            known = {key for unit in units for key in unit.keys}
            new = sorted(i for key, i in first_of.items() if key not in known)
            if not new:
                return [unit for unit in units if any(key in first_of for key in unit.keys)]
            parts = cut(new)
            ends = torch.tensor([len(part) for part in parts]).cumsum(0)
            plan = {"keys": key_tensor([keys[i] for part in parts for i in part]), "ends": ends}
            number = int(plans[-1].stem) + 1 if plans else 0
            # where another process was first with this number, what it planned is known in the next round
            write_new(self.directory / "plans" / f"{number:08d}.safetensors", sealed(plan, self.manifest.fingerprint))

    def pending(self, units: Sequence[Unit]) -> list[Unit]:
        """Returns the units without a sound shard; a broken shard is named in the log and counts as missing."""
        missing = []
        for unit in units:
            path = self.shard(unit.number)
            if path.exists():
                try:
                    check_shard(path, self.manifest.fingerprint, unit.keys)
                    continue
                except StoreCorrupt as error:
                    log.warning("%s", error)
            missing.append(unit)
        return missing

    def commit(self, unit: Unit, sketches: Mapping[str, Tensor], columns: Mapping[str, Tensor]) -> None:
        """Writes a unit's shard.

        Args:
            unit: The unit.
            sketches: float32 [b, d] per checkpoint; a representation stands among them under its name, with its own width.
            columns: float64 [b] by name.
        """
        tensors: dict[str, Tensor] = {"keys": key_tensor(unit.keys)}
        for name, sketch in sketches.items():
            tensors[f"sketch/{name}"], tensors[f"scale/{name}"] = pack_sketch(sketch.cpu())
        tensors |= {f"column/{name}": column.cpu().double() for name, column in columns.items()}
        write_atomically(self.shard(unit.number), sealed(tensors, self.manifest.fingerprint))

    def keep(self, name: str, tensors: Mapping[str, Tensor]) -> None:
        """Keeps something beside the rows, in the place of what had this name."""
        write_atomically(self.directory / f"{name}.safetensors", sealed(tensors, self.manifest.fingerprint))

    def kept(self, name: str) -> dict[str, Tensor]:
        """Returns what was kept under a name; empty where nothing was.

        Raises:
            StoreCorrupt: It is not as it was written.
        """
        path = self.directory / f"{name}.safetensors"
        cure = "delete the store and run the extraction again"
        return read_sealed(path, self.manifest.fingerprint, cure) if path.exists() else {}

    def verify(self) -> list[str]:
        """Reads every byte of every plan, shard and other file; returns one sentence per broken or missing one."""
        problems = []
        for path in sorted(self.directory.glob("*.safetensors")):
            try:
                self.kept(path.stem)
            except StoreCorrupt as error:
                problems.append(str(error))
        try:
            units = self.units()
        except StoreCorrupt as error:
            return [*problems, str(error)]
        for unit in units:
            path = self.shard(unit.number)
            if not path.exists():
                problems.append(f"{path} is missing; run the extraction again to compute it")
                continue
            try:
                check_shard(path, self.manifest.fingerprint, unit.keys)
            except StoreCorrupt as error:
                problems.append(str(error))
        return problems

    def view(
        self,
        ids: Sequence[str],
        keys: Sequence[bytes],
        extra: Mapping[str, Tensor] | None = None,
        hidden: Collection[str] = (),
    ) -> StoredGradients:
        """Returns the gradients of these examples, in this order.

        Args:
            ids: One per row.
            keys: Example hash per row; rows may share one.
            extra: Further columns, float64 [n], that do not come from the model.
            hidden: Columns of the store not to show.

        Raises:
            StoreError: An example is not in the store.
        """
        return StoredGradients(self, ids, keys, extra or {}, hidden)


class StoredGradients:
    """`Gradients` on disk: columns are in memory, sketches are read shard by shard."""

    def __init__(
        self,
        store: GradientStore,
        ids: Sequence[str],
        keys: Sequence[bytes],
        extra: Mapping[str, Tensor],
        hidden: Collection[str] = (),
    ) -> None:
        place = {key: (unit.number, i) for unit in store.units() for i, key in enumerate(unit.keys)}
        try:
            found = np.array([place[key] for key in keys], dtype=np.int64).reshape(-1, 2)
        except KeyError:
            missing = sum(key not in place for key in keys)
            raise StoreError(f"store {store.directory} must hold every example, got {missing} missing; extract them") from None
        self._store = store
        self._shards, self._local = found[:, 0], found[:, 1]
        self.ids = tuple(ids)
        self.columns: dict[str, Tensor] = dict(extra)
        self.checkpoints: tuple[str, ...] = ()
        self.representations: tuple[str, ...] = ()
        self.dim = 0
        self._widths: dict[str, int] = {}
        for number, rows in self._by_shard(np.arange(len(keys))):
            path = store.shard(number)
            if not path.exists():
                raise StoreError(f"{path} must exist, got nothing; run the extraction again")
            for name, values in read_tensors(path, "column/").items():
                if name in hidden:
                    continue
                column = self.columns.setdefault(name, torch.full((len(keys),), torch.nan, dtype=torch.float64))
                column[rows] = values[self._local[rows]]
            if not self._widths:
                self._widths = {name: half.shape[1] for name, half in read_tensors(path, "sketch/").items()}
                self.representations = tuple(name for name in REPRESENTATIONS if name in self._widths)
                self.checkpoints = tuple(sorted(self._widths.keys() - set(REPRESENTATIONS)))
                self.dim = self._widths[self.checkpoints[0]] if self.checkpoints else 0

    def _by_shard(self, wanted: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
        """Yields (shard number, positions in `wanted`) for the rows in `wanted`."""
        if not len(wanted):
            return
        order = np.argsort(self._shards[wanted], kind="stable")
        numbers, starts = np.unique(self._shards[wanted][order], return_index=True)
        yield from zip(numbers.tolist(), np.split(order, starts[1:]), strict=True)

    def blocks(self, checkpoint: str | None = None) -> Iterator[tuple[Tensor, Tensor]]:
        """Yields (rows int64 [b], sketches float32 [b, d]), a shard at a time."""
        name = checkpoint or self.checkpoints[0]
        for number, rows in self._by_shard(np.arange(len(self.ids))):
            sketch = read_sketch(self._store.shard(number), name, self._local[rows])
            yield torch.from_numpy(rows), sketch

    def rows(self, index: Tensor, checkpoint: str | None = None) -> Tensor:
        """Returns the sketches of these rows, float32 [k, d]."""
        wanted, name = index.numpy(), checkpoint or self.checkpoints[0]
        result = torch.empty(len(wanted), self._widths[name])
        for number, positions in self._by_shard(wanted):
            sketch = read_sketch(self._store.shard(number), name, self._local[wanted[positions]])
            result[torch.from_numpy(positions)] = sketch
        return result
