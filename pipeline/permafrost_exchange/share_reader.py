"""A shared pass (share_format.py) in another store, whose records are found by the digests of their images.

The fields are taken as they are, bit for bit. In a store that was packed from the same data in the same way, the pass
has the fingerprint that it had. Elsewhere it has another one, which covers the old one and the store.
"""

from __future__ import annotations

import io
import logging
from collections import defaultdict
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from permafrost.config.explainers import EXPLAINERS
from permafrost.config.version import __version__
from permafrost.core.digests import sha256_json
from permafrost.core.errors import FileError, printable, quote, require
from permafrost.core.progress import progress
from permafrost.core.records import NO_LABEL, PARTNER_FIELD, FieldSpec, describe_other_names
from permafrost.core.tasks import Executor
from permafrost.storage.files import file_at
from permafrost.storage.rooted_paths import RootedPath, names_in
from permafrost.store.codecs import decode_npy
from permafrost.store.commit import needs_commit
from permafrost.store.commit_pass import missing_pass_shards
from permafrost.store.entries import ManifestError
from permafrost.store.fields import in_range
from permafrost.store.image_decoding import ImageError
from permafrost.store.manifest import MAX_RECORD_BYTES, read_pass_manifest
from permafrost.store.projections import Projection, read_projection, write_projection
from permafrost.store.reader import Store
from permafrost_exchange.class_orders import order_classes, reorder_classes
from permafrost_exchange.encoding import EncodedTargets
from permafrost_exchange.formats.tar_targets import iter_samples
from permafrost_exchange.ingest_shards import (
    IngestShard,
    WrittenPass,
    folder_of_pass,
    prepared,
    shards_of,
    store_targets,
    with_fields,
)
from permafrost_exchange.ingestion import expected_records, require_covered, selection_of
from permafrost_exchange.joining import JoinedTargets, hex_column
from permafrost_exchange.options import AttachConfig
from permafrost_exchange.share_format import (
    EXPLAINER_PACKAGE,
    PLUGINS_FOLDER,
    SHARE_NAME,
    TARGETS_FOLDER,
    Share,
    read_share,
    read_shared_records,
)
from permafrost_exchange.share_writer import pixel_digests
from permafrost_exchange.target_reader import ReadRequest, TargetError
from permafrost_sources.tar_members import Member, read_member

logger = logging.getLogger("permafrost.attach")

_LISTED_TARS = 16
_DESCRIBED = ("teacher", "views", "explainer", "temperatures")
"""Entries of a pass that do not depend on the store."""
_OF_STORE = ("dataset_fingerprint", "store_fingerprint", "selection", "backend")
"""Entries that do."""


@dataclass(frozen=True)
class SharedFields:
    """Fields of a shared pass by shard and key, in their stored form."""

    folder: RootedPath
    fields: tuple[FieldSpec, ...]
    num_views: int
    num_classes: int
    order: NDArray[np.int64] | None = None
    """Class here of each class there, i64 [K]; None if they are the same."""
    views: ClassVar[None] = None

    @property
    def path(self) -> Path:
        """Folder of the share, for messages."""
        return Path(str(self.folder))

    def encode(self, request: ReadRequest) -> EncodedTargets:
        """Read the fields of a request, whose places are <shard>/<key>.

        Raises:
            TargetError: If a member is missing, is not what share.json says, or has a value that its field cannot have.
        """
        values: dict[str, NDArray[Any]] = {
            spec.name: np.empty((len(request.names), self.num_views, *spec.shape), spec.dtype)
            for spec in self.fields
        }
        rows_of = defaultdict(list)
        for row, place in enumerate(request.places):
            shard, _, key = place.partition("/")
            rows_of[shard].append((row, key))
        for shard, rows in rows_of.items():
            path = self.folder / TARGETS_FOLDER / f"{shard}.tar"
            members = _members_of(path, *file_at(path).stamp())
            try:
                with file_at(path).open() as file:
                    for row, key in rows:
                        self._read_record(values, row, key, members.get(key, {}), file, path)
            except (ManifestError, ImageError, FileError) as error:
                raise TargetError(
                    f"{str(error).partition(';')[0]}; fetch the folder again"
                ) from error
        for spec in self.fields:
            odd = np.flatnonzero(~in_range(spec, values[spec.name], self.num_classes))
            if len(odd):
                raise TargetError(
                    f"{self.folder}: {spec.name} of {request.places[odd[0]]} has values that are not finite or that "
                    "the field cannot have; nothing was attached"
                )
        if self.order is not None:
            values = reorder_classes(values, self.fields, self.order)
        return EncodedTargets(self.fields, values, {})

    def _read_record(
        self,
        values: dict[str, NDArray[Any]],
        row: int,
        key: str,
        members: dict[str, Member],
        file: io.FileIO,
        path: RootedPath,
    ) -> None:
        """Read the fields of a record into a row. Raises ManifestError or ImageError for another member."""
        for spec in self.fields:
            name = f"{spec.name}.npy"
            where = f"{path}: {key}.{name}"
            require(name in members, f"{where} is missing", ManifestError)
            data = read_member(file, members[name], where, MAX_RECORD_BYTES)
            shape = (self.num_views, *spec.shape)
            values[spec.name][row] = decode_npy(data, spec.dtype, shape, where)


@lru_cache(maxsize=_LISTED_TARS)
def _members_of(path: RootedPath, size: int, changed: int | str) -> dict[str, dict[str, Member]]:
    """Return the members of each record of a tar."""
    return dict(iter_samples(path))


@dataclass(frozen=True, kw_only=True)
class AttachedPass(WrittenPass):
    """A shared pass in another store."""

    joined_by: str
    """Digests by which records were found: of files or of pixels."""


def attach_pass(config: AttachConfig, store: Store, executor: Executor) -> AttachedPass:
    """Write a shared pass into a store of the same images.

    Raises:
        TargetError: If the folder is damaged, or the images of the store are others.
    """
    folder = RootedPath(Path(config.path).absolute())
    shared = read_share(folder)
    joined, labels, how = _join(folder, store, shared)
    require_covered(
        store,
        joined,
        expected_records(store, joined),
        config.missing,
        f"by the SHA-256 of their {how}",
        "Targets belong to the pixels of an image; attach them to a store of the same images",
    )
    if (kind := shared.explainer.get("kind")) is not None and kind not in EXPLAINERS:
        code = next((path for path in shared.files if path.startswith(f"{PLUGINS_FOLDER}/")), "")
        advice = (
            f"read {code}, and name it with 'plugins=[{folder / code}]'"
            if code
            else f"install {shared.made_with.get(EXPLAINER_PACKAGE, 'the plug-in that adds it')}"
        )
        raise TargetError(
            f"{folder}: its maps were made by explainer {quote(kind)}, which is not among {', '.join(EXPLAINERS)}; "
            f"{printable(advice)}, as students are explained in the same way"
        )
    order = _order_of(folder, shared, joined, labels, store)
    same_store = (shared.dataset_fingerprint, shared.store_fingerprint) == (
        store.manifest.dataset.fingerprint,
        store.manifest.fingerprint,
    )
    require(
        not any(spec.name == PARTNER_FIELD.name for spec in shared.fields) or same_store,
        f"{folder}: its views are mixtures, which name their second record by its place in a shard, and the shards "
        f"of {store.path} are others; pack the store from the same data with the same options",
        TargetError,
    )
    description = {
        **{name: getattr(shared, name) for name in _DESCRIBED},
        "dataset_fingerprint": store.manifest.dataset.fingerprint,
        "store_fingerprint": store.manifest.fingerprint,
        "selection": shared.selection if same_store else selection_of(joined),
        "backend": config.store.backend,
    }
    is_same = same_store and shared.backend == config.store.backend and order is None
    covered = {"attached": shared.fingerprint, **{name: description[name] for name in _OF_STORE}}
    if order is not None:
        covered["classes"] = order.tolist()
    fingerprint = shared.fingerprint if is_same else sha256_json(covered)
    target = folder_of_pass(store, shared.pass_name, fingerprint)
    shards = shards_of(store, joined)
    origin = f"the share {file_at(folder / SHARE_NAME).sha256()[:16]}"
    missing = missing_pass_shards(target, shards, origin)
    records = int((joined.numbers >= 0).sum())
    if not missing and not needs_commit(target):
        _require_same(folder, shared, description, target)
        logger.info("pass %s is complete", target.name)
        return AttachedPass(name=target.name, records=records, written=0, joined_by=how)
    source = SharedFields(
        folder, shared.fields, shared.num_views, int(shared.teacher["classes"]), order
    )
    with prepared(target, joined):
        task = IngestShard(
            store_path=store.folder,
            folder=target,
            targets=source,
            explainer=shared.explainer,
            origin=origin,
        )
        task = with_fields(
            task,
            config.store.backend,
            store,
            shards,
            task.read(shards[0], task.rows_of(shards[0])[:1]),
            fingerprint,
            is_selection=description["selection"] is not None,
        )
        specs = {spec.name: spec for spec in shared.fields}
        for field, path in shared.projections.items():
            write_projection(target, field, _projection(folder / path, specs[field]))
    written = store_targets(
        task,
        store,
        executor,
        shards,
        missing,
        description,
        {**shared.made_with, "attached_by": f"permafrost {__version__}"},
        added=shared.added,
        fidelity=shared.fidelity,
        agreement=shared.agreement,
        moved_features=shared.moved_features,
        passport=shared.passport,
    )
    return AttachedPass(name=target.name, records=records, written=written, joined_by=how)


def _require_same(
    folder: RootedPath, shared: Share, description: dict[str, Any], target: RootedPath
) -> None:
    """Raise TargetError if a finished pass has the fingerprint of a shared one, and is another."""
    manifest = read_pass_manifest(target)
    if differing := [
        name
        for name, value in [*description.items(), ("fields", shared.fields)]
        if names_in(getattr(manifest, name)) != names_in(value)
    ]:
        raise TargetError(
            f"{folder / SHARE_NAME} has the fingerprint of {target.name} in this store and another "
            f"{', '.join(differing)}, so one of the two was changed by hand; nothing was attached"
        )


def _projection(path: RootedPath, spec: FieldSpec) -> Projection:
    """Read the projection of a field of a share. Raises TargetError if it is invalid, or of another field."""
    try:
        projection = read_projection(path)
    except ManifestError as error:
        raise TargetError(f"{str(error).partition(';')[0]}; fetch the folder again") from error
    components = len(projection.components)
    require(
        len(spec.shape) == 3 + spec.mirrored and components == spec.shape[int(spec.mirrored)],
        f"{path} has {components} components, and {spec.name} has the shape {list(spec.shape)}; fetch the folder "
        "again",
        TargetError,
    )
    return projection


# ---- join ----------------------------------------------------------------------------------------


def _order_of(
    folder: RootedPath,
    shared: Share,
    joined: JoinedTargets,
    labels: NDArray[np.int32],
    store: Store,
) -> NDArray[np.int64] | None:
    """Find the class here of each class of the share, None if they are the same.

    Raises:
        TargetError: If nothing says it, or labels contradict.
    """
    there, known = list(shared.classes), store.manifest.classes_of(len(shared.classes))
    here = list(known or store.manifest.classes)
    if shared.teacher["classes"] != len(there):  # columns of other classes than those of the data
        return None
    if len(here) != len(there):
        raise TargetError(
            f"{folder}: its classes are others: {describe_other_names(there, here)} ({store.path}), so a column of the "
            "targets would mean another class; attach to a store of the same classes"
        )
    rows = np.flatnonzero(joined.numbers >= 0)
    many = store.index.has_many_labels
    labels_here = np.full(len(rows), NO_LABEL) if many else store.index.values("label", rows)
    return order_classes(there, here, (labels[joined.numbers[rows]], labels_here), str(folder))


def _join(
    folder: RootedPath, store: Store, shared: Share
) -> tuple[JoinedTargets, NDArray[np.int32], str]:
    """Find the target of each record by its image: of the same key where there is one, and of any equal image.

    Returns:
        The targets, their labels i32 [targets], and the digests by which they were found.
    """
    table = read_shared_records(folder, shared)
    labels = table["label"].to_numpy()
    table = table.drop_columns("label")
    columns = {
        name: table[name].combine_chunks().cast(pa.large_string()) for name in table.column_names
    }
    places = pc.binary_join_element_wise(
        columns["shard"], columns["key"], pa.scalar("/", pa.large_string())
    )
    keys = store.index.key_column(np.arange(store.index.num_rows))
    files = hex_column(store.index.image_digests())
    numbers = _match(files, keys, columns["image_sha256"], columns["key"])
    how = "files"
    if (numbers < 0).any() and pc.any(pc.not_equal(columns["pixels_sha256"], "")).as_py():
        pixels = _pixels_of(store)
        numbers, how = _match(pixels, keys, columns["pixels_sha256"], columns["key"]), "pixels"
    if not (matched := len(np.unique(numbers[numbers >= 0]))):
        raise TargetError(
            f"{folder} has targets of {len(places):,} images of {shared.dataset}, and {store.path} has none of "
            f"them, by the SHA-256 of their {how}; targets belong to the pixels of an image"
            + (
                ""
                if how == "pixels"
                else ". If its files were written anew, share with pixels=true"
            )
        )
    return JoinedTargets(numbers, columns["key"], places, len(places) - matched), labels, how


def _match(
    records: pa.Array, keys: pa.Array, targets: pa.Array, target_keys: pa.Array
) -> NDArray[np.int64]:
    both = [
        pc.binary_join_element_wise(*pair, pa.scalar(" ", pa.large_string()))
        for pair in ((records, keys), (targets, target_keys))
    ]
    exact = pc.index_in(both[0], value_set=both[1])
    numbers = pc.coalesce(exact, pc.index_in(records, value_set=targets)).fill_null(-1)
    return np.asarray(numbers.to_numpy(zero_copy_only=False).astype(np.int64))


def _pixels_of(store: Store) -> pa.Array:
    """Return the SHA-256 of the pixels of all records."""
    parts = []
    with progress("pixels", total=store.index.num_rows, unit="record") as display:
        for entry in store.shards:
            rows = np.arange(entry.records)
            parts.append(pa.array(pixel_digests(store, entry, rows), pa.large_string()))
            display.update(entry.records)
    return pa.concat_arrays(parts)
