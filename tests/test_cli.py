import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from rich.console import Console

from gradsieve import cli
from gradsieve.selectors import SELECTORS

Write = Callable[..., Path]
AS_IT_IS = ("--warmup-share", "0")


def flags(tiny_model: Path, write_data: Write, out: Path) -> list[str]:
    pool, target = write_data("pool", 20), write_data("target", 5)
    return [
        "--model", str(tiny_model), "--pool", str(pool), "--target", str(target), "--budget", "4", "--dim", "256",
        "--dtype", "float32", "--out", str(out),
    ]  # fmt: skip


def test_help_answers_within_half_a_second() -> None:
    for _ in range(10):  # a busy machine may keep one call waiting, not all of them
        start = time.perf_counter()
        shown = subprocess.run([sys.executable, "-m", "gradsieve.cli", "--help"], capture_output=True, text=True, check=True)
        if (seconds := time.perf_counter() - start) < 0.5:
            break
    assert seconds < 0.5
    assert all(f"gradsieve {name}" in shown.stdout for name in cli.COMMANDS)


def test_select_writes_the_folder_and_says_where(
    tiny_model: Path, write_data: Write, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.run(["select", "less", *AS_IT_IS, *flags(tiny_model, write_data, tmp_path / "o")]) == 0
    shown = capsys.readouterr().out
    assert "less chose 4 of 20 examples." in shown
    assert "pool: 20 examples, read as prompt-completion" in shown
    assert f"{tmp_path / 'o' / 'selected.jsonl'}" in shown
    assert len((tmp_path / "o" / "selected.jsonl").read_text().splitlines()) == 4
    assert cli.run(["replay", str(tmp_path / "o" / "run.json")]) == 0
    assert "the same 4 examples in the same order" in capsys.readouterr().out


def test_a_yaml_file_stands_for_flags_and_flags_win(tiny_model: Path, write_data: Write, tmp_path: Path) -> None:
    import yaml

    pool, target = write_data("pool", 20), write_data("target", 5)
    job = {
        "method": "less", "warmup_share": 0, "model": str(tiny_model), "pool": [str(pool)], "target": str(target),
        "budget": 4, "dim": 256,
        "dtype": "float32", "out": str(tmp_path / "yaml"),
    }  # fmt: skip
    (tmp_path / "job.yaml").write_text(yaml.safe_dump(job))
    assert cli.run(["select", "--config", str(tmp_path / "job.yaml"), "--budget", "3"]) == 0
    assert len((tmp_path / "yaml" / "selected.jsonl").read_text().splitlines()) == 3
    assert json.loads((tmp_path / "yaml" / "run.json").read_text())["job"]["budget"] == "3"


def test_yamls_words_are_flags_as_they_stand(tiny_model: Path, write_data: Write, tmp_path: Path) -> None:
    (tmp_path / "job.yaml").write_text("dedup: off\ncheckpointing: true\nwarmup_recipe: null\nbudget: 3\n")
    arguments = [*flags(tiny_model, write_data, tmp_path / "o")]
    at = arguments.index("--budget")
    assert cli.run(["select", "random", f"--config={tmp_path / 'job.yaml'}", *arguments[:at], *arguments[at + 2 :]]) == 0
    job = json.loads((tmp_path / "o" / "run.json").read_text())["job"]
    assert (job["dedup"], job["checkpointing"], job["warmup_recipe"], job["budget"]) == ("off", True, None, "3")


@pytest.mark.parametrize("arguments", [["methods", "--help"], ["store", "--help"], ["store", "info", "--help"]])
def test_commands_without_options_have_help_too(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(arguments) == 0
    assert f"usage: gradsieve {arguments[0]}" in capsys.readouterr().out


def test_method_settings_are_flags(tiny_model: Path, write_data: Write, tmp_path: Path) -> None:
    arguments = flags(tiny_model, write_data, tmp_path / "o")
    assert cli.run(["select", "random", *arguments, "--stratify", "length", "--bins", "3"]) == 0
    record = json.loads((tmp_path / "o" / "run.json").read_text())
    assert record["method"]["settings"] == {"stratify": "length", "bins": 3}


@pytest.mark.parametrize("method", SELECTORS)
def test_every_method_has_help_for_each_of_its_flags(method: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        cli.run(["select", method, "--help"])
    assert stopped.value.code == 0
    shown = capsys.readouterr().out
    assert "--pool" in shown
    for name in (field.name for field in dataclasses.fields(SELECTORS[method])):
        assert f"--{name.replace('_', '-')}" in shown


def test_methods_shows_the_table_of_the_readme(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cli, "make_console", lambda: Console(width=4000))
    assert cli.run(["methods"]) == 0
    shown = "".join(capsys.readouterr().out.split())
    readme = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
    table = readme.partition("<!-- methods -->")[2].partition("<!-- /methods -->")[0]
    rows = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in table.splitlines() if line.startswith("| [`")]
    assert [row[0].partition("`")[2].partition("`")[0] for row in rows] == list(SELECTORS)
    assert all("".join(cell.split()) in shown for row in rows for cell in row[1:])


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["frobnicate"], "command must be one of"),
        (["select"], "select must be followed by a method"),
        (["select", "ogz"], "method must be one of"),
        (["select", "less", "--pool", "nowhere.jsonl", "--model", "demo"], "needs --target"),
        (["store", "verify"], "store must be followed by"),
        (["store", "info", "nowhere"], "must be a gradient store"),
        (["replay", "nowhere/run.json"], "must be the run.json"),
        (["select", "--config", "nowhere.yaml"], "must be a readable YAML"),
        (["select", "--config", sys.executable], "must be a readable YAML"),
    ],
)
def test_what_the_user_can_mend_is_one_line_and_status_two(
    arguments: list[str], expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.run(arguments) == 2
    shown = capsys.readouterr().err
    assert shown.startswith("gradsieve: ")
    assert shown.count("\n") == 1
    assert expected in shown


def test_store_verify_names_the_broken_shard_and_the_next_run_mends_it(
    tiny_model: Path, write_data: Write, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["select", "less", *AS_IT_IS, *flags(tiny_model, write_data, tmp_path / "o")]
    store = tmp_path / "o" / "store"
    assert cli.run(arguments) == 0
    assert cli.run(["store", "verify", str(store)]) == 0
    assert "every byte is as it was written" in capsys.readouterr().out
    shard = store / "pool" / "shards" / "00000000.safetensors"
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-7] + bytes([whole[-7] ^ 1]) + whole[-6:])
    assert cli.run(["store", "verify", str(store)]) == 2
    assert str(shard) in capsys.readouterr().out
    assert cli.run(arguments) == 0
    assert shard.read_bytes() == whole
    assert cli.run(["store", "info", str(store)]) == 0
    assert "sketch: {'dim': 256, 'seed': 0}" in capsys.readouterr().out


def test_interrupting_leaves_a_state_to_go_on_from(tiny_model: Path, write_data: Write, tmp_path: Path) -> None:
    pool, target = write_data("pool", 400), write_data("target", 5)
    command = [
        sys.executable, "-m", "gradsieve.cli", "select", "less", *AS_IT_IS, "--model", str(tiny_model), "--pool", str(pool),
        "--target", str(target), "--dim", "256", "--dtype", "float32", "--unit-tokens", "300", "--out", str(tmp_path / "o"),
    ]  # fmt: skip
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a job in the background inherits a deaf ear
    )
    deadline = time.monotonic() + 60
    while not list((tmp_path / "o").glob("store/pool/shards/0*.safetensors")):
        assert time.monotonic() < deadline
        assert process.poll() is None
        time.sleep(0.005)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 130
    assert "run the same command again to go on" in errors
    assert "Traceback" not in errors


def test_a_full_disk_is_one_line(
    tiny_model: Path, write_data: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    assert cli.run(["select", "less", *AS_IT_IS, *flags(tiny_model, write_data, tmp_path / "o")]) == 2
    shown = capsys.readouterr().err
    assert "No space left on device; free space or write to another disk" in shown
