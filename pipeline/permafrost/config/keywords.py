"""Words of a command line from keyword arguments of Python, so that both name the same options."""

from __future__ import annotations

import json
import os
import re
from typing import TYPE_CHECKING, Any

from permafrost.config.compose import GROUPS, compose, section_names
from permafrost.config.options import Options, options_of
from permafrost.config.verbs import FAMILIES, VERBS
from permafrost.core.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

_PLAIN = re.compile(r"[A-Za-z_./][\w./:@%+-]*", re.ASCII)
"""Texts that need no quotes as the value of a word, unless they are a constant."""
_CONSTANTS = ("true", "false", "null", "nan", "inf")


def words_of_options(verb: str, words: Sequence[str], options: Mapping[str, Any]) -> list[str]:
    """Return the words of a command line: `words` and those of the keyword arguments.

    An argument is named like an option, with a dot or two underscores before its last part (`trainer__epochs=30`). A
    name without a section is that of the only section that has it (`tau=4` is `method.tau=4`). The member of a family
    is a text, or a mapping with its kind and options (`student={"kind": "cifar", "name": "resnet8"}`). `store` may be
    the folder of a store.

    Raises ConfigError for names that no section or several have.
    """
    chosen, open_names = [*words], {}
    for argument, value in options.items():
        name = argument.replace("__", ".")
        if name == "store" and isinstance(value, (str, os.PathLike)):
            chosen.append(f"store.path={_text(value)}")
        elif "." in name or name in (*section_names(verb), "experiment"):
            chosen += _words_of(verb, name, value)
        else:
            open_names[name] = value
    if not open_names:
        return chosen
    composed = compose(verb, chosen)
    for name, value in open_names.items():
        sections = [
            section
            for section in section_names(verb)
            if isinstance(composed.get(section), dict) and name in composed[section]
        ]
        if len(sections) != 1:
            which = (
                f"is an option of {', '.join(sections)}; write "
                + " or ".join(f"{section}__{name}" for section in sections)
                if sections
                else "is no option of this verb and its chosen members"
            )
            raise ConfigError(f"{verb}({name}=...): {name} {which}")
        chosen += _words_of(verb, f"{sections[0]}.{name}", value)
    return chosen


def _words_of(verb: str, name: str, value: Any) -> Iterator[str]:
    if not isinstance(value, dict) or not _is_section(verb, name):
        yield f"{name}={_text(value)}"
        return
    if "kind" in value:
        yield f"{name}={_text(value['kind'])}"
    for option, own in value.items():
        if option != "kind":
            yield from _words_of(verb, f"{name}.{option}", own)


def _is_section(verb: str, name: str) -> bool:
    """Return whether a mapping sets the options of a section one by one, as it does not for `arms` and `grid`."""
    section, _, nested = name.rpartition(".")
    if section:
        return nested in GROUPS
    options = [o for own in (verb, "distill", "evaluate") for o in options_of(VERBS[own])]
    return (
        name in FAMILIES
        or name in GROUPS
        or any(
            isinstance(option.hint, type) and issubclass(option.hint, Options)
            for option in options
            if option.name == name
        )
    )


def _text(value: Any) -> str:
    """Format a value as in an override: JSON, except that keys and plain texts have no quotes."""
    if isinstance(value, os.PathLike):
        value = os.fspath(value)
    if isinstance(value, str):
        is_plain = _PLAIN.fullmatch(value) and value.lower() not in _CONSTANTS
        return value if is_plain else json.dumps(value, ensure_ascii=False)
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key}: {_text(own)}" for key, own in value.items()) + "}"
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(map(_text, value)) + "]"
    return json.dumps(value)
