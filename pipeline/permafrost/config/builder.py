"""Construction of the config dataclasses from plain values, checked key by key.

An unknown key, a value of the wrong type or a value out of range raises a ConfigError that names the option and states
what is allowed.
"""

from __future__ import annotations

import sys
from contextlib import suppress
from dataclasses import MISSING
from typing import Any, TypeVar, get_args, get_origin

from permafrost.config.conversion import Conversion
from permafrost.config.options import Options, check_limits, options_of
from permafrost.config.verbs import FAMILIES, VERBS, section_class
from permafrost.core.errors import ConfigError

C = TypeVar("C", bound=Options)


def build_verb_config(verb: str, composed: dict[str, Any]) -> Any:
    """Build the verb's dataclass from a composed dict of all sections, ignoring sections that it does not read."""
    names = {option.name for option in options_of(VERBS[verb])}
    return build_config(VERBS[verb], {k: v for k, v in composed.items() if k in names})


def build_config(cls: type[C], values: dict[str, Any], path: str = "") -> C:
    """Build a config dataclass from plain values, checked key by key.

    path  path of the section in the whole config, for messages
    """
    known = {option.name: option for option in options_of(cls)}
    unknown = sorted(set(values) - set(known))
    if unknown:
        raise ConfigError(
            f"unknown option {_join(path, unknown[0])}; {path or 'the top level'} has: {', '.join(known)}"
        )
    built = {}
    for name, option in known.items():
        if name in values:
            built[name] = _convert(option.hint, values[name], _join(path, name))
            check_limits(option, built[name], _join(path, name))
        elif option.default is MISSING:
            raise ConfigError(f"option {_join(path, name)} is missing")
    return cls(**built)


def check_values(cls: type[Options], values: dict[str, Any], path: str = "") -> None:
    """Raise ConfigError for a plain value of the wrong type or out of range, leaving unknown and missing options alone.

    path  path of the section in the whole config, for messages
    """
    for option in options_of(cls):
        if option.name not in values:
            continue
        value, where = values[option.name], _join(path, option.name)
        section = section_class(option, value)
        if section is not None:
            check_values(section, value, where)
        elif not isinstance(value, dict) or option.name not in FAMILIES:  # of an unknown kind
            check_limits(option, _convert(option.hint, value, where), where)


def _build_kind(section: str, hint: Any, value: dict[str, Any], path: str) -> Any:
    members = FAMILIES[section]
    allowed = tuple(cls for cls in (get_args(hint) or (hint,)) if isinstance(cls, type))
    kinds = [kind for kind, cls in members.items() if issubclass(cls, allowed)]
    kind = value.get("kind")
    if kind not in kinds:
        raise ConfigError(f"{path}={kind} is not allowed here; choose one of {', '.join(kinds)}")
    if kind == "none":
        return members[kind]()  # an experiment may describe the teacher for other stages
    return build_config(members[kind], value, path)


class _OptionValues(Conversion):
    """Conversion of options, lenient to what YAML and a command line make of them."""

    error = ConfigError

    def __call__(self, hint: Any, value: Any, where: str) -> Any:
        if where in FAMILIES and isinstance(value, dict):
            return _build_kind(where, hint, value, where)
        if get_origin(hint) is dict and value is None:
            value = {}
        if hint == tuple[str, ...] and isinstance(value, str):
            value = (value,)  # a single name is a list of one
        return super().__call__(hint, value, where)

    def build(self, hint: Any, value: Any, where: str) -> Any:
        if isinstance(hint, type) and issubclass(hint, Options):
            if (
                hint.section in FAMILIES
            ):  # of a family below another section, for which its kind is enough
                value = {"kind": value} if isinstance(value, str) else value
                if isinstance(value, dict):
                    return _build_kind(hint.section, hint, value, where)
            if not isinstance(value, dict):
                raise ConfigError(f"{where} must be a section of options, got {value!r}")
            return build_config(hint, value, where)
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if hint is float and type(value) is int and abs(value) > sys.float_info.max:
            raise ConfigError(f"{where} must be a number of at most {sys.float_info.max:.2g}")
        if hint is float and isinstance(value, str):  # YAML 1.1 reads 1e-3 as text
            with suppress(ValueError):  # the error below is clearer
                return float(value)
        return super().build(
            hint, hint(value) if is_number and hint in (float, str) else value, where
        )


_convert = _OptionValues()


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name
