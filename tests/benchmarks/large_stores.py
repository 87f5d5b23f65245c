"""Readable stores of any number of records, made from one real shard in minutes.

The shard's tar and arrays are hard-linked under the names of all others, so the store takes no space for pixels or
values. Its index, commit markers, tables and manifests are written by the code that publishes real stores, with a key
and a label for each record.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import asdict, fields, replace
from pathlib import Path

import pyarrow as pa

from permafrost.config.cluster import LocalClusterConfig
from permafrost.config.explainers import GradCamConfig
from permafrost.config.models import CifarModelConfig
from permafrost.config.store import PassOptions, PrecomputeConfig, StoreOptions
from permafrost.core.digests import sha256_keys
from permafrost.storage.files import file_at
from permafrost.storage.rooted_paths import RootedPath
from permafrost.store.arrow_files import write_rows
from permafrost.store.commit_markers import (
    MARKER_SCHEMA,
    PASS_MARKER_SCHEMA,
    marker_path,
    read_marker,
    write_marker,
)
from permafrost.store.index_writer import StoreTablesWriter
from permafrost.store.manifest import fingerprint_store, write_manifest
from permafrost.store.reader import BACKENDS, Store
from permafrost.store.shards import SHARDS_NAME, PassShard, PassShardTable, shard_row
from permafrost_sources.options import DigitsDataConfig
from tests.support.verbs import precompute

SHARD_RECORDS = 512
TEACHER = CifarModelConfig(name="resnet8", width=4, weights="random")


def write_large_store(folder: Path, records: dict[str, int]) -> Store:
    """Write a store with one pass of logits.

    records  number of records of each split, in multiples of SHARD_RECORDS
    """
    template = _template(folder.with_name(f"{folder.name}-template"))
    (taught,) = template.open_passes()
    own = folder / "teachers" / taught.name
    file_at(own).make_folder()
    names = [
        (split, f"{split}-{number:06d}")
        for split, count in sorted(records.items())
        for number in range(count // SHARD_RECORDS)
    ]
    manifest = template.manifest
    rows, _ = read_marker(marker_path(template.path, "train-000000"), MARKER_SCHEMA)
    with StoreTablesWriter(RootedPath.of(folder)) as writer:
        for (split, name), keys in zip(names, _keys(names), strict=True):
            path = f"images/{name}.tar"
            _link(template.path / "images/train-000000.tar", folder / path)
            entry = replace(
                template.shards[template.shards.number_of("train-000000")],
                **{"name": name, "split": split, "path": path, "keys_sha256": sha256_keys(keys)},
            )
            own_rows = _with_columns(
                rows, key=keys, split=[split] * len(keys), shard=[name] * len(keys)
            )
            metadata = {"entry": asdict(entry), "skipped": []}
            digest = write_marker(marker_path(folder, name), own_rows, metadata)
            writer.append(entry, own_rows, digest)
        tables = writer.finish()
    kept = {
        spec.name: getattr(manifest, spec.name)
        for spec in fields(manifest)
        if spec.name not in ("shards", "index", "records", "fingerprint")
    }
    fingerprint = fingerprint_store(
        manifest.dataset, manifest.canonical, None, tables.shards.names_and_keys()
    )
    large = replace(
        manifest,
        **kept,
        shards=tables.shards,
        index=tables.index,
        records=tables.shards.records_of_splits(),
        fingerprint=fingerprint,
    )
    write_manifest(folder, large)
    _write_pass(Store(folder), template, own)
    return Store(folder)


def _write_pass(store: Store, template: Store, folder: Path) -> None:
    (taught,) = template.open_passes()
    number = template.shards.number_of("train-000000")
    source = taught.shards[number]
    backend = BACKENDS[taught.manifest.backend](
        folder, taught.manifest.fields, len(store.shards), SHARD_RECORDS, 1
    )
    shared = backend.create()
    rows, metadata = read_marker(marker_path(taught.folder, source.name), PASS_MARKER_SCHEMA)
    with write_rows(folder / SHARDS_NAME, PassShardTable.schema) as table:
        for place, shard in enumerate(store.shards):
            paths = backend.shard_files(place, shard.name)
            for file, path in zip(source.files, paths, strict=True):
                _link(Path(str(taught.folder / file.path)), folder / path)
            files = tuple(
                replace(file, path=path) for file, path in zip(source.files, paths, strict=True)
            )
            keys = store.index.shard_keys(place)
            array_row = range(place * SHARD_RECORDS, (place + 1) * SHARD_RECORDS)
            own_rows = _with_columns(rows, key=keys, array_row=array_row)
            own = {
                "name": shard.name,
                "keys_sha256": shard.keys_sha256,
                "files": [asdict(f) for f in files],
            }
            digest = write_marker(marker_path(folder, shard.name), own_rows, metadata | own)
            entry = PassShard(
                name=shard.name, rows=SHARD_RECORDS, keys_sha256=shard.keys_sha256, files=files
            )
            table.append(**shard_row(entry, digest))
    manifest = replace(
        taught.manifest,
        store_fingerprint=store.manifest.fingerprint,
        shards=PassShardTable(folder, table.file),
        files=shared,
    )
    write_manifest(folder, manifest)


def _template(folder: Path) -> Store:
    """Store of one whole shard of scanned digits with the logits and maps of a tiny teacher."""
    config = PrecomputeConfig(
        data=DigitsDataConfig(),
        store=StoreOptions(path=str(folder), shard_size=SHARD_RECORDS),
        teacher=TEACHER,
        explainer=GradCamConfig(),
        annotate=PassOptions(outputs=("logits", "maps")),
        cluster=LocalClusterConfig(),
        executor="serial",
        run=str(folder.with_name("run")),
    )
    precompute.run(config)
    return Store(folder)


def _keys(names: list[tuple[str, str]]) -> Iterator[list[str]]:
    for _, name in names:
        yield [f"{name}-{row:03d}" for row in range(SHARD_RECORDS)]


def _with_columns(table: pa.Table, **columns: object) -> pa.Table:
    for name, values in columns.items():
        place = table.schema.get_field_index(name)
        field = table.schema.field(place)
        table = table.set_column(place, field, pa.array(values, field.type))
    return table


def _link(source: Path, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    os.link(source, path)
