"""A whole training, from its specification to the last epoch: phases, epochs, steps and checkpoints.

The same code runs in the process of the stage and in each rank of a cluster.

The operations of small networks take less than a millisecond. Several threads then wait for each other more than they
compute, above all next to other processes, and the last digits of the weights depend on the machine's cores. The number
of torch threads on a CPU is therefore chosen by the work of a step.

Parts of a loss, such as a paraphraser or a head, may be trained first, on the teacher alone (`before_first_step`). This
phase reads the batches of the student's first epochs, and its result is in the first checkpoint. A run that is killed
in this phase starts it again with the same result. A run that resumes from a checkpoint skips it.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from permafrost.config.training import TrainerOptions
from permafrost.core.batches import Targets
from permafrost.core.digests import derive_seed
from permafrost.core.distributed import DistributedContext
from permafrost.core.errors import device_errors
from permafrost.core.generators import kept_generators
from permafrost.core.interrupts import check_interrupted
from permafrost.loading.geometry import TargetRequest
from permafrost.loading.loader import TrainLoader
from permafrost.loading.mixtures import mix_targets
from permafrost.models.classifier import Classifier
from permafrost.models.compute import deterministic_algorithms, device_name, torch_threads
from permafrost.models.cost import measure_cost
from permafrost.runs.folder import CHECKPOINT_NAME
from permafrost.runs.mirrors import upload_mirror
from permafrost.runs.trackers import TrackedRun
from permafrost.training.build import build_loader, build_training
from permafrost.training.checkpoint import load_checkpoint, save_checkpoint
from permafrost.training.epoch_maps import draw_maps
from permafrost.training.epoch_selection import AccuracyCurve
from permafrost.training.metric_log import MetricWriter, StepLog
from permafrost.training.optim import check_warmup, learning_rate
from permafrost.training.spec import TrainingSpec
from permafrost.training.state import Training, seed_generators
from permafrost.training.step import terms_of_split, train_step
from permafrost.training.targets import LiveTeacher

logger = logging.getLogger("permafrost.training")

_MACS_PER_THREAD = 250 * 10**6
"""Multiply-accumulates of a step's forward passes per thread (docs/results/benchmarks.md)."""


def step_threads(
    networks: Sequence[tuple[Classifier, tuple[int, ...]]], records: int, available: int
) -> int:
    """Return the number of threads of a step, from 1 to `available`.

    Args:
        networks: Networks that a step runs on the CPU, each with the shape of one record's input.
        records: Number of records in a step of this process.
        available: Maximum number of threads.
    """
    if available == 1:
        return 1
    macs = sum(measure_cost(network, torch.zeros(1, *shape)).macs for network, shape in networks)
    return min(max(macs * records // _MACS_PER_THREAD, 1), available)


# ---- before the first step -------------------------------------------------------------------------


@dataclass(frozen=True)
class _TeacherBatches:
    """Batches of a training with the teacher's targets (losses.base.TeacherBatches)."""

    training: Training
    stream: TrainLoader

    def epoch(self, number: int) -> Iterator[tuple[Targets, Tensor]]:
        training = self.training
        device = next(training.model.parameters()).device
        for step, batch in enumerate(self.stream.epoch(number, device=device)):
            seed_generators(
                derive_seed(
                    training.seed, "teacher phase", number, step, training.distributed.rank
                ),
                device,
            )
            (targets,) = training.read_targets(batch, TargetRequest((1, 1), with_maps=False))
            yield mix_targets(targets), batch.view_index


# ---- epochs --------------------------------------------------------------------------------------


def fit(
    training: Training,
    stream: TrainLoader,
    *,
    trainer: TrainerOptions,
    lr: float,
    input_size: tuple[int, int],
    tracked: TrackedRun,
    on_epoch: Callable[[int, str], None],
    curve: Callable[[Classifier, int], Mapping[str, float]] | None = None,
    after_epoch: Sequence[Callable[[Classifier, int], bool | None]] = (),
) -> None:
    """Train to the last epoch, starting from the folder's checkpoint if there is one.

    The first rank writes checkpoint.pt, metrics.jsonl and the numbers of `tracked` into its folder.

    Args:
        training: State before the first step, into which a checkpoint is loaded.
        stream: Loader of this rank's batches.
        trainer: Options of the training.
        lr: Base learning rate, to which the schedule is applied.
        input_size: (height, width) of the student's view.
        tracked: Run of the tracker, with the folder of the training.
        on_epoch: Called by the first rank after each epoch with its number and a line of progress.
        curve: Function of the network and the number of epochs done whose numbers are in the line of an epoch's last
            step in metrics.jsonl.
        after_epoch: Functions that the first rank calls before an epoch's checkpoint with the network and the number of
            epochs done; if one of them returns True, a checkpoint is written in any case.

    Raises:
        ConfigError: If a warm-up in steps does not end before the training does.
        DamagedFileError: If the checkpoint or the metrics up to its step are damaged.
        DivergedError: If the loss is not finite.
    """
    # 1. The state: that of the checkpoint, or a new one after the phase before its first step.
    check_warmup(trainer, stream.num_steps)
    folder = tracked.folder
    is_new = not (folder / CHECKPOINT_NAME).exists()
    load_checkpoint(training, folder)
    if is_new and training.loss.before_first_step(_TeacherBatches(training, stream)):
        save_checkpoint(training, folder)
    is_first = training.distributed.is_first
    if is_first and not is_new and training.epoch < trainer.epochs:
        logger.info(
            "continues from the checkpoint: epoch %d of %d, after %d steps",
            training.epoch + 1,
            trainer.epochs,
            training.global_step,
        )
    # 2. The metrics, cut to the step of the state.
    metric_file = MetricWriter(tracked, training.global_step) if is_first else nullcontext()
    with metric_file as writer:
        log = StepLog(
            # The first rank writes the mean over ranks.
            write=(lambda line: None) if writer is None else writer.write,
            every_steps=trainer.log_every_steps,
        )

        def save() -> None:
            """Write lines, then the checkpoint that counts them, then their copies."""
            log.flush(training)
            if writer is not None:
                writer.sync()
            save_checkpoint(training, folder)
            if is_first:
                upload_mirror(folder)

        # 3. The epochs.
        while training.epoch < trainer.epochs:
            for batch in stream.epoch(training.epoch, training.step, training.model.device):
                check_interrupted()
                training.seed_step()
                rate = learning_rate(trainer, lr, training.epoch, training.step, stream.num_steps)
                for group in training.optimizer.param_groups:
                    group["lr"] = rate
                terms = train_step(training, batch, input_size, trainer.clip_norm, trainer.agc)
                training.step += 1
                training.global_step += 1
                log.add(training, terms, len(batch.keys))
                if training.step < stream.num_steps:
                    if log.is_due:
                        log.flush(training)
                    if _is_nth(training.global_step, trainer.checkpoint_every_steps):
                        save()
            epochs_done = training.epoch + 1
            numbers = {**curve(training.network, epochs_done)} if curve and is_first else {}
            if is_first and isinstance(curve, AccuracyCurve):
                size = trainer.batch_size // training.distributed.world_size
                for name, records in curve.term_records_after(epochs_done).items():
                    values = terms_of_split(training, records, size, input_size)
                    numbers |= {f"{name}{term}": value for term, value in values.items()}
            log.flush(training, numbers)
            training.epoch, training.step = epochs_done, 0
            if (
                writer is not None
                and isinstance(curve, AccuracyCurve)
                and (maps := curve.maps_after(epochs_done)) is not None
            ):
                draw_maps(maps, training, input_size, writer.tracker, folder)
            is_wanted = False
            if is_first:
                answers = [callback(training.network, training.epoch) for callback in after_epoch]
                is_wanted = any(answers)
            is_due = _is_nth(training.epoch, trainer.checkpoint_every_epochs)
            if is_wanted or is_due or training.epoch == trainer.epochs:
                save()
            if is_first:
                on_epoch(training.epoch, log.describe_last())


def _is_nth(count: int, interval: int | None) -> bool:
    return interval is not None and count % interval == 0


# ---- run -------------------------------------------------------------------------------------------


def train_to_end(
    spec: TrainingSpec,
    tracked: TrackedRun,
    on_epoch: Callable[[int, str], None],
    distributed: DistributedContext,
) -> Training:
    """Train a network, starting from the folder's checkpoint if there is one, and return the state at the end.

    Separate seeds are derived from the seed for initialization, record order, views, pixel augmentation and the random
    draws of a step. Torch's generators and its number of threads are as before afterwards.

    Args:
        spec: Specification of the training.
        tracked: Run of the tracker, with the folder of the training.
        on_epoch: Called by the first rank after each epoch with its number and a line of progress.
        distributed: Ranks that train together.

    Raises:
        ConfigError: If data, loss and network do not fit.
        DamagedFileError: If the checkpoint, the metrics or the weights of the selected epoch are damaged.
        DivergedError: If the loss is not finite.
    """
    threads = torch_threads(spec.trainer.num_threads or torch.get_num_threads())
    advice = (
        f"lower trainer.batch_size={spec.trainer.batch_size}, or set trainer.precision=bfloat16"
    )
    with threads, device_errors(advice), kept_generators():
        return _train(spec, tracked, on_epoch, distributed)


def _train(
    spec: TrainingSpec,
    tracked: TrackedRun,
    on_epoch: Callable[[int, str], None],
    distributed: DistributedContext,
) -> Training:
    """Run the training, which sets torch's threads and seeds its generators."""
    # 1. The state before the first step. It seeds torch's generators, so nothing is drawn before it.
    training = build_training(spec, distributed)
    device = training.model.device
    if distributed.is_first:
        logger.info(
            "training on %s in %s, ranks %d",
            device_name(device),
            training.compute_settings.precision_name,
            distributed.world_size,
        )
    # 2. The number of threads, which follows from the work of the network.
    torch.set_num_threads(_choose_threads(spec, training, distributed))
    # 3. All epochs, from the folder's checkpoint on.
    with deterministic_algorithms(device, enabled=spec.trainer.deterministic):
        fit(
            training,
            build_loader(spec, distributed),
            trainer=spec.trainer,
            lr=spec.optimizer.lr,
            input_size=spec.input_size,
            tracked=tracked,
            on_epoch=on_epoch,
            curve=spec.curve,
            after_epoch=[
                callback
                for callback in (spec.after_epoch, spec.epoch_selection)
                if callback is not None
            ],
        )
    # 4. The weights of the selected epoch, after the last checkpoint, which has those of the last epoch.
    if spec.epoch_selection is not None and distributed.is_first:
        spec.epoch_selection.restore(training.network)
    return training


def _choose_threads(spec: TrainingSpec, training: Training, distributed: DistributedContext) -> int:
    """Return the number of torch threads of this process: the option's, or one by the work of a step on the CPU."""
    available = spec.trainer.num_threads or torch.get_num_threads()
    if spec.trainer.num_threads is not None or training.model.device.type != "cpu":
        return available
    networks = [(training.model, spec.input_size)]
    if isinstance(training.targets, LiveTeacher):
        networks.append((training.targets.model, training.targets.input_size))
    form = spec.dataset.store.form
    inputs = [(network, form.input_shape(size)) for network, size in networks]
    return step_threads(inputs, spec.trainer.batch_size // distributed.world_size, available)
