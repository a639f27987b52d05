from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch

from gradsieve.data.batches import pad
from gradsieve.errors import InvalidArgument
from gradsieve.evaluate import TestSet, measure
from gradsieve.evaluate.completion import Completion
from gradsieve.evaluate.generation import Generated, generate, stop_tokens
from gradsieve.evaluate.measure import text_scores

LIMIT = 24


@pytest.fixture
def items(questions: Any, facts: Any, tokens_of: Any, tokenizer: Any) -> list[Completion]:
    return [Completion.of(tokens, tokenizer) for tokens in tokens_of(questions + facts)]


def naive(model: Any, prompt: np.ndarray, stop: list[int]) -> list[int]:
    """One token after the other, the whole text each time."""
    ids = prompt.tolist()
    for _ in range(LIMIT):
        with torch.no_grad():
            ids.append(int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
        if ids[-1] in stop:
            break
    return ids[len(prompt) :]


def ending(model: Any) -> Any:
    """The model with a liking for its end of turn, so that texts end at different lengths."""
    with torch.no_grad():
        model.lm_head.weight[1] *= 1.5
    return model


@pytest.mark.parametrize("kind", ["llama", "adapted", "gpt2"])
def test_a_padded_batch_writes_what_each_prompt_gets_alone(
    kind: str, items: list[Completion], tiny: Any, adapted: Any, tokenizer: Any
) -> None:
    model = ending(tiny("gpt2", seed=4) if kind == "gpt2" else tiny(seed=3)).double()
    model = adapted(model) if kind == "adapted" else model
    prompts = [item.prompt_ids for item in items]
    found = generate(model, prompts, tokenizer=tokenizer, stop=[1], max_new_tokens=LIMIT, batch_tokens=300)
    assert len({one.tokens for one in found}) > 1
    for prompt, one in zip(prompts, found, strict=True):
        written = naive(model, prompt, [1])
        assert one.tokens == len(written)
        assert one.stopped == (written[-1] == 1)
        assert one.text == tokenizer.decode(written, skip_special_tokens=True)
        alone = generate(model, [prompt], tokenizer=tokenizer, stop=[1], max_new_tokens=LIMIT)
        assert alone == [one]
        theirs = model.generate(
            input_ids=torch.from_numpy(prompt).long()[None],
            attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
            max_new_tokens=LIMIT,
            do_sample=False,
            pad_token_id=2,
        )
        assert theirs[0, len(prompt) :].tolist() == written


def test_progress_is_told_in_tokens(items: list[Completion], tiny: Any, tokenizer: Any) -> None:
    seen: list[tuple[str, int, int]] = []
    prompts = [item.prompt_ids for item in items]
    alone: dict[str, Any] = {"batch_tokens": max(map(len, prompts)) + LIMIT, "stage": "generate x"}
    generate(
        ending(tiny(seed=3)), prompts, tokenizer=tokenizer, stop=[1], max_new_tokens=LIMIT, **alone,
        progress=lambda *report: seen.append(report),
    )  # fmt: skip
    assert seen == [("generate x", LIMIT * (i + 1), LIMIT * len(items)) for i in range(len(items))]


def test_texts_end_at_any_stop_token(items: list[Completion], tiny: Any, tokenizer: Any) -> None:
    model = tiny(seed=3).double()
    prompt = items[0].prompt_ids
    free = generate(model, [prompt], tokenizer=tokenizer, stop=[1], max_new_tokens=LIMIT)[0]
    assert not free.stopped
    assert free.tokens == LIMIT
    other = naive(model, prompt, [])[5]
    cut = generate(model, [prompt], tokenizer=tokenizer, stop=[1, other], max_new_tokens=LIMIT)[0]
    assert cut.stopped
    assert cut.tokens <= 6
    assert free.text.startswith(cut.text)


def test_the_models_own_settings_do_not_matter_and_come_back(items: list[Completion], tiny: Any, tokenizer: Any) -> None:
    plain = tiny(seed=3)
    model = copy.deepcopy(plain).train()
    model.generation_config.repetition_penalty = 5.0
    model.generation_config.do_sample = True
    model.generation_config.eos_token_id = [40, 41]
    own = model.generation_config
    prompts = [item.prompt_ids for item in items[:3]]
    a, b = (generate(m, prompts, tokenizer=tokenizer, stop=[1], max_new_tokens=LIMIT) for m in (plain, model))
    assert a == b
    assert model.generation_config is own
    assert model.training


def test_stop_tokens_are_those_of_tokenizer_model_and_turns(items: list[Completion], tiny: Any, tokenizer: Any) -> None:
    model = tiny()
    assert stop_tokens(model, items, tokenizer) == [1]
    model.generation_config.eos_token_id = [7, 5]
    assert stop_tokens(model, items, tokenizer) == [1, 5, 7]
    model.generation_config.eos_token_id = None
    without = copy.deepcopy(tokenizer)
    without.eos_token = "<|pad|>"
    assert stop_tokens(model, items, without) == [2], "the end of turn is no special token here"
    without.add_special_tokens({"additional_special_tokens": ["<|im_end|>"]})
    assert stop_tokens(model, items, without) == [1, 2]


def test_what_cannot_be_written_is_refused(items: list[Completion], tiny: Any, tokenizer: Any) -> None:
    prompts = [item.prompt_ids for item in items]
    with pytest.raises(InvalidArgument, match="max_new_tokens must be at least 1, got 0"):
        generate(tiny(), prompts, tokenizer=tokenizer, stop=[1], max_new_tokens=0)
    with pytest.raises(InvalidArgument, match="stop must name at least one token"):
        generate(tiny(), prompts, tokenizer=tokenizer, stop=[])
    with pytest.raises(InvalidArgument, match=r"prompt 0 and its text must fit into the model \(512 tokens\), got \d+ \+ 500"):
        generate(tiny("gpt2"), prompts, tokenizer=tokenizer, stop=[1], max_new_tokens=500)
    with pytest.raises(InvalidArgument, match="prompt 0 must hold at least one token"):
        generate(tiny(), [prompts[0][:0]], tokenizer=tokenizer, stop=[1])


def test_texts_are_scored_by_the_kind_of_their_set_and_kept(
    questions: Any, facts: Any, tiny: Any, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    import nltk

    monkeypatch.setattr(nltk.data, "path", [])
    sets = [TestSet.of("facts", "target", facts, tokenizer), TestSet.of("math", "general", questions, tokenizer)]
    kept: dict[str, list[str]] = {}
    metrics = ["bleu", "meteor", "rouge1", "rouge2", "rougeL", "exact_number", "stopped"]
    found = measure(
        tiny(seed=3),
        sets,
        tokenizer=tokenizer,
        metrics=metrics,  # type: ignore[arg-type]
        max_new_tokens=LIMIT,
        on_texts=lambda test, written: kept.update({test.name: [one.text for one in written]}),
    )
    assert sorted(found["facts"]) == ["bleu", "meteor_nosyn", "rouge1", "rouge2", "rougeL", "stopped"]
    assert sorted(found["math"]) == ["exact_number", "stopped"]
    assert [len(texts) for texts in kept.values()] == [4, 4]
    assert all(len(values) == 4 for values in found["facts"].values())


def test_a_model_that_says_the_answer_scores_full(questions: Any, facts: Any, tokenizer: Any, tiny: Any) -> None:
    """A model trained on the sets until it says them by heart."""
    model = tiny(seed=3, initializer_range=0.05)
    sets = [TestSet.of("facts", "target", facts[:3], tokenizer), TestSet.of("math", "general", questions[:1], tokenizer)]
    rows = [tokens for test in sets for tokens in test.tokens]
    ids, labels = pad([row.input_ids for row in rows], 0), pad([row.labels for row in rows], -100)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(100):
        optimizer.zero_grad()
        model(input_ids=ids, labels=labels).loss.backward()
        optimizer.step()
    metrics: Any = ["bleu", "rougeL", "exact_number", "stopped", "key_accuracy"]
    found = measure(model.eval(), sets, tokenizer=tokenizer, metrics=metrics, max_new_tokens=80)
    assert found["facts"]["bleu"].tolist() == pytest.approx([100.0] * 3)
    assert found["facts"]["rougeL"].tolist() == [1.0] * 3
    assert found["facts"]["stopped"].tolist() == [1.0] * 3
    assert found["math"]["exact_number"].tolist() == [1.0]
    assert found["math"]["key_accuracy"].tolist() == [1.0]


def test_an_answer_that_was_cut_off_has_no_number_to_reach(example: Any, tokenizer: Any) -> None:
    rows = [example("a", "?", "So it is = 12 ####12"), example("b", "?", "So we see = 12, and therefore = 34")]
    test = TestSet.of("t", "general", rows, tokenizer, max_length=42)
    items = [Completion.of(tokens, tokenizer) for tokens in test.tokens]
    written = [Generated("It is 12", 9, True), Generated("It is 12", 9, False)]
    scores = text_scores(["exact_number"], items, written, worked=True)
    assert scores["exact_number"].tolist() == pytest.approx([1.0, float("nan")], nan_ok=True)
    assert scores["stopped"].tolist() == [1.0, 0.0]


def test_a_text_is_held_to_no_answer_that_was_cut(example: Any, tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    import nltk

    monkeypatch.setattr(nltk.data, "path", [])
    answers = ["Take it twice.", "Take it with water in the morning and rest."]
    test = TestSet.of("t", "target", [example(str(i), "?", a) for i, a in enumerate(answers)], tokenizer, max_length=50)
    items = [Completion.of(tokens, tokenizer) for tokens in test.tokens]
    assert [item.cut for item in items] == [False, True]
    written = [Generated(answer, 9, True) for answer in answers]
    scores = text_scores(["bleu", "meteor", "rouge1", "rouge2", "rougeL"], items, written, worked=False)
    for name in ("bleu", "meteor_nosyn", "rouge1", "rouge2", "rougeL"):
        assert scores[name].isnan().tolist() == [False, True]
    assert scores["rougeL"][0] == 1.0
    assert scores["stopped"].tolist() == [1.0, 1.0]
    alone = text_scores(["bleu", "meteor", "rougeL"], items[1:], written[1:], worked=False)
    assert all(scores.isnan().all() for name, scores in alone.items() if name != "stopped")
