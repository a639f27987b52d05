"""From a row's fields to turns: the four shapes of fine-tuning data, and the rules every conversation keeps.

    shape              keys                                        becomes
    messages           messages: [{role, content, …}, …]           as it is
    prompt-completion  prompt, completion: strings                 user, assistant
                       prompt, completion: lists of messages       both in a row; the prompt's assistant turns get weight 0
    alpaca             instruction, output; input, system, history [system], history's pairs, instruction[\\ninput], output
    sharegpt           conversations: [{from, value}, …]; system   human, user → user; gpt, chatgpt, assistant → assistant

Rules: a system turn only first; then user and assistant turns, tool turns right after an assistant or tool turn; the last is
an assistant turn; the content of user and assistant turns is a string that is not blank (an assistant turn with `tool_calls`
may do without); system and tool content is a string. Other keys of a turn are kept, except that a key whose value is null
counts as absent (columnar files pad with it). `"weight": 0` on an assistant turn keeps it out of the loss.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal

from gradsieve.data.files import json_type
from gradsieve.errors import DataError

Format = Literal["auto", "messages", "prompt-completion", "alpaca", "sharegpt"]
Message = Mapping[str, Any]
Turns = tuple[Message, ...]

KEYS: Mapping[str, tuple[str, ...]] = {
    "messages": ("messages",),
    "prompt-completion": ("prompt", "completion"),
    "alpaca": ("instruction", "output"),
    "sharegpt": ("conversations",),
}

_ROLES = ("system", "user", "assistant", "tool")
_SHAREGPT_ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "assistant": "assistant",
    "system": "system",
    "tool": "tool",
}


def fitting_shapes(keys: set[str]) -> list[str]:
    """Returns the shapes whose required keys are all there."""
    return [shape for shape, required in KEYS.items() if keys.issuperset(required)]


def detect_shape(keys: set[str], name: str) -> str:
    """Returns the one shape these keys fit.

    Args:
        keys: Keys with a value other than null, over all rows of a file.
        name: The file, for the message.

    Raises:
        DataError: No shape fits, or several do.
    """
    fitting = fitting_shapes(keys)
    if len(fitting) == 1:
        return fitting[0]
    found = ", ".join(f'"{key}"' for key in sorted(keys)) or "none"
    if fitting:
        raise DataError(
            f"{name}: the keys must fit one shape, got {found}, which fit {' and '.join(fitting)}; choose by --format"
        )
    known = "; ".join(f"{shape}: {', '.join(required)}" for shape, required in KEYS.items())
    raise DataError(f"{name}: the keys must fit a shape ({known}), got {found}; rename the keys, or choose by --format")


def read_turns(fields: Mapping[str, Any], shape: str, origin: str) -> Turns:
    """Returns the conversation of a row.

    Raises:
        DataError: The row does not fit the shape, or its turns break a rule of the module docstring.
    """
    return _READERS[shape](fields, origin)


def _messages(fields: Mapping[str, Any], origin: str) -> Turns:
    return _checked(_required(fields, "messages", "messages", origin), "messages", origin)


def _prompt_completion(fields: Mapping[str, Any], origin: str) -> Turns:
    prompt = _required(fields, "prompt", "prompt-completion", origin)
    completion = _required(fields, "completion", "prompt-completion", origin)
    if isinstance(prompt, str) and isinstance(completion, str):
        _not_blank(prompt, '"prompt"', origin)
        _not_blank(completion, '"completion"', origin)
        return {"role": "user", "content": prompt}, {"role": "assistant", "content": completion}
    if not (isinstance(prompt, list) and isinstance(completion, list)):
        rule = '"prompt" and "completion" must both be strings or both be lists of messages'
        raise DataError(f"{origin}: {rule}, got {json_type(prompt)} and {json_type(completion)}")
    turns = _checked([*prompt, *completion], "prompt + completion", origin)
    return tuple(
        {**turn, "weight": 0} if i < len(prompt) and turn["role"] == "assistant" else turn for i, turn in enumerate(turns)
    )


def _alpaca(fields: Mapping[str, Any], origin: str) -> Turns:
    turns: list[Message] = []
    if system := _optional_string(fields, "system", origin):
        turns.append({"role": "system", "content": system})
    history = fields.get("history") or []
    if not isinstance(history, list) or not all(isinstance(pair, list) and len(pair) == 2 for pair in history):
        raise DataError(f'{origin}: "history" must be a list of [question, answer] pairs, got {str(history)[:60]}')
    for i, pair in enumerate(history):
        for role, text in zip(("user", "assistant"), pair, strict=True):
            _not_blank(text, f'"history"[{i}]', origin)
            turns.append({"role": role, "content": text})
    instruction = _required(fields, "instruction", "alpaca", origin)
    extra = _optional_string(fields, "input", origin)
    _not_blank(instruction, '"instruction"', origin)
    turns.append({"role": "user", "content": f"{instruction}\n{extra}" if extra else instruction})
    output = _required(fields, "output", "alpaca", origin)
    _not_blank(output, '"output"', origin)
    turns.append({"role": "assistant", "content": output})
    return tuple(turns)


def _sharegpt(fields: Mapping[str, Any], origin: str) -> Turns:
    conversation = _required(fields, "conversations", "sharegpt", origin)
    if not isinstance(conversation, list):
        raise DataError(f'{origin}: "conversations" must be a list of turns, got {json_type(conversation)}')
    turns: list[Any] = []
    for i, turn in enumerate(conversation):
        if not (isinstance(turn, dict) and "from" in turn and "value" in turn):
            got = f"keys {', '.join(turn)}" if isinstance(turn, dict) else json_type(turn)
            cure = (
                '; turns with "role" and "content" belong under "messages"' if isinstance(turn, dict) and "role" in turn else ""
            )
            raise DataError(f'{origin}: "conversations"[{i}] must be an object with "from" and "value", got {got}{cure}')
        speaker = turn["from"]
        if not isinstance(speaker, str) or speaker not in _SHAREGPT_ROLES:
            raise DataError(
                f'{origin}: "conversations"[{i}]: "from" must be one of {", ".join(_SHAREGPT_ROLES)}, got {speaker!r}'
            )
        others = {key: value for key, value in turn.items() if key not in ("from", "value")} if len(turn) > 2 else {}
        turns.append({"role": _SHAREGPT_ROLES[speaker], "content": turn["value"], **others})
    if system := _optional_string(fields, "system", origin):
        turns.insert(0, {"role": "system", "content": system})
    return _checked(turns, "conversations", origin)


_READERS: Mapping[str, Callable[[Mapping[str, Any], str], Turns]] = {
    "messages": _messages,
    "prompt-completion": _prompt_completion,
    "alpaca": _alpaca,
    "sharegpt": _sharegpt,
}


def _required(fields: Mapping[str, Any], key: str, shape: str, origin: str) -> Any:
    value = fields.get(key)
    if value is None:
        found = ", ".join(f'"{k}"' for k in fields) or "none"
        raise DataError(f'{origin}: "{key}" must be there (this file is read as {shape}), got the keys {found}')
    return value


def _optional_string(fields: Mapping[str, Any], key: str, origin: str) -> str:
    value = fields.get(key)
    if value is not None and not isinstance(value, str):
        raise DataError(f'{origin}: "{key}" must be a string, got {json_type(value)}')
    return value or ""


def _not_blank(text: Any, name: str, origin: str) -> None:
    if not isinstance(text, str):
        raise DataError(f"{origin}: {name} must be a string, got {json_type(text)}")
    if not text or text.isspace():
        raise DataError(f"{origin}: {name} must not be blank, got {text!r}")


def _checked(turns: Any, field: str, origin: str) -> Turns:
    """Returns the turns if they keep the rules of the module docstring."""
    if not isinstance(turns, list):
        raise DataError(f'{origin}: "{field}" must be a list of turns, got {json_type(turns)}')
    if not turns:
        raise DataError(f'{origin}: "{field}" must hold at least one turn, got an empty list')
    checked = []
    before = None
    for i, turn in enumerate(turns):
        checked.append(_checked_turn(turn, before, i, field, origin))
        before = checked[-1]["role"]
    if before != "assistant":
        raise DataError(f'{origin}: "{field}" must end with an assistant turn, got role "{before}"')
    return tuple(checked)


def _checked_turn(turn: Any, before: str | None, i: int, field: str, origin: str) -> Message:
    """Returns the turn without null values; `before` is the role of the turn before it."""
    where = f'{origin}: "{field}"[{i}]'
    if not isinstance(turn, dict):
        raise DataError(f'{where} must be an object with "role" and "content", got {json_type(turn)}')
    role, content = turn.get("role"), turn.get("content")
    if len(turn) > 2:
        turn = {key: value for key, value in turn.items() if value is not None or key == "content"}
        if turn.get("weight", 1) not in (0, 1):
            raise DataError(f'{where}: "weight" must be 0 (not trained on) or 1, got {turn["weight"]!r}')
        calls = turn.get("tool_calls", [])
        if not (isinstance(calls, list) and all(isinstance(call, dict) for call in calls)):
            raise DataError(f'{where}: "tool_calls" must be a list of objects, got {str(calls)[:60]}')
    if role not in _ROLES:
        found = f'got "role" {role!r}' if role is not None else f"got the keys {', '.join(turn) or 'none'}"
        raise DataError(f'{where}: "role" must be one of {", ".join(_ROLES)}, {found}')
    if role == "system" and before is not None:
        raise DataError(f'{where} must not be a system turn (only the first may be), got role "system"')
    if role == "tool" and before not in ("assistant", "tool"):
        raise DataError(f"{where}: a tool turn must follow an assistant or tool turn, got one after {before or 'nothing'}")
    if not content and role == "assistant" and turn.get("tool_calls"):
        return {**turn, "content": content}
    if not isinstance(content, str):
        found = json_type(content) if "content" in turn else f"the keys {', '.join(turn)}"
        raise DataError(f'{where}: "content" must be a string, got {found}')
    if role in ("user", "assistant") and (not content or content.isspace()):
        raise DataError(f'{where}: "content" of the {role} turn must not be blank, got {content!r}')
    return turn if len(turn) > 2 else {"role": _ROLES[_ROLES.index(role)], "content": content}
