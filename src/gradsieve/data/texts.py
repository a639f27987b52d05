"""What is read off the texts of examples without the model to be trained: word matches and sentence embeddings."""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Sequence

import torch
from torch import Tensor

from gradsieve.errors import InvalidArgument, MissingExtra
from gradsieve.types import Example


def text_of(example: Example) -> str:
    """Returns what is said in all turns, one a line, without roles; calls of tools as JSON."""
    lines: list[str] = []
    for turn in example.messages:
        lines.append(str(turn.get("content") or ""))
        lines += [json.dumps(call, ensure_ascii=False, sort_keys=True, default=str) for call in turn.get("tool_calls") or ()]
    return "\n".join(lines)


def words(text: str) -> list[str]:
    """Returns the words of a text: compatibility forms and letter case made one, punctuation left out.

    Scripts that write no spaces give one word a character.
    """
    folded = unicodedata.normalize("NFKC", text).casefold()
    return re.findall(r"[\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff]|[^\W_\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff]+", folded)


def bm25_scores(pool: Sequence[Example], targets: Sequence[Example]) -> Tensor:
    """Returns the mean over targets of BM25(target, example) over the target's best match: float64 [n] in [0, 1].

    Robertson & Zaragoza (2009) in Lucene's form, k1 = 1.5, b = 0.75, by the package bm25s. A target that matches nothing gives
    0 to all.

    Raises:
        MissingExtra: bm25s is not installed.
        InvalidArgument: No example of the pool has a word.
    """
    try:
        import bm25s
    except ImportError:
        raise MissingExtra("bm25 needs the package bm25s; pip install 'gradsieve[text]'") from None
    documents = [words(text_of(example)) for example in pool]
    if not any(documents):
        raise InvalidArgument("bm25 needs words in the pool, got none; choose another method")
    index = bm25s.BM25(method="lucene", k1=1.5, b=0.75)
    index.index(documents, show_progress=False)
    total = torch.zeros(len(pool), dtype=torch.float64)
    for target in targets:
        known = [word for word in words(text_of(target)) if word in index.vocab_dict]
        if known:
            scores = torch.from_numpy(index.get_scores(known)).double()
            total += scores / scores.max()  # a word of the pool has a score above 0 somewhere
    return total / len(targets)


def embeddings(examples: Sequence[Example], encoder: str, device: str) -> Tensor:
    """Returns the sentence embeddings of the examples' texts: float32 [n, D].

    Raises:
        MissingExtra: sentence-transformers is not installed.
        InvalidArgument: The encoder cannot be loaded.
    """
    try:
        from sentence_transformers import SentenceTransformer  # type: ignore[import-not-found, unused-ignore]
    except ImportError:
        raise MissingExtra("embedding needs the package sentence-transformers; pip install sentence-transformers") from None
    try:
        model = SentenceTransformer(encoder, device=device)
    except (OSError, ValueError) as error:
        raise InvalidArgument(f"encoder must be a sentence-transformers model, got {encoder!r}: {error}") from None
    texts = [text_of(example) for example in examples]
    vectors: Tensor = model.encode(texts, convert_to_tensor=True, show_progress_bar=False)
    return vectors.float().cpu()
