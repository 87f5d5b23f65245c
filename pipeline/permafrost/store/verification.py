"""Verification of a store: compare every byte with its manifests, and check the values of every row."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from permafrost.core.digests import sha256_keys
from permafrost.core.errors import FileError
from permafrost.core.json_entries import EntryError, from_dict
from permafrost.storage.files import file_at
from permafrost.storage.local_files import PARTIAL_SUFFIX
from permafrost.storage.lock import CLAIM_SUFFIX, LOCK_NAME
from permafrost.storage.rooted_paths import AnyPath, LinkError, RootedPath
from permafrost.storage.signed_files import DigestError, check_json
from permafrost.store.artifacts import ARTIFACT_SCHEMA, ARTIFACTS_FOLDER
from permafrost.store.commit import ORIGIN_NAME
from permafrost.store.commit_markers import (
    COMMITS_FOLDER,
    MARKER_SCHEMA,
    has_many_labels,
    marker_path,
    read_marker,
)
from permafrost.store.deaths import DEATHS_SUFFIX
from permafrost.store.entries import ManifestError, StoreMismatchError
from permafrost.store.facts import FACTS_NAME, MAX_FACTS_BYTES
from permafrost.store.fields import Values, in_range
from permafrost.store.index_writer import columns_of_marker, is_table
from permafrost.store.manifest import (
    MANIFEST_NAME,
    TEACHERS_FOLDER,
    PassManifest,
    check_files,
    fingerprint_store,
    read_checked,
    read_pass_manifest,
)
from permafrost.store.projections import open_projection
from permafrost.store.reader import Store, TeacherPass
from permafrost.store.shards import SHARDS_NAME, ShardEntry
from permafrost.store.tars import recovery_hint
from permafrost.store.thumbnails import THUMBNAILS_FOLDER


def verify_file(
    folder: RootedPath, name: str, digest: str, known_files: set[str], size: int | None = None
) -> Iterator[str]:
    """Compare a file with its digest and its size, and count it as known.

    Args:
        folder: Folder of the manifest that lists the file.
        name: Path of the file in that folder.
        digest: SHA-256 in the manifest.
        known_files: Paths of the known files, to which this one is added.
        size: Size in the manifest; None is not compared.

    Yields:
        The problem in one line, if there is one.
    """
    known_files.add(name)
    try:
        file_at(folder / name).refuse_damaged_copy(digest)
        if (actual_size := file_at(folder / name).size()) is None:
            yield f"{folder / name} is missing"
        elif size is not None and actual_size != size:
            yield f"{folder / name} has {actual_size} bytes, but its manifest lists {size}"
        elif (sha256 := file_at(folder / name).sha256()) != digest:
            yield f"{folder / name} has sha256 {sha256[:12]}, but its manifest lists {digest[:12]}"
    except FileError as error:
        yield str(error)


def unknown_files(
    folder: RootedPath,
    known_files: set[str],
    ignored: tuple[str, ...] = (),
    is_earlier: Callable[[str], bool] = lambda _: False,
) -> Iterator[str]:
    """Name the files that no manifest lists.

    Args:
        folder: Folder to search.
        known_files: Paths in that folder that manifests list.
        ignored: Folders that are not searched.
        is_earlier: Function that returns whether a name is that of a file for readers of an earlier state.

    Yields:
        One line per file.
    """
    for path in file_at(folder).iter_files(ignored):
        name = path.below(folder)
        if name in known_files or name in (LOCK_NAME, ORIGIN_NAME) or is_earlier(name):
            continue
        if name == FACTS_NAME:
            try:
                check_json(file_at(path).read(MAX_FACTS_BYTES))
            except (DigestError, FileError) as error:
                yield f"{path} is damaged: {error}; delete it, as it is not part of the store"
        elif name.endswith((PARTIAL_SUFFIX, DEATHS_SUFFIX, CLAIM_SUFFIX)):
            yield f"{path} was left by a process that was killed; delete it"
        elif (
            file_at(path).is_file() or not file_at(path).is_folder()
        ):  # no link to a folder, where links are allowed
            yield f"{path} is not in any manifest"


# ---- verification ----------------------------------------------------------------------------------


_SHARDS_STEM = SHARDS_NAME.partition(".")[0]
_KEY_BYTES = 16
"""Size of a key's digest. Two of 14 million keys have the same one with a probability of 1e-24."""


def verify_store(path: AnyPath) -> Iterator[str]:
    """Yield every problem of a store and its passes, as one line that names the file, the shard or the record.

    If a manifest is damaged, the files that it covers are compared with the commit markers, which have their own
    digests. Links that may not be there come first; if there are any, nothing is read.
    Memory grows by 16 bytes per record, for the digests that find a key twice, and by the paths of the files.
    """
    folder = RootedPath.of(path)
    links = [str(LinkError(link)) for link in file_at(folder).links()]
    with file_at(folder).listing():
        yield from links or _verify_contents(folder)


def _verify_contents(path: RootedPath) -> Iterator[str]:
    try:
        store = Store(path)
        for table in (store.shards, store.manifest.skipped):
            for _ in table:  # each row must be possible
                pass
    except (ManifestError, StoreMismatchError, FileError) as error:
        yield str(error)
        yield from _verify_markers(path)
        store = None
    sound = store is not None
    if store is not None:
        num_problems = 0
        for problem in _verify_own_files(store):
            num_problems += 1
            yield problem
        sound = num_problems == 0
        if sound:
            yield from _verify_index(store)
    unfinished = unfinished_passes(path)
    for folder in _folders(path / TEACHERS_FOLDER):
        if folder in unfinished:
            continue
        if not file_at(folder / MANIFEST_NAME).exists():
            yield f"{folder / MANIFEST_NAME} is missing; run permafrost precompute again, which writes it"
        elif store is not None:
            yield from _verify_pass(store, folder, rows_too=sound)
        else:
            yield from _verify_pass_files(folder)
    for folder in _folders(path / ARTIFACTS_FOLDER):
        yield from _verify_artifact(folder)


def unfinished_passes(store: RootedPath) -> list[RootedPath]:
    """Return the folders of passes that were begun and never committed. A committed one has a table of shards."""
    return [
        folder
        for folder in _folders(store / TEACHERS_FOLDER)
        if not file_at(folder / MANIFEST_NAME).exists()
        and not file_at(folder).paths(f"{_SHARDS_STEM}*")
    ]


def _folders(parent: RootedPath) -> list[RootedPath]:
    return [path for path in file_at(parent).paths() if file_at(path).is_folder()]


def _verify_own_files(store: Store) -> Iterator[str]:
    """Check the files of a store without its passes and artifacts."""
    manifest, known = store.manifest, {MANIFEST_NAME}
    for file in (manifest.shards.file, manifest.skipped.file, *manifest.index.values()):
        if file is not None:
            yield from verify_file(store.folder, file.path, file.sha256, known, file.bytes)
    for number, shard in enumerate(store.shards):
        yield from _verify_shard(store.folder, shard)
        if not shard.referenced:
            known.add(shard.path)
        marker = marker_path(store.folder, shard.name).below(store.folder)
        yield from verify_file(store.folder, marker, store.shards.marker_sha256(number), known)
    yield from unknown_files(
        store.folder,
        known,
        ignored=(TEACHERS_FOLDER, ARTIFACTS_FOLDER, THUMBNAILS_FOLDER),
        is_earlier=lambda name: store.num_generations > 1 and is_table(name),
    )


def _verify_shard(path: RootedPath, shard: ShardEntry) -> Iterator[str]:
    """Compare a shard's file with its entry. For a referenced tar the advice is never to delete it."""
    hint = f"; {recovery_hint(shard, '')}" if shard.referenced else ""
    file = shard.file(path)
    try:
        digest = file_at(file).sha256()
    except FileNotFoundError:
        yield f"{file} is missing{hint}"
    except FileError as error:
        yield f"{error}{hint}"
    else:
        if digest != shard.sha256:
            yield f"{file} has sha256 {digest[:12]}, but its manifest lists {shard.sha256[:12]}{hint}"


def _verify_markers(path: RootedPath) -> Iterator[str]:
    """Check the commit markers of a store with an unreadable manifest, and the shards against them."""
    for marker in file_at(path / COMMITS_FOLDER).paths("*.parquet"):
        try:
            table, metadata = read_marker(marker, MARKER_SCHEMA)
            shard = from_dict(ShardEntry, metadata["entry"])
        except (ManifestError, EntryError, KeyError, FileError) as error:
            yield str(error) if str(marker) in str(error) else f"{marker} is damaged: {error}"
            continue
        if sha256_keys(table["key"].to_pylist()) != shard.keys_sha256:
            yield f"{marker} does not have the keys of its entry"
        yield from _verify_shard(path, shard)


def _verify_pass_files(folder: RootedPath) -> Iterator[str]:
    """Check the files of a pass in a store with an unreadable manifest."""
    try:
        manifest = read_pass_manifest(folder)
    except (ManifestError, FileError) as error:
        yield str(error)
    else:
        yield from _verify_files_of_pass(folder, manifest)


def _check_projection(folder: RootedPath, manifest: PassManifest, field: str) -> list[str]:
    """Return what is wrong with the values of a projection, whose bytes are those of its manifest."""
    try:
        open_projection(folder, manifest, field)
    except (ManifestError, FileError) as error:
        return [str(error)]
    return []


def _verify_files_of_pass(folder: RootedPath, manifest: PassManifest) -> Iterator[str]:
    known = {MANIFEST_NAME}
    shards = manifest.shards
    assert shards.file is not None
    yield from verify_file(folder, shards.file.path, shards.file.sha256, known, shards.file.bytes)
    for name, digest in manifest.files.items():
        yield from verify_file(folder, name, digest, known)
    for field, projection in manifest.projections.items():
        file = projection.file
        problems = list(verify_file(folder, file.path, file.sha256, known, file.bytes))
        yield from problems or _check_projection(folder, manifest, field)
    try:
        for number, shard in enumerate(shards):
            for file in shard.files:
                yield from verify_file(folder, file.path, file.sha256, known, file.bytes)
            marker = marker_path(folder, shard.name).below(folder)
            yield from verify_file(folder, marker, shards.marker_sha256(number), known)
    except ManifestError as error:
        yield str(error)
        return
    yield from unknown_files(folder, known)


def _verify_artifact(folder: RootedPath) -> Iterator[str]:
    if not file_at(folder / MANIFEST_NAME).exists():
        yield f"{folder} has no manifest: the artifact is unfinished; delete it, and it is created again when needed"
        return
    try:
        manifest = read_checked(folder / MANIFEST_NAME, schema=ARTIFACT_SCHEMA)
        files = check_files(manifest.get("files"))
    except (ManifestError, EntryError, FileError) as error:
        yield str(error) if str(folder) in str(error) else f"{folder / MANIFEST_NAME}: {error}"
        return
    known = {MANIFEST_NAME}
    for name, digest in files.items():
        yield from verify_file(folder, name, digest, known)
    yield from unknown_files(folder, known)


def _verify_index(store: Store) -> Iterator[str]:
    """Compare the index with the commit markers, shard by shard, and the keys with each other."""
    index, manifest = store.index, store.manifest
    for number, part in enumerate(manifest.packed_parts()):
        shards = manifest.part(number, number + 1).shards
        if part.fingerprint != fingerprint_store(
            part.dataset, manifest.canonical, manifest.columns, shards.names_and_keys()
        ):
            yield f"{store.folder / MANIFEST_NAME}: its fingerprint is not that of its shards"
    if store.shards.records_of_splits() != manifest.records:
        yield f"{store.folder / MANIFEST_NAME}: its numbers of records are not those of its shards"
    digests = bytearray()
    many_labels = False
    for number, shard in enumerate(store.shards):
        try:
            index.require_possible(store.rows_of_shard(number))
            keys = index.shard_keys(number)
            marker, _ = read_marker(marker_path(store.folder, shard.name), MARKER_SCHEMA)
        except ManifestError as error:
            yield str(error)
            continue
        for key in keys:
            digests += hashlib.blake2b(key.encode(), digest_size=_KEY_BYTES).digest()
        many_labels = many_labels or has_many_labels(marker)
        columns = index.columns_of_shard(number)
        if not (
            set(marker["split"].to_pylist()) <= {shard.split}
            and marker["row"].to_pylist() == [*range(len(keys))]
            and all(
                values.tobytes() == columns[name].tobytes()
                for name, values in columns_of_marker(marker).items()
            )
        ):
            yield f"shard {shard.name}: commit marker and index differ"
    column = pa.FixedSizeBinaryArray.from_buffers(
        pa.binary(_KEY_BYTES), len(digests) // _KEY_BYTES, [None, pa.py_buffer(digests)]
    )
    if pc.count_distinct(column).as_py() != len(column):
        yield f"{store.path}: the index contains a key twice"
    if many_labels != manifest.multi_label:
        yield f"{store.folder / MANIFEST_NAME}: multi_label is {manifest.multi_label}"


def _verify_pass(store: Store, folder: RootedPath, rows_too: bool) -> Iterator[str]:
    try:
        teacher = store.part_of_pass(folder)
    except (ManifestError, StoreMismatchError, FileError) as error:
        yield str(error)
        return
    manifest = teacher.manifest
    problems = 0
    for problem in _verify_files_of_pass(folder, manifest):
        problems += 1
        yield problem
    if problems or not rows_too:
        return
    try:
        teacher.fields.check_shared_files()
    except ManifestError as error:
        yield str(error)
        return
    index = teacher.store.index
    for number, shard in enumerate(teacher.store.shards):
        position = teacher.shards.number_of(shard.name)
        if position < 0 and manifest.selection is not None:
            continue
        try:
            keys = teacher.shard_keys(shard)
            store_keys = index.shard_keys(number)
        except ManifestError as error:
            yield str(error)
            continue
        entry = None if position < 0 else teacher.shards[position]
        if (
            entry is None
            or not set(keys) <= set(store_keys)
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
        yield from (
            f"{teacher.name}: field {spec.name} of record {keys[row]} (shard {shard}) is out of range"
            for row in np.flatnonzero(~in_range(spec, array, teacher.num_classes))[:3]
        )
