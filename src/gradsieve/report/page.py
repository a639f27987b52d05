"""What a report is made of: numbers and text, no models, no disks.

The page shows these entries of `Selection.trace` (n rows in the pool) and ignores all others:

    utility, risk           [n] agreement with the target and conflict with general knowledge: the axes of the scatter
    any other of `per_row`  [n] a number per row: one more axis to choose, one more row in the table of columns
    path, bound, lambda     tuples (λ, mean risk, mean utility) per λ tried, the largest mean risk allowed, and the λ taken: the
                            trade-off curve
    density, band           mapping with `grid` and `values` [g]: a curve; and [2] the stretch of it that the chosen span
    gradient_score          [n] where each row stands on that grid: the chosen ones are marked under the curve
    walk, layout            mapping with `component` per step [k], and mapping with places in a plane of `picks` [k, 2], of a
                            `sample` of the pool [s, 2] and of the `target` [2]: the picture of a walk
    bars                    mapping PANEL: mapping BAR: number ≥ 0; the first bar of a panel stands for the choice itself
    steps                   mapping KEY: numbers per step, one small plot each; keys PANEL/LINE share the plot PANEL
    a mapping of lists      the same, in plots called `NAME: KEY`
    any other list          of floats: the same; lists of whole numbers are not drawn
    a list or a mapping of mappings that hold single values: a table
    a number, a text, a few texts, a mapping of single values: rows in the list of what the method recorded

Columns are named as in `gradsieve.types`. Where `dot/R` and `norm` are both there, the page adds `cos/R`, and `conflict`
= -cos/anchor.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
from torch import Tensor

from gradsieve.errors import InvalidArgument
from gradsieve.types import Reference, Selection


@dataclass(frozen=True, slots=True)
class Source:
    """A set of examples that the run read.

    Attributes:
        role: What it was read as: `pool`, `target`, `anchor`, …
        name: File or data set.
        size: Number of examples in it.
    """

    role: str
    name: str
    size: int


@dataclass(frozen=True, slots=True)
class Stage:
    """What one stage of the run cost.

    Attributes:
        name: What was done, for example `gradients of the pool`.
        wall_seconds: Time on the clock, None where it was not measured.
        cpu_seconds: Processor time over all threads, None where it was not measured.
        bytes: Bytes written to disk, None where it was not measured.
    """

    name: str
    wall_seconds: float | None
    cpu_seconds: float | None = None
    bytes: int | None = None


@dataclass(frozen=True, eq=False)
class Page:
    """Everything a report says.

    Attributes:
        method: The method's name as its authors spell it, `OGS`.
        picks_by: What it picks by, to complete the sentence "OGS picks by …", without a full stop.
        settings: Its hyper-parameters by name.
        model: The model whose gradients were taken.
        sources: The sets of examples the run read, the pool first.
        budget: As it was asked for: `500`, `5%`, `200000tok`.
        seed: The run's seed; it also draws the sample of the scatter where the pool is too large to draw.
        date: When the run was made, as it shall be printed.
        version: Version of gradsieve.
        ids: One unique id per usable example of the pool, [n].
        prompts: What the model reads, [n].
        completions: What it learns to write, [n].
        selection: Rows, weights, scores, trace and notes; its row numbers count in `ids`.
        source: The paper the method comes from, empty where there is none.
        columns: Numbers per row by name, float [n] each; NaN where there is none.
        groups: A label per row or None, [n]; for example the kind of fault planted in a test.
        groups_are: What the labels stand for, in the plural: `groups`, `sources`, `planted kinds`.
        excluded: Id and reason for each example that could not be used; they are no rows of the pool here.
        notes: Sentences the user must read, printed before those of the selection.
        references: What is known about the reference directions, by name.
        stages: What the run cost, in order.
        files: Name and content of each file of the run: `("selected.jsonl", "the chosen examples")`.
        folder: Where these files are, as seen from the page.
        repeatable: Whether `gradsieve replay` can do the run again from its `run.json`.

    Raises:
        InvalidArgument: A length differs from n, rows repeat or lie outside the pool, or the pool is empty.
    """

    method: str
    picks_by: str
    settings: Mapping[str, object]
    model: str
    sources: Sequence[Source]
    budget: str
    seed: int
    date: str
    version: str
    ids: Sequence[str]
    prompts: Sequence[str]
    completions: Sequence[str]
    selection: Selection
    source: str = ""
    columns: Mapping[str, Tensor] = field(default_factory=dict)
    groups: Sequence[str | None] | None = None
    groups_are: str = "groups"
    excluded: Sequence[tuple[str, str]] = ()
    notes: Sequence[str] = ()
    references: Mapping[str, Reference] = field(default_factory=dict)
    stages: Sequence[Stage] = ()
    files: Sequence[tuple[str, str]] = ()
    folder: str = "."
    repeatable: bool = True

    def __post_init__(self) -> None:
        n = len(self.ids)
        if n == 0:
            raise InvalidArgument("ids must name at least one example of the pool, got none")
        if not self.sources:
            raise InvalidArgument("sources must name at least the pool, got none")
        lengths = {"prompts": len(self.prompts), "completions": len(self.completions)}
        lengths |= {f"column {name!r}": len(column) for name, column in self.columns.items()}
        lengths["selection.scores"] = len(self.selection.scores)
        if self.groups is not None:
            lengths["groups"] = len(self.groups)
        for name, length in lengths.items():
            if length != n:
                raise InvalidArgument(f"{name} must have {n} entries (one per id), got {length}")
        rows = self.selection.rows
        if len(self.selection.weights) != len(rows):
            raise InvalidArgument(
                f"selection.weights must have {len(rows)} entries (one per chosen row), got {len(self.selection.weights)}"
            )
        if len(rows) and (int(rows.min()) < 0 or int(rows.max()) >= n):
            raise InvalidArgument(f"selection.rows must lie in [0, {n}), got {int(rows.min())} to {int(rows.max())}")
        if len(rows.unique()) != len(rows):
            raise InvalidArgument(f"selection.rows must be unique, got {len(rows) - len(rows.unique())} repeated")

    @property
    def order(self) -> npt.NDArray[np.int64]:
        """The chosen rows, best first, int64 [k]."""
        return self.selection.rows.cpu().numpy().astype(np.int64)

    @property
    def weights(self) -> npt.NDArray[np.float64]:
        """Their weights, float64 [k]."""
        return self.selection.weights.cpu().numpy().astype(np.float64)

    @property
    def places(self) -> npt.NDArray[np.int64]:
        """Each row's place in the selection counted from 1, 0 where it was not chosen, int64 [n]."""
        places = np.zeros(len(self.ids), dtype=np.int64)
        places[self.order] = np.arange(1, len(self.order) + 1)
        return places

    @property
    def chosen(self) -> npt.NDArray[np.bool_]:
        """Whether each row was chosen, bool [n]."""
        return self.places > 0
