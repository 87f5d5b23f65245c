"""Where inputs come from. A source lists its records at once and reads their bytes one by one.

Reading is a pure function of the record, so that any process may read any shard at any time.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

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
from pipeline.store.planning import check_keys, plan_shards

if TYPE_CHECKING:
    from collections.abc import Callable

    from pipeline.config.data import DataConfig
    from pipeline.config.store import StoreConfig
    from pipeline.core.records import Record, Source
    from pipeline.store.planning import ShardPlan


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
