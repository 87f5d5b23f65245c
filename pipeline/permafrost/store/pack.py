"""Packing of a source into a store: compare with existing shards, write the missing ones, commit."""

from __future__ import annotations

import hashlib
import logging
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar, NamedTuple

import numpy as np
from numpy.typing import NDArray

from permafrost.config.data import DataConfig, FileDataConfig, ImageFileDataConfig
from permafrost.config.store import PrecomputeConfig
from permafrost.core.digests import canonical_json
from permafrost.core.errors import require, shorten
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
)
from permafrost.store.image_shards import (
    NAMED_REASONS,
    DamagedRecordsError,
    Packing,
    require_same_shard,
    write_image_shard,
)
from permafrost.store.listing import Listing
from permafrost.store.manifest import (
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


@dataclass(frozen=True, kw_only=True)
class PackShard:
    """Task that packs one shard: ShardPlan -> its tar and its commit marker.

    Picklable. It opens nothing until it is called, and running it again writes the same bytes.
    """

    needs_gpu: ClassVar[bool] = False
    store: RootedPath
    source: Source
    packing: Packing
    dataset_fingerprint: str
    committed: Mapping[str, str] = field(default_factory=dict)
    """SHA-256 of each shard's file if the store was committed before; the shard must have it again."""

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
                self.dataset_fingerprint,
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


def _name_classes(path: RootedPath, classes: tuple[str, ...]) -> None:
    """Give names to the classes of a finished store that are numbers. Neither its records nor its passes change."""
    manifest = read_store_manifest(path)
    if (named := named_classes(manifest, classes)) != manifest.classes:
        write_manifest(path, replace(manifest, classes=named))
        logger.info("the %d classes of %s have names now: %s", len(named), path, shorten(named, 3))


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
        _name_classes(path, plan.classes)
        return 0
    in_use = {file for shard in plan.shards for file in (shard.listing, shard.order) if file}
    remove_partial_files(path, keep=in_use)
    committed = committed_store(path)
    digests = {} if committed is None else {shard.name: shard.sha256 for shard in committed.shards}
    for shard in plan.missing:  # before any commit marker names a tar at its other place
        if shard.reference is not None and shard.name in digests:
            tar = user_path(shard.reference)
            require_same_shard(tar, shard.name, file_at(tar).sha256(), digests[shard.name])
    results: list[ShardResult[Damages | None]] = []
    packed, _ = run_shards(
        "pack",
        executor,
        PackShard(
            store=path,
            source=plan.source,
            packing=plan.packing,
            dataset_fingerprint=plan.dataset.fingerprint,
            committed=digests,
        ),
        plan.missing,
        results.append,
        sum(shard.num_records for shard in plan.missing),
    )
    _check_damages(plan, [result.report for result in results if result.report is not None])
    if plan.repairs:
        return packed
    manifest = commit_store(
        path,
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
    return packed


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
