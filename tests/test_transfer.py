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
from gradsieve.models import find_model, untrained
from gradsieve.transfer import Transfer, Verdict, judge, percentiles, resampled, scatter, transfer

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
    assert percentiles(resampled(a, b, 200, 7)) == pytest.approx((low, high))


def judged(a: dict[str, float], b: dict[str, float], fresh: dict[str, float] | None = None) -> Verdict:
    """The verdict with fresh weights that rank at random, unless they are given."""
    by_chance = ranked(11, 250, 1.0)[0]
    return judge({"navigator": a, "model": b, "untrained": fresh or by_chance}, 200, 0, [])


def test_agreement_passes_rough_agreement_is_noted_and_none_is_refused():
    close = judged(*ranked(0, 250, 0.1))
    assert close.rho > 0.95
    assert close.notes == (
        f"fresh weights in the navigator's place reach {close.untrained:.2f}: {close.notes[0].split(': ')[1]}",
    )
    assert abs(close.untrained) < 0.2
    rough = judged(*ranked(0, 250, 2.5))
    assert 0 < rough.interval[0] < rough.rho < 0.5
    assert not rough.refused
    assert any("only roughly" in note for note in rough.notes)
    a, _ = ranked(0, 250, 1.0)
    apart = judged(a, ranked(5, 250, 1.0)[0])
    assert apart.interval[0] < 0 < apart.interval[1]
    assert apart.refused
    opposite = judged(a, {id: -v for id, v in a.items()})
    assert opposite.refused
    constant = judged(a, dict.fromkeys(a, 0.5))
    assert constant.refused


def test_only_examples_that_both_can_use_are_compared():
    a, b = ranked(0, 40, 0.5)
    del a["003"], b["007"]
    c = ranked(2, 40, 0.5)[0]
    del c["011"]
    verdict = judge({"navigator": a, "model": b, "untrained": c}, 100, 0, ["said before"])
    assert len(verdict.ids) == 37
    assert verdict.notes[0] == "said before"
    assert "only 37 examples were compared" in verdict.notes[2]
    assert [verdict.cosines["navigator"][i].item() for i in (0, 3)] == [a["000"], a["004"]]
    with pytest.raises(InvalidArgument, match="at least 3 of the same examples, got 2"):
        judge(
            {"navigator": {"a": 1.0, "b": 2.0}, "model": a | {"a": 1.0, "b": 1.0}, "untrained": a | {"a": 1.0, "b": 2.0}},
            100,
            0,
            [],
        )


def test_agreement_that_fresh_weights_reach_too_is_refused():
    a, b = ranked(0, 250, 1.0)  # ρ about 0.7, far above 0
    rng = torch.Generator().manual_seed(4)
    fresh = {id: v + float(1.4 * torch.randn(1, generator=rng)) for id, v in b.items()}  # its ρ is about 0.7 too
    verdict = judged(a, b, fresh)
    assert verdict.interval[0] > 0.5
    assert verdict.gain[0] < 0 < verdict.gain[1]
    assert verdict.refused
    assert any("better than fresh weights" in note for note in verdict.notes)
    better = judged({id: b[id] + 0.1 * v for id, v in a.items()}, b, fresh)
    assert better.gain[0] > 0
    assert not better.refused
    assert better.gain[0] < better.rho - better.untrained < better.gain[1]


def test_to_be_better_than_fresh_weights_is_not_enough():
    b = ranked(5, 250, 1.0)[0]
    verdict = judged(ranked(0, 250, 1.0)[0], b, {id: -v for id, v in b.items()})
    assert verdict.gain[0] > 0.5
    assert verdict.interval[0] < 0 < verdict.interval[1]
    assert verdict.refused
    assert any("the interval is not above 0" in note for note in verdict.notes)


def test_the_plot_shows_every_example_inside_its_frame():
    a, b = ranked(1, 30, 0.3)
    verdict = judge({"navigator": a, "model": b, "untrained": ranked(2, 30, 1.0)[0]}, 100, 0, [])
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


def test_a_copy_without_training_has_the_form_but_other_weights(tiny_model: Path) -> None:
    source = find_model(str(tiny_model))
    before = torch.random.get_rng_state()
    trained, fresh, again, other = (
        source.load(torch.float32, "cpu"),
        *(untrained(source, s, torch.float32, "cpu") for s in (0, 0, 1)),
    )
    assert torch.equal(before, torch.random.get_rng_state())
    states = [model.state_dict() for model in (trained, fresh, again, other)]
    assert all(
        {name: t.shape for name, t in state.items()} == {name: t.shape for name, t in states[0].items()} for state in states
    )
    name = "model.layers.0.mlp.up_proj.weight"
    assert torch.equal(states[1][name], states[2][name])
    assert not any(torch.allclose(states[i][name], states[j][name]) for i, j in ((0, 1), (1, 3), (0, 3)))


def test_a_model_that_was_never_trained_is_refused(tiny_model: Path, write_data: Write, tmp_path: Path) -> None:
    torch.manual_seed(123)
    fresh = untrained(find_model(str(tiny_model)), 5, torch.float32, "cpu")
    folder = tmp_path / "fresh"
    shutil.copytree(tiny_model, folder)
    fresh.save_pretrained(folder)
    files = (str(write_data("pool", 60)),), (str(write_data("anchor", 8, category="arithmetic")),)
    settings = Transfer(
        str(folder), str(tiny_model), *files, resamples=300, dtype="float32", examples=60, out=str(tmp_path / "o")
    )
    with pytest.raises(InvalidArgument, match="fresh weights in its place reach"):
        transfer(settings)
    assert json.loads((tmp_path / "o" / "transfer.json").read_text())["gain"][0] <= 0


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
