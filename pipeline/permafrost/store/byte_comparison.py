"""Comparison of listed records with the bytes that a store was packed from: store.relist=true."""

from __future__ import annotations

import hashlib
import logging
import time
from contextlib import suppress
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from permafrost.core.errors import RecordError
from permafrost.core.progress import count_records
from permafrost.core.records import Source
from permafrost.core.tasks import Executor, ShardResult, Subject, run_shards
from permafrost.storage.rooted_paths import RootedPath
from permafrost.store.generations import describe_keys, find_keys
from permafrost.store.image_shards import Packing, pack_image
from permafrost.store.listing import Listing, open_listing
from permafrost.store.reader import Store

logger = logging.getLogger("permafrost.precompute")

_PART = 512
"""Number of records of a task."""


@dataclass(frozen=True, kw_only=True)
class CompareBytes:
    """Task that reads records again: rows of the listing, and SHA-256 of their packed images -> keys that differ."""

    needs_gpu: ClassVar[bool] = False
    subject: ClassVar[Subject] = Subject("", "compare")
    listing: RootedPath
    source: Source
    packing: Packing

    def __call__(self, part: tuple[NDArray[np.int64], pa.Array]) -> ShardResult[list[str]]:
        started, differing = time.monotonic(), []
        rows, digests = part
        is_copied = self.packing.form == "original" and not self.packing.bit_range
        records = open_listing(self.listing).records(rows)
        for record, digest in zip(records, digests.to_pylist(), strict=True):
            count_records(1)
            with suppress(RecordError, OSError):  # one that cannot be read differs, too
                content = (
                    self.source.read(record)
                    if is_copied
                    else pack_image(self.source, record, self.packing).content
                )
                if hashlib.sha256(content.image).digest() == digest:
                    continue
            differing.append(record.key)
        seconds = time.monotonic() - started
        return ShardResult(name=str(rows[0]), records=len(rows), seconds=seconds, report=differing)


def compare_bytes(
    store: Store, listing: Listing, source: Source, packing: Packing, executor: Executor
) -> list[str]:
    """Read the bytes of all packed records again, and log how many differ from what was packed.

    Frames are encoded again for it. Masks are not compared, as a store has no digest of theirs.

    Args:
        store: The finished store.
        listing: Listing of the source's records.
        source: The source.
        packing: Form in which its records are stored.
        executor: Runs the tasks.

    Returns:
        The problem with the keys of some, nothing if no record differs.
    """
    started, differing = time.monotonic(), list[str]()
    places = find_keys(store, listing)[1]
    rows = np.flatnonzero((places >= 0) & (places < store.index.num_rows))
    digests = store.index.image_digests()
    parts = [rows[start : start + _PART] for start in range(0, len(rows), _PART)]
    run_shards(
        "compare",
        executor,
        CompareBytes(listing=listing.path, source=source, packing=packing),
        [(part, digests.take(pa.array(places[part]))) for part in parts],
        lambda result: differing.extend(result.report),
        len(rows),
    )
    named = f" ({describe_keys(sorted(differing))})" if differing else ""
    logger.info(
        "store.relist=true: the bytes of %s of %s packed records differ%s, read in %.1f s",
        f"{len(differing):,}",
        f"{len(rows):,}",
        named,
        time.monotonic() - started,
    )
    return [f"{len(differing):,} with other bytes{named}"] if differing else []
