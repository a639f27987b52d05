"""YAML values → fields of dataclasses, each checked; what is wrong is named by file and key."""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Mapping, Sequence
from typing import Any, Literal, Union, get_args, get_origin

from gradsieve.errors import DataError


def typed_fields(kind: type, values: object, where: str) -> dict[str, Any]:
    """Returns the keyword arguments for a dataclass that a mapping of a YAML file spells.

    Args:
        kind: A dataclass.
        values: What stands in the file; None is an empty mapping.
        where: File and key path, for messages: `study.yaml: recipe`.

    Raises:
        DataError: It is no mapping, has a key that is no field, or a value of another type.
    """
    given = mapping(values, where)
    hints = typing.get_type_hints(kind)
    names = [field.name for field in dataclasses.fields(kind)]
    refuse_unknown(given, names, where)
    return {key: typed(value, hints[key], f"{where}.{key}") for key, value in given.items()}


def mapping(values: object, where: str) -> dict[str, Any]:
    """Returns a mapping with text keys, empty for None.

    Raises:
        DataError: It is something else.
    """
    if values is None:
        return {}
    if not isinstance(values, Mapping):
        raise DataError(f"{where} must hold `key: value` lines, got {_named(values)}")
    return {str(key): value for key, value in values.items()}


def refuse_unknown(given: Mapping[str, Any], known: Sequence[str], where: str) -> None:
    """Raises DataError for the first key that is not known."""
    for key in given:
        if key not in known:
            raise DataError(f"{where}.{key} must be one of {', '.join(known) or 'none'}, got {key!r}; correct or remove it")


def typed(value: object, kind: Any, where: str) -> Any:
    """Returns a YAML value as the type that a field is declared with.

    Numbers written as `2e-4`, which YAML reads as text, are numbers; a single value where several may stand is one of them.

    Raises:
        DataError: It does not fit.
    """
    origin, arguments = get_origin(kind), get_args(kind)
    if kind is Any or kind is object:
        return value
    if origin in (Union, types.UnionType):
        return _one_of(value, arguments, where)
    if origin is Literal:
        if value not in arguments:
            raise DataError(f"{where} must be one of {', '.join(map(str, arguments))}, got {value!r}")
        return value
    if origin in (tuple, list, Sequence):
        return _several(value, arguments[0], where)
    if origin in (dict, Mapping):
        return mapping(value, where)
    return _single(value, kind, where)


def _one_of(value: object, kinds: Sequence[Any], where: str) -> Any:
    if value is None and type(None) in kinds:
        return None
    errors: list[DataError] = []
    for kind in kinds:
        if kind is type(None):
            continue
        try:
            return typed(value, kind, where)
        except DataError as error:
            errors.append(error)
    raise errors[0]


def _several(value: object, kind: Any, where: str) -> tuple[Any, ...]:
    parts = value if isinstance(value, list | tuple) else [value]
    return tuple(typed(part, kind, f"{where}[{i}]" if isinstance(value, list) else where) for i, part in enumerate(parts))


def _single(value: object, kind: Any, where: str) -> Any:
    if kind is bool and isinstance(value, bool):
        return value
    if kind is int and isinstance(value, int) and not isinstance(value, bool):
        return value
    if kind is float and isinstance(value, int | float) and not isinstance(value, bool):
        return float(value)
    if kind is float and isinstance(value, str):
        try:
            return float(value)
        except ValueError:
            pass
    if kind is str and isinstance(value, str | int | float) and not isinstance(value, bool):
        return str(value)
    words = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}
    raise DataError(f"{where} must be {words.get(kind, str(kind))}, got {_named(value)}")


def _named(value: object) -> str:
    return "nothing" if value is None else f"{value!r}"
