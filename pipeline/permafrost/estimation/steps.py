"""Seconds a record of a student's step with stored targets, and of the same step with a live teacher."""

from __future__ import annotations

from dataclasses import replace
from time import perf_counter
from typing import TYPE_CHECKING

import torch

from permafrost.annotation.shard_tasks import torch_threads
from permafrost.config.distillation import DistillConfig
from permafrost.config.models import NoModelConfig
from permafrost.core.distributed import DistributedContext
from permafrost.core.errors import ConfigError, require
from permafrost.core.progress import progress
from permafrost.estimation.sample import Spread, spread_of
from permafrost.models.resolve import resolve_distill
from permafrost.training.build import build_loader, build_training
from permafrost.training.distill_job import Distillation
from permafrost.training.step import train_step

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from permafrost.config.methods import Mode
    from permafrost.config.verbs import EstimateConfig
    from permafrost.core.records import Batch
    from permafrost.store.reader import Store


_STEPS_ON_GPU = 4
"""Steps that are counted together on a GPU."""


def measure_steps(config: EstimateConfig, store: Store) -> tuple[Spread, Spread, Spread]:
    """Take steps of two students in turn, one with the targets of the store's passes and one with a live teacher.

    Returns the seconds a record of a step with stored targets, of one with a live teacher, and of their difference in
    each round, which may be negative. The batches are read from the store.
    Raises ConfigError or StoreMismatchError if there is no such student, such as for a method of live teachers only.
    """
    require(
        config.mode != "live",
        "mode=live reads no stored targets; to compare a store with it, set mode=frozen or mode=replay",
    )
    require(
        config.method.needs_teacher,
        f"method={config.method.kind} uses no teacher, so there is nothing to store for it",
    )
    wanted = config.trainer.batch_size // config.views.per_step
    held = store.num_records(config.split)
    if held < wanted:
        raise ConfigError(
            f"the sample has {held} records of split {config.split}, fewer than trainer.batch_size={wanted}; raise "
            "estimate.shards or estimate.shard_records, or lower trainer.batch_size"
        )
    with torch_threads(config.cluster.threads_per_actor):
        stored, live = _Steps(config, store, config.mode), _Steps(config, store, "live")
        stored.take()
        live.take()
        rounds = []
        with progress("steps", total=config.estimate.rounds, unit="round") as bar:
            for number in range(config.estimate.rounds):
                in_turn = (live, stored) if number % 2 else (stored, live)
                seconds = {steps: steps.take() for steps in in_turn}
                rounds.append((seconds[stored], seconds[live]))
                bar.update(1)
    saved = [with_live - with_stored for with_stored, with_live in rounds]
    with_stored, with_live = zip(*rounds, strict=True)
    return spread_of(with_stored), spread_of(with_live), spread_of(saved)


class _Steps:
    """A student that takes its next step on the next batch of the store."""

    def __init__(self, config: EstimateConfig, store: Store, mode: Mode) -> None:
        options = _student(config, store, mode)
        spec = Distillation(config=options, folder=store.path / "student").plan()
        here = DistributedContext()
        self.spec = spec
        self.training = build_training(spec, here)
        self.loader = build_loader(spec, here)
        self.device = next(self.training.model.parameters()).device
        self.batches = self._batches()

    def take(self) -> float:
        """Take a step, or several on a GPU, and return their seconds a record, in which the batches are read."""
        return seconds_per_record(self._step, self._synchronize, self.device.type)

    def _step(self) -> int:
        """Take a step and return its number of records."""
        batch = next(self.batches)
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


def seconds_per_record(
    step: Callable[[], int], synchronize: Callable[[], None], device_type: str
) -> float:
    """Take steps and return their seconds a record.

    A GPU's next batch is read during a step, so a single step would not contain the time in which a slower reading is
    waited for. There the first step is not counted, as its batch was read during the other student's steps.

    step  takes a step and returns its number of records
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
    live = mode == "live"
    teacher = config.teacher
    if live and not isinstance(teacher, NoModelConfig):
        teacher = replace(teacher, frame="full")  # as many pixels as a center crop at its size
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
        run=str(store.path / "student"),
    )
    return resolve_distill(options, store)
