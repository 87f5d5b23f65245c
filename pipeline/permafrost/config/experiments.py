"""Experiments: the files of conf/experiment, of packages and of the user, each after those that it is based on."""

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

from permafrost.config.options import new_name
from permafrost.config.sections import experiment_file, top_options, with_kinds
from permafrost.config.suggestions import SHOWN, no_member, suggest
from permafrost.core.errors import ConfigError, printable, require
from permafrost.core.yaml_text import YamlError, parse_yaml, read_values, values_of
from permafrost.storage.files import file_at

BASES = "bases"
"""Entry of an experiment that lists those that it is based on."""
_MAX_BYTES = 2**20
"""Size of the largest file of an experiment."""
_MAX_BASES = 8
"""Maximum depth of a chain of experiments, and maximum number of bases of one experiment."""


class ExperimentFile(NamedTuple):
    """Experiment, or one that it is based on."""

    text: str
    sections: dict[str, Any]


@lru_cache(maxsize=256)
def _parse_experiment(name: str, text: str) -> tuple[tuple[str, ...], dict[str, Any]]:
    """Return the bases of an experiment and its sections, with each member in the form {kind: ...}."""
    try:
        values = parse_yaml(text)
    except YamlError as error:
        raise ConfigError(f"experiment={name}: {error}") from error
    require(isinstance(values, dict), f"experiment={name} must be a mapping of sections to options")
    bases = values.pop(BASES, [])
    is_list = isinstance(bases, list) and len(bases) <= _MAX_BASES
    require(
        is_list and all(isinstance(base, str) for base in bases),
        f"experiment={name}: {BASES} must be a list of at most {_MAX_BASES} experiments, as in [demo]",
    )
    for section, value in values.items():
        if section not in top_options():
            hint = (
                f": write {BASES}: [...] for those that it is based on, and `method: kd` or "
                "`method: {kind: kd, ...}` for a member"
                if section == "defaults"
                else new_name(section) or suggest(section, [*top_options(), BASES])
            )
            raise ConfigError(f"experiment={name}: there is no section {section}{hint}")
        values[section] = with_kinds(section, value)
    return tuple(map(str, bases)), values


def read_experiment(name: str) -> tuple[ExperimentFile, ...]:
    """Read an experiment by its name, or the file of experiment=<path>.yaml, after those that it is based on.

    Raises:
        ConfigError: If there is none, if it cannot be read, or if it is based on itself.
    """
    files: dict[str, ExperimentFile] = {}
    _add_experiment(name, files, ())
    return tuple(files.values())


def _add_experiment(name: str, files: dict[str, ExperimentFile], based: tuple[str, ...]) -> None:
    """Add an experiment to those that were read, unless it is among them.

    `based` has the names of those that are based on it.
    """
    if name in based or len(based) > _MAX_BASES:
        chain = " <- ".join([*based, name][-4:])
        raise ConfigError(
            f"experiment={based[0]} is based on itself or on too many others: {chain}"
        )
    if name in files:
        return
    text = _experiment_text(name)
    bases, sections = _parse_experiment(name, text)
    for base in bases:
        _add_experiment(base, files, (*based, name))
    files[name] = ExperimentFile(text, sections)


def _experiment_text(name: str) -> str:
    if not name.endswith((".yaml", ".yml")):
        if (path := experiment_file(name)) is None:
            require(
                not os.path.isfile(name),  # noqa: PTH113, as the name may not be a valid path
                f"experiment={name} is not a .yaml file; a Python file is named with plugins=[{name}]",
            )
            raise no_member("experiment", name)
        return path.read_text(encoding="utf-8")
    try:
        return file_at(Path(name)).read(_MAX_BYTES).decode()
    except OSError as error:
        raise ConfigError(f"experiment={name} cannot be read: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"experiment={name}: {error}; save it as UTF-8") from error


def plugin_names(arguments: Sequence[str]) -> list[str]:
    """Return the plug-ins that `plugins=` names in these arguments, or else in their experiment.

    They are read before everything else is composed, because an argument may name a member of theirs.

    Raises:
        ConfigError: If the option is not a list of names, or if the experiment cannot be read.
    """
    typed = dict(argument.partition("=")[::2] for argument in arguments)
    names: Any = _plugins_of_experiment(typed["experiment"]) if "experiment" in typed else []
    if "plugins" in typed:
        try:
            names = read_values(typed["plugins"])
        except YamlError:
            names = None
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ConfigError(
            f"plugins={printable(str(typed.get('plugins', names)))[:SHOWN]} must be a list of Python files and "
            "modules, as in plugins=[my_losses.py]"
        )
    return names


def _plugins_of_experiment(name: str) -> Any:
    """Return the entry `plugins` of an experiment's file, or of the last one that it is based on."""
    try:
        files = read_experiment(name)
    except ConfigError:
        return []  # named by the composition
    named = [file.sections["plugins"] for file in files if "plugins" in file.sections]
    return values_of(named[-1]) if named else []
