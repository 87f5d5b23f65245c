"""A finished store, opened for reading: manifests checked, index in memory, shards on demand."""

from __future__ import annotations

from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np

from pipeline.store.columns import BACKENDS, Columns, Values
from pipeline.store.files import sha256_file
from pipeline.store.index import INDEX_SCHEMA, read_table, receipt_path
from pipeline.store.manifest import (
    MANIFEST_NAME,
    REPAIR,
    ManifestError,
    PassManifest,
    ShardEntry,
    StoreManifest,
    StoreMismatchError,
    read_pass_manifest,
    read_store_manifest,
)

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    import pyarrow as pa

TEACHERS_FOLDER = "teachers"


class Store:
    """Images, their index and the teacher passes over them."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.manifest: StoreManifest = read_store_manifest(path)

    @cached_property
    def index(self) -> pa.Table:
        """One row a record (index.INDEX_SCHEMA), in the order of the shards."""
        entry = self.manifest.index
        if not (self.path / entry.path).is_file():
            raise ManifestError(f"{self.path / entry.path} is missing; {REPAIR}")
        found = sha256_file(self.path / entry.path)
        if found != entry.sha256:
            raise ManifestError(
                f"{self.path / entry.path} has sha256 {found[:12]}, the manifest says "
                f"{entry.sha256[:12]}; {REPAIR}"
            )
        return read_table(self.path / entry.path, INDEX_SCHEMA)[0]

    @cached_property
    def first_rows(self) -> dict[str, int]:
        """Row of the index at which each shard begins."""
        ends = np.cumsum([shard.records for shard in self.manifest.shards]).tolist()
        starts = [0, *ends[:-1]]
        return dict(zip((shard.name for shard in self.manifest.shards), starts, strict=True))

    def shard_keys(self, shard: ShardEntry) -> list[str]:
        """The shard's keys in their order."""
        keys: list[str] = (
            self.index["key"].slice(self.first_rows[shard.name], shard.records).to_pylist()
        )
        return keys

    @property
    def size(self) -> tuple[int, int]:
        """(height, width) of the canonical frame."""
        return self.manifest.canonical.height, self.manifest.canonical.width

    def pass_folders(self) -> list[Path]:
        """Folders of the published teacher passes, by name."""
        return sorted(
            path.parent for path in (self.path / TEACHERS_FOLDER).glob(f"*/{MANIFEST_NAME}")
        )

    def open_pass(self, name: str) -> TeacherPass:
        """The pass whose folder is `name`, or ends with those 8 digits."""
        folders = self.pass_folders()
        found = [f for f in folders if name in (f.name, f.name.rsplit("-", 1)[-1])]
        if len(found) != 1:
            names = ", ".join(folder.name for folder in folders) or "none"
            raise StoreMismatchError(
                f"{self.path} holds no teacher pass {name!r}; set store.teacher to one of: {names}"
            )
        return TeacherPass(self, found[0])

    def open_passes(self, names: Sequence[str] = ()) -> list[TeacherPass]:
        """The named passes, in that order; no name stands for the only one that the store holds."""
        folders = self.pass_folders()
        if not folders:
            raise StoreMismatchError(
                f"{self.path} holds no teacher pass; run stages.precompute with a teacher"
            )
        if not names and len(folders) > 1:
            raise StoreMismatchError(
                f"{self.path} holds several teacher passes; set store.teacher to one or more of: "
                + ", ".join(folder.name for folder in folders)
            )
        return [self.open_pass(name) for name in names or [folders[0].name]]


class TeacherPass:
    """One teacher's columns over a store."""

    def __init__(self, store: Store, folder: Path) -> None:
        self.store = store
        self.folder = folder
        self.manifest: PassManifest = read_pass_manifest(folder)
        expected = store.manifest.dataset.fingerprint
        if self.manifest.dataset_fingerprint != expected:
            raise StoreMismatchError(
                f"{folder} was computed on data {self.manifest.dataset_fingerprint[:12]}, the store holds "
                f"{expected[:12]}; remove the folder and run stages.precompute again"
            )
        rows = [(shard.name, shard.records, shard.keys_sha256) for shard in store.manifest.shards]
        if [(shard.name, shard.rows, shard.keys_sha256) for shard in self.manifest.shards] != rows:
            raise StoreMismatchError(
                f"{folder} was computed on other shards of the same data; "
                "remove the folder and run stages.precompute again"
            )

    @property
    def name(self) -> str:
        """The folder's name: <teacher>-<fp8>."""
        return self.folder.name

    @property
    def num_classes(self) -> int:
        """Of the teacher, which may know other classes than the data."""
        return int(self.manifest.teacher["classes"])

    @property
    def explainer(self) -> str | None:
        """Kind of the explainer that made its maps; None where it holds none."""
        kind: str | None = self.manifest.explainer.get("kind")
        return kind

    @cached_property
    def columns(self) -> Columns:
        """The backend that holds the fields."""
        manifest = self.store.manifest
        return BACKENDS[self.manifest.backend](
            self.folder,
            self.manifest.fields,
            len(manifest.shards),
            manifest.shard_size,
            self.manifest.views["count"],
        )

    def read_shard(self, shard: ShardEntry) -> Values:
        """Every field of one shard: [records, V, *shape]."""
        if not receipt_path(self.folder, shard.name).is_file():
            raise ManifestError(
                f"{self.folder}: shard {shard.name} has no receipt; run stages.verify"
            )
        position = self.store.manifest.shards.index(shard)
        return self.columns.read_shard(position, shard.name, self.store.shard_keys(shard))
