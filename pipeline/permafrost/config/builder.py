"""Construction of the config dataclasses from plain values, checked key by key.

An unknown key, a value of the wrong type or a value out of range raises a ConfigError that names the option and states
what is allowed.
"""

from __future__ import annotations

import types
from contextlib import suppress
from dataclasses import MISSING
from typing import Any, Literal, TypeVar, Union, get_args, get_origin

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


def _convert(hint: Any, value: Any, path: str) -> Any:
    """Convert `value` to the type `hint`; raise a ConfigError that states what is allowed if it cannot be."""
    section = path if path in FAMILIES else None
    if section is not None and isinstance(value, dict):
        return _build_kind(section, hint, value)
    if hint is Any:
        return value
    origin = get_origin(hint)
    if origin in (Union, types.UnionType):
        members = get_args(hint)
        if value is None and type(None) in members:
            return None
        return _convert(next(m for m in members if m is not type(None)), value, path)
    if origin is Literal:
        if value not in get_args(hint):
            allowed = ", ".join(map(str, get_args(hint)))
            raise ConfigError(f"{path} must be one of {allowed}; got {value!r}")
        return value
    if origin is tuple:
        return _convert_tuple(get_args(hint), value, path)
    if origin is dict:
        value = {} if value is None else value
        if not isinstance(value, dict):
            raise ConfigError(f"{path} must be a mapping, got {value!r}")
        return {str(k): _convert(get_args(hint)[1], v, f"{path}.{k}") for k, v in value.items()}
    if isinstance(hint, type) and issubclass(hint, Options):
        if not isinstance(value, dict):
            raise ConfigError(f"{path} must be a section of options, got {value!r}")
        return build_config(hint, value, path)
    return _convert_scalar(hint, value, path)


def _build_kind(section: str, hint: Any, value: dict[str, Any]) -> Any:
    members = FAMILIES[section]
    allowed = tuple(cls for cls in (get_args(hint) or (hint,)) if isinstance(cls, type))
    kinds = [kind for kind, cls in members.items() if issubclass(cls, allowed)]
    kind = value.get("kind")
    if kind not in kinds:
        raise ConfigError(f"{section}={kind} is not allowed here; choose one of {', '.join(kinds)}")
    if kind == "none":
        return members[kind]()  # an experiment may describe the teacher for other stages
    return build_config(members[kind], value, section)


def _convert_tuple(members: tuple[Any, ...], value: Any, path: str) -> tuple[Any, ...]:
    if members == (str, ...) and isinstance(value, str):
        return (value,)  # a single name is a list of one
    if not isinstance(value, (list, tuple)):
        raise ConfigError(f"{path} must be a list, got {value!r}")
    if members[-1] is not Ellipsis and len(value) != len(members):
        raise ConfigError(f"{path} must have {len(members)} values, got {list(value)}")
    hints = [members[0]] * len(value) if members[-1] is Ellipsis else list(members)
    return tuple(
        _convert(h, v, f"{path}[{i}]") for i, (h, v) in enumerate(zip(hints, value, strict=True))
    )


def _convert_scalar(hint: Any, value: Any, path: str) -> Any:
    if hint is float and isinstance(value, (int, float)) and not isinstance(value, bool):
        return float(value)
    if hint is float and isinstance(value, str):  # YAML 1.1 reads 1e-3 as text
        with suppress(ValueError):  # the error below is clearer
            return float(value)
    if hint is str and isinstance(value, (int, float)) and not isinstance(value, bool):
        return str(value)
    if type(value) is not hint:
        words = {int: "a whole number", float: "a number", str: "text", bool: "true or false"}
        raise ConfigError(f"{path} must be {words.get(hint, hint)}, got {value!r}")
    return value


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name
