"""Where inputs come from. A source lists its records at once and reads their bytes one by one.

Reading is a pure function of the record, so that any process may read any shard at any time.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

from pipeline.sources.demo import DemoSource
from pipeline.sources.image_folder import ImageFolderSource
from pipeline.sources.image_table import ImageTableSource
from pipeline.sources.tiny_imagenet import TinyImageNetSource
from pipeline.sources.torchvision_sets import TorchvisionSource

if TYPE_CHECKING:
    from collections.abc import Callable

    from pipeline.config import DataConfig
    from pipeline.records import Content, Record


class Source(Protocol):
    """A picklable set of records."""

    name: str
    revision: int
    """Raised whenever the same options and records give other bytes."""

    @property
    def classes(self) -> tuple[str, ...]:
        """Names in label order."""

    @property
    def frame_size(self) -> tuple[int, int] | None:
        """(height, width) that all images have; None where they differ or are unknown."""

    def records(self) -> list[Record]:
        """Every record, in any order; planning sorts them by key."""

    def read(self, record: Record) -> Content:
        """The record's bytes."""


SOURCES: dict[str, Callable[[Any], Source]] = {
    "demo": DemoSource,
    "image_folder": ImageFolderSource,
    "image_table": ImageTableSource,
    "tiny_imagenet": TinyImageNetSource,
    "torchvision": TorchvisionSource,
}


def build_source(config: DataConfig) -> Source:
    """The source that `data=` names."""
    return SOURCES[config.kind](config)
