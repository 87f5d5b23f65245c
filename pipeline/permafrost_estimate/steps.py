"""Seconds per record of what an estimate compares: steps of students, and a teacher's pass, with several options.

All sides of a comparison take turns on the same records, so that a busy moment is shared.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from time import perf_counter

import numpy as np
import torch

from permafrost.annotation.annotator import TeacherAnnotator
from permafrost.annotation.pass_plan import PassPlan, plan_pass
from permafrost.config.distillation import DistillConfig
from permafrost.config.methods import Mode, SeveralConfig
from permafrost.config.models import NoModelConfig
from permafrost.config.store import PrecomputeConfig
from permafrost.core.batches import Batch, Targets
from permafrost.core.distributed import DistributedContext
from permafrost.core.errors import require
from permafrost.loading.geometry import TargetRequest, view_images
from permafrost.models.compute import torch_threads
from permafrost.models.resolve import resolve_distill
from permafrost.store.frames import ShardFrames
from permafrost.store.reader import Store
from permafrost.training.build import build_loader, build_training
from permafrost.training.distill import StudentPlan
from permafrost.training.step import train_step
from permafrost.training.targets import TargetSource
from permafrost_estimate.options import EstimateConfig
from permafrost_estimate.sample import Spread, spread_of
from permafrost_estimate.turns import TimeBudget

_STEPS_ON_GPU = 4
"""Steps that are counted together on a GPU."""
_SMALLEST_STEP = 2
"""Fewest records of a step, since a batch normalization needs two, and a mixture a pair."""
_SHARE_OF_MEMORY = 0.25
"""Share of the free memory that a step may take unless estimate.gigabytes says more."""
_PEAK_OF_SAVED = 2.5
"""Peak memory of a step by the bytes that its backward pass keeps; 2.7 for ResNet-18 at 224 pixels on a CPU."""
_STEPS_OF_A_ROUND = 8
"""Steps of the sides that are measured in any case, with those that are not counted."""


@dataclass(frozen=True, kw_only=True)
class StepTimes:
    """Seconds per record of a student's step."""

    stored: Spread
    """Step with the targets of the store's passes."""
    live: Spread
    """Step with a live teacher."""
    further: Spread
    """Step of each further student that shares batch, views and live teacher with the first, in one job."""
    saved: Spread
    """Difference of live and stored in each round, which may be negative."""
    saved_shared: Spread
    """Difference for estimate.students students at once: sharing a live teacher in one job, and with stored targets."""
    batch_size: int
    """Records of a step, fewer than trainer.batch_size where its step would take too much memory or time."""
    batch_bytes: float
    """Bytes of memory that a step of trainer.batch_size takes, guessed from a step of few records."""


def measure_steps(config: EstimateConfig, store: Store, budget: TimeBudget) -> StepTimes:
    """Take steps of students in turn, with the targets of the store's passes and with a live teacher.

    The batches are read from the store. They are halved until a step is within estimate.gigabytes and the budget.

    Args:
        config: Options of the command.
        store: Store of the sample, with its passes.
        budget: Time of the estimate.

    Raises:
        ConfigError: If there is no such student, such as for a method of live teachers only, or too few records.
        StoreMismatchError: If the store has no pass that fits.
    """
    require(
        config.mode != "live",
        "mode=live reads no stored targets; to compare a store with it, set mode=frozen or mode=replay",
    )
    require(
        config.method.needs_teacher,
        f"method={config.method.kind} uses no teacher, so there is nothing to store for it",
    )
    require(
        not isinstance(config.method, SeveralConfig),
        "method=several has no live teacher to compare a store with; estimate one of its terms",
    )
    available = store.num_records(config.split)
    require(
        available >= _SMALLEST_STEP,
        f"the sample has {available} records of split {config.split}, fewer than the {_SMALLEST_STEP} of a step; raise "
        "estimate.shards, estimate.shard_records or estimate.seconds",
    )
    with torch_threads(config.cluster.threads_per_actor):
        batch_size, batch_bytes = _measured_batch(config, store, budget)
        config = replace(config, trainer=replace(config.trainer, batch_size=batch_size))
        stored, live = _Steps(config, store, config.mode), _Steps(config, store, "live")
        sides: dict[str, Callable[[], float]] = {
            "stored": stored.take,
            "live": live.take,
            "further": live.take_further,
        }
        rounds = budget.in_turn(sides, config.estimate.rounds, "steps", share=1.0)
    sharing = config.estimate.students
    return StepTimes(
        stored=spread_of(rounds["stored"]),
        live=spread_of(rounds["live"]),
        further=spread_of(rounds["further"]),
        saved=spread_of(
            [
                live_step - stored_step
                for stored_step, live_step in zip(rounds["stored"], rounds["live"], strict=True)
            ]
        ),
        saved_shared=spread_of(
            [
                first + (sharing - 1) * further - sharing * stored_step
                for stored_step, first, further in zip(
                    rounds["stored"], rounds["live"], rounds["further"], strict=True
                )
            ]
        ),
        batch_size=batch_size,
        batch_bytes=batch_bytes,
    )


def _measured_batch(config: EstimateConfig, store: Store, budget: TimeBudget) -> tuple[int, float]:
    """Return the records of a step that is within memory and time, and the bytes of one of trainer.batch_size."""
    smallest = _SMALLEST_STEP * config.views.per_step
    if (whole := config.trainer.batch_size) <= smallest:
        return whole, 0.0
    trainer = replace(config.trainer, batch_size=smallest, compile=False)
    probe = _Steps(replace(config, trainer=trainer), store, "live")
    each = _PEAK_OF_SAVED * _saved_bytes(probe.take) / smallest
    limit = _memory_limit(config.estimate.gigabytes, probe.device)
    seconds = probe.take()
    size = min(
        whole, store.num_records(config.split) * config.views.per_step // smallest * smallest
    )
    while size > smallest and (
        each * size > limit or _STEPS_OF_A_ROUND * seconds * size > budget.remaining()
    ):
        size = max(smallest, size // 2 // smallest * smallest)
    return size, each * whole


@dataclass(frozen=True, kw_only=True)
class TeacherTimes:
    """Seconds per record of the parts of a pass of whole images."""

    decoding: Spread
    """Seconds of one core that reads and decodes the record, which is in the memory of the system."""
    teacher: Spread
    """Seconds of the teacher for a record that is decoded."""

    @property
    def cores(self) -> float:
        """Number of cores that decode as many records as the teacher computes."""
        return self.decoding.median / self.teacher.median


def seconds_of_teacher(config: PrecomputeConfig, store: Store) -> float:
    """Return the seconds in which the teacher explains a record, from the few of the sample's first shard.

    Args:
        config: Options of the pass.
        store: Store of the sample.
    """
    shard = store.shards[0]
    count = min(_SMALLEST_STEP, shard.records)
    frames = ShardFrames(store, shard, np.arange(count)).read(0, count)
    keys = store.index.shard_keys(store.shards.number_of(shard.name))[:count]
    with torch_threads(config.cluster.threads_per_actor):
        annotate = partial(annotator_of(plan_pass(config, store)).annotate, [frames], keys)
        annotate()  # the first one warms up
        return seconds_of(annotate, count)


def seconds_of(work: Callable[[], object], records: int) -> float:
    """Run a function and return its seconds per record.

    Args:
        work: Function that processes all of the records.
        records: Number of records.
    """
    started = perf_counter()
    work()
    return (perf_counter() - started) / records


def annotator_of(plan: PassPlan) -> TeacherAnnotator:
    """Build the teacher of a pass as it is measured."""
    options = replace(plan.options, precision=plan.precision, compile=False, min_fidelity=0.0)
    return TeacherAnnotator(plan.teacher, plan.classes, plan.explainer, options, plan.store.size)


def _memory_limit(gigabytes: float | None, device: torch.device) -> float:
    """Return the bytes that a step may take.

    Args:
        gigabytes: estimate.gigabytes; None is a quarter of the memory that is free on the device.
        device: Device of the step.
    """
    if gigabytes is not None:
        return gigabytes * 1e9
    if device.type == "cuda":
        return _SHARE_OF_MEMORY * torch.cuda.mem_get_info(device)[0]
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:  # another system
        return float("inf")
    free = next((line.split()[1] for line in lines if line.startswith("MemAvailable:")), None)
    return float("inf") if free is None else _SHARE_OF_MEMORY * 1024 * float(free)


def _saved_bytes(step: Callable[[], object]) -> int:
    """Run a step and return the bytes of the tensors that its backward pass keeps, each storage once.

    Args:
        step: Function that computes a loss and its gradients.
    """
    sizes: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if not isinstance(tensor, torch.nn.Parameter):
            storage = tensor.untyped_storage()
            sizes[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        step()
    return sum(sizes.values())


def measure_annotation(
    config: PrecomputeConfig, store: Store, rounds: int, budget: TimeBudget
) -> TeacherTimes:
    """Decode a batch of the sample, and annotate it with the options of its pass, in turn.

    Compilation takes a minute or more and is not measured.

    Args:
        config: Options of the pass.
        store: Store of the sample.
        rounds: Number of measurements.
        budget: Time of the estimate.
    """
    plan = plan_pass(config, store)  # precision=auto is that of the pass
    shard = max(store.shards, key=lambda entry: entry.records)
    count = min(shard.records, config.annotate.records_per_batch)
    keys = store.index.shard_keys(store.shards.number_of(shard.name))[:count]
    records = ShardFrames(store, shard, np.arange(count))
    frames = records.read(0, count)

    with torch_threads(config.cluster.threads_per_actor):
        works: dict[str, Callable[[], object]] = {
            "decoding": partial(records.read, 0, count),
            "teacher": partial(annotator_of(plan).annotate, [frames], keys),
        }
        sides = {name: partial(seconds_of, work, count) for name, work in works.items()}
        seconds = budget.in_turn(sides, rounds, "annotation", share=0.5)
    return TeacherTimes(**{name: spread_of(times) for name, times in seconds.items()})


class _Steps:
    """A student that takes its next step on the next batch of the store."""

    def __init__(self, config: EstimateConfig, store: Store, mode: Mode) -> None:
        options = _student(config, store, mode)
        spec = StudentPlan(options, Path(str(store.folder)) / "student").spec()
        here = DistributedContext()
        self.spec = spec
        self.training = build_training(spec, here)
        self.loader = build_loader(spec, here)
        self.device = next(self.training.model.parameters()).device
        self.batches = self._batches()
        self.latest: Batch | None = None

    def take(self) -> float:
        """Take a step, or several on a GPU, and return their seconds per record, in which the batches are read."""
        return seconds_per_record(self._step, self._synchronize, self.device.type)

    def take_further(self) -> float:
        """Take the step of another student on the latest batch, whose views and targets are there already."""
        training, batch = self.training, self.latest
        assert batch is not None
        view = replace(batch, rendered=view_images(batch, self.spec.input_size))
        source, training.targets = training.targets, SharedTargets(training.targets)
        self._take(view)  # computes the targets, and is not counted
        self._synchronize()
        started = perf_counter()
        self._take(view)
        self._synchronize()
        training.targets = source
        return (perf_counter() - started) / len(batch.keys)

    def _step(self) -> int:
        """Take a step on the next batch and return its number of records."""
        self.latest = next(self.batches)
        return self._take(self.latest)

    def _take(self, batch: Batch) -> int:
        self.training.seed_step()
        trainer = self.spec.trainer
        train_step(self.training, batch, self.spec.input_size, trainer.clip_norm, trainer.agc)
        self.training.step += 1
        self.training.global_step += 1
        return len(batch.keys)

    def _synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def _batches(self) -> Iterator[Batch]:
        while True:
            yield from self.loader.epoch(self.training.epoch, device=self.device)
            self.training.epoch, self.training.step = self.training.epoch + 1, 0


class SharedTargets:
    """Target source that computes the targets of a batch once, for several students of one job."""

    def __init__(self, source: TargetSource) -> None:
        self.source = source
        self.keys: tuple[str, ...] | None = None
        self.targets: tuple[Targets, ...] = ()

    def __call__(self, batch: Batch, request: TargetRequest) -> tuple[Targets, ...]:
        if batch.keys is not self.keys:  # views of one batch share this tuple
            self.targets = self.source(batch, request)
            self.keys = batch.keys
        return self.targets


def seconds_per_record(
    step: Callable[[], int], synchronize: Callable[[], None], device_type: str
) -> float:
    """Take steps and return their seconds per record.

    A GPU's next batch is read during a step, so a single step would not contain the time in which a slower reading is
    waited for. There the first step is not counted, as its batch was read during the other student's steps.

    Args:
        step: Takes a step and returns its number of records.
        synchronize: Waits until the device has finished its work.
        device_type: Type of the device, such as cuda.
    """
    uncounted, counted = (1, _STEPS_ON_GPU) if device_type == "cuda" else (0, 1)
    for _ in range(uncounted):
        step()
        synchronize()
    started = perf_counter()
    records = sum(step() for _ in range(counted))
    synchronize()
    return (perf_counter() - started) / records


def _student(config: EstimateConfig, store: Store, mode: Mode) -> DistillConfig:
    """Return the options of a student on all records of the split that the sample has."""
    teacher = (
        replace(config.teacher, frame="full")  # as many pixels as a center crop at its size
        if mode == "live" and not isinstance(config.teacher, NoModelConfig)
        else config.teacher
    )
    options = DistillConfig(
        store=replace(config.store, path=str(store.path), teacher=()),
        student=config.student,
        method=config.method,
        augment=config.augment,
        optimizer=config.optimizer,
        trainer=replace(config.trainer, ranks=1),
        subset=type(config.subset)(),
        mode=mode,
        views=config.views,
        teacher=teacher,
        explainer=config.explainer,
        split=config.split,
        run=str(store.folder / "student"),
    )
    return resolve_distill(options, store)
