"""A pass of targets that another tool has made: identity, join with the records, shards and publication.

The pass is like one that precompute has written, so all that reads passes reads it. Its fingerprint covers the bytes of
the targets' files, the options of their format and the store. The names of the targets and the join are written beside
the shards while the pass is made, and tasks read the part of their shard.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from time import monotonic
from typing import Any, ClassVar, NamedTuple, Protocol

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from permafrost.annotation.pass_identity import fingerprint_pass
from permafrost.annotation.stored_views import StoredViews, plan_stored_views
from permafrost.config.exchange import IngestConfig
from permafrost.config.options import Role, is_left_out, options_of, resolve_implementation
from permafrost.config.target_formats import TargetFormatConfig, TargetFrame
from permafrost.config.version import __version__
from permafrost.core.digests import SHORT
from permafrost.core.errors import ConfigError, require
from permafrost.core.progress import say_if_slow
from permafrost.core.records import VIEW_FIELDS, escape_key
from permafrost.core.tasks import Executor, ShardResult, run_shards
from permafrost.exchange.encoding import EncodedTargets, encode_targets
from permafrost.exchange.joining import JoinedTargets, join_targets
from permafrost.exchange.target_reader import ReadRequest, TargetError, TargetForm, TargetReader
from permafrost.storage.files import (
    is_file,
    list_folder,
    open_atomically,
    open_regular,
    read_regular,
    remove_file,
    remove_partial_files,
    sha256_file,
    write_atomically,
)
from permafrost.storage.rooted_paths import RootedPath
from permafrost.store.arrow_files import arrow_sink, map_arrow
from permafrost.store.commit import ORIGIN_NAME, needs_commit
from permafrost.store.commit_pass import (
    ConstantLogitsError,
    commit_pass,
    missing_pass_shards,
    write_pass_shard,
)
from permafrost.store.fields import PassFields
from permafrost.store.manifest import CANONICAL_VIEW, INGESTED, TEACHERS_FOLDER, Passport
from permafrost.store.reader import BACKENDS, Store
from permafrost.store.shards import ShardEntry

logger = logging.getLogger("permafrost.ingest")

JOIN_NAME = "join.arrow"
"""File of a pass that is not finished: place and name of each record's target."""
_JOIN_SCHEMA = pa.schema(
    [("number", pa.int64()), ("name", pa.large_string()), ("place", pa.large_string())]
)
_SHOWN = 3
_RECORDS_AT_ONCE = 256


# ---- targets -------------------------------------------------------------------------------------


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


class IngestedTargets(NamedTuple):
    """Targets in the format of another tool, decided by the options."""

    config: TargetFormatConfig
    """Options of the format, with its frame."""
    reader: TargetReader
    form: TargetForm
    views: StoredViews | None
    """Views that targets are computed of, None for what the format stores."""

    @property
    def path(self) -> Path:
        """Path of the targets."""
        return self.reader.path

    def encode(self, request: ReadRequest) -> EncodedTargets:
        """Read the stored form of the targets of a request."""
        arrays = self.reader.read(request)
        return encode_targets(arrays, request.names, self.form, self.config, str(self.path))


def open_targets(config: IngestConfig, store: Store) -> IngestedTargets:
    """Open the targets of the options.

    Raises:
        ConfigError: If the options do not fit the format.
        TargetError: If the files are not what the format says.
    """
    require(
        store.form.has_places,
        f"store.path={store.path} has rows of a table, and targets of other tools are of images",
    )
    options = config.format
    reader = resolve_implementation(type(options))(options, Path(config.path).absolute())
    form = reader.form()
    frame = options.frame or form.frame
    if frame is None:
        raise ConfigError(
            f"format.frame is not set, and files of format={options.kind} do not say which part of each image the "
            "teacher received; set it to full, or to center_crop with format.crop_fraction=, or to unknown"
        )
    require(
        form.operations is None or frame == "full",
        f"format.frame={frame}: the views of format={options.kind} are views of whole images; leave it out",
    )
    for remark in form.remarks:
        logger.info("format=%s: %s", options.kind, remark)
    return IngestedTargets(
        replace(options, frame=frame), reader, form, _views(config, store, reader)
    )


def _views(config: IngestConfig, store: Store, reader: TargetReader) -> StoredViews | None:
    """Plan the views that targets are computed of."""
    if config.views.kind == "canonical":
        return None
    require(
        reader.crops_targets,
        f"views={config.views.kind}: files of format={config.format.kind} have targets of certain views, and say "
        "nothing of others; leave views= out",
    )
    augment = config.augment
    kinds = [each.kind for each in augment.operations if each.is_drawn]
    odd = [kind for kind in kinds if kind not in ("pad_crop", "resized_crop", "horizontal_flip")]
    require(
        not odd,
        f"augment has {', '.join(odd)}, which targets of format={config.format.kind} cannot follow: they follow crops "
        "and horizontal flips; choose augment=resized_crop_flip",
    )
    return plan_stored_views(store, config.views, augment, config.split, config.subset, 1)


def _describe_format(options: TargetFormatConfig) -> dict[str, Any]:
    """Return the options that determine what targets mean. Files that are named are part of the digest."""
    return {
        option.name: getattr(options, option.name)
        for option in options_of(type(options))
        if Role.FILE not in option.roles and not is_left_out(option, getattr(options, option.name))
    }


# ---- identity of the files -----------------------------------------------------------------------


def digest_files(targets: IngestedTargets, store: Store) -> tuple[str, str]:
    """Return the digest of all files of targets by name and bytes, and a stamp that changes with their times.

    Passes note both, so that files with a known stamp are not read again.
    """
    stamp, paths = hashlib.sha256(), targets.reader.files
    for path in paths():
        status = path.stat()
        name = _name_of(path, targets.reader)
        stamp.update(f"{name}\n{status.st_size}\n{status.st_mtime_ns}\n".encode())
    for folder in list_folder(store.folder / TEACHERS_FOLDER):
        if not is_file(folder / ORIGIN_NAME):
            continue
        noted = read_regular(folder / ORIGIN_NAME, 4096).decode(errors="replace").split()
        if len(noted) == 2 and noted[0] == stamp.hexdigest():
            return noted[1], stamp.hexdigest()
    digest = hashlib.sha256()
    with say_if_slow(logger, f"reading {targets.reader.path} for its digest ..."):
        for path in paths():
            digest.update(f"{_name_of(path, targets.reader)}\n{sha256_file(path)}\n".encode())
    return digest.hexdigest(), stamp.hexdigest()


def _name_of(path: Path, reader: TargetReader) -> str:
    folder = reader.path if reader.path.is_dir() else reader.path.parent
    return path.relative_to(folder).as_posix() if path.is_relative_to(folder) else path.name


# ---- shards --------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class IngestShard:
    """Task that reads the targets of a shard's records, and writes their fields and their receipt."""

    needs_gpu: ClassVar[bool] = False
    store_path: RootedPath
    folder: RootedPath
    targets: TargetsOfRecords
    fields: PassFields | None = None
    """Fields of the pass, None for a task that only reads."""
    numbers: NDArray[np.int64] | None = None
    """Numbers of the shards of the pass, ascending; None for a task that only reads."""
    fingerprint: str = ""

    def __call__(self, shard: ShardEntry) -> ShardResult:
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
            shown = [f"{s.name} {s.dtype} {list(s.shape)}" for s in odd.fields]
            raise TargetError(
                f"{self.targets.path}: the targets of shard {shard.name} have {', '.join(shown)}, others "
                f"{', '.join(f'{s.name} {s.dtype} {list(s.shape)}' for s in self.fields.fields)}; all have the same"
            )
        names = [spec.name for spec in self.fields.fields]
        values = {name: np.concatenate([part.values[name] for part in parts]) for name in names}
        fidelity = {name: min(part.fidelity[name] for part in parts) for name in parts[0].fidelity}
        views = values[names[0]].shape[1]
        if views != self.fields.num_views:
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
        )
        return ShardResult(name=shard.name, records=len(keys), seconds=monotonic() - started)

    def rows_of(self, shard: ShardEntry) -> NDArray[np.int64]:
        """Return the rows of a shard that have targets, counted from its beginning."""
        rows = self.store.rows_of_shard(self._number(shard))
        numbers = self._join.column(0).slice(rows.start, len(rows)).to_numpy()
        covered: NDArray[np.int64] = np.flatnonzero(numbers >= 0)
        return covered

    def read(self, shard: ShardEntry, rows: NDArray[np.int64]) -> EncodedTargets:
        """Read the targets of some rows of a shard, which have some.

        Raises:
            TargetError: If a file is not what the format says.
        """
        first = self.store.rows_of_shard(self._number(shard)).start
        taken = self._join.take(pa.array(first + rows))
        sizes = self.store.index.take(("height", "width"), first + rows)
        names = taken.column(1).to_pylist()
        views = None
        if self.targets.views is not None:
            drawn = self.targets.views.draw(self.store, shard).matrices.numpy()
            covered = self.targets.views.rows_of(self.store, shard)
            views = drawn[np.searchsorted(covered, rows)]
        request = ReadRequest(
            numbers=taken.column(0).to_numpy(),
            names=names,
            places=taken.column(2).to_pylist(),
            heights=sizes["height"].astype(np.int64),
            widths=sizes["width"].astype(np.int64),
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
        with open_regular(self.folder / JOIN_NAME) as file:
            return map_arrow(file).get_batch(0)

    def __getstate__(self) -> dict[str, Any]:
        opened = ("store", "_join")
        return {name: value for name, value in self.__dict__.items() if name not in opened}


# ---- pass ----------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class IngestedPass:
    """A finished pass of another tool's targets."""

    name: str
    records: int
    """Number of records with targets."""
    written: int
    """Number of those that this call has written."""
    without_record: int
    """Number of targets that are of no record."""
    passport: Passport | None


def ingest_targets(
    config: IngestConfig,
    store: Store,
    executor: Executor,
    check: Callable[[IngestShard, IngestedTargets, Sequence[ShardEntry]], Passport] | None = None,
) -> IngestedPass:
    """Write a pass of targets that exist, or finish one.

    Args:
        config: Options of the command.
        store: Store of the records.
        executor: Executor of the work.
        check: Compares targets with a teacher before they are stored, None for no comparison.

    Raises:
        ConfigError: If the options do not fit the files or the store.
        TargetError: If the files are not what their format says, or do not fit the records.
    """
    targets = open_targets(config, store)
    digest, stamp = digest_files(targets, store)
    with say_if_slow(logger, "joining the names of targets with the records ..."):
        kind = config.format.join or type(config.format).joins[0]
        listing = targets.reader.listing()
        joined = join_targets(
            store, listing, kind, config.format.split, repeats=targets.form.repeats
        )
        joined = _covered(joined, targets, store, config, kind)
    description = _describe_pass(config, store, targets, digest, joined)
    fingerprint = fingerprint_pass(description)
    existing = list_folder(store.folder / TEACHERS_FOLDER, f"*-{fingerprint[:SHORT]}")
    name = escape_key(config.name or config.format.kind)
    folder = (
        existing[0]
        if existing
        else store.folder / TEACHERS_FOLDER / f"{name}-{fingerprint[:SHORT]}"
    )
    shards = shards_of(store, joined)
    missing = missing_pass_shards(folder, shards)
    records = int((joined.numbers >= 0).sum())
    if not missing and not needs_commit(folder):
        passport = store.open_pass(
            folder.name, stored_views=description["views"]["sampler"] != CANONICAL_VIEW
        ).manifest.passport
        logger.info("pass %s is complete", folder.name)
        return IngestedPass(
            name=folder.name,
            records=records,
            written=0,
            without_record=joined.without_record,
            passport=passport,
        )
    with prepared(folder, joined):
        task = IngestShard(store_path=store.folder, folder=folder, targets=targets)
        first = task.read(shards[0], task.rows_of(shards[0])[:1])
        description = _complete(description, targets, first)
        task = with_fields(task, config.store.backend, store, shards, first, fingerprint)
        passport = None if check is None else check(task, targets, shards)
    written = store_targets(
        task,
        store,
        executor,
        shards,
        missing,
        description,
        {"permafrost": __version__, "targets": Path(config.path).name},
        origin=f"{stamp}\n{digest}\n".encode(),
        passport=passport,
    )
    return IngestedPass(
        name=folder.name,
        records=records,
        written=written,
        without_record=joined.without_record,
        passport=passport,
    )


@contextmanager
def prepared(folder: RootedPath, joined: JoinedTargets) -> Iterator[None]:
    """Write the join beside the shards. An error of the block leaves nothing of a pass that was not begun.

    Args:
        folder: Folder of the pass.
        joined: Targets of the records.
    """
    is_begun = bool(list_folder(folder))
    remove_partial_files(folder)
    _write_join(folder, joined)
    try:
        yield
    except BaseException:
        if not is_begun:
            remove_file(folder / JOIN_NAME)
            if not folder.is_remote:
                with suppress(OSError):
                    Path(str(folder)).rmdir()
        raise


def store_targets(
    task: IngestShard,
    store: Store,
    executor: Executor,
    shards: Sequence[ShardEntry],
    missing: Sequence[ShardEntry],
    description: dict[str, Any],
    made_with: dict[str, str],
    *,
    origin: bytes,
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
        origin: Content of the file that says what the pass was made from.
        added: Entries of payloads.
        **entries: Agreement, passport and error of moved features.

    Returns:
        The number of records that were written.

    Raises:
        TargetError: If a file is not what it should be, or all logits are the same.
    """
    assert task.fields is not None
    shared_files = task.fields.create()
    written, _ = run_shards("targets", executor, task, missing, lambda result: None)
    write_atomically(task.folder / ORIGIN_NAME, origin)
    remove_file(task.folder / JOIN_NAME)
    try:
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
    except ConstantLogitsError:
        raise TargetError(
            f"{task.targets.path}: the logits of all records are the same; these are no targets of a trained teacher"
        ) from None
    return written


def with_fields(
    task: IngestShard,
    backend: str,
    store: Store,
    shards: Sequence[ShardEntry],
    example: EncodedTargets,
    fingerprint: str,
) -> IngestShard:
    """Return a task with the fields of its pass.

    Args:
        task: Task that only reads.
        backend: Format of the pass's fields.
        store: Store of the records.
        shards: Shards of the pass.
        example: Targets of a record.
        fingerprint: Fingerprint of the pass.
    """
    num_views = next(iter(example.values.values())).shape[1]
    rows = [len(task.rows_of(shard)) for shard in shards]
    covers_all = sum(rows) == store.index.num_rows
    fields = BACKENDS[backend](
        task.folder,
        example.fields,
        len(shards),
        store.manifest.rows_per_shard if covers_all else max(rows),
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


def _covered(
    joined: JoinedTargets,
    targets: IngestedTargets,
    store: Store,
    config: IngestConfig,
    kind: str,
) -> JoinedTargets:
    """Return the join for the records of the pass, once it is sure that none of their split is missing."""
    if targets.views is not None:  # views of a selection
        chosen = np.zeros(len(joined.numbers), bool)
        chosen[np.asarray(targets.views.rows)] = True
        joined = joined._replace(numbers=np.where(chosen, joined.numbers, -1))
        expected = chosen
    else:
        expected = expected_records(store, joined)
    require_covered(
        store,
        joined,
        expected,
        config.missing,
        f"by format.join={kind}",
        "Correct format.join= or path=",
    )
    if kind == "position":
        logger.warning(
            "targets and records are joined by their order, which nothing proves but teacher=, the network that made "
            "them"
        )
    return joined


def expected_records(store: Store, joined: JoinedTargets) -> NDArray[np.bool_]:
    """Return which records should have targets: those of splits of which any has one."""
    expected = np.zeros(len(joined.numbers), bool)
    for numbers in store.shards.splits.values():
        rows = np.concatenate([np.asarray(store.rows_of_shard(int(n))) for n in numbers])
        expected[rows] = bool((joined.numbers[rows] >= 0).any())
    return expected


def require_covered(
    store: Store,
    joined: JoinedTargets,
    expected: NDArray[np.bool_],
    missing: str | None,
    how: str,
    advice: str,
) -> None:
    """Check that records have targets, or list those that have none.

    Args:
        store: Store of the records.
        joined: Targets of its records.
        expected: True for records that should have one, [records].
        missing: File to which the keys of records without targets are written, None to stop at them.
        how: Rule of the join, for messages.
        advice: Way out, for messages.

    Raises:
        TargetError: If there are records without targets, and no file to list them.
    """
    lacking = np.flatnonzero(expected & (joined.numbers < 0))
    if len(lacking) and missing is None:
        raise TargetError(
            f"{len(lacking):,} of {int(expected.sum()):,} records have no target, {how}: "
            f"{', '.join(store.index.keys(lacking[:_SHOWN]))}; {joined.without_record:,} of {len(joined.names):,} "
            f"targets are of no record. {advice}, or set missing=missing.txt to list these records there and go on "
            "without them"
        )
    if len(lacking):
        assert missing is not None
        text = "".join(f"{key}\n" for key in store.index.keys(lacking))
        write_atomically(Path(missing), text.encode())
        logger.warning(
            "%d records without targets are listed in %s; students can read the others only",
            len(lacking),
            missing,
        )
    if joined.without_record:
        logger.warning(
            "%d of %d targets are of no record, and left out",
            joined.without_record,
            len(joined.names),
        )


def shards_of(store: Store, joined: JoinedTargets) -> list[ShardEntry]:
    """Return the shards that have records with targets; all of them if every record has one."""
    if (joined.numbers >= 0).all():
        return list(store.shards)
    counts = np.add.reduceat(joined.numbers >= 0, store.shards.starts[:-1])
    return [store.shards[number] for number in np.flatnonzero(counts).tolist()]


def _write_join(folder: RootedPath, joined: JoinedTargets) -> None:
    indices = pa.array(joined.numbers, mask=joined.numbers < 0)
    texts = [joined.names.take(indices), joined.places.take(indices)]
    columns = [pa.array(joined.numbers), *texts]
    batch = pa.record_batch(columns, schema=_JOIN_SCHEMA)
    with (
        open_atomically(folder / JOIN_NAME) as file,
        pa.ipc.new_file(arrow_sink(file), _JOIN_SCHEMA) as writer,
    ):
        writer.write_batch(batch)


def selection_of(joined: JoinedTargets) -> dict[str, Any] | None:
    """Describe which records have targets, None for all."""
    if (joined.numbers >= 0).all():
        return None
    covered = np.flatnonzero(joined.numbers >= 0)
    rows = hashlib.sha256(covered.astype("<i8").tobytes()).hexdigest()
    return {"records": len(covered), "rows_sha256": rows}


def _describe_pass(
    config: IngestConfig,
    store: Store,
    targets: IngestedTargets,
    digest: str,
    joined: JoinedTargets,
) -> dict[str, Any]:
    """Describe what the fingerprint covers, except what follows from it and the files."""
    frame: TargetFrame | None = targets.config.frame
    described = _describe_format(targets.config)
    kind = described.pop("kind")
    views: dict[str, Any] = {"count": 1, "sampler": CANONICAL_VIEW, "seed": 0}
    selection = selection_of(joined)
    if targets.views is not None:
        views, selection = targets.views.describe()
    elif targets.form.operations is not None:
        views = {"count": 0, "sampler": kind, "seed": 0, "operations": [*targets.form.operations]}
    return {
        "dataset_fingerprint": store.manifest.dataset.fingerprint,
        "store_fingerprint": store.manifest.fingerprint,
        "selection": selection,
        "teacher": {
            "architecture": {"kind": INGESTED, "name": kind},
            "format": described,
            "weights_sha256": digest,
            "preprocessing": {},
            "frame": frame,
            "dtype": "float32",
        },
        "views": views,
        "explainer": targets.form.explainer or {},
        "backend": config.store.backend,
    }


def _complete(
    description: dict[str, Any], targets: IngestedTargets, first: EncodedTargets
) -> dict[str, Any]:
    """Return the description with what the first record shows: classes and views."""
    sizes = {spec.name: spec.shape for spec in first.fields}
    classes = targets.form.classes or next(iter(sizes.get("logits", (0,))))
    num_views = next(iter(first.values.values())).shape[1]
    temperatures = {"temperatures": targets.form.temperatures} if "top_logits" in sizes else {}
    return {
        **description,
        **temperatures,
        "teacher": description["teacher"] | {"classes": classes},
        "views": description["views"] | {"count": num_views},
    }
