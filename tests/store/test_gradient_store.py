import json
import random
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gradsieve.errors import StoreError, StoreMismatch
from gradsieve.store import GradientStore, Manifest
from gradsieve.store.shards import pack_sketch


def keys(n: int, tag: str = "") -> list[bytes]:
    return [f"{tag}{i}".encode().rjust(16, b"0") for i in range(n)]


def in_threes(positions: list[int]) -> list[list[int]]:
    return [positions[i : i + 3] for i in range(0, len(positions), 3)]


def sketch_of(key: bytes) -> torch.Tensor:
    return torch.randn(8, generator=torch.Generator().manual_seed(int.from_bytes(key, "big") % 2**31))


def fill(store: GradientStore, wanted: list[bytes]) -> list[int]:
    done = []
    for unit in store.pending(store.plan(wanted, in_threes)):
        sketch = torch.stack([sketch_of(key) for key in unit.keys])
        store.commit(unit, {"base": sketch}, {"norm": sketch.double().norm(dim=1)})
        done.append(unit.number)
    return done


def manifest(seed: int = 0) -> Manifest:
    return Manifest({"model": "abc", "sketch": {"dim": 8, "seed": seed}})


def content(store: GradientStore) -> dict[str, bytes]:
    return {str(p.relative_to(store.directory)): p.read_bytes() for p in store.directory.rglob("*") if p.is_file()}


def test_rows_come_back_in_the_order_asked_for(tmp_path: Path) -> None:
    store = GradientStore(tmp_path / "s", manifest())
    fill(store, keys(10))
    order = random.Random(0).sample(keys(10), 10)
    view = store.view([k.decode() for k in order], order, {"tokens": torch.arange(10.0)})
    expected = torch.stack([sketch_of(key) for key in order])
    seen = torch.full_like(expected, torch.nan)
    for rows, block in view.blocks():
        seen[rows] = block
    assert (seen - expected).norm() / expected.norm() < 3e-4
    assert torch.equal(view.rows(torch.tensor([7, 0, 7])), seen[[7, 0, 7]])
    assert view.rows(torch.zeros(0, dtype=torch.long)).shape == (0, 8)
    assert torch.equal(view.columns["norm"], expected.double().norm(dim=1))
    assert view.columns["tokens"].tolist() == list(range(10))
    assert (view.dim, view.checkpoints) == (8, ("base",))


def test_repeated_examples_share_a_row_and_are_computed_once(tmp_path: Path) -> None:
    store = GradientStore(tmp_path / "s", manifest())
    fill(store, [*keys(4), *keys(4)])
    assert sum(len(unit.keys) for unit in store.units()) == 4
    view = store.view([str(i) for i in range(8)], [*keys(4), *keys(4)])
    assert torch.equal(view.rows(torch.arange(4)), view.rows(torch.arange(4, 8)))


@pytest.mark.parametrize("kept", [0, 1, 2])
def test_a_run_killed_after_any_shard_ends_with_the_same_bytes(tmp_path: Path, kept: int) -> None:
    whole = GradientStore(tmp_path / "whole", manifest())
    fill(whole, keys(10))
    cut = GradientStore(tmp_path / "cut", manifest())
    units = cut.plan(keys(10), in_threes)
    for unit in units[:kept]:
        sketch = torch.stack([sketch_of(key) for key in unit.keys])
        cut.commit(unit, {"base": sketch}, {"norm": sketch.double().norm(dim=1)})
    (cut.directory / "shards" / ".00000003.safetensors.99.tmp").write_bytes(b"half")
    assert fill(GradientStore(tmp_path / "cut", manifest()), keys(10)) == [unit.number for unit in units[kept:]]
    (cut.directory / "shards" / ".00000003.safetensors.99.tmp").unlink()
    assert content(cut) == content(whole)


def test_new_examples_get_new_units_and_old_ones_are_kept(tmp_path: Path) -> None:
    store = GradientStore(tmp_path / "s", manifest())
    fill(store, keys(5))
    before = content(store)
    assert fill(store, [*keys(5, "new"), *keys(5)]) == [2, 3]
    assert before.items() <= content(store).items()
    assert store.view(["a", "b"], [keys(5)[4], keys(5, "new")[0]]).rows(torch.tensor([1]))[0] == pytest.approx(
        sketch_of(keys(5, "new")[0]), rel=1e-3, abs=1e-3
    )


def test_another_fingerprint_is_refused_with_both_sides(tmp_path: Path) -> None:
    GradientStore(tmp_path / "s", manifest(seed=3))
    with pytest.raises(StoreMismatch, match=r"sketch\.seed 3 in the store, 0 asked for"):
        GradientStore(tmp_path / "s", manifest(seed=0))


def test_shards_that_changed_places_are_found_and_recomputed(tmp_path: Path) -> None:
    store = GradientStore(tmp_path / "s", manifest())
    fill(store, keys(6))
    whole = content(store)
    store.shard(0).rename(tmp_path / "away")
    store.shard(1).rename(store.shard(0))
    (tmp_path / "away").rename(store.shard(1))
    assert ["must hold the examples of its plan, got others" in problem for problem in store.verify()] == [True, True]
    assert fill(store, keys(6)) == [0, 1]
    assert content(store) == whole


def test_a_shard_of_another_store_is_none_of_this_one(tmp_path: Path) -> None:
    mine, other = (GradientStore(tmp_path / str(seed), manifest(seed)) for seed in (0, 1))
    for store in (mine, other):
        fill(store, keys(3))
    mine.shard(0).write_bytes(other.shard(0).read_bytes())
    assert "must carry the fingerprint" in mine.verify()[0]
    assert fill(mine, keys(3)) == [0]


def test_a_changed_plan_is_refused_by_name(tmp_path: Path) -> None:
    store = GradientStore(tmp_path / "s", manifest())
    fill(store, keys(6))
    plan = next((store.directory / "plans").iterdir())
    sound = plan.read_bytes()
    for broken in (sound[:100], sound.replace(sealed_ends(3, 6), sealed_ends(2, 6))):
        assert broken != sound
        plan.write_bytes(broken)
        assert ["delete the store" in problem for problem in store.verify()] == [True]
        with pytest.raises(StoreError, match=plan.name):
            fill(store, keys(6))


def sealed_ends(*ends: int) -> bytes:
    return b"".join(end.to_bytes(8, "little") for end in ends)


def test_what_is_kept_beside_the_rows_is_checked_too(tmp_path: Path) -> None:
    store = GradientStore(tmp_path / "s", manifest())
    fill(store, keys(3))
    assert store.kept("references") == {}
    store.keep("references", {"half": torch.ones(2, 3)})
    assert torch.equal(store.kept("references")["half"], torch.ones(2, 3))
    assert store.verify() == []
    path = store.directory / "references.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"\x01")
    assert ["references.safetensors" in problem for problem in store.verify()] == [True]
    with pytest.raises(StoreError, match="must hold the bytes that were written"):
        store.kept("references")


def test_two_plans_made_at_once_do_not_replace_each_other(tmp_path: Path) -> None:
    mine, other = (GradientStore(tmp_path / "s", manifest()) for _ in range(2))

    def cut(positions: list[int]) -> list[list[int]]:
        if not list((mine.directory / "plans").iterdir()):  # another process plans while this one cuts
            other.plan(keys(4, "b"), in_threes)
        return in_threes(positions)

    units = mine.plan(keys(5, "a"), cut)
    assert [key for unit in units for key in unit.keys] == keys(5, "a")
    assert [unit.number for unit in units] == [2, 3]
    assert [key for unit in other.plan(keys(4, "b"), in_threes) for key in unit.keys] == keys(4, "b")


def test_a_plan_that_is_gone_is_planned_anew(tmp_path: Path) -> None:
    store = GradientStore(tmp_path / "s", manifest())
    fill(store, keys(3, "a"))
    fill(store, keys(3, "b"))
    (store.directory / "plans" / "00000000.safetensors").unlink()
    assert fill(store, keys(3, "a")) == [1]
    assert fill(store, keys(3, "b")) == [0]  # in the place of the other's shard, which is none of it
    assert store.verify() == []


def test_a_file_is_no_store(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match="must be a store or an empty folder, got a file"):
        GradientStore(tmp_path / "file", manifest())
    with pytest.raises(StoreError, match="must be a gradient store, got Not a directory"):
        GradientStore.open(tmp_path / "file")


def test_a_folder_with_other_files_is_not_taken_over(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(StoreError, match="got one with other files"):
        GradientStore(tmp_path, manifest())


@settings(max_examples=60, deadline=None)
@given(st.randoms(use_true_random=False))
def test_any_flipped_bit_is_found_and_the_shard_recomputed(
    tmp_path_factory: pytest.TempPathFactory, rng: random.Random
) -> None:
    store = GradientStore(tmp_path_factory.mktemp("flip") / "s", manifest())
    fill(store, keys(7))
    whole = content(store)
    path = store.shard(rng.randrange(3))
    data = bytearray(path.read_bytes())
    data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    path.write_bytes(bytes(data))
    assert [str(path) in problem for problem in store.verify()] == [True]
    assert fill(store, keys(7)) == [int(path.stem)]
    assert content(store) == whole
    assert store.verify() == []


def test_a_cut_and_a_missing_shard_are_named(tmp_path: Path) -> None:
    store = GradientStore(tmp_path / "s", manifest())
    fill(store, keys(7))
    store.shard(0).write_bytes(store.shard(0).read_bytes()[:100])
    store.shard(2).unlink()
    problems = store.verify()
    assert len(problems) == 2
    assert "00000000" in problems[0]
    assert "missing" in problems[1]


def test_a_broken_manifest_is_an_error_not_a_new_store(tmp_path: Path) -> None:
    GradientStore(tmp_path / "s", manifest())
    (tmp_path / "s" / "store.json").write_text('{"format": 1')
    with pytest.raises(StoreError, match="broken JSON"):
        GradientStore(tmp_path / "s", manifest())
    (tmp_path / "s" / "store.json").write_text(json.dumps({"format": 99, "settings": {}}))
    with pytest.raises(StoreError, match="format 2, got 99"):
        GradientStore.open(tmp_path / "s")


def test_a_store_without_an_example_says_so(tmp_path: Path) -> None:
    store = GradientStore(tmp_path / "s", manifest())
    fill(store, keys(3))
    with pytest.raises(StoreError, match="got 1 missing"):
        store.view(["a"], keys(1, "other"))


@given(scale=st.integers(-60, 60), seed=st.integers(0, 1000))
def test_half_precision_keeps_its_digits_at_any_size_of_gradient(scale: int, seed: int) -> None:
    sketch = torch.randn(5, 1024, generator=torch.Generator().manual_seed(seed)) * 2.0**scale
    half, factor = pack_sketch(sketch)
    error = (half.float() * factor[:, None] - sketch).norm(dim=1) / sketch.norm(dim=1)
    assert error.max() <= 3e-4


def test_zero_and_infinite_rows_survive_packing() -> None:
    sketch = torch.stack([torch.zeros(4), torch.tensor([1.0, torch.inf, 0.0, 0.0]), torch.tensor([torch.nan, 0, 0, 1])])
    half, factor = pack_sketch(sketch)
    assert half[0].abs().max() == 0
    assert not half[1].isfinite().all()
    assert not half[2].isfinite().all()
    assert factor.isfinite().all()
