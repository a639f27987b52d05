"""`gradsieve compare`: the flags, and what is printed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from gradsieve.clock import Progress, silent

if TYPE_CHECKING:
    from gradsieve.compare.estimate import Forecast
    from gradsieve.compare.records import Finished
    from gradsieve.compare.run import Comparison

Say = Callable[[str], None]


@dataclass(frozen=True)
class Compare:
    """Train on what each method chooses, measure, and say what can be said: methods x budgets x seeds.

    A run that was interrupted or killed goes on where it was; so does one to whose file arms, budgets or seeds were added.

    Attributes:
        config: A YAML file, or `demo` for the built-in comparison.
        out: Folder for everything; the file's `out` by default.
        data: Folder that {data} in the file stands for; $GRADSIEVE_DATA by default.
        dry_run: List the cells with the time each will take, from a short measurement, and stop.
        drop_leaks: Take examples that stand on two sides out, and list them, in place of refusing.
        minutes: Begin no cell after so many minutes.
        only: What is run now, beside the untouched model: ARM, or ARM@BUDGET (grads@5% random). All by default.
    """

    config: Annotated[str, tyro.conf.Positional]
    out: str | None = None
    data: str | None = None
    dry_run: bool = False
    drop_leaks: bool = False
    minutes: float | None = None
    only: tuple[str, ...] = ()

    def ready(self) -> Comparison:
        """Reads the file and the data."""
        from gradsieve.compare import Comparison, load_config

        return Comparison.of(load_config(self.config, data=self.data, out=self.out), drop_leaks=self.drop_leaks)

    def go(self, comparison: Comparison, progress: Progress = silent, say: Say = print) -> list[Finished]:
        """Does what is not done."""

        def told(finished: Finished, done: int, total: int, seconds_left: float | None) -> None:
            say(told_line(finished, done, total, seconds_left))

        return comparison.run(progress=progress, told=told, minutes=self.minutes, only=self.only)

    def assist(self, comparison: Comparison) -> None:
        """Takes part in what the first process of a launcher does, and prints nothing."""
        from gradsieve.compare import forecast

        if self.dry_run:
            forecast(comparison, self.only)
        else:
            comparison.run(only=self.only)


def assists() -> bool:
    """Says whether this is one of several processes of a launcher, and not the first."""
    from gradsieve.compare.team import launched

    size, first = launched()
    return size > 1 and not first


def told_line(finished: Finished, done: int, total: int, seconds_left: float | None) -> str:
    """Returns what is said of a finished cell."""
    from gradsieve.report.wording import duration

    record = finished.record
    if "same_as" in record:
        what = f"the same work as {record['same_as']}"
    else:
        spent = sum(seconds for name, seconds in record["seconds"].items() if name != "gradients")
        what = duration(spent)
    left = f", about {duration(seconds_left)} left" if done < total and seconds_left is not None else ""
    return f"cell {done} of {total}: {finished.cell.name}: {what}{left}"


def forecast_table(forecast: Forecast) -> Any:
    """Returns the table of cells with their times."""
    from rich.table import Table

    from gradsieve.report.wording import duration

    table = Table("cell", "arm", "budget", "seed", "view", "about", box=None, header_style="bold", pad_edge=False)
    for number, (cell, done, seconds) in enumerate(forecast.cells, 1):
        rest = [cell.arm, cell.budget or "", "" if cell.seed is None else str(cell.seed), cell.view or ""]
        table.add_row(str(number), *rest, "finished" if done else duration(seconds))
    return table


def forecast_line(forecast: Forecast) -> str:
    """Returns the sum of it."""
    from gradsieve.report.wording import duration, joined

    open_cells = sum(not done for _, done, _ in forecast.cells)
    parts = {"gradients": forecast.gradients, "Navigators": forecast.navigators}
    said = joined([f"{duration(seconds)} for {what}" for what, seconds in parts.items() if seconds])
    return (
        f"{open_cells} of {len(forecast.cells)} cells to do, about {duration(forecast.total)}{said and f', of which {said}'} "
        f"(measured in {duration(forecast.measured_in)})"
    )


def folder_line(study: Path) -> str:
    """Returns where the results are."""
    if not (study / "report.html").exists():
        return f"No cell is finished yet; run the same command again to go on: {study}"
    return f"Look at {study / 'report.html'}; results are in {study / 'results.jsonl'}"
