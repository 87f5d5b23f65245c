"""Form of a shared pass: share.json, its required entries, and a check of all of its untrusted content.

    share.json                 what the pass is, its fields, and the SHA-256 of every file
    records.parquet            key, split, label, shard, SHA-256 of the image's file and of its pixels
    targets/<shard>.tar        <key>.<field>.npy, and with images=true <key>.<suffix>
    projections/<field>.npy    components of features, where a field has some
    plugins/<name>.py          code of an explainer of the user's, which attach does not run

That is form=webdataset, which `attach` reads. The other forms (share_writer.py) have a share.json, too.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa

from permafrost.core.digests import SHORT
from permafrost.core.errors import ConfigError, require
from permafrost.core.json_entries import EntryError, from_dict, require_digest, require_entry
from permafrost.core.progress import say_if_slow
from permafrost.core.records import FieldSpec
from permafrost.storage.files import file_at
from permafrost.storage.rooted_paths import LinkError, RootedPath
from permafrost.storage.signed_files import SIGNATURE, DigestError, check_json
from permafrost.store.arrow_files import read_table
from permafrost.store.manifest import (
    Agreement,
    MovedFeatures,
    PassManifest,
    Passport,
    check_files,
)
from permafrost.store.projections import PROJECTIONS_FOLDER
from permafrost.store.shards import PassShardTable
from permafrost_exchange.target_reader import TargetError

logger = logging.getLogger("permafrost.attach")

SHARE_NAME = "share.json"
SHARED_RECORDS = "records.parquet"
SHARE_SCHEMA = 1
TARGETS_FOLDER = "targets"
PLUGINS_FOLDER = "plugins"
"""Code that adds the explainer of the maps. It is run only where `plugins=` names it."""
EXPLAINER_PACKAGE = "explainer_package"
"""Entry of `made_with`: name and version of the installed package that adds the explainer."""
SHARED_RECORDS_SCHEMA = pa.schema(
    [
        *(pa.field(name, pa.string(), nullable=False) for name in ("key", "split")),
        pa.field("label", pa.int32(), nullable=False),
        *(
            pa.field(name, pa.string(), nullable=False)
            for name in ("shard", "image_sha256", "pixels_sha256")
        ),
    ]
)
"""Columns of records.parquet; digests are hexadecimal, and pixels_sha256 is empty where it was not asked for."""
_MAX_BYTES = 2**24
_RECORD_BYTES = 1024
"""Bytes that a tar has for each record at least: a header and a block."""
_ROW_BYTES = 1024
"""Bytes of a row of records.parquet at most: a key, a shard's name and two digests."""


@dataclass(frozen=True, kw_only=True)
class Share:
    """Content of share.json. Entries with the names of a pass's manifest are those of the pass."""

    schema: int
    form: Literal["webdataset", "embeddings", "huggingface"]
    name: str
    backend: Literal["zarr", "webdataset"]
    fields: tuple[FieldSpec, ...]
    fingerprint: str
    dataset_fingerprint: str
    store_fingerprint: str
    teacher: dict[str, Any]
    views: dict[str, Any]
    explainer: dict[str, Any]
    temperatures: tuple[float, ...]
    selection: dict[str, Any] | None
    fidelity: dict[str, float]
    added: dict[str, Any]
    made_with: dict[str, str]
    agreement: Agreement | None
    moved_features: MovedFeatures | None
    passport: Passport | None
    classes: tuple[str, ...]
    dataset: str
    frame: tuple[int, int]
    licenses: dict[str, str]
    made_by: str
    projected: tuple[str, ...]
    """Fields that have components in place of the teacher's channels, each with a projection."""
    files: dict[str, str]
    """SHA-256 of every other file of the folder, by path."""

    def __post_init__(self) -> None:
        check_files(self.files)
        for digest in (self.dataset_fingerprint, self.store_fingerprint):
            require_digest(digest)
        # The pass that it becomes, whose manifest has more rules.
        known = {spec.name for spec in fields(PassManifest)} - {"schema", "files"}
        values = {name: value for name, value in vars(self).items() if name in known}
        PassManifest(**values, shards=PassShardTable(RootedPath(Path()), None), files={})
        is_name = self.name.endswith(f"-{self.fingerprint[:SHORT]}") and "/" not in self.name
        require_entry(
            is_name and bool(self.pass_name), f"{self.name[:80]!r} is not the name of a pass"
        )
        missing = [path for path in self.projections.values() if path not in self.files]
        require_entry(not missing, f"files does not list {missing[:1]}")
        unknown = set(self.projected) - {spec.name for spec in self.fields}
        require_entry(not unknown, f"projected has {sorted(unknown)[:1]}, which is not a field")
        require_entry(min(self.frame) >= 1, f"frame is {self.frame}")
        name = self.teacher.get("name", "")
        require_entry(isinstance(name, str), f"teacher.name is {name!r:.80}")
        odd = self.fidelity.keys() - {spec.name for spec in self.fields}
        require_entry(not odd, f"fidelity has {sorted(odd)[:1]}, which is not a field")

    @property
    def num_views(self) -> int:
        """Number of views of each record."""
        return int(self.views["count"])

    @property
    def pass_name(self) -> str:
        """Name of the pass before its fingerprint."""
        return self.name.rpartition("-")[0]

    def target_path(self, shard: str) -> str:
        """Return the path of the targets of a shard.

        Raises:
            EntryError: If share.json does not list it.
        """
        path = f"{TARGETS_FOLDER}/{shard}.tar"
        require_entry("/" not in shard, f"{shard[:80]!r} is not the name of a shard")
        require_entry(path in self.files, f"files does not list {path[:80]}")
        return path

    @property
    def projections(self) -> dict[str, str]:
        """Path of the projection of each field that has one."""
        return {name: f"{PROJECTIONS_FOLDER}/{name}.npy" for name in self.projected}


def read_share(folder: RootedPath) -> Share:
    """Read share.json, and compare every file of the folder with its digest.

    Raises:
        ConfigError: If the folder has none.
        TargetError: If it is damaged, of another form, or does not describe a pass, or if a file is a link.
        FileError: If a file cannot be read, or is not in the folder.
    """
    path = folder / SHARE_NAME
    try:
        values = check_json(file_at(path).read(_MAX_BYTES))
    except FileNotFoundError:
        raise ConfigError(
            f"from={folder} has no {SHARE_NAME}; name a folder that permafrost share has written whole"
        ) from None
    except DigestError as error:
        raise TargetError(f"{path} is damaged: {error}; fetch it again") from error
    except LinkError as error:
        raise _link_error(error, folder) from None
    require(
        values.get("schema") == SHARE_SCHEMA and values.get("form") == "webdataset",
        f"{path} has schema {values.get('schema')!r:.80} and form {values.get('form')!r:.80}; attach reads schema "
        f"{SHARE_SCHEMA} of form=webdataset, and permafrost ingest other forms",
        TargetError,
    )
    values.pop(SIGNATURE, None)
    try:
        share = from_dict(Share, values)
        require_entry(SHARED_RECORDS in share.files, f"files does not list {SHARED_RECORDS}")
    except EntryError as error:
        raise TargetError(
            f"{path} does not describe a pass: {error}; fetch it again, or ask who has written it"
        ) from error
    with say_if_slow(logger, f"reading {folder} for its digests ..."):
        for name, digest in share.files.items():
            try:
                actual = file_at(folder / name).sha256()
            except FileNotFoundError:
                raise TargetError(f"{folder / name} is missing; fetch the folder again") from None
            except LinkError as error:
                raise _link_error(error, folder) from None
            require(
                actual == digest,
                f"{folder / name} is damaged: its SHA-256 is not the one in {path}",
                TargetError,
            )
    return share


def _link_error(error: LinkError, folder: RootedPath) -> TargetError:
    where = str(error).partition(" is a symbolic link")[0]
    return TargetError(
        f"{where} is a symbolic link, which may lead to other files of this machine, so nothing was read; if you trust "
        f"it, copy the folder with its files: cp -rL {folder} copy"
    )


def read_shared_records(folder: RootedPath, share: Share) -> pa.Table:
    """Read the table of the records that have targets.

    Args:
        folder: Folder of the share.
        share: Its content.

    Raises:
        TargetError: If it names other files, or is far larger than the targets.
        ManifestError: If it is another table.
    """
    targets = [path for path in share.files if path.startswith(f"{TARGETS_FOLDER}/")]
    records = sum(file_at(folder / path).size() or 0 for path in targets) // _RECORD_BYTES
    path = folder / SHARED_RECORDS
    table = read_table(
        path,
        SHARED_RECORDS_SCHEMA,
        share.files[SHARED_RECORDS],
        ("fetch it again", "fetch it again"),
        most=_ROW_BYTES * (records + 1),
    )
    require(
        table.num_rows <= records,
        f"{path} has {table.num_rows:,} records, and the targets have room for {records:,}; fetch it again",
        TargetError,
    )
    try:
        for shard in table["shard"].unique().to_pylist():
            share.target_path(shard)
    except EntryError as error:
        raise TargetError(f"{folder / SHARE_NAME}: {error}; fetch it again") from error
    return table
