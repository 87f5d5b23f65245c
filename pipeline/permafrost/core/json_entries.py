"""Entries of JSON files, built from plain values with a check of every type, digest and range."""

from __future__ import annotations

import re
import sys
from dataclasses import fields, is_dataclass
from functools import lru_cache
from types import NoneType, UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from permafrost.core.errors import require

_DIGEST = re.compile(r"[0-9a-f]{64}")


def require_entry(condition: bool, error_message: str) -> None:
    """Check a condition on an entry of a file.

    Raises:
        EntryError: If it does not hold, with `error_message`.
    """
    require(condition, error_message, EntryError)


def require_inside(path: str) -> None:
    """Check that a path stays in the folder that it is relative to.

    Raises:
        EntryError: If it does not.
    """
    require_entry(stays_inside(path), f"the path {path[:80]!r} leaves the folder")


def stays_inside(path: str) -> bool:
    """Return whether a path that a file names stays, by its text, in the folder that it is relative to.

    It is the rule for every such path. Whether links may lead out is decided where the file is opened: a RootedPath
    follows none, and `named_file` follows those that stay inside, too.
    """
    return path[:1] not in ("", "/") and ".." not in path.split("/") and "\0" not in path


def require_digest(digest: str) -> None:
    """Check that a text is a SHA-256.

    Raises:
        EntryError: If it is not.
    """
    require_entry(_DIGEST.fullmatch(digest) is not None, f"{digest[:80]!r} is not a SHA-256")


T = TypeVar("T")
_SHOWN_CHARACTERS = 80
_MAX_NUMBER = sys.float_info.max


class EntryError(ValueError):
    """Entry that a manifest of this version cannot have; the reader of the file adds its name."""


def from_dict(cls: type[T], values: Any, where: str = "") -> T:
    """Build a dataclass from a JSON mapping that has exactly its fields, each of the declared type.

    Args:
        cls: The dataclass, whose fields may be dataclasses.
        values: Parsed JSON.
        where: Entry that contains the mapping, for messages.

    Raises:
        EntryError: If an entry is missing, unknown or of another type, or if the dataclass refuses it.
    """
    if not isinstance(values, dict):
        raise EntryError(f"{where or 'it'} must be a mapping, got {_show(values)}")
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


_WORDS = {int: "a whole number", float: "a number", str: "text", bool: "true or false"}


def _convert(hint: Any, value: Any, where: str) -> Any:
    """Return a value in the type of a hint. Raises EntryError, which shows no more than a line of a hostile value."""
    origin, members = get_origin(hint), get_args(hint)
    if hint is Any or (value is None and NoneType in members):
        return value
    if origin in (Union, UnionType):
        return _convert(next(member for member in members if member is not NoneType), value, where)
    if origin is Literal:
        if not any(type(value) is type(member) and value == member for member in members):
            allowed = ", ".join(map(str, members))
            raise EntryError(f"{where} must be one of {allowed}; got {_show(value)}")
        return value
    if origin in (tuple, list):
        return origin(_elements(members, value, where))
    if origin is dict:
        if not isinstance(value, dict):
            raise EntryError(f"{where} must be a mapping, got {_show(value)}")
        return {
            str(key): _convert(members[1], element, f"{where}.{key}")
            for key, element in value.items()
        }
    if is_dataclass(hint) and isinstance(hint, type):
        return from_dict(hint, value, where)
    is_number = hint is float and type(value) in (int, float)
    if (type(value) is not hint and not is_number) or (is_number and not abs(value) <= _MAX_NUMBER):
        raise EntryError(f"{where} must be {_WORDS.get(hint, hint)}, got {_show(value)}")
    return float(value) if is_number else value


def _elements(members: tuple[Any, ...], value: Any, where: str) -> list[Any]:
    if not isinstance(value, (list, tuple)):
        raise EntryError(f"{where} must be a list, got {_show(value)}")
    has_any_length = len(members) == 1 or members[-1] is Ellipsis
    if not has_any_length and len(value) != len(members):
        raise EntryError(
            f"{where} must have {len(members)} values, got {len(value)}: {_show(value)}"
        )
    hints = [members[0]] * len(value) if has_any_length else members
    pairs = enumerate(zip(hints, value, strict=True))
    return [_convert(hint, each, f"{where}[{position}]") for position, (hint, each) in pairs]


def _show(value: Any) -> str:
    text = type(value).__name__ if isinstance(value, (dict, list)) else repr(value)
    return text if len(text) <= _SHOWN_CHARACTERS else f"{text[:_SHOWN_CHARACTERS]}..."
