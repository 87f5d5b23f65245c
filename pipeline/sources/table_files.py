"""The files that the rows of a table of images name."""

from __future__ import annotations

import logging
import os
import posixpath
from typing import TYPE_CHECKING

from pipeline.core.errors import ConfigError

if TYPE_CHECKING:
    from pathlib import Path

    from pipeline.config.data import ImageTableDataConfig
    from pipeline.sources.tables.rows import Row

logger = logging.getLogger("permafrost.precompute")

NAMED_MISSING_FILES = 5
"""Number of missing files that an error names; the others are only counted."""


class TableFiles:
    """Files named by rows: their paths below the root and their sizes."""

    def __init__(self, root: Path) -> None:
        self._root = str(root)
        self._prefix = f"{posixpath.normpath(root)}/"
        self._missing: list[tuple[int, str]] = []
        self._row_of_image: dict[str, int] = {}

    def add_image(self, row: Row, column: str) -> tuple[str, int]:
        """Add a file like `add`, but one that only a single row may name."""
        path, size = self.add(row, column)
        first = self._row_of_image.setdefault(path, row.number)
        if first != row.number:
            raise row.error(column, f"{path} is already the image of row {first}")
        return path, size

    def add(self, row: Row, column: str) -> tuple[str, int]:
        """Return (path below the root, bytes); a missing file is recorded for `missing_paths`."""
        path = self._relative(row, column)
        try:
            return path, os.stat(f"{self._root}/{path}").st_size  # noqa: PTH116, once per image
        except (OSError, ValueError):  # a path with a NUL is a ValueError
            self._missing.append((row.number, path))
            return path, 0

    def missing_paths(self, config: ImageTableDataConfig) -> set[str]:
        """Return the missing files, whose rows data.on_error=skip leaves out with a warning.

        Raises ConfigError if files are missing otherwise, or if they are more than data.max_skipped.
        """
        if not self._missing:
            return set()
        named = "; ".join(f"row {row}: {path}" for row, path in self._missing[:NAMED_MISSING_FILES])
        more = len(self._missing) - NAMED_MISSING_FILES
        named += f"; and {more} more" if more > 0 else ""
        found = f"{len(self._missing)} files in the table are not in {self._root}: {named}"
        if config.on_error == "stop":
            raise ConfigError(
                f"{found}; correct data.root or the table, or leave such rows out with data.on_error=skip"
            )
        if len({row for row, _ in self._missing}) > config.max_skipped:
            raise ConfigError(
                f"{found}; these are more rows than data.max_skipped={config.max_skipped}, so correct data.root or the "
                "table"
            )
        logger.warning("%s; their rows are left out", found)
        return {path for _, path in self._missing}

    def _relative(self, row: Row, column: str) -> str:
        text = row.required(column)
        path = posixpath.normpath(text)
        if posixpath.isabs(path):
            path = path.removeprefix(self._prefix)
        if posixpath.isabs(path):
            raise row.error(
                column,
                f"{text} is not in data.root={self._root}; set data.root to the folder of all images",
            )
        return path
