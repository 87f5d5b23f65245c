"""The JSON that makes a store, or a teacher pass in it, valid; written last.

`self_sha256` covers the manifest's own text without that line, and the manifest covers every other
file of its folder, so that a flipped byte anywhere is found. A digest says nothing about who wrote a
manifest, so its entries are checked for type and range, and its paths may not leave the folder.
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
REPAIR = "run stages.precompute again: it writes again what is missing"
"""The way out where a file of the store's own is gone."""
REWRITE = "delete it and run stages.precompute again, which writes what is missing"
"""The way out where a file of the store's own is damaged."""
CANONICAL_VIEW = "canonical"
"""The sampler of a pass that saw each record's whole frame, once."""
SAMPLERS = (CANONICAL_VIEW, "random", "rotations")
_SELF_LINE = ' "self_sha256": "'
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*")
_DIGEST = re.compile(r"[0-9a-f]{64}")
M = TypeVar("M")


class ManifestError(UserError, ValueError):
    """A store or a part of it that is damaged, incomplete or of another version."""


class StoreMismatchError(UserError, ValueError):
    """A store that is sound but not the one the config describes."""


def _require(condition: bool, error_message: str) -> None:
    if not condition:
        raise EntryError(error_message)


def _require_inside(path: str) -> None:
    """EntryError unless a path stays in the folder that it is relative to."""
    pure = PurePosixPath(path)
    _require(
        bool(path) and not pure.is_absolute() and ".." not in pure.parts and "\0" not in path,
        f"the path {path!r} leaves the folder",
    )


def _require_digest(digest: str) -> None:
    _require(_DIGEST.fullmatch(digest) is not None, f"{digest[:80]!r} is no SHA-256")


@dataclass(frozen=True, kw_only=True)
class FileEntry:
    """A file of the manifest's folder."""

    path: str
    """Relative to the manifest's folder."""
    bytes: int
    sha256: str
    crc32c: int = 0
    """CRC-32C (Castagnoli), compared by readers that read the whole file: of all of a tar, and of a Zarr chunk
    without the checksum that ends it (with it, the CRC-32C of every sound chunk is the same number)."""

    def __post_init__(self) -> None:
        _require_inside(self.path)
        _require_digest(self.sha256)
        _require(self.bytes >= 0, f"{self.path} has {self.bytes} bytes")


@dataclass(frozen=True, kw_only=True)
class ShardEntry:
    """One image shard."""

    name: str
    split: str
    records: int
    path: str
    """Relative to the store; of a referenced tar absolute."""
    bytes: int
    sha256: str
    keys_sha256: str
    referenced: bool = False
    """Whether the file is somebody else's, indexed where it lies."""

    def __post_init__(self) -> None:
        _require(_NAME.fullmatch(self.name) is not None, f"{self.name[:80]!r} names no shard")
        _require(min(self.records, self.bytes) >= 0, f"shard {self.name} has a negative size")
        _require_digest(self.sha256)
        _require_digest(self.keys_sha256)
        if self.referenced:
            absolute = PurePosixPath(self.path).is_absolute() and "\0" not in self.path
            _require(absolute, f"the referenced tar {self.path!r} is no absolute path")
        else:
            _require_inside(self.path)


@dataclass(frozen=True, kw_only=True)
class CanonicalFrame:
    """The one size in which every teacher and every student sees the inputs."""

    height: int
    width: int
    format: Literal["original", "jpeg95", "raw"] = "original"
    """original (the files' own bytes, resized when read), jpeg95 or raw (the frame itself)."""

    def __post_init__(self) -> None:
        fits = min(self.height, self.width) >= 1 and self.height * self.width <= MAX_PIXELS
        _require(fits, f"a frame of {self.height}x{self.width} pixels is not possible")


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
    rows_per_shard: int
    """Rows of a teacher's arrays that each shard has, be they filled or not."""
    shards: tuple[ShardEntry, ...]
    index: FileEntry
    files: dict[str, str]
    """Every other file but the shards: path -> sha256."""
    skipped: tuple[dict[str, str], ...] = ()
    kind: Literal["image", "table"] = "image"
    columns: tuple[str, ...] | None = None
    """Names of a table's columns; None where records are images."""
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
        _require(len(set(names)) == len(names), "two shards have one name")

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

    def __post_init__(self) -> None:
        _require(_NAME.fullmatch(self.name) is not None, f"{self.name[:80]!r} names no shard")
        _require(self.rows >= 0, f"shard {self.name} has {self.rows} rows")
        _require_digest(self.keys_sha256)


@dataclass(frozen=True, kw_only=True)
class PassManifest:
    """<store>/teachers/<name>-<fp8>/manifest.json."""

    fingerprint: str
    dataset_fingerprint: str
    store_fingerprint: str
    """Of the records, their frame and their places, as the teacher saw them."""
    teacher: dict[str, Any]
    views: dict[str, Any]
    explainer: dict[str, Any]
    fields: tuple[FieldSpec, ...]
    backend: Literal["zarr", "webdataset"]
    shards: tuple[PassShard, ...]
    files: dict[str, str]
    fidelity: dict[str, float] = field(default_factory=dict)
    """Of each lossy field: the lowest cosine between a record's values and their stored form."""
    selection: dict[str, Any] | None = None
    partition_sha256: str | None = None
    hierarchy: list[dict[str, Any]] | None = None
    """Of superfeature_logits: each level's coarsening and sha256 (models/additive/hierarchy.py); None where there is none."""
    made_with: dict[str, str] = field(default_factory=dict)
    """Library versions and device, for people; outside the fingerprint."""
    schema: int = SCHEMA_VERSION

    def __post_init__(self) -> None:
        check_files(self.files)
        names = [spec.name for spec in self.fields]
        _require(len(set(names)) == len(names), "two fields have one name")
        for spec in self.fields:
            _require(_NAME.fullmatch(spec.name) is not None, f"{spec.name[:80]!r} names no field")
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
            f"logits have shape {shapes.get('logits')}, of {self.teacher['classes']} classes",
        )
        explainer = self.explainer.get("kind")
        _require(
            explainer is None or isinstance(explainer, str), f"explainer.kind is {explainer!r}"
        )


def check_files(files: Any) -> dict[str, str]:
    """A manifest's `files`; EntryError unless they are digests by paths that stay in the folder."""
    _require(isinstance(files, dict), f"files is a {type(files).__name__}")
    for path, digest in files.items():
        _require_inside(path)
        _require(isinstance(digest, str), f"{path} has digest {digest!r}")
        _require_digest(digest)
    return dict(files)


def write_manifest(folder: Path, manifest: DataclassInstance) -> None:
    """Publish: after this the folder's contents exist for readers."""
    values = asdict(manifest)
    text = json.dumps(values, indent=1, sort_keys=True, allow_nan=False) + "\n"
    opening, rest = text.split("\n", 1)
    digest = hashlib.sha256(text.encode()).hexdigest()
    write_atomically(folder / MANIFEST_NAME, f'{opening}\n{_SELF_LINE}{digest}",\n{rest}'.encode())


def read_store_manifest(folder: Path) -> StoreManifest:
    """The store's manifest, checked against its own digest."""
    return read_manifest(StoreManifest, folder)


def read_pass_manifest(folder: Path) -> PassManifest:
    """A teacher pass's manifest, checked against its own digest."""
    return read_manifest(PassManifest, folder)


def read_manifest(cls: type[M], folder: Path, made_by: str = "stages.precompute") -> M:
    """The manifest of a folder as its dataclass; ManifestError for wrong digests, types and ranges.

    made_by  the command that makes such a folder, for messages
    """
    path = folder / MANIFEST_NAME
    values = read_checked(path, made_by)
    try:
        return from_dict(cls, values)
    except EntryError as error:
        raise ManifestError(
            f"{path} is no manifest of this version: {error}; use the permafrost version that wrote it, "
            "or make the store anew"
        ) from error


def read_checked(path: Path, made_by: str = "stages.precompute") -> dict[str, Any]:
    """A manifest's entries, checked against its own digest and of this version's schema."""
    if not path.exists():
        raise ManifestError(f"{path} does not exist; run {made_by} to make or to finish it")
    raw = read_regular(path)
    lines = raw.split(b"\n")
    claims = [line for line in lines if line.startswith(_SELF_LINE.encode())]
    body = b"\n".join(line for line in lines if line not in claims)
    claimed = claims[0][len(_SELF_LINE) : -2].decode(errors="replace") if len(claims) == 1 else ""
    found = hashlib.sha256(body).hexdigest()
    if claimed != found or not claims[0].endswith(b'",'):
        raise ManifestError(
            f"{path} is damaged: its text has sha256 {found[:12]}, it claims {claimed[:12]!r}; where all other "
            f"files are sound (stages.verify says so), delete it and run {made_by} to write it again"
        )
    try:
        values = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise ManifestError(f"{path} is no JSON ({error})") from error
    if not isinstance(values, dict):
        raise ManifestError(f"{path} is a {type(values).__name__}, not a mapping")
    if values.get("schema") != SCHEMA_VERSION:
        raise ManifestError(
            f"{path} has schema {values.get('schema')!r}, this version reads schema {SCHEMA_VERSION}; "
            "use the permafrost version that wrote it"
        )
    return values
