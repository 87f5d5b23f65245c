"""JSON Schema of experiments, by which editors complete and check them: `permafrost-shell schema > experiments.json`.

An experiment names it in its first line: `# yaml-language-server: $schema=experiment.schema.json`.
"""

from __future__ import annotations

from dataclasses import MISSING
from types import UnionType
from typing import Any, Union, get_args, get_origin

from permafrost.config.experiments import BASES
from permafrost.config.families import FAMILIES
from permafrost.config.options import (
    Option,
    Options,
    meanings_of,
    option_schema,
    options_of,
    to_plain,
)
from permafrost.config.sections import GROUPS, group_members, top_options


def experiment_schema() -> dict[str, Any]:
    """Return the JSON Schema of an experiment, with the members of the plug-ins that are loaded."""
    bases = {"type": "array", "items": {"type": "string"}}
    described = "Experiments that this one changes."
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "Experiment of permafrost",
        "type": "object",
        "properties": {
            BASES: bases | {"description": described},
            **{name: _option_schema(option) for name, option in top_options().items()},
        },
        "additionalProperties": False,
        "$defs": {name: _members_schema(name) for name in (*FAMILIES, *GROUPS)},
    }


def _members_schema(name: str) -> dict[str, Any]:
    """Return the schema of a section that has members: the name of one, or a mapping with its options."""
    kinds = group_members(name)
    if name in GROUPS:
        sections = [_section_schema(GROUPS[name], kinds)]
    else:
        sections = [_section_schema(FAMILIES[name][kind], [kind]) for kind in kinds]
    return {"anyOf": [{"enum": kinds}, *sections]}


def _option_schema(option: Option) -> dict[str, Any]:
    hint = option.hint
    if _is_section(hint) and (option.name in FAMILIES or option.name in GROUPS):
        return {"$ref": f"#/$defs/{option.name}"}
    if _is_section(hint):
        return _section_schema(hint)
    inner: Any = get_args(hint)[0] if get_origin(hint) is tuple else None
    if _is_section(inner):
        sections = [_section_schema(cls) for cls in get_args(inner) or (inner,)]
        items = sections[0] if len(sections) == 1 else {"anyOf": sections}
        return {"type": "array", "items": items}
    schema = option_schema(option)
    return {"anyOf": [schema, {"type": "string"}]} if hint == tuple[str, ...] else schema


def _is_section(hint: Any) -> bool:
    """Return whether the type is that of a section, or of one of two kinds of sections."""
    members = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
    return any(isinstance(member, type) and issubclass(member, Options) for member in members)


def _section_schema(cls: type[Options], kinds: list[str] | None = None) -> dict[str, Any]:
    """Return the schema of a section.

    `kinds` are the values that its entry `kind` may have, None if it has no members.
    """
    meanings = meanings_of(cls)
    entries = {}
    for option in options_of(cls):
        entry = _option_schema(option) | {"description": meanings.get(option.name, "")}
        is_plain = option.default is not MISSING and not isinstance(option.default, type)
        entries[option.name] = entry | ({"default": to_plain(option.default)} if is_plain else {})
    if kinds is not None:
        entries["kind"] = {"enum": kinds}
    return {"type": "object", "properties": entries, "additionalProperties": False}
