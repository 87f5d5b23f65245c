"""Migration of a store from schema 1 to schema 2, from its manifests and receipts.

No image and no array is read or written. Schema 1 had the shards in the manifests and the index as one Parquet file.
The fingerprints of a store and of its passes do not depend on the schema, so runs, artifacts and the names of passes
stay valid.

Passes are migrated first and the store's manifest last, so a migration that was interrupted is finished by the same
command.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from permafrost.core.files import exists, list_folder, remove_file
from permafrost.core.records import FieldSpec  # noqa: TC001, read at run time by from_dict
from permafrost.store.entries import EntryError, from_dict
from permafrost.store.file_entry import FileEntry, ManifestError
from permafrost.store.manifest import (
    MANIFEST_NAME,
    TEACHERS_FOLDER,
    CanonicalFrame,
    DatasetIdentity,
    PassManifest,
    StoreManifest,
    fingerprint_store,
    read_checked,
    require_own_folder,
    write_manifest,
)
from permafrost.store.parquet import write_rows
from permafrost.store.receipts import RECEIPT_SCHEMA, read_receipt, receipt_path
from permafrost.store.shards import (
    SHARDS_NAME,
    PassShard,
    PassShardTable,
    ShardEntry,
    pass_shard_row,
)
from permafrost.store.store_tables import StoreTablesWriter, remove_other_tables

if TYPE_CHECKING:
    from collections.abc import Iterator

    from permafrost.core.files import RootedPath

logger = logging.getLogger("permafrost.migrate")

_OLD_SCHEMA = 1
_OLD_INDEX = "index.parquet"
M = TypeVar("M")


@dataclass(frozen=True, kw_only=True)
class _OldStoreManifest:
    """Content of a store's manifest of schema 1."""

    dataset: DatasetIdentity
    classes: tuple[str, ...]
    canonical: CanonicalFrame | None
    rows_per_shard: int
    shards: tuple[ShardEntry, ...]
    index: FileEntry
    files: dict[str, str]
    skipped: tuple[dict[str, str], ...] = ()
    kind: Literal["image", "table"] = "image"
    columns: tuple[str, ...] | None = None
    multi_label: bool = False
    schema: int = _OLD_SCHEMA


@dataclass(frozen=True, kw_only=True)
class _OldPassManifest:
    """Content of a pass's manifest of schema 1."""

    fingerprint: str
    dataset_fingerprint: str
    store_fingerprint: str
    teacher: dict[str, Any]
    views: dict[str, Any]
    explainer: dict[str, Any]
    fields: tuple[FieldSpec, ...]
    backend: Literal["zarr", "webdataset"]
    shards: tuple[PassShard, ...]
    files: dict[str, str]
    fidelity: dict[str, float] = field(default_factory=dict)
    selection: dict[str, Any] | None = None
    partition_sha256: str | None = None
    hierarchy: list[dict[str, Any]] | None = None
    made_with: dict[str, str] = field(default_factory=dict)
    schema: int = _OLD_SCHEMA


def migrate_store(store: RootedPath) -> list[str]:
    """Migrate a store and its passes. Returns the names of what was migrated; empty if nothing had schema 1.

    Raises ManifestError if a manifest or a receipt is damaged; the store then stays as it is.
    """
    migrated = []
    for folder in list_folder(store / TEACHERS_FOLDER):
        if exists(folder / MANIFEST_NAME) and _is_old(folder / MANIFEST_NAME):
            _migrate_pass(folder)
            migrated.append(f"{TEACHERS_FOLDER}/{folder.name}")
    if _is_old(store / MANIFEST_NAME):
        _migrate_store(store)
        migrated.append(store.name)
    remove_file(store / _OLD_INDEX)
    return migrated


def _is_old(manifest: RootedPath) -> bool:
    """Return whether a manifest has schema 1. Raises ManifestError unless it has schema 1 or the current one."""
    try:
        read_checked(manifest, schema=_OLD_SCHEMA)
    except ManifestError:
        read_checked(manifest)
        return False
    return True


def _read_old(cls: type[M], folder: RootedPath) -> M:
    path = folder / MANIFEST_NAME
    try:
        return from_dict(cls, read_checked(path, schema=_OLD_SCHEMA))
    except EntryError as error:
        raise ManifestError(f"{path} is not a manifest of schema 1: {error}") from error


def _migrate_store(store: RootedPath) -> None:
    old = _read_old(_OldStoreManifest, store)
    with StoreTablesWriter(store, old.rows_per_shard) as writer:
        for shard, digest in _with_receipts(store, old.shards, old.files):
            path = receipt_path(store, shard.name)
            writer.append(shard, read_receipt(path, RECEIPT_SCHEMA, digest)[0], digest)
        writer.skip(old.skipped)
        tables = writer.finish()
    kept = {
        spec.name: getattr(old, spec.name)
        for spec in fields(old)
        if spec.name not in ("shards", "index", "files", "skipped", "schema")
    }
    manifest = StoreManifest(
        **kept,
        records=tables.shards.records_of_splits(),
        fingerprint=fingerprint_store(
            old.dataset, old.canonical, old.columns, tables.shards.names_and_keys()
        ),
        shards=tables.shards,
        index=tables.index,
        keys=tables.keys,
        skipped=tables.skipped,
    )
    write_manifest(store, manifest)
    remove_other_tables(store, manifest)


def _migrate_pass(folder: RootedPath) -> None:
    old = _read_old(_OldPassManifest, folder)
    require_own_folder(folder, old.fingerprint)
    receipts = set()
    with write_rows(folder / SHARDS_NAME, PassShardTable.schema) as table:
        for shard, digest in _with_receipts(folder, old.shards, old.files):
            receipts.add(receipt_path(folder, shard.name).below(folder))
            table.append(**pass_shard_row(shard, digest))
    kept = {
        spec.name: getattr(old, spec.name)
        for spec in fields(old)
        if spec.name not in ("shards", "files", "schema")
    }
    manifest = PassManifest(
        **kept,
        shards=PassShardTable(folder, table.file),
        files={name: digest for name, digest in old.files.items() if name not in receipts},
    )
    write_manifest(folder, manifest)
    remove_other_tables(folder, manifest)


S = TypeVar("S", ShardEntry, PassShard)


def _with_receipts(
    folder: RootedPath, shards: tuple[S, ...], files: dict[str, str]
) -> Iterator[tuple[S, str]]:
    """Iterate over shards with the SHA-256 of their receipts. Raises ManifestError for one that is not listed."""
    for shard in shards:
        name = receipt_path(folder, shard.name).below(folder)
        if name not in files:
            raise ManifestError(f"{folder / MANIFEST_NAME} has no {name}")
        yield shard, files[name]
