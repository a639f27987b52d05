"""Figures of standings that are made up, element by element."""

import math
import re
import xml.etree.ElementTree as ET
from collections.abc import Callable, Sequence
from typing import Any, get_args

import pytest

from gradsieve.compare.figures import LEFT, WIDTH, by_budget, costs, looks, overlaps, pareto
from gradsieve.compare.labels import DOT, place, width
from gradsieve.compare.statistics import Estimate
from gradsieve.compare.summary import Standing
from gradsieve.compare.units import UNITS, forgetting_words, gain_words, unit, with_unit
from gradsieve.evaluate.measure import Metric

SVG = "{http://www.w3.org/2000/svg}"
SECONDS = {"gradients": 40.0, "select": 10.0, "train": 100.0, "evaluate": 20.0, "surgery": 30.0}


def standing(arm: str, budget: str | None = "10%", gain: float = 0.1, forgetting: float = 0.05, **changes: Any) -> Standing:
    values: dict[str, Any] = {
        "arm": arm,
        "budget": budget,
        "view": "equal_steps",
        "gain": Estimate(gain, gain - 0.02, gain + 0.03, 3, 9),
        "over_random": None,
        "forgetting": Estimate(forgetting, forgetting - 0.01, forgetting + 0.02, 3, 9),
        "on_front": False,
        "front_share": 0.5,
        "verdicts": {"random": {}, "full": {}},
        "examples": 10.0,
        "steps": 5.0,
        "seconds": SECONDS,
        "seeds": 3,
    }
    return Standing(**values | changes)


def drawn(standings: Sequence[Standing], *, base: bool = True) -> ET.Element:
    return ET.fromstring(pareto(standings, looks([one.arm for one in standings]), "up", "right", base=base))


def marks(root: ET.Element) -> dict[str, tuple[float, float, dict[str, str]]]:
    """Place and attributes of each mark by what its title begins with; of those without a title by nothing."""
    found = {}
    for path in root.iter(f"{SVG}path"):
        x, y = map(float, re.findall(r"-?[\d.]+", path.attrib["transform"]))
        found[path.findtext(f"{SVG}title", "").partition(":")[0]] = (x, y, path.attrib)
    return found


def lines(root: ET.Element, colour: str, wide: str = "") -> list[tuple[float, ...]]:
    found = [line.attrib for line in root.iter(f"{SVG}line") if line.attrib["stroke"] == colour]
    found = [line for line in found if line["stroke-width"] == wide or not wide]
    return [tuple(float(line[end]) for end in ("x1", "y1", "x2", "y2")) for line in found]


def texts(root: ET.Element) -> list[ET.Element]:
    return list(root.iter(f"{SVG}text"))


def cluster(count: int) -> list[Standing]:
    """Arms that lie within a few pixels of each other, and one far away."""
    near = [
        standing(f"some-method-{i}", gain=0.14 + 0.004 * math.sin(5 * i), forgetting=0.05 + 0.004 * math.cos(3 * i))
        for i in range(count - 1)
    ]
    return [*near, standing("far", gain=0.3, forgetting=0.2)]


@pytest.mark.parametrize("count", [2, 12, 20])
def test_labels_of_a_cluster_lie_on_no_mark_and_on_no_other_label_and_are_tied_to_their_point(count: int) -> None:
    standings = cluster(count)
    root = drawn(standings)
    points = {name or "base": (x, y) for name, (x, y, _) in marks(root).items()}
    assert len(points) == count + 1
    labels = {text.text or "": text for text in texts(root) if text.text in points}
    assert set(labels) == set(points)
    boxes = {}
    for name, text in labels.items():
        x, y = float(text.attrib["x"]), float(text.attrib["y"])
        boxes[name] = (x, y - 11, x + width(name), y + 3)
        assert LEFT <= x <= x + width(name) <= WIDTH
    for name, (left, top, right, bottom) in boxes.items():
        for other, (a, b, c, d) in boxes.items():
            assert other == name or left >= c or a >= right or top >= d or b >= bottom, (name, other)
        for x, y in points.values():
            assert not (left - DOT < x < right + DOT and top - DOT < y < bottom + DOT), name
    look = looks([one.arm for one in standings])
    for one in standings:
        (x, y), (left, top, right, bottom) = points[one.label], boxes[one.label]
        way = math.dist((x, y), (min(max(x, left), right), min(max(y, top), bottom)))
        leaders = [end for end in lines(root, look[one.arm].colour, "0.8") if math.dist(end[:2], (x, y)) < DOT]
        tied = [end for end in leaders if left - 0.1 <= end[2] <= right + 0.1 and top - 0.1 <= end[3] <= bottom + 0.1]
        assert way <= 14 or tied, (one.label, way)


def test_a_lone_label_stands_beside_its_point_without_a_line() -> None:
    (found,) = place([(300, 200)], ["one"], [], (0, 0, 720, 400))
    assert found.leader is None
    assert math.dist((300, 200), (min(max(300, found.box[0]), found.box[2]), min(max(200, found.box[1]), found.box[3]))) < 10
    wide = place([(5, 5)], ["字" * 10], [], (0, 0, 720, 400))[0].box
    assert wide[0] >= 0
    assert wide[2] - wide[0] == 125


def test_labels_keep_off_marks_without_bars_to_keep_them_off() -> None:
    points = [(100.0 + 22 * i, 200.0 + 12 * j) for i in range(8) for j in range(3)]
    for found in place(points, ["label"] * len(points), [], (0, 0, 720, 400)):
        left, top, right, bottom = found.box
        assert not any(left - DOT < x < right + DOT and top - DOT < y < bottom + DOT for x, y in points)


def test_every_arm_is_drawn_differently_and_everywhere_alike() -> None:
    arms = ["base", "full", "random", *(f"m{i}" for i in range(40))]
    look = looks(arms)
    assert len({(one.colour, one.shape) for one in look.values()}) == len(arms)
    baselines = [look[arm] for arm in ("base", "full", "random")]
    assert len({one.shape for one in baselines} | {look[arm].shape for arm in arms[3:]}) == 3 + 7
    assert looks(arms[::-1])["random"] == look["random"]
    few = ["random", "a", "b", "c"]
    standings = [standing(arm, budget, gain=0.1 * i) for i, arm in enumerate(few) for budget in ("10%", "50%")]
    drawn_pareto, budgets = drawn(standings), ET.fromstring(by_budget(standings, looks(few), "gain", "gain"))
    shapes = [
        {name: (a["d"], a["stroke"]) for name, (_, _, a) in marks(root).items() if name} for root in (drawn_pareto, budgets)
    ]
    assert shapes[0] == shapes[1]
    assert len(set(shapes[0].values())) == len(few)
    key = [text for text in texts(budgets) if text.text in few]
    paths = [path for path in budgets.iter(f"{SVG}path") if not len(path)]
    assert [(path.attrib["d"], path.attrib["stroke"]) for path in paths] == [shapes[0][f"{text.text} 10%"] for text in key]


def test_the_front_is_filled_and_joined_and_both_intervals_are_drawn() -> None:
    standings = [standing("a", gain=0.3, forgetting=0.2, on_front=True), standing("b", gain=0.1, forgetting=0.3)]
    root, look = drawn(standings), looks(["a", "b"])
    found = marks(root)
    assert found["a 10%"][2]["fill"] == look["a"].colour
    assert found["b 10%"][2]["fill"] == "none"
    base, a = found[""], found["a 10%"]
    (joined,) = [line.attrib["points"] for line in root.iter(f"{SVG}polyline")]
    assert joined == f"{base[0]:.1f},{base[1]:.1f} {a[0]:.1f},{a[1]:.1f}"
    right, up = (a[0] - base[0]) / 0.2, (base[1] - a[1]) / 0.3  # pixels per nat
    for one in standings:
        x, y, _ = found[one.label]
        assert one.forgetting is not None
        expected = [
            (base[0] + right * one.forgetting.low, y, base[0] + right * one.forgetting.high, y),
            (x, base[1] - up * one.gain.low, x, base[1] - up * one.gain.high),
        ]
        for bar in expected:
            assert any(end == pytest.approx(bar, abs=0.3) for end in lines(root, look[one.arm].colour)), (one.label, bar)


def test_intervals_by_budget_are_drawn_and_marks_stand_over_their_budget() -> None:
    standings = [
        standing("a", "10%", examples=10),
        standing("a", "50%", gain=0.4, examples=50),
        standing("b", "50%", examples=50),
    ]
    look = looks(["a", "b"])
    for what in ("gain", "forgetting"):
        root = ET.fromstring(by_budget(standings, look, what, "title"))
        found = marks(root)
        ticks = {text.text or "": float(text.attrib["y"]) - 4 for text in texts(root) if text.attrib["text-anchor"] == "end"}
        values = {float(text.replace("−", "-")): y for text, y in ticks.items() if re.fullmatch(r"−?[\d.]+", text)}
        low, high = min(values), max(values)
        for one in standings:
            x, y, _ = found[one.label]
            e = one.gain if what == "gain" else one.forgetting
            assert e is not None
            at = [values[low] + (v - low) / (high - low) * (values[high] - values[low]) for v in (e.low, e.high, e.mean)]
            assert y == pytest.approx(at[2], abs=0.3)
            assert any(end == pytest.approx((x, at[0], x, at[1]), abs=0.3) for end in lines(root, look[one.arm].colour))
        middle = {text.text: float(text.attrib["x"]) for text in texts(root) if text.attrib["text-anchor"] == "middle"}
        assert found["a 10%"][0] == middle["10%"]
        assert found["a 50%"][0] < middle["50%"] < found["b 50%"][0]


def test_axes_say_what_they_are_and_in_which_unit() -> None:
    standings = [standing("a")]
    said = [text.text for text in texts(drawn(standings))]
    assert {"up", "right"} <= set(said)
    assert gain_words("loss") == "Gain: fall of loss on the target tests, nats per token"
    assert gain_words("key_accuracy") == "Gain: rise of key_accuracy on the target tests, share"
    assert forgetting_words("kl") == "Forgetting: KL to the untouched model on the general tests, nats per token"
    assert forgetting_words("loss") == "Forgetting: rise of loss on the general tests, nats per token"
    assert forgetting_words("choice") == "Forgetting: fall of choice on the general tests, share"


def test_every_metric_of_ours_has_a_unit() -> None:
    assert set(get_args(Metric)) <= set(UNITS)
    assert (unit("exact_match,strict-match"), unit("no_such")) == ("share", "")
    assert (with_unit("gain", "bleu"), with_unit("gain", "no_such")) == ("gain (0 to 100)", "gain")


def test_bars_of_costs_are_as_wide_as_the_seconds() -> None:
    root = ET.fromstring(costs([standing("a"), standing("b", seconds=dict.fromkeys(SECONDS, 0.0) | {"train": 85.0})]))
    bars = {bar.findtext(f"{SVG}title", ""): float(bar.attrib["width"]) for bar in root.iter(f"{SVG}rect") if len(bar)}
    assert set(bars) == {
        *("a 10%: gradients 40.0 s", "a 10%: select 10.0 s", "a 10%: train 70.0 s", "a 10%: surgery 30.0 s"),
        *("a 10%: evaluate 20.0 s", "b 10%: train 85.0 s"),
    }
    for title, wide in bars.items():
        assert wide == pytest.approx(bars["a 10%: train 70.0 s"] * float(title.split()[-2]) / 70, abs=0.2), title
    colours = {bar.findtext(f"{SVG}title", "").split()[2]: bar.attrib["fill"] for bar in root.iter(f"{SVG}rect") if len(bar)}
    key = [bar.attrib["fill"] for bar in root.iter(f"{SVG}rect") if not len(bar)]
    names = [text.text for text in texts(root) if text.text in colours]
    assert dict(zip(names, key, strict=True)) == colours
    assert {"2 min 50 s", "1 min 25 s"} <= {text.text for text in texts(root)}


def test_names_and_columns_of_overlaps_are_within_the_picture() -> None:
    names = [f"a-method-of-a-long-name-{i:02}-50%" for i in range(26)]
    root = ET.fromstring(overlaps(names, [[0.5] * 26] * 26))
    width, height = map(float, root.attrib["viewBox"].split()[2:])
    assert max(float(bar.attrib["x"]) + float(bar.attrib["width"]) for bar in root.iter(f"{SVG}rect")) <= width
    slanted = [group[0] for group in root.iter(f"{SVG}g") if "rotate(-40" in group.attrib.get("transform", "")]
    assert len(slanted) == 26
    for text in slanted:  # it ends at its place and comes from below on the left
        reach = 7.2 * len(text.text or "")
        assert float(text.attrib["y"]) + reach * math.sin(math.radians(40)) <= height
        assert float(text.attrib["x"]) - reach * math.cos(math.radians(40)) >= 0


def test_overlaps_are_printed_where_they_belong(contrast: Callable[[str, str], float]) -> None:
    rows = [[1.0, 0.25, 0.07], [0.25, 1.0, math.nan], [0.07, math.nan, 1.0]]
    root = ET.fromstring(overlaps(["a", "b", "c"], rows))
    cells = {bar.findtext(f"{SVG}title", ""): bar.attrib for bar in root.iter(f"{SVG}rect")}
    assert len(cells) == 7
    for i, one in enumerate("abc"):
        for j, other in enumerate("abc"):
            if math.isnan(rows[i][j]):
                continue
            cell = cells[f"{one} and {other}: {rows[i][j]:.2f}"]
            left, top, side = (float(cell[name]) for name in ("x", "y", "width"))
            inside = [
                text
                for text in texts(root)
                if left < float(text.attrib["x"]) < left + side and top < float(text.attrib["y"]) < top + side
            ]
            (number,) = inside
            assert number.text == {1.0: "1.00", 0.25: ".25", 0.07: ".07"}[rows[i][j]]
            assert contrast(cell["fill"], number.attrib["fill"]) > 4.5
    shades = [contrast(cells[f"a and {other}"]["fill"], "#000000") for other in ("a: 1.00", "b: 0.25", "c: 0.07")]
    assert shades == sorted(shades)


def test_hostile_names_are_text_in_every_figure() -> None:
    hostile = "</text><script>hit()</script>\"'&|`\x1b[31m\x00\ud800\uffff"
    standings = [standing(hostile), standing("b")]
    look = looks([hostile, "b"])
    documents = [
        pareto(standings, look, hostile, hostile, base=True),
        by_budget(standings, look, "gain", hostile),
        costs(standings),
        overlaps([hostile, "b"], [[1.0, 0.5], [0.5, 1.0]]),
    ]
    for document in documents:
        root = ET.fromstring(document.encode())
        assert {e.tag.removeprefix(SVG) for e in root.iter()} <= {
            "svg",
            "title",
            "text",
            "line",
            "polyline",
            "path",
            "rect",
            "g",
        }
        assert any((text.text or "").startswith("</text><script>hit()</script>\"'&|`␛[31m␀��") for text in texts(root))
        assert all(not name.lower().startswith("on") for e in root.iter() for name in e.attrib)
