"""Train one student from a store, without running a teacher unless mode=live.

    python -m stages.distill experiment=demo
    python -m stages.distill store.path=stores/demo run=my-student student=cifar student.name=resnet8 \\
        method=e2kd method.tau=4 method.lambda_map=3
    python -m stages.distill experiment=demo run=two-ranks trainer.ranks=2
    python -m stages.distill experiment=demo run=reference mode=live

Reads   <store.path> and one teacher pass in it (named by `store.teacher=` if there are several), or the teacher's
        weights with mode=live
Writes  runs/<run>/distill/: model.safetensors, model.json, checkpoint.pt, metrics.jsonl, tensorboard/, config.yaml
Rerun   the same command resumes from the last checkpoint, with any trainer.ranks, and does not change a finished run
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.cli import main
from pipeline.cluster.executors import run_training
from pipeline.config.paths import with_absolute_paths
from pipeline.config.runs import open_run
from pipeline.core.progress import show_epochs
from pipeline.models.resolve import resolve_distill
from pipeline.models.saved import is_finished
from pipeline.store.reader import Store
from pipeline.training.distill_job import Distillation, fingerprint_inputs, open_passes

if TYPE_CHECKING:
    from collections.abc import Callable

    from pipeline.config.distillation import DistillConfig


@dataclass(frozen=True, kw_only=True)
class DistillResult:
    """Folder of the student, and the number of epochs trained by this call, 0 if it was already finished."""

    student: str
    trained_epochs: int


def run(config: DistillConfig, on_epoch: Callable[[int, str], None] | None = None) -> DistillResult:
    """Train and export the student. `on_epoch` replaces the progress bar."""
    store = Store(Path(config.store.path))
    config = resolve_distill(config, store)
    inputs = fingerprint_inputs(config, store, open_passes(config, store))
    folder = open_run("distill", config.run, config, inputs)
    if is_finished(folder):
        return DistillResult(student=str(folder), trained_epochs=0)
    job = Distillation(config=with_absolute_paths(config), folder=folder.absolute())
    if on_epoch is not None:
        epochs = run_training(job, config.cluster, on_epoch)
    else:
        with show_epochs("distill", config.trainer.epochs) as show:
            epochs = run_training(job, config.cluster, show)
    return DistillResult(student=str(folder), trained_epochs=epochs)


if __name__ == "__main__":
    main("distill", run, __doc__)
