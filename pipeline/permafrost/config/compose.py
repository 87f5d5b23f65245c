"""Composition of plain values from `key=value` words and conf/, with Hydra's errors reduced to one clear line.

An override may name only sections that the verb reads. An experiment may set any section.
"""

from __future__ import annotations

import difflib
import re
from copy import deepcopy
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import yaml

from permafrost.config.environment import CONF
from permafrost.config.evaluators import EVALUATORS
from permafrost.config.options import Role, options_of
from permafrost.config.registration import (
    FILE_PREFIX,
    GROUPS,
    register_defaults,
    with_registered_file,
)
from permafrost.config.verbs import FAMILIES, VERBS
from permafrost.core.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from omegaconf import DictConfig


_PLAIN = re.compile(r"[\w./:@%+*?|$ \\-]*", re.ASCII)
"""Values that Hydra's grammar accepts without quotes."""
_SWEPT_VERBS = ("distill", "evaluate")


def compose(verb: str, overrides: Sequence[str]) -> dict[str, Any]:
    """Compose all sections as plain values: defaults, then the experiment, then `overrides`."""
    from hydra.errors import HydraException
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    for word in overrides:
        _check_word(verb, word)
    overrides = [_quoted(with_registered_file(word)) for word in overrides]
    set_values = [word for word in overrides if _sets_a_value(word)]
    try:
        of_groups = tuple(word for word in overrides if word not in set_values)
        composed = deepcopy(_compose_groups(of_groups, tuple(EVALUATORS)))
        if not _apply(composed, _replacing_mappings(set_values)):
            composed = _compose(_replacing_mappings(overrides))
        values = OmegaConf.to_container(composed, resolve=True)
    except ConfigError:
        raise
    except (HydraException, OmegaConfBaseException, ValueError) as error:  # ValueError: of data=0
        raise ConfigError(_explain(overrides, error)) from error
    assert isinstance(values, dict)
    return {str(key): value for key, value in values.items()}


def _quoted(word: str) -> str:
    """Quote a text such as a path with parentheses, which Hydra's grammar rejects; lists and mappings stay as typed."""
    key, equals, value = word.partition("=")
    if not equals or value[:1] in ("[", "{", "'", '"') or "${" in value or _PLAIN.fullmatch(value):
        return word
    # A backslash is an escape before a quote only, such as the closing one.
    escaped = re.sub(r"(\\*)('|$)", lambda m: m[1] * 2 + ("\\'" if m[2] else ""), value)
    return f"{key}='{escaped}'"


def _compose(overrides: Sequence[str]) -> DictConfig:
    """Compose all sections with Hydra, which takes about a tenth of a second."""
    from hydra import compose as hydra_compose
    from hydra import initialize_config_dir
    from hydra.core.global_hydra import GlobalHydra

    GlobalHydra.instance().clear()
    register_defaults(overrides)
    with initialize_config_dir(version_base=None, config_dir=str(CONF)):
        composed: DictConfig = hydra_compose("config", overrides=list(overrides))
    return composed


@lru_cache(maxsize=64)
def _compose_groups(overrides: tuple[str, ...], evaluators: tuple[str, ...]) -> DictConfig:
    """Composition of an experiment and members of groups, shared by all points of a sweep that set values only.

    evaluators  those that have sections, to which a plug-in may add
    """
    return _compose(overrides)


def _sets_a_value(word: str) -> bool:
    """Return whether an override sets one value, such as trainer.epochs=3, rather than choose a group's member."""
    key = word.partition("=")[0]
    return re.fullmatch(r"[a-z_]+(\.\w+)*", key) is not None and not group_members(key)


def _apply(composed: DictConfig, overrides: list[str]) -> bool:
    """Set values in a composed config as Hydra would, or return False to leave the words, and their errors, to it."""
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    parser = OverridesParser.create()
    try:
        for word in overrides:
            try:
                override = parser.parse_override(word)
                key, value = override.key_or_group, override.value()
            except HydraException:
                key, value = word.partition("=")[0], _flow_of(word)
            OmegaConf.update(composed, key, value, merge=True)
    except (HydraException, OmegaConfBaseException):
        return False
    return True


def _flow_of(word: str) -> list[Any] | dict[str, Any]:
    """Read a list or mapping as YAML, with characters outside Hydra's grammar. Raises HydraException otherwise."""
    from hydra.errors import HydraException

    try:
        value = yaml.safe_load(word.partition("=")[2])
    except yaml.YAMLError as error:
        raise HydraException(str(error)) from error
    if not isinstance(value, (list, dict)):
        raise HydraException(f"{word} is neither a list nor a mapping")
    return value


def group_members(group: str) -> list[str]:
    """Member names of a group, such as the methods of `method=`; empty if there is no such group."""
    files = CONF / group
    named = {p.relative_to(files).with_suffix("").as_posix() for p in files.rglob("*.yaml")}
    own = {GROUPS[group]} if group in GROUPS else set()
    return sorted({*named, *own, *FAMILIES.get(group, ())}) if group else []


def sections(verb: str, composed: dict[str, Any]) -> dict[str, Any]:
    """Return the part of a composed config that the verb reads."""
    return {name: value for name, value in composed.items() if name in section_names(verb)}


def section_names(verb: str) -> list[str]:
    """Names of the sections and options that a verb reads; for a sweep also those of its students."""
    verbs = (verb, *_SWEPT_VERBS) if verb == "sweep" else (verb,)
    return list(
        dict.fromkeys(
            option.name
            for name in verbs
            for option in options_of(VERBS[name])
            if Role.SET_BY_STAGE not in option.roles
        )
    )


def _replacing_mappings(overrides: Sequence[str]) -> list[str]:
    """Make a mapping such as `arms={...}` replace the experiment's, which Hydra would merge with it or reject."""
    words = []
    for word in overrides:
        name, _, value = word.partition("=")
        words += (
            [f"{name}=null", word] if value.startswith("{") and name[:1] not in "+~" else [word]
        )
    return words


def section_of(word: str) -> str:
    """Name of the section that an override changes."""
    key = word.lstrip("+~").split("=", 1)[0]
    return key.split("@")[-1].split(".")[0].split("/")[0]


def _check_word(verb: str, word: str) -> None:
    if "=" not in word and not word.startswith("~"):
        raise ConfigError(f"cannot read {word!r}; options are written key=value, see --help")
    section = section_of(word)
    names = [*section_names(verb), "experiment"]
    if section not in names:
        hint = _suggest(section, names)
        if verb == "teach" and section in GROUPS:
            hint = f" (did you mean teaching.{section}?)"
        raise ConfigError(f"{verb} takes no {section}={hint}; it takes: {', '.join(names)}")


def _explain(overrides: Sequence[str], error: Exception) -> str:
    """Rephrase Hydra's error in terms of what was typed and what is allowed."""
    from hydra.errors import OverrideParseException

    for word in overrides:
        key, _, value = word.lstrip("+~").partition("=")
        options = group_members(key.split("@")[0])
        if options:
            if value not in options and not value.startswith(FILE_PREFIX):
                hint = _suggest(value, options)
                return f"{key}={value} does not exist{hint}; choose one of: {', '.join(options)}"
        elif f"Could not override '{key}'" in str(error):
            known = _known_keys(key, overrides)
            return f"unknown option {key}{_suggest(key.split('.')[-1], known)}; available options: {', '.join(known)}"
    if isinstance(error, OverrideParseException):
        return f"cannot read {error.override!r}: {error.message.split(chr(10))[0]}; quote lists and braces"
    return " ".join(str(error).split())


def _known_keys(key: str, overrides: Sequence[str]) -> list[str]:
    """Names of the options next to `key`, in the config that the other words produce."""
    from hydra import compose as hydra_compose
    from hydra import initialize_config_dir

    groups = [w for w in overrides if group_members(w.split("=")[0].split("@")[0])]
    with initialize_config_dir(version_base=None, config_dir=str(CONF)):
        node: Any = hydra_compose("config", overrides=groups)
    for part in key.split(".")[:-1]:
        child = node.get(part) if hasattr(node, "get") else None
        if child is None:
            break
        node = child
    return sorted(str(name) for name in node) if hasattr(node, "keys") else []


def _suggest(word: str, allowed: Sequence[str]) -> str:
    close = difflib.get_close_matches(word, allowed, n=1)
    return f" (did you mean {close[0]}?)" if close else ""
