"""Where a config's files lie, for a process that starts in another folder."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

C = TypeVar("C")

_NAMES_OF_PATHS = {
    "store": ("path",),
    "teacher": ("weights",),
    "student": ("weights",),
}
_WORDS = ("pretrained", "random")
"""That `weights` may be instead of a file."""


def with_absolute_paths(config: C) -> C:
    """The same config, with the paths of its sections resolved against this process's folder."""
    sections: dict[str, Any] = {}
    for section, names in _NAMES_OF_PATHS.items():
        options = getattr(config, section, None)
        found = {name: getattr(options, name, None) for name in names}
        resolved = {
            name: str(Path(path).absolute())
            for name, path in found.items()
            if path is not None and path not in _WORDS
        }
        if resolved:
            sections[section] = replace(options, **resolved)  # type: ignore[type-var]
    return replace(config, **sections)  # type: ignore[type-var]
