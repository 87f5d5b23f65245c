"""Is every byte of a store what its manifests say, and does every row make sense?"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from pipeline.records import NO_CLASS
from pipeline.store.artefact import ARTEFACTS_FOLDER
from pipeline.store.codecs import decode_unit
from pipeline.store.files import PARTIAL_SUFFIX, sha256_file, sha256_keys
from pipeline.store.index import INDEX_SCHEMA, read_table, receipt_path
from pipeline.store.journal import JOURNAL_SUFFIX
from pipeline.store.lock import LOCK_NAME
from pipeline.store.manifest import (
    MANIFEST_NAME,
    ManifestError,
    StoreMismatchError,
    read_checked,
)
from pipeline.store.reader import TEACHERS_FOLDER, Store, TeacherPass

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from numpy.typing import NDArray

    from pipeline.records import FieldSpec
    from pipeline.store.columns import Values


def verify_store(path: Path) -> Iterator[str]:
    """Every problem of a store and its passes, as one line that names the file, the shard or the record."""
    try:
        store = Store(path)
    except (ManifestError, StoreMismatchError) as error:
        yield str(error)
        return
    manifest = store.manifest
    described = {MANIFEST_NAME: None, manifest.index.path: manifest.index.sha256, **manifest.files}
    described |= {shard.path: shard.sha256 for shard in manifest.shards}
    problems = list(_verify_files(path, described, ignored=(TEACHERS_FOLDER, ARTEFACTS_FOLDER)))
    yield from problems
    if not problems:
        yield from _verify_index(store)
    for folder in sorted((path / TEACHERS_FOLDER).glob("*/")):
        if not (folder / MANIFEST_NAME).exists():
            yield f"{folder} has no manifest: the pass is unfinished; run its stages.precompute again"
        else:
            yield from _verify_pass(store, folder, rows_too=not problems)
    for folder in sorted((path / ARTEFACTS_FOLDER).glob("*/")):
        yield from _verify_artefact(folder)


def _verify_files(
    folder: Path, described: dict[str, str | None], ignored: tuple[str, ...] = ()
) -> Iterator[str]:
    """The folder holds the described files, with their bytes, and no others; a digest of None is not checked."""
    for name, digest in described.items():
        if not (folder / name).is_file():
            yield f"{folder / name} is missing"
        elif digest is not None and (found := sha256_file(folder / name)) != digest:
            yield f"{folder / name} has sha256 {found[:12]}, its manifest says {digest[:12]}"
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        name = path.relative_to(folder).as_posix()
        if name.partition("/")[0] in ignored:
            continue
        if name in (*described, LOCK_NAME) or name.endswith((PARTIAL_SUFFIX, JOURNAL_SUFFIX)):
            continue
        yield f"{path} is in no manifest"


def _verify_artefact(folder: Path) -> Iterator[str]:
    if not (folder / MANIFEST_NAME).exists():
        yield f"{folder} has no manifest: the artefact is unfinished; delete it, whoever needs it makes it again"
        return
    try:
        files = read_checked(folder / MANIFEST_NAME)["files"]
    except ManifestError as error:
        yield str(error)
        return
    yield from _verify_files(folder, {MANIFEST_NAME: None, **files})


def _verify_index(store: Store) -> Iterator[str]:
    index = store.index
    if index.num_rows != sum(shard.records for shard in store.manifest.shards):
        yield f"{store.path}: the index has {index.num_rows} rows, the shards another number of records"
        return
    keys = index["key"].to_pylist()
    if len(set(keys)) != len(keys):
        yield f"{store.path}: the index names a key twice"
    for shard in store.manifest.shards:
        rows = index.slice(store.first_rows[shard.name], shard.records)
        if sha256_keys(rows["key"].to_pylist()) != shard.keys_sha256:
            yield f"shard {shard.name}: the index's keys are not the manifest's"
        receipt, _ = read_table(receipt_path(store.path, shard.name), INDEX_SCHEMA)
        if not receipt.equals(rows.combine_chunks()):
            yield f"shard {shard.name}: receipt and index differ"
    labels = index["label"].to_numpy()
    for row in np.flatnonzero((labels < -1) | (labels >= len(store.manifest.classes)))[:10]:
        yield f"record {keys[row]}: label {labels[row]} is outside the {len(store.manifest.classes)} classes"
    classes = range(len(store.manifest.classes))
    for key, many in zip(keys, index["labels"].to_pylist(), strict=True):
        if not all(label in classes for label in many):
            yield f"record {key}: labels {many} are not all of the {len(classes)} classes"


def _verify_pass(store: Store, folder: Path, rows_too: bool) -> Iterator[str]:
    try:
        teacher = TeacherPass(store, folder)
    except (ManifestError, StoreMismatchError) as error:
        yield str(error)
        return
    manifest = teacher.manifest
    described: dict[str, str | None] = {MANIFEST_NAME: None, **manifest.files}
    described |= {entry.path: entry.sha256 for shard in manifest.shards for entry in shard.files}
    problems = list(_verify_files(folder, described))
    yield from problems
    if problems or not rows_too:
        return
    by_name = {shard.name: shard for shard in manifest.shards}
    for shard in store.manifest.shards:
        entry = by_name.get(shard.name)
        if entry is None and manifest.selection is not None:
            continue
        keys = teacher.shard_keys(shard)
        known = set(keys) <= set(store.shard_keys(shard))
        if (
            entry is None
            or not known
            or (entry.rows, entry.keys_sha256) != (len(keys), sha256_keys(keys))
        ):
            yield f"{teacher.name}: shard {shard.name} does not hold the image shard's records"
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
