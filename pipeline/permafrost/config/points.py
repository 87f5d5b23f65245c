"""Command-line arguments from Python values, and grid points with their arguments and labels."""

from __future__ import annotations

import itertools
import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from permafrost.config.builder import to_plain_dict
from permafrost.config.compose import complete_arguments
from permafrost.config.options import Options
from permafrost.core.errors import ConfigError

_PLAIN = re.compile(r"[A-Za-z_./][\w./:@%+-]*", re.ASCII)
"""Texts that need no quotes as the value of an argument, unless they are a constant."""
_CONSTANTS = ("true", "false", "null", "nan", "inf")

Point = dict[str, Any]
"""Mapping from options to values."""


def iter_points(grid: Mapping[str, Sequence[Any]]) -> Iterator[Point]:
    """Yield every combination, the last option's values fastest; one empty point if there are no options."""
    yield from (
        dict(zip(grid, values, strict=True)) for values in itertools.product(*grid.values())
    )


def knows_option(composed: Any, option: str) -> bool:
    """Return whether a composed config has the option with this dotted name."""
    name, _, inner = option.partition(".")
    is_known = isinstance(composed, dict) and name in composed
    return is_known and (not inner or knows_option(composed[name], inner))


def arguments_of_options(
    verb: str, arguments: Sequence[str], options: Mapping[str, Any]
) -> list[str]:
    """Return the arguments of a command line: `arguments` and those from the keyword arguments.

    An argument is named like an option, with a dot or two underscores before its last part (`trainer__epochs=30`). A
    name without a section is that of the only section that has it (`tau=4` is `method.tau=4`). The member of a family
    is a text, or a mapping with its kind and options (`student={"kind": "cifar", "name": "resnet8"}`). `store` may be
    the folder of a store.

    Args:
        verb: Command of the arguments.
        arguments: Arguments, section.option=text.
        options: Values of keyword arguments by name.

    Raises:
        ConfigError: If several sections have an option that is named without one.
    """
    chosen = [*arguments]
    for argument, value in options.items():
        is_path = argument == "store" and isinstance(value, (str, os.PathLike))
        name = "store.path" if is_path else argument.replace("__", ".")
        try:
            chosen.append(f"{name}={option_text(value)}")
        except TypeError as error:
            raise ConfigError(
                f"{argument} is {type(value).__name__}, which is not a value of an option"
            ) from error
    return complete_arguments(verb, chosen)


def point_arguments(point: Point) -> list[str]:
    """Return the point as overrides."""
    return [f"{option}={option_text(value)}" for option, value in point.items()]


def option_text(value: Any) -> str:
    """Format a value for an argument or experiment: JSON, except that plain texts have no quotes."""
    if isinstance(value, os.PathLike):
        value = os.fspath(value)
    if isinstance(value, Options):
        value = to_plain_dict(value)
    if hasattr(value, "tolist"):  # of NumPy and torch
        value = value.tolist()
    if isinstance(value, str) and _PLAIN.fullmatch(value) and value.lower() not in _CONSTANTS:
        return value
    if isinstance(value, dict):
        entries = (f"{option_text(str(key))}: {option_text(entry)}" for key, entry in value.items())
        return "{" + ", ".join(entries) + "}"
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(map(option_text, value)) + "]"
    return json.dumps(value, ensure_ascii=False)


def point_label(point: Point) -> str:
    """Return a short label of the point, with options shortened to their last name where that is unique."""
    names = {option: option.rpartition(".")[2] for option in point}
    short = list(names.values())
    return " ".join(
        f"{names[option] if short.count(names[option]) == 1 else option}={value}"
        for option, value in point.items()
    )
