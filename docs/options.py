"""Write docs/reference/options.md, the page of all options, from the dataclasses of permafrost/config.

python -m docs.options > docs/reference/options.md
"""

from __future__ import annotations

from dataclasses import MISSING
from typing import Any, Literal, Union, get_args, get_origin

from permafrost.config.augment import (
    AugmentOptions,
    MixConfig,
    OperationConfig,
    PixelOperationConfig,
    PolicyConfig,
)
from permafrost.config.families import FAMILIES
from permafrost.config.help_text import format_value, limits_of
from permafrost.config.options import Options, Role, meanings_of, options_of, to_plain
from permafrost.config.store import StoreOptions
from permafrost.config.training import OptimizerOptions, TrainerOptions
from permafrost.config.verbs import VERBS

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


_EMPTY = "''"


def options_page() -> str:
    """Return the content of docs/reference/options.md."""
    parts = [
        "# Options\n\nGenerated from the dataclasses of permafrost/config by `python -m docs.options`. "
        "An option is written `section.option=value`; `null` means no value.\n"
    ]
    for verb, described in VERBS.items():
        cls = described.options
        read = [option.name for option in options_of(cls) if _is_section(option.hint)]
        parts.append(
            f"## {verb}\n\nOptions of `{verb}` outside of a section. It also reads: {', '.join(read)}.\n\n"
            f"{_table(cls, '')}"
        )
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
        if group == "network":  # of an option of teacher=folds, which nobody types
            continue
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
        parts += _tables_within(groups[0])
    return "\n".join(parts)


def _tables_within(group: str) -> list[str]:
    """Return a table for each class of sections within the members of a group that has none yet."""
    sections: dict[type[Options], dict[str, None]] = {}
    for member in FAMILIES[group].values():
        for option in options_of(member):
            if _is_section(option.hint) and option.hint not in _SECTIONS.values():
                sections.setdefault(option.hint, {})[option.name] = None
    return [
        f"### {', '.join(f'{group}.{name}' for name in names)}\n\n{_first_line(cls)}\n\n"
        + _table(cls, f"{group}.{next(iter(names))}")
        for cls, names in sections.items()
    ]


def _is_section(hint: Any) -> bool:
    return isinstance(hint, type) and issubclass(hint, Options)


def _first_line(cls: type[Options]) -> str:
    return " ".join((cls.__doc__ or "").split("\n\n")[0].split())


def _table(cls: type[Options], section: str) -> str:
    """Return the options of a class as a Markdown table, except those that are sections themselves."""
    meanings = meanings_of(cls)
    rows = []
    for option in options_of(cls):
        is_section = _is_section(option.hint)
        hidden = option.name == "kind" or Role.SET_BY_STAGE in option.roles
        is_family = not section and option.name in FAMILIES
        if hidden or is_family or is_section:
            continue
        name = f"{section}.{option.name}" if section else option.name
        default = (
            "required"
            if option.default is MISSING
            else f"`{format_value(to_plain(option.default)) or _EMPTY}`"
        )
        notes = [meanings.get(option.name, "")]
        if Role.OUTSIDE_IDENTITY in option.roles:
            notes.append("*Does not change a run's results.*")
        meaning = " ".join(note for note in notes if note).replace("|", "\\|")
        limits = limits_of(option)
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
