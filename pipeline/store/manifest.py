"""The JSON that makes a store, or a teacher pass in it, valid; written last.

`self_sha256` covers the manifest's own text without that line, and the manifest covers every other
file of its folder, so that a flipped byte anywhere is found.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, field, fields
from typing import TYPE_CHECKING, Any, TypeVar

from pipeline.errors import UserError
from pipeline.records import FieldSpec
from pipeline.store.files import sha256_json, write_atomically

if TYPE_CHECKING:
    from pathlib import Path

    from _typeshed import DataclassInstance

SCHEMA_VERSION = 1
_LEFT_OUT_WHERE_NONE = ("hierarchy", "columns")
"""Entries that are younger than the first manifests, which stay as they were."""
MANIFEST_NAME = "manifest.json"
REPAIR = "to write it again, delete it and the manifest.json beside it and run stages.precompute"
_SELF_LINE = ' "self_sha256": "'


class ManifestError(UserError, ValueError):
    """A store or a part of it that is damaged, incomplete or of another version."""


class StoreMismatchError(UserError, ValueError):
    """A store that is sound but not the one the config describes."""


@dataclass(frozen=True, kw_only=True)
class FileEntry:
    """A file of the manifest's folder."""

    path: str
    """Relative to the manifest's folder."""
    bytes: int
    sha256: str


@dataclass(frozen=True, kw_only=True)
class ShardEntry:
    """One image shard."""

    name: str
    split: str
    records: int
    path: str
    bytes: int
    sha256: str
    keys_sha256: str
    referenced: bool = False


@dataclass(frozen=True, kw_only=True)
class CanonicalFrame:
    """The one size in which every teacher and every student sees the inputs."""

    height: int
    width: int
    format: str = "original"
    """original (the files' own bytes, resized when read), jpeg95 or raw (the frame itself)."""


@dataclass(frozen=True, kw_only=True)
class DatasetIdentity:
    """Which inputs these are: the fingerprint covers the source's options and every listed record."""

    name: str
    fingerprint: str


@dataclass(frozen=True, kw_only=True)
class StoreManifest:
    """<store>/manifest.json."""

    dataset: DatasetIdentity
    classes: tuple[str, ...]
    canonical: CanonicalFrame | None
    """None of a table."""
    shard_size: int
    shards: tuple[ShardEntry, ...]
    index: FileEntry
    files: dict[str, str]
    """Every other file but the shards: path -> sha256."""
    skipped: tuple[dict[str, str], ...] = ()
    kind: str = "image"
    """image or table."""
    columns: tuple[str, ...] | None = None
    """Names of a table's columns; left out where records are images."""
    multi_label: bool = False
    schema: int = SCHEMA_VERSION

    @property
    def fingerprint(self) -> str:
        """Of the records, their frame (or columns) and their places: what a pass and a student's order depend on."""
        form: dict[str, Any] = {"columns": self.columns}
        if self.canonical is not None:
            form = {"canonical": asdict(self.canonical)}
        plan = [[shard.name, shard.keys_sha256] for shard in self.shards]
        return sha256_json({"dataset": self.dataset.fingerprint, "plan": plan, **form})


@dataclass(frozen=True, kw_only=True)
class PassShard:
    """One shard of a teacher pass: the rows of one image shard, field by field."""

    name: str
    rows: int
    keys_sha256: str
    files: tuple[FileEntry, ...]


@dataclass(frozen=True, kw_only=True)
class PassManifest:
    """<store>/teachers/<name>-<fp8>/manifest.json."""

    fingerprint: str
    dataset_fingerprint: str
    teacher: dict[str, Any]
    views: dict[str, Any]
    explainer: dict[str, Any]
    fields: tuple[FieldSpec, ...]
    backend: str
    shards: tuple[PassShard, ...]
    files: dict[str, str]
    fidelity: dict[str, float] = field(default_factory=dict)
    """Of each lossy field: the lowest cosine between a record's values and their stored form."""
    selection: dict[str, Any] | None = None
    partition_sha256: str | None = None
    hierarchy: list[dict[str, Any]] | None = None
    """Of ked_z: each level's coarsening and sha256 (superfeatures/hierarchy.py); left out where there is none."""
    made_with: dict[str, str] = field(default_factory=dict)
    """Library versions and device, for people; outside the fingerprint."""
    schema: int = SCHEMA_VERSION


def write_manifest(folder: Path, manifest: DataclassInstance) -> None:
    """Publish: after this the folder's contents exist for readers."""
    values = asdict(manifest)
    for name in _LEFT_OUT_WHERE_NONE:
        if values.get(name, ...) is None:
            del values[name]
    text = json.dumps(values, indent=1, sort_keys=True, allow_nan=False) + "\n"
    opening, rest = text.split("\n", 1)
    digest = hashlib.sha256(text.encode()).hexdigest()
    write_atomically(folder / MANIFEST_NAME, f'{opening}\n{_SELF_LINE}{digest}",\n{rest}'.encode())


def read_store_manifest(folder: Path) -> StoreManifest:
    """The store's manifest, checked against its own digest."""
    values = {"columns": None} | read_checked(folder / MANIFEST_NAME)
    canonical, columns = values["canonical"], values["columns"]
    return from_dict(
        StoreManifest,
        values
        | {
            "dataset": from_dict(DatasetIdentity, values["dataset"]),
            "canonical": None if canonical is None else from_dict(CanonicalFrame, canonical),
            "columns": None if columns is None else tuple(columns),
            "classes": tuple(values["classes"]),
            "shards": tuple(from_dict(ShardEntry, shard) for shard in values["shards"]),
            "index": from_dict(FileEntry, values["index"]),
            "skipped": tuple(values["skipped"]),
        },
    )


def read_pass_manifest(folder: Path) -> PassManifest:
    """A teacher pass's manifest, checked against its own digest."""
    values = read_checked(folder / MANIFEST_NAME)
    specs = (
        from_dict(FieldSpec, spec | {"shape": tuple(spec["shape"])}) for spec in values["fields"]
    )
    shards = (
        from_dict(
            PassShard, shard | {"files": tuple(from_dict(FileEntry, f) for f in shard["files"])}
        )
        for shard in values["shards"]
    )
    values = {"hierarchy": None} | values
    return from_dict(PassManifest, values | {"fields": tuple(specs), "shards": tuple(shards)})


def read_checked(path: Path, made_by: str = "stages.precompute") -> dict[str, Any]:
    """A manifest's entries, checked against its own digest and of this version's schema."""
    if not path.is_file():
        raise ManifestError(f"{path} does not exist; run {made_by} to make or to finish it")
    raw = path.read_bytes()
    lines = raw.split(b"\n")
    claims = [line for line in lines if line.startswith(_SELF_LINE.encode())]
    body = b"\n".join(line for line in lines if line not in claims)
    claimed = claims[0][len(_SELF_LINE) : -2].decode(errors="replace") if len(claims) == 1 else ""
    found = hashlib.sha256(body).hexdigest()
    if claimed != found or not claims[0].endswith(b'",'):
        raise ManifestError(
            f"{path} is damaged: its text has sha256 {found[:12]}, it claims {claimed[:12]!r}"
        )
    values: dict[str, Any] = json.loads(body)
    if values["schema"] != SCHEMA_VERSION:
        raise ManifestError(
            f"{path} has schema {values['schema']}, this version reads schema {SCHEMA_VERSION}; "
            "use the permafrost version that wrote it"
        )
    return values


T = TypeVar("T")


def from_dict(cls: type[T], values: dict[str, Any]) -> T:
    """A manifest's dataclass of its entries, none too many and none too few."""
    known = {spec.name for spec in fields(cls)}  # type: ignore[arg-type]
    if set(values) != known:
        raise ManifestError(
            f"{cls.__name__} in a manifest has entries {sorted(set(values) ^ known)} too many or too few"
        )
    return cls(**values)
