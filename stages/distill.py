"""Train one student from a store, without running a teacher unless mode=live.

    permafrost distill experiment=demo
    permafrost distill store.path=stores/demo run=my-student student=cifar student.name=resnet8 \\
        method=e2kd method.tau=4 method.lambda_map=3
    permafrost distill experiment=demo run=two-ranks trainer.ranks=2
    permafrost distill experiment=demo run=reference mode=live

Reads   <store.path> and one teacher pass in it (named by `store.teacher=` if there are several), or the teacher's
        weights with mode=live
Writes  runs/<run>/distill/: model.safetensors, model.json, checkpoint.pt, metrics.jsonl, tensorboard/, config.yaml
Rerun   the same command resumes from the last checkpoint, with any trainer.ranks, and does not change a finished run
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.cli import main
from pipeline.cluster.executors import run_training
from pipeline.config.paths import with_absolute_paths
from pipeline.config.runs import CHECKPOINT_NAME, CONTINUED, open_run, to_plain_dict
from pipeline.core.progress import show_epochs
from pipeline.models.resolve import resolve_distill
from pipeline.models.saved import is_finished
from pipeline.models.trained_weights import check_trained_weights
from pipeline.report.commands import evaluate_command
from pipeline.store.reader import Store
from pipeline.training.distill_job import Distillation, fingerprint_inputs
from pipeline.training.student_passes import (
    open_passes,
    record_named_passes,
    with_named_passes,
)

if TYPE_CHECKING:
    from collections.abc import Callable

    from pipeline.config.distillation import DistillConfig


logger = logging.getLogger("permafrost.distill")


@dataclass(frozen=True, kw_only=True)
class DistillResult:
    """Folder of the student, and the number of epochs trained by this call, 0 if it was already finished."""

    student: str
    trained_epochs: int
    last_epoch: str = ""
    """Mean loss and, on labeled records, mean training accuracy of the last epoch."""
    records_per_second: str = ""
    next: str = ""


def run(config: DistillConfig, on_epoch: Callable[[int, str], None] | None = None) -> DistillResult:
    """Train and export the student. `on_epoch` replaces the progress bar."""
    store = Store(config.store.folder)
    config = with_named_passes(resolve_distill(config, store), store, config.run)
    inputs = fingerprint_inputs(config, store, open_passes(config, store))
    with open_run("distill", config.run, config, inputs) as folder:
        return _train(config, store, folder, on_epoch)


def _train(
    config: DistillConfig,
    store: Store,
    folder: Path,
    on_epoch: Callable[[int, str], None] | None,
) -> DistillResult:
    """Train the student into its folder, unless it is finished."""
    if not is_finished(folder):
        record_named_passes(config, store)
    else:
        check_trained_weights(folder)
        logger.info("%s is finished", folder)
        command = evaluate_command(config.run, store, folder)
        return DistillResult(student=str(folder), trained_epochs=0, next=command)
    job = Distillation(config=with_absolute_paths(config), folder=folder.absolute())
    if on_epoch is not None:  # a student of a sweep, which has its own progress
        epochs = run_training(job, config.cluster, on_epoch).epochs
        return DistillResult(student=str(folder), trained_epochs=epochs)
    _announce(config, store, folder)
    with show_epochs("distill", config.trainer.epochs) as show:
        progress = run_training(job, config.cluster, show)
    return DistillResult(
        student=str(folder),
        trained_epochs=progress.epochs,
        last_epoch=progress.last_line,
        records_per_second=progress.rate(folder),
        next=evaluate_command(config.run, store, folder),
    )


def _announce(config: DistillConfig, store: Store, folder: Path) -> None:
    """Log what this call will train, and on what."""
    passes = open_passes(config, store)
    if config.mode == "live":
        teacher = f"live teacher {config.teacher.name}"
    else:
        teacher = f"{config.mode} targets of {', '.join(p.name for p in passes)}"
    subset = {k: v for k, v in to_plain_dict(config.subset).items() if v and k != "seed"}
    logger.info(
        "student %s %s, method=%s, %s: %s records of split %s in %s, trainer.epochs=%d, into %s%s",
        config.student.kind,
        config.student.name,
        config.method.kind,
        teacher if config.method.needs_teacher else "no teacher",
        f"{store.num_records(config.split):,}",
        config.split + "".join(f", subset.{name}={value}" for name, value in subset.items()),
        config.store.path,
        config.trainer.epochs,
        folder,
        CONTINUED if (folder / CHECKPOINT_NAME).exists() else "",
    )


if __name__ == "__main__":
    main("distill", run, __doc__)
