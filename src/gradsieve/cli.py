"""The command line: parse, call, print. Everything heavy is imported by the command that needs it."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

from gradsieve.terminal import Terminal, make_console, print_estimate, print_result

USAGE = """gradsieve chooses the fine-tuning examples that teach a language model a domain without making it forget.

  gradsieve demo                      the main job on a built-in model and medical pool, on a CPU, in minutes
  gradsieve select METHOD …           choose examples: --model M --pool pool.jsonl --budget 5% --out DIR
  gradsieve estimate METHOD …         what that will take, from a short measurement: the same options as select
  gradsieve methods                   what each method reads, picks by and costs
  gradsieve extract …                 take gradients into a store, without choosing yet
  gradsieve store info|verify DIR     what a store holds; check every byte of it
  gradsieve export RUN                write a selection for TRL, LLaMA-Factory, axolotl, Parquet or datasets
  gradsieve report RUN                write a run's report again, without a model
  gradsieve compare CONFIG.yaml|demo  train on what each method chooses, measure, and report with intervals
  gradsieve replay RUN/run.json       do a run again and compare
  gradsieve transfer …                may a smaller model choose for a larger one? --navigator A --model B

`gradsieve COMMAND --help` lists a command's options. Documentation: docs/ in the repository."""


def main() -> None:
    """Entry point of the `gradsieve` command."""
    sys.exit(run(sys.argv[1:]))


def run(arguments: Sequence[str]) -> int:
    """Runs one command; returns the exit status: 0, 2 (the user can mend it), 130 (interrupted)."""
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(USAGE)
        return 0
    if arguments[0] in ("-V", "--version"):
        from gradsieve import __version__

        print(f"gradsieve {__version__}")
        return 0
    name, rest = arguments[0], list(arguments[1:])
    if name not in COMMANDS:
        return _fail(f"command must be one of {', '.join(COMMANDS)}, got {name!r}; see gradsieve --help")
    from gradsieve.errors import GradsieveError

    try:
        return COMMANDS[name](rest)
    except GradsieveError as error:
        return _fail(str(error))
    except KeyboardInterrupt:
        print("\ninterrupted; finished shards are kept: run the same command again to go on", file=sys.stderr)
        return 130
    except BrokenPipeError:
        return 0


def _fail(message: str) -> int:
    print(f"gradsieve: {' '.join(message.split())}", file=sys.stderr)
    return 2


# -- commands ---------------------------------------------------------------------------------------------------------


def _demo(arguments: list[str]) -> int:
    import tyro

    from gradsieve.demo_run import Demo

    demo = tyro.cli(Demo, prog="gradsieve demo", args=arguments, config=_tyro_config())
    with Terminal() as terminal:
        result = demo.go(terminal.progress)
    print_result(result, Path(demo.out), demo_table=True)
    return 0


def _select(arguments: list[str]) -> int:
    import tyro

    from gradsieve.pipeline import method_class, select

    name, flags = _method_name(_with_config(arguments))
    kind = method_class(name)
    parsed: Any = tyro.cli(_select_command(kind), prog=f"gradsieve select {name}", args=flags, config=_tyro_config())
    job, out = parsed.job, parsed.out
    with Terminal() as terminal:
        fields = {f.name: getattr(job, f.name) for f in dataclasses.fields(job)}
        result = select(name, settings=dataclasses.asdict(parsed.method), out=out, progress=terminal.progress, **fields)
    print_result(result, Path(out))
    return 0


def _estimate(arguments: list[str]) -> int:
    import tyro

    from gradsieve.estimate import estimate
    from gradsieve.pipeline import method_class

    name, flags = _method_name(_with_config(arguments))
    parsed: Any = tyro.cli(
        _select_command(method_class(name)), prog=f"gradsieve estimate {name}", args=flags, config=_tyro_config()
    )
    with Terminal() as terminal:
        found = estimate(name, parsed.job, dataclasses.asdict(parsed.method), progress=terminal.progress)
    print_estimate(found)
    return 0


def _extract(arguments: list[str]) -> int:
    import tyro

    from gradsieve.job import Job
    from gradsieve.pipeline import extract

    help = tyro.conf.arg(help="Compare so many random examples with float64 loops, one backward pass each; 0 for none.")
    fields: list[Any] = [("job", Annotated[Job, tyro.conf.arg(name="")]), ("check", Annotated[int, help], 0)]
    command = dataclasses.make_dataclass("Extract", fields, frozen=True)
    command.__doc__ = "Take gradients into a store, without choosing yet."
    parsed: Any = tyro.cli(command, prog="gradsieve extract", args=_with_config(arguments), config=_tyro_config())
    with Terminal() as terminal:
        done = extract(parsed.job, terminal.progress, parsed.check)
    for note in done.notes:
        make_console().print(f"note: {note}", style="yellow", markup=False, highlight=False)
    candidates = done.problem.candidates
    print(f"{len(candidates.ids)} examples x {candidates.dim} numbers in {parsed.job.store}")
    if done.excluded:
        print(f"{len(done.excluded)} could not be used; {Path(parsed.job.store) / 'excluded.jsonl'} says why")
    return _print_check(done.checked, parsed.check) if done.checked else 0


def _print_check(checked: Sequence[Any], count: int) -> int:
    """Prints what was compared with float64 loops; returns the exit status."""
    from rich.table import Table
    from rich.text import Text

    table = Table("quantity", "largest error", "tolerance", "", "worst example", box=None, header_style="bold", pad_edge=False)
    for one in checked:
        table.add_row(
            one.name, f"{one.error:.2e}", f"{one.tolerance:.0e}", "ok" if one.passed else "TOO LARGE", Text(one.worst)
        )
    make_console().print(table, highlight=False)
    wrong = [one.name for one in checked if not one.passed]
    if wrong:
        return _fail(f"errors of {count} examples must lie within tolerance, got larger ones in {', '.join(wrong)}")
    print(f"{count} random examples agree with one float64 backward pass each")
    return 0


def _methods(arguments: list[str]) -> int:
    if arguments in (["-h"], ["--help"]):
        print("usage: gradsieve methods\n\nShows what each method needs, reads, picks by and costs; it has no options.")
        return 0
    if arguments:
        return _fail(f"methods must stand alone, got {' '.join(arguments)}")
    from rich.table import Table

    from gradsieve.needs import asks_for
    from gradsieve.selectors import SELECTORS

    table = Table("method", "needs", "reads", "picks by", "cost", "source", box=None, header_style="bold", pad_edge=False)
    for name, kind in SELECTORS.items():
        facts = (str(getattr(kind, column, "")) for column in ("reads", "picks_by", "cost", "source"))
        table.add_row(name, asks_for(kind()), *facts)
    make_console().print(table, highlight=False)
    return 0


def _store(arguments: list[str]) -> int:
    if {"-h", "--help"} & set(arguments):
        print("usage: gradsieve store info|verify DIR\n\ninfo    what the stores in a folder hold, and what made their rows")
        print("verify  read every byte; exit status 2 where one is not as it was written")
        return 0
    if len(arguments) != 2 or arguments[0] not in ("info", "verify"):
        return _fail("store must be followed by info or verify and a folder, got " + (" ".join(arguments) or "nothing"))
    from gradsieve.store import GradientStore

    verb, folders = arguments[0], _store_folders(Path(arguments[1]))
    broken = 0
    for folder in folders:
        store = GradientStore.open(folder)
        units = store.units()
        there = [unit for unit in units if store.shard(unit.number).exists()]
        size = sum(store.shard(unit.number).stat().st_size for unit in there)
        rows = sum(len(unit.keys) for unit in there)
        line = f"{folder}: {rows} rows in {len(there)} of {len(units)} shards, {size / 2**20:.1f} MiB"
        print(f"{line}, fingerprint {store.manifest.fingerprint}")
        if verb == "info":
            for key, value in sorted(store.manifest.settings.items()):
                print(f"  {key}: {value}")
            continue
        problems = store.verify()
        broken += len(problems)
        for problem in problems:
            print(f"  {problem}")
    if verb == "verify" and not broken:
        print("every byte is as it was written")
    return 2 if broken else 0


def _export(arguments: list[str]) -> int:
    import tyro

    from gradsieve.export import Export, export

    out, notes = export(tyro.cli(Export, prog="gradsieve export", args=arguments, config=_tyro_config()))
    print(f"written to {out}")
    for note in notes:
        print(note)
    return 0


def _report(arguments: list[str]) -> int:
    import tyro

    from gradsieve.rebuild import Rebuild, rebuild

    print(f"written to {rebuild(tyro.cli(Rebuild, prog='gradsieve report', args=arguments, config=_tyro_config()))}")
    return 0


def _compare(arguments: list[str]) -> int:
    import tyro

    from gradsieve.compare import command, forecast

    flags = (tyro.conf.OmitArgPrefixes, tyro.conf.FlagCreatePairsOff)
    compare = tyro.cli(command.Compare, prog="gradsieve compare", args=arguments, config=flags)
    comparison = compare.ready()
    if command.assists():
        compare.assist(comparison)
        return 0
    console = make_console()
    for note in comparison.material.notes:
        console.print(f"note: {note}", style="yellow", markup=False, highlight=False)
    if compare.dry_run:
        expected = forecast(comparison, compare.only)
        console.print(command.forecast_table(expected), highlight=False)
        console.print(command.forecast_line(expected), markup=False, highlight=False)
        return 0
    with Terminal() as terminal:
        compare.go(comparison, terminal.progress, terminal.say)
    console.print(command.folder_line(comparison.study), markup=False, highlight=False)
    return 0


def _replay(arguments: list[str]) -> int:
    import tyro

    from gradsieve.outputs import Replay, replay

    command = tyro.cli(Replay, prog="gradsieve replay", args=arguments, config=_tyro_config())
    run, out = command.run, command.out or command.run.parent / "replay"
    with Terminal() as terminal:
        result = replay(run, out, terminal.progress)
    print(f"the same {len(result.examples)} examples in the same order; the second run is in {out}")
    return 0


def _transfer(arguments: list[str]) -> int:
    import tyro

    from gradsieve.transfer import Transfer, transfer

    settings = tyro.cli(Transfer, prog="gradsieve transfer", args=_with_config(arguments), config=_tyro_config())
    with Terminal() as terminal:
        verdict = transfer(settings, terminal.progress)
    for note in verdict.notes:
        print(f"note: {note}")
    (low, high), count = verdict.interval, len(verdict.ids)
    print(f"rank correlation of cos(g, anchor): {verdict.rho:.2f} [{low:.2f}, {high:.2f}] over {count} examples")
    print(f"look at {Path(settings.out) / 'transfer.svg'}")
    return 0


COMMANDS: dict[str, Callable[[list[str]], int]] = {
    "demo": _demo,
    "select": _select,
    "estimate": _estimate,
    "methods": _methods,
    "extract": _extract,
    "store": _store,
    "export": _export,
    "report": _report,
    "compare": _compare,
    "replay": _replay,
    "transfer": _transfer,
}


# -- parsing ----------------------------------------------------------------------------------------------------------


def _tyro_config() -> tuple[Any, ...]:
    import tyro

    return (tyro.conf.OmitArgPrefixes, tyro.conf.FlagConversionOff)


def _names() -> Sequence[str]:
    from gradsieve.selectors import SELECTORS

    return list(SELECTORS)


def _method_name(arguments: list[str]) -> tuple[str, list[str]]:
    from gradsieve.errors import InvalidArgument

    if arguments and not arguments[0].startswith("-"):
        return arguments[0], arguments[1:]
    if {"-h", "--help"} & set(arguments):
        print(f"usage: gradsieve select METHOD [options]\n\nMETHOD: {', '.join(_names())}, or package.module:Class")
        print("`gradsieve select METHOD --help` lists the options of a method; `gradsieve methods` describes them.")
        raise SystemExit(0)
    raise InvalidArgument(f"select must be followed by a method, got none; one of {', '.join(_names())}")


def _select_command(kind: type) -> type:
    """Makes the dataclass whose fields are the flags: the job's, the method's, and --out."""
    import tyro

    from gradsieve.job import Job

    clash = {f.name for f in dataclasses.fields(kind)} & {f.name for f in dataclasses.fields(Job)}
    if clash:
        raise AssertionError(f"{kind.__name__} has fields that are flags of every method: {clash}")
    no_prefix = tyro.conf.arg(name="")
    out = tyro.conf.arg(help="Folder for the results.")
    fields: list[Any] = [
        ("job", Annotated[Job, no_prefix]),
        ("method", Annotated[kind, no_prefix]),
        ("out", Annotated[str, out], dataclasses.field(default="gradsieve-out")),
    ]
    command = dataclasses.make_dataclass("Select", fields, frozen=True)
    command.__doc__ = kind.__doc__.partition("Attributes:")[0] if kind.__doc__ else ""
    return command


_YAML = {"true": "True", "false": "False", "null": "None", "~": "None", "": "None"}
"""What YAML's words are called as flags."""


def _with_config(arguments: list[str]) -> list[str]:
    """Puts the keys of `--config FILE.yaml` before the other flags, which win; `method` becomes the first word."""
    from gradsieve.errors import DataError, InvalidArgument

    parts = [word.split("=", 1) if word.startswith("--config=") else [word] for word in arguments]
    arguments = [word for part in parts for word in part]
    if "--config" not in arguments:
        return arguments
    at = arguments.index("--config")
    if at + 1 == len(arguments):
        raise InvalidArgument("--config must be followed by a YAML file, got nothing")
    import yaml

    path, rest = arguments[at + 1], arguments[:at] + arguments[at + 2 :]
    try:
        content = yaml.load(Path(path).read_text(encoding="utf-8"), yaml.BaseLoader)  # `off` stays a word
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise DataError(f"{path}: must be a readable YAML file, got {error}") from None
    if not isinstance(content, dict):
        raise DataError(f"{path}: must hold `flag: value` lines, got {type(content).__name__}")
    method = [str(content.pop("method"))] if "method" in content else []
    if rest and not rest[0].startswith("-"):
        method, rest = rest[:1], rest[1:]
    given = {word.partition("=")[0].replace("_", "-") for word in rest if word.startswith("--")}
    flags: list[str] = []
    for key, value in content.items():
        flag = "--" + str(key).replace("_", "-")
        if flag not in given:
            flags += [flag, *(_YAML.get(str(word), str(word)) for word in (value if isinstance(value, list) else [value]))]
    return method + flags + rest


def _store_folders(folder: Path) -> list[Path]:
    """A store itself, or the stores of pool, target and anchor in it, after warm-ups too."""
    if (folder / "store.json").exists():
        return [folder]
    inside = sorted(path.parent for path in folder.rglob("store.json"))
    return inside or [folder]


if __name__ == "__main__":
    main()
