"""What is said of measurements that are made up, against sums written out; and how it is shown."""

import csv
import io
import math
import re
import xml.etree.ElementTree as ET
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gradsieve.compare.cells import Cell
from gradsieve.compare.figures import figures
from gradsieve.compare.page import headline, lead, render
from gradsieve.compare.records import Finished, write_items, write_json
from gradsieve.compare.summary import Effect, Standing, Summary, front_seeds, summarise
from gradsieve.compare.tables import effects_csv, interval, markdown, pairs_csv, standings_csv
from gradsieve.errors import DataError

ITEMS = {"law": [f"l{i}" for i in range(30)], "math": [f"m{i}" for i in range(20)]}
SEEDS = (0, 1, 2)
TEACHES = {"full": 0.30, "random": 0.20, "good": 0.40, "same": 0.20, "bad": 0.05}
FORGETS = {"full": 0.30, "random": 0.20, "good": 0.10, "same": 0.20, "bad": 0.02}
BUDGETS = {"10%": 40}
Write = Callable[..., list[Finished]]


def record(arms: list[str], hostile: str = "") -> dict[str, Any]:
    return {
        "gradsieve": "0",
        "date": "today",
        "notes": [hostile] if hostile else [],
        "versions": {"torch": "2"},
        "hardware": {"cores": 2},
        "config": {
            "source": f"made-up{hostile}.yaml",
            "seeds": list(SEEDS),
            "budgets": ["10%"],
            "tasks": {},
            "tests": {"law": {"role": "target", "files": ["x"]}, "math": {"role": "general", "files": ["y"]}},
            "arms": [
                {"name": a, "method": a, "settings": {}, "budgets": [], "recipe": {}, "added": a == "full"}
                for a in ["base", *arms]
            ],
        },
    }


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Writes made-up cells; `change` may alter a cell's values before they are written."""

    def made(
        arms: dict[str, float] = TEACHES,
        seeds: tuple[int, ...] = SEEDS,
        change: Callable[[Cell, dict[str, Any]], None] | None = None,
        hostile: str = "",
        budgets: dict[str, int] = BUDGETS,
        items: dict[str, list[str]] = ITEMS,
    ) -> list[Finished]:
        rng = np.random.default_rng(0)
        level = {name: rng.normal(3, 0.5, len(items)) for name, items in ITEMS.items()}
        cells = [Cell("base")]
        cells += [
            Cell(arm, budget, seed, "equal_steps")
            for seed in seeds
            for arm in arms
            for budget in ([None] if arm == "full" else budgets)
        ]
        found = []
        for cell in cells:
            noise = {name: rng.normal(0, 0.02, len(items)) for name, items in ITEMS.items()}
            taught, forgot = TEACHES.get(cell.arm, 0.0), FORGETS.get(cell.arm, 0.0)
            values: dict[str, Any] = {
                "law": {"loss": level["law"] - taught + noise["law"], "key_accuracy": np.full(30, 0.5)},
                "math": {"loss": level["math"].copy(), "kl": np.abs(forgot + noise["math"]) * (cell.arm != "base")},
            }
            values["law"]["key_accuracy"][3] = np.nan
            if change:
                change(cell, values)
            folder = tmp_path / cell.name
            write_json(folder / "selection.json", {"ids": [f"{cell.arm[0]}{i}" for i in range(3)] + ["shared"], "weights": []})
            write_items(folder / "items.parquet", items, values)
            answer = {
                "test": "law",
                "item": "l0",
                "prompt": f"Why{hostile}?",
                "reference": "So.",
                "answer": f"{cell.arm}{cell.budget or ''}{hostile}",
            }
            write_json(folder / "generations.json", [answer])
            result = {
                "selection": {"examples": budgets.get(cell.budget or "", 400)} if cell.arm != "base" else None,
                "training": {"steps": 5, "surgery_seconds": 1.0, "tokens": 10},
                "seconds": {"gradients": 3.0, "select": 1.0, "train": 10.0, "evaluate": 4.0, "generate": 0.0},
            }
            found.append(Finished(cell, result, folder))
        return found

    return made


def effect(summary: Summary, arm: str, test: str, metric: str) -> Effect:
    return next(e for e in summary.effects if (e.arm, e.test, e.metric) == (arm, test, metric))


def standing(summary: Summary, arm: str) -> Standing:
    return next(one for one in summary.standings if one.arm == arm)


def test_effects_are_the_means_written_out_and_turned_so_that_higher_is_better(write: Write) -> None:
    cells = write()
    summary = summarise(cells, record(list(TEACHES)), resamples=400)
    values = {one.cell: one.measurements().values for one in cells}
    for arm in TEACHES:
        budget = None if arm == "full" else "10%"
        own = [values[Cell(arm, budget, seed, "equal_steps")] for seed in SEEDS]
        base, random = values[Cell("base")], [values[Cell("random", "10%", seed, "equal_steps")] for seed in SEEDS]
        gains = [base["law"]["loss"][i] - o["law"]["loss"][i] for o in own for i in range(30)]
        found = effect(summary, arm, "law", "loss")
        assert found.against["base"].mean == pytest.approx(sum(gains) / 90)  # type: ignore[union-attr]
        assert standing(summary, arm).gain.mean == pytest.approx(sum(gains) / 90)
        forgetting = standing(summary, arm).forgetting
        assert forgetting is not None
        assert forgetting.mean == pytest.approx(sum(o["math"]["kl"][i] for o in own for i in range(20)) / 60)
        assert forgetting.low <= forgetting.mean <= forgetting.high
        if arm not in ("random", "full"):
            over = [r["law"]["loss"][i] - o["law"]["loss"][i] for o, r in zip(own, random, strict=True) for i in range(30)]
            assert found.against["random"].mean == pytest.approx(sum(over) / 90)  # type: ignore[union-attr]
            assert standing(summary, arm).over_random.mean == pytest.approx(sum(over) / 90)  # type: ignore[union-attr]
    assert effect(summary, "random", "law", "loss").against["random"] is None
    assert effect(summary, "full", "law", "loss").against["full"] is None


def test_verdicts_the_front_and_the_headline_follow(write: Write) -> None:
    summary = summarise(write(), record(list(TEACHES)), resamples=400)
    verdicts = {arm: standing(summary, arm).over_random for arm in ("good", "same", "bad")}
    assert {arm: found.verdict for arm, found in verdicts.items() if found} == {"good": "win", "same": "tie", "bad": "loss"}
    assert {arm for arm in TEACHES if standing(summary, arm).on_front} == {"good", "bad"}
    assert standing(summary, "good").front_share > 0.95
    assert standing(summary, "full").front_share < 0.05
    # loss and key_accuracy of law, loss and kl of math: good wins in two, nothing differs in the others
    assert standing(summary, "good").verdicts["random"] == {"win": 2, "tie": 2, "loss": 0, "unjudged": 0}
    assert headline(summary) == "1 of 3 choices beat random"
    assert "better than random of the same budget: good 10%; not told apart from it: same 10%; worse: bad 10%" in lead(summary)
    assert "beside the untouched model: good 10% and bad 10%." in lead(summary)
    assert "In kl of the general tests better than random, and in gain not worse: good 10%" in lead(summary)


def test_an_arm_that_gains_and_loses_nothing_takes_the_untouched_model_off_the_front(write: Write) -> None:
    def remember(cell: Cell, values: dict[str, Any]) -> None:
        del values["math"]["kl"]
        if cell.arm == "good":
            values["math"]["loss"] -= 0.2

    summary = summarise(write(change=remember), record(list(TEACHES)), resamples=200)
    assert summary.base_on_front == {"equal_steps": False}
    assert "On the front of gain and forgetting: good 10%." in lead(summary)
    svg = figures(summary)["pareto-equal_steps"]
    (line,) = re.findall(r'<polyline points="([^"]*)"', svg)
    assert len(line.split()) == 1  # of good alone
    kept = summarise(write(), record(list(TEACHES)), resamples=200)
    assert kept.base_on_front == {"equal_steps": True}
    base = re.compile(r'<path [^>]*translate\([^>]*fill="([^"]+)"[^>]*></path>')
    assert base.findall(svg)[0] != base.findall(figures(kept)["pareto-equal_steps"])[0]


def test_hours_are_of_work_that_was_done(write: Write) -> None:
    cells = write()
    for one in cells:
        one.record["seconds"]["generate"] = 2.0
    again = replace(cells[-1], record=cells[-1].record | {"same_as": cells[-2].cell.name})
    summary = summarise([*cells[:-1], again], record(list(TEACHES)), resamples=50)
    assert summary.trained_seconds == 10.0 * (len(cells) - 1)
    assert summary.examined_seconds == 6.0 * (len(cells) - 1)


def test_two_views_are_told_apart_in_sentences(write: Write) -> None:
    cells = write()
    other = [replace(one, cell=replace(one.cell, view="equal_repetition")) for one in cells if one.cell.view]
    summary = summarise([*cells, *other], record(list(TEACHES)), resamples=50)
    said = lead(summary).partition("On the front")[2]
    assert "good 10% (equal steps)" in said
    assert "good 10% (equal repetition)" in said
    assert re.search(r"largest gain \(nats per token\)</dt><dd><span>good 10% \(equal", render(summary, {}))


def test_accuracy_counts_the_other_way_and_items_without_a_value_are_left_out(write: Write) -> None:
    def better(cell: Cell, values: dict[str, Any]) -> None:
        if cell.arm == "good":
            values["law"]["key_accuracy"][:10] += 0.25

    found = effect(summarise(write(change=better), record(list(TEACHES)), resamples=200), "good", "law", "key_accuracy")
    assert found.against["base"].mean == pytest.approx(9 * 0.25 / 29)  # type: ignore[union-attr]
    assert found.against["base"].items == 29  # type: ignore[union-attr]


def test_values_of_other_items_are_refused(write: Write) -> None:
    def lose(cell: Cell, values: dict[str, Any]) -> None:
        if cell.arm == "bad" and cell.seed == 1:
            values["law"]["loss"][4] = np.nan

    with pytest.raises(DataError, match="bad--10pct--1--equal_steps: its values of loss on law must be of the items of base"):
        summarise(write(change=lose), record(list(TEACHES)), resamples=200)


def test_nothing_is_judged_with_one_seed_or_without_methods_and_nothing_said_without_base(write: Write) -> None:
    one = summarise(write(seeds=(0,)), record(list(TEACHES)), resamples=200)
    assert headline(one) == "Nothing can be judged yet"
    assert any("fewer than 3 seeds say too little of how runs differ: all arms not judged" in note for note in one.notes)
    assert headline(summarise(write(seeds=(0, 1)), record(list(TEACHES)), resamples=200)) == "Nothing can be judged yet"
    assert {found.verdict for e in one.effects for found in e.against.values() if found} == {"unjudged"}
    bare = summarise(write(arms={"full": 0.3, "random": 0.2}), record(["full", "random"]), resamples=200)
    assert headline(bare) == "Nothing can be judged yet"
    with pytest.raises(DataError, match="the cell base must be finished"):
        summarise(write()[1:], record(list(TEACHES)), resamples=200)


def test_an_arm_with_two_seeds_is_not_judged_and_not_held_against_the_front(write: Write) -> None:
    cells = [one for one in write() if not (one.cell.arm == "good" and one.cell.seed == 2)]
    summary = summarise(cells, record(list(TEACHES)), ["good--10pct--2--equal_steps"], resamples=300)
    found = effect(summary, "good", "law", "loss").against["random"]
    assert found is not None
    assert (found.seeds, found.verdict) == (2, "unjudged")
    assert standing(summary, "good").on_front is None
    assert math.isnan(standing(summary, "good").front_share)
    assert "full" in {arm for arm in TEACHES if standing(summary, arm).on_front}
    assert any("1 cells are not finished" in note for note in summary.notes)
    assert any("differ: good 10% not judged" in note for note in summary.notes)


def test_the_front_is_judged_by_the_seeds_that_most_arms_have(write: Write) -> None:
    late = {3: 2.0, 4: 2.0}  # so good that random would beat all in gain, if its own seeds counted

    def lift(cell: Cell, values: dict[str, Any]) -> None:
        values["law"]["loss"] -= late.get(cell.seed or 0, 0.0)

    cells = [one for one in write(seeds=(0, 1, 2, 3, 4), change=lift) if (one.cell.seed or 0) < 3 or one.cell.arm == "random"]
    summary = summarise(cells, record(list(TEACHES)), resamples=300)
    assert standing(summary, "random").gain.mean > standing(summary, "good").gain.mean + 0.1  # by its own seeds
    assert {arm for arm in TEACHES if standing(summary, arm).on_front} == {"good", "bad"}
    assert all(standing(summary, arm).front_share >= 0 for arm in TEACHES)
    assert any("arms have different seeds" in note for note in summary.notes)
    assert front_seeds([[0, 1, 2], [0, 1, 2, 3, 4], [0, 1, 2, 3, 4], [5]]) == [0, 1, 2]
    assert front_seeds([[0, 1, 2, 3], [1, 2, 3, 4], [1, 2, 3, 4]]) == [1, 2, 3, 4]
    assert front_seeds([[0], [1, 2], [1, 2]]) == [1, 2]


def test_means_of_a_role_are_over_all_its_tests_that_have_the_metric(write: Write) -> None:
    more_items = {**ITEMS, "words": [f"w{i}" for i in range(10)], "sums": [f"s{i}" for i in range(5)]}

    def more(cell: Cell, values: dict[str, Any]) -> None:
        values["words"] = {"loss": np.full(10, 1.0), "kl": np.full(10, 0.5 * (cell.arm != "base"))}
        values["sums"] = {"exact_number": np.full(5, 1.0)}

    said = record(list(TEACHES))
    said["config"]["tests"] |= {"words": {"role": "general", "files": ["z"]}, "sums": {"role": "target", "files": ["s"]}}
    cells = write(change=more, items=more_items)
    summary = summarise(cells, said, resamples=300)
    assert summary.gain_metric == "loss"
    for arm in TEACHES:
        own = [one.measurements().values["math"]["kl"].mean() for one in cells if one.cell.arm == arm]
        assert standing(summary, arm).forgetting.mean == pytest.approx((np.mean(own) + 0.5) / 2)  # type: ignore[union-attr]
        assert standing(summary, arm).gain.items == 30
    full = effect(summary, "good", "law", "loss").against["full"]
    assert full is not None
    assert full.verdict == "win"
    assert standing(summary, "good").verdicts["full"]["win"] == 2  # loss of law, kl of math
    assert standing(summary, "full").verdicts["full"] == {"win": 0, "tie": 0, "loss": 0, "unjudged": 0}


def test_without_kl_forgetting_is_the_metric_that_the_general_tests_have(write: Write) -> None:
    def choose(cell: Cell, values: dict[str, Any]) -> None:
        values["math"] = {"choice": np.full(20, 0.5)}

    summary = summarise(write(change=choose), record(list(TEACHES)), resamples=300)
    assert (summary.gain_metric, summary.forgetting_metric) == ("loss", "choice")


def test_overlaps_by_hand(write: Write) -> None:
    names, rows = summarise(write(), record(list(TEACHES)), resamples=200).overlaps["10%"]
    assert list(names) == ["random", "good", "same", "bad"]
    assert rows[0][0] == 1.0
    assert rows[0][1] == pytest.approx(1 / 7)


def test_tables_hold_the_numbers(write: Write) -> None:
    summary = summarise(write(), record(list(TEACHES)), resamples=300)
    rows = list(csv.DictReader(io.StringIO(effects_csv(summary))))
    assert len(rows) == len(summary.effects)
    for row, e in zip(rows, summary.effects, strict=True):
        assert float(row["mean"]) == e.mean
        found = e.against["random"]
        assert row["verdict_random"] == (found.verdict if found else "")
    for row, one in zip(csv.DictReader(io.StringIO(standings_csv(summary))), summary.standings, strict=True):
        assert (row["arm"], float(row["gain_low"]), float(row["train_seconds"])) == (one.arm, one.gain.low, 10.0)
        assert (float(row["step_seconds"]), float(row["surgery_step_seconds"])) == (10 / 5, 1 / 5)  # 5 steps
        assert (row["over_random"] == "") == (one.over_random is None)
    text = markdown(summary)
    assert text.count("| 10 s | 2 s (surgery 0.2 s) |") == len(TEACHES)
    page = render(summary, {})
    assert page.count('<td class="n">2 s (surgery 0.2 s)</td>') == len(TEACHES)
    assert interval(standing(summary, "good").over_random, verdict=True) in text
    assert "| 40 | 5 | 4 s | 10 s |" in text
    assert "full added, because no comparison may lack them" in text


def test_forgetting_less_at_the_same_gain_is_in_the_headline(write: Write) -> None:
    def teach_the_same(cell: Cell, values: dict[str, Any]) -> None:
        if cell.arm == "good":
            noise = np.random.default_rng(7 + (cell.seed or 0))
            values["law"]["loss"] += 0.2 + 0.3 * noise.standard_normal(30)

    summary = summarise(write(change=teach_the_same), record(list(TEACHES)), resamples=300)
    by_chance = {one.arm for one in summary.better("equal_steps") if one.other == "random 10%"} - {"good 10%"}
    assert by_chance == {"same 10%"}  # whose draws happen to be so
    assert headline(summary) == "No method taught more than random, 2 of 3 choices forgot less"


def test_every_two_arms_are_held_against_each_other(write: Write) -> None:
    summary = summarise(write(), record(list(TEACHES)), resamples=300)
    pairs = {(pair.arm, pair.other): pair for one in summary.pairs for pair in (one, one.turned)}
    assert len(pairs) == 2 * summary.pairs_of("equal_steps") == len(TEACHES) * (len(TEACHES) - 1)
    for (arm, other), pair in pairs.items():
        a, b = arm.split()[0], other.split()[0]
        assert pair.keeping is not None
        assert pair.gain.mean == pytest.approx(TEACHES[a] - TEACHES[b], abs=0.05)
        assert pair.keeping.mean == pytest.approx(FORGETS[b] - FORGETS[a], abs=0.05)
    over_random, gained = standing(summary, "good").over_random, pairs["good 10%", "random 10%"].gain
    assert over_random is not None
    assert (gained.mean, gained.low, gained.high) == (over_random.mean, over_random.low, over_random.high)
    better = {(one.arm, one.other) for one in summary.better("equal_steps")}
    assert ("good 10%", "random 10%") in better
    assert {("random 10%", "good 10%"), ("bad 10%", "good 10%"), ("good 10%", "bad 10%")}.isdisjoint(better)
    text, rows = markdown(summary), list(csv.DictReader(io.StringIO(pairs_csv(summary))))
    assert f"| good 10% | random 10% | {interval(gained)} |" in text
    assert f"{len(better)} of {len(pairs) // 2} pairs" in text
    assert "of twenty pairs without a difference about two are expected here" in text
    assert len(rows) == len(summary.pairs)
    assert float(rows[0]["minus_keeping"]) == summary.pairs[0].keeping.mean  # type: ignore[union-attr]
    assert "pairs.csv" in render(summary, figures(summary))


@pytest.mark.parametrize(
    ("mean", "low", "high", "text"),
    [
        (1.25, -0.5, 3.0, "+1.25 [−0.50, +3.00]"),
        (0.0312, 0.01, 0.05, "+0.0312 [+0.0100, +0.0500]"),
        (0.0, 0.0, 0.0, "+0.00 [+0.00, +0.00]"),
        (0.0042, 0.0011, 0.0073, "+0.0042 [+0.0011, +0.0073]"),
        (3e-5, 1e-5, 4.9e-5, "+0.000030 [+0.000010, +0.000049]"),
    ],
)
def test_intervals_are_written_with_the_digits_they_need(mean: float, low: float, high: float, text: str) -> None:
    from gradsieve.compare.statistics import Estimate

    assert interval(Estimate(mean, low, high, 3, 9)) == text
    assert interval(None) == "–"


def test_figures_are_documents_that_hold_every_arm(write: Write) -> None:
    summary = summarise(write(), record(list(TEACHES)), resamples=200)
    drawn = figures(summary)
    assert set(drawn) == {
        "pareto-equal_steps", "gain-equal_steps", "forgetting-equal_steps", "cost-equal_steps", "overlap-10pct",
    }  # fmt: skip
    for name, svg in drawn.items():
        root = ET.fromstring(svg)
        texts = " ".join("".join(e.itertext()) for e in root.iter() if e.tag.endswith("text"))
        assert all(arm in texts for arm in TEACHES if not (name.startswith("overlap") and arm == "full"))
        width, height = map(float, root.attrib["viewBox"].split()[2:])
        for x, y in re.findall(r"translate\((\S+) (\S+)\)", svg):
            assert 0 <= float(x) <= width
            assert 0 <= float(y) <= height
    points = re.findall(r'translate\(([\d.]+) ([\d.]+)\)"[^>]*><title>(\w+)', drawn["pareto-equal_steps"])
    places = {arm: (float(x), float(y)) for x, y, arm in points}
    assert places["good"][1] < places["random"][1] < places["bad"][1]  # more gain is higher up
    assert places["bad"][0] < places["good"][0] < places["random"][0] < places["full"][0]  # more forgetting is further right


def test_figures_by_budget_go_from_the_smallest_to_the_largest_and_stand_at_their_values(write: Write) -> None:
    def teach_more(cell: Cell, values: dict[str, Any]) -> None:
        if cell.budget == "50%":
            values["law"]["loss"] -= 0.3
            values["math"]["kl"] += 0.3

    cells = write(change=teach_more, budgets={"10%": 40, "50%": 200, "5%": 20})
    summary = summarise(cells, record(list(TEACHES)), resamples=200)
    for name, what in (("gain", "gain"), ("forgetting", "forgetting")):
        svg = figures(summary)[f"{name}-equal_steps"]
        ticks = re.findall(r'<text x="([\d.]+)" y="[\d.]+"[^>]*text-anchor="middle"[^>]*>(\d+%)<', svg)
        assert [budget for _, budget in sorted(ticks, key=lambda tick: float(tick[0]))] == ["5%", "10%", "50%"]
        found = re.findall(r'translate\(([\d.]+) ([\d.]+)\)"[^>]*><title>(\w+) (\d+%): gain', svg)
        points = {(arm, budget): (float(x), float(y)) for x, y, arm, budget in found}
        assert set(points) == {(arm, budget) for arm in TEACHES if arm != "full" for budget in ("5%", "10%", "50%")}
        values = {(one.arm, one.budget): getattr(one, what).mean for one in summary.standings if one.budget}
        ordered = sorted(points, key=lambda key: -values[key])
        assert [points[key][1] for key in ordered] == sorted(y for _, y in points.values())  # more is higher up
        for arm in ("random", "good"):
            assert points[arm, "5%"][0] < points[arm, "10%"][0] < points[arm, "50%"][0]
        (level,) = re.findall(r'y1="([\d.]+)"[^>]*stroke-dasharray', svg)  # of full
        full = getattr(standing(summary, "full"), what).mean
        assert [float(level) < points[key][1] for key in points] == [full > values[key] for key in points]


def test_answers_are_shown_side_by_side_each_arms_at_its_largest_budget(write: Write) -> None:
    cells = write(budgets={"5%": 20, "50%": 200, "10%": 40})
    summary = summarise(cells, record(list(TEACHES)), resamples=200)
    expected = {"base": "base", "full": "full"} | {f"{a} 50%": f"{a}50%" for a in TEACHES if a != "full"}
    assert {label: answers[0]["answer"] for label, answers in summary.generations} == expected
    page = render(summary, figures(summary))
    assert page.count("<h3>Prompt</h3>") == 1  # one question, whatever the number of arms
    assert all(f'<h3><bdi>{label}</bdi></h3><p dir="auto">{answer}</p>' in page for label, answer in expected.items())
    other = [(label, [*answers, answers[0] | {"test": "tax", "prompt": "Who?"}]) for label, answers in summary.generations]
    page = render(replace(summary, generations=other), {})  # another test may have an item of the same id
    assert page.count("<h3>Prompt</h3>") == 2


def test_the_page_holds_the_results_and_escapes_the_data(write: Write) -> None:
    hostile = "<script>window.hit = 1</script>"
    summary = summarise(write(hostile=hostile), record(list(TEACHES), hostile), resamples=200)
    page = render(summary, figures(summary))
    assert "1 of 3 choices beat random" in page
    assert interval(standing(summary, "good").over_random) in page
    assert "<script" not in page
    assert "&lt;script&gt;window.hit" in page
    assert page.count("<svg") == 5
    assert page == render(summary, figures(summary))
