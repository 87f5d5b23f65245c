"""Missing shards of a store, its manifest once none is missing, and the origin of its records.

A file that a committed store or pass has lost also counts as missing. It is written again, and committed if its
bytes are the same.

The origin is a digest of all that determined the records. With the same digest and every file in place, a repeated
command need not list the data. The file is not part of the store: without it, the data are listed and compared.
"""

from __future__ import annotations

import json
import logging
import posixpath
import re
from collections.abc import Sequence
from contextlib import suppress
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa

from permafrost.config.builder import to_plain_dict
from permafrost.config.data import DataConfig
from permafrost.config.options import Role, options_of
from permafrost.core.digests import SHORT, canonical_json, sha256_keys
from permafrost.core.errors import FileError, require, shorten
from permafrost.core.json_entries import EntryError, from_dict
from permafrost.core.records import are_numbers
from permafrost.core.tasks import Executor
from permafrost.storage.files import file_at, remove_partial_files
from permafrost.storage.local_files import PARTIAL_SUFFIX
from permafrost.storage.lock import CLAIM_SUFFIX
from permafrost.storage.rooted_paths import AnyPath, LinkError, RootedPath
from permafrost.store.commit_markers import COMMITS_FOLDER, MARKER_SCHEMA, marker_path, read_marker
from permafrost.store.deaths import DEATHS_SUFFIX
from permafrost.store.entries import REWRITE, ManifestError, StoreMismatchError
from permafrost.store.image_shards import IMAGES_FOLDER, Packing, require_same_shard
from permafrost.store.index_writer import StoreTablesWriter, remove_other_tables
from permafrost.store.manifest import (
    MANIFEST_NAME,
    MAX_FRAME_PIXELS,
    TEACHERS_FOLDER,
    CanonicalFrame,
    DatasetIdentity,
    Generation,
    StoreManifest,
    fingerprint_store,
    joined_identity,
    read_checked,
    read_store_manifest,
    write_manifest,
)
from permafrost.store.shard_plan import ShardPlan
from permafrost.store.shards import ShardEntry

logger = logging.getLogger("permafrost.store")


ORIGIN_NAME = ".origin.json"
_MAX_BYTES = 2**20
_APPENDED_SHARD = re.compile(r".+-[0-9a-f]{8}-\d{6}")
"""Names of shards of appends, with a part of the fingerprint of their records."""


def write_origin(store: RootedPath, digest: str, fingerprint: str, data: DataConfig) -> None:
    """Write the origin of a finished store, unless it is there or the folder is read-only.

    Args:
        store: Folder of the store.
        digest: Digest of the options and files of the data, from permafrost/sources/source.py.
        fingerprint: Fingerprint of the dataset.
        data: Options of the data.
    """
    origin = {
        "dataset_fingerprint": fingerprint,
        "origin_sha256": digest,
        "options": _options_of(data),
    }
    if read_origin(store) != origin:
        with suppress(FileError):
            file_at(store / ORIGIN_NAME).write(canonical_json(origin) + b"\n")


def describe_other_options(store: RootedPath, data: DataConfig) -> str:
    """Return the options of the data that a store was packed with, as far as these are others, or it is not known."""
    packed, named = read_origin(store).get("options"), _options_of(data)
    return " ".join(
        f"data.{name}={json.dumps(value)}"
        for name, value in (packed if isinstance(packed, dict) else {}).items()
        if name in named and named[name] != value
    )


def _options_of(data: DataConfig) -> dict[str, Any]:
    """Return the options of the data as plain values, without paths."""
    values = to_plain_dict(data)
    return {
        option.name: values[option.name]
        for option in options_of(type(data))
        if option.name in values and not {Role.FILE, Role.CACHE} & option.roles
    }


def find_finished(store: RootedPath, digest: str) -> StoreManifest | None:
    """Find a finished store that was made from the same data, without listing the data.

    Args:
        store: Folder of the store.
        digest: Digest of the options and files of the data, as in `write_origin`.

    Returns:
        The store's manifest; None if the store has another origin, is uncommitted, or lacks a file or a commit marker.

    Raises:
        ManifestError: If the manifest is damaged.
    """
    if needs_commit(store):
        return None
    manifest = committed_store(store)
    fingerprint = None if manifest is None else manifest.dataset.fingerprint
    wanted = {"dataset_fingerprint": fingerprint, "origin_sha256": digest}
    if manifest is None or not wanted.items() <= read_origin(store).items():
        return None
    with file_at(store).listing():
        return manifest if all(is_whole(store, shard) for shard in manifest.shards) else None


def read_origin(store: RootedPath) -> dict[str, Any]:
    """Return the origin, empty if there is none, or if it is damaged."""
    try:
        origin = json.loads(file_at(store / ORIGIN_NAME).read(_MAX_BYTES))
    except LinkError:
        raise
    except (FileError, FileNotFoundError, ValueError, RecursionError):
        return {}
    return origin if isinstance(origin, dict) else {}


# ---- commit ---------------------------------------------------------------------------------------


DEFAULT_FRAME_SIZE = (256, 256)
"""Default (height, width) for photographs of various sizes; standard crops of 224 pixels are taken from it
without aliasing."""


# ---- images --------------------------------------------------------------------------------------


def missing_image_shards(
    store: RootedPath,
    plans: Sequence[ShardPlan],
    dataset: DatasetIdentity,
    packing: Packing,
    classes: tuple[str, ...],
    image_size: int | None = None,
) -> list[ShardPlan]:
    """List the planned shards that are still to be written.

    Args:
        store: Folder of the store.
        plans: All planned shards.
        dataset: Identity of the data to be stored.
        packing: Form in which records are stored.
        classes: Names of the classes.
        image_size: Side of the canonical frame that the config requests; None if it requests none.

    Returns:
        The shards that have no commit marker yet. For a committed store, those without their file or commit marker, and
        those whose referenced tar has moved.

    Raises:
        StoreMismatchError: If the store contains another data set, or another plan of this one.
    """
    if file_at(store / MANIFEST_NAME).exists():
        manifest = _check_committed(store, plans, dataset, packing, classes, image_size)
        committed_shards = {shard.name: shard for shard in manifest.shards}
        with file_at(store).listing():
            return [
                plan
                for plan in plans
                if not is_whole(store, shard := committed_shards[plan.name])
                or (shard.referenced and plan.reference != shard.path)  # a tar that has moved
            ]
    return unpacked_shards(store, plans, dataset, packing)


def unpacked_shards(
    store: RootedPath, plans: Sequence[ShardPlan], dataset: DatasetIdentity, packing: Packing
) -> list[ShardPlan]:
    """List the planned shards that have no commit marker yet.

    Raises:
        StoreMismatchError: If a commit marker is of other data or another plan.
    """
    with file_at(store).listing():
        kept = file_at(store).read_each(partial(_has_marker, store, dataset, packing), plans)
        return [plan for plan, is_kept in zip(plans, kept, strict=True) if not is_kept]


def named_classes(manifest: StoreManifest, classes: tuple[str, ...]) -> tuple[str, ...]:
    """Return the names of a committed store's classes: those of the options, which may name what was numbered."""
    return manifest.classes if are_numbers(classes) else classes


def needs_commit(folder: RootedPath) -> bool:
    """Return whether a store or a pass has no manifest, or lost one of the small files that its manifest lists.

    Raises:
        ManifestError: If the manifest is damaged.
    """
    if not file_at(folder / MANIFEST_NAME).exists():
        return True
    values = read_checked(folder / MANIFEST_NAME)
    tables = [values[name] for name in ("shards", "skipped") if values.get(name)]
    tables += values.get("index", {}).values()
    tables += [entry["file"] for entry in values.get("projections", {}).values()]
    return not (
        all(file_at(folder / path).is_file() for path in values.get("files", ()))
        and all(has_size(folder / table["path"], table["bytes"]) for table in tables)
    )


def is_whole(store: RootedPath, shard: ShardEntry) -> bool:
    """Return whether a committed shard's commit marker and its tar exist."""
    return file_at(marker_path(store, shard.name)).is_file() and has_size(
        shard.file(store), shard.bytes
    )


def has_size(path: AnyPath, size: int) -> bool:
    return file_at(path).size() == size


def commit_store(
    store: RootedPath,
    plans: Sequence[ShardPlan],
    dataset: DatasetIdentity,
    *,
    classes: tuple[str, ...],
    packing: Packing,
    image_size: int | None,
    rows_per_shard: int,
    max_skipped: int,
    before: StoreManifest | None = None,
) -> StoreManifest:
    """Combine the commit markers into the index and write the manifest.

    If the store was committed before, its frame and `rows_per_shard` are taken from its manifest, because its passes
    depend on them.

    Args:
        store: Folder of the store, whose shards are all packed.
        plans: All planned shards, in the order of the index.
        dataset: Identity of the stored data.
        classes: Names of the classes.
        packing: Form in which the records were stored.
        image_size: Side of the canonical frame; None takes the images' common size if they have one, else 256.
        rows_per_shard: Rows of each shard in the arrays of passes.
        max_skipped: Largest number of records that could not be packed.
        before: Manifest of the store that the shards are appended to. Without shards, its tables are written again.

    Returns:
        The manifest that was written.

    Raises:
        ImageError: If more images could not be packed; RowError for a table.
        ManifestError: If a commit marker is missing, damaged, or of another plan.
        StoreMismatchError: If the store was committed before and a shard has other bytes now.
    """
    # 1. What an earlier commit has fixed.
    committed = committed_store(store)
    digests: dict[str, str] = {}
    if committed is not None:
        classes = classes if before else named_classes(committed, classes)
        rows_per_shard = committed.rows_per_shard
        digests = {shard.name: shard.sha256 for shard in committed.shards}
    # 2. The tables, from the commit markers in the order of the plans.
    sizes = set[tuple[int, int]]()
    parts = () if before is None else before.packed_parts()
    latest = dataset if plans or not parts else parts[-1].dataset
    suffix = f"-{latest.fingerprint[:SHORT]}" if parts[1:] or (parts and plans) else ""
    with StoreTablesWriter(store, suffix) as writer:
        if before is not None:
            read_packed, numbers = partial(_read_packed, store, before), range(len(before.shards))
            packed = file_at(store).read_each(read_packed, numbers)
            for number, (rows, entry, lost, digest) in enumerate(packed):
                if before.place_in_generation(number) == 0:
                    writer.begin_generation()
                writer.skip(lost)
                writer.append(entry, rows, digest)
            if plans:
                writer.begin_generation()
        for rows, entry, lost, digest in file_at(store).read_each(
            partial(_read_planned, store), plans
        ):
            require_same_shard(entry.file(store), entry.name, entry.sha256, digests.get(entry.name))
            writer.skip(lost)
            writer.append(entry, rows, digest)
            sizes = _some_sizes(sizes, rows)
        _check_skipped(writer, packing, max_skipped, store)
        tables = writer.finish()
    frame = committed.canonical if committed else None
    if packing.columns is None and frame is None:
        height, width = packing.size or _frame_size(sizes, image_size)
        frame = CanonicalFrame(height=height, width=width, format=packing.form)
    # 3. The manifest, which makes the store valid, and then the removal of what it does not name.
    for name in (IMAGES_FOLDER, COMMITS_FOLDER):
        remove_leftovers(store / name)
    new = tables.shards if before is None else tables.shards.between(len(before.shards), None)
    if plans:
        generation = Generation(
            dataset=dataset,
            fingerprint=fingerprint_store(dataset, frame, packing.columns, new.names_and_keys()),
            shards=len(new),
            skipped=writer.num_skipped,
            classes=len(classes),
        )
        parts = (*parts, generation)
    manifest = StoreManifest(
        **joined_identity(parts),
        classes=classes,
        canonical=frame,
        kind=packing.record_form.kind,
        columns=packing.columns,
        multi_label=tables.multi_label,
        records=tables.shards.records_of_splits(),
        rows_per_shard=rows_per_shard,
        shards=tables.shards,
        index=tables.index,
        skipped=tables.skipped,
    )
    write_manifest(store, manifest)
    if before is not None and plans:
        # Shards of appends that were killed, and whose records were appended with others later.
        for folder in (IMAGES_FOLDER, COMMITS_FOLDER):
            for path in file_at(store / folder).paths():
                name = path.name.partition(".")[0]
                if _APPENDED_SHARD.fullmatch(name) and tables.shards.number_of(name) < 0:
                    file_at(path).remove()
    # Readers of the store before an append still read them.
    remove_other_tables(store, manifest, *(() if before is None else (before,)))
    return manifest


def _read_packed(
    store: RootedPath, manifest: StoreManifest, number: int
) -> tuple[pa.Table, ShardEntry, list[dict[str, str]], str]:
    """Read the commit marker of a shard of a finished store, as `_read_planned` does."""
    entry, digest = manifest.shards[number], manifest.shards.marker_sha256(number)
    table, metadata = read_marker(marker_path(store, entry.name), MARKER_SCHEMA, digest)
    return table, entry, list(metadata["skipped"]), digest


def _check_skipped(
    writer: StoreTablesWriter, packing: Packing, max_skipped: int, store: RootedPath
) -> None:
    """Raise ImageError, or RowError for a table, if records were left out against the options, or all of them."""
    skipped, names = writer.num_skipped, packing.record_form.noun
    if skipped and packing.on_error == "stop":
        raise packing.record_form.failure(
            f"an earlier run skipped {skipped} {names}; the first: {writer.first_reason}. Run "
            f"again with data.on_error=skip, or repair them and delete {store}"
        )
    if skipped > max_skipped:
        raise packing.record_form.failure(
            f"{skipped} {names} cannot be {packing.record_form.failed}, more than data.max_skipped={max_skipped}; "
            f"the first: {writer.first_reason}. Raise data.max_skipped, or repair them and delete {store}"
        )
    if writer.num_records == 0:
        singular = names.removesuffix("s")
        raise packing.record_form.failure(
            f"no {singular} can be {packing.record_form.failed}; the first: {writer.first_reason}"
        )


def _read_planned(
    store: RootedPath, plan: ShardPlan
) -> tuple[pa.Table, ShardEntry, list[dict[str, str]], str]:
    """Read a shard's commit marker: its rows, entry, skipped records, and the SHA-256 of its file.

    Raises:
        ManifestError: If it does not belong to the plan.
    """
    path = marker_path(store, plan.name)
    table, metadata = read_marker(path, MARKER_SCHEMA)
    entry = _marker_entry(path, metadata)
    try:
        skipped = list(metadata["skipped"])
        gone = {record["key"] for record in skipped}
    except (KeyError, TypeError) as error:
        raise _other_marker(path, error) from error
    keys = table["key"].to_pylist()
    planned = [key for key in plan.keys if key not in gone]
    require(
        keys == planned and entry.name == plan.name and entry.keys_sha256 == sha256_keys(keys),
        f"{path} does not have the planned records; {REWRITE}",
        ManifestError,
    )
    return table, entry, skipped, file_at(path).sha256()


def _marker_entry(path: RootedPath, metadata: dict[str, Any]) -> ShardEntry:
    try:
        return from_dict(ShardEntry, metadata["entry"])
    except (EntryError, KeyError) as error:
        raise _other_marker(path, error) from error


def _other_marker(path: RootedPath, error: Exception) -> ManifestError:
    return ManifestError(f"{path} is not a commit marker of this version ({error}); {REWRITE}")


def remove_leftovers(folder: RootedPath) -> None:
    """Remove the leftovers of killed processes, which are not needed once every shard is finished."""
    remove_partial_files(folder)
    remove_partial_files(folder, DEATHS_SUFFIX)


def remove_shared_leftovers(folder: RootedPath, executor: Executor) -> None:
    """Remove what killed tasks of a job array have left in a finished store or pass; nothing for other executors."""
    for suffix in (PARTIAL_SUFFIX, CLAIM_SUFFIX) if executor.name == "array" else ():
        remove_partial_files(folder, suffix, ignored=(TEACHERS_FOLDER,))


def committed_store(store: RootedPath) -> StoreManifest | None:
    """Return the manifest of a store that was committed before, or None for a new or unfinished one.

    Raises:
        ManifestError: If the manifest is damaged.
    """
    return read_store_manifest(store) if file_at(store / MANIFEST_NAME).exists() else None


def _frame_size(sizes: set[tuple[int, int]], image_size: int | None) -> tuple[int, int]:
    if image_size is not None:
        return image_size, image_size
    (height, width) = DEFAULT_FRAME_SIZE if len(sizes) > 1 else next(iter(sizes))
    require(
        height * width <= MAX_FRAME_PIXELS,
        f"store.image_size=null takes the common size of the images, {width}x{height}, which is more than the "
        f"{MAX_FRAME_PIXELS:,} pixels of a frame; set store.image_size",
    )
    return height, width


def _some_sizes(sizes: set[tuple[int, int]], rows: pa.Table) -> set[tuple[int, int]]:
    """Add the sizes of a shard's images, until there are two different ones."""
    if len(sizes) > 1:
        return sizes
    pairs = np.stack([rows["height"].to_numpy(), rows["width"].to_numpy()], axis=1)
    return sizes | {(int(height), int(width)) for height, width in np.unique(pairs, axis=0)[:2]}


_PLANNED = (
    "other data",
    "another plan (store.shard_size, store.seed)",
    "another format (store.format, store.image_size)",
)
"""Causes of another commit marker, in the order of its entries."""
_OTHER_DATA = (
    "leave out data= to use the store's own records, append what is new to it with store.append=true, or choose "
    "another store.path"
)


def _check_committed(
    store: RootedPath,
    plans: Sequence[ShardPlan],
    dataset: DatasetIdentity,
    packing: Packing,
    classes: tuple[str, ...],
    image_size: int | None,
) -> StoreManifest:
    manifest = read_store_manifest(store)
    _check_tars(store, manifest, plans)
    unnamed = are_numbers(manifest.classes) or are_numbers(classes)
    require(
        manifest.classes == classes or (unnamed and len(manifest.classes) == len(classes)),
        f"{store} contains {len(manifest.classes)} classes ({shorten(manifest.classes, 3)}), but the data options "
        f"describe {len(classes)} ({shorten(classes, 3)}); {_OTHER_DATA}",
        StoreMismatchError,
    )
    if manifest.dataset != dataset:
        records = sum(plan.num_records for plan in plans)
        raise StoreMismatchError(
            f"{store} contains data {manifest.dataset.name}-{manifest.dataset.fingerprint[:8]} of "
            f"{int(manifest.shards.starts[-1]):,} records, but the data options describe "
            f"{dataset.name}-{dataset.fingerprint[:8]} of {records:,}; {_OTHER_DATA}"
        )
    skipped = {entry["key"] for entry in manifest.skipped}
    planned = [
        (plan.name, sha256_keys([key for key in plan.keys if key not in skipped])) for plan in plans
    ]
    require(
        [(shard.name, shard.keys_sha256) for shard in manifest.shards] == planned,
        f"{store} was planned with store.shard_size={manifest.rows_per_shard}, another store.seed or another "
        "data.reference; restore those options or choose another store.path",
        StoreMismatchError,
    )
    if manifest.columns != packing.columns:
        names = [", ".join(columns or ()) for columns in (manifest.columns, packing.columns)]
        raise StoreMismatchError(
            f"{store} contains the columns {names[0]}, but the config describes {names[1]}: restore data.features, "
            "data.exclude and data.categorical"
        )
    if (canonical := manifest.canonical) is None:
        return manifest
    require(
        packing.form == canonical.format and image_size in (None, canonical.height),
        f"{store} contains frames of {canonical.height}x{canonical.width} pixels as {canonical.format}, but "
        f"the config has store.image_size={image_size} store.format={packing.form}; choose another store.path",
        StoreMismatchError,
    )
    return manifest


def _check_tars(store: RootedPath, manifest: StoreManifest, plans: Sequence[ShardPlan]) -> None:
    """Raise StoreMismatchError if tars that the store refers to have other names in the data, or are not there."""
    planned = {posixpath.basename(plan.reference) for plan in plans if plan.reference}
    stored = {posixpath.basename(shard.path) for shard in manifest.shards if shard.referenced}
    if planned and stored - planned:
        others = (
            f", which has {shorten(sorted(planned - stored), 3)} instead"
            if planned - stored
            else ""
        )
        raise StoreMismatchError(
            f"{store} refers to the tars {shorten(sorted(stored - planned), 3)}, which are not in data.path{others}; "
            "restore them under their names, or choose another store.path"
        )


def _has_marker(
    store: RootedPath, dataset: DatasetIdentity, packing: Packing, plan: ShardPlan
) -> bool:
    path = marker_path(store, plan.name)
    if (metadata := read_metadata(path, MARKER_SCHEMA)) is None:
        return False
    described = [
        metadata.get(name) for name in ("dataset_fingerprint", "planned_keys_sha256", "packing")
    ]
    wanted = [dataset.fingerprint, plan.keys_sha256, packing.describe()]
    others = [
        name for name, old, new in zip(_PLANNED, described, wanted, strict=True) if old != new
    ]
    require(
        not others,
        f"{path} belongs to an unfinished store with {' and '.join(others)}; restore these, choose another "
        "store.path, or delete the folder if no other process works on it",
        StoreMismatchError,
    )
    entry = _marker_entry(path, metadata)
    return has_size(entry.file(store), entry.bytes)


def read_metadata(path: RootedPath, schema: pa.Schema) -> dict[str, Any] | None:
    """Read a commit marker's metadata; None if it is missing or damaged, so that its shard is written again."""
    if not file_at(path).is_file():
        return None
    try:
        return read_marker(path, schema)[1]
    except ManifestError as error:
        logger.warning("%s; its shard will be written again", error)
        return None
