"""A target in the proportions of the tests: counted by hand, and refused where a source has too little."""

import random
import runpy
from collections import Counter
from pathlib import Path

import pytest

STUDIES = Path(__file__).parents[2] / "studies"


@pytest.fixture(scope="module")
def made() -> dict[str, object]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(STUDIES))
        return runpy.run_path(str(STUDIES / "even_target.py"))


def rows(name: str, count: int) -> list[dict[str, str]]:
    return [{"id": f"{name}-{i}", "source": f"{name}/set {i}"} for i in range(count)]


def test_publishers_stand_as_in_the_tests(made: dict) -> None:
    pool = rows("acts", 30) + rows("terms", 30) + rows("others", 9)
    drawn = made["even"](pool, Counter({"acts": 69, "terms": 31}), 10, random.Random(0))
    assert Counter(map(made["publisher"], drawn)) == {"acts": 7, "terms": 3}
    assert len({row["id"] for row in drawn}) == 10
    thirds = made["even"](pool, Counter({"acts": 1, "terms": 1, "others": 1}), 8, random.Random(0))
    assert sorted(Counter(map(made["publisher"], thirds)).values()) == [2, 3, 3]


def test_a_source_with_too_little_is_named(made: dict) -> None:
    with pytest.raises(SystemExit, match="terms must have 5 usable rows in the target's topics, got 4"):
        made["even"](rows("acts", 9) + rows("terms", 4), Counter({"acts": 1, "terms": 1}), 10, random.Random(0))
