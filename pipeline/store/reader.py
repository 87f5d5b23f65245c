"""Reading of a finished store: checked manifests, the index in memory, shards opened on demand."""

from __future__ import annotations

from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pipeline.core.files import sha256_file
from pipeline.core.records import NO_LABEL
from pipeline.store.backends import BACKENDS
from pipeline.store.fields import PassFields, StoredShard, Values
from pipeline.store.index import (
    INDEX_SCHEMA,
    PASS_RECEIPT_SCHEMA,
    RECEIPTS_FOLDER,
    has_many_labels,
    read_receipt,
    read_table,
    receipt_path,
)
from pipeline.store.manifest import (
    CANONICAL_VIEW,
    MANIFEST_NAME,
    REPAIR,
    REWRITE,
    ManifestError,
    PassManifest,
    ShardEntry,
    StoreManifest,
    StoreMismatchError,
    read_pass_manifest,
    read_store_manifest,
)

if TYPE_CHECKING:
    from collections.abc import Container, Sequence

    import pyarrow as pa
    from numpy.typing import NDArray

    from pipeline.store.row_reader import Rows

TEACHERS_FOLDER = "teachers"


class Store:
    """Images, their index and the teacher passes over them."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.manifest: StoreManifest = read_store_manifest(self.path)

    @cached_property
    def index(self) -> pa.Table:
        """One row per record (index.INDEX_SCHEMA), in the order of the shards."""
        path = self.path / self.manifest.index.path
        _check_digest(path, self.manifest.index.sha256)
        index = read_table(path, INDEX_SCHEMA)
        _check_index(path, index, self.manifest)
        return index

    @cached_property
    def first_rows(self) -> dict[str, int]:
        """Row of the index at which each shard begins."""
        ends = np.cumsum([shard.records for shard in self.manifest.shards]).tolist()
        starts = [0, *ends[:-1]]
        return dict(zip((shard.name for shard in self.manifest.shards), starts, strict=True))

    def shard_keys(self, shard: ShardEntry) -> list[str]:
        """Return the shard's keys in their order."""
        keys: list[str] = (
            self.index["key"].slice(self.first_rows[shard.name], shard.records).to_pylist()
        )
        return keys

    @property
    def is_table(self) -> bool:
        """True if its records are rows of a table."""
        return self.manifest.columns is not None

    @property
    def size(self) -> tuple[int, int]:
        """(height, width) of the canonical frame, or (1, columns) for a table."""
        canonical = self.manifest.canonical
        if canonical is None:
            return 1, len(self.manifest.columns or ())
        return canonical.height, canonical.width

    def num_records(self, split: str | None = None) -> int:
        """Number of records of a split, or of all, from the manifest alone."""
        return sum(s.records for s in self.manifest.shards if split in (None, s.split))

    def pass_folders(self, *, stored_views: bool = False) -> list[Path]:
        """Return the folders of the published teacher passes, sorted by name.

        stored_views  select passes of stored views, for replay, instead of passes of the canonical view
        """
        folders = sorted(
            path.parent for path in (self.path / TEACHERS_FOLDER).glob(f"*/{MANIFEST_NAME}")
        )
        return [f for f in folders if _has_stored_views(f) == stored_views]

    def _unfinished_passes(self) -> list[Path]:
        """Return the folders of passes without a manifest, sorted by name."""
        folders = sorted(path for path in (self.path / TEACHERS_FOLDER).glob("*/"))
        return [folder for folder in folders if not (folder / MANIFEST_NAME).exists()]

    def open_pass(self, name: str, *, stored_views: bool = False) -> TeacherPass:
        """Open the pass whose folder is `name`, or the only one with that name before or after the last hyphen."""
        folders = self.pass_folders(stored_views=stored_views)
        found = [f for f in folders if name in (f.name, *f.name.rsplit("-", 1))]
        if len(found) != 1:
            names = ", ".join(folder.name for folder in folders) or "none"
            raise StoreMismatchError(
                f"{self.path} has {'several' if found else 'no'} {_kind(stored_views)} {name!r}; set store.teacher to "
                f"one of: {names}"
            )
        return TeacherPass(self, found[0])

    def open_passes(
        self, names: Sequence[str] = (), *, stored_views: bool = False
    ) -> list[TeacherPass]:
        """Open the named passes, in that order; without names the only one that the store contains."""
        folders = self.pass_folders(stored_views=stored_views)
        if not folders:
            how = "and views=random" if stored_views else ""
            unfinished = [str(f / MANIFEST_NAME) for f in self._unfinished_passes()]
            hint = (
                f" ({', '.join(unfinished)} missing: that pass is unfinished)" if unfinished else ""
            )
            raise StoreMismatchError(
                f"{self.path} has no {_kind(stored_views)}{hint}; "
                f"run permafrost precompute with a teacher {how}".rstrip()
            )
        if not names and len(folders) > 1:
            raise StoreMismatchError(
                f"{self.path} has several {_kind(stored_views, 'passes')}; set store.teacher to one or more of: "
                + ", ".join(folder.name for folder in folders)
            )
        return [
            self.open_pass(name, stored_views=stored_views) for name in names or [folders[0].name]
        ]

    def canonical_of(self, replayed: TeacherPass) -> TeacherPass:
        """Open the canonical pass of the teacher of a pass of stored views; precompute writes it first."""
        for folder in self.pass_folders():
            manifest = read_pass_manifest(folder)
            if (manifest.teacher, manifest.explainer) == (
                replayed.manifest.teacher,
                replayed.manifest.explainer,
            ):
                return TeacherPass(self, folder)
        raise StoreMismatchError(
            f"{self.path} has no canonical pass of the teacher of {replayed.name}; run permafrost precompute with it"
        )


def _check_digest(path: Path, expected: str) -> None:
    """Raise ManifestError unless a file exists and has that SHA-256."""
    try:
        found = sha256_file(path)
    except FileNotFoundError:
        raise ManifestError(f"{path} is missing; {REPAIR}") from None
    if found != expected:
        raise ManifestError(
            f"{path} is damaged: it has sha256 {found[:12]}, but its manifest lists {expected[:12]}; {REWRITE}"
        )


def _check_index(path: Path, index: pa.Table, manifest: StoreManifest) -> None:
    """Raise ManifestError unless the index has the shards' rows in order, and only labels of the classes."""
    records = [shard.records for shard in manifest.shards]
    if index.num_rows != sum(records):
        raise ManifestError(
            f"{path} has {index.num_rows} rows, but the manifest lists {sum(records)} records; run permafrost verify"
        )
    starts = np.repeat(np.cumsum([0, *records[:-1]]), records)
    rows = np.arange(index.num_rows) - starts
    numbers = np.repeat(np.arange(len(records)), records)
    known = len(manifest.classes)
    labels = index["label"].to_numpy()
    many = index["labels"].combine_chunks().flatten().to_numpy(zero_copy_only=False)
    sound = {
        "row": (index["row"].to_numpy() == rows).all(),
        "array_row": (
            index["array_row"].to_numpy() == numbers * manifest.rows_per_shard + rows
        ).all(),
        "label": ((labels >= NO_LABEL) & (labels < known)).all(),
        "labels": ((many >= 0) & (many < known)).all()
        and manifest.multi_label == has_many_labels(index),
    }
    wrong = [name for name, is_sound in sound.items() if not is_sound]
    if wrong:
        raise ManifestError(
            f"{path} has values in {', '.join(wrong)} that contradict its manifest; run permafrost verify"
        )


def _has_stored_views(folder: Path) -> bool:
    return bool(read_pass_manifest(folder).views["sampler"] != CANONICAL_VIEW)


def _kind(stored_views: bool, noun: str = "pass") -> str:
    return f"teacher {noun} of stored views" if stored_views else f"teacher {noun}"


class TeacherPass:
    """Fields of one teacher over a store."""

    def __init__(self, store: Store, folder: Path) -> None:
        self.store = store
        self.folder = folder
        self.manifest: PassManifest = read_pass_manifest(folder)
        expected = store.manifest.dataset.fingerprint
        if self.manifest.dataset_fingerprint != expected:
            raise StoreMismatchError(
                f"{folder} was computed on data {self.manifest.dataset_fingerprint[:12]}, but the store contains "
                f"{expected[:12]}; remove the folder and run permafrost precompute again"
            )
        rows = [(shard.name, shard.records, shard.keys_sha256) for shard in store.manifest.shards]
        held = [(shard.name, shard.rows, shard.keys_sha256) for shard in self.manifest.shards]
        if self.manifest.store_fingerprint != store.manifest.fingerprint:
            raise StoreMismatchError(
                f"{folder} was computed on other shards of the same data, or on other frames; "
                "remove the folder and run permafrost precompute again"
            )
        self._check_files()
        if held != rows and self.manifest.selection is None:
            raise StoreMismatchError(
                f"{folder} was computed on other shards of the same data; "
                "remove the folder and run permafrost precompute again"
            )

    def _check_files(self) -> None:
        """Raise ManifestError if the files in the manifest are not those of a pass with its fields."""
        receipts = [f"{RECEIPTS_FOLDER}/{shard.name}.parquet" for shard in self.manifest.shards]
        expected = {*self.fields.shared_files(), *receipts}
        odd = sorted(expected ^ set(self.manifest.files))
        for position, shard in enumerate(self.manifest.shards):
            files = {file.path for file in shard.files}
            odd += sorted(files ^ set(self.fields.shard_files(position, shard.name)))
        if odd:
            raise ManifestError(
                f"{self.folder / MANIFEST_NAME} does not list the files of its fields: {', '.join(odd[:3])}; "
                "remove the folder and run permafrost precompute again"
            )

    @property
    def name(self) -> str:
        """Name of the folder: <teacher>-<fp8>."""
        return self.folder.name

    @property
    def num_classes(self) -> int:
        """Number of the teacher's classes, which may differ from the classes of the data."""
        return int(self.manifest.teacher["classes"])

    @property
    def bytes_per_record(self) -> float:
        """Mean number of bytes of one record with all its views."""
        files = [entry for shard in self.manifest.shards for entry in shard.files]
        records = sum(shard.rows for shard in self.manifest.shards)
        return sum(entry.bytes for entry in files) / max(records, 1)

    @property
    def explainer(self) -> str | None:
        """Kind of the explainer that produced its maps; None without maps."""
        kind: str | None = self.manifest.explainer.get("kind")
        return kind

    @property
    def views(self) -> dict[str, Any]:
        """Views that it covers and the way they were drawn; passes with equal views have the same matrices."""
        return self.manifest.views

    @property
    def num_views(self) -> int:
        """Number V of views."""
        return int(self.manifest.views["count"])

    @cached_property
    def fields(self) -> PassFields:
        """Backend that stores the fields."""
        shards = self.manifest.shards
        most = self.store.manifest.rows_per_shard
        if self.manifest.selection is not None:
            most = max((shard.rows for shard in shards), default=1)
        return BACKENDS[self.manifest.backend](
            self.folder, self.manifest.fields, len(shards), most, self.num_views
        )

    def shard_keys(self, shard: ShardEntry) -> list[str]:
        """Return the keys of the image shard's records that the pass covers, in the shard's order."""
        if self.manifest.selection is None:
            return self.store.shard_keys(shard)
        if shard.name not in self._positions:
            return []
        keys: list[str] = self._receipt(shard)["key"].to_pylist()
        return keys

    def rows_of(self, shard: ShardEntry) -> NDArray[np.int64]:
        """Return each record's row in `read_shard`, -1 if it is not covered: i64 [records of the image shard]."""
        if self.manifest.selection is None:
            return np.arange(shard.records)
        covered = {key: row for row, key in enumerate(self.shard_keys(shard))}
        return np.array([covered.get(key, -1) for key in self.store.shard_keys(shard)], np.int64)

    def read_shard(self, shard: ShardEntry) -> Values:
        """Read every field of one shard: [covered records, V, *shape]."""
        return self.fields.read_shard(self.stored_shard(shard))

    def open_shard(self, shard: ShardEntry, fields: Container[str]) -> dict[str, Rows]:
        """Open the given fields of one shard, large ones as rows that are read on demand."""
        return self.fields.open_shard(self.stored_shard(shard), fields)

    def fields_of(self, payload: str) -> list[str]:
        """Return the fields of a payload without their scales; empty if the pass does not contain it.

        payload  attention, class_maps, pooled or superfeature_logits
        """
        return [
            spec.name
            for spec in self.manifest.fields
            if spec.name == payload
            or (spec.codec == "maxabs" and spec.name.startswith(f"{payload}_"))
        ]

    def stored_shard(self, shard: ShardEntry) -> StoredShard:
        """Describe where the rows of an image shard are stored in this pass, and their checksums."""
        receipt = receipt_path(self.folder, shard.name)
        if not receipt.is_file():
            raise ManifestError(f"{receipt} is missing; {REPAIR}")
        position = self._positions[shard.name]
        entry = self.manifest.shards[position]
        keys = self.shard_keys(shard)
        if len(keys) != entry.rows:
            raise ManifestError(
                f"{self.folder}: shard {shard.name} has {entry.rows} rows for {len(keys)} records; "
                "run permafrost verify"
            )
        described = StoredShard(
            position=position,
            name=shard.name,
            keys=keys,
            files={file.path: file for file in entry.files},
        )
        if not self.fields.inner_chunks_of_a_row():
            return described
        checksums = self._receipt(shard)["chunk_crc32c"].combine_chunks()
        flat = checksums.flatten().to_numpy(zero_copy_only=False)
        if keys and len(flat) % len(keys):
            raise ManifestError(f"{receipt} has uneven rows; run permafrost verify")
        shape = (len(keys), -1) if keys else (0, self.fields.inner_chunks_of_a_row())
        return replace(described, chunk_crc32c=flat.reshape(shape))

    def _receipt(self, shard: ShardEntry) -> pa.Table:
        path = receipt_path(self.folder, shard.name)
        name = path.relative_to(self.folder).as_posix()
        if name not in self.manifest.files:
            raise ManifestError(
                f"{self.folder / MANIFEST_NAME} has no {name}; run permafrost verify"
            )
        _check_digest(path, self.manifest.files[name])
        return read_receipt(path, PASS_RECEIPT_SCHEMA)[0]

    @cached_property
    def _positions(self) -> dict[str, int]:
        return {shard.name: position for position, shard in enumerate(self.manifest.shards)}
