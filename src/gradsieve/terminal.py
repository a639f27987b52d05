"""What the command line shows: progress with the time left, results, estimates. Heavy imports stand where they are used."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any


def make_console() -> Any:
    """Returns the console on standard output; 160 columns where that is no terminal."""
    from rich.console import Console

    return Console(soft_wrap=not sys.stdout.isatty(), width=None if sys.stdout.isatty() else 160)


class Terminal:
    """Progress bars with the time left, on standard error; plain lines every ten seconds where that is no terminal."""

    def __enter__(self) -> Terminal:
        import logging

        from rich.console import Console
        from rich.logging import RichHandler
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

        console = Console(stderr=True)
        logging.basicConfig(
            level=logging.WARNING, format="%(message)s", handlers=[RichHandler(console=console, show_path=False)]
        )
        self._bars = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("tokens"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(elapsed_when_finished=False),
            console=console,
            disable=not console.is_terminal,
        )
        self._tasks: dict[str, Any] = {}
        self._plain = not console.is_terminal
        self._said: dict[str, tuple[float, float]] = {}
        self._bars.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._bars.__exit__(*error)

    def progress(self, stage: str, done: int, total: int) -> None:
        """Shows how far a stage is."""
        if self._plain:
            self._say(stage, done, total)
        elif stage not in self._tasks:
            self._tasks[stage] = self._bars.add_task(stage, total=total, completed=done)
        else:
            self._bars.update(self._tasks[stage], completed=done, total=total)

    def say(self, line: str) -> None:
        """Prints a line above the bars."""
        self._bars.console.print(line, markup=False, highlight=False)
        for task in self._tasks.values():
            self._bars.remove_task(task)
        self._tasks.clear()
        self._said.clear()

    def _say(self, stage: str, done: int, total: int) -> None:
        import time

        now = time.monotonic()
        start, last = self._said.setdefault(stage, (now, 0.0))
        if done < total and now - last < 10:
            return
        self._said[stage] = start, now
        left = f", {(now - start) / done * (total - done):.0f} s left" if 0 < done < total and now > start else ""
        print(f"{stage}: {done}/{total} tokens{left}", file=sys.stderr, flush=True)


def print_estimate(found: Any) -> None:
    """Shows a `gradsieve.estimate.Estimate`."""
    from rich.table import Table

    from gradsieve.report.wording import duration, size

    console = make_console()
    for role, (examples, tokens) in found.sets.items():
        console.print(f"{role}: {examples} usable examples, {tokens} tokens", markup=False, highlight=False)
    for note in found.notes:
        console.print(f"note: {note}", style="yellow", markup=False, highlight=False)
    table = Table("stage", "about", "measured on a part", box=None, header_style="bold", pad_edge=False)
    for stage in found.stages:
        table.add_row(stage.stage, duration(stage.seconds), duration(stage.measured))
    console.print(table, highlight=False)
    total = f"about {duration(found.seconds)} until the choice, {size(found.bytes)} on disk, {size(found.memory)} of memory"
    console.print(f"{total} (measured on {found.share:.0%} of the tokens)", markup=False, highlight=False)


def print_result(result: Any, out: Path, *, demo_table: bool = False) -> None:
    """Shows a `gradsieve.pipeline.Result` that was written to `out`; for the demo with the table of planted kinds."""
    console = make_console()
    selection = result.selection
    for role, shape in result.formats.items():
        examples = f"{len(result.sets[role].examples)} examples, " if role in result.sets else ""
        console.print(f"{role}: {examples}read as {shape}", markup=False, highlight=False)
    for note in (*result.notes, *selection.notes):
        console.print(f"note: {note}", style="yellow", markup=False, highlight=False)
    if demo_table:
        from gradsieve.demo_run import kinds_table

        console.print(kinds_table(result))
    from rich.table import Table
    from rich.text import Text

    if result.references:
        known = Table("reference", "examples", "signal share", "rank correlation of its halves", box=None, header_style="bold")
        for name, fact in sorted(result.references.items()):
            halves = "–" if fact.split_half is None else f"{fact.split_half:.2f}"
            known.add_row(Text(name), str(fact.count), f"{fact.signal_share:.2f}", halves)
        console.print(known, highlight=False)
    if correlation := selection.trace.get("length_correlation"):
        with_length = ", ".join(f"{name} {rho:+.2f}" for name, rho in correlation.items())
        console.print(f"Rank correlation with answer length: {with_length}.", markup=False, highlight=False)
    stages = Table("stage", "seconds", "processor seconds", box=None, header_style="bold", pad_edge=False)
    for cost in result.clock.costs:
        stages.add_row(cost.stage, f"{cost.wall_seconds:.1f}", f"{cost.cpu_seconds:.1f}")
    console.print(stages, highlight=False)
    n = len(result.pool.ids)
    left_out = f", {len(result.excluded)} could not be used" if result.excluded else ""
    console.print(f"{result.method[0]} chose {len(selection.rows)} of {n} examples{left_out}.", markup=False, highlight=False)
    tokens = result.pool.columns["tokens"]
    if len(selection.rows):
        mean = float(tokens[selection.rows].mean())
        console.print(f"Tokens an example: {tokens.mean():.0f} in the pool, {mean:.0f} among the chosen.", highlight=False)
    console.print(f"Train on {out / 'selected.jsonl'}; look at {out / 'report.html'}", markup=False, highlight=False)
