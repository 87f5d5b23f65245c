"""Suggestions for names that do not exist: sections, their members, and options."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence

from permafrost.config.sections import group_members, option_paths
from permafrost.core.errors import ConfigError, printable

SHOWN = 200
"""Characters of a value that an error shows."""
_LISTED = 40
"""Number of names that an error lists."""
_MAX_PLACES = 3
"""Largest number of options that a message suggests."""


def suggest_options(verb: str, name: str) -> str:
    """Suggest the options of a verb whose last part is `name` or resembles it, if there are few; empty otherwise."""
    every = {place: place.rpartition(".")[2] for place in option_paths(verb)}
    names = {name, *difflib.get_close_matches(name, sorted(set(every.values())), n=1, cutoff=0.65)}
    last = name if name in every.values() else min(names - {name}, default=name)
    places = [place for place, last_part in every.items() if last_part == last]
    if not 0 < len(places) <= _MAX_PLACES:
        return ""
    return f" (did you mean {' or '.join(f'{place}=' for place in places)}?)"


def choices(word: str, allowed: Sequence[str]) -> str:
    """List what is allowed, or what resembles the word if the list is too long to read.

    Args:
        word: Word that was typed.
        allowed: Words that would have been allowed.
    """
    if len(allowed) <= _LISTED:
        return f"choose one of: {', '.join(allowed)}"
    close = difflib.get_close_matches(word, allowed, n=8, cutoff=0.3) or allowed[:8]
    return f"choose one of {len(allowed)}, such as: {', '.join(close)}"


def suggest(word: str, allowed: Iterable[str]) -> str:
    """Suggest the allowed word that resembles a word, empty if none does."""
    close = difflib.get_close_matches(word, list(allowed), n=1)
    return f" (did you mean {close[0]}?)" if close else ""


def no_member(group: str, kind: str, path: str = "") -> ConfigError:
    """Return the error for a member that does not exist.

    Args:
        group: Section or family of the member.
        kind: Name of the member.
        path: Place of the section in the config; empty is `group` itself.
    """
    allowed = group_members(group)
    return ConfigError(
        f"{path or group}={printable(kind)[:SHOWN]} does not exist{suggest(kind, allowed)}; {choices(kind, allowed)}"
    )
