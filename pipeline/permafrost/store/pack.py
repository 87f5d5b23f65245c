"""Packing of a source into a store: compare with existing shards, write the missing ones, commit."""

from __future__ import annotations

import hashlib
import json
import logging
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import ClassVar, NamedTuple

import numpy as np
from numpy.typing import NDArray

from permafrost.config.data import DataConfig, FileDataConfig, ImageFileDataConfig
from permafrost.config.store import PrecomputeConfig
from permafrost.core.digests import canonical_json
from permafrost.core.errors import require, shorten
from permafrost.core.json_entries import from_dict
from permafrost.core.records import Source
from permafrost.core.tasks import Executor, ShardResult, Subject, run_shards
from permafrost.storage.files import file_at, remove_partial_files
from permafrost.storage.rooted_paths import RootedPath, user_path
from permafrost.store.commit import (
    DEFAULT_FRAME_SIZE,
    commit_store,
    committed_store,
    missing_image_shards,
    named_classes,
    needs_commit,
    unpacked_shards,
)
from permafrost.store.commit_markers import marker_path
from permafrost.store.image_shards import (
    NAMED_REASONS,
    DamagedRecordsError,
    Packing,
    require_same_shard,
    write_image_shard,
)
from permafrost.store.listing import Listing, remove_listings
from permafrost.store.manifest import (
    TEACHERS_FOLDER,
    DatasetIdentity,
    StoreManifest,
    read_store_manifest,
    write_manifest,
)
from permafrost.store.shard_plan import ShardPlan

logger = logging.getLogger("permafrost.precompute")


class Damages(NamedTuple):
    """Records of a shard that cannot be packed."""

    number: int
    reasons: Sequence[str]
    """Why the first ones cannot."""

    def __str__(self) -> str:
        """Return the reasons."""
        return "; ".join(self.reasons)


@dataclass(frozen=True, kw_only=True)
class PackShard:
    """Task that packs one shard: ShardPlan -> its tar and its commit marker.

    Picklable. It opens nothing until it is called, and running it again writes the same bytes.
    """

    needs_gpu: ClassVar[bool] = False
    store: RootedPath
    source: Source
    packing: Packing
    dataset: DatasetIdentity
    committed: Mapping[str, str] = field(default_factory=dict)
    """SHA-256 of each shard's file if the store was committed before; the shard must have it again."""

    def marker(self, plan: ShardPlan) -> RootedPath:
        """Return the path of a shard's commit marker."""
        return marker_path(self.store, plan.name)

    def is_done(self, plan: ShardPlan) -> bool:
        """Return whether a shard has its commit marker and its tar."""
        return not unpacked_shards(self.store, [plan], self.dataset, self.packing)

    @property
    def subject(self) -> Subject:
        return Subject(str(self.store), "pack")

    def __call__(self, plan: ShardPlan) -> ShardResult[Damages | None]:
        started = time.monotonic()
        try:
            entry = write_image_shard(
                self.store,
                plan,
                self.source,
                self.packing,
                self.dataset.fingerprint,
                self.committed.get(plan.name),
            )
        except DamagedRecordsError as error:  # the driver names those of all shards at once
            return ShardResult(
                name=plan.name,
                records=0,
                seconds=time.monotonic() - started,
                report=Damages(error.count, error.reasons),
            )
        return ShardResult(
            name=entry.name,
            records=entry.records,
            seconds=time.monotonic() - started,
            report=None,
        )


def fingerprint_dataset(
    config: DataConfig, revision: int, listing: Listing, rows: NDArray[np.int64] | None = None
) -> str:
    """Return the fingerprint of a source's options and code, and of every listed record, ordered by key.

    Options that locate the files are left out, so moved data keep their fingerprint.

    Args:
        config: Options of the data.
        revision: Revision of the source's code, which counts changes of what it lists.
        listing: Listing of all records.
        rows: Rows of the records; None for all.
    """
    # Digest of {"data": options, "records": [...], "revision": revision} without holding that text in memory.
    digest = hashlib.sha256(b'{"data":' + canonical_json(config.description) + b',"records":[')
    for place, texts in enumerate(listing.json_by_key(rows)):
        digest.update(b"," if place else b"")
        digest.update(texts)
    digest.update(b'],"revision":' + canonical_json(revision) + b"}")
    return digest.hexdigest()


_IN_PLACE = (
    " (the tars are used in place and must stay where they are, and work resumes by whole tars; data.reference=never "
    "packs copies)"
)


@dataclass(frozen=True, kw_only=True)
class PackPlan:
    """The plan of a store: its source, all of its shards and those that are missing.

    The shards' records are in the listing, which must exist until they are packed.
    """

    path: RootedPath
    source: Source
    classes: tuple[str, ...]
    dataset: DatasetIdentity
    packing: Packing
    shards: list[ShardPlan]
    """Shards of all records, of an append those of the new ones."""
    missing: list[ShardPlan]
    before: StoreManifest | None = None
    """Manifest of the finished store that the shards are appended to."""
    repairs: bool = False
    """True if the shards are those of a generation that has lost some."""

    @property
    def num_records(self) -> int:
        """Number of records of the source."""
        return sum(shard.num_records for shard in self.shards)

    def describe(self) -> str:
        """Describe the store and what of it is missing, in one line."""
        splits: Counter[str] = Counter()
        for shard in self.shards:
            splits[shard.split] += shard.num_records
        counts = ", ".join(f"{split} {count:,}" for split, count in splits.items())
        if self.repairs:
            return f"{len(self.missing):,} shards are lost, of {len(self.shards):,} that were packed together"
        if self.before is not None:
            packed = sum(self.before.records.values())
            return f"{packed:,} records, and {self.num_records:,} new ones ({counts or 'none'})"
        return (
            f"{self.num_records:,} records ({counts}) of {len(self.classes):,} classes in "
            f"{len(self.shards):,} shards, of which {len(self.shards) - len(self.missing):,} are packed"
            f"{_IN_PLACE if any(shard.reference for shard in self.shards) else ''}"
        )


def plan_pack(
    config: PrecomputeConfig,
    path: RootedPath,
    source: Source,
    classes: tuple[str, ...],
    listing: Listing,
    plans: list[ShardPlan],
) -> PackPlan:
    """Compare the store at `path` with the records of the source.

    Args:
        config: Options of the command.
        path: Folder of the store.
        source: Source of the records.
        classes: Names of the classes of the source, from permafrost/sources/source.py, like the next two.
        listing: Listing of all records of the source.
        plans: Shards of all records of the source.

    Raises:
        StoreMismatchError: If the store contains other data or was planned with other options.
    """
    packing = derive_packing(config, source)
    dataset = DatasetIdentity(
        name=source.name, fingerprint=fingerprint_dataset(config.data, source.revision, listing)
    )
    size = config.store.image_size
    return PackPlan(
        path=path,
        source=source,
        classes=classes,
        dataset=dataset,
        packing=packing,
        shards=plans,
        missing=missing_image_shards(path, plans, dataset, packing, classes, size),
    )


def pack(plan: PackPlan, config: PrecomputeConfig, executor: Executor) -> int:
    """Write the shards that the store lacks and commit it.

    Args:
        plan: The plan of the store.
        config: Options of the command.
        executor: Runs the tasks.

    Returns:
        The number of records that were packed now.

    Raises:
        ImageError: If more images cannot be packed than the options allow; RowError for a table.
        StoreMismatchError: If a shard would have other bytes than in the committed store.
    """
    path = plan.path
    appends = plan.before is not None and bool(plan.shards) and not plan.repairs
    if not appends and not plan.missing and not needs_commit(path):
        manifest = read_store_manifest(path)
        if (named := named_classes(manifest, plan.classes)) != manifest.classes:
            write_manifest(path, replace(manifest, classes=named))
            logger.info(
                "the %d classes of %s have names now: %s", len(named), path, shorten(named, 3)
            )
        return 0
    in_use = {file for shard in plan.shards for file in (shard.listing, shard.order) if file}
    remove_partial_files(path, keep=in_use, ignored=(TEACHERS_FOLDER,))
    packed = pack_shards(plan, executor)
    if not plan.repairs:
        commit_packed(plan, config)
    return packed


def pack_shards(plan: PackPlan, executor: Executor) -> int:
    """Write the shards that the store lacks, and return the number of their records.

    Raises:
        ImageError: If images cannot be packed; RowError for a table.
        StoreMismatchError: If a shard would have other bytes than in the committed store.
    """
    path = plan.path
    committed = committed_store(path)
    digests = {} if committed is None else {shard.name: shard.sha256 for shard in committed.shards}
    for shard in plan.missing:  # before any commit marker names a tar at its other place
        if shard.reference is not None and shard.name in digests:
            tar = user_path(shard.reference)
            require_same_shard(tar, shard.name, file_at(tar).sha256(), digests[shard.name])
    results: list[ShardResult[Damages | None]] = []
    task = PackShard(
        store=path,
        source=plan.source,
        packing=plan.packing,
        dataset=plan.dataset,
        committed=digests,
    )
    packed, _ = run_shards(
        "pack",
        executor,
        task,
        plan.missing,
        results.append,
        sum(shard.num_records for shard in plan.missing),
    )
    _check_damages(plan, [result.report for result in results if result.report is not None])
    return packed


def commit_packed(plan: PackPlan, config: PrecomputeConfig) -> None:
    """Commit a store whose shards are all packed.

    Raises:
        ImageError: If more images could not be packed than the options allow; RowError for a table.
    """
    manifest = commit_store(
        plan.path,
        plan.shards,
        plan.dataset,
        classes=plan.classes,
        packing=plan.packing,
        image_size=config.store.image_size,
        rows_per_shard=max(shard.num_records for shard in plan.shards)
        if any(shard.reference for shard in plan.shards) or config.store.shard_size is None
        else config.store.shard_size,
        max_skipped=config.data.max_skipped if isinstance(config.data, FileDataConfig) else 0,
        before=plan.before,
    )
    for entry in manifest.skipped:
        logger.warning("skipped %s", entry["reason"])


# ---- plan that several processes share ---------------------------------------------------------------

PLAN_NAME = ".plan.json"
"""File of the shards of a store that several processes pack, as long as it is not finished."""
_MAX_PLAN_BYTES = 2**28


@dataclass(frozen=True, kw_only=True)
class SharedPlan:
    """Plan of a first packing, which one process has made for all of a job array."""

    origin_sha256: str
    """Digest of the data's origin."""
    dataset: DatasetIdentity
    classes: tuple[str, ...]
    listing: str
    """Name of the listing's file in the store, like the next one."""
    order: str
    """Empty for tars that are used in place."""
    shards: tuple[tuple[str, str, int, int, str], ...]
    """Name, split, start, stop and reference of each shard, empty without a reference."""


def share_plan(plan: PackPlan, origin_sha256: str) -> None:
    """Write a plan for other processes.

    Args:
        plan: Plan of a first packing.
        origin_sha256: Digest of the data's origin.
    """
    first = plan.shards[0]
    shared = SharedPlan(
        origin_sha256=origin_sha256,
        dataset=plan.dataset,
        classes=plan.classes,
        listing=first.listing.name,
        order="" if first.order is None else first.order.name,
        shards=tuple(
            (shard.name, shard.split, shard.start, shard.stop, shard.reference or "")
            for shard in plan.shards
        ),
    )
    file_at(plan.path / PLAN_NAME).write(canonical_json(asdict(shared)))


def remove_plan(path: RootedPath) -> None:
    """Remove the plan and the listings of a store that is packed."""
    file_at(path / PLAN_NAME).remove()
    remove_listings(path)


def shared_plan(
    path: RootedPath,
    config: PrecomputeConfig,
    origin_sha256: str,
    build: Callable[[DataConfig], Source],
) -> PackPlan | None:
    """Read the plan that another process has made of the same data; None if there is none.

    Args:
        path: Folder of the store.
        config: Options of the command.
        origin_sha256: Digest of the data's origin.
        build: Builds the source of the options of data.

    Raises:
        StoreMismatchError: If a shard was packed with other options.
    """
    try:
        values = json.loads(file_at(path / PLAN_NAME).read(_MAX_PLAN_BYTES))
        shared = from_dict(SharedPlan, values)
    except (FileNotFoundError, ValueError):
        return None
    listing, order = path / shared.listing, path / shared.order if shared.order else None
    if shared.origin_sha256 != origin_sha256 or not file_at(listing).is_file():
        return None
    source = build(config.data)
    packing = derive_packing(config, source)
    shards = [
        ShardPlan(position, name, split, start, stop, listing, order, reference or None)
        for position, (name, split, start, stop, reference) in enumerate(shared.shards)
    ]
    return PackPlan(
        path=path,
        source=source,
        classes=shared.classes,
        dataset=shared.dataset,
        packing=packing,
        shards=shards,
        missing=unpacked_shards(path, shards, shared.dataset, packing),
    )


def _check_damages(plan: PackPlan, damages: list[Damages]) -> None:
    """Raise ImageError, or RowError for a table, that names the records of all shards that cannot be packed."""
    if not damages:
        return
    count = sum(damage.number for damage in damages)
    first = sorted(reason for damage in damages for reason in damage.reasons)[:NAMED_REASONS]
    more = f"; and {count - len(first):,} more" if count > len(first) else ""
    raise plan.packing.record_form.failure(
        f"{count:,} {plan.packing.record_form.noun} cannot be {plan.packing.record_form.failed}: "
        f"{'; '.join(first)}{more}. Skip such records with data.on_error=skip, which keeps the packed shards, or "
        f"repair them and delete {plan.path}"
    )


def derive_packing(config: PrecomputeConfig, source: Source) -> Packing:
    """Derive the packing from the config; re-encoded frames need their size before the images are read.

    Raises:
        ConfigError: If options of images are set for a table.
    """
    on_error = config.data.on_error if isinstance(config.data, FileDataConfig) else "stop"
    side = config.store.image_size
    if source.columns is not None:
        require(
            side is None and config.store.format == "original",
            f"store.image_size={side} and store.format={config.store.format} are for images, but "
            f"data={config.data.kind} has rows of a table: leave them null and original",
        )
        return Packing(columns=source.columns, on_error=on_error)
    size = source.frame_size if side is None else (side, side)
    return Packing(
        form=config.store.format,
        size=None if config.store.format == "original" else size or DEFAULT_FRAME_SIZE,
        on_error=on_error,
        bit_range=config.data.bit_range if isinstance(config.data, ImageFileDataConfig) else (),
        boxes_of=config.data.boxes_of
        if isinstance(config.data, ImageFileDataConfig)
        else "upright",
    )
