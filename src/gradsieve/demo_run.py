"""The demo: the main job on the built-in model, pool, target and anchor, and a table of what became of the planted faults."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from gradsieve.clock import Progress, silent

if TYPE_CHECKING:
    from rich.table import Table

    from gradsieve.pipeline import Result

SETTINGS: dict[str, dict[str, Any]] = {
    # the demo takes gradients of the model as it is: a warm-up would need the extra `train`
    "grads": {"probe_epochs": 0},
    "g2is": {"warmup_share": 0.0},
    "less": {"warmup_share": 0.0},
}


@dataclass(frozen=True)
class Demo:
    """Choose medical question-answer pairs for SmolLM2-135M, from a pool in which three of ten rows are planted faults.

    Attributes:
        examples: Size of the pool.
        method: Any method of `gradsieve methods`.
        budget: How much to choose: 80 (examples), 20% (of the pool) or 5000tok (tokens).
        out: Folder for the results.
        seed: Seed of the pool, the projection and the method.
        store: Folder for gradients; `store` inside the output folder by default.
    """

    examples: int = 400
    method: str = "ogs-static"
    budget: str = "20%"
    out: str = "demo-out"
    seed: int = 0
    store: str | None = field(default=None)

    def go(self, progress: Progress = silent) -> Result:
        """Runs the job and writes its folder."""
        from gradsieve.pipeline import select

        return select(
            self.method,
            model="demo",
            pool=f"demo:{self.examples}",
            target="demo",
            anchor="demo",
            budget=self.budget,
            out=self.out,
            settings=SETTINGS.get(self.method),
            progress=progress,
            seed=self.seed,
            store=self.store,
        )


def kinds_table(result: Result) -> Table:
    """Returns the table of each planted kind's share in pool and selection, and mean utility and risk of both."""
    from rich.table import Table

    from gradsieve.data import row_fields

    by_id = {example.id: example for example in result.sets["pool"].examples}
    kinds = [str(row_fields(by_id[id]).get("planted")) for id in result.pool.ids]
    chosen = result.selection.rows.tolist()
    table = Table(
        "in the pool", "rows", "share", "chosen", "share of the chosen", box=None, header_style="bold", pad_edge=False
    )
    for kind in sorted(set(kinds), key=lambda kind: (kind != "clean", kind)):
        there, here = kinds.count(kind), sum(kinds[row] == kind for row in chosen)
        table.add_row(kind, str(there), f"{there / len(kinds):.1%}", str(here), f"{here / len(chosen):.1%}")
    for name in ("utility", "risk", "overlap"):
        values = result.selection.trace.get(name)
        if values is not None:
            pool, picked = _mean(values), _mean([values[row] for row in chosen])
            table.add_row(f"mean {name}", "", f"{pool:.4f}", "", f"{picked:.4f}")
    return table


def _mean(values: Sequence[float | None]) -> float:
    known = [v for v in values if v is not None and not math.isnan(v)]
    return sum(known) / len(known) if known else math.nan
