from __future__ import annotations

import pytest

from gradsieve.data.shapes import KEYS, detect_shape, read_turns
from gradsieve.errors import DataError

U = {"role": "user", "content": "q"}
A = {"role": "assistant", "content": "a"}
S = {"role": "system", "content": "s"}
TOOL = {"role": "tool", "content": "42", "name": "f"}
CALL = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f", "arguments": {}}}]}


def turns(fields, shape="messages"):
    return list(read_turns(fields, shape, "pool.jsonl:118"))


def error_of(fields, shape="messages") -> str:
    with pytest.raises(DataError) as caught:
        turns(fields, shape)
    return str(caught.value)


# --- detection ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", KEYS)
def test_each_shape_is_told_by_its_keys_among_others(shape):
    assert detect_shape({*KEYS[shape], "id", "source", "input", "text"}, "f") == shape


def test_half_of_a_shape_does_not_count():
    assert detect_shape({"messages", "prompt"}, "f") == "messages"


def test_ambiguous_keys_are_named_with_the_cure():
    with pytest.raises(DataError) as caught:
        detect_shape({"messages", "prompt", "completion"}, "p.jsonl")
    expected = '"completion", "messages", "prompt", which fit messages and prompt-completion; choose by --format'
    assert str(caught.value) == f"p.jsonl: the keys must fit one shape, got {expected}"


def test_unknown_keys_are_named_beside_the_known_ones():
    with pytest.raises(
        DataError, match=r'alpaca: instruction, output; .*got "answer", "question"; rename the keys, or .*--format'
    ):
        detect_shape({"question", "answer"}, "p.jsonl")


# --- shapes -------------------------------------------------------------------------------------------------------------


def test_messages_stay_as_they_are():
    given = [S, U, CALL, TOOL, {**TOOL, "content": ""}, A, U, {**A, "weight": 0, "extra": [1]}]
    assert turns({"messages": given}) == given


def test_null_values_of_a_turn_count_as_absent_but_for_the_content():
    padded = [{**U, "tool_calls": None}, {**CALL, "name": None}, {**TOOL, "tool_calls": None}, {**A, "weight": None}]
    assert turns({"messages": padded}) == [U, CALL, TOOL, A]


def test_prompt_and_completion_strings_become_two_turns():
    assert turns({"prompt": " q ", "completion": "a\n"}, "prompt-completion") == [
        {"role": "user", "content": " q "},
        {"role": "assistant", "content": "a\n"},
    ]


def test_prompt_and_completion_lists_train_on_the_completion_only():
    fields = {"prompt": [S, U, A, U], "completion": [A, U, A]}
    assert turns(fields, "prompt-completion") == [S, U, {**A, "weight": 0}, U, A, U, A]


def test_alpaca_joins_instruction_and_input_and_puts_system_and_history_first():
    full = {"instruction": "i", "input": "x", "output": "o", "system": "s", "history": [["h1", "h2"]]}
    assert [(t["role"], t["content"]) for t in turns(full, "alpaca")] == [
        ("system", "s"),
        ("user", "h1"),
        ("assistant", "h2"),
        ("user", "i\nx"),
        ("assistant", "o"),
    ]
    bare = {"instruction": "i", "input": "", "output": "o", "system": None, "history": []}
    assert [(t["role"], t["content"]) for t in turns(bare, "alpaca")] == [("user", "i"), ("assistant", "o")]


def test_sharegpt_speakers_and_their_aliases():
    names = ["system", "human", "gpt", "user", "chatgpt", "human", "assistant"]
    conversation = [{"from": name, "value": str(i)} for i, name in enumerate(names)]
    roles = ["system", "user", "assistant", "user", "assistant", "user", "assistant"]
    expected = [{"role": role, "content": str(i)} for i, role in enumerate(roles)]
    assert turns({"conversations": conversation}, "sharegpt") == expected


def test_sharegpt_keeps_other_keys_and_takes_the_system_field():
    conversation = [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a", "weight": 0}]
    assert turns({"conversations": conversation, "system": "s"}, "sharegpt") == [S, U, {**A, "weight": 0}]


# --- rules --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([A, U], '"messages" must end with an assistant turn, got role "user"'),
        ([U], '"messages" must end with an assistant turn, got role "user"'),
        ([S], '"messages" must end with an assistant turn, got role "system"'),
        ([U, CALL, TOOL], '"messages" must end with an assistant turn, got role "tool"'),
        ([], '"messages" must hold at least one turn, got an empty list'),
        ("hello", '"messages" must be a list of turns, got a string'),
        ([U, S, A], '"messages"[1] must not be a system turn (only the first may be), got role "system"'),
        ([U, TOOL, A], '"messages"[1]: a tool turn must follow an assistant or tool turn, got one after user'),
        ([TOOL, A], '"messages"[0]: a tool turn must follow an assistant or tool turn, got one after nothing'),
        (["x", A], '"messages"[0] must be an object with "role" and "content", got a string'),
        ([U, {**A, "content": ""}], '"messages"[1]: "content" of the assistant turn must not be blank, got \'\''),
        ([{**U, "content": " \n"}, A], '"messages"[0]: "content" of the user turn must not be blank, got \' \\n\''),
        ([U, {**A, "content": None}], '"messages"[1]: "content" must be a string, got null'),
        ([{**U, "content": [{"type": "text"}]}, A], '"messages"[0]: "content" must be a string, got a list'),
        ([{**S, "content": 3}, U, A], '"messages"[0]: "content" must be a string, got a number'),
        ([U, CALL, {**TOOL, "content": None}, A], '"messages"[2]: "content" must be a string, got null'),
        ([U, {**CALL, "tool_calls": []}], '"messages"[1]: "content" must be a string, got null'),
        ([{"role": "user", "text": "q"}, A], '"messages"[0]: "content" must be a string, got the keys role, text'),
        (
            [{"from": "human", "value": "q"}, A],
            '"messages"[0]: "role" must be one of system, user, assistant, tool, got the keys',
        ),
        (
            [{**U, "role": "developer"}, A],
            '"messages"[0]: "role" must be one of system, user, assistant, tool, got "role" \'devel',
        ),
        (
            [{**U, "role": ["user"]}, A],
            '"messages"[0]: "role" must be one of system, user, assistant, tool, got "role" [\'user\']',
        ),
        ([U, {**CALL, "tool_calls": "f()"}], '"messages"[1]: "tool_calls" must be a list of objects, got f()'),
        ([U, {**CALL, "tool_calls": ["f"]}], '"messages"[1]: "tool_calls" must be a list of objects, got [\'f\']'),
        ([U, {**A, "weight": 0.5}], '"messages"[1]: "weight" must be 0 (not trained on) or 1, got 0.5'),
    ],
)
def test_a_conversation_that_breaks_a_rule_is_named_with_place_rule_and_value(messages, message):
    assert error_of({"messages": messages}).startswith(f"pool.jsonl:118: {message}")


@pytest.mark.parametrize(
    ("shape", "fields", "message"),
    [
        ("messages", {"prompt": "q"}, '"messages" must be there (this file is read as messages), got the keys "prompt"'),
        ("messages", {}, '"messages" must be there (this file is read as messages), got the keys none'),
        ("prompt-completion", {"prompt": "q", "completion": None}, '"completion" must be there'),
        ("prompt-completion", {"prompt": "q", "completion": ""}, "\"completion\" must not be blank, got ''"),
        ("prompt-completion", {"prompt": " ", "completion": "a"}, "\"prompt\" must not be blank, got ' '"),
        (
            "prompt-completion",
            {"prompt": "q", "completion": [A]},
            '"prompt" and "completion" must both be strings or both be lists of messages, got a string and a list',
        ),
        (
            "prompt-completion",
            {"prompt": 1, "completion": 2},
            '"prompt" and "completion" must both be strings or both be lists',
        ),
        ("prompt-completion", {"prompt": [U], "completion": [U]}, '"prompt + completion" must end with an assistant turn'),
        ("alpaca", {"instruction": "i", "output": 3}, '"output" must be a string, got a number'),
        ("alpaca", {"instruction": "", "output": "o"}, '"instruction" must not be blank'),
        ("alpaca", {"instruction": "i", "output": "o", "input": 1}, '"input" must be a string, got a number'),
        (
            "alpaca",
            {"instruction": "i", "output": "o", "history": [["a"]]},
            '"history" must be a list of [question, answer] pairs',
        ),
        ("alpaca", {"instruction": "i", "output": "o", "history": "h"}, '"history" must be a list of [question, answer] pairs'),
        ("alpaca", {"instruction": "i", "output": "o", "history": [["a", ""]]}, '"history"[0] must not be blank'),
        ("sharegpt", {"conversations": "x"}, '"conversations" must be a list of turns, got a string'),
        (
            "sharegpt",
            {"conversations": [U, A]},
            '"conversations"[0] must be an object with "from" and "value", got keys role, content',
        ),
        (
            "sharegpt",
            {"conversations": [{"from": "bing", "value": "x"}]},
            '"conversations"[0]: "from" must be one of human, user',
        ),
        ("sharegpt", {"conversations": [{"from": "human", "value": "x"}]}, '"conversations" must end with an assistant turn'),
        (
            "sharegpt",
            {"system": "s", "conversations": [{"from": "system", "value": "x"}, {"from": "gpt", "value": "x"}]},
            '"conversations"[1] must not be a system turn',
        ),
    ],
)
def test_a_row_that_does_not_fit_its_shape_is_named(shape, fields, message):
    assert error_of(fields, shape).startswith(f"pool.jsonl:118: {message}")
