"""Manifest of a store or of a teacher pass: the JSON that makes it valid, written last.

`self_sha256` covers the manifest's own text without that line, and the manifest covers every other file of its
folder, so a flipped byte anywhere is detected. A digest does not authenticate the author of a manifest. Its entries
are therefore checked for type and range, and its paths may not leave the folder.
"""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import asdict, dataclass, field
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from pipeline.core.errors import UserError
from pipeline.core.files import read_regular, sha256_json, write_atomically
from pipeline.core.records import FieldSpec  # noqa: TC001, read at run time by from_dict
from pipeline.store.entries import EntryError, from_dict
from pipeline.store.pixels import MAX_PIXELS

if TYPE_CHECKING:
    from pathlib import Path

    from _typeshed import DataclassInstance

SCHEMA_VERSION = 1
MANIFEST_NAME = "manifest.json"
REPAIR = "run permafrost precompute again, which writes missing files"
"""Advice for a missing file of the store."""
REWRITE = "delete it and run permafrost precompute again, which writes missing files"
"""Advice for a damaged file of the store."""
CANONICAL_VIEW = "canonical"
"""Sampler of a pass over each record's whole frame, once."""
SAMPLERS = (CANONICAL_VIEW, "random", "rotations")
_SELF_LINE = ' "self_sha256": "'
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*")
_DIGEST = re.compile(r"[0-9a-f]{64}")
M = TypeVar("M")


class ManifestError(UserError, ValueError):
    """Store, or a part of it, that is damaged, incomplete or of another version."""


class StoreMismatchError(UserError, ValueError):
    """Store that is intact but does not match the config."""


def _require(condition: bool, error_message: str) -> None:
    if not condition:
        raise EntryError(error_message)


def _require_inside(path: str) -> None:
    """Raise EntryError unless a path stays in the folder that it is relative to."""
    pure = PurePosixPath(path)
    _require(
        bool(path) and not pure.is_absolute() and ".." not in pure.parts and "\0" not in path,
        f"the path {path!r} leaves the folder",
    )


def _require_digest(digest: str) -> None:
    _require(_DIGEST.fullmatch(digest) is not None, f"{digest[:80]!r} is not a SHA-256")


@dataclass(frozen=True, kw_only=True)
class FileEntry:
    """File of the manifest's folder."""

    path: str
    """Path relative to the manifest's folder."""
    bytes: int
    sha256: str
    crc32c: int = 0
    """CRC-32C (Castagnoli), checked by readers of the whole file. It covers all of a tar. For a Zarr chunk it
    excludes the checksum at its end (with it, every sound chunk has the same CRC-32C)."""

    def __post_init__(self) -> None:
        _require_inside(self.path)
        _require_digest(self.sha256)
        _require(self.bytes >= 0, f"{self.path} has {self.bytes} bytes")


@dataclass(frozen=True, kw_only=True)
class ShardEntry:
    """Image shard."""

    name: str
    split: str
    records: int
    path: str
    """Path relative to the store, or absolute for a referenced tar."""
    bytes: int
    sha256: str
    keys_sha256: str
    referenced: bool = False
    """True if the file is not the store's own but an external tar, indexed in place."""

    def __post_init__(self) -> None:
        _require(_NAME.fullmatch(self.name) is not None, f"{self.name[:80]!r} is not a shard name")
        _require(min(self.records, self.bytes) >= 0, f"shard {self.name} has a negative size")
        _require_digest(self.sha256)
        _require_digest(self.keys_sha256)
        if self.referenced:
            absolute = PurePosixPath(self.path).is_absolute() and "\0" not in self.path
            _require(absolute, f"the referenced tar {self.path!r} is not an absolute path")
        else:
            _require_inside(self.path)


@dataclass(frozen=True, kw_only=True)
class CanonicalFrame:
    """Single size in which teachers and students receive images."""

    height: int
    width: int
    format: Literal["original", "jpeg95", "raw"] = "original"
    """Image format: original (the files' own bytes, resized when read), jpeg95 or raw (the frame itself)."""

    def __post_init__(self) -> None:
        fits = min(self.height, self.width) >= 1 and self.height * self.width <= MAX_PIXELS
        _require(fits, f"a frame of {self.height}x{self.width} pixels is not possible")


@dataclass(frozen=True, kw_only=True)
class DatasetIdentity:
    """Identity of the inputs; the fingerprint covers the source's options and every listed record."""

    name: str
    fingerprint: str


@dataclass(frozen=True, kw_only=True)
class StoreManifest:
    """Content of <store>/manifest.json."""

    dataset: DatasetIdentity
    classes: tuple[str, ...]
    canonical: CanonicalFrame | None
    """Canonical frame; None for a table."""
    rows_per_shard: int
    """Rows of each shard in a teacher's arrays, including unused ones."""
    shards: tuple[ShardEntry, ...]
    index: FileEntry
    files: dict[str, str]
    """SHA-256 by path of every other file except the shards."""
    skipped: tuple[dict[str, str], ...] = ()
    kind: Literal["image", "table"] = "image"
    columns: tuple[str, ...] | None = None
    """Names of a table's columns; None if records are images."""
    multi_label: bool = False
    schema: int = SCHEMA_VERSION

    def __post_init__(self) -> None:
        check_files(self.files)
        _require(
            (self.canonical is None) == (self.columns is not None), "kind and canonical disagree"
        )
        most = max((shard.records for shard in self.shards), default=0)
        _require(
            self.rows_per_shard >= max(1, most),
            f"rows_per_shard={self.rows_per_shard} is too small",
        )
        names = [shard.name for shard in self.shards]
        _require(len(set(names)) == len(names), "two shards have the same name")

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the records, their frame (or columns) and their shards, used by passes and the sampler."""
        form: dict[str, Any] = {"columns": self.columns}
        if self.canonical is not None:
            form = {"canonical": asdict(self.canonical)}
        plan = [[shard.name, shard.keys_sha256] for shard in self.shards]
        return sha256_json({"dataset": self.dataset.fingerprint, "plan": plan, **form})


@dataclass(frozen=True, kw_only=True)
class PassShard:
    """Shard of a teacher pass: the rows of one image shard, field by field."""

    name: str
    rows: int
    keys_sha256: str
    files: tuple[FileEntry, ...]

    def __post_init__(self) -> None:
        _require(_NAME.fullmatch(self.name) is not None, f"{self.name[:80]!r} is not a shard name")
        _require(self.rows >= 0, f"shard {self.name} has {self.rows} rows")
        _require_digest(self.keys_sha256)


@dataclass(frozen=True, kw_only=True)
class PassManifest:
    """Content of <store>/teachers/<name>-<fp8>/manifest.json."""

    fingerprint: str
    dataset_fingerprint: str
    store_fingerprint: str
    """Fingerprint of the store (StoreManifest.fingerprint) at the time of the pass."""
    teacher: dict[str, Any]
    views: dict[str, Any]
    explainer: dict[str, Any]
    fields: tuple[FieldSpec, ...]
    backend: Literal["zarr", "webdataset"]
    shards: tuple[PassShard, ...]
    files: dict[str, str]
    fidelity: dict[str, float] = field(default_factory=dict)
    """Lowest cosine between a record's values and their stored form, for each lossy field."""
    selection: dict[str, Any] | None = None
    partition_sha256: str | None = None
    hierarchy: list[dict[str, Any]] | None = None
    """Coarsening and sha256 of each level of superfeature_logits (models/additive/hierarchy.py); None without
    this field."""
    made_with: dict[str, str] = field(default_factory=dict)
    """Versions, device and name of the weights, for information only; not covered by the fingerprint. It has no time,
    as a pass depends on its inputs alone."""
    schema: int = SCHEMA_VERSION

    def __post_init__(self) -> None:
        check_files(self.files)
        names = [spec.name for spec in self.fields]
        _require(len(set(names)) == len(names), "two fields have the same name")
        for spec in self.fields:
            _require(
                _NAME.fullmatch(spec.name) is not None, f"{spec.name[:80]!r} is not a field name"
            )
            _require(min(spec.shape, default=1) >= 0, f"field {spec.name} has shape {spec.shape}")
        for section, name, kind in (
            (self.views, "count", int),
            (self.views, "sampler", str),
            (self.teacher, "classes", int),
        ):
            _require(type(section.get(name)) is kind, f"{name} is {section.get(name)!r}")
        count, sampler = self.views["count"], self.views["sampler"]
        _require(count >= 1, f"views.count is {count}")
        _require(sampler in SAMPLERS, f"views.sampler is {sampler[:80]!r}")
        _require(
            sampler != CANONICAL_VIEW or count == 1, f"{count} canonical views are not possible"
        )
        _require(self.teacher["classes"] >= 1, f"teacher.classes is {self.teacher['classes']}")
        shapes = {spec.name: spec.shape for spec in self.fields}
        _require(
            shapes.get("logits") == (self.teacher["classes"],),
            f"logits have shape {shapes.get('logits')} for {self.teacher['classes']} classes",
        )
        explainer = self.explainer.get("kind")
        _require(
            explainer is None or isinstance(explainer, str), f"explainer.kind is {explainer!r}"
        )


def check_files(files: Any) -> dict[str, str]:
    """Return a manifest's `files`; raise EntryError unless they map paths inside the folder to digests."""
    _require(isinstance(files, dict), f"files is a {type(files).__name__}")
    for path, digest in files.items():
        _require_inside(path)
        _require(isinstance(digest, str), f"{path} has digest {digest!r}")
        _require_digest(digest)
    return dict(files)


def write_manifest(folder: Path, manifest: DataclassInstance) -> None:
    """Write the manifest, which makes the folder's contents valid for readers."""
    values = asdict(manifest)
    text = json.dumps(values, indent=1, sort_keys=True, allow_nan=False) + "\n"
    opening, rest = text.split("\n", 1)
    digest = hashlib.sha256(text.encode()).hexdigest()
    write_atomically(folder / MANIFEST_NAME, f'{opening}\n{_SELF_LINE}{digest}",\n{rest}'.encode())


def read_store_manifest(folder: Path) -> StoreManifest:
    """Read a store's manifest, checked against its own digest."""
    return read_manifest(StoreManifest, folder)


def read_pass_manifest(folder: Path) -> PassManifest:
    """Read a teacher pass's manifest, checked against its own digest."""
    return read_manifest(PassManifest, folder)


def read_manifest(cls: type[M], folder: Path, made_by: str = "permafrost precompute") -> M:
    """Read the manifest of a folder as its dataclass; raise ManifestError for wrong digests, types and ranges.

    made_by  the command that creates such a folder, for messages
    """
    path = folder / MANIFEST_NAME
    values = read_checked(path, made_by)
    try:
        return from_dict(cls, values)
    except EntryError as error:
        raise ManifestError(
            f"{path} is not a manifest of this version: {error}; use the permafrost version that wrote it, "
            "or create the store again"
        ) from error


def read_checked(path: Path, made_by: str = "permafrost precompute") -> dict[str, Any]:
    """Read a manifest's entries, checked against its own digest and this version's schema number."""
    if not path.exists():
        raise ManifestError(f"{path} does not exist; run {made_by} to create or finish it")
    raw = read_regular(path)
    lines = raw.split(b"\n")
    claims = [line for line in lines if line.startswith(_SELF_LINE.encode())]
    body = b"\n".join(line for line in lines if line not in claims)
    claimed = claims[0][len(_SELF_LINE) : -2].decode(errors="replace") if len(claims) == 1 else ""
    found = hashlib.sha256(body).hexdigest()
    if claimed != found or not claims[0].endswith(b'",'):
        raise ManifestError(
            f"{path} is damaged: its text has sha256 {found[:12]}, but it lists {claimed[:12]!r}; if permafrost verify "
            f"finds all other files intact, delete it and run {made_by} to write it again"
        )
    try:
        values = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise ManifestError(f"{path} is not valid JSON ({error})") from error
    if not isinstance(values, dict):
        raise ManifestError(f"{path} is a {type(values).__name__}, not a mapping")
    if values.get("schema") != SCHEMA_VERSION:
        raise ManifestError(
            f"{path} has schema {values.get('schema')!r}, but this version reads schema {SCHEMA_VERSION}; "
            "use the permafrost version that wrote it"
        )
    return values
