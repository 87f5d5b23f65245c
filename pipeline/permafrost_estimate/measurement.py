"""The measurement of an estimate: a sample is packed, annotated and trained on, and the whole is computed from it."""

from __future__ import annotations

import logging
import math
import resource
from dataclasses import dataclass, replace
from math import inf, isinf
from pathlib import Path
from typing import TYPE_CHECKING

from permafrost.config.models import NoModelConfig
from permafrost.config.store import PrecomputeConfig
from permafrost.core.errors import UserError
from permafrost.core.tasks import SAMPLE
from permafrost.models.resolve import resolve_precompute
from permafrost.storage.files import file_at
from permafrost.storage.rooted_paths import RootedPath
from permafrost.store.manifest import MANIFEST_NAME
from permafrost.store.reader import Store
from permafrost_estimate.options import EstimateConfig
from permafrost_estimate.sample import (
    RecordSample,
    ShardTimes,
    Spread,
    Whole,
    sample_finished,
    sample_source,
    spread_of,
)
from permafrost_estimate.turns import TimeBudget
from permafrost_estimate.volume import VolumePart, image_part, index_part, pass_parts

if TYPE_CHECKING:
    from permafrost.store.reader import TeacherPass
    from permafrost_estimate.freezing import FreezingRow
    from permafrost_estimate.steps import StepTimes, TeacherTimes

logger = logging.getLogger("permafrost.estimate")


def break_even_epochs(annotation: Spread, saved_per_epoch: Spread) -> Spread:
    """Return the epochs, over all students, after which stored targets have cost as much as a live teacher.

    They are infinite where the live teacher is not more expensive. Lowest and highest are those of the extreme
    measurements: the cheapest annotation with the largest saving, and the most expensive with the smallest.

    Args:
        annotation: Seconds of a worker that store the teacher's targets of all records, once.
        saved_per_epoch: Seconds by which an epoch with the live teacher is longer than one with stored targets.
    """
    return Spread(
        _epochs(annotation.median, saved_per_epoch.median),
        _epochs(annotation.lowest, saved_per_epoch.highest),
        _epochs(annotation.highest, saved_per_epoch.lowest),
    )


def _epochs(cost: float, saved: float) -> float:
    return cost / saved if saved > 0 else inf


# ---- measurement -----------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Work:
    """Work of one kind on all records."""

    seconds_per_record: Spread
    """Seconds of a worker for one record, by shard of the sample."""
    seconds: Spread
    """Seconds of a worker for all records."""
    hours: dict[int, float]
    """Hours by number of workers, each of which processes whole shards."""


@dataclass(frozen=True, kw_only=True)
class StudentCost:
    """A student with stored targets next to one with a live teacher."""

    steps: StepTimes
    """Seconds per record of a step."""
    epochs: int
    """Epochs of a student."""
    records: int
    """Records of an epoch, a record with several views in a step counting once for each."""
    break_even_epochs: Spread
    """Epochs, over all students, from which the store is cheaper."""
    break_even_students: Spread
    students: int
    """Number of students that share a live teacher in one job."""

    def seconds(self, step: Spread) -> Spread:
        """Return the seconds of all epochs of a student with such steps.

        Args:
            step: Seconds of a step per record.
        """
        return step.times(self.records * self.epochs)


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """Numbers of a store and its teacher passes, extrapolated from a sample."""

    records: int
    shards: int
    is_scaled: bool
    """True if the records are those of estimate.records."""
    is_finished: bool
    """True if the records are those of a finished store."""
    appended: int | None
    """Number of records that are to be appended to a finished store (store.append=true); None without one."""
    in_place: bool
    """True if the images stay in external tars and take no bytes in the store."""
    sample_shards: int
    sample_records: int
    device: str
    parts: tuple[VolumePart, ...]
    bytes: int
    """Bytes in total, without images that stay where they are."""
    packing: Work | None = None
    """None for a finished store."""
    annotation: Work | None = None
    """None without a teacher."""
    teacher: TeacherTimes | None = None
    """Parts of the work of annotation, None without a teacher."""
    training: StudentCost | None = None
    no_training: str = ""
    """Reason why no student was compared."""
    freezing: tuple[FreezingRow, ...] = ()
    """Price of each number of stored views, and of a live teacher; empty without operations of `augment`."""


def measure(config: EstimateConfig, folder: Path) -> Estimate:
    """Measure a sample in an empty folder. Nothing is written elsewhere.

    Args:
        config: Options of the command.
        folder: The empty folder.

    Raises:
        UserError: If the data, the teacher or the store cannot be used, as in precompute.
    """
    import torch

    sample = _sample(config, RootedPath(folder / "store"))
    budget = TimeBudget(config.estimate.seconds)  # of teacher and students
    teacher = config.teacher
    if sample.appended is not None and not isinstance(teacher, NoModelConfig):
        first = len(Store(config.store.folder).part(0, 1).manifest.classes)  # those that it has
        if first < len(sample.store.manifest.classes) and teacher.classes is None:
            config = replace(config, teacher=replace(teacher, classes=first))
    sample = _fitting_sample(sample, config, folder, budget)
    whole, store = sample.whole, sample.store
    measured = store.shards[1:]
    parts = [image_part(sample), index_part(sample)]
    annotation, teacher_times, training, reason = None, None, None, "teacher=none"
    passes: list[TeacherPass] = []
    freezing: tuple[FreezingRow, ...] = ()
    if not isinstance(config.teacher, NoModelConfig):
        from permafrost.annotation.teacher_pass import annotate_passes  # imports torch

        times = ShardTimes()
        annotate_passes(_for_sample(config, store), store, times)
        logger.info("annotated the sample; measuring teacher, views and students")
        passes = [
            store.open_pass(folder.name, stored_views=stored_views)
            for stored_views in (False, True)
            for folder in store.pass_folders(stored_views=stored_views)
        ]
        parts += [part for teacher in passes for part in pass_parts(teacher, whole)]
        calls = [results[1:] or results for results in times.results if results[0].name != SAMPLE]
        if not store.pass_folders(stored_views=True):  # each call was of a generation
            calls = [[result for results in calls for result in results]]
        seconds = [
            spread_of(
                [result.seconds / result.records * size for result in results if result.records]
            )
            for results, size in zip(calls, (whole.records, whole.trained), strict=False)
        ]
        total = seconds[0] if len(seconds) == 1 else seconds[0].plus(seconds[1])
        from permafrost_estimate.steps import measure_annotation  # imports torch

        annotation, resolved = _work(total, config, whole), _for_sample(config, store)
        teacher_times = measure_annotation(resolved, store, config.estimate.rounds, budget)
        training, reason = _compare(config, sample, total, budget)
        freezing = _freezing(config, sample, passes[0], seconds[0], training, budget)
    return Estimate(
        records=whole.records,
        shards=whole.shards,
        is_scaled=config.estimate.records is not None,
        is_finished=sample.finished is not None,
        appended=sample.appended,
        in_place=sample.in_place,
        sample_shards=len(measured),
        sample_records=sum(shard.records for shard in measured),
        device=torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        parts=tuple(parts),
        bytes=sum(part.bytes for part in parts if part.name != "images" or not sample.in_place),
        packing=None
        if sample.packing is None
        else _work(sample.packing.times(whole.records), config, whole),
        annotation=annotation,
        teacher=teacher_times,
        training=training,
        no_training=reason,
        freezing=freezing,
    )


def _fitting_sample(
    sample: RecordSample, config: EstimateConfig, folder: Path, budget: TimeBudget
) -> RecordSample:
    """Return the sample, or one of fewer records if the teacher would take more than a third of the budget for it."""
    measured = sum(shard.records for shard in sample.store.shards[1:])
    logger.info("packed a sample of %s records", f"{measured:,}")
    if isinstance(config.teacher, NoModelConfig) or isinf(budget.remaining()):
        return sample
    from permafrost_estimate.steps import seconds_of_teacher  # imports torch

    views = 0 if config.views.kind == "canonical" else config.views.count
    each = seconds_of_teacher(_for_sample(config, sample.store), sample.store) * (1 + views)
    seconds = budget.remaining(1 / 3)
    if each * measured <= seconds:
        return sample
    fitting = max(2, int(seconds / each / config.estimate.shards))
    logger.warning(
        "the teacher takes about %.2g s per record, so %s records of a shard are measured; estimate.seconds=%g is the "
        "limit",
        each,
        f"{fitting:,}",
        budget.seconds,
    )
    options = replace(config.estimate, shard_records=fitting)
    return _sample(replace(config, estimate=options), RootedPath(folder / "small"))


def _sample(config: EstimateConfig, folder: RootedPath) -> RecordSample:
    path = config.store.folder
    if file_at(path / MANIFEST_NAME).exists() and not config.store.append:
        return sample_finished(config, Store(path), folder)
    return sample_source(config, folder)


def _freezing(
    config: EstimateConfig,
    sample: RecordSample,
    teacher: TeacherPass,
    annotation: Spread,
    training: StudentCost | None,
    budget: TimeBudget,
) -> tuple[FreezingRow, ...]:
    """Return the price of each number of stored views, and of a live teacher that several students share.

    Args:
        config: Options of the command.
        sample: The sample.
        teacher: Its pass of whole images.
        annotation: Seconds of a worker for that pass of all records.
        training: Times of students, None if they were not compared.
        budget: Time of the estimate.
    """
    from permafrost_estimate.freezing import FreezingRow, freezing_rows, measure_views

    store, whole = sample.store, sample.whole
    if (
        not store.form.has_places
        or not config.augment.operations
        or config.teacher.frame == "center_crop"  # views are of the whole frame
    ):
        return ()
    resolved = _for_sample(config, store)
    rows = freezing_rows(
        resolved,
        config.estimate.views,
        teacher,
        whole,
        annotation.median,
        measure_views(resolved, store, config.estimate.rounds, budget),
    )
    if training is not None:
        more = training.steps.saved_shared.median * training.records * training.epochs
        rows.append(FreezingRow(views=0, bytes=0, hours=more / 3600, is_live=True))
    return tuple(rows)


def _for_sample(config: EstimateConfig, store: Store) -> PrecomputeConfig:
    """Return the options of a precompute of the sample, whose pass of stored views covers its whole split."""
    changed = replace(
        config,
        store=replace(config.store, path=str(store.path)),
        subset=type(config.subset)(),
        run=str(store.folder / "run"),
    )
    return resolve_precompute(changed, store)


def _work(seconds: Spread, config: EstimateConfig, numbers: Whole) -> Work:
    return Work(
        seconds_per_record=seconds.times(1 / numbers.records),
        seconds=seconds,
        hours={
            workers: seconds.median / min(workers, numbers.shards) / 3600
            for workers in config.estimate.workers
        },
    )


def _compare(
    config: EstimateConfig, sample: RecordSample, annotation: Spread, budget: TimeBudget
) -> tuple[StudentCost | None, str]:
    """Compare a student with stored targets and one with a live teacher, or return the reason why it cannot be."""
    from permafrost_estimate.steps import measure_steps  # imports torch

    try:
        steps = measure_steps(config, sample.store, budget)
    except UserError as error:
        return None, str(error).replace(str(sample.store.path), config.store.path)
    records = sample.whole.trained * (config.views.per_step if config.mode == "replay" else 1)
    epochs = break_even_epochs(annotation, steps.saved.times(records))
    training = StudentCost(
        steps=steps,
        epochs=config.trainer.epochs,
        records=records,
        break_even_epochs=epochs,
        break_even_students=epochs.times(1 / config.trainer.epochs),
        students=config.estimate.students,
    )
    return training, ""


# ---- lines -----------------------------------------------------------------------------------------


_UNITS = ("bytes", "kB", "MB", "GB", "TB", "PB")


_START_SECONDS, _MIN_STARTS = 10.0, 5
"""Seconds of a task of a job array before its first shard, and the least work of one that pays, in such starts."""


def printed_lines(estimate: Estimate, config: EstimateConfig) -> dict[str, str]:
    """Return the values of an estimate by name. A range in parentheses is the lowest and the highest measurement."""
    lines = {
        "records": f"{estimate.records:,} in {estimate.shards:,} shards"
        + (" (estimate.records)" if estimate.is_scaled else "")
        + (", finished" if estimate.is_finished else ""),
        "sample": f"{estimate.sample_shards} shards, {estimate.sample_records:,} records of "
        + (config.store.path if estimate.is_finished else f"data={config.data.kind}"),
        "bytes": f"{format_bytes(estimate.bytes)}, {_number(estimate.bytes / estimate.records)} per record"
        + (" (without the images, which stay in their tars)" if estimate.in_place else ""),
    }
    lines |= {f"bytes.{part.name}": _part(part) for part in estimate.parts}
    cluster = config.cluster
    lines["worker"] = (
        f"one actor on {estimate.device}, cluster.threads_per_actor={cluster.threads_per_actor} "
        f"cluster.decode_threads={cluster.decode_threads or 'null'}"
    )
    works = {"packing": estimate.packing, "annotation": estimate.annotation}
    lines |= {name: _work_line(work) for name, work in works.items() if work is not None}
    if estimate.teacher is not None:
        lines["decoding"] = _decoding_line(estimate.teacher, estimate.device)
    if config.executor == "array":
        lines["tasks"] = _tasks_line(estimate, config)
    if estimate.appended is not None:
        lines["append"] = _append_line(estimate, estimate.appended)
    if estimate.is_finished:
        lines["packing"] = f"not measured, as {config.store.path} is finished"
    training = estimate.training
    lines |= {f"price.{_name_of(row)}": _price(row, estimate, config) for row in estimate.freezing}
    limits = config.estimate.budget_bytes, config.estimate.max_distance
    if estimate.freezing and limits != (None, None):
        from permafrost_estimate.freezing import propose

        lines["proposal"] = propose(estimate.freezing, config.estimate)
    if training is None:
        return lines | {"students": f"not compared: {estimate.no_training}"}
    steps = training.steps
    whole = config.trainer.batch_size
    if steps.batch_size != whole:
        lines["steps_of"] = (
            f"{steps.batch_size} records; one of trainer.batch_size={whole} would take about "
            f"{format_bytes(steps.batch_bytes)} of memory (estimate.gigabytes, estimate.seconds, "
            "estimate.shard_records)"
        )
    return lines | {
        "step_stored": f"{_range(steps.stored.times(1e3))} ms per record; mode={config.mode} "
        f"method={config.method.kind} student={config.student.label}",
        "step_live": f"{_range(steps.live.times(1e3))} ms per record; the same with mode=live",
        "student": f"{_duration(training.seconds(steps.stored).median)} with stored targets, "
        f"{_duration(training.seconds(steps.live).median)} with a live teacher; trainer.epochs={training.epochs}",
        "cheaper_from": f"{_range(training.break_even_students)} students of trainer.epochs={training.epochs}, or "
        f"{_range(training.break_even_epochs)} epochs of {training.records:,} records",
    }


def _decoding_line(times: TeacherTimes, device: str) -> str:
    """Describe how many cores decode for one worker."""
    elsewhere = (
        f"; a GPU needs one for each {_number(1 / times.decoding.median)} records/s"
        if device == "cpu"
        else ""
    )
    return (
        f"{_range(times.decoding.times(1e3))} ms of one core per record; {_number(times.cores)} cores decode for one "
        f"worker, whose teacher computes {_number(1 / times.teacher.median)} records/s{elsewhere}"
    )


def _tasks_line(estimate: Estimate, config: EstimateConfig) -> str:
    """Describe how many tasks of a job array pay, and what one of them needs."""
    works = (work for work in (estimate.packing, estimate.annotation) if work is not None)
    seconds = sum(work.seconds.median for work in works)
    most = max(1, min(estimate.shards, int(seconds / _START_SECONDS / _MIN_STARTS)))
    cores = config.cluster.threads_per_actor + (estimate.teacher.cores if estimate.teacher else 0)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return (
        f"up to {most:,} pay, each with at least {_MIN_STARTS} times its start of about {_START_SECONDS:.0f} s to do, "
        f"of {estimate.shards:,} shards of {_duration(seconds / estimate.shards)}; with {most:,} each takes "
        f"{_duration(seconds / most + _START_SECONDS)}, {math.ceil(cores)} cores and {format_bytes(peak)} of memory"
    )


def _append_line(estimate: Estimate, appended: int) -> str:
    """Describe what new records cost, and all of them anew."""
    works = (work for work in (estimate.packing, estimate.annotation) if work is not None)
    seconds, share = sum(work.seconds.median for work in works), appended / estimate.records
    return (
        f"{appended:,} new records take {format_bytes(estimate.bytes * share)} and {_duration(seconds * share)} of one "
        f"worker; all {estimate.records:,} anew {format_bytes(estimate.bytes)} and {_duration(seconds)}"
    )


def _name_of(row: FreezingRow) -> str:
    if row.is_live:
        return "live"
    return f"views.count={row.views}" if row.views else "frozen"


def _price(row: FreezingRow, estimate: Estimate, config: EstimateConfig) -> str:
    """Describe the price of a setting in one line."""
    seconds = _duration(abs(row.hours) * 3600)
    if row.is_live:
        change = "more" if row.hours >= 0 else "less"
        return (
            f"no bytes; one job of {config.estimate.students} students takes {seconds} {change} than as many with "
            "stored targets; distance 0"
        )
    outputs = [
        f"{name} {format_bytes(size)}"
        + (f" {_distance(name, row.distances[name])}" if name in row.distances else "")
        for name, size in row.bytes_by_output.items()
    ]
    visits = ""
    if row.views:
        each = config.trainer.epochs * config.views.per_step / row.views
        visits = f"; each view {_number(each)} times in trainer.epochs={config.trainer.epochs}"
    return (
        f"{format_bytes(row.bytes)}, {_number(row.bytes / estimate.records)} per record; {seconds} of one worker; "
        f"{', '.join(outputs)}{visits}"
    )


def _distance(output_name: str, distance: float) -> str:
    """Format a distance to live. Below a thousandth it is that of rounding."""
    if isinf(distance):
        return "(distance not measured)"
    shown = "< 0.001" if distance < 1e-3 else _number(distance)
    return f"at {shown} nats" if output_name == "logits" else f"at 1 - cos {shown}"


def format_bytes(count: float) -> str:
    """Format a number of bytes with a decimal unit and three digits."""
    unit = 0
    while count >= 999.5 and unit < len(_UNITS) - 1:
        count, unit = count / 1000, unit + 1
    return f"{_number(count)} {_UNITS[unit]}"


def _part(part: VolumePart) -> str:
    each = _number(part.bytes_per_record)
    low, high = _number(part.lowest), _number(part.highest)
    spread = "" if low == high else f" ({low} to {high})"
    return f"{format_bytes(part.bytes)}, {each}{spread} per record; {part.form}"


def _work_line(work: Work) -> str:
    each = _range(work.seconds_per_record.times(1e3))
    by_workers = ", ".join(
        f"{_duration(hours * 3600)} on {workers:,}" for workers, hours in work.hours.items()
    )
    whole = work.seconds
    low, high = _duration(whole.lowest), _duration(whole.highest)
    return (
        f"{each} ms per record; {_duration(whole.median)} ({low} to {high}) of one worker; "
        f"{by_workers} workers"
    )


def _range(spread: Spread) -> str:
    return f"{_number(spread.median)} ({_number(spread.lowest)} to {_number(spread.highest)})"


def _duration(seconds: float) -> str:
    """Format a duration in hours, or in a smaller unit if it is short."""
    if seconds < 120:
        return f"{_number(seconds)} s"
    return f"{_number(seconds / 60)} min" if seconds < 7200 else f"{_number(seconds / 3600)} h"


def _number(value: float) -> str:
    """Format a number with three digits, or with all digits before the point."""
    if isinf(value):
        return "never"
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"
