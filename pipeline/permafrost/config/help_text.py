"""The text of `--help`: the options of a verb with their values, limits and meanings."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple, get_args

from permafrost.config.families import FAMILIES, section_class
from permafrost.config.options import Option, Role, describe_limits, meanings_of, options_of
from permafrost.config.sections import DEFAULT_MEMBERS, group_members, section_names
from permafrost.config.verbs import VERBS, option_classes

_WIDTH = 100
_INDENT = " " * 8
_MAX_COMMON = 15
"""Number of options that the help of a verb shows, which names no common ones."""


# ---- help ----------------------------------------------------------------------------------------


def describe_common(verb: str, composed: Mapping[str, Any]) -> str:
    """Describe the common options of a verb: its own choice, each with its value and at most two lines."""
    described = {entry.path: entry for entry in _entries(verb, composed)}
    paths = VERBS[verb].common.split() or tuple(described)[:_MAX_COMMON]
    entries = [described.get(path) or _member_entry(path, composed) for path in paths]
    lines = [
        line
        for entry in entries
        if entry is not None
        for line in (f"  {entry.path}={entry.value}", *_wrapped(entry.meaning, max_lines=2))
    ]
    return "Common options:\n\n" + "\n".join(lines)


def _member_entry(path: str, composed: Mapping[str, Any]) -> _Entry | None:
    """Return the entry of a section with members, or of an option that members have and the chosen one has not."""
    section, _, name = path.rpartition(".")
    if members := group_members(name):
        node = composed.get(section, composed).get(name) or {}
        chosen = node.get("kind", DEFAULT_MEMBERS[name])
        return _Entry(path, "..." if chosen == "none" else chosen, f"One of {', '.join(members)}.")
    meanings = map(meanings_of, FAMILIES.get(section, {}).values())
    return next((_Entry(path, "...", known[name]) for known in meanings if name in known), None)


def describe_verb(verb: str, composed: Mapping[str, Any]) -> str:
    """Describe a verb: its groups, then its options with their values in a composed config and their meanings."""
    names = [*section_names(verb), "experiment"]
    groups = {name: members for name in sorted(names) if (members := group_members(name))}
    experiments = groups.pop("experiment", [])
    choices = "\n".join(
        textwrap.fill(f"  {name}={' | '.join(members)}", _WIDTH, subsequent_indent=_INDENT)
        for name, members in groups.items()
    )
    chosen = (
        "data=image_folder" if "data" in groups else "student=timm" if "student" in groups else ""
    )
    hint = f" (the options of a chosen member: --help {chosen})" if chosen else ""
    lines = [
        line
        for entry in _entries(verb, composed)
        for line in (f"  {entry.path}={entry.value}{entry.limits}", *_wrapped(entry.meaning))
    ]
    named = textwrap.fill(
        " | ".join(experiments), _WIDTH, initial_indent="  ", subsequent_indent="  "
    )
    return (
        f"Groups{hint}:\n{choices}\n\nOptions, their values and meanings:\n\n"
        + "\n".join(lines)
        + f"\n\nExperiments, chosen with experiment=<name> or experiment=<path>.yaml:\n{named}"
    )


class _Entry(NamedTuple):
    """An option as the help shows it."""

    path: str
    value: str
    meaning: str
    limits: str = ""


def _entries(verb: str, composed: Mapping[str, Any]) -> Iterator[_Entry]:
    """Yield an entry for each option of a verb with its value in a composed config."""
    options = {
        option.name: (cls, option)
        for cls in reversed(option_classes(verb))
        for option in options_of(cls)
        if Role.SET_BY_STAGE not in option.roles
    }
    for name, (cls, option) in options.items():
        yield from _describe(option, composed.get(name), name, meanings_of(cls).get(name, ""))


def _describe(option: Option, value: Any, path: str, meaning: str) -> Iterator[_Entry]:
    """Yield the entry of an option, or of every option of a section."""
    if (cls := section_class(option, value)) is None:
        limits = limits_of(option)
        yield _Entry(path, format_value(value), meaning, f"  ({limits})" if limits else "")
        return
    meanings = meanings_of(cls)
    for inner in options_of(cls):
        yield from _describe(
            inner, value.get(inner.name), f"{path}.{inner.name}", meanings.get(inner.name, "")
        )


def _wrapped(meaning: str, max_lines: int | None = None) -> list[str]:
    return textwrap.wrap(
        meaning,
        _WIDTH,
        initial_indent=_INDENT,
        subsequent_indent=_INDENT,
        max_lines=max_lines,
        placeholder=" ...",
        break_on_hyphens=False,
    )


def format_value(value: Any) -> str:
    """Return a plain value as it is written on a command line."""
    if isinstance(value, (dict, list)):
        return json.dumps(value).replace('"', "")
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return str(value)


def limits_of(option: Option) -> str:
    """Describe the limits of an option in words, empty if it has none."""
    limits = describe_limits(option.limits)
    return f"{limits} or null" if limits and type(None) in get_args(option.hint) else limits
