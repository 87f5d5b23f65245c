"""What is still missing in a store or a pass, and the manifest once nothing is."""

from __future__ import annotations

import importlib.metadata
from dataclasses import fields
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from pipeline.store.files import sha256_file, sha256_keys
from pipeline.store.images import receipt_path
from pipeline.store.index import INDEX_SCHEMA, PASS_RECEIPT_SCHEMA, read_table, write_table
from pipeline.store.manifest import (
    MANIFEST_NAME,
    CanonicalFrame,
    DatasetIdentity,
    FileEntry,
    PassManifest,
    PassShard,
    ShardEntry,
    StoreManifest,
    StoreMismatchError,
    read_store_manifest,
    write_manifest,
)

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from pipeline.records import FieldSpec
    from pipeline.store.plan import ShardPlan

INDEX_NAME = "index.parquet"


# ---- images --------------------------------------------------------------------------------------


def missing_image_shards(
    store: Path, plans: Sequence[ShardPlan], dataset: DatasetIdentity
) -> list[ShardPlan]:
    """The planned shards that have no receipt yet; none where the store is published.

    Raises StoreMismatchError where the store holds another data set, or another plan of this one.
    """
    if (store / MANIFEST_NAME).exists():
        _check_published(store, plans, dataset)
        return []
    return [plan for plan in plans if not _has_receipt(store, plan, dataset)]


def publish_store(
    store: Path,
    plans: Sequence[ShardPlan],
    dataset: DatasetIdentity,
    *,
    classes: tuple[str, ...],
    canonical: CanonicalFrame,
    shard_size: int,
) -> StoreManifest:
    """Gather the receipts into the index and write the manifest."""
    tables, entries, files = [], [], {}
    for plan in plans:
        path = receipt_path(store, plan.name)
        table, metadata = read_table(path, INDEX_SCHEMA)
        metadata.pop("dataset_fingerprint")
        tables.append(table)
        entries.append(ShardEntry(**metadata))
        files[path.relative_to(store).as_posix()] = sha256_file(path)
    index = pa.concat_tables(tables).replace_schema_metadata(None)
    digest = write_table(store / INDEX_NAME, index)
    manifest = StoreManifest(
        dataset=dataset,
        classes=classes,
        canonical=canonical,
        shard_size=shard_size,
        shards=tuple(entries),
        index=FileEntry(path=INDEX_NAME, bytes=(store / INDEX_NAME).stat().st_size, sha256=digest),
        files=files,
    )
    write_manifest(store, manifest)
    return manifest


def _check_published(store: Path, plans: Sequence[ShardPlan], dataset: DatasetIdentity) -> None:
    manifest = read_store_manifest(store)
    if manifest.dataset != dataset:
        raise StoreMismatchError(
            f"{store} holds data {manifest.dataset.name}-{manifest.dataset.fingerprint[:8]}, the config "
            f"describes {dataset.name}-{dataset.fingerprint[:8]}; choose another store.path or restore the data options"
        )
    if [shard.name for shard in manifest.shards] != [plan.name for plan in plans] or any(
        shard.keys_sha256 != sha256_keys([record.key for record in plan.records])
        for shard, plan in zip(manifest.shards, plans, strict=True)
    ):
        raise StoreMismatchError(
            f"{store} was planned with store.shard_size={manifest.shard_size} or another store.seed; "
            "restore those options or choose another store.path"
        )


def _has_receipt(store: Path, plan: ShardPlan, dataset: DatasetIdentity) -> bool:
    path = receipt_path(store, plan.name)
    if not path.exists():
        return False
    _, metadata = read_table(path, INDEX_SCHEMA)
    keys_sha256 = sha256_keys([record.key for record in plan.records])
    if (
        metadata["dataset_fingerprint"] != dataset.fingerprint
        or metadata["keys_sha256"] != keys_sha256
    ):
        raise StoreMismatchError(
            f"{path} belongs to an unfinished store of other data or another plan; "
            "finish that one with its own options, choose another store.path, or delete the folder"
        )
    tar = store / str(metadata["path"])
    expected: int = metadata["bytes"]
    return tar.exists() and tar.stat().st_size == expected


# ---- teacher passes ------------------------------------------------------------------------------


def missing_pass_shards(folder: Path, shards: Sequence[ShardEntry]) -> list[ShardEntry]:
    """The store's shards that this pass has no receipt for; none where the pass is published.

    The folder is named by a fingerprint that covers the store's shards, so a receipt found there is
    this pass's; it counts where the files it vouches for are there.
    """
    if (folder / MANIFEST_NAME).exists():
        return []
    return [shard for shard in shards if not _is_annotated(folder, shard)]


def _is_annotated(folder: Path, shard: ShardEntry) -> bool:
    path = receipt_path(folder, shard.name)
    if not path.exists():
        return False
    files = read_table(path, PASS_RECEIPT_SCHEMA)[1]["files"]
    paths = [(folder / entry["path"], entry["bytes"]) for entry in files]
    return all(path.exists() and path.stat().st_size == size for path, size in paths)


def publish_pass(
    folder: Path,
    shards: Sequence[ShardEntry],
    description: dict[str, Any],
    fingerprint: str,
    specs: Sequence[FieldSpec],
    shared_files: dict[str, str],
    device: str,
) -> PassManifest:
    """Gather the receipts and write the pass's manifest."""
    entries, files, fidelity = [], dict(shared_files), dict[str, float]()
    for shard in shards:
        path = receipt_path(folder, shard.name)
        _, metadata = read_table(path, PASS_RECEIPT_SCHEMA)
        files[path.relative_to(folder).as_posix()] = sha256_file(path)
        for name, cosine in metadata["fidelity"].items():
            fidelity[name] = min(cosine, fidelity.get(name, 1.0))
        entries.append(
            PassShard(
                name=metadata["name"],
                rows=metadata["rows"],
                keys_sha256=metadata["keys_sha256"],
                files=tuple(FileEntry(**entry) for entry in metadata["files"]),
            )
        )
    known = {spec.name for spec in fields(PassManifest)}
    manifest = PassManifest(
        **{name: value for name, value in description.items() if name in known},
        fingerprint=fingerprint,
        fields=tuple(specs),
        shards=tuple(entries),
        files=files,
        fidelity=fidelity,
        made_with={"torch": importlib.metadata.version("torch"), "device": device},
    )
    write_manifest(folder, manifest)
    return manifest
