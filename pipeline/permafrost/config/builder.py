"""Construction of the config dataclasses from plain values, checked key by key, and the way back.

An unknown key, a value of the wrong type or a value out of range raises a ConfigError that names the option and states
what is allowed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import MISSING, fields, is_dataclass
from types import NoneType
from typing import Any, Literal, TypeVar, get_args, get_origin

from permafrost.config.families import FAMILIES, section_class
from permafrost.config.options import (
    OptionError,
    Options,
    class_of_kind,
    new_name,
    options_of,
    validated,
)
from permafrost.core.errors import ConfigError, require

C = TypeVar("C", bound=Options)


def build_config(cls: type[C], values: dict[str, Any], path: str = "") -> C:
    """Build a config dataclass from plain values, checked key by key.

    Args:
        cls: Class of the config.
        values: Plain values, as YAML has them.
        path: Path of the section in the whole config, for messages; empty is the top level.

    Raises:
        ConfigError: If an option is unknown or missing, or its value has another type or is out of range.
    """
    known = {option.name: option for option in options_of(cls)}
    if unknown := sorted(set(values) - set(known)):
        raise ConfigError(
            f"unknown option {(name := _join(path, unknown[0]))}{new_name(name)}; "
            f"{path or 'the top level'} has: {', '.join(known)}"
        )
    for name, option in known.items():
        require(
            name in values or option.default is not MISSING,
            f"option {_join(path, name)} is missing",
        )
    built = {
        name: _built(known[name].hint, value, _join(path, name)) for name, value in values.items()
    }
    try:
        return cls.from_values(built)
    except OptionError as error:
        raise ConfigError(f"{_join(path, error.name)} {error.reason}") from error


def check_values(cls: type[Options], values: dict[str, Any], path: str = "") -> None:
    """Check the types and ranges of plain values. Unknown and missing options are left alone.

    Args:
        cls: Class of the config.
        values: Plain values, as YAML has them.
        path: Path of the section in the whole config, for messages; empty is the top level.

    Raises:
        ConfigError: If a value has another type or is out of range.
    """
    given = {}
    for option in options_of(cls):
        if option.name not in values:
            continue
        value, where = values[option.name], _join(path, option.name)
        if (section := section_class(option, value)) is not None:
            check_values(section, value, where)
        elif not isinstance(value, dict) or option.name not in FAMILIES:  # of an unknown kind
            given[option.name] = _built(option.hint, value, where)
    try:
        validated(cls, given)
    except OptionError as error:
        raise ConfigError(f"{_join(path, error.name)} {error.reason}") from error


def _built(hint: Any, value: Any, where: str) -> Any:
    """Return a value with the sections in it built, and tuples for lists."""
    members, origin = get_args(hint), get_origin(hint)
    if origin is dict:
        if not isinstance(value, (dict, NoneType)):
            return value
        return {
            str(key): _built(members[1], element, f"{where}.{key}")
            for key, element in (value or {}).items()
        }
    if (
        origin is tuple
        and isinstance(value, str)
        and (get_origin(members[0]) or members[0]) in (str, Literal)
    ):
        return (value,)  # a single name is a list of one
    classes = [
        member
        for member in members or (hint,)
        if isinstance(member, type) and issubclass(member, Options)
    ]
    is_section = origin is not tuple and bool(classes) and value is not None
    if isinstance(value, (list, tuple)) and not is_section:
        each = members[0] if origin is tuple else Any
        return tuple(
            _built(each, element, f"{where}[{position}]") for position, element in enumerate(value)
        )
    if not is_section:
        return value
    family = where if where in FAMILIES else classes[0].section
    if family in FAMILIES:
        value = {"kind": value} if isinstance(value, str) else value
        if isinstance(value, dict):
            return _build_kind(family, hint, value, where)
    require(isinstance(value, dict), f"{where} must be a section of options, got {value!r}")
    if len(classes) > 1:
        return build_config(class_of_kind(hint, value.get("kind"), f"{where}.kind"), value, where)
    return build_config(classes[0], value, where)


def _build_kind(section: str, hint: Any, value: dict[str, Any], path: str) -> Any:
    members = FAMILIES[section]
    allowed = tuple(cls for cls in (get_args(hint) or (hint,)) if isinstance(cls, type))
    kinds = [kind for kind, cls in members.items() if issubclass(cls, allowed)]
    if (kind := value.get("kind")) not in kinds:
        raise ConfigError(f"{path}={kind} is not allowed here; choose one of {', '.join(kinds)}")
    if kind == "none":
        return members[kind]()  # an experiment may describe the teacher for other stages
    return build_config(members[kind], value, path)


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def to_plain_dict(config: Any) -> dict[str, Any]:
    """Convert a config dataclass to plain values, as YAML has them."""
    names = [spec.name for spec in fields(config) if spec.repr]
    return {
        name: _to_plain(getattr(config, name)) for name in (*names, *getattr(config, "added", ()))
    }


def flatten_options(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return the values of nested sections, and of lists of sections by their places, by their dotted names.

    Args:
        values: Plain values of a config, as from `to_plain_dict` or its file.
        prefix: Beginning of every name.
    """
    flat: dict[str, Any] = {}
    for name, value in values.items():
        is_list = isinstance(value, list) and any(isinstance(each, Mapping) for each in value)
        section = {str(place): each for place, each in enumerate(value)} if is_list else value
        is_section = isinstance(section, Mapping)
        flat |= (
            flatten_options(section, f"{prefix}{name}.")
            if is_section
            else {f"{prefix}{name}": value}
        )
    return flat


def _to_plain(value: Any) -> Any:
    if is_dataclass(value):
        return to_plain_dict(value)
    if isinstance(value, dict):
        return {name: _to_plain(member) for name, member in value.items()}
    return [_to_plain(member) for member in value] if isinstance(value, (list, tuple)) else value
