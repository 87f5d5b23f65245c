"""Options that name files or folders, which mean something else where several machines work."""

from __future__ import annotations

from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from pipeline.config.errors import require

if TYPE_CHECKING:
    from collections.abc import Iterator

_FILES = {
    "store": ("path",),
    "data": ("path", "root", "cache"),
    "teacher": ("weights",),
    "student": ("weights",),
}
_NO_FILES = ("", "pretrained", "random")
_WRITTEN = ("store.path", "run")


def require_shared_paths(values: dict[str, Any], mount_path: str | None = None) -> None:
    """ConfigError unless every path in composed sections means the same on all nodes.

    mount_path  folder that the nodes share, where it is known; what is written must lie in it
    """
    named = [(f"{section}.{name}", path) for section, name, path in _paths(values)]
    if "run" in values:
        named.append(("run", str(values["run"])))
    for option, path in named:
        require(
            PurePosixPath(path).is_absolute(),
            f"{option}={path} is relative, and a job runs in a temporary copy of the code on one node; "
            "give an absolute path on storage that all nodes share",
        )
        require(
            mount_path is None
            or option not in _WRITTEN
            or PurePosixPath(path).is_relative_to(mount_path),
            f"{option}={path} would be lost with its pod; give a path in cluster.mount_path={mount_path}",
        )


def with_absolute_paths(values: dict[str, Any]) -> dict[str, Any]:
    """Composed sections whose relative files are those of this process's own folder."""
    absolute = {**values}
    for section, name, path in _paths(values):
        absolute[section] = absolute[section] | {name: str(Path(path).absolute())}
    return absolute


def _paths(values: dict[str, Any]) -> Iterator[tuple[str, str, str]]:
    """Section, option and value of each file or folder that is named."""
    for section, names in _FILES.items():
        options = values.get(section, {})
        if options.get("kind") == "none":
            continue
        for name in names:
            path = options.get(name)
            # A download's folder matters where something is downloaded.
            unused = name == "cache" and "://" not in options.get("path", "")
            if path is not None and path not in _NO_FILES and "://" not in path and not unused:
                yield section, name, str(path)
