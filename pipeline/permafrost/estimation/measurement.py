"""The measurement of an estimate: a sample is packed, annotated and trained on, and the whole is computed from it."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from permafrost.config.models import NoModelConfig
from permafrost.core.errors import UserError
from permafrost.core.files import RootedPath, exists
from permafrost.estimation.break_even import BreakEven, break_even_epochs
from permafrost.estimation.sample import Sample, Whole, sample_finished, sample_source
from permafrost.estimation.spread import Spread, spread_of
from permafrost.estimation.volume import Part, image_part, index_part, other_forms, pass_parts
from permafrost.models.resolve import resolve_precompute
from permafrost.store.manifest import MANIFEST_NAME
from permafrost.store.reader import Store

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from permafrost.config.verbs import EstimateConfig
    from permafrost.core.tasks import ShardResult, ShardTask
    from permafrost.estimation.steps import StepSeconds


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
class Training:
    """A student with stored targets next to one with a live teacher."""

    stored: Spread
    """Seconds a record of a step."""
    live: Spread
    epochs: int
    """Epochs of a student."""
    records: int
    """Records of an epoch, a record with several views in a step counting once for each."""
    break_even_epochs: BreakEven
    """Epochs, over all students, from which the store is cheaper."""
    break_even_students: BreakEven


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """Numbers of a store and its teacher passes, extrapolated from a sample."""

    records: int
    shards: int
    is_scaled: bool
    """True if the records are those of estimate.records."""
    is_finished: bool
    """True if the records are those of a finished store."""
    in_place: bool
    """True if the images stay in external tars and take no bytes in the store."""
    sample_shards: int
    sample_records: int
    device: str
    parts: tuple[Part, ...]
    bytes: int
    """Bytes in total, without images that stay where they are."""
    other_forms: dict[str, float] = field(default_factory=dict)
    """Bytes a record of the images or of a field with another option, before compression."""
    packing: Work | None = None
    """None for a finished store."""
    annotation: Work | None = None
    """None without a teacher."""
    training: Training | None = None
    no_training: str = ""
    """Reason why no student was compared."""


def measure(config: EstimateConfig, folder: Path) -> Estimate:
    """Measure a sample in an empty folder. Nothing is written elsewhere."""
    path, sampled = config.store.folder, RootedPath(folder / "store")
    if exists(path / MANIFEST_NAME):
        sample = sample_finished(config, Store(path), sampled)
    else:
        sample = sample_source(config, sampled)
    whole, store = sample.whole, sample.store
    parts = [image_part(sample), index_part(sample)]
    annotation, training, reason = None, None, "teacher=none"
    passes = []
    if not isinstance(config.teacher, NoModelConfig):
        from permafrost.annotation.teacher_pass import annotate_passes  # imports torch

        run = _PassTimes()
        annotate_passes(_for_sample(config, store), store, run)
        passes = [
            store.open_pass(folder.name, stored_views=stored_views)
            for stored_views in (False, True)
            for folder in store.pass_folders(stored_views=stored_views)
        ]
        parts += [part for teacher in passes for part in pass_parts(teacher, whole)]
        covered = [whole.records, whole.trained]
        seconds = [
            spread.times(records) for spread, records in zip(run.spreads(), covered, strict=False)
        ]
        total = seconds[0] if len(seconds) == 1 else seconds[0].plus(seconds[1])
        annotation = _work(total, config, whole)
        training, reason = _compare(config, sample, total)
    return Estimate(
        records=whole.records,
        shards=whole.shards,
        is_scaled=whole.is_scaled,
        is_finished=sample.finished is not None,
        in_place=sample.in_place,
        sample_shards=len(sample.shards),
        sample_records=sum(shard.records for shard in sample.shards),
        device=_device(),
        parts=tuple(parts),
        bytes=sum(part.bytes for part in parts if part.name != "images" or not sample.in_place),
        other_forms=other_forms(sample, passes),
        packing=None
        if sample.packing is None
        else _work(sample.packing.times(whole.records), config, whole),
        annotation=annotation,
        training=training,
        no_training=reason,
    )


class _PassTimes:
    """Executor in this process that keeps the seconds a record of each pass, without those of its first shard."""

    def __init__(self) -> None:
        self.results: list[list[ShardResult]] = []

    def __call__(self, task: ShardTask, shards: Sequence[object]) -> Iterator[ShardResult]:
        results: list[ShardResult] = []
        self.results.append(results)
        for shard in shards:
            results.append(task(shard))
            yield results[-1]

    def spreads(self) -> list[Spread]:
        """Return the seconds a record of each pass, by shard."""
        return [
            spread_of([each.seconds / each.records for each in results[1:] if each.records])
            for results in self.results
        ]


def _for_sample(config: EstimateConfig, store: Store) -> EstimateConfig:
    """Return the options of a precompute of the sample, whose pass of stored views covers its whole split."""
    changed = replace(
        config,
        store=replace(config.store, path=str(store.path)),
        subset=type(config.subset)(),
        run=str(store.path / "run"),
    )
    resolved = resolve_precompute(changed, store)
    return replace(changed, teacher=resolved.teacher)


def _work(seconds: Spread, config: EstimateConfig, whole: Whole) -> Work:
    return Work(
        seconds_per_record=seconds.times(1 / whole.records),
        seconds=seconds,
        hours={
            workers: seconds.median / min(workers, whole.shards) / 3600
            for workers in config.estimate.workers
        },
    )


def _compare(
    config: EstimateConfig, sample: Sample, annotation: Spread
) -> tuple[Training | None, str]:
    """Compare a student with stored targets and one with a live teacher, or return the reason why it cannot be."""
    from permafrost.estimation.steps import measure_steps  # imports torch

    try:
        steps: StepSeconds = measure_steps(config, sample.store)
    except UserError as error:
        return None, str(error).replace(str(sample.store.path), config.store.path)
    per_step = config.views.per_step if config.mode == "replay" else 1
    records = sample.whole.trained * per_step
    epochs = break_even_epochs(annotation, steps.saved.times(records))
    training = Training(
        stored=steps.stored,
        live=steps.live,
        epochs=config.trainer.epochs,
        records=records,
        break_even_epochs=epochs,
        break_even_students=epochs.in_students(config.trainer.epochs),
    )
    return training, ""


def _device() -> str:
    import torch

    return torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
