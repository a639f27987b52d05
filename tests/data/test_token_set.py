"""Sets of examples as the model sees them: which are told apart, whatever their order."""

import json
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from gradsieve.data import TokenSet, read_examples


def read(folder: Path, model: Path, rows: list[dict[str, Any]]) -> TokenSet:
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return TokenSet.of("pool", read_examples([path]).examples, AutoTokenizer.from_pretrained(model), max_length=512)


def test_the_digest_is_that_of_the_set_whatever_its_order(tmp_path: Path, tiny_model: Path) -> None:
    found = read(tmp_path, tiny_model, [{"prompt": letter, "completion": "Yes."} for letter in "abc"])
    assert found.digest() == found.restricted("pool", [2, 0, 1]).digest()
    assert found.digest() != found.restricted("pool", [0, 1]).digest()


def test_equal_tokens_of_which_others_are_learned_are_other_examples(tmp_path: Path, tiny_model: Path) -> None:
    def talk(weight: int) -> dict[str, Any]:
        turns = [("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d")]
        messages: list[dict[str, Any]] = [{"role": role, "content": content} for role, content in turns]
        messages[1]["weight"] = weight
        return {"messages": messages}

    found = read(tmp_path, tiny_model, [talk(1), talk(0)])
    assert found.tokens[0].input_ids.tolist() == found.tokens[1].input_ids.tolist()
    assert found.keys[0] != found.keys[1]
