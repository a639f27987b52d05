"""The studies' data: faults are what they say, and nothing stands on two sides; the studies' files can be read."""

import gzip
import importlib.util
import json
import random
import re
from pathlib import Path
from typing import Any

import pytest

from gradsieve.compare import load_config

STUDIES = Path(__file__).parents[2] / "studies"
SMALL = {
    "sound": 30,
    "target": 8,
    "anchor": 6,
    "swapped": 8,
    "off-domain": 6,
    "near-duplicate": 5,
    "false-arithmetic": 4,
    "mixed-numbers": 3,
}


def load() -> Any:
    spec = importlib.util.spec_from_file_location("prepare", STUDIES / "prepare.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


prepare = load()


def words(rng: random.Random, count: int) -> str:
    return " ".join("".join(rng.choice("abcdefghijklmnop") for _ in range(6)) for _ in range(count))


def rows(name: str, count: int) -> list[dict[str, Any]]:
    rng = random.Random(name)
    made = []
    for i in range(count):
        answer = f"{words(rng, 6)}. {words(rng, 5)} {rng.randint(2, 40)} and {rng.randint(50, 99)}. {words(rng, 4)}."
        if name.startswith("math"):
            a, b = rng.randint(2, 40), rng.randint(2, 40)
            answer = f"{words(rng, 5)} {a}*{b} = {a * b}\n#### {a * b}"
        made.append({"id": f"{name}-{i}", "prompt": f"What is {words(rng, 6)}?", "completion": answer, "topic": f"t{i // 2}"})
    return made


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    source, out = tmp_path_factory.mktemp("sets"), tmp_path_factory.mktemp("data")
    for name in ("medicine", "law", "finance", "general", "math"):
        for part, count in (("train", 130), ("test", 8)):
            made = rows(f"{name}.{part}", count)
            if part == "train" and name == "medicine":
                made[0] = {**rows("medicine.test", 8)[0], "id": "stolen"}
                made[1]["completion"] = "long " * 300
                made[2] |= {"kind": "crossref"}
            with gzip.open(source / f"{name}.{part}.jsonl.gz", "wt") as file:
                file.writelines(json.dumps(row) + "\n" for row in made)
    prepare.prepare(source, out, [0, 1], SMALL)
    return out


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_pool_has_the_kinds_asked_for_and_ids_that_tell_nothing(data: Path) -> None:
    pool = read(data / "medicine" / "pool-0.jsonl")
    kinds = [row["planted"] for row in pool]
    assert {kind: kinds.count(kind) for kind in kinds} == {"clean": 30, **{k: SMALL[k] for k in prepare.FAULTS}}
    assert len({row["id"] for row in pool}) == len(pool)
    assert all(re.fullmatch("[0-9a-f]{16}", row["id"]) for row in pool)
    assert kinds != sorted(kinds)
    assert pool != read(data / "medicine" / "pool-1.jsonl")
    assert read(data / "medicine" / "small-0.jsonl") == pool[:150]


def test_nothing_stands_on_two_sides(data: Path) -> None:
    from gradsieve.compare.leaks import find_leaks

    for domain in prepare.DOMAINS:
        sides = {
            "pool": read(data / domain / "pool-0.jsonl"),
            "target": read(data / domain / "target.jsonl"),
            "anchor": read(data / "anchor.jsonl"),
            "test": read(data / domain / "test.jsonl"),
            "test general": read(data / "general.jsonl"),
            "test math": read(data / "math.jsonl"),
        }
        examples = {name: [prepare.example(row, f"{name}{i}") for i, row in enumerate(side)] for name, side in sides.items()}
        assert find_leaks(examples, [name for name in sides if name.startswith("test")]) == []
        target = {prepare.topic(row) for row in sides["target"]}
        own = [row for row in sides["pool"] if row["planted"] in ("clean", "near-duplicate", "mixed-numbers")]
        assert not target & {prepare.topic(row) for row in own}
    sources = {row["source_id"] for seed in (0, 1) for row in read(data / "medicine" / f"pool-{seed}.jsonl")}
    assert not sources & {"stolen", "medicine.train-1"}
    assert "medicine.train-2" not in {row["id"] for row in read(data / "medicine" / "target.jsonl")}


def test_a_question_that_is_asked_behind_a_wall_goes_after_the_draws_and_no_earlier() -> None:
    drawn, wall = rows("pool", 6), rows("test", 6)
    drawn[2]["prompt"] = wall[4]["prompt"]
    walls = {"test": wall, "anchor": [wall[4]]}  # on two walls, and alone on each
    assert prepare.apart(drawn, walls) == drawn
    assert prepare.unasked(drawn, walls) == [*drawn[:2], *drawn[3:]]
    assert prepare.unasked(prepare.apart([wall[0], drawn[0]], walls), walls) == [drawn[0]]


def test_faults_are_what_they_say(data: Path) -> None:
    sources = {r["id"]: r for name in ("law", "medicine", "finance", "math") for r in rows(f"{name}.train", 130)}
    for row in read(data / "law" / "pool-0.jsonl"):
        source = sources[row["source_id"]]
        if row["planted"] == "clean":
            assert (row["prompt"], row["completion"]) == (source["prompt"], source["completion"])
        elif row["planted"] == "swapped":
            assert row["prompt"] == source["prompt"]
            giver = next(r for r in sources.values() if r["completion"] == row["completion"])
            assert giver["topic"] != source["topic"]
        elif row["planted"] == "off-domain":
            assert source["id"].split(".")[0] in ("medicine", "finance")
            assert row["completion"] == source["completion"]
        elif row["planted"] == "near-duplicate":
            assert row["prompt"] != source["prompt"]
            assert row["completion"] != source["completion"]
            assert set(row["completion"].split()) <= set(source["completion"].split())
        elif row["planted"] == "false-arithmetic":
            (a, b, c), final = re.search(r"(\d+)\*(\d+) = (\d+)", row["completion"]).groups(), row["completion"].split()[-1]
            assert int(c) == int(a) + int(b) != int(a) * int(b) or int(a) == int(b) == 2
            assert final == c
        else:
            numbers = re.findall(r"\d+", source["completion"])
            assert re.findall(r"\d+", row["completion"]) == numbers[::-1]


def test_faults_by_hand() -> None:
    worked = {"completion": "She has 6*2 = 12 pens.\nThen 12-5 = 7 are left.\n#### 7"}
    assert prepare.false_arithmetic(worked)["completion"] == "She has 6*2 = 8 pens.\nThen 12-5 = 17 are left.\n#### 17"
    assert prepare.false_arithmetic({"completion": "no sums"}) is None
    text = {"completion": "In 1990, 2 of 30 (and 2 of 45)."}
    assert prepare.mixed_numbers(text)["completion"] == "In 2, 30 of 45 (and 30 of 1990)."
    assert prepare.mixed_numbers({"completion": "only 5 and 5"}) is None
    assert prepare.near_duplicate({"prompt": "p", "completion": "One."}, random.Random(0)) is None
    rng = random.Random(0)
    assert prepare.reworded('Define "bond" as used in the Act.', rng) in (
        'What does "bond" mean in the Act?',
        'In the Act, how is "bond" defined?',
    )
    assert prepare.reworded("What is gout?", rng) in ("Explain what gout means.", "Tell me about gout.")


def test_sets_that_are_too_small_are_refused() -> None:
    with pytest.raises(SystemExit, match="swapped rows must have no topic with more than half"):
        prepare.swapped([{"id": str(i), "topic": "one", "completion": str(i)} for i in range(4)])
    with pytest.raises(SystemExit, match="target must have 9 rows, got 8"):
        prepare.draw_target(rows("law", 8), 9, random.Random(0))


@pytest.mark.parametrize("path", sorted(STUDIES.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_study_can_be_read_and_names_no_folder_of_its_own(path: Path) -> None:
    config = load_config(path, data="/somewhere")
    files = [*config.pool, *config.target, *config.anchor, *(file for test in config.tests.values() for file in test.files)]
    assert all(file.startswith("/somewhere/") for file in files)
    assert config.data_per_seed
