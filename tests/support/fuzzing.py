"""Hypothesis strategies that edit sound files, and the rule that every parser keeps.

The rule: whatever a file contains, a parser returns values or raises one UserError. No other exception, and no hang.
Examples are drawn from a fixed seed, so that a run is repeatable and depends on no clock.
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING, Any

from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from permafrost.core.errors import UserError

if TYPE_CHECKING:
    from collections.abc import Callable

    from hypothesis.strategies import DrawFn, SearchStrategy

NUMBERS = (0, 1, 2, 7, 127, 128, 255, 256, 511, 512, 2**15, 2**16, 2**31 - 1, 2**31, 2**32 - 1)
_LONG_NUMBERS = (*NUMBERS, 2**40, 2**62, 2**63 - 1, 2**64 - 1)
_LENGTHS = st.integers(1, 64)
_DETAILS: dict[str, SearchStrategy[Any]] = {
    "flip": st.integers(0, 7),
    "byte": st.integers(0, 255),
    "number": st.sampled_from(NUMBERS),
    "long": st.sampled_from(_LONG_NUMBERS),
    "cut": st.none(),
    "remove": _LENGTHS,
    "double": _LENGTHS,
    "insert": st.binary(max_size=64),
    "zeros": _LENGTHS,
}
_EDITS = ("flip", *_DETAILS)
_MOST_EDITS = 6


def fuzz(examples: int, strategy: SearchStrategy[Any], check: Callable[[Any], None]) -> None:
    """Call `check` with that many examples of the strategy, of a fixed seed; show the smallest one that fails."""

    @settings(
        max_examples=examples,
        derandomize=True,
        deadline=None,
        database=None,
        phases=(Phase.generate, Phase.shrink),
        suppress_health_check=list(HealthCheck),
    )
    @given(strategy)
    def run(example: Any) -> None:
        check(example)

    run()


def reads_or_refuses(read: Callable[[], object]) -> bool:
    """Call a parser and return whether it refused. Exceptions other than UserError pass through."""
    try:
        read()
    except UserError as error:
        if not str(error):
            raise
        return True
    return False


class Edited(bytes):
    """Bytes that Hypothesis shows by the edits that made them."""

    edits: tuple[tuple[Any, ...], ...] = ()

    def __repr__(self) -> str:
        return f"<sound bytes after {', '.join(map(str, self.edits))}>"


@st.composite
def edited_bytes(draw: DrawFn, sound: bytes) -> Edited:
    """Edit a sound file one to six times: bits, bytes, little-endian numbers, and pieces cut, repeated or inserted."""
    data = bytearray(sound)
    edits: list[tuple[Any, ...]] = []
    for _ in range(draw(st.integers(1, _MOST_EDITS))):
        kind, place = draw(st.sampled_from(_EDITS)), draw(st.integers(0, max(len(data) - 1, 0)))
        detail: Any = draw(_DETAILS[kind])
        edits.append((kind, place, detail))
        if kind == "flip" and data:
            data[place] ^= 1 << detail
        elif kind == "byte" and data:
            data[place] = detail
        elif kind == "number":
            data[place : place + 4] = struct.pack("<I", detail)
        elif kind == "long":
            data[place : place + 8] = struct.pack("<Q", detail)
        elif kind == "cut":
            del data[place:]
        elif kind == "remove":
            del data[place : place + detail]
        elif kind == "double":
            data[place:place] = data[place : place + detail]
        elif kind == "insert":
            data[place:place] = detail
        elif kind == "zeros":
            data[place : place + detail] = bytes(len(data[place : place + detail]))
    edited = Edited(data)
    edited.edits = tuple(edits)
    return edited


def json_values() -> SearchStrategy[Any]:
    """JSON values of every type, with numbers at the limits of integer types, and NaN as JSON readers accept it."""
    atoms = (
        st.none()
        | st.booleans()
        | st.integers()
        | st.sampled_from([*_LONG_NUMBERS, -1, -(2**63), 10**400])
        | st.floats()
        | st.text(max_size=40)
        | st.sampled_from(["", "/", "../x", "a\0b", "\x1b[2J", "a" * 5000, "\ud800"])
    )
    return st.recursive(
        atoms,
        lambda inner: (
            st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=10), inner, max_size=4)
        ),
        max_leaves=6,
    )


@st.composite
def edited_json(draw: DrawFn, sound: dict[str, Any]) -> dict[str, Any]:
    """Change one to three entries at any depth of a JSON object: another value, removed, or added."""
    changed = _copy(sound)
    for _ in range(draw(st.integers(1, 3))):
        place: Any = changed
        while True:
            keys = list(place) if isinstance(place, dict) else list(range(len(place)))
            if not keys:
                break
            key = draw(st.sampled_from(keys))
            if isinstance(place[key], dict | list) and place[key] and draw(st.booleans()):
                place = place[key]
                continue
            action = draw(st.sampled_from(["replace", "replace", "replace", "remove"]))
            if action == "replace":
                place[key] = draw(json_values())
            else:
                del place[key]
            break
        if isinstance(place, dict) and draw(st.integers(0, 9)) == 0:
            place[draw(st.text(max_size=10))] = draw(json_values())
    return changed


def _copy(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _copy(each) for key, each in value.items()}
    return [_copy(each) for each in value] if isinstance(value, list) else value
