"""How alike the chosen gradients are, counted pair by pair, and when the run says so."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

import gradsieve as gs
from gradsieve import alignment as module
from gradsieve.alignment import Alignment, alignment, mean_cosine
from gradsieve.types import ArrayGradients, Budget, Problem, Selection


def pairwise(rows: torch.Tensor) -> float:
    n = len(rows)
    pairs = [torch.cosine_similarity(rows[i], rows[j], dim=0).item() for i in range(n) for j in range(n) if i != j]
    return sum(pairs) / len(pairs)


def test_the_mean_cosine_is_that_of_all_pairs() -> None:
    rows = torch.randn(7, 5, generator=torch.Generator().manual_seed(0)) + 0.5
    assert mean_cosine(rows) == pytest.approx(pairwise(rows), rel=1e-5)
    assert mean_cosine(3 * rows[:1].repeat(4, 1)) == pytest.approx(1.0)


def test_pool_and_chosen_by_hand() -> None:
    sketch = torch.tensor([[1.0, 0.0], [2.0, 0.0], [0.0, 1.0], [0.0, -3.0], [0.0, 0.0]])
    pool = ArrayGradients(list("abcde"), sketch)
    found = alignment(pool, torch.tensor([1, 0]), seed=0)
    assert found is not None
    assert found.chosen == pytest.approx(1.0)
    assert found.pool == pytest.approx((1 - 1) / 10)  # a with b agrees, c with d opposes, of ten pairs


def test_without_sketches_or_a_pair_there_is_nothing_to_say() -> None:
    none = ArrayGradients(["a", "b"], torch.empty(2, 0))
    assert alignment(none, torch.tensor([0, 1]), seed=0) is None
    assert alignment(ArrayGradients(["a", "b"], torch.eye(2)), torch.tensor([1]), seed=0) is None


def test_of_many_rows_a_sample_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MOST_ROWS", 400)
    rng = torch.Generator().manual_seed(0)
    sketch = torch.randn(3000, 64, generator=rng) + 0.3
    pool, chosen = ArrayGradients([str(i) for i in range(3000)], sketch), torch.arange(500, 2500)
    asked: list[int] = []

    class Counted(ArrayGradients):
        def rows(self, index: torch.Tensor, checkpoint: str | None = None) -> torch.Tensor:
            asked.append(len(index))
            return super().rows(index, checkpoint)

    found = alignment(Counted(pool.ids, sketch), chosen, seed=0)
    assert asked == [400, 400]
    assert found is not None
    assert found.chosen == pytest.approx(mean_cosine(sketch[chosen]), abs=0.01)


@pytest.mark.parametrize(
    ("pool", "chosen", "says"), [(0.04, 0.14, True), (0.04, 0.08, False), (0.14, 0.2, False), (0.0, 0.06, True)]
)
def test_the_run_says_so_only_where_it_is_plain(pool: float, chosen: float, says: bool) -> None:
    assert Alignment(pool, chosen).one_way is says


def test_the_note_says_what_to_do() -> None:
    assert "mean cosine of 0.14, two of the pool's 0.04; steps add up" in str(Alignment(0.04, 0.14))
    assert "halve the learning rate" in str(Alignment(0.04, 0.14))


@dataclass(frozen=True)
class Named:
    """Takes the rows whose ids it is told."""

    ids: tuple[str, ...]
    needs = frozenset({"sketch"})

    def select(self, problem: Problem, budget: Budget, rng: torch.Generator) -> Selection:
        rows = torch.tensor([list(problem.candidates.ids).index(id) for id in self.ids])
        return Selection(rows, torch.ones(len(rows)), torch.zeros(len(problem.candidates.ids)), {}, ())


def test_a_run_measures_it_and_says_so_where_it_is_plain(tmp_path: Path, tiny_model: Path) -> None:
    same = [{"id": f"same-{i}", "prompt": "Say it.", "completion": "one two three four"} for i in range(4)]
    words = ["red", "green", "ten of them", "it is far away", "nine!", "why not?", "Q", "zzz yyy"]
    other = [{"id": f"other-{i}", "prompt": f"What of {word}?", "completion": word} for i, word in enumerate(words)]
    pool = tmp_path / "pool.jsonl"
    pool.write_text("".join(json.dumps(row) + "\n" for row in same + other))

    def run(ids: tuple[str, ...], out: Path) -> gs.Result:
        return gs.select(Named(ids), model=str(tiny_model), pool=str(pool), budget="4", dim=256, dtype="float32", out=out)

    alike, mixed = (run(tuple(f"{n}-{i}" for i in range(4)), tmp_path / n) for n in ("same", "other"))
    assert alike.alignment is not None
    assert alike.alignment.chosen == pytest.approx(1.0, abs=1e-5)
    assert str(alike.alignment) in alike.notes
    assert mixed.alignment is not None
    assert mixed.alignment.pool == alike.alignment.pool
    assert str(mixed.alignment) not in mixed.notes
    record = json.loads((tmp_path / "same" / "run.json").read_text())
    assert record["selection"]["mean_cosine"] == {"pool": alike.alignment.pool, "chosen": alike.alignment.chosen}
    assert str(alike.alignment) in record["notes"]
