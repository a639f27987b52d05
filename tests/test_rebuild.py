import re
from collections.abc import Callable
from pathlib import Path
from urllib.parse import unquote

import pytest

import gradsieve as gs
from gradsieve import cli
from gradsieve.errors import DataError, InvalidArgument
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


def test_the_links_of_a_report_elsewhere_lead_to_the_run(tiny_model: Path, write_data: Write, tmp_path: Path) -> None:
    run, out = tmp_path / "my run", tmp_path / "pages" / "law.html"
    gs.select("random", model=tiny_model, pool=write_data("pool", 20), budget=6, out=run)
    out.parent.mkdir()
    rebuild(Rebuild(run, out))
    links = [href for href in re.findall(r'href="([^"#][^"]*)"', out.read_text()) if not re.match("https?:|data:", href)]
    assert [(out.parent / unquote(href)).resolve() for href in links] == [
        run / name for name in ("selected.jsonl", "scores.parquet", "excluded.jsonl", "run.json")
    ]
    assert "gradsieve replay &#39;../my run/run.json&#39;" in out.read_text()
    assert "beside this page" not in out.read_text()


@pytest.mark.parametrize("record", ["[1]", '"x"', "{}", '{"trace_columns": []}', '{"trace_columns": [], "inputs": 3}'])
def test_a_record_of_something_else_is_one_line(record: str, tiny_model: Path, write_data: Write, tmp_path: Path) -> None:
    gs.select("random", model=tiny_model, pool=write_data("pool", 20), budget=6, out=tmp_path)
    (tmp_path / "run.json").write_text(record)
    with pytest.raises(DataError, match="must be the folder of a selection"):
        rebuild(Rebuild(tmp_path))


def test_a_folder_without_a_run_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["report", str(tmp_path)]) == 2
    assert "must be the folder of a selection" in capsys.readouterr().err
