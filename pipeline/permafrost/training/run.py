"""A whole training, from its specification to the exported network, as shared by teach and distill.

The same code runs in the process of the stage and in each rank of a cluster.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch

from permafrost.config.runs import read_cost, save_cost
from permafrost.core.distributed import DistributedContext
from permafrost.models.saved import save_model
from permafrost.training.build import build_loader, build_training
from permafrost.training.live_targets import LiveTeacher
from permafrost.training.loop import fit
from permafrost.training.spec import TrainingJob, TrainingSpec
from permafrost.training.state import Training
from permafrost.training.step_threads import step_threads


def run_job(
    job: TrainingJob,
    on_epoch: Callable[[int, str], None],
    distributed: DistributedContext | None = None,
) -> None:
    """Train to the last epoch, starting from the folder's checkpoint if there is one, and export the network."""
    distributed = distributed or DistributedContext()
    job.prepare(distributed)
    plan = job.plan(distributed)
    at_once = plan.trainer.batch_size // plan.views_per_step
    records = len(plan.dataset) // at_once * plan.trainer.batch_size
    started = time.monotonic()

    def count_cost(epoch: int, line: str) -> None:
        nonlocal started
        now = time.monotonic()
        save_cost(job.folder, now - started, records)
        started = now
        on_epoch(epoch, line)

    read_cost(job.folder)  # a damaged file is an error before the training, not after an epoch
    training = train_to_end(plan, job.folder, count_cost, distributed)
    if distributed.is_first:
        trained = replace(job.describe(plan), steps=training.global_step)
        save_model(job.folder, training.model, trained)


def train_to_end(
    plan: TrainingSpec,
    folder: Path,
    on_epoch: Callable[[int, str], None],
    distributed: DistributedContext,
) -> Training:
    """Train a network, starting from the folder's checkpoint if there is one, and return the state at the end.

    Separate seeds are derived from the seed for initialization, record order, views, pixel augmentation and the random
    draws of a step.
    """
    if plan.trainer.num_threads is not None:
        torch.set_num_threads(plan.trainer.num_threads)
    training = build_training(plan, distributed)
    torch.set_num_threads(_choose_threads(plan, training, distributed))
    stream = build_loader(plan, distributed)
    fit(
        training,
        stream,
        trainer=plan.trainer,
        lr=plan.optimizer.lr,
        input_size=plan.input_size,
        folder=folder,
        on_epoch=on_epoch,
        after_epoch=[
            callback
            for callback in (plan.after_epoch, plan.epoch_selection)
            if callback is not None
        ],
    )
    if plan.epoch_selection is not None and distributed.is_first:
        plan.epoch_selection.restore(training.model)
    return training


def _choose_threads(plan: TrainingSpec, training: Training, distributed: DistributedContext) -> int:
    """Return the number of torch threads of this process: the option's, or one by the work of a step on the CPU."""
    available = plan.trainer.num_threads or torch.get_num_threads()
    device = next(training.model.parameters()).device
    if plan.trainer.num_threads is not None or device.type != "cpu":
        return available
    networks = [(training.model, plan.input_size)]
    if isinstance(training.targets, LiveTeacher):
        networks.append((training.targets.model, training.targets.input_size))
    of_table = plan.dataset.store.is_table
    inputs = [(net, size[1:] if of_table else (3, *size)) for net, size in networks]
    return step_threads(inputs, plan.trainer.batch_size // distributed.world_size, available)
