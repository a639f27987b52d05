"""Who published a row, what share of the chosen is whose, and a target in the proportions of the tests."""

import random
import runpy
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

STUDIES = Path(__file__).parents[2] / "studies"


@pytest.fixture(scope="module")
def script() -> Callable[[str], dict[str, Any]]:
    """Returns what a script defines; they import one another as they stand in their folder."""

    def names(name: str) -> dict[str, Any]:
        with pytest.MonkeyPatch.context() as patch:
            patch.syspath_prepend(str(STUDIES))
            return runpy.run_path(str(STUDIES / name))

    return names


def test_a_source_is_known_by_who_published_it(script: Callable[[str], dict[str, Any]]) -> None:
    made = script("spread.py")
    rows = [{"source": "acts/eng 1"}, {"source": "acts/fre 2"}, {"source": "glossary of terms"}]
    assert [made["publisher"](row) for row in rows] == ["acts", "acts", "glossary"]
    assert made["share"](rows, "acts") == pytest.approx(2 / 3)


def rows(name: str, count: int) -> list[dict[str, str]]:
    return [{"id": f"{name}-{i}", "source": f"{name}/set {i}"} for i in range(count)]


def test_publishers_stand_as_in_the_tests(script: Callable[[str], dict[str, Any]]) -> None:
    made = script("even_target.py")
    pool = rows("acts", 30) + rows("terms", 30) + rows("others", 9)
    drawn = made["even"](pool, Counter({"acts": 69, "terms": 31}), 10, random.Random(0))
    assert Counter(map(made["publisher"], drawn)) == {"acts": 7, "terms": 3}
    assert len({row["id"] for row in drawn}) == 10
    thirds = made["even"](pool, Counter({"acts": 1, "terms": 1, "others": 1}), 8, random.Random(0))
    assert sorted(Counter(map(made["publisher"], thirds)).values()) == [2, 3, 3]


def test_a_source_with_too_little_is_named(script: Callable[[str], dict[str, Any]]) -> None:
    with pytest.raises(SystemExit, match="terms must have 5 usable rows in the target's topics, got 4"):
        script("even_target.py")["even"](
            rows("acts", 9) + rows("terms", 4), Counter({"acts": 1, "terms": 1}), 10, random.Random(0)
        )


def pool(name: str, count: int) -> list[dict[str, str]]:
    return [{**row, "planted": "swapped" if place % 5 == 0 else "clean"} for place, row in enumerate(rows(name, count))]


def test_a_third_of_a_mixed_pool_is_of_its_domain(script: Callable[[str], dict[str, Any]]) -> None:
    strangers = [{**row, "planted": "off-domain"} for row in rows("strange", 9)]
    pools = {"medicine": pool("medicine", 30), "law": pool("law", 30) + strangers, "finance": pool("finance", 30)}
    drawn = script("mixed_pool.py")["mixed"](pools, "law", 50, random.Random(0))
    places = Counter(row["source"].split("/")[0] for row in drawn)
    assert places == {"medicine": 16, "law": 18, "finance": 16}
    assert {row["planted"] for row in drawn if row["source"].startswith("law")} == {"clean", "swapped"}
    assert {row["planted"] for row in drawn if not row["source"].startswith("law")} == {"off-domain"}
    assert len({row["id"] for row in drawn}) == 50
    assert [row["source"] for row in drawn] != sorted(row["source"] for row in drawn)


def test_a_pool_too_small_to_mix_is_named(script: Callable[[str], dict[str, Any]]) -> None:
    with pytest.raises(SystemExit, match="the pool of law must have 16 rows of its own, got 9"):
        script("mixed_pool.py")["mixed"](
            {"medicine": pool("m", 30), "law": pool("l", 9), "finance": pool("f", 30)}, "finance", 50, random.Random(0)
        )
