"""Pack inputs into a store, and store the logits and explanations of a frozen teacher once.

    permafrost precompute experiment=demo teacher=none      (packs only)
    permafrost precompute experiment=demo
    permafrost precompute store.path=stores/demo teacher=cifar teacher.name=resnet20 \\
        teacher.weights=runs/my-teacher/teach/model.safetensors      (a pass on a finished store needs no data=)

Reads   the data, unless the store is finished and the options are the same or data=none, and the teacher's weights
Writes  <store.path>: image shards, index, manifest; facts.json, thumbnails/; teachers/<name>-<fingerprint>/
Rerun   the same command computes only what is missing
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from contextlib import ExitStack, closing
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from permafrost.cluster.array_executor import FAILED_NAME, note_failure, read_failures
from permafrost.cluster.executors import ExecutorChoice
from permafrost.config.data import NoDataConfig
from permafrost.config.models import NoModelConfig, is_published
from permafrost.config.store import PrecomputeConfig
from permafrost.config.verbs import Plan
from permafrost.core.errors import require, shorten
from permafrost.core.progress import say_if_slow
from permafrost.core.tasks import Executor, SerialExecutor, ShardError
from permafrost.models.network import Network
from permafrost.models.resolve import resolve_precompute
from permafrost.sources.data_preview import Preview, preview_source
from permafrost.sources.findings import add_findings, check_findings, complete_facts
from permafrost.sources.source import ListedData, build_source, digest_origin, list_data
from permafrost.storage.files import file_at
from permafrost.storage.lock import LOCK_NAME, folder_lock
from permafrost.storage.rooted_paths import RootedPath
from permafrost.store.byte_comparison import compare_bytes
from permafrost.store.commit import (
    find_finished,
    needs_commit,
    remove_shared_leftovers,
    write_origin,
)
from permafrost.store.commit_markers import COMMITS_FOLDER
from permafrost.store.facts import FactSheet, announce, read_data_facts
from permafrost.store.generations import appended_store, packed_store, plan_append
from permafrost.store.listing import ListingFiles, listing_files, shared_listing
from permafrost.store.manifest import MANIFEST_NAME
from permafrost.store.pack import (
    PackPlan,
    commit_packed,
    pack,
    pack_shards,
    plan_pack,
    remove_plan,
    share_plan,
    shared_plan,
)
from permafrost.store.reader import Store
from permafrost.store.repair import plan_repair, restore_tables
from permafrost.verbs.next_commands import NextCommands

if TYPE_CHECKING:
    from permafrost.annotation.teacher_pass import Annotation

logger = logging.getLogger("permafrost.precompute")

_MEASURED_SIZES = 10_000
"""Records whose sizes are checked before frames are suggested."""
_MIN_TIMES_LARGER = 2
"""Minimum ratio of an image's pixels to its frame's pixels to suggest storing frames."""


@dataclass(frozen=True, kw_only=True)
class PrecomputeResult:
    """Amount of work of this call, zero if nothing was missing."""

    store: str
    frame: str
    """Size of the canonical frame in pixels, or number of columns."""
    records: str
    """Number of records of the store, and of those that were left out because they cannot be read."""
    packed_records: int
    """Number of records that this call packed."""
    teacher_records: int
    """Number of forward passes, where a record counts once for each of its views."""
    passes: tuple[str, ...] = ()
    """Names of the passes that this call finished or found finished, the canonical one first."""
    bytes_per_record: tuple[float, ...] = ()
    """Mean bytes of a record in each of them."""
    teacher_accuracy: dict[str, float] = field(default_factory=dict)
    """Accuracy of the teacher by split, if this call ran it on labeled records of its classes. A value far below what
    is known of the teacher shows wrong labels, options, normalization or frames."""
    teacher_f1: dict[str, float] = field(default_factory=dict)
    """F1 over all known pairs of a record and a class in place of accuracy, where records have many labels."""
    facts: dict[str, FactSheet] = field(default_factory=dict)
    """Facts about the teacher, the targets of the pass that students train on, and the machine, by subject."""
    records_per_second: str = ""
    next: str = ""

    def printed(self) -> dict[str, Any]:
        """Return the values for the terminal."""
        shown = {
            name: sheet.block()
            for name, sheet in self.facts.items()
            if name != "teacher" or not self.teacher_records  # else it was logged
        }
        sizes = zip(self.passes, self.bytes_per_record, strict=True)
        passes = [f"{name} ({size:,.0f} bytes per record)" for name, size in sizes]
        of_others = {"bytes_per_record", "facts", "teacher_accuracy", "teacher_f1"}
        names = [each.name for each in fields(self) if each.name not in of_others]
        values = {name: getattr(self, name) for name in names}
        return {**values, "passes": ", ".join(passes), **shown}


def precompute_store(config: PrecomputeConfig) -> PrecomputeResult:
    """Pack missing shards, run the teacher on missing shards, and commit.

    Raises:
        UserError: If the options, the data or the store cannot be used. Finished shards are kept.
    """
    with closing(plan_precompute(config, is_run=True)) as plan:
        return plan.run()


def plan_precompute(config: PrecomputeConfig, *, is_run: bool = False) -> PrecomputePlan:
    """Check that the options or a finished store provide records, and plan the work on them.

    Args:
        config: Options of the command.
        is_run: Lock the store, and write its lost tables again, before its records are compared. A plan that is only
            described writes nothing.

    Raises:
        ConfigError: If neither does.
        LockedError: If it is to run, and another process writes to the store.
    """
    path = config.store.folder.absolute()
    _check_place(config, path)
    require(
        not isinstance(config.data, NoDataConfig) or file_at(path / MANIFEST_NAME).exists(),
        f"store.path={config.store.path} holds no finished store; name the data to pack with data=, as in "
        "data=image_folder data.path=photos, or correct store.path",
    )
    require(
        not (config.executor == "array" and config.store.relist),
        "store.relist=true reads all records in one process; run it once with executor=serial, and then the job array",
    )
    if not isinstance(config.teacher, NoModelConfig) and not is_published(config.teacher.weights):
        Network(config.teacher, ()).require_weights(
            ", or teacher=none to pack the records without a pass"
        )
    return PrecomputePlan(config, path, is_run=is_run)


def _check_place(config: PrecomputeConfig, path: RootedPath) -> None:
    """Refuse a folder of other things as that of a new store, and one inside of the data, or around them."""
    if path.is_remote or file_at(path / MANIFEST_NAME).exists():
        return
    folder = Path(str(path))
    entries = {entry.name for entry in folder.iterdir()} if folder.is_dir() else set()
    require(
        not entries or bool(entries & {LOCK_NAME, COMMITS_FOLDER}),
        f"store.path={config.store.path} is a folder with other things ({shorten(sorted(entries), 3)}) and no store; "
        "name a new folder, as in store.path=stores/photos",
    )
    named = str(getattr(config.data, "path", ""))
    data = Path(named).absolute()
    require(
        named == ""
        or not data.is_dir()
        or not (data.is_relative_to(folder) or folder.is_relative_to(data)),
        f"store.path={config.store.path} and data.path={named} lie one in the other; name a folder of its own for the "
        "store",
    )


_UNCHANGED = (
    "the data are not listed again, as their options and the times of their folders and tables are as before; a file "
    "that was overwritten in place is not noticed (store.relist=true reads and compares all records)"
)


class PrecomputePlan(Plan):
    """Plan of a store and its passes: the options, and the shards that are missing.

    Until it is closed it holds the listing and, if it is to run, the store's lock.
    """

    def __init__(self, options: PrecomputeConfig, path: RootedPath, *, is_run: bool) -> None:
        """List the data, unless the store was finished and made of the same data.

        Args:
            options: Options of the command.
            path: Absolute folder of the store.
            is_run: As for `plan_precompute`.
        """
        self.options = options
        self.path = path
        self._started = time.monotonic()
        self.missing_records: int | None = None
        """Records of the shards of passes that are missing, None before these are known."""
        data = options.data
        self._digest = (
            None if isinstance(data, NoDataConfig) else digest_origin(data, options.store)
        )
        """Digest of the data's origin, None for a finished store whose data are not named."""
        self._listing = ExitStack()
        with ExitStack() as held:
            held.enter_context(self._listing)
            is_array = options.executor == "array" and is_run
            self._needs_packing = self._digest is not None and (
                options.store.relist or find_finished(path, self._digest) is None
            )
            """False if the store is finished, as far as that shows without listing."""
            self._share_store: Callable[[], None] = lambda: None
            """Let other processes in that do not pack."""
            if is_run:
                is_shared = is_array or not self._needs_packing
                self._share_store = held.enter_context(folder_lock(path, is_shared=is_shared))
            self._choice = held.enter_context(ExecutorChoice(options.executor, options.cluster))
            self._packing = None
            """Records and shards to pack, None where one task of a job array lists them for all."""
            if self._needs_packing and not is_array:
                if is_run:
                    restore_tables(path)
                self._packing = self._plan_packing(self._open_listing(is_locked=is_run))
            self._held = held.pop_all()

    def _open_listing(self, *, is_locked: bool) -> ListingFiles:
        """Return the paths of a listing, which is removed before the store is marked as finished."""
        return self._listing.enter_context(listing_files(self.path, is_locked=is_locked))

    def _plan_packing(self, files: ListingFiles) -> tuple[PackPlan, ListedData]:
        """List the records, and compare them with the store."""
        options = self.options
        with say_if_slow(logger, f"listing the records of data={options.data.kind} ..."):
            packed, seed = packed_store(self.path), options.store.seed
            listed = list_data(options.data, files, seed, self._choice.for_records, packed)
            store = appended_store(options, self.path)
            if store is not None:
                listed = listed.compared_with(store, files, seed)
            shards = listed.plan_shards(options.store)
        source, listing = listed.source, listed.listing
        if listed.comparison is None:
            return plan_pack(options, self.path, source, listed.classes, listing, shards), listed
        compared = options, listed.comparison, source, listing, shards
        return plan_repair(*compared) or plan_append(*compared), listed

    def close(self) -> None:
        self._held.close()

    def run(self) -> PrecomputeResult:
        """Pack what is missing, then run the teacher on it."""
        options = self.options
        packed, annotation = 0, None
        if self._packing is not None:
            plan, listed = self._packing
            executor = self._choice.for_records(plan.num_records)
            if options.store.relist:
                compare_bytes(options, listed.listing, plan, self._choice.for_records)
            packed = self._pack(plan, listed, executor)
        elif self._needs_packing:
            packed = self._pack_in_array(str(self._digest))
        elif self._digest is not None:
            logger.info(_UNCHANGED)
        self._share_store()
        store = Store(self.path)
        executor = self._choice.for_records(store.num_records())
        if not self._needs_packing:
            self._announce(f"{store.num_records():,} records, finished", executor)
        if not isinstance(options.teacher, NoModelConfig):
            from permafrost.annotation.teacher_pass import annotate_passes  # imports torch

            annotation = annotate_passes(resolve_precompute(options, store), store, executor)
        if options.executor == "array":
            with executor.alone(self.path, "ends"):
                remove_shared_leftovers(self.path, executor)
        if packed:
            _suggest_frames(store)
        return self._result(store, packed, annotation, time.monotonic() - self._started)

    def _pack(self, plan: PackPlan, listed: ListedData, executor: Executor) -> int:
        """Pack the missing shards and commit; return the number of packed records."""
        options, packed = self.options, 0
        if plan.repairs:  # of a generation, before what follows it is compared
            self._announce(plan.describe(), executor)
            packed = pack(plan, options, executor)
            self._listing.close()
            plan, listed = self._plan_packing(self._open_listing(is_locked=True))
            return packed + self._pack(plan, listed, executor)
        preview = self._preview(plan, listed, executor)
        packed = pack(plan, options, executor)
        if (
            preview is not None and plan.before is not None
        ):  # before, they would be ahead of the store
            preview.stored().write(self.path)
        self._finish(plan)
        return packed

    def _preview(self, plan: PackPlan, listed: ListedData, executor: Executor) -> Preview | None:
        """Check the teacher and the data before they are packed, and write the facts about the data of a new store."""
        options, teacher, columns = self.options, self.options.teacher, plan.packing.columns
        self._announce(plan.describe(), executor)
        if plan.missing and plan.before is None and not isinstance(teacher, NoModelConfig):
            Network(teacher, listed.classes).build(
                options.store.path,
                None if columns is None else len(columns),
                reads_head=options.annotate.reads_head,
            )
        has_facts = read_data_facts(self.path) is not None
        if not plan.missing and not (plan.before is not None and plan.shards) and has_facts:
            return None
        preview = add_findings(
            preview_source(
                options.data,
                listed,
                executor,
                self.path,
                files=options.preview.limit,
                is_packed_next=True,
            )
        )
        announce([preview.sheet()])
        check_findings(preview)
        if not has_facts or not file_at(self.path / MANIFEST_NAME).exists():
            preview.stored().write(self.path)
        return preview

    def _finish(self, plan: PackPlan) -> None:
        """Write what describes a committed store, so that the next call need not list its data."""
        self._listing.close()
        complete_facts(Store(self.path))
        write_origin(self.path, str(self._digest), plan.dataset.fingerprint, self.options.data)

    def _pack_in_array(self, digest: str) -> int:
        """Pack with the other tasks of a job array, of which one lists the data and one commits.

        What a finished store lacks, and what is appended to it, is packed by one of them.
        """
        options, path = self.options, self.path
        executor, failed = self._choice.for_records(0), path / FAILED_NAME
        before = read_failures(failed)
        with executor.alone(path, "lists the data"):
            if find_finished(path, digest) is not None:
                return 0
            failures = read_failures(failed)
            require(
                failures in (before, b""),
                f"another task has failed: {failures.decode().strip()}",
                ShardError,
            )
            file_at(failed).remove()
            # After a failure, the data may have been repaired.
            plan = None if failures else shared_plan(path, options, digest, build_source)
            if plan is None:
                try:
                    plan, packed = self._list_in_array(executor, digest)
                except Exception as error:
                    # No task waits for what a finished store lacks.
                    if not file_at(path / MANIFEST_NAME).exists():
                        note_failure(failed, {}, str(error))
                    raise
                if plan is None:
                    return packed
            else:
                self._announce(plan.describe(), executor)
        packed = pack_shards(plan, executor)
        with executor.alone(path, "writes the manifest of the store"):
            if find_finished(path, digest) is None:
                if needs_commit(path):
                    commit_packed(plan, options)
                self._finish(plan)
                remove_plan(path)
        return packed

    def _list_in_array(self, executor: Executor, digest: str) -> tuple[PackPlan | None, int]:
        """List the data for all tasks and return the plan, or pack what a finished store lacks, and return how much."""
        with shared_listing(self.path) as files:
            restore_tables(self.path)
            plan, listed = self._plan_packing(files)
            if not file_at(self.path / MANIFEST_NAME).exists():
                self._preview(plan, listed, executor)
                share_plan(plan, digest)
                return plan, 0
            packed = self._pack(plan, listed, SerialExecutor())
            remove_plan(self.path)
            return None, packed

    def describe_work(self) -> dict[str, str]:
        options = self.options
        described = {"store": options.store.path}
        if self._packing is not None:
            plan, _ = self._packing
            described |= {
                "records": plan.describe(),
                "packs": f"{len(plan.missing):,} shards",
            }
        if isinstance(options.teacher, NoModelConfig):
            return described | {"teacher": "no teacher"}
        described["teacher"] = self._describe_teacher()
        if self._packing is not None:
            return described | {"pass": "named by the store, once it is packed"}
        from permafrost.annotation.pass_changes import describe_missing  # imports torch
        from permafrost.annotation.teacher_pass import plan_passes

        store = Store(self.path)
        passes = plan_passes(resolve_precompute(options, store), store)
        self.missing_records = sum(
            shard.records for plans in passes for plan in plans for shard in plan.missing
        )
        return described | {
            f"pass {plans[0].folder.name}": describe_missing(plans) for plans in passes
        }

    def _describe_teacher(self) -> str:
        teacher = self.options.teacher
        if isinstance(teacher, NoModelConfig):
            return "no teacher"
        return f"teacher {teacher.label} ({', '.join(self.options.annotate.outputs)})"

    def _announce(self, records: str, executor: Executor) -> None:
        """Log what this call will do, and on what."""
        reason = ""
        if self.options.executor == "auto":
            reason = " (a small store needs no Ray)" if executor.name == "serial" else " (on Ray)"
        logger.info(
            "store %s: %s; %s; executor=%s%s",
            self.options.store.path,
            records,
            self._describe_teacher(),
            executor.name,
            reason,
        )

    def _result(
        self, store: Store, packed: int, annotation: Annotation | None, seconds: float
    ) -> PrecomputeResult:
        """Return the result, with the command to run next."""
        options = self.options
        commands = NextCommands(store, options.store.folder.root)
        skipped = len(store.manifest.skipped)
        result = PrecomputeResult(
            store=options.store.path,
            frame=store.form.describe(),
            records=f"{store.num_records():,}" + (f" ({skipped:,} skipped)" if skipped else ""),
            packed_records=packed,
            teacher_records=0,
            records_per_second=f"{packed / seconds:,.0f}" if packed else "",
        )
        if annotation is None:
            return replace(result, next=commands.after_packing(options.run))
        done = packed + annotation.forward_passes
        trained_on = (
            store.open_pass(annotation.canonical)
            if options.views.kind == "canonical"
            else store.open_pass(list(annotation.passes)[-1], stored_views=True)
        )
        many = store.manifest.multi_label
        return replace(
            result,
            teacher_records=annotation.forward_passes,
            passes=tuple(annotation.passes),
            bytes_per_record=tuple(annotation.passes.values()),
            teacher_accuracy={} if many else annotation.accuracy,
            teacher_f1=annotation.accuracy if many else {},
            facts=annotation.sheets,
            records_per_second=f"{done / seconds:,.0f}" if done else "",
            next=commands.distill(options.run, trained_on),
        )


def _suggest_frames(store: Store) -> None:
    """Log that readers of large original files would be faster with frames, which are decoded in every epoch."""
    canonical = store.manifest.canonical
    if canonical is None or canonical.format != "original":
        return
    count = store.index.num_rows
    rows = np.unique(np.linspace(0, count - 1, min(count, _MEASURED_SIZES)).astype(np.int64))
    sizes = store.index.take(("height", "width"), rows)
    pixels = float((sizes["height"].astype(np.int64) * sizes["width"]).mean())
    height, width = store.size
    if pixels >= _MIN_TIMES_LARGER * height * width:
        logger.info(
            "images have %.1f times the pixels of their frames of %dx%d, and every epoch of a student decodes all of "
            "them; store.format=jpeg95 in a new store.path would pack and decode the frames only",
            pixels / (height * width),
            width,
            height,
        )
