"""Modules of the user that add members to families, such as a loss or a network.

A plug-in is an importable module that adds option classes to the dictionaries of their family when it is imported:

    METHODS["mine"] = MyConfig        # permafrost.config.methods; MyConfig.implementation = "my_module:MyLoss"

Plug-ins are named in the environment variable PERMAFROST_PLUGINS, separated by commas. An installed package may also
name its modules as entry points of the group `permafrost`.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import MutableMapping
from functools import cache
from importlib.metadata import entry_points
from importlib.util import find_spec
from typing import TYPE_CHECKING, TypeVar

from permafrost.core.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

VARIABLE = "PERMAFROST_PLUGINS"
PAPERS = ("unicam", "interpretability", "ked")
"""Folders of the package that are plug-ins themselves: one for each paper beside e2KD."""

T = TypeVar("T")


class Family(MutableMapping[str, T]):
    """Members of a family by name, most of them option classes. The papers add theirs when it is first read."""

    def __init__(self, members: Mapping[str, T]) -> None:
        self._members = dict(members)

    def __getitem__(self, name: str) -> T:
        register_papers()
        return self._members[name]

    def __setitem__(self, name: str, member: T) -> None:
        self._members[name] = member

    def __delitem__(self, name: str) -> None:
        del self._members[name]

    def __iter__(self) -> Iterator[str]:
        register_papers()
        return iter(self._members)

    def __len__(self) -> int:
        register_papers()
        return len(self._members)


@cache
def register_papers() -> None:
    """Register the members of each paper whose folder is in the package."""
    for name in PAPERS:
        if find_spec(f"permafrost.{name}") is not None:
            importlib.import_module(f"permafrost.{name}.options").register()


def load_plugins() -> list[str]:
    """Import all plug-ins and return their names. Raises ConfigError if one cannot be imported."""
    named = [name.strip() for name in os.environ.get(VARIABLE, "").split(",") if name.strip()]
    installed = [entry.value for entry in entry_points(group="permafrost")]
    for name in (*named, *installed):
        try:
            importlib.import_module(name)
        except Exception as error:  # any error of the user's module
            raise ConfigError(
                f"the plug-in {name} cannot be imported ({type(error).__name__}: {error}); correct {VARIABLE}, "
                "or add its folder to PYTHONPATH"
            ) from error
    return [*named, *installed]
