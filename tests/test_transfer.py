"""May one model choose for another? Shown on tiny models, and on rankings whose answer is known."""

from __future__ import annotations

import json
import shutil
import xml.etree.ElementTree as ET
from collections.abc import Callable
from pathlib import Path

import pytest
import scipy.stats
import torch

from gradsieve.cli import run
from gradsieve.errors import InvalidArgument
from gradsieve.transfer import Transfer, bootstrap, judge, scatter, transfer

Write = Callable[..., Path]


def ranked(seed: int, n: int, noise: float) -> tuple[dict[str, float], dict[str, float]]:
    rng = torch.Generator().manual_seed(seed)
    a = torch.randn(n, generator=rng, dtype=torch.float64)
    b = a + noise * torch.randn(n, generator=rng, dtype=torch.float64)
    return {f"{i:03d}": v for i, v in enumerate(a.tolist())}, {f"{i:03d}": v for i, v in enumerate(b.tolist())}


@pytest.mark.parametrize("noise", [0.1, 1.0, 5.0])
def test_the_interval_is_that_of_scipy_on_the_same_resamples(noise):
    a, b = (torch.tensor(list(side.values()), dtype=torch.float64) for side in ranked(3, 60, noise))
    rng = torch.Generator().manual_seed(7)
    draws = [torch.randint(60, (60,), generator=rng) for _ in range(200)]
    naive = [scipy.stats.spearmanr(a[rows].numpy(), b[rows].numpy()).statistic for rows in draws]
    low, high = torch.tensor(naive, dtype=torch.float64).quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    assert bootstrap(a, b, 200, 7) == pytest.approx((low, high))


def test_agreement_passes_rough_agreement_is_noted_and_none_is_refused():
    close = judge(*ranked(0, 250, 0.1), 200, 0, [])
    assert close.rho > 0.95
    assert close.notes == ()
    rough = judge(*ranked(0, 250, 2.5), 200, 0, [])
    assert 0 < rough.interval[0] < rough.rho < 0.5
    assert not rough.refused
    assert any("only roughly" in note for note in rough.notes)
    a, _ = ranked(0, 250, 1.0)
    apart = judge(a, ranked(5, 250, 1.0)[0], 200, 0, [])
    assert apart.interval[0] < 0 < apart.interval[1]
    assert apart.refused
    opposite = judge(a, {id: -v for id, v in a.items()}, 200, 0, [])
    assert opposite.refused
    constant = judge(a, dict.fromkeys(a, 0.5), 200, 0, [])
    assert constant.refused


def test_only_examples_that_both_can_use_are_compared():
    a, b = ranked(0, 40, 0.5)
    del a["003"], b["007"]
    verdict = judge(a, b, 100, 0, ["said before"])
    assert len(verdict.ids) == 38
    assert verdict.notes[0] == "said before"
    assert "only 38 examples were compared" in verdict.notes[1]
    assert [verdict.cosines["navigator"][i].item() for i in (0, 3)] == [a["000"], a["004"]]
    with pytest.raises(InvalidArgument, match="at least 3 of the same examples, got 2"):
        judge({"a": 1.0, "b": 2.0}, a | {"a": 1.0, "b": 1.0}, 100, 0, [])


def test_the_plot_shows_every_example_inside_its_frame():
    verdict = judge(*ranked(1, 30, 0.3), 100, 0, [])
    root = ET.fromstring(scatter(verdict, "small <1>", "large"))
    dots = [(float(e.get("cx")), float(e.get("cy"))) for e in root.iter() if e.tag.endswith("circle")]
    assert len(dots) == 30
    assert min(min(d) for d in dots) >= 56
    assert max(max(d) for d in dots) <= 476
    assert "small <1>" in "".join(root.itertext())


@pytest.fixture
def near(tiny_model: Path, tmp_path: Path) -> Path:
    """The tiny model with a little noise on its weights."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    rng = torch.Generator().manual_seed(9)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.003 * torch.randn(parameter.shape, generator=rng))
    folder = tmp_path / "near"
    shutil.copytree(tiny_model, folder)
    model.save_pretrained(folder)
    return folder


def test_a_model_stands_for_one_near_it(near: Path, tiny_model: Path, write_data: Write, tmp_path: Path) -> None:
    pool, anchor = write_data("pool", 40), write_data("anchor", 8, category="arithmetic")
    verdict = transfer(
        Transfer(
            str(near), str(tiny_model), (str(pool),), (str(anchor),), resamples=300, dtype="float32", examples=32,
            out=str(tmp_path / "out"),
        )
    )  # fmt: skip
    assert verdict.rho > 0.8
    assert len(verdict.ids) == 32
    assert set(verdict.ids) < {f"pool-{i}" for i in range(40)}
    record = json.loads((tmp_path / "out" / "transfer.json").read_text())
    assert record["rho"] == pytest.approx(verdict.rho)
    assert list(record["cosines"]) == verdict.ids
    ET.parse(tmp_path / "out" / "transfer.svg")


def test_what_shows_nothing_is_refused_unless_overridden(
    near: Path, tiny_model: Path, write_data: Write, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["transfer", "--navigator", str(near), "--model", str(tiny_model), "--pool", str(write_data("pool", 4))]
    words += ["--anchor", str(write_data("anchor", 4)), "--out", str(tmp_path / "out"), "--dtype", "float32"]
    words += ["--examples", "3", "--resamples", "200"]  # of three examples many resamples are constant
    assert run(words) == 2
    assert "navigator must rank examples as the model does" in capsys.readouterr().err
    assert (tmp_path / "out" / "transfer.svg").exists()
    assert run([*words, "--override", "True"]) == 0
    assert "the interval is not above 0" in capsys.readouterr().out


def test_settings_that_mean_nothing_are_refused(write_data: Write, tmp_path: Path) -> None:
    with pytest.raises(InvalidArgument, match="examples must be at least 3"):
        Transfer("a", "b", ("p",), ("a",), examples=2)
    with pytest.raises(InvalidArgument, match="resamples must be at least 100"):
        Transfer("a", "b", ("p",), ("a",), resamples=9)
    with pytest.raises(InvalidArgument, match="--model must name"):
        Transfer("a", "", ("p",), ("a",))
    with pytest.raises(InvalidArgument, match="--anchor must name examples"):
        transfer(Transfer("a", "b", (str(write_data("p", 4)),), (), out=str(tmp_path / "o")))
