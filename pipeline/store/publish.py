"""What is still missing in a store or a pass, and the manifest once nothing is."""

from __future__ import annotations

import importlib.metadata
from dataclasses import fields
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from pipeline.store.files import sha256_file, sha256_keys
from pipeline.store.index import (
    INDEX_SCHEMA,
    PASS_RECEIPT_SCHEMA,
    has_many_labels,
    read_table,
    receipt_path,
    write_table,
)
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
    from pipeline.store.packing import Packing
    from pipeline.store.plan import ShardPlan

INDEX_NAME = "index.parquet"
DEFAULT_FRAME_SIZE = (256, 256)
"""Of photographs of many sizes: the 224 pixels of the field's crops are fetched from it unaliased."""


# ---- images --------------------------------------------------------------------------------------


def missing_image_shards(
    store: Path,
    plans: Sequence[ShardPlan],
    dataset: DatasetIdentity,
    packing: Packing,
    classes: tuple[str, ...],
    image_size: int | None = None,
) -> list[ShardPlan]:
    """The planned shards that have no receipt yet; none where the store is published.

    image_size  that the config asks for, if any
    Raises StoreMismatchError where the store holds another data set, or another plan of this one.
    """
    if (store / MANIFEST_NAME).exists():
        _check_published(store, plans, dataset, packing, classes, image_size)
        return []
    return [plan for plan in plans if not _has_receipt(store, plan, dataset, packing)]


def publish_store(
    store: Path,
    plans: Sequence[ShardPlan],
    dataset: DatasetIdentity,
    *,
    classes: tuple[str, ...],
    packing: Packing,
    image_size: int | None,
    shard_size: int,
    max_skipped: int,
) -> StoreManifest:
    """Gather the receipts into the index and write the manifest.

    image_size   side of the canonical frame; None takes the images' own where all have one, else 256
    max_skipped  more records than this that could not be packed are an ImageError, or a RowError
    """
    tables, entries, files, skipped = [], [], {}, list[dict[str, str]]()
    for plan in plans:
        path = receipt_path(store, plan.name)
        table, metadata = read_table(path, INDEX_SCHEMA)
        tables.append(table)
        entries.append(ShardEntry(**metadata["entry"]))
        skipped += metadata["skipped"]
        files[path.relative_to(store).as_posix()] = sha256_file(path)
    if skipped and packing.on_error == "stop":
        raise packing.failure(
            f"an earlier run skipped {len(skipped)} {packing.noun}; the first: {skipped[0]['reason']}. Run with "
            f"data.on_error=skip again, or mend them and delete {store}"
        )
    if len(skipped) > max_skipped:
        raise packing.failure(
            f"{len(skipped)} {packing.noun} cannot {packing.failed}, more than data.max_skipped={max_skipped}; "
            f"the first: {skipped[0]['reason']}. Mend them and delete {store}, or raise data.max_skipped"
        )
    index = pa.concat_tables(tables).replace_schema_metadata(None)
    if index.num_rows == 0:
        noun = packing.noun.removesuffix("s")
        raise packing.failure(f"no {noun} can {packing.failed}; the first: {skipped[0]['reason']}")
    digest = write_table(store / INDEX_NAME, index)
    manifest = StoreManifest(
        dataset=dataset,
        classes=classes,
        canonical=None if packing.columns is not None else _frame(packing, index, image_size),
        kind="image" if packing.columns is None else "table",
        columns=packing.columns,
        multi_label=has_many_labels(index),
        shard_size=shard_size,
        shards=tuple(entries),
        index=FileEntry(path=INDEX_NAME, bytes=(store / INDEX_NAME).stat().st_size, sha256=digest),
        files=files,
        skipped=tuple(skipped),
    )
    write_manifest(store, manifest)
    return manifest


def _frame(packing: Packing, index: pa.Table, image_size: int | None) -> CanonicalFrame:
    height, width = packing.size or _frame_size(index, image_size)
    return CanonicalFrame(height=height, width=width, format=packing.form)


def _frame_size(index: pa.Table, image_size: int | None) -> tuple[int, int]:
    if image_size is not None:
        return image_size, image_size
    sizes = index.select(["height", "width"]).group_by(["height", "width"]).aggregate([])
    if sizes.num_rows > 1:
        return DEFAULT_FRAME_SIZE
    return sizes["height"][0].as_py(), sizes["width"][0].as_py()


def _check_published(
    store: Path,
    plans: Sequence[ShardPlan],
    dataset: DatasetIdentity,
    packing: Packing,
    classes: tuple[str, ...],
    image_size: int | None,
) -> None:
    manifest = read_store_manifest(store)
    if manifest.classes != classes:
        raise StoreMismatchError(
            f"{store} holds {len(manifest.classes)} classes ({', '.join(manifest.classes[:3])}, ...), the config "
            f"describes {len(classes)} ({', '.join(classes[:3])}, ...); restore data.classes, "
            "or choose another store.path"
        )
    if manifest.dataset != dataset:
        raise StoreMismatchError(
            f"{store} holds data {manifest.dataset.name}-{manifest.dataset.fingerprint[:8]}, the config "
            f"describes {dataset.name}-{dataset.fingerprint[:8]}; choose another store.path or restore the data options"
        )
    skipped = {entry["key"] for entry in manifest.skipped}
    planned = [
        (plan.name, sha256_keys([r.key for r in plan.records if r.key not in skipped]))
        for plan in plans
    ]
    if [(shard.name, shard.keys_sha256) for shard in manifest.shards] != planned:
        raise StoreMismatchError(
            f"{store} was planned with store.shard_size={manifest.shard_size}, another store.seed or another "
            "data.reference; restore those options or choose another store.path"
        )
    if manifest.columns != packing.columns:
        names = [", ".join(columns or ()) for columns in (manifest.columns, packing.columns)]
        raise StoreMismatchError(
            f"{store} holds the columns {names[0]}; the config describes {names[1]}: restore data.features, "
            "data.exclude and data.categorical, or choose another store.path"
        )
    canonical = manifest.canonical
    if canonical is None:
        return
    if packing.form != canonical.format or image_size not in (None, canonical.height):
        raise StoreMismatchError(
            f"{store} holds frames of {canonical.height}x{canonical.width} pixels as {canonical.format}, the config "
            f"asks for store.image_size={image_size} store.format={packing.form}; choose another store.path"
        )


def _has_receipt(store: Path, plan: ShardPlan, dataset: DatasetIdentity, packing: Packing) -> bool:
    path = receipt_path(store, plan.name)
    if not path.exists():
        return False
    _, metadata = read_table(path, INDEX_SCHEMA)
    if (
        metadata["dataset_fingerprint"],
        metadata["planned_keys_sha256"],
        metadata["packing"],
    ) != (dataset.fingerprint, plan.keys_sha256, packing.describe()):
        raise StoreMismatchError(
            f"{path} belongs to an unfinished store of other data, another plan or another format; "
            "finish that one with its own options, choose another store.path, or delete the folder"
        )
    tar = store / str(metadata["entry"]["path"])
    expected: int = metadata["entry"]["bytes"]
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
