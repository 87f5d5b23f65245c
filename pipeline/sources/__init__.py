"""Where inputs come from. A source lists its records at once and reads their bytes one by one.

Reading is a pure function of the record, so that any process may read any shard at any time.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

from pipeline.sources.cells import CellsSource
from pipeline.sources.demo import DemoSource
from pipeline.sources.digits import DigitsSource
from pipeline.sources.image_folder import ImageFolderSource
from pipeline.sources.image_table import ImageTableSource
from pipeline.sources.sklearn_table import SklearnTableSource
from pipeline.sources.table import TableSource
from pipeline.sources.tiny_imagenet import TinyImageNetSource
from pipeline.sources.torchvision_sets import TorchvisionSource
from pipeline.sources.webdataset import WebDatasetSource, plan_in_place
from pipeline.store.plan import check_keys, plan_shards

if TYPE_CHECKING:
    from collections.abc import Callable

    from pipeline.config import DataConfig, StoreConfig
    from pipeline.records import Content, Record
    from pipeline.store.plan import ShardPlan


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

    @property
    def columns(self) -> tuple[str, ...] | None:
        """Names of a table's columns; None where records are images."""

    def records(self) -> list[Record]:
        """Every record, in any order; planning sorts them by key."""

    def read(self, record: Record) -> Content:
        """The record's bytes."""

    def where(self, record: Record) -> str:
        """Its file, for messages."""


SOURCES: dict[str, Callable[[Any], Source]] = {
    "cells": CellsSource,
    "demo": DemoSource,
    "digits": DigitsSource,
    "image_folder": ImageFolderSource,
    "image_table": ImageTableSource,
    "sklearn_table": SklearnTableSource,
    "table": TableSource,
    "tiny_imagenet": TinyImageNetSource,
    "torchvision": TorchvisionSource,
    "webdataset": WebDatasetSource,
}


def plan_source(source: Source, records: list[Record], config: StoreConfig) -> list[ShardPlan]:
    """The source's shards: its own tars where they can be used in place, new ones otherwise."""
    if isinstance(source, WebDatasetSource):
        in_place = plan_in_place(source, config.format)
        if in_place is not None:
            check_keys([record.key for record in records])
            return in_place
    return plan_shards(records, config.shard_size, config.seed)


def build_source(config: DataConfig) -> Source:
    """The source that `data=` names."""
    return SOURCES[config.kind](config)
