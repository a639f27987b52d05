from collections.abc import Callable
from pathlib import Path

import pytest

import gradsieve as gs
from gradsieve import cli
from gradsieve.errors import InvalidArgument
from gradsieve.rebuild import Rebuild, rebuild

Write = Callable[..., Path]


@pytest.mark.parametrize("method", ["random", "grads", "ogs", "ogs-static", "g2is", "gradmatch"])
def test_a_report_is_rebuilt_to_the_same_bytes(method: str, tiny_model: Path, write_data: Write, tmp_path: Path) -> None:
    out = tmp_path / "run"
    pool, target, anchor = write_data("pool", 20), write_data("target", 5), write_data("anchor", 6)
    data = {"pool": pool, "target": target, "anchor": anchor}
    gs.select(method, model=tiny_model, budget=6, out=out, dim=256, dtype="float32", **data)
    first = (out / "report.html").read_bytes()
    (out / "report.html").unlink()
    assert rebuild(Rebuild(out)) == out / "report.html"
    assert (out / "report.html").read_bytes() == first


def test_replay_examples_are_part_of_the_pool(
    tiny_model: Path, data: dict[str, str], write_data: Write, tmp_path: Path
) -> None:
    out, general = tmp_path / "run", write_data("general", 9)
    method = gs.OGS(clusters=3, general_clusters=2, updates=2, episodes=3)
    gs.select(method, model=tiny_model, **data, replay=(str(general),), budget=6, out=out, dim=256, dtype="float32")
    first = (out / "report.html").read_bytes()
    (out / "report.html").unlink()
    rebuild(Rebuild(out))
    assert (out / "report.html").read_bytes() == first
    write_data("general", 8)
    with pytest.raises(InvalidArgument, match=r"the pool must be the data of .*general\.jsonl"):
        rebuild(Rebuild(out))


def test_another_pool_is_refused(tiny_model: Path, write_data: Write, tmp_path: Path) -> None:
    pool = write_data("pool", 20)
    gs.select("random", model=tiny_model, pool=pool, budget=6, out=tmp_path / "run")
    write_data("pool", 21)
    with pytest.raises(InvalidArgument, match="the pool must be the data of"):
        rebuild(Rebuild(tmp_path / "run"))


def test_a_folder_without_a_run_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["report", str(tmp_path)]) == 2
    assert "must be the folder of a selection" in capsys.readouterr().err
