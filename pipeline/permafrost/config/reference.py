"""Documentation of every option with its default, limits and meaning, for `--help` and docs/reference/options.md.

python -m permafrost.config.reference > docs/reference/options.md
"""

from __future__ import annotations

import json
import textwrap
from collections.abc import Iterator, Mapping
from dataclasses import MISSING
from typing import Any, Literal, Union, get_args, get_origin

from permafrost.config.augment import (
    AugmentOptions,
    MixConfig,
    OperationConfig,
    PixelOperationConfig,
    PolicyConfig,
)
from permafrost.config.families import FAMILIES, section_class
from permafrost.config.options import (
    Option,
    Options,
    Role,
    describe_limits,
    meanings_of,
    options_of,
    to_plain,
)
from permafrost.config.sections import group_members, section_names
from permafrost.config.store import StoreOptions
from permafrost.config.training import OptimizerOptions, TrainerOptions
from permafrost.config.verbs import VERBS, option_classes

_WIDTH = 100
_INDENT = " " * 8


# ---- help ----------------------------------------------------------------------------------------


def list_verb(verb: str, composed: Mapping[str, Any]) -> str:
    """List the options of a verb with their values in a composed config, a paragraph for each section."""
    alone, lines = [], []
    for name in section_names(verb):
        value = composed.get(name)
        if isinstance(value, dict) and value:
            arguments = [f"{key}={_format_default(each)}" for key, each in value.items()]
            filled = textwrap.fill(
                f"{name}.  {'  '.join(arguments)}", _WIDTH, subsequent_indent=_INDENT
            )
            lines.append(textwrap.indent(filled, "  "))
        else:
            alone.append(f"{name}={_format_default(value)}")
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
        limits = _limits(option)
        yield f"  {path}={_format_default(value)}" + (f"  ({limits})" if limits else "")
        yield from textwrap.wrap(meaning, _WIDTH, initial_indent=_INDENT, subsequent_indent=_INDENT)
        return
    meanings = meanings_of(cls)
    for inner in options_of(cls):
        yield from _describe(
            inner, value.get(inner.name), f"{path}.{inner.name}", meanings.get(inner.name, "")
        )


def _format_default(value: Any) -> str:
    if isinstance(value, (dict, list)):
        return json.dumps(value).replace('"', "")
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return str(value)


# ---- the page ------------------------------------------------------------------------------------

_SECTIONS: dict[str, type[Options]] = {
    "store": StoreOptions,
    "augment": AugmentOptions,
    "augment.operations (geometry)": OperationConfig,
    "augment.operations (pixels)": PixelOperationConfig,
    "augment.operations (policies)": PolicyConfig,
    "augment.mix": MixConfig,
    "optimizer": OptimizerOptions,
    "trainer": TrainerOptions,
}


def options_page() -> str:
    """Return the content of docs/reference/options.md."""
    parts = [
        "# Options\n\nGenerated from the dataclasses of permafrost/config by `python -m permafrost.config.reference`. "
        "An option is written `section.option=value`; `null` means no value.\n"
    ]
    for verb, described in VERBS.items():
        cls = described.options
        parts.append(f"## {verb}\n\n{_first_line(cls)}\n\n{_table(cls, '')}")
    sections = dict(_SECTIONS)
    for described in VERBS.values():
        for option in options_of(described.options):
            if isinstance(option.hint, type) and issubclass(option.hint, Options):
                sections.setdefault(option.name, option.hint)
    for name, cls in sections.items():
        if name not in FAMILIES:
            parts.append(f"## {name}\n\n{_first_line(cls)}\n\n{_table(cls, name)}")
            for option in options_of(cls):
                if isinstance(option.hint, type) and issubclass(option.hint, Options):
                    path = f"{name}.{option.name}"
                    table = _table(option.hint, path)
                    parts.append(f"### {path}\n\n{_first_line(option.hint)}\n\n{table}")
    families: dict[int, list[str]] = {}
    for group, members in FAMILIES.items():
        key = hash(tuple(cls for kind, cls in members.items() if kind != "none"))
        families.setdefault(key, []).append(group)
    for groups in families.values():
        parts.append(f"## {', '.join(groups)}\n")
        for kind, cls in FAMILIES[groups[0]].items():
            table = _table(cls, groups[0] if len(groups) == 1 else "")
            parts.append(
                f"### {' or '.join(f'{group}={kind}' for group in groups)}\n\n"
                f"{_first_line(cls)}\n\n{table}"
            )
    return "\n".join(parts)


def _limits(option: Option) -> str:
    limits = describe_limits(option.limits)
    return f"{limits} or null" if limits and type(None) in get_args(option.hint) else limits


def _first_line(cls: type[Options]) -> str:
    return " ".join((cls.__doc__ or "").split("\n\n")[0].split())


def _table(cls: type[Options], section: str) -> str:
    """Return the options of a class as a Markdown table, except those that are sections themselves."""
    meanings = meanings_of(cls)
    rows = []
    for option in options_of(cls):
        is_section = isinstance(option.hint, type) and issubclass(option.hint, Options)
        hidden = option.name == "kind" or Role.SET_BY_STAGE in option.roles
        is_family = not section and option.name in FAMILIES
        if hidden or is_family or is_section:
            continue
        name = f"{section}.{option.name}" if section else option.name
        default = (
            "required"
            if option.default is MISSING
            else f"`{_format_default(to_plain(option.default))}`"
        )
        notes = [meanings.get(option.name, "")]
        if Role.OUTSIDE_IDENTITY in option.roles:
            notes.append("*Does not change a run's results.*")
        meaning = " ".join(note for note in notes if note).replace("|", "\\|")
        limits = _limits(option)
        rows.append(f"| `{name}` | {_type(option.hint)} | {default} | {limits} | {meaning} |")
    if not rows:
        return ""
    return "\n".join(
        ["| option | type | default | limits | meaning |", "|---|---|---|---|---|", *rows, ""]
    )


_TYPES = {int: "integer", float: "number", str: "text", bool: "true or false", Any: "any"}


def _type(hint: Any) -> str:
    """Describe a type in terms of YAML."""
    origin, members = get_origin(hint), get_args(hint)
    if origin is Literal:
        return ", ".join(f"`{member}`" for member in members)
    if origin is Union or (members and type(None) in members):
        return " or ".join("null" if member is type(None) else _type(member) for member in members)
    if origin is tuple:
        types = [member for member in members if member is not Ellipsis]
        return (
            f"list of {_type(types[0])}" if len(types) == 1 else f"[{', '.join(map(_type, types))}]"
        )
    if origin is dict:
        return f"mapping to {_type(members[1])}"
    return _TYPES.get(hint, getattr(hint, "__name__", str(hint)))


if __name__ == "__main__":
    print(options_page(), end="")
