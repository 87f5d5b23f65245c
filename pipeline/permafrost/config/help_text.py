"""The text of `--help`: the options of a verb with their values, limits and meanings."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Iterator, Mapping
from typing import Any, get_args

from permafrost.config.families import section_class
from permafrost.config.options import Option, Role, describe_limits, meanings_of, options_of
from permafrost.config.sections import group_members, section_names
from permafrost.config.verbs import option_classes

_WIDTH = 100
_INDENT = " " * 8


# ---- help ----------------------------------------------------------------------------------------


def list_verb(verb: str, composed: Mapping[str, Any]) -> str:
    """List the options of a verb with their values in a composed config, a paragraph for each section."""
    alone, lines = [], []
    for name in section_names(verb):
        value = composed.get(name)
        if isinstance(value, dict) and value:
            arguments = [f"{key}={format_value(each)}" for key, each in value.items()]
            filled = textwrap.fill(
                f"{name}.  {'  '.join(arguments)}", _WIDTH, subsequent_indent=_INDENT
            )
            lines.append(textwrap.indent(filled, "  "))
        else:
            alone.append(f"{name}={format_value(value)}")
    first = textwrap.fill("  ".join(alone), _WIDTH, subsequent_indent=_INDENT)
    return "\n".join(["Options and their values:\n", textwrap.indent(first, "  "), *lines])


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
    options = {
        option.name: (cls, option)
        for cls in reversed(option_classes(verb))
        for option in options_of(cls)
        if Role.SET_BY_STAGE not in option.roles
    }
    lines = [
        line
        for name, (cls, option) in options.items()
        for line in _describe(option, composed.get(name), name, meanings_of(cls).get(name, ""))
    ]
    named = textwrap.fill(
        " | ".join(experiments), _WIDTH, initial_indent="  ", subsequent_indent="  "
    )
    return (
        f"Groups{hint}:\n{choices}\n\nOptions, their values and meanings:\n\n"
        + "\n".join(lines)
        + f"\n\nExperiments, chosen with experiment=<name> or experiment=<path>.yaml:\n{named}"
    )


def _describe(option: Option, value: Any, path: str, meaning: str) -> Iterator[str]:
    """Yield the lines of an option, or of every option of a section."""
    cls = section_class(option, value)
    if cls is None:
        limits = limits_of(option)
        yield f"  {path}={format_value(value)}" + (f"  ({limits})" if limits else "")
        yield from textwrap.wrap(meaning, _WIDTH, initial_indent=_INDENT, subsequent_indent=_INDENT)
        return
    meanings = meanings_of(cls)
    for inner in options_of(cls):
        yield from _describe(
            inner, value.get(inner.name), f"{path}.{inner.name}", meanings.get(inner.name, "")
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
