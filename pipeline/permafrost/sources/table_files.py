"""The files that the rows of a table of images name."""

from __future__ import annotations

import logging
import os
import posixpath
from typing import TYPE_CHECKING

from permafrost.core.errors import ConfigError
from permafrost.sources.repeats import Repeats
from permafrost.sources.tables.rows import read_rows

if TYPE_CHECKING:
    from pathlib import Path

    from permafrost.config.data import ImageTableDataConfig
    from permafrost.sources.tables.rows import Row

logger = logging.getLogger("permafrost.precompute")

NAMED_MISSING_FILES = 5
"""Number of missing files that an error names; the others are only counted."""


class TableFiles:
    """Files named by rows: their paths below the root and their sizes."""

    def __init__(self, root: Path) -> None:
        self._root = str(root)
        self._prefix = f"{posixpath.normpath(root)}/"
        self.num_missing = 0
        """Number of missing files so far."""
        self._missing_rows = 0
        self._last_missing_row = 0
        self._named_missing: list[str] = []
        self._images = Repeats()

    def add_image(self, row: Row, column: str) -> tuple[str, int]:
        """Add the image of the next row, like `add`, for `check_images`."""
        path, size = self.add(row, column)
        self._images.add(path)
        return path, size

    def add(self, row: Row, column: str) -> tuple[str, int]:
        """Return (path below the root, bytes); a missing file is counted for `check_missing`."""
        path = self._relative(row, column)
        try:
            return path, os.stat(f"{self._root}/{path}").st_size  # noqa: PTH116, once per image
        except (OSError, ValueError):  # a path with a NUL is a ValueError
            self._count_missing(row.number, path)
            return path, 0

    def _count_missing(self, row: int, path: str) -> None:
        self.num_missing += 1
        self._missing_rows += row != self._last_missing_row
        self._last_missing_row = row
        if len(self._named_missing) < NAMED_MISSING_FILES:
            self._named_missing.append(f"row {row}: {path}")

    def check_images(self, table: Path, column: str) -> None:
        """Raise ConfigError if two rows of the table named the same image."""
        for places in self._images.candidates():
            numbers = [place + 1 for place in places]
            rows = [row for row in read_rows(table, {"image": column}) if row.number in numbers]
            path, again = (self._relative(row, column) for row in rows)
            if path == again:
                raise rows[1].error(column, f"{path} is already the image of row {numbers[0]}")

    def check_missing(self, config: ImageTableDataConfig) -> None:
        """Log a warning about missing files, whose rows data.on_error=skip leaves out.

        Raises ConfigError if files are missing otherwise, or if they are more than data.max_skipped.
        """
        if not self.num_missing:
            return
        named = "; ".join(self._named_missing)
        more = self.num_missing - NAMED_MISSING_FILES
        named += f"; and {more} more" if more > 0 else ""
        found = f"{self.num_missing} files in the table are not in {self._root}: {named}"
        if config.on_error == "stop":
            raise ConfigError(
                f"{found}; correct data.root or the table, or leave such rows out with data.on_error=skip"
            )
        if self._missing_rows > config.max_skipped:
            raise ConfigError(
                f"{found}; these are more rows than data.max_skipped={config.max_skipped}, so correct data.root or the "
                "table"
            )
        logger.warning("%s; their rows are left out", found)

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
