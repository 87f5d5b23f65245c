"""Comparison of listed records with the bytes that a store was packed from: store.relist=true."""

from __future__ import annotations

import hashlib
import logging
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from permafrost.config.store import PrecomputeConfig
from permafrost.core.errors import RecordError
from permafrost.core.progress import count_records
from permafrost.core.records import Record, Source
from permafrost.core.tasks import Executor, ShardResult, Subject, run_shards
from permafrost.storage.rooted_paths import RootedPath
from permafrost.store.generations import describe_keys, find_keys, packed_store, stop_or_keep
from permafrost.store.image_shards import Packing, pack_image
from permafrost.store.listing import Listing, open_listing
from permafrost.store.pack import PackPlan

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
        pairs = zip(open_listing(self.listing).records(rows), digests.to_pylist(), strict=True)
        for record, digest in pairs:
            count_records(1)
            if self._digest(record) != digest:
                differing.append(record.key)
        return ShardResult(
            name=str(rows[0]),
            records=len(rows),
            seconds=time.monotonic() - started,
            report=differing,
        )

    def _digest(self, record: Record) -> bytes | None:
        """Return the SHA-256 of a record's image as it would be packed; None for one that cannot be."""
        is_copied = self.packing.form == "original" and not self.packing.bit_range
        with suppress(RecordError, OSError):
            content = (
                self.source.read(record)
                if is_copied
                else pack_image(self.source, record, self.packing).content
            )
            return hashlib.sha256(content.image).digest()
        return None


def compare_bytes(
    config: PrecomputeConfig,
    listing: Listing,
    plan: PackPlan,
    choose: Callable[[int], Executor],
) -> None:
    """Read the bytes of all packed records again, and log how many differ from what was packed.

    Frames are encoded again for it. Masks are not compared, as a store has no digest of theirs.

    Args:
        config: Options of the command.
        listing: Listing of the source's records.
        plan: Source of the records, and the form in which they are stored.
        choose: Function of a number of records that returns the executor.

    Raises:
        StoreMismatchError: If some differ, and store.changed=stop.
    """
    store = packed_store(plan.path)
    if store is None:
        return
    started, differing = time.monotonic(), list[str]()
    places = find_keys(store, listing)[1]
    rows = np.flatnonzero((places >= 0) & (places < store.index.num_rows))
    digests = store.index.image_digests().take(pa.array(places[rows]))
    run_shards(
        "compare",
        choose(len(rows)),
        CompareBytes(listing=listing.path, source=plan.source, packing=plan.packing),
        [
            (rows[start : start + _PART], digests[start : start + _PART])
            for start in range(0, len(rows), _PART)
        ],
        lambda result: differing.extend(result.report),
        len(rows),
    )
    text = f"{len(differing):,} with other bytes ({describe_keys(sorted(differing))})"
    logger.info(
        "store.relist=true: %s of %s packed records in %.1f s",
        text if differing else "0 with other bytes",
        f"{len(rows):,}",
        time.monotonic() - started,
    )
    stop_or_keep(config, [text] if differing else [])
