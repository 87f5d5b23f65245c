"""Registration with Hydra of what it composes: conf/, the dataclasses' defaults, and experiments in other files."""

from __future__ import annotations

import hashlib
from functools import cache, lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from permafrost.config.environment import CONF
from permafrost.config.evaluators import EVALUATORS
from permafrost.config.options import Options, Role, options_of, plain_defaults, to_plain
from permafrost.config.store import StoreOptions
from permafrost.config.training import TrainerOptions
from permafrost.config.verbs import FAMILIES, VERBS
from permafrost.core.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Sequence

GROUPS = {"store": "zarr", "trainer": "default", "optimizer": "adamw", "augment": "pad_crop"}
"""Groups whose members all share one class, and the default member of each."""
FILE_PREFIX = "file-"
"""Prefix of the names under which an experiment's file outside conf/ is registered."""


def with_registered_file(word: str) -> str:
    """Register the file of experiment=<path>.yaml with Hydra, and return the word with its registered name."""
    key, _, value = word.partition("=")
    if key != "experiment" or not value.endswith((".yaml", ".yml")):
        return word
    try:
        text = Path(value).read_text(encoding="utf-8")
        values = yaml.safe_load(text)
    except OSError as error:
        raise ConfigError(f"experiment={value} cannot be read: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"experiment={value}: {' '.join(str(error).split())}") from error
    if not isinstance(values, dict):
        raise ConfigError(f"experiment={value} must be a mapping of sections to options")
    from hydra.core.config_store import ConfigStore

    name = FILE_PREFIX + hashlib.sha256(text.encode()).hexdigest()
    ConfigStore.instance().store(group="experiment", name=name, node=values, package="_global_")
    return f"experiment={name}"


def register_defaults(overrides: Sequence[str]) -> None:
    """Register with Hydra the defaults of the dataclasses that a composition may name.

    An experiment may name any member of a family. Without one, only the default members and those of the overrides are
    registered, as each takes two milliseconds of every command.
    """
    _register_sections(tuple(EVALUATORS))
    words = dict(word.partition("=")[::2] for word in overrides)
    for group, members in FAMILIES.items():
        named = {_default_members()[group], words.get(group)}
        for kind in members:
            if "experiment" in words or kind in named:
                _register_member(group, kind)


@cache
def _default_members() -> dict[str, str]:
    """Default member of each group, from conf/config.yaml."""
    entries = yaml.safe_load((CONF / "config.yaml").read_text())["defaults"]
    return {
        group: name for entry in entries if isinstance(entry, dict) for group, name in entry.items()
    }


@cache
def _register_member(group: str, kind: str) -> None:
    """Register a member of a family with Hydra."""
    from hydra.core.config_store import ConfigStore

    node = plain_defaults(FAMILIES[group][kind]) | {"kind": kind}
    nested = [name for name in node if name in GROUPS]  # in a teacher's own training
    if nested:
        choices = [{f"/{name}@{name}": GROUPS[name]} for name in nested]
        own = {name: value for name, value in node.items() if name not in nested}
        node = {"defaults": [*choices, "_self_"], **own}
    ConfigStore.instance().store(group=group, name=kind, node=node)


@lru_cache(maxsize=1)
def _register_sections(evaluators: tuple[str, ...]) -> None:
    """Register all sections outside families with Hydra, again if a plug-in has added one of an evaluator."""
    from hydra.core.config_store import ConfigStore

    store = ConfigStore.instance()
    store.store(group="store", name=GROUPS["store"], node=plain_defaults(StoreOptions))
    store.store(group="trainer", name=GROUPS["trainer"], node=plain_defaults(TrainerOptions))
    store.store(name="defaults", node=_section_defaults())


def _section_defaults() -> dict[str, Any]:
    """Default values of the sections and options of all verbs that belong to no group."""
    values: dict[str, Any] = {}
    for cls in VERBS.values():
        for option in options_of(cls):
            if option.name in FAMILIES or option.name in GROUPS:
                continue
            if Role.SET_BY_STAGE in option.roles:
                continue
            if isinstance(option.hint, type) and issubclass(option.hint, Options):
                values[option.name] = plain_defaults(option.hint)
            else:
                values[option.name] = to_plain(option.default)
    return values
