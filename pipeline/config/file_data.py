"""What every source of files has in common (`data=`)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from pipeline.core.errors import require


@dataclass(frozen=True, kw_only=True)
class FileDataConfig:
    """Options of every source that reads files it did not make."""

    NOT_DATA: ClassVar[frozenset[str]] = frozenset(
        {"path", "root", "cache", "download", "on_error", "max_skipped", "reference", "classes"}
    )
    """Options that say where or how to read, not what: outside the fingerprint. `classes` is a path too;
    what its file says shows in the records' labels."""

    on_error: Literal["stop", "skip"] = "stop"
    """What an image that cannot be decoded, or a row that is not all finite numbers, does: end the run, or be
    listed in the store's manifest. Of data=tiny_imagenet skip also takes images without boxes where their
    class has no file of boxes."""
    max_skipped: int = 100
    """More such records than this end the run all the same."""

    def __post_init__(self) -> None:
        require(self.max_skipped >= 0, f"data.max_skipped must be >= 0, got {self.max_skipped}")

    def _require_path(self, path: str, what: str) -> None:
        require(path != "", f"data.path is empty; give {what}")
