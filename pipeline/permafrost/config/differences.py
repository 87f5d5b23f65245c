"""Differences of two descriptions, such as the options of two passes or two runs, entry by entry."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import PurePath
from types import MappingProxyType
from typing import Any

from permafrost.config.builder import flatten_options
from permafrost.core.digests import SHORT, plain_values

NOT_SET = "not set"
"""Value of an entry that one of two descriptions does not have."""
_MAX_SHOWN = 60
"""Largest number of characters of a value in a line."""
_CHOICES = {
    "annotate.outputs": ("annotate", "explainer"),
    "views": ("views", "augment", "split", "subset"),
}
"""Sections of which an option decides what is read, besides the `kind` of each section."""


def differences(
    existing: Mapping[str, Any],
    requested: Mapping[str, Any],
    options: Mapping[str, str] = MappingProxyType({}),
) -> dict[str, tuple[Any, Any]]:
    """Return the entries in which two descriptions differ, each with both values.

    Args:
        existing: First description.
        requested: Second one.
        options: Start of the name of an option by the start of the name of an entry. The code of a `factory` is named
            by its file and function.
    """
    old, new = map(flatten_options, plain_values([existing, requested]))
    places = [
        PurePath(str(each)).name
        for name, each in {**old, **new}.items()
        if name.endswith(".factory")
    ]
    code = {
        f"{section}plug-in {re.split('[.:]', place)[0]}": f"code of {place}"
        for place in places
        for section in ("inputs.", "teacher.")
    }
    pairs = {name: (old.get(name, NOT_SET), new.get(name, NOT_SET)) for name in {**old, **new}}
    return {
        code.get(name, f"{options.get(start, '')}{name.removeprefix(start)}"): pair
        for name, pair in pairs.items()
        for start in [next(filter(name.startswith, options), "")]
        if pair[0] != pair[1]
    }


def describe_differences(changed: Mapping[str, tuple[Any, Any]], most: int = 8) -> str:
    """Describe differences in one line, without the options that only the other choice of a section has.

    Args:
        changed: Result of `differences`.
        most: Largest number of entries.
    """
    chosen = [
        (name, f"{section}.")
        for name, pair in changed.items()
        if NOT_SET not in pair or name.endswith(".kind")
        for section in _CHOICES.get(name, (name.removesuffix(".kind"),))
    ]
    texts = [
        describe_difference(name, *pair)
        for name, pair in changed.items()
        if NOT_SET not in pair
        or not any(name != each and f"{name}.".startswith(start) for each, start in chosen)
    ]
    return ", ".join(texts[:most] or ["no difference"]) + f" and {len(texts) - most} more" * (
        len(texts) > most
    )


def describe_fewest(changed: Mapping[str, Mapping[str, tuple[Any, Any]]]) -> str:
    """Describe the fewest differences, with the name of what they are from; empty if there is none.

    Args:
        changed: Results of `differences` by name.
    """
    nearest = min(changed, key=lambda name: len(changed[name]), default="")
    return f"{describe_differences(changed[nearest])} (nearest: {nearest})" if nearest else ""


def describe_difference(name: str, old: Any, new: Any) -> str:
    """Describe one entry of two descriptions, as in `method.tau 1 -> 4`."""
    return f"{name} {shown_value(old)} -> {shown_value(new)}"


def shown_value(value: Any) -> str:
    """Return a value as it is typed on a command line, a digest by its first digits, and of a long text the start."""
    text = value if isinstance(value, str) and value else json.dumps(value).removesuffix(".0")
    if isinstance(value, list):
        text = f"[{', '.join(map(shown_value, value))}]"
    text = re.sub("[0-9a-f]{64}", lambda digest: f"sha256 {digest[0][:SHORT]}", text)
    return text if len(text) <= _MAX_SHOWN else f"{text[: _MAX_SHOWN - 3]}..."
