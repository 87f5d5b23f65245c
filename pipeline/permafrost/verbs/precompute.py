"""Pack inputs into a store, and store the logits and explanations of a frozen teacher once.

    permafrost precompute experiment=demo teacher=none      (packs only)
    permafrost precompute experiment=demo
    permafrost precompute store.path=stores/demo teacher=cifar teacher.name=resnet20 \\
        teacher.weights=runs/my-teacher/teach/model.safetensors      (a pass on a finished store needs no data=)

Reads   the data, unless the store is finished and the options are the same or data=none, and the teacher's weights
Writes  <store.path>: image shards, index, manifest; preview.json; teachers/<name>-<fingerprint>/
Rerun   the same command computes only what is missing
"""

from __future__ import annotations

import logging
import time
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np

from permafrost.cluster.executors import ExecutorChoice
from permafrost.config.data import NoDataConfig
from permafrost.config.models import NoModelConfig
from permafrost.config.store import PrecomputeConfig
from permafrost.core.errors import require
from permafrost.core.progress import say_if_slow
from permafrost.core.tasks import Executor
from permafrost.models.resolve import resolve_precompute
from permafrost.sources.data_preview import Preview, preview_source, write_preview
from permafrost.sources.equal_images import find_equal_images
from permafrost.sources.findings import add_findings, check_findings
from permafrost.sources.source import (
    build_source,
    classes_of_source,
    digest_origin,
    guess_records,
    list_source,
    plan_source,
)
from permafrost.sources.tally import Tally
from permafrost.storage.files import exists
from permafrost.storage.lock import lock_folder
from permafrost.storage.rooted_paths import RootedPath
from permafrost.store.commit import find_finished, write_origin
from permafrost.store.listing import Listing, ListingFiles, listing_files
from permafrost.store.manifest import MANIFEST_NAME
from permafrost.store.pack import PackPlan, pack, plan_pack
from permafrost.store.reader import Store
from permafrost.verbs.next_commands import distill_command, teach_command

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
    teacher_frame: str = ""
    """Part of an image that the teacher received (teacher.frame), empty for a table and without a teacher."""
    records_per_second: str = ""
    next: str = ""

    def printed(self) -> dict[str, Any]:
        """Return the values for the terminal, the accuracy with its frame, as `teach` may have used another one."""
        values = asdict(self)
        frame = values.pop("teacher_frame")
        sizes = zip(self.passes, values.pop("bytes_per_record"), strict=True)
        values["passes"] = ", ".join(
            f"{name} ({size:,.0f} bytes per record)" for name, size in sizes
        )
        of_frame = f" ({frame})" if frame else ""
        return {
            f"{name}{of_frame}" if name == "teacher_accuracy" else name: value
            for name, value in values.items()
        }


def precompute_store(config: PrecomputeConfig) -> PrecomputeResult:
    """Pack missing shards, run the teacher on missing shards, and commit.

    Raises:
        UserError: If the options, the data or the store cannot be used. Finished shards are kept.
    """
    path = config.store.folder.absolute()
    _check_has_records(config, path)
    started = time.monotonic()
    with lock_folder(path):
        packed = 0
        annotation = None
        with ExecutorChoice.for_store(config.executor, config.cluster, path) as choice:
            digest = (
                None
                if isinstance(config.data, NoDataConfig)
                else digest_origin(config.data, config.store)
            )
            if digest is None or _is_finished(config, path, digest):
                store = Store(path)
                records = store.num_records()
                _announce(config, f"{records:,} records, finished", choice.for_records(records))
            else:
                packed, records = _pack(config, path, digest, choice)
                store = Store(path)
            if not isinstance(config.teacher, NoModelConfig):
                from permafrost.annotation.teacher_pass import annotate_passes  # imports torch

                resolved = resolve_precompute(config, store)
                _warn_of_aliasing(resolved, store)
                annotation = annotate_passes(resolved, store, choice.for_records(records))
    annotated = 0 if annotation is None else annotation.forward_passes
    done = packed + annotated
    if packed:
        _suggest_frames(store)
    typed = config.store.folder.root
    return PrecomputeResult(
        store=config.store.path,
        frame=store.form.describe(),
        records=_records(store),
        packed_records=packed,
        teacher_records=annotated,
        passes=() if annotation is None else tuple(annotation.passes),
        bytes_per_record=() if annotation is None else tuple(annotation.passes.values()),
        teacher_accuracy={} if annotation is None else annotation.accuracy,
        teacher_frame=""
        if annotation is None or not store.form.has_places
        else str(store.open_pass(annotation.canonical).manifest.teacher["frame"]),
        records_per_second=f"{done / (time.monotonic() - started):,.0f}" if done else "",
        next=teach_command(store, typed, "my-teacher")
        if annotation is None
        else distill_command(store, typed, "my-student", store.open_pass(annotation.canonical)),
    )


def _records(store: Store) -> str:
    skipped = len(store.manifest.skipped)
    return f"{store.num_records():,}" + (f" ({skipped:,} skipped)" if skipped else "")


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


def _warn_of_aliasing(config: PrecomputeConfig, store: Store) -> None:
    """Warn of a teacher whose inputs are much smaller than the frames, so that it misses pixels."""
    from permafrost.models.providers import teacher_input_size  # imports torch

    side = None if isinstance(config.teacher, NoModelConfig) else teacher_input_size(config.teacher)
    if not store.form.has_places or side is None or max(store.size) <= _MIN_TIMES_LARGER * side:
        return
    logger.warning(
        "the teacher receives frames of %dx%d at %dx%d, resized bilinearly and without antialiasing; if its accuracy "
        "is lower than you know it, pack a store with store.image_size=%d",
        *store.size,
        side,
        side,
        side,
    )


def _check_has_records(config: PrecomputeConfig, path: RootedPath) -> None:
    """Raise ConfigError if neither the options nor a finished store provide records."""
    require(
        not isinstance(config.data, NoDataConfig) or exists(path / MANIFEST_NAME),
        f"store.path={config.store.path} holds no finished store; name the data to pack with data=, as in "
        "data=image_folder data.path=photos, or correct store.path",
    )


def _is_finished(config: PrecomputeConfig, path: RootedPath, digest: str) -> bool:
    """Return whether the store is finished, whole and made of the same data, as far as that shows without listing."""
    if config.store.relist or find_finished(path, digest) is None:
        return False
    logger.info(
        "the data were not listed again: the options are those of the finished store, and so are sizes and times of "
        "the files that they name, and the times at which their folders last got or lost an entry. Nothing else was "
        "checked; store.relist=true compares the names, sizes and labels of all records"
    )
    return True


def _pack(
    config: PrecomputeConfig, path: RootedPath, digest: str, choice: ExecutorChoice
) -> tuple[int, int]:
    """List the data, pack the missing shards and commit; return the numbers of packed and of all records."""
    with listing_files(path) as files:
        with say_if_slow(logger, f"listing the records of data={config.data.kind} ..."):
            plan, listing, tally = _plan_pack(config, path, files, choice)
        executor = choice.for_records(plan.num_records)
        _announce(config, plan.describe(), executor)
        preview = _preview(config, plan, listing, tally, executor) if plan.missing else None
        packed = pack(plan, config, executor)
    if preview is not None:
        _compare_images(path, preview)
    write_origin(path, digest, plan.dataset.fingerprint)
    return packed, plan.num_records


def _preview(
    config: PrecomputeConfig, plan: PackPlan, listing: Listing, tally: Tally, executor: Executor
) -> Preview:
    """Look at the data that are about to be packed. Raises DataError if they were probably misunderstood."""
    preview = preview_source(
        config.data,
        plan.source,
        plan.classes,
        listing,
        tally,
        executor,
        plan.path,
        files=config.preview.limit,
    )
    preview = add_findings(preview)
    check_findings(preview)
    write_preview(plan.path, preview)
    return preview


def _compare_images(path: RootedPath, preview: Preview) -> None:
    """Log findings about packed images with equal bytes, and add them to the preview of the store."""
    findings = find_equal_images(Store(path))
    if findings:
        check_findings(replace(preview, findings=findings))
        write_preview(path, replace(preview, findings=(*preview.findings, *findings)))


def _plan_pack(
    config: PrecomputeConfig, path: RootedPath, files: ListingFiles, choice: ExecutorChoice
) -> tuple[PackPlan, Listing, Tally]:
    source = build_source(config.data)
    guess = guess_records(source)
    listing, tally = list_source(source, files, config.store.seed, choice.for_records(guess))
    plans = plan_source(source, listing, config.store)
    plan = plan_pack(config, path, source, classes_of_source(source, listing), listing, plans)
    return plan, listing, tally


def _announce(config: PrecomputeConfig, records: str, executor: Executor) -> None:
    """Log what this call will do, and on what."""
    teacher = "no teacher"
    if not isinstance(config.teacher, NoModelConfig):
        payloads = ", ".join(config.annotate.payloads)
        teacher = f"teacher {config.teacher.kind} {config.teacher.name} ({payloads})"
    reason = ""
    if config.executor == "auto":
        reason = " (a small store needs no Ray)" if executor.name == "serial" else " (on Ray)"
    logger.info(
        "store %s: %s; %s; executor=%s%s",
        config.store.path,
        records,
        teacher,
        executor.name,
        reason,
    )
