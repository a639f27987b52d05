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
