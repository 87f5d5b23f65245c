"""Training loop over epochs and steps with checkpoints, for teachers and students."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path

from permafrost.config.runs import CHECKPOINT_NAME
from permafrost.config.training import TrainerOptions
from permafrost.core.interrupts import check_interrupted
from permafrost.loading.loader import TrainLoader
from permafrost.models.classifier import Classifier
from permafrost.training.auxiliary_phase import pretrain_loss
from permafrost.training.checkpoint import load_checkpoint, save_checkpoint
from permafrost.training.metric_log import MetricWriter, StepLog
from permafrost.training.optim import check_warmup, learning_rate
from permafrost.training.state import Training
from permafrost.training.step import train_step

# ---- epochs --------------------------------------------------------------------------------------


def fit(
    training: Training,
    stream: TrainLoader,
    *,
    trainer: TrainerOptions,
    lr: float,
    input_size: tuple[int, int],
    folder: Path,
    on_epoch: Callable[[int, str], None],
    after_epoch: Sequence[Callable[[Classifier, int], bool | None]] = (),
) -> None:
    """Train to the last epoch, starting from the folder's checkpoint if there is one.

    The first rank writes checkpoint.pt, metrics.jsonl and TensorBoard events into `folder`.

    on_epoch     called by the first rank after each epoch with its number and a line of progress
    after_epoch  functions that the first rank calls before an epoch's checkpoint with the network and the number of
                 epochs done; if one of them returns True, a checkpoint is written in any case
    """
    device = next(training.model.parameters()).device
    check_warmup(trainer, stream.num_steps)
    is_new = not (folder / CHECKPOINT_NAME).exists()
    load_checkpoint(training, folder)
    if is_new and training.loss.pretraining is not None:
        pretrain_loss(training, stream)
        save_checkpoint(training, folder)
    with ExitStack() as stack:
        writer = None
        if training.distributed.is_first:
            writer = stack.enter_context(MetricWriter(folder, training.global_step))
        log = StepLog(
            write=_discard if writer is None else writer.write, every_steps=trainer.log_every_steps
        )

        def save() -> None:
            log.flush(training)
            if writer is not None:
                writer.sync()
            save_checkpoint(training, folder)

        while training.epoch < trainer.epochs:
            for batch in stream.epoch(training.epoch, training.step, device):
                check_interrupted()
                training.seed_step()
                rate = learning_rate(trainer, lr, training.epoch, training.step, stream.num_steps)
                for group in training.optimizer.param_groups:
                    group["lr"] = rate
                terms = train_step(training, batch, input_size, trainer.clip_norm, trainer.agc)
                training.step += 1
                training.global_step += 1
                log.add(training, terms, len(batch.keys))
                if training.step < stream.num_steps and _is_nth(
                    training.global_step, trainer.checkpoint_every_steps
                ):
                    save()
            log.flush(training)
            training.epoch, training.step = training.epoch + 1, 0
            is_wanted = False
            if training.distributed.is_first:
                answers = [callback(training.model, training.epoch) for callback in after_epoch]
                is_wanted = any(answers)
            is_due = _is_nth(training.epoch, trainer.checkpoint_every_epochs)
            if is_wanted or is_due or training.epoch == trainer.epochs:
                save()
            if training.distributed.is_first:
                on_epoch(training.epoch, log.describe_last())


def _is_nth(count: int, interval: int | None) -> bool:
    return interval is not None and count % interval == 0


def _discard(line: dict[str, float]) -> None:
    """Ignore a line of metrics, because the first rank writes the mean over ranks."""
