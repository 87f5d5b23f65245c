"""Composition: from `key=value` words and conf/ to plain values, and from Hydra's complaints to one clear line.

An override may name only sections that the verb reads; an experiment may set any of them.
"""

from __future__ import annotations

import difflib
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.config.verbs import VERBS
from pipeline.core.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Sequence


CONF = Path(__file__).resolve().parents[2] / "conf"


_SWEPT_VERBS = ("distill", "evaluate")


def compose(verb: str, overrides: Sequence[str]) -> dict[str, Any]:
    """All sections as plain values: defaults, then the experiment, then `overrides`."""
    from hydra import compose as hydra_compose
    from hydra import initialize_config_dir
    from hydra.core.global_hydra import GlobalHydra
    from hydra.errors import HydraException
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    for word in overrides:
        _check_word(verb, word)
    GlobalHydra.instance().clear()
    try:
        with initialize_config_dir(version_base=None, config_dir=str(CONF)):
            composed = hydra_compose("config", overrides=_replacing_mappings(overrides))
        values = OmegaConf.to_container(composed, resolve=True)
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigError(_explain(overrides, error)) from error
    assert isinstance(values, dict)
    return {str(key): value for key, value in values.items()}


def sections(verb: str, composed: dict[str, Any]) -> dict[str, Any]:
    """The part of a composed config that the verb reads."""
    return {name: value for name, value in composed.items() if name in section_names(verb)}


def section_names(verb: str) -> list[str]:
    verbs = (verb, *_SWEPT_VERBS) if verb == "sweep" else (verb,)
    return list(dict.fromkeys(spec.name for name in verbs for spec in fields(VERBS[name])))


def _replacing_mappings(overrides: Sequence[str]) -> list[str]:
    """`arms={...}` replaces an experiment's arms, `grid` alike; Hydra itself would merge the two."""
    words = []
    for word in overrides:
        name = word.partition("=")[0]
        words += [f"{name}=null", word] if name in ("arms", "grid") else [word]
    return words


def section_of(word: str) -> str:
    """The section that an override changes."""
    key = word.lstrip("+~").split("=", 1)[0]
    return key.split("@")[-1].split(".")[0].split("/")[0]


def _check_word(verb: str, word: str) -> None:
    if "=" not in word and not word.startswith("~"):
        raise ConfigError(f"cannot read {word!r}; options are written key=value, see --help")
    section = section_of(word)
    names = [*section_names(verb), "experiment"]
    if section not in names:
        raise ConfigError(
            f"{verb} takes no {section}={_suggest(section, names)}; it takes: {', '.join(names)}"
        )


def _explain(overrides: Sequence[str], error: Exception) -> str:
    """Hydra's complaint in terms of what was typed and what is allowed."""
    from hydra.errors import OverrideParseException

    for word in overrides:
        key, _, value = word.lstrip("+~").partition("=")
        group = CONF / key.split("@")[0]
        if group.is_dir():
            options = sorted(
                path.relative_to(group).with_suffix("").as_posix() for path in group.rglob("*.yaml")
            )
            if value not in options:
                hint = _suggest(value, options)
                return f"{key}={value} does not exist{hint}; choose one of: {', '.join(options)}"
        elif f"Could not override '{key}'" in str(error):
            known = _known_keys(key, overrides)
            return f"unknown option {key}{_suggest(key.split('.')[-1], known)}; known there: {', '.join(known)}"
    if isinstance(error, OverrideParseException):
        return f"cannot read {error.override!r}: {error.message.split(chr(10))[0]}; quote lists and braces"
    return " ".join(str(error).split())


def _known_keys(key: str, overrides: Sequence[str]) -> list[str]:
    """The options beside `key`, in the config that the other words make."""
    from hydra import compose as hydra_compose
    from hydra import initialize_config_dir

    groups = [w for w in overrides if (CONF / w.split("=")[0].split("@")[0]).is_dir()]
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
