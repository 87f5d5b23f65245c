"""Rules of findings about records that are to be appended to a store, against those that it has."""

from __future__ import annotations

from collections.abc import Iterator
from urllib.parse import unquote

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from permafrost.core.errors import quote, shorten
from permafrost.sources.data_preview import Preview, Remark
from permafrost.store.frames import ShardFrames
from permafrost.store.reader import Store
from permafrost_findings.equal_images import hash_thumbnails, hashes_of
from permafrost_findings.picture_rules import describe_brightness

_SHARDS, _ROWS_OF_SHARD = 4, 64
"""Number of shards of the store, and of records of each, that new files are compared with."""
_NAMED = 3


def find_new_classes(preview: Preview) -> Iterator[Remark]:
    """Find classes that the store does not have."""
    if preview.comparison is None:
        return
    new = range(len(preview.comparison.store.manifest.classes), len(preview.classes))
    if len(new):
        records = sum(
            preview.count(split, label) for split in preview.counts.records for label in new
        )
        yield (
            "note",
            f"classes are new ({len(new)}, with {records:,} records: {preview.names_of(new)}); they follow those of "
            "the store, whose labels keep their numbers. A teacher that was trained before does not know them",
        )


def find_other_brightness(preview: Preview) -> Iterator[Remark]:
    """Find new images that are darker or brighter than those of the store."""
    if preview.comparison is None:
        return
    new = np.array([mean for means in preview.sample.means.values() for mean in means])
    described = describe_brightness(new, _brightness(preview.comparison.store))
    if described:
        yield (
            "warning",
            f"new images are {described.replace('there', 'of the store', 1)}; if that is a matter of the camera or of "
            "the export, a student may tell old from new by it",
        )


def find_packed_copies(preview: Preview) -> Iterator[Remark]:
    """Find new files that the store has under other keys, with the same bytes or the same thumbnail."""
    sample = preview.sample
    if preview.comparison is None or not sample.digests:
        return
    store = preview.comparison.store
    packed = store.index.image_digests()
    is_there = pc.is_in(pa.array(list(sample.digests), packed.type), value_set=packed).to_pylist()
    copies = {key for key, there in zip(sample.digests.values(), is_there, strict=True) if there}
    if (hashes := hashes_of(store)) is not None:
        keys, _, thumbnails = zip(*sample.thumbnails, strict=True)
        values = np.frombuffer(b"".join(thumbnails), np.uint8).reshape(len(keys), -1)
        copies |= set(np.array(keys)[np.isin(hash_thumbnails(values)[0], hashes[0])].tolist())
    if copies:
        names = shorten([quote(unquote(key), 200)[1:-1] for key in sorted(copies)], _NAMED)
        yield (
            "warning",
            f"new files are in the store already, with equal bytes or pixels ({len(copies):,} of "
            f"{len(sample.thumbnails):,} that were compared: {names}), under other keys; if folders were renamed, name "
            "them as they were",
        )


def _rows_of(store: Store) -> NDArray[np.int64]:
    """Return rows of a few shards that are spread over a store."""
    shards = np.unique(np.linspace(0, len(store.shards) - 1, _SHARDS).astype(np.int64))
    rows = [np.asarray(store.rows_of_shard(number))[:_ROWS_OF_SHARD] for number in shards.tolist()]
    return np.concatenate(rows)


def _brightness(store: Store) -> NDArray[np.float64]:
    """Return the mean values of the frames of a few records of a store."""
    rows, means = _rows_of(store), []
    numbers = store.index.shard_numbers(rows)
    for number in np.unique(numbers).tolist():
        places = rows[numbers == number] - store.rows_of_shard(number).start
        frames = ShardFrames(store, store.shards[number], places).read(0, len(places)).frames
        means += [float(frame.float().mean()) for frame in frames]
    return np.array(means)
