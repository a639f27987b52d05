"""What a Navigator is measured on."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from gymnasium.utils.env_checker import check_env

from gradsieve.clock import silent
from gradsieve.data import TokenSet, read_examples
from gradsieve.errors import InvalidArgument
from gradsieve.job import Job
from gradsieve.navigation import make_navigator, split_anchor
from gradsieve.run import Run
from gradsieve.selectors.ogs import OGS
from gradsieve.train.navigator import NavigatorSettings
from gradsieve.types import Budget

Write = Callable[..., Path]


@pytest.fixture
def tokenized(write_data: Write, tiny_model: Path) -> Callable[..., TokenSet]:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_model)

    def read(*names: tuple[str, int]) -> TokenSet:
        files = [str(write_data(name, n, category=name)) for name, n in names]
        return TokenSet.of("anchor", read_examples(files).examples, tokenizer, max_length=512)

    return read


def test_the_anchor_is_halved_by_category_whatever_its_order(tokenized):
    anchor = tokenized(("math", 7), ("code", 4))
    halves = split_anchor(anchor)
    shuffled = anchor.restricted("anchor", list(range(len(anchor.kept)))[::-1])
    assert [sorted(half.ids) for half in halves] == [sorted(half.ids) for half in split_anchor(shuffled)]
    assert sorted([*halves[0].ids, *halves[1].ids]) == sorted(anchor.ids)
    for half, sizes in zip(halves, ({"math": 4, "code": 2}, {"math": 3, "code": 2}), strict=True):
        assert Counter(half.examples[i].category for i in half.kept) == sizes


def test_every_category_is_halved_by_itself(tokenized):
    names = ("facts", "code", "math", "logic")
    anchor = tokenized(*((name, 6) for name in names))
    for half in split_anchor(anchor):
        assert Counter(half.examples[i].category for i in half.kept) == dict.fromkeys(names, 3)


def test_small_categories_do_not_all_begin_with_the_same_half(tokenized):
    threes = [len(half.kept) for half in split_anchor(tokenized(*((f"c{i}", 3) for i in range(10))))]
    assert sorted(threes) in ([14, 16], [15, 15])  # of the first half alone: 20 and 10
    assert [len(half.kept) for half in split_anchor(tokenized(*((f"c{i}", 1) for i in range(9))))] == [5, 4]


def test_equal_examples_stay_together(tokenized):
    anchor = tokenized(("math", 5))
    twice = anchor.restricted("anchor", [0, 0, 1, 2, 3, 3, 4])
    reference, held_out = split_anchor(twice)
    assert not set(reference.keys) & set(held_out.keys)
    with pytest.raises(InvalidArgument, match="at least 4 different usable examples"):
        split_anchor(anchor.restricted("anchor", [0, 0, 0, 1]))


def test_each_cost_is_what_it_says(tokenized, tiny_model):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    target, held_out = tokenized(("math", 4)), tokenized(("math", 3), ("code", 2))
    model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    settings = NavigatorSettings(rank=2, learning_rate=1e-2)
    with make_navigator(model, target.tokens, target, held_out, tokenizer, settings) as navigator:
        domain, loss = navigator.losses("loss")
        naive = []
        for tokens in held_out.tokens:
            ids, labels = (torch.from_numpy(x).long()[None] for x in (tokens.input_ids, tokens.labels))
            naive.append(float(navigator._live(input_ids=ids, labels=labels).loss.detach()))
        assert loss == pytest.approx(sum(naive) / len(naive), rel=1e-5)
        assert navigator.losses("kl")[1] == pytest.approx(0, abs=1e-6)
        key = navigator.losses("key")[1]
        assert key != pytest.approx(loss)
        for _ in range(5):
            navigator.step(torch.arange(4))
        assert navigator.losses("loss")[0] < domain
        assert navigator.losses("kl")[1] > 1e-4


def test_gymnasium_accepts_the_environment_of_real_optimizer_steps(write_data: Write, tiny_model: Path) -> None:
    job = Job(model=str(tiny_model), budget="9", dim=256, dtype="float32", navigator_rate=1e-2, navigator_warmup=1)
    method = OGS(clusters=3, batch=4, fidelity="navigator")
    run = Run.of(job, "ogs", method, None, silent)
    data = {"pool": write_data("pool", 20), "target": write_data("target", 5), "anchor": write_data("anchor", 6)}
    problem = run.problem(data, str(tiny_model), None)
    assert run.navigator is not None
    with run.navigator as navigator:
        assert (navigator.settings.learning_rate, navigator.settings.warmup) == (1e-2, 1)
        assert navigator.trained_tokens > 0  # the warm-up
        env = method.environment(problem, Budget.parse("9"), torch.Generator().manual_seed(0))
        check_env(env, skip_render_check=True)
        env.reset()
        before, trained = navigator.losses("kl"), navigator.trained_tokens
        supply = [iter(rows.split(4)) for rows in env.simulator.draws.rows]
        totals, rows = [], []
        for _ in range(3):
            action = env.action_masks().argmax()
            rows += next(supply[action]).tolist()
            totals.append(env.step(action)[1:5])
        assert totals[2][1]
        after = navigator.losses("kl")
        assert sum(total[0] for total in totals) == pytest.approx((before[0] - after[0]) / before[0])
        assert sum(total[3]["cost"] for total in totals) == pytest.approx(after[1] - before[1])
        assert after[1] > 1e-5
        assert navigator.trained_tokens - trained == sum(run.sets["pool"].lengths[row] for row in rows[:9])
