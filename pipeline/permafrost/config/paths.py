"""Options that name files or folders, whose meaning depends on the folder and machine of the process."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path, PurePosixPath
from typing import TypeVar

from permafrost.config.cluster import ExistingClusterConfig
from permafrost.config.environment import in_submitted_job
from permafrost.config.models import is_weights_file
from permafrost.config.options import Options, Role, options_of
from permafrost.core.errors import require
from permafrost.storage.addresses import is_address

C = TypeVar("C", bound=Options)


def with_absolute_paths(config: C) -> C:
    """Return a verb's config with relative paths made absolute from the current folder of this process."""
    for name, path in _paths(config):
        config = _replaced(config, name.split("."), str(Path(path).absolute()))
    return config


def _paths(config: Options, section: str = "") -> Iterator[tuple[str, str]]:
    """Yield the option and the value of each file or folder that is named."""
    for option in options_of(type(config)):
        name, value = f"{section}{option.name}", getattr(config, option.name)
        if isinstance(value, Options):
            yield from _paths(value, f"{name}.")
        elif Role.FILE in option.roles and value and is_weights_file(value):
            # A download folder of what is not downloaded is not used.
            downloads = getattr(config, "path", "").startswith(("http://", "https://"))
            if not is_address(value) and (option.name != "cache" or downloads):
                yield name, value


def _replaced(config: C, names: list[str], value: str) -> C:
    first, *below = names
    inner = _replaced(getattr(config, first), below, value) if below else value
    added = getattr(config, "added", {})
    change = {"added": added | {first: inner}} if first in added else {first: inner}
    return replace(config, **change)


def place_paths(config: C) -> C:
    """Return a verb's config whose paths have the same meaning on every node that does its work.

    Raises:
        ConfigError: If a path is relative in a submitted job, whose driver runs in a temporary folder.
    """
    if in_submitted_job():
        named = list(_paths(config))
        if (run := getattr(config, "run", "")) and not is_address(run):
            named.append(("run", run))
        for option, path in named:
            require(
                PurePosixPath(path).is_absolute(),
                f"{option}={path} is relative, and a job runs in a temporary copy of the code on one node; "
                "set an absolute path on storage that all nodes share",
            )
    is_joined = isinstance(getattr(config, "cluster", None), ExistingClusterConfig)
    return with_absolute_paths(config) if is_joined else config
