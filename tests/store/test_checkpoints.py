import pytest
import torch

from gradsieve.store import CheckpointGradients, finite_rows
from gradsieve.types import ArrayGradients

IDS = ["a", "b", "c"]


def view(seed: int, loss: list[float]) -> ArrayGradients:
    return ArrayGradients(IDS, torch.randn(3, 4, generator=torch.Generator().manual_seed(seed)), {"loss": torch.tensor(loss)})


def test_each_checkpoint_is_read_from_its_own_view_and_columns_from_the_last() -> None:
    first, last = view(0, [1.0, 2.0, 3.0]), view(1, [4.0, 5.0, 6.0])
    both = CheckpointGradients({"epoch-1": first, "epoch-2": last})
    assert both.checkpoints == ("epoch-1", "epoch-2")
    assert list(both.ids) == IDS
    assert both.dim == 4
    assert both.columns["loss"].tolist() == [4, 5, 6]
    rows = torch.tensor([2, 0])
    for name, own in (("epoch-1", first), ("epoch-2", last), (None, first)):
        assert torch.equal(both.rows(rows, name), own.rows(rows))
        (index, sketch), *rest = both.blocks(name)
        assert not rest
        assert index.tolist() == [0, 1, 2]
        assert torch.equal(sketch, own.rows(index))
    with pytest.raises(KeyError):
        both.rows(rows, "epoch-3")


def test_a_representation_is_that_of_the_last_checkpoint() -> None:
    hidden = [torch.full((3, 2), float(i)) for i in range(2)]
    first, last = (ArrayGradients(IDS, view(i, [1.0] * 3).sketch, {}, {"hidden": hidden[i]}) for i in range(2))
    both = CheckpointGradients({"epoch-1": first, "epoch-2": last})
    assert list(both.representations) == ["hidden"]
    assert torch.equal(both.rows(torch.tensor([1, 2]), "hidden"), hidden[1][1:])
    assert torch.equal(next(both.blocks("hidden"))[1], hidden[1])


def test_a_row_is_finite_if_it_is_so_at_every_checkpoint() -> None:
    first, last = view(0, [1.0, torch.nan, 3.0]), view(1, [torch.inf, 5.0, 6.0])
    assert finite_rows(first).tolist() == [True, False, True]
    assert CheckpointGradients({"epoch-1": first, "epoch-2": last}).finite.tolist() == [False, False, True]
