"""Manifest of a store or of a teacher pass: the JSON that makes it valid, written last.

`self_sha256` covers the manifest's own text without that line, and the manifest covers every other file of its
folder, most of them through its table of shards, so a flipped byte anywhere is detected. A digest does not authenticate
the author of a manifest. Its entries are therefore checked for type and range, and its paths may not leave the folder.
"""

from __future__ import annotations

import difflib
import hashlib
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, is_dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import numpy as np

from permafrost.core.digests import SHORT, canonical_json, sha256_json
from permafrost.core.errors import require, shorten
from permafrost.core.json_entries import (
    EntryError,
    from_dict,
    require_digest,
    require_entry,
    require_inside,
)
from permafrost.core.records import REST_LOGITS, TOP_CLASS, TOP_LOGITS, FieldSpec
from permafrost.storage.files import file_at
from permafrost.storage.local_files import folders_with
from permafrost.storage.rooted_paths import RootedPath
from permafrost.storage.signed_files import DigestError, check_json, sign_json
from permafrost.store.columns import COLUMNS
from permafrost.store.entries import NAME_PATTERN, REWRITE, FileEntry, ManifestError
from permafrost.store.shards import PassShardTable, ShardTable, SkippedTable, TableFile

if TYPE_CHECKING:
    from _typeshed import DataclassInstance


SCHEMA_VERSION = 4
"""Schema of stores and passes, the only one that is read."""
MANIFEST_NAME = "manifest.json"
"""File of the manifest of a store, of a pass or of an artifact, which is written last."""
TEACHERS_FOLDER = "teachers"
"""Folder of the passes of a store."""
CANONICAL_VIEW = "canonical"
"""Sampler of a pass over each record's whole frame, once."""
INGESTED = "ingested"
"""Kind of the network of a pass whose targets another tool has made."""
ROWS_DIGEST = "rows_sha256"
"""Entry of the selection of a pass that covers the records that had targets, whatever their split and subset."""
MAX_FRAME_PIXELS = 4096**2
"""Largest number of pixels of a canonical frame, 50 MB per record."""
MAX_FIELD_BYTES = 2**26
"""Largest size of one view of a record in one field of a pass."""
MAX_RECORD_BYTES = 2**28
"""Largest size of all views of a record in all fields of a pass."""
_MAX_MANIFEST_BYTES = 2**24
_MAX_BRACKETS = 100_000
"""Largest number of lists and mappings in a manifest; empty ones take the most memory for a byte of text."""
M = TypeVar("M")
D = TypeVar("D", bound="DataclassInstance")


@dataclass(frozen=True, kw_only=True)
class CanonicalFrame:
    """Size of all images that teachers and students receive."""

    height: int
    width: int
    format: Literal["original", "jpeg95", "raw"] = "original"
    """Image format: original (the files' own bytes, resized when read), jpeg95 or raw (the frame itself)."""
    resampling: Literal["uint8"] = "uint8"
    """Type of the numbers in which images are resized to the frame."""

    def __post_init__(self) -> None:
        fits = min(self.height, self.width) >= 1 and self.height * self.width <= MAX_FRAME_PIXELS
        require_entry(fits, f"a frame of {self.height}x{self.width} pixels is not possible")


@dataclass(frozen=True, kw_only=True)
class DatasetIdentity:
    """Identity of the inputs; the fingerprint covers the source's options and every listed record."""

    name: str
    fingerprint: str


@dataclass(frozen=True, kw_only=True)
class Generation:
    """Records that were packed together: those of the first packing of a store, or of an append."""

    dataset: DatasetIdentity
    fingerprint: str
    """Fingerprint of its records, their frame and its shards, as of a store that has no others."""
    shards: int
    """Number of its shards, which follow those of the generations before it."""
    skipped: int
    """Number of its records that were left out."""
    classes: int
    """Number of classes of the store since it was packed."""

    def __post_init__(self) -> None:
        require_digest(self.fingerprint)
        fits = self.shards >= 1 and min(self.skipped, self.classes) >= 0
        require_entry(fits, f"a generation has {self.shards} shards of {self.classes} classes")


@dataclass(frozen=True, kw_only=True)
class StoreManifest:
    """Content of <store>/manifest.json. Its size does not depend on the number of records or shards."""

    dataset: DatasetIdentity
    classes: tuple[str, ...]
    canonical: CanonicalFrame | None
    """Canonical frame; None for a table."""
    records: dict[str, int]
    """Number of records of each split."""
    rows_per_shard: int
    """Rows of each shard in a teacher's arrays, including unused ones."""
    fingerprint: str
    """SHA-256 of the records, their frame (or columns) and their shards, used by passes and runs."""
    shards: ShardTable
    index: dict[str, FileEntry]
    """File of each column of the index."""
    skipped: SkippedTable
    kind: Literal["image", "table"] = "image"
    columns: tuple[str, ...] | None = None
    """Names of a table's columns; None if records are images."""
    multi_label: bool = False
    generations: tuple[Generation, ...] = ()
    """Generations in their order; none in a store of one, whose entries are those of the store."""
    schema: int = SCHEMA_VERSION

    def packed_parts(self) -> tuple[Generation, ...]:
        """Return the generations, of a store without entries the only one."""
        if self.generations:
            return self.generations
        return (
            Generation(
                dataset=self.dataset,
                fingerprint=self.fingerprint,
                shards=len(self.shards),
                skipped=len(self.skipped),
                classes=len(self.classes),
            ),
        )

    def classes_of(self, outputs: int) -> tuple[str, ...]:
        """Return the names of a network's outputs: the classes of a generation that has as many, none for others."""
        numbers = {len(self.classes), *(part.classes for part in self.packed_parts())}
        return self.classes[:outputs] if outputs in numbers else ()

    def place_in_generation(self, shard: int) -> int:
        """Return the place of the shard of a number among those of its generation."""
        starts = np.cumsum([0, *(part.shards for part in self.generations)])
        return shard - int(starts[np.searchsorted(starts, shard, side="right") - 1])

    def part(self, start: int, stop: int) -> StoreManifest:
        """Return the manifest of the generations from `start` to `stop`, exclusive, as of a store of these alone."""
        parts = self.packed_parts()
        if (start, stop) == (0, len(parts)):
            return self
        ends = [sum(part.shards for part in parts[:number]) for number in (start, stop)]
        shards = self.shards.between(*ends)
        skipped = [sum(part.skipped for part in parts[:number]) for number in (start, stop)]
        return replace(
            self,
            **joined_identity(parts[start:stop]),
            classes=self.classes[: parts[stop - 1].classes],
            records=shards.records_of_splits(),
            shards=shards,
            skipped=self.skipped.between(*skipped),
        )

    def __post_init__(self) -> None:
        require_digest(self.fingerprint)
        require_entry(
            (self.canonical is None) == (self.columns is not None), "kind and canonical disagree"
        )
        require_entry(min(self.records.values(), default=0) >= 0, f"records are {self.records!r}")
        require_entry(self.rows_per_shard >= 1, f"rows_per_shard={self.rows_per_shard}")
        missing = COLUMNS.keys() - self.index
        require_entry(not missing, f"index has no column {', '.join(sorted(missing))}")


def joined_identity(parts: tuple[Generation, ...]) -> dict[str, Any]:
    """Return the entries `dataset`, `fingerprint` and `generations` of a store of some generations."""
    first = parts[0]
    if len(parts) == 1:
        return {"dataset": first.dataset, "fingerprint": first.fingerprint, "generations": ()}
    datasets = [part.dataset.fingerprint for part in parts]
    return {
        "dataset": DatasetIdentity(name=first.dataset.name, fingerprint=sha256_json(datasets)),
        "fingerprint": sha256_json([part.fingerprint for part in parts]),
        "generations": parts,
    }


def fingerprint_store(
    dataset: DatasetIdentity,
    canonical: CanonicalFrame | None,
    columns: tuple[str, ...] | None,
    shards: Iterable[tuple[str, str]],
) -> str:
    """Return the SHA-256 of the records, their frame (or columns) and their shards.

    Args:
        dataset: Identity of the inputs.
        canonical: Frame of the images; None for a table.
        columns: Names of a table's columns, which are covered only if `canonical` is None.
        shards: Name and keys_sha256 of each shard.
    """
    # Digest of {"canonical": ..., "dataset": ..., "plan": [...]} without holding that text in memory.
    form = {"columns": columns} if canonical is None else {"canonical": asdict(canonical)}
    start = canonical_json({**form, "dataset": dataset.fingerprint})
    digest = hashlib.sha256(start[:-1] + b',"plan":[')
    for place, shard in enumerate(shards):
        digest.update((b"," if place else b"") + canonical_json(shard))
    digest.update(b"]}")
    return digest.hexdigest()


@dataclass(frozen=True, kw_only=True)
class Agreement:
    """Agreement of a pass in lower precision with float32, on a sample of its records."""

    precision: str
    records: int
    top1: float | None = None
    """Fraction of records with the same largest logit; None without logits, as the three below."""
    kl_mean: float | None = None
    """Mean divergence KL(float32 || lower) of the softmax of the logits, in nats."""
    kl_largest: float | None = None
    kl_largest_key: str | None = None
    """Key of the record with the largest divergence."""
    cosine_mean: dict[str, float] = field(default_factory=dict)
    """Mean cosine of each stored field of maps or features."""
    cosine_lowest: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Passport:
    """Agreement of targets that were made elsewhere with the teacher that they are said to be of, on a sample."""

    teacher: str
    """Kind and name of that network."""
    weights_sha256: str
    agreement: Agreement
    accepted: dict[str, str] = field(default_factory=dict)
    """Differences that the options accept (passport.accept), by their kind, as text."""

    def __post_init__(self) -> None:
        require_digest(self.weights_sha256)


@dataclass(frozen=True, kw_only=True)
class MovedFeatures:
    """Fraction of the variance of the teacher's features of a view that the stored ones miss, on a sample."""

    records: int
    lost: dict[str, dict[str, float]]
    """1 - R^2 of each field by kind of view (shift, flip), over the cells inside of the frame."""

    def __post_init__(self) -> None:
        shares = [share for views in self.lost.values() for share in views.values()]
        fits = self.records >= 1 and all(0 <= share < math.inf for share in shares)
        require_entry(fits, f"moved_features are {self.lost!r} of {self.records} records")


@dataclass(frozen=True, kw_only=True)
class ProjectionEntry:
    """Projection of a field, on components of its channels."""

    file: FileEntry
    channels: int
    """Number of channels of the teacher."""
    kept: float
    """Fraction of the variance of the channels along the components, on the records of the fit."""

    def __post_init__(self) -> None:
        fits = self.channels >= 1 and 0 <= self.kept <= 1
        require_entry(fits, f"{self.file.path} keeps {self.kept!r} of {self.channels} channels")


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
    shards: PassShardTable
    files: dict[str, str]
    """SHA-256 by path of the files that all shards share."""
    fidelity: dict[str, float] = field(default_factory=dict)
    """Lowest cosine between a record's values and their stored form, for each lossy field."""
    agreement: Agreement | None = None
    """Agreement with float32; None for a pass that was computed in float32."""
    projections: dict[str, ProjectionEntry] = field(default_factory=dict)
    """Projection of each field that stores components in place of the teacher's channels."""
    moved_features: MovedFeatures | None = None
    """Error of the features after they are warped to a view; None for a pass without features, and for one of stored
    views. It is measured when the pass is written, and not covered by the fingerprint."""
    passport: Passport | None = None
    """Agreement with the teacher; None for targets that were not compared with one, and for all that precompute has
    written. It is not covered by the fingerprint."""
    temperatures: tuple[float, ...] = ()
    """Temperatures of the field rest_logits; empty for a pass of all logits."""
    selection: dict[str, Any] | None = None
    follows: str | None = None
    """Fingerprint of the pass over the first generation whose options and measures this one has; None for that one."""
    added: dict[str, Any] = field(default_factory=dict)
    """Other entries of the description by name: outputs, the options that these read, and what they say
    of the teacher (OutputInfo.describe). Covered by the fingerprint; passes of earlier versions lack the options."""
    made_with: dict[str, str] = field(default_factory=dict)
    """Versions, device, size of the network and name of the weights, for information only; not covered by the
    fingerprint. It has no time, as a pass depends on its inputs alone."""
    schema: int = SCHEMA_VERSION

    def __post_init__(self) -> None:
        require_digest(self.fingerprint)
        check_files(self.files)
        names = [spec.name for spec in self.fields]
        require_entry(len(set(names)) == len(names), "two fields have the same name")
        for spec in self.fields:
            require_entry(
                NAME_PATTERN.fullmatch(spec.name) is not None,
                f"{spec.name[:80]!r} is not a field name",
            )
            require_entry(
                min(spec.shape, default=1) >= 0, f"field {spec.name} has shape {spec.shape}"
            )
        for section, kinds in _ENTRIES.items():
            for name, (kind, is_required) in kinds.items():
                value = getattr(self, section).get(name)
                fits = type(value) is kind or (value is None and not is_required)
                if kind is list and fits and value is not None:
                    fits = all(isinstance(item, dict) for item in value)
                require_entry(fits, f"{section}.{name} is {str(value)[:80]!r}")
        count, sampler = self.views["count"], self.views["sampler"]
        require_entry(count >= 1, f"views.count is {count}")
        for name in ("seed", "mix_block"):
            number = self.views.get(name) or 0
            require_entry(0 <= number < 2**64, f"views.{name} is {number}")
        require_entry(
            NAME_PATTERN.fullmatch(sampler) is not None, f"views.sampler is {sampler[:80]!r}"
        )
        require_entry(
            sampler != CANONICAL_VIEW or count == 1, f"{count} canonical views are not possible"
        )
        require_entry(
            self.teacher["classes"] >= int(self.has_logits),
            f"teacher.classes is {self.teacher['classes']}",
        )
        excess = describe_excess(self.fields, count)
        require_entry(excess is None, str(excess))
        shapes = {spec.name: spec.shape for spec in self.fields}
        self._check_logits(shapes)
        require_entry(
            "map" not in shapes or self.explainer.keys() >= {"kind", "target_classes"},
            "explainer does not say what made the maps, and of which classes",
        )

    def entries(self, cls: type[D]) -> D | None:
        """Return the entries that an output has added.

        Args:
            cls: Dataclass whose fields have the names of the entries.

        Returns:
            The entries as that dataclass; None if the pass does not have them.

        Raises:
            ManifestError: If one is missing or has another type than the dataclass says.
        """
        names = {spec.name for spec in fields(cls)}
        values = {name: value for name, value in self.added.items() if name in names}
        try:
            return from_dict(cls, values) if values else None
        except EntryError as error:
            raise ManifestError(
                f"the manifest of pass {self.fingerprint[:SHORT]} does not have the entries of a {cls.__name__}: "
                f"{error}; {REWRITE}"
            ) from error

    @property
    def has_logits(self) -> bool:
        """True if the pass has logits, all or the largest ones."""
        return any(spec.name in ("logits", TOP_LOGITS) for spec in self.fields)

    def _check_logits(self, shapes: dict[str, tuple[int, ...]]) -> None:
        classes = self.teacher["classes"]
        if not self.temperatures:
            require_entry(
                not self.has_logits or shapes.get("logits") == (classes,),
                f"logits have shape {shapes.get('logits')} for {classes} classes",
            )
            return
        fits = all(
            type(temperature) is float and 0 < temperature < math.inf
            for temperature in self.temperatures
        )
        require_entry(fits, f"temperatures are {self.temperatures!r}")
        stored_shapes = [shapes.get(name) for name in (TOP_LOGITS, TOP_CLASS, REST_LOGITS)]
        count = stored_shapes[0][0] if stored_shapes[0] else 0
        require_entry(
            stored_shapes == [(count,), (count,), (len(self.temperatures),)]
            and 1 <= count <= classes,
            f"the largest logits have shapes {stored_shapes} for {classes} classes and {len(self.temperatures)} "
            "temperatures",
        )


def describe_excess(fields: Sequence[FieldSpec], num_views: int) -> str | None:
    """Describe which limit the values of a record exceed; None if they exceed none.

    Args:
        fields: Fields of a pass.
        num_views: Number of views of each record.
    """
    total = 0
    for spec in fields:
        size = math.prod(spec.shape) * np.dtype(spec.dtype).itemsize
        total += num_views * size
        if size > MAX_FIELD_BYTES:
            return f"field {spec.name} has {size:,} bytes per record, more than {MAX_FIELD_BYTES:,}"
    if total > MAX_RECORD_BYTES:
        return f"{num_views} views have {total:,} bytes per record, more than {MAX_RECORD_BYTES:,}"
    return None


_ENTRIES: dict[str, dict[str, tuple[type, bool]]] = {
    "views": {
        "count": (int, True),
        "sampler": (str, True),
        "seed": (int, False),
        "operations": (list, False),
        "edges": (str, False),
        "border": (str, False),
        "interpolation": (str, False),
        "pixels": (str, False),
        "mix": (list, False),
        "mix_block": (int, False),
    },
    "teacher": {
        "classes": (int, True),
        "weights_sha256": (str, False),
        "frame": (str, False),
        "dtype": (str, False),
        "architecture": (dict, False),
        "preprocessing": (dict, False),
        "format": (dict, False),
    },
    "explainer": {"kind": (str, False), "target_classes": (str, False)},
}
"""Type of each entry of a pass's sections that readers use, and whether it is required. Lists are of mappings."""


def check_files(files: Any) -> dict[str, str]:
    """Return a manifest's `files`: SHA-256 by path.

    Raises:
        EntryError: If they do not map paths inside the folder to digests.
    """
    require_entry(isinstance(files, dict), f"files is a {type(files).__name__}")
    for path, digest in files.items():
        require_inside(path)
        require_entry(isinstance(digest, str), f"{path} has digest {digest!r}")
        require_digest(digest)
    return dict(files)


def write_manifest(folder: RootedPath, manifest: DataclassInstance) -> None:
    """Write the manifest, which makes the folder's contents valid for readers, once it was read back.

    Raises:
        ManifestError: If it could not be read.
    """
    values = {spec.name: _plain(getattr(manifest, spec.name)) for spec in fields(manifest)}
    text = sign_json(values, sort_keys=True, allow_nan=False)
    tables = {
        spec.name: table
        for spec in fields(manifest)
        if isinstance(table := getattr(manifest, spec.name), TableFile)
    }
    try:
        from_dict(type(manifest), check_json(text) | tables)
    except EntryError as error:
        raise ManifestError(
            f"{folder / MANIFEST_NAME} is not written, because no reader would accept it: {error}"
        ) from error
    file_at(folder / MANIFEST_NAME).commit(text)


def _plain(value: Any) -> Any:
    """Return the JSON value of a manifest's entry."""
    if isinstance(value, TableFile):
        return None if value.file is None else asdict(value.file)
    if isinstance(value, tuple):
        return [_plain(item) for item in value]
    if isinstance(value, dict):
        return {name: _plain(each) for name, each in value.items()}
    return asdict(value) if is_dataclass(value) and not isinstance(value, type) else value


def read_store_manifest(folder: RootedPath) -> StoreManifest:
    """Read a store's manifest, checked against its own digest. The table of shards is read when it is needed.

    Raises:
        ManifestError: If it is missing, damaged or of another version.
    """
    return read_manifest(
        StoreManifest, folder, tables={"shards": ShardTable, "skipped": SkippedTable}
    )


def read_pass_manifest(folder: RootedPath) -> PassManifest:
    """Read a teacher pass's manifest, checked against its own digest. The table of shards is read when it is needed.

    Raises:
        ManifestError: If it is missing, damaged or of another version, or if the folder is named after another pass.
    """
    manifest = read_manifest(PassManifest, folder, tables={"shards": PassShardTable})
    digits = manifest.fingerprint[:SHORT]
    name, _, named = folder.name.rpartition("-")
    if named == digits:  # readers choose a pass by the name of its folder
        return manifest
    remedy = (
        f"it was renamed, or another pass was copied over it. Rename it to {name or 'teacher'}-{digits}, or delete it "
        "and run permafrost precompute with its teacher again"
    )
    originals = [path for path in file_at(folder.parent).paths(f"*-{digits}") if path != folder]
    if originals:
        remedy = f"it is a copy of {originals[0].name}, which is there; delete the copy"
    raise ManifestError(
        f"{folder} is named as the pass {named or folder.name}, but its {MANIFEST_NAME} is of the pass {digits}: "
        f"{remedy}"
    )


def read_manifest(
    cls: type[M],
    folder: RootedPath,
    made_by: str = "permafrost precompute",
    schema: int = SCHEMA_VERSION,
    tables: Mapping[str, type[TableFile[Any]]] | None = None,
) -> M:
    """Read the manifest of a folder as its dataclass.

    Args:
        cls: Dataclass of the manifest.
        folder: Folder with the manifest.
        made_by: Command that creates such a folder, for messages.
        schema: Number of the schema that is read.
        tables: Class of each table whose file is an entry, by the entry's name.

    Raises:
        ManifestError: If the manifest is missing, or for wrong digests, types and ranges.
    """
    path = folder / MANIFEST_NAME
    values = read_checked(path, made_by, schema)
    try:
        for name, table in (tables or {}).items():
            file = values.get(name)
            entry = None if file is None else from_dict(FileEntry, file, name)
            require_entry(entry is not None or table is SkippedTable, f"{name} is missing")
            values[name] = table(folder, entry)
        return from_dict(cls, values)
    except EntryError as error:
        raise ManifestError(
            f"{path} is not a manifest of this version: {error}; use the permafrost version that wrote it, "
            "or create the store again"
        ) from error


def _others_like(path: RootedPath) -> str:
    """Return a hint at finished stores next to a folder without one, or in it; empty if there are none."""
    if path.name != MANIFEST_NAME:
        return ""
    folder = Path(str(path.parent))
    inside, neighbors = (
        folders_with(folder, MANIFEST_NAME),
        folders_with(folder.parent, MANIFEST_NAME),
    )
    shown = inside or difflib.get_close_matches(str(folder), neighbors, n=1) or neighbors
    return f", or name a store that exists: {shorten(shown, 5)}" if shown else ""


def read_checked(
    path: RootedPath, made_by: str = "permafrost precompute", schema: int = SCHEMA_VERSION
) -> dict[str, Any]:
    """Read a manifest's entries, checked against its own digest and the number of the schema.

    Args:
        path: File of the manifest.
        made_by: Command that creates it, for messages.
        schema: Number of the schema that is read.

    Raises:
        ManifestError: If the file is missing or damaged, or has another schema.
    """
    try:
        raw = file_at(path).read_committed(_MAX_MANIFEST_BYTES)
    except FileNotFoundError:
        raise ManifestError(
            f"{path} does not exist; run {made_by} to create or finish it{_others_like(path)}"
        ) from None
    require(
        raw.count(b"[") + raw.count(b"{") <= _MAX_BRACKETS,
        f"{path} has more than {_MAX_BRACKETS:,} lists and mappings; {REWRITE}",
        ManifestError,
    )
    try:
        values = check_json(raw)
    except DigestError as error:
        raise ManifestError(
            f"{path} is damaged: {error}; if permafrost verify finds all other files intact, delete it and run "
            f"{made_by} to write it again"
        ) from error
    if (found_schema := values.get("schema")) != schema:
        raise ManifestError(
            f"{path} has schema {found_schema!r}, but this version reads schema {schema}; delete {path.parent} and run "
            f"{made_by} again, or use the permafrost version that wrote it"
        )
    return values
