"""Stores without images, of any size, written through the code that publishes real stores."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa

from permafrost.core.digests import sha256_keys
from permafrost.storage.files import file_at
from permafrost.storage.rooted_paths import RootedPath
from permafrost.store.commit_markers import MARKER_SCHEMA, marker_path, write_marker
from permafrost.store.index_writer import StoreTablesWriter
from permafrost.store.manifest import (
    CanonicalFrame,
    DatasetIdentity,
    StoreManifest,
    fingerprint_store,
    write_manifest,
)
from permafrost.store.reader import Store
from permafrost.store.shards import ShardEntry

DIGEST = "ab" * 32


def marker_of(split, name, keys, labels, sets=None):
    """Commit marker of a shard whose images are 100 bytes long, as an Arrow table."""
    count = len(keys)
    rows = np.arange(count, dtype=np.int32)
    full = {
        "split": split,
        "shard": name,
        "mask_offset": -1,
        "mask_size": 0,
        "height": 8,
        "width": 8,
        "orientation": 1,
        "group": -1,
        "image_sha256": DIGEST,
        "mask_crc32c": 0,
    }
    columns = {
        "key": pa.array(keys, pa.string()),
        "row": pa.array(rows),
        "offset": pa.array(rows.astype(np.int64) * 1536 + 512),
        "size": pa.array(np.full(count, 100, np.int64)),
        "label": pa.array(labels, pa.int32()),
        "labels": pa.array(sets or [[]] * count, pa.list_(pa.int32())),
        "boxes": pa.array([[]] * count, MARKER_SCHEMA.field("boxes").type),
        "image_crc32c": pa.array(rows.astype(np.uint32)),
    }
    for column, value in full.items():
        columns[column] = pa.array([value] * count, MARKER_SCHEMA.field(column).type)
    return pa.table([columns[field.name] for field in MARKER_SCHEMA], schema=MARKER_SCHEMA)


def write_shards(folder: Path, shards, *, rows_per_shard: int, classes: int, markers=False):
    """Publish a store of the given shards, an iterable of (name, split, commit marker).

    markers  also write commit markers, and a file of a few bytes in place of each tar, as verification needs them
    """
    file_at(folder).make_folder()
    with StoreTablesWriter(RootedPath.of(folder)) as writer:
        for name, split, rows in shards:
            keys = rows["key"].to_pylist()
            path, digest, size = f"images/{name}.tar", DIGEST, 0
            if markers:
                digest, size = file_at(folder / path).write(name.encode()), len(name)
            entry = ShardEntry(
                name=name,
                split=split,
                records=len(keys),
                path=path,
                bytes=size,
                sha256=digest,
                keys_sha256=sha256_keys(keys),
            )
            marker = DIGEST
            if markers:
                marker = write_marker(marker_path(folder, name), rows, {"entry": name})
            writer.append(entry, rows, marker)
        tables = writer.finish()
    dataset = DatasetIdentity(name="synthetic", fingerprint=DIGEST)
    frame = CanonicalFrame(height=8, width=8)
    manifest = StoreManifest(
        dataset=dataset,
        classes=tuple(map(str, range(classes))),
        canonical=frame,
        records=tables.shards.records_of_splits(),
        rows_per_shard=rows_per_shard,
        fingerprint=fingerprint_store(dataset, frame, None, tables.shards.names_and_keys()),
        shards=tables.shards,
        index=tables.index,
        skipped=tables.skipped,
        multi_label=tables.multi_label,
    )
    write_manifest(folder, manifest)
    return Store(folder)


def store_of_rows(folder: Path, rows, shard_size: int = 8):
    """Store with one split `train` of the given (key, label, labels)."""

    def shards():
        for start in range(0, len(rows), shard_size):
            keys, labels, sets = zip(*rows[start : start + shard_size], strict=True)
            name = f"train-{start // shard_size:06d}"
            lists = [[int(label) for label in labels] for labels in sets]
            yield name, "train", marker_of("train", name, list(keys), list(labels), lists)

    classes = 1 + max(max([label, *map(int, labels)]) for _, label, labels in rows)
    return write_shards(folder, shards(), rows_per_shard=shard_size, classes=max(classes, 1))


def large_store(folder: Path, splits, *, shard_size=512, classes=1000, markers=False):
    """Store with the given number of records in each split, whose labels are drawn."""

    def shards():
        for split, count in splits.items():
            for number, start in enumerate(range(0, count, shard_size)):
                size = min(shard_size, count - start)
                name = f"{split}-{number:06d}"
                keys = [f"{split}-{row:09d}" for row in range(start, start + size)]
                labels = np.random.default_rng(start).integers(0, classes, size)
                yield name, split, marker_of(split, name, keys, labels)

    return write_shards(
        folder, shards(), rows_per_shard=shard_size, classes=classes, markers=markers
    )
