"""Class names from a file, and their resolution from the cells of a table."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from permafrost.core.addresses import is_address
from permafrost.core.errors import ConfigError
from permafrost.core.files import read_regular
from permafrost.core.rooted_paths import rooted
from permafrost.sources.table_files import to_number

MAX_CLASSES = 1_000_000
"""Limit for labels that are numbers. A larger label is a mistake, and would require a list of that many class
names."""


@dataclass(frozen=True)
class ClassIndex:
    """Class names in label order, and the way the table refers to them."""

    names: tuple[str, ...]
    is_numbered: bool
    """True if the table contains labels instead of names."""

    @cached_property
    def _label_of(self) -> dict[str, int]:
        return {name: label for label, name in enumerate(self.names)}

    def label(self, text: str) -> int | None:
        """Return the label that a cell denotes, or None if there is no such class."""
        if not self.is_numbered:
            return self._label_of.get(text)
        number = to_number(text)
        return number if number is not None and 0 <= number < len(self.names) else None


def load_class_names(path: str) -> tuple[str, ...]:
    """Read the lines of `data.classes`, in label order, without empty lines."""
    try:
        file = rooted(path) if is_address(path) else Path(path)
        lines = read_regular(file).decode("utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"data.classes={path} cannot be read: {error}") from error
    names = tuple(line.strip() for line in lines if line.strip())
    if not names:
        raise ConfigError(f"data.classes={path} is empty; write one class name per line")
    name, times = Counter(names).most_common(1)[0]
    if times > 1:
        raise ConfigError(
            f"data.classes={path} lists the class {name!r} {times} times; keep one of them"
        )
    return names
