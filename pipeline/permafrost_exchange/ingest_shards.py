"""Shards of a pass whose targets another tool has made: the task that writes one, and the publication of all.

The targets of records are written next to the shards while the pass is made, and each task reads its shard's part.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from time import monotonic
from typing import Any, ClassVar, Protocol

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from permafrost.annotation.stored_views import StoredViews
from permafrost.core.digests import SHORT
from permafrost.core.records import MOVE_FIELD, VIEW_FIELDS, WINDOW_FIELD, escape_key
from permafrost.core.tasks import Executor, ShardResult, Subject, run_shards
from permafrost.storage.files import file_at, remove_partial_files
from permafrost.storage.rooted_paths import RootedPath
from permafrost.store.arrow_files import arrow_sink, map_arrow
from permafrost.store.commit_pass import ConstantLogitsError, commit_pass, write_pass_shard
from permafrost.store.fields import PassFields
from permafrost.store.manifest import MANIFEST_NAME, TEACHERS_FOLDER, describe_excess
from permafrost.store.reader import BACKENDS, Store
from permafrost.store.shards import ShardEntry
from permafrost_exchange.encoding import EncodedTargets
from permafrost_exchange.joining import JoinedTargets
from permafrost_exchange.map_forms import require_possible
from permafrost_exchange.target_reader import ReadRequest, TargetError

logger = logging.getLogger("permafrost.ingest")

JOIN_NAME = "join.arrow"
"""File of a pass that is not finished: number, name and place of each record's target."""
_JOIN_SCHEMA = pa.schema(
    [("number", pa.int64()), ("name", pa.large_string()), ("place", pa.large_string())]
)
_RECORDS_AT_ONCE = 256


class TargetsOfRecords(Protocol):
    """Targets that tasks read for a store's records. Picklable."""

    @property
    def path(self) -> Path:
        """Path of the targets, for messages."""

    @property
    def views(self) -> StoredViews | None:
        """Views that targets are computed of, None for what the files have."""

    def encode(self, request: ReadRequest) -> EncodedTargets:
        """Read the stored form of the targets of a request.

        Raises:
            TargetError: If a file is not what it should be.
        """


@dataclass(frozen=True, kw_only=True)
class WrittenPass:
    """A finished pass of targets that existed before."""

    name: str
    records: int
    """Number of records with targets."""
    written: int
    """Number of those that this call has written."""


@dataclass(frozen=True, kw_only=True)
class IngestShard:
    """Task that reads the targets of a shard's records, and writes their fields and their commit marker."""

    needs_gpu: ClassVar[bool] = False
    store_path: RootedPath
    folder: RootedPath
    targets: TargetsOfRecords
    explainer: dict[str, Any]
    """Entry of the manifest about the maps, empty without maps."""
    fields: PassFields | None = None
    """Fields of the pass, None for a task that only reads."""
    numbers: NDArray[np.int64] | None = None
    """Numbers of the shards of the pass, ascending; None for a task that only reads."""
    fingerprint: str = ""
    origin: str = ""
    """Origin of the values, as in `write_pass_shard`."""

    @property
    def subject(self) -> Subject:
        return Subject(str(self.store_path), self.folder.name)

    def __call__(self, shard: ShardEntry) -> ShardResult[None]:
        started = monotonic()
        assert self.fields is not None
        assert self.numbers is not None
        rows = self.rows_of(shard)
        keys = self.store.index.keys(self.store.rows_of_shard(self._number(shard)).start + rows)
        parts = [
            self.read(shard, rows[start : start + _RECORDS_AT_ONCE])
            for start in range(0, len(rows), _RECORDS_AT_ONCE)
        ]
        if any(part.fields != self.fields.fields for part in parts):
            odd = next(part for part in parts if part.fields != self.fields.fields)
            shown = [f"{spec.name} {spec.dtype} {list(spec.shape)}" for spec in odd.fields]
            raise TargetError(
                f"{self.targets.path}: the targets of shard {shard.name} have {', '.join(shown)}, others "
                f"{', '.join(f'{spec.name} {spec.dtype} {list(spec.shape)}' for spec in self.fields.fields)}; "
                "all have the same"
            )
        names = [spec.name for spec in self.fields.fields]
        values = {name: np.concatenate([part.values[name] for part in parts]) for name in names}
        require_possible(values, self.explainer, str(self.targets.path), self.store.size)
        fidelity = {name: min(part.fidelity[name] for part in parts) for name in parts[0].fidelity}
        if (views := values[names[0]].shape[1]) != self.fields.num_views:
            raise TargetError(
                f"{self.targets.path}: the records of shard {shard.name} have {views} views, others "
                f"{self.fields.num_views}; set format.views= to a number that all have"
            )
        write_pass_shard(
            self.fields,
            int(np.searchsorted(self.numbers, self._number(shard))),
            shard.name,
            keys,
            values,
            fidelity,
            self.fingerprint,
            self.origin,
        )
        return ShardResult(
            name=shard.name, records=len(keys), seconds=monotonic() - started, report=None
        )

    def rows_of(self, shard: ShardEntry) -> NDArray[np.int64]:
        """Return the rows of a shard that have targets, counted from its beginning."""
        rows = self.store.rows_of_shard(self._number(shard))
        return np.flatnonzero(self._join.column(0).slice(rows.start, len(rows)).to_numpy() >= 0)

    def read(self, shard: ShardEntry, rows: NDArray[np.int64]) -> EncodedTargets:
        """Read the targets of some rows of a shard, which have some.

        Raises:
            TargetError: If a file is not what the format says.
        """
        first = self.store.rows_of_shard(self._number(shard)).start
        taken = self._join.take(pa.array(first + rows))
        sizes = self.store.index.take(("height", "width", "orientation"), first + rows)
        names = taken.column(1).to_pylist()
        views = None
        if self.targets.views is not None:
            at = np.searchsorted(self.targets.views.rows_of(self.store, shard), rows)
            drawn = self.targets.views.draw(self.store, shard).views.windows
            assert drawn is not None
            windows = drawn.numpy()[at]
            unmoved = np.tile(np.eye(3, dtype=np.float32)[:2], (*windows.shape[:2], 1, 1, 1))
            views = {WINDOW_FIELD.name: windows, MOVE_FIELD.name: unmoved}
        request = ReadRequest(
            numbers=taken.column(0).to_numpy(),
            names=names,
            places=taken.column(2).to_pylist(),
            heights=sizes["height"].astype(np.int64),
            widths=sizes["width"].astype(np.int64),
            orientations=sizes["orientation"],
            labels=None
            if self.store.index.has_many_labels
            else self.store.index.values("label", first + rows),
            views=views,
        )
        return self.targets.encode(request)

    def _number(self, shard: ShardEntry) -> int:
        return self.store.shards.number_of(shard.name)

    @cached_property
    def store(self) -> Store:
        """Store of the records."""
        return Store(self.store_path)

    @cached_property
    def _join(self) -> pa.RecordBatch:
        with file_at(self.folder / JOIN_NAME).open() as file:
            return map_arrow(file).get_batch(0)

    def __getstate__(self) -> dict[str, Any]:
        opened = ("store", "_join")
        return {name: value for name, value in self.__dict__.items() if name not in opened}


# ---- pass ----------------------------------------------------------------------------------------


def folder_of_pass(store: Store, name: str, fingerprint: str) -> RootedPath:
    """Return the folder of a pass, which keeps the name that it had when it was begun."""
    parent = store.folder / TEACHERS_FOLDER
    existing = file_at(parent).paths(f"*-{fingerprint[:SHORT]}")
    return existing[0] if existing else parent / f"{escape_key(name)}-{fingerprint[:SHORT]}"


def shards_of(store: Store, joined: JoinedTargets) -> list[ShardEntry]:
    """Return the shards that have records with targets; all of them if every record has one."""
    if (joined.numbers >= 0).all():
        return list(store.shards)
    counts = np.add.reduceat(joined.numbers >= 0, store.shards.starts[:-1])
    return [store.shards[number] for number in np.flatnonzero(counts).tolist()]


def _write_join(folder: RootedPath, joined: JoinedTargets) -> None:
    indices = pa.array(joined.numbers, mask=joined.numbers < 0)
    texts = [joined.names.take(indices), joined.places.take(indices)]
    batch = pa.record_batch([pa.array(joined.numbers), *texts], schema=_JOIN_SCHEMA)
    with (
        file_at(folder / JOIN_NAME).open_atomically() as file,
        pa.ipc.new_file(arrow_sink(file), _JOIN_SCHEMA) as writer,
    ):
        writer.write_batch(batch)


@contextmanager
def prepared(folder: RootedPath, joined: JoinedTargets) -> Iterator[None]:
    """Write the join next to the shards. An error of the block leaves nothing of a pass that was not begun.

    Args:
        folder: Folder of the pass.
        joined: Targets of the records.
    """
    has_started = bool(file_at(folder).paths())
    remove_partial_files(folder)
    _write_join(folder, joined)
    try:
        yield
    except BaseException:
        if not has_started:
            _remove_begun(folder)
        raise


def _remove_begun(folder: RootedPath) -> None:
    """Remove a pass that cannot be finished, so that the store is as it was."""
    folders = {folder, folder.parent}
    for path in list(file_at(folder).iter_files()):
        file_at(path).remove()
        while (path := path.parent) not in folders:
            folders.add(path)
    for each in sorted(folders, key=lambda path: len(path.parts), reverse=True):
        file_at(each).remove_folder()


def store_targets(
    task: IngestShard,
    store: Store,
    executor: Executor,
    shards: Sequence[ShardEntry],
    missing: Sequence[ShardEntry],
    description: dict[str, Any],
    made_with: dict[str, str],
    *,
    added: dict[str, Any] | None = None,
    **entries: Any,
) -> int:
    """Write the missing shards of a pass, and its manifest.

    Args:
        task: Task with the fields of the pass.
        store: Store of the records.
        executor: Executor of the task.
        shards: Shards of the pass.
        missing: Those of them that are missing.
        description: Description of the pass, whose fields of the manifest are written.
        made_with: Entry of the manifest, like `added` and `entries`.
        added: Entries of outputs.
        **entries: Agreement, passport and error of moved features.

    Returns:
        The number of records that were written.

    Raises:
        TargetError: If a file is not what it should be, or all logits are the same.
    """
    assert task.fields is not None
    was_committed = file_at(task.folder / MANIFEST_NAME).exists()
    try:
        shared_files = task.fields.create()
        written, _ = run_shards(
            "targets",
            executor,
            task,
            missing,
            lambda result: None,
            sum(shard.records for shard in missing),
        )
        file_at(task.folder / JOIN_NAME).remove()
        commit_pass(
            task.folder,
            shards,
            description,
            task.fingerprint,
            task.fields.fields,
            shared_files,
            made_with,
            added or {},
            **entries,
        )
    except (TargetError, ConstantLogitsError) as error:  # no repeat of the command could finish it
        if not was_committed:
            _remove_begun(task.folder)
        if isinstance(error, TargetError):
            raise
        raise TargetError(
            f"{task.targets.path}: the logits of all records are the same, so they are not targets of a trained teacher"
        ) from None
    return written


def with_fields(
    task: IngestShard,
    backend: str,
    store: Store,
    shards: Sequence[ShardEntry],
    example: EncodedTargets,
    fingerprint: str,
    *,
    is_selection: bool,
) -> IngestShard:
    """Return a task with the fields of its pass.

    Args:
        task: Task that only reads.
        backend: Format of the pass's fields.
        store: Store of the records.
        shards: Shards of the pass.
        example: Targets of a record.
        fingerprint: Fingerprint of the pass.
        is_selection: True if the manifest has a selection, so that readers expect the rows of its largest shard.
    """
    num_views = next(iter(example.values.values())).shape[1]
    if (excess := describe_excess(example.fields, num_views)) is not None:
        raise TargetError(f"{task.targets.path}: a pass cannot have values of this size: {excess}")
    rows = [len(task.rows_of(shard)) for shard in shards]
    fields = BACKENDS[backend](
        task.folder,
        example.fields,
        len(shards),
        max(rows) if is_selection else store.manifest.rows_per_shard,
        num_views,
    )
    logger.info(
        "%s: %s of %d records, into pass %s",
        task.targets.path,
        ", ".join(
            f"{spec.name} {spec.dtype} {'x'.join(map(str, spec.shape))}"
            for spec in example.fields
            if spec.name not in VIEW_FIELDS and not spec.name.endswith("_scale")
        ),
        sum(rows),
        task.folder.name,
    )
    numbers = np.array([store.shards.number_of(shard.name) for shard in shards])
    return replace(task, fields=fields, numbers=numbers, fingerprint=fingerprint)
