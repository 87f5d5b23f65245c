"""Conversion of plain values, as JSON and YAML have them, to the types that dataclasses declare."""

from __future__ import annotations

import types
from typing import Any, ClassVar, Literal, Union, get_args, get_origin

_WORDS = {int: "a whole number", float: "a number", str: "text", bool: "true or false"}


class Conversion:
    """Strict conversion: a value has the declared type, or an error names its place and states what is allowed."""

    error: ClassVar[type[Exception]]

    def __call__(self, hint: Any, value: Any, where: str) -> Any:
        """Convert a value to the type of a hint.

        where  place of the value, for messages
        """
        if hint is Any:
            return value
        origin, members = get_origin(hint), get_args(hint)
        if origin in (Union, types.UnionType):
            if value is None and type(None) in members:
                return None
            return self(next(m for m in members if m is not type(None)), value, where)
        if origin is Literal:
            if not any(type(value) is type(member) and value == member for member in members):
                allowed = ", ".join(map(str, members))
                raise self.error(f"{where} must be one of {allowed}; got {self.show(value)}")
            return value
        if origin in (tuple, list):
            return origin(self._elements(origin, members, value, where))
        if origin is dict:
            if not isinstance(value, dict):
                raise self.error(f"{where} must be a mapping, got {self.show(value)}")
            return {str(k): self(members[1], v, f"{where}.{k}") for k, v in value.items()}
        return self.build(hint, value, where)

    def build(self, hint: Any, value: Any, where: str) -> Any:
        """Convert a value to a class that is no collection."""
        if type(value) is not hint:
            raise self.error(f"{where} must be {_WORDS.get(hint, hint)}, got {self.show(value)}")
        return value

    def show(self, value: Any) -> str:
        """Format a value for a message."""
        return repr(value)

    def _elements(self, origin: Any, members: tuple[Any, ...], value: Any, where: str) -> list[Any]:
        if not isinstance(value, (list, tuple)):
            raise self.error(f"{where} must be a list, got {self.show(value)}")
        has_any_length = origin is list or members[-1] is Ellipsis
        if not has_any_length and len(value) != len(members):
            raise self.error(
                f"{where} must have {len(members)} values, got {len(value)}: {self.show(value)}"
            )
        hints = [members[0]] * len(value) if has_any_length else members
        pairs = enumerate(zip(hints, value, strict=True))
        return [self(hint, each, f"{where}[{i}]") for i, (hint, each) in pairs]
