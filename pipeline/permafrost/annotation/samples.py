"""Samples of a pass's records, for measurements with the teacher apart from its shards."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from time import monotonic
from typing import Any, ClassVar, Generic

import numpy as np

from permafrost.annotation.annotator import TeacherAnnotator, in_memory
from permafrost.config.explainers import ExplainerConfig
from permafrost.config.models import ModelConfig
from permafrost.config.store import PassOptions
from permafrost.core.errors import device_errors
from permafrost.core.interrupts import check_interrupted
from permafrost.core.tasks import SAMPLE, Executor, Report, ShardResult, Subject
from permafrost.models.compute import torch_threads
from permafrost.models.trained_weights import DataClasses
from permafrost.storage.rooted_paths import RootedPath
from permafrost.store.frames import FrameBatch, ShardFrames
from permafrost.store.reader import Store
from permafrost.store.shards import ShardEntry

Sample = Sequence[tuple[ShardEntry, int]]
"""Shards, and the number of records at the start of each."""
_SAMPLE_SHARDS = 8
_SAMPLES = 4
"""Further samples of a pass after its first one: precision, projections, moved features, and one more."""


def select_sample(shards: Sequence[ShardEntry], records: int) -> Sample:
    """Select shards at equal distances that are not empty, with about this number of records in total.

    At most 8 shards are selected.
    """
    filled = [shard for shard in shards if shard.records]
    numbers = np.unique(
        np.linspace(0, len(filled) - 1, min(len(filled), _SAMPLE_SHARDS)).astype(int)
    )
    chosen = [filled[number] for number in numbers.tolist()]
    each = -(-records // max(1, len(chosen)))
    return [(shard, min(shard.records, each)) for shard in chosen]


def measure_sample(
    executor: Executor,
    task: SampleTask[Report],
    sample: Sample,
    shards: Sequence[ShardEntry],
) -> Report:
    """Run a task on a sample and return its report.

    Args:
        executor: Executor that runs the task.
        task: Task that measures something on a sample.
        sample: The sample.
        shards: Shards of the pass, for which the processes are kept.
    """
    (result,) = executor.map_shards(task, [sample], following=len(shards) + _SAMPLES)
    return result.report


@dataclass(frozen=True, kw_only=True)
class TeacherTask:
    """Options of tasks that run the teacher of a pass on records of a store."""

    needs_gpu: ClassVar[bool] = True
    store_path: RootedPath
    teacher: ModelConfig
    explainer: ExplainerConfig
    config: PassOptions
    num_threads: int


@dataclass(frozen=True, kw_only=True)
class SampleTask(TeacherTask, ABC, Generic[Report]):
    """Base of tasks that measure something with the teacher of a pass on a sample of its records."""

    classes: DataClasses

    @property
    def subject(self) -> Subject:
        return Subject(str(self.store_path), self.teacher.label)

    def __call__(self, sample: Sample) -> ShardResult[Report]:
        started = monotonic()
        with torch_threads(self.num_threads), device_errors(self.config.memory_advice):
            records, report = in_memory(
                self.config,
                self.config.records_per_batch,
                lambda batch: replace(self, config=replace(self.config, batch_size=batch)).measure(
                    sample
                ),
            )
        return ShardResult(
            name=SAMPLE, records=records, seconds=monotonic() - started, report=report
        )

    @abstractmethod
    def measure(self, sample: Sample) -> tuple[int, Report]:
        """Measure the sample.

        Returns:
            The number of records that the teacher has run on, and what was measured.
        """

    def build_annotator(self, **changes: Any) -> TeacherAnnotator:
        """Build the annotator of the pass with some options changed.

        It is eager, because compilation would take longer than a sample, and checks no fidelity.

        Args:
            changes: Options of the pass to replace, by name.
        """
        options = replace(self.config, compile=False, min_fidelity=0.0, **changes)
        return TeacherAnnotator(
            self.teacher, self.classes, self.explainer, options, self._store.size
        )

    def iter_batches(self, sample: Sample) -> Iterator[tuple[FrameBatch, list[str]]]:
        """Iterate over the frames of the sample and their keys, a batch of the pass in memory at a time."""
        for shard, count in sample:
            keys = self._store.index.shard_keys(self._store.shards.number_of(shard.name))
            frames = ShardFrames(self._store, shard, np.arange(count))
            for start in range(0, count, self.config.records_per_batch):
                check_interrupted()
                stop = min(start + self.config.records_per_batch, count)
                yield frames.read(start, stop), list(keys[start:stop])

    @cached_property
    def _store(self) -> Store:
        return Store(self.store_path)
