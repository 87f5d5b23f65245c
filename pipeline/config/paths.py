"""Options that name files or folders, which mean something else in another folder or on another machine."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, TypeVar

from pipeline.config.cluster import ExistingClusterConfig, KubeRayClusterConfig
from pipeline.config.models import is_published
from pipeline.core.environment import in_submitted_job
from pipeline.core.errors import require

if TYPE_CHECKING:
    from collections.abc import Iterator

C = TypeVar("C")

_FILES = {
    "store": ("path",),
    "data": ("path", "root", "cache"),
    "teacher": ("weights", "partition"),
    "black_box": ("weights", "partition"),
    "student": ("weights", "partition"),
    "teaching": ("start",),
    "evaluate": (
        "store",
        "distance_correlation.embeddings",
        "class_similarity.similarity",
        "dissection.path",
    ),
}
_NO_FILES = ("", "random")
_WRITTEN = ("store.path", "run")


def require_shared_paths(config: Any, mount_path: str | None = None) -> None:
    """ConfigError unless every path in a verb's config means the same on all nodes.

    mount_path  folder that the nodes share, where it is known; what is written must lie in it
    """
    named = [(f"{section}.{name}", path) for section, name, path in _paths(config)]
    if hasattr(config, "run"):
        named.append(("run", config.run))
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


def with_absolute_paths(config: C) -> C:
    """A verb's config whose relative files are those of this process's own folder."""
    for section, name, path in _paths(config):
        config = _replaced(config, [section, *name.split(".")], str(Path(path).absolute()))
    return config


def _paths(config: Any) -> Iterator[tuple[str, str, str]]:
    """Section, option and value of each file or folder that is named."""
    for section, names in _FILES.items():
        options = getattr(config, section, None)
        for name in names:
            path = _read(options, name.split("."))
            # A download's folder matters where something is downloaded.
            unused = name == "cache" and "://" not in getattr(options, "path", "")
            no_file = path is None or path in _NO_FILES or is_published(path) or "://" in path
            if not no_file and not unused:
                yield section, name, path


def _read(options: Any, names: list[str]) -> Any:
    """The option that nested names lead to; None where there is none."""
    for name in names:
        options = getattr(options, name, None)
    return options


def _replaced(config: C, names: list[str], value: str) -> C:
    first, *below = names
    inner = _replaced(getattr(config, first), below, value) if below else value
    replaced: C = replace(config, **{first: inner})  # type: ignore[type-var]
    return replaced


def place_paths(config: C) -> C:
    """A verb's config whose paths mean the same wherever its work is done.

    Raises ConfigError for a relative path in a job, whose driver's folder is a temporary copy.
    """
    cluster = getattr(config, "cluster", None)
    if in_submitted_job() or isinstance(cluster, KubeRayClusterConfig):
        require_shared_paths(config, getattr(cluster, "mount_path", None))
    return with_absolute_paths(config) if isinstance(cluster, ExistingClusterConfig) else config
