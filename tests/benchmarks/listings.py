"""Listing and planning of records that are not packed yet, with the memory of the process that does it."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path

from permafrost.config.store import StoreOptions
from permafrost.core.records import Content, Record
from permafrost.core.tasks import SerialExecutor
from permafrost.sources.source import ListedData, list_source, tally_of
from permafrost.store.listing import listing_files
from permafrost.store.pack import fingerprint_dataset
from permafrost_sources.options import DemoDataConfig
from tests.benchmarks.probe import PeakMemory

_CLASSES = 1000


class NamedImages:
    """Source of the names of images in a shuffled order, as a folder of classes has them."""

    name = "named_images"
    revision = 1
    frame_size = None
    columns = None
    classes = tuple(map(str, range(_CLASSES)))

    def __init__(self, count: int) -> None:
        self.count = count

    def records(self) -> Iterator[Record]:
        """Yield the records."""
        for place in range(self.count):
            number = place * 7919 % self.count
            label = number % _CLASSES
            path = f"n{label:08d}/n{label:08d}_{number:08d}"
            yield Record(
                key=path.replace("/", "%2F") + "%2EJPEG",
                split="train",
                label=label,
                content=(f"{path}.JPEG", 100_000 + number % 5000),
            )

    def read(self, record: Record) -> Content:
        """Refuse to read, as there are no files."""
        raise FileNotFoundError(record.key)

    def where(self, record: Record) -> str:
        """Return the name."""
        return record.key


def plan_records(folder: Path, count: int) -> None:
    """List and plan `count` records, read the keys of every shard, and print seconds and peak private memory."""
    folder.mkdir(parents=True)
    peak, started = PeakMemory(), time.perf_counter()
    options, source = StoreOptions(path=str(folder)), NamedImages(count)
    with listing_files(folder) as files:
        listing, _ = list_source(source, files, 0, SerialExecutor())
        plans = ListedData(source, listing, tally_of(source)).plan_shards(options)
        fingerprint_dataset(DemoDataConfig(), 1, listing)
        for plan in plans:
            _ = plan.keys_sha256
    print(json.dumps({"seconds": time.perf_counter() - started, "peak_mib": peak.mib}))
