"""Words of a command line from keyword arguments of Python, so that both name the same options."""

from __future__ import annotations

import difflib
import os
from typing import TYPE_CHECKING, Any

from permafrost.config.compose import GROUPS, compose, section_names
from permafrost.config.options import Options, options_of
from permafrost.config.points import option_text
from permafrost.config.verbs import FAMILIES, VERBS
from permafrost.core.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence


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
            chosen.append(f"store.path={option_text(value)}")
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
            known = {
                option
                for section in section_names(verb)
                if isinstance(composed.get(section), dict)
                for option in composed[section]
            }
            close = difflib.get_close_matches(name, sorted(known), n=1)
            which = (
                f"is an option of {', '.join(sections)}; write "
                + " or ".join(f"{section}__{name}" for section in sections)
                if sections
                else f"is no option of {verb} and its chosen members"
                + (
                    f" (did you mean {close[0]}?)"
                    if close
                    else f"; permafrost {verb} --help lists them"
                )
            )
            raise ConfigError(f"{verb}({name}=...): {name} {which}")
        chosen += _words_of(verb, f"{sections[0]}.{name}", value)
    return chosen


def _words_of(verb: str, name: str, value: Any) -> Iterator[str]:
    if not isinstance(value, dict) or not _is_section(verb, name):
        yield f"{name}={option_text(value)}"
        return
    if "kind" in value:
        yield f"{name}={option_text(value['kind'])}"
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
