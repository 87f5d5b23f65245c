"""Conversion of plain JSON values to the dataclasses of a manifest, with every entry checked for its type."""

from __future__ import annotations

import math
import types
from dataclasses import fields, is_dataclass
from functools import lru_cache
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

T = TypeVar("T")

_SHOWN_CHARACTERS = 80
_WORDS = {int: "a whole number", float: "a number", str: "text", bool: "true or false"}


class EntryError(ValueError):
    """Entry that a manifest of this version cannot have; the reader of the file adds its name."""


def from_dict(cls: type[T], values: Any, where: str = "") -> T:
    """Build a dataclass from a JSON mapping that has exactly its fields, each of the declared type.

    where  the entry that contains the mapping, for messages
    Raises EntryError; the dataclass's own __post_init__ may also raise it.
    """
    if not isinstance(values, dict):
        raise EntryError(f"{where or 'it'} must be a mapping, got {_shown(values)}")
    hints = _hints(cls)  # type: ignore[arg-type]
    if set(values) != set(hints):
        names = ", ".join(sorted(map(str, set(values) ^ set(hints))))
        raise EntryError(f"{where or cls.__name__} has missing or unknown entries: {names[:200]}")
    converted = {
        name: _convert(hints[name], value, f"{where}.{name}" if where else name)
        for name, value in values.items()
    }
    try:
        return cls(**converted)
    except EntryError as error:
        raise EntryError(f"{where}: {error}" if where else str(error)) from None


@lru_cache(maxsize=64)
def _hints(cls: type) -> dict[str, Any]:
    hints = get_type_hints(cls)
    return {spec.name: hints[spec.name] for spec in fields(cls)}


def _convert(hint: Any, value: Any, where: str) -> Any:
    if hint is Any:
        return value
    origin, members = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        if value is None and type(None) in members:
            return None
        return _convert(next(m for m in members if m is not type(None)), value, where)
    if origin is Literal:
        if not isinstance(value, str) or value not in members:
            raise EntryError(f"{where} must be one of {', '.join(members)}, got {_shown(value)}")
        return value
    if origin in (tuple, list):
        if not isinstance(value, list):
            raise EntryError(f"{where} must be a list, got {_shown(value)}")
        if origin is tuple and members[-1] is not Ellipsis and len(value) != len(members):
            raise EntryError(f"{where} must have {len(members)} values, got {len(value)}")
        each = members if origin is tuple and members[-1] is not Ellipsis else None
        return origin(
            _convert(each[i] if each else members[0], v, f"{where}[{i}]")
            for i, v in enumerate(value)
        )
    if origin is dict:
        if not isinstance(value, dict):
            raise EntryError(f"{where} must be a mapping, got {_shown(value)}")
        return {name: _convert(members[1], v, f"{where}.{name}") for name, v in value.items()}
    if is_dataclass(hint) and isinstance(hint, type):
        return from_dict(hint, value, where)
    if hint is float and type(value) is int:
        value = float(value)
    if type(value) is not hint or (hint is float and not math.isfinite(value)):
        raise EntryError(f"{where} must be {_WORDS.get(hint, hint)}, got {_shown(value)}")
    return value


def _shown(value: Any) -> str:
    text = repr(value) if not isinstance(value, (dict, list)) else type(value).__name__
    return text if len(text) <= _SHOWN_CHARACTERS else f"{text[:_SHOWN_CHARACTERS]}..."
