import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gradsieve.train.surgery import agem, dot, pcgrad


def agem_naive(g: np.ndarray, r: np.ndarray) -> np.ndarray:
    """Chaudhry et al. (2019), Eq. 11."""
    if g @ r >= 0:
        return g
    return g - (g @ r) / (r @ r) * r


def pcgrad_naive(gradients: list[np.ndarray]) -> np.ndarray:
    """Yu et al. (2020), Alg. 1: each gradient against the others as they were."""
    freed = [g.copy() for g in gradients]
    for i in range(len(gradients)):
        for j in range(len(gradients)):
            if i != j and freed[i] @ gradients[j] < 0:
                freed[i] -= (freed[i] @ gradients[j]) / (gradients[j] @ gradients[j]) * gradients[j]
    return np.sum(freed, axis=0)


def parts(vector: np.ndarray) -> list[torch.Tensor]:
    return [torch.from_numpy(vector[:2]).reshape(1, 2), torch.from_numpy(vector[2:])]


def whole(tensors: list[torch.Tensor]) -> np.ndarray:
    return torch.cat([t.flatten() for t in tensors]).numpy()


vectors = st.lists(st.floats(-10, 10).map(lambda x: round(x, 3)), min_size=5, max_size=5).map(np.array)


@given(vectors, vectors)
def test_surgery_is_that_of_the_papers(g: np.ndarray, r: np.ndarray) -> None:
    assert whole(agem(parts(g), parts(r))) == pytest.approx(agem_naive(g, r), abs=1e-9)
    assert whole(pcgrad(parts(g), parts(r))) == pytest.approx(pcgrad_naive([g, r]), abs=1e-9)


@given(vectors, vectors)
def test_what_is_left_does_not_oppose_the_anchor(g: np.ndarray, r: np.ndarray) -> None:
    for operation in (agem, pcgrad):
        left = operation(parts(g), parts(r))
        scale = max(1.0, float(np.abs(g).max() * np.abs(r).max()))
        assert float(dot(left, parts(r))) >= -1e-9 * scale


def test_a_case_by_hand() -> None:
    g, r = [torch.tensor([1.0, -1.0])], [torch.tensor([0.0, 2.0])]
    assert agem(g, r)[0].tolist() == [1.0, 0.0]
    # g freed of r is [1, 0]; <g, r>/<g, g> = -1, so r freed of g is [0, 2] + [1, -1] = [1, 1]
    assert pcgrad(g, r)[0].tolist() == [2.0, 1.0]
    assert agem(r, r)[0] is r[0]
    assert pcgrad(r, r)[0].tolist() == [0.0, 4.0]


def test_products_of_long_gradients_keep_their_digits() -> None:
    many = [torch.full((1 << 20,), 0.1), torch.full((3,), 0.1)]
    assert float(dot(many, many)) == pytest.approx(((1 << 20) + 3) * float(torch.tensor(0.1).double() ** 2), rel=1e-7)
