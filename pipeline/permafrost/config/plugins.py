"""Modules of the user that add members to families, such as a loss or a network.

A plug-in is an importable module that adds option classes to the dictionaries of their family when it is imported:

    METHODS["mine"] = MyConfig        # permafrost.config.methods; MyConfig.implementation = "my_module:MyLoss"

Plug-ins are named in the environment variable PERMAFROST_PLUGINS, separated by commas. An installed package may also
name its modules as entry points of the group `permafrost`.
"""

from __future__ import annotations

import importlib
import os
from importlib.metadata import entry_points

from permafrost.core.errors import ConfigError

VARIABLE = "PERMAFROST_PLUGINS"


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
