"""Publication of a pass: its missing shards, the shards themselves, and the manifest that makes it valid."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from permafrost.core.digests import sha256_keys
from permafrost.core.errors import UserError, require
from permafrost.core.json_entries import EntryError, from_dict
from permafrost.core.records import TOP_CLASS, TOP_LOGITS, FieldSpec
from permafrost.storage.files import file_at
from permafrost.storage.rooted_paths import RootedPath
from permafrost.store.arrow_files import write_rows
from permafrost.store.commit import has_size, read_metadata, remove_leftovers
from permafrost.store.commit_markers import (
    PASS_MARKER_SCHEMA,
    marker_path,
    read_marker,
    write_marker,
)
from permafrost.store.entries import REWRITE, FileEntry, ManifestError, StoreMismatchError
from permafrost.store.fields import PassFields, Values
from permafrost.store.index_writer import remove_other_tables
from permafrost.store.manifest import (
    MANIFEST_NAME,
    Agreement,
    MovedFeatures,
    PassManifest,
    Passport,
    read_pass_manifest,
    write_manifest,
)
from permafrost.store.projections import describe_projections
from permafrost.store.shards import (
    SHARDS_NAME,
    PassShard,
    PassShardTable,
    ShardEntry,
    shard_row,
)

_MIN_THAT_DIFFER = 8
"""Minimum number of records for equal logits to be an error; fewer may be copies of one picture."""


CONSTANT_LOGITS = (
    "the teacher's logits are the same for every record, as far as they are stored: check teacher.weights, "
    "teacher.mean and teacher.std, and set annotate.logits_dtype=float32"
)


class ConstantLogitsError(UserError, ValueError):
    """Teacher whose stored logits are the same for every record."""


def missing_pass_shards(
    folder: RootedPath, shards: Sequence[ShardEntry], origin: str = ""
) -> list[ShardEntry]:
    """Return the store's shards that this pass has no commit marker for; for a committed pass those that lost a file.

    The folder is named by a fingerprint that covers the store's shards, so a commit marker in it belongs to this pass.
    A commit marker counts if the files that it lists exist.

    Args:
        folder: Folder of the pass.
        shards: Shards of the store that the pass covers.
        origin: Origin of the values, as in `write_pass_shard`.

    Raises:
        ManifestError: If the manifest of a committed pass is damaged.
        StoreMismatchError: If an unfinished pass has shards of another origin.
    """
    if file_at(folder / MANIFEST_NAME).exists():
        annotated = read_pass_manifest(folder).shards
        if annotated.names() == [shard.name for shard in shards]:
            pairs = zip(shards, annotated, strict=True)
            with file_at(folder).listing():
                return [
                    shard
                    for shard, entry in pairs
                    if not file_at(marker_path(folder, shard.name)).is_file()
                    or not all(has_size(folder / each.path, each.bytes) for each in entry.files)
                ]
        return list(shards)
    with file_at(folder).listing():
        names = [shard.name for shard in shards]
        done = file_at(folder).read_each(partial(is_annotated, folder, origin), names)
        return [shard for shard, is_done in zip(shards, done, strict=True) if not is_done]


def is_annotated(folder: RootedPath, origin: str, shard: str) -> bool:
    """Return whether a shard has a commit marker and the files that it lists.

    Args:
        folder: Folder of the pass.
        origin: Origin of the values, as in `write_pass_shard`.
        shard: Name of the shard.

    Raises:
        StoreMismatchError: If the values come from elsewhere.
    """
    path = marker_path(folder, shard)
    metadata = read_metadata(path, PASS_MARKER_SCHEMA)
    if metadata is None or metadata.get("name") != shard:
        return False
    if (begun_by := metadata.get("origin", "")) != origin:
        raise StoreMismatchError(
            f"{folder} is not finished, and its shards come from {begun_by or 'a teacher that ran here'} and not from "
            f"{origin or 'this command'}; finish it with the command that began it or delete it"
        )
    return all(has_size(folder / entry.path, entry.bytes) for entry in _files_of(path, metadata))


def _read_marker(folder: RootedPath, shard: ShardEntry) -> tuple[pa.Table, dict[str, Any], str]:
    """Read a shard's commit marker: its rows, its metadata, and the SHA-256 of its file."""
    path = marker_path(folder, shard.name)
    return *read_marker(path, PASS_MARKER_SCHEMA), file_at(path).sha256()


def _files_of(marker: RootedPath, metadata: dict[str, Any]) -> tuple[FileEntry, ...]:
    """Return the files that a commit marker lists. Raises ManifestError."""
    try:
        return tuple(from_dict(FileEntry, file) for file in metadata["files"])
    except (EntryError, KeyError, TypeError) as error:
        raise ManifestError(
            f"{marker} is not a commit marker of this version ({error}); {REWRITE}"
        ) from error


def write_pass_shard(
    fields: PassFields,
    position: int,
    name: str,
    keys: Sequence[str],
    values: Values,
    fidelity: Mapping[str, float],
    fingerprint: str,
    origin: str = "",
    device: str = "",
) -> None:
    """Write one whole shard and its commit marker, which commits it.

    A shard with a commit marker is left as it is: another process has finished it after this one was taken for lost,
    perhaps on a GPU of another model, which has other last bits.

    Args:
        fields: Fields of the pass.
        position: Position of the shard among those of the pass.
        name: Name of the shard.
        keys: Keys of the records, in the order of the rows.
        values: Array of each field, [records, V, *shape].
        fidelity: Lowest cosine between a record's values and their stored form, for each lossy field.
        fingerprint: Fingerprint of the pass.
        origin: What the values were taken from if a pass of this fingerprint may also be computed here; empty for
            values that were computed.
        device: Name of the hardware that has computed the values; empty for those of others.
    """
    if is_annotated(fields.folder, origin, name):
        return
    written = fields.write_shard(position, name, keys, values)
    first = position * fields.rows_per_shard
    rows = {
        "key": keys,
        "row": range(len(keys)),
        "array_row": range(first, first + len(keys)),
        "chunk_crc32c": written.chunk_crc32c,
    }
    write_marker(
        marker_path(fields.folder, name),
        pa.Table.from_pydict(rows, schema=PASS_MARKER_SCHEMA),
        {
            "name": name,
            "rows": len(keys),
            "keys_sha256": sha256_keys(list(keys)),
            "files": [asdict(entry) for entry in written.files],
            "fidelity": dict(fidelity),
            "fingerprint": fingerprint,
            "constant_logits": _constant_logits(values),
            **({"origin": origin} if origin else {}),
            **({"device": device} if device else {}),
        },
    )


def _constant_logits(values: Mapping[str, NDArray[np.generic]]) -> str | None:
    """Compute the SHA-256 of the logits if all records of a shard have the same.

    Args:
        values: Values [n, V, ...] of the pass's fields.

    Returns:
        The digest, None if the logits differ or there are none.
    """
    names = ("logits",) if "logits" in values else (TOP_LOGITS, TOP_CLASS)
    stored = [values[name] for name in names if name in values]
    if not stored or not len(stored[0]) or any((array != array[:1, :1]).any() for array in stored):
        return None
    return hashlib.sha256(b"".join(array[0, 0].tobytes() for array in stored)).hexdigest()


def commit_pass(
    folder: RootedPath,
    shards: Sequence[ShardEntry],
    description: dict[str, Any],
    fingerprint: str,
    specs: Sequence[FieldSpec],
    shared_files: dict[str, str],
    made_with: dict[str, str],
    added: dict[str, Any],
    agreement: Agreement | None = None,
    moved_features: MovedFeatures | None = None,
    passport: Passport | None = None,
    fidelity: Mapping[str, float] | None = None,
) -> None:
    """Combine the commit markers and write the pass's manifest.

    Args:
        folder: Folder of the pass, whose shards are all annotated.
        shards: Shards of the store that the pass covers, in the order of its arrays.
        description: Entries that the fingerprint covers, by name; others than fields of the manifest are added.
        fingerprint: Fingerprint of the pass.
        specs: Stored fields.
        shared_files: SHA-256 by path of the files that all shards share.
        made_with: Entry of the manifest, like the next three; the devices of the commit markers are added.
        added: Entries of outputs.
        agreement: Agreement with float32; None if the pass was computed in float32.
        moved_features: Error of warped features; None if it was not measured.
        passport: Agreement with the teacher that targets of others are said to be of.
        fidelity: Lowest cosine of each lossy field of a pass whose values are stored already; None takes those of the
            commit markers.

    Raises:
        ConstantLogitsError: If the teacher produces the same logits for every record.
        ManifestError: If a commit marker is missing or damaged, or has other records than the store.
    """
    lowest = dict[str, float]()
    same_logits = set[str | None]()
    devices = Counter[str]()
    num_rows = 0
    covers_all = description["selection"] is None
    with write_rows(folder / SHARDS_NAME, PassShardTable.schema) as table:
        markers = file_at(folder).read_each(partial(_read_marker, folder), shards)
        for shard, (rows, metadata, digest) in zip(shards, markers, strict=True):
            path = marker_path(folder, shard.name)
            keys = sha256_keys(rows["key"].to_pylist())
            require(
                keys == metadata["keys_sha256"] and (not covers_all or keys == shard.keys_sha256),
                f"{path} does not have the records of shard {shard.name}; {REWRITE}",
                ManifestError,
            )
            devices[metadata.get("device", "")] += 1
            if rows.num_rows:
                same_logits.add(metadata["constant_logits"])
            for name, cosine in metadata["fidelity"].items():
                lowest[name] = min(cosine, lowest.get(name, 1.0))
            entry = PassShard(
                name=metadata["name"],
                rows=metadata["rows"],
                keys_sha256=metadata["keys_sha256"],
                files=_files_of(path, metadata),
            )
            num_rows += entry.rows
            table.append(**shard_row(entry, digest))
        require(
            len(same_logits) != 1 or None in same_logits or num_rows < _MIN_THAT_DIFFER,
            CONSTANT_LOGITS,
            ConstantLogitsError,
        )
    remove_leftovers(folder)
    known = {spec.name for spec in fields(PassManifest)}
    manifest = PassManifest(
        **{name: value for name, value in description.items() if name in known},
        fingerprint=fingerprint,
        fields=tuple(specs),
        shards=PassShardTable(folder, table.file),
        files=dict(shared_files),
        fidelity=lowest if fidelity is None else dict(fidelity),
        made_with=made_with | _describe_devices(devices),
        added=added | {name: value for name, value in description.items() if name not in known},
        agreement=agreement,
        moved_features=moved_features,
        passport=passport,
        projections=describe_projections(folder),
    )
    write_manifest(folder, manifest)
    remove_other_tables(folder, manifest)


def _describe_devices(shards: Counter[str]) -> dict[str, str]:
    """Describe what has computed how many shards, in one word if all were computed by one kind of device."""
    named = {name or "unknown": count for name, count in sorted(shards.items())}
    if not any(shards):
        return {}
    parts = [f"{name} ({count:,} shards)" for name, count in named.items()]
    return {"device": ", ".join(parts if len(named) > 1 else named)}
