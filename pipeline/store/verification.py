"""Verification of a store: compare every byte with its manifests, and check the values of every row."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from pipeline.core.files import PARTIAL_SUFFIX, FileError, sha256_file, sha256_keys
from pipeline.core.records import NO_CLASS
from pipeline.store.artifacts import ARTIFACTS_FOLDER
from pipeline.store.codecs import decode_unit
from pipeline.store.entries import EntryError, from_dict
from pipeline.store.index import RECEIPT_SCHEMA, RECEIPTS_FOLDER, read_receipt, receipt_path
from pipeline.store.journal import JOURNAL_SUFFIX
from pipeline.store.lock import LOCK_NAME
from pipeline.store.manifest import (
    MANIFEST_NAME,
    ManifestError,
    PassManifest,
    ShardEntry,
    StoreMismatchError,
    check_files,
    read_checked,
    read_pass_manifest,
)
from pipeline.store.origin import ORIGIN_NAME
from pipeline.store.reader import TEACHERS_FOLDER, Store, TeacherPass
from pipeline.store.tars import recovery_hint

_OTHER_FOLDERS = (TEACHERS_FOLDER, ARTIFACTS_FOLDER)

if TYPE_CHECKING:
    from collections.abc import Container, Iterator
    from pathlib import Path

    from numpy.typing import NDArray

    from pipeline.core.records import FieldSpec
    from pipeline.store.fields import Values


def verify_store(path: Path) -> Iterator[str]:
    """Yield every problem of a store and its passes, as one line that names the file, the shard or the record.

    If a manifest is damaged, the files that it covers are compared with the receipts, which have their own digests.
    """
    try:
        store = Store(path)
    except (ManifestError, StoreMismatchError, FileError) as error:
        yield str(error)
        yield from _verify_receipts(path)
        store = None
    sound = store is not None
    if store is not None:
        manifest = store.manifest
        described: dict[str, str | None] = {MANIFEST_NAME: None, **manifest.files}
        described[manifest.index.path] = manifest.index.sha256
        problems = list(_verify_shards(store))
        problems += _verify_files(path, described, _own_shards(store), _OTHER_FOLDERS)
        yield from problems
        sound = not problems
        if sound:
            yield from _verify_index(store)
    for folder in sorted((path / TEACHERS_FOLDER).glob("*/")):
        if not (folder / MANIFEST_NAME).exists():
            yield f"{folder / MANIFEST_NAME} is missing: the pass is unfinished; run permafrost precompute again"
        elif store is not None:
            yield from _verify_pass(store, folder, rows_too=sound)
        else:
            yield from _verify_pass_files(folder)
    for folder in sorted((path / ARTIFACTS_FOLDER).glob("*/")):
        yield from _verify_artifact(folder)


def _own_shards(store: Store) -> set[str]:
    return {shard.path for shard in store.manifest.shards if not shard.referenced}


def _verify_shards(store: Store) -> Iterator[str]:
    for shard in store.manifest.shards:
        yield from _verify_shard(store.path, shard)


def _verify_shard(path: Path, shard: ShardEntry) -> Iterator[str]:
    """Compare a shard's file with its entry. For a referenced tar the advice is never to delete it."""
    hint = f"; {recovery_hint(shard, '')}" if shard.referenced else ""
    try:
        found = sha256_file(path / shard.path)
    except FileNotFoundError:
        yield f"{path / shard.path} is missing{hint}"
    except FileError as error:
        yield f"{error}{hint}"
    else:
        if found != shard.sha256:
            yield f"{path / shard.path} has sha256 {found[:12]}, but its manifest lists {shard.sha256[:12]}{hint}"


def _verify_files(
    folder: Path,
    described: dict[str, str | None],
    also_known: Container[str] = (),
    ignored: tuple[str, ...] = (),
) -> Iterator[str]:
    """Check that the folder contains exactly the described files, with their digests (None is not checked)."""
    for name, digest in described.items():
        if not (folder / name).is_file():
            yield f"{folder / name} is missing"
        elif digest is not None and (found := sha256_file(folder / name)) != digest:
            yield f"{folder / name} has sha256 {found[:12]}, but its manifest lists {digest[:12]}"
    for path in sorted(p for p in folder.rglob("*") if not p.is_dir()):
        name = path.relative_to(folder).as_posix()
        if name.partition("/")[0] in ignored or name in also_known:
            continue
        if name in (*described, LOCK_NAME, ORIGIN_NAME):
            continue
        if name.endswith((PARTIAL_SUFFIX, JOURNAL_SUFFIX)):
            yield f"{path} was left by a process that was killed; delete it"
        else:
            yield f"{path} is not in any manifest"


def _verify_receipts(path: Path) -> Iterator[str]:
    """Check the receipts of a store with an unreadable manifest, and the shards against them."""
    for receipt in sorted((path / RECEIPTS_FOLDER).glob("*.parquet")):
        try:
            table, metadata = read_receipt(receipt, RECEIPT_SCHEMA)
            shard = from_dict(ShardEntry, metadata["entry"])
        except (ManifestError, EntryError, KeyError, FileError) as error:
            yield str(error) if str(receipt) in str(error) else f"{receipt} is damaged: {error}"
            continue
        if sha256_keys(table["key"].to_pylist()) != shard.keys_sha256:
            yield f"{receipt} does not have the keys of its entry"
        yield from _verify_shard(path, shard)


def _verify_pass_files(folder: Path) -> Iterator[str]:
    """Check the files of a pass in a store with an unreadable manifest."""
    try:
        manifest = read_pass_manifest(folder)
    except (ManifestError, FileError) as error:
        yield str(error)
    else:
        yield from _verify_files(folder, _pass_files(manifest))


def _pass_files(manifest: PassManifest) -> dict[str, str | None]:
    described: dict[str, str | None] = {MANIFEST_NAME: None, **manifest.files}
    entries = (entry for shard in manifest.shards for entry in shard.files)
    return described | {entry.path: entry.sha256 for entry in entries}


def _verify_artifact(folder: Path) -> Iterator[str]:
    if not (folder / MANIFEST_NAME).exists():
        yield f"{folder} has no manifest: the artifact is unfinished; delete it, and it is created again when needed"
        return
    try:
        files = check_files(read_checked(folder / MANIFEST_NAME).get("files"))
    except (ManifestError, EntryError, FileError) as error:
        yield str(error) if str(folder) in str(error) else f"{folder / MANIFEST_NAME}: {error}"
        return
    yield from _verify_files(folder, {MANIFEST_NAME: None, **files})


def _verify_index(store: Store) -> Iterator[str]:
    try:
        index = store.index
    except ManifestError as error:
        yield str(error)
        return
    keys = index["key"].to_pylist()
    if len(set(keys)) != len(keys):
        yield f"{store.path}: the index contains a key twice"
    for shard in store.manifest.shards:
        rows = index.slice(store.first_rows[shard.name], shard.records)
        if sha256_keys(rows["key"].to_pylist()) != shard.keys_sha256:
            yield f"shard {shard.name}: the keys in the index do not match the manifest"
        try:
            receipt, _ = read_receipt(receipt_path(store.path, shard.name), RECEIPT_SCHEMA)
        except ManifestError as error:
            yield str(error)
            continue
        if not receipt.equals(rows.select(RECEIPT_SCHEMA.names).cast(RECEIPT_SCHEMA)):
            yield f"shard {shard.name}: receipt and index differ"


def _verify_pass(store: Store, folder: Path, rows_too: bool) -> Iterator[str]:
    try:
        teacher = TeacherPass(store, folder)
    except (ManifestError, StoreMismatchError, FileError) as error:
        yield str(error)
        return
    manifest = teacher.manifest
    problems = list(_verify_files(folder, _pass_files(manifest)))
    yield from problems
    if problems or not rows_too:
        return
    try:
        teacher.fields.check_shared_files()
    except ManifestError as error:
        yield str(error)
        return
    by_name = {shard.name: shard for shard in manifest.shards}
    for shard in store.manifest.shards:
        entry = by_name.get(shard.name)
        if entry is None and manifest.selection is not None:
            continue
        try:
            keys = teacher.shard_keys(shard)
        except ManifestError as error:
            yield str(error)
            continue
        known = set(keys) <= set(store.shard_keys(shard))
        if (
            entry is None
            or not known
            or (entry.rows, entry.keys_sha256) != (len(keys), sha256_keys(keys))
        ):
            yield f"{teacher.name}: shard {shard.name} does not have the records of the image shard"
            continue
        try:
            values = teacher.read_shard(shard)
        except (ManifestError, ValueError, OSError) as error:
            yield f"{teacher.name}: shard {shard.name} cannot be read: {error}"
            continue
        yield from _verify_values(teacher, shard.name, keys, values)


def _verify_values(
    teacher: TeacherPass, shard: str, keys: list[str], values: Values
) -> Iterator[str]:
    for spec in teacher.manifest.fields:
        array = values[spec.name]
        expected = (len(keys), teacher.manifest.views["count"], *spec.shape)
        if array.shape != expected or array.dtype != spec.dtype:
            yield f"{teacher.name}: field {spec.name} of shard {shard} is {array.dtype} {array.shape}"
            continue
        good = _in_range(spec, array, teacher.num_classes).all(axis=tuple(range(1, array.ndim)))
        for row in np.flatnonzero(~good)[:3]:
            yield f"{teacher.name}: field {spec.name} of record {keys[row]} (shard {shard}) is out of range"


def _in_range(spec: FieldSpec, array: NDArray[Any], num_classes: int) -> NDArray[np.bool_]:
    good: NDArray[np.bool_] = np.isfinite(array)
    if spec.name == "explained_class":
        good = (array >= NO_CLASS) & (array < num_classes)
    elif spec.codec == "maxabs":
        good &= np.abs(decode_unit(array)) <= 1
    return good
