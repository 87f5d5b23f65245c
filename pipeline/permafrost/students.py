"""One student: its training from a store, its evaluation, and both as a task of a sweep."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

from permafrost.cluster.ray_training import train_on_ranks
from permafrost.commands import evaluate_command
from permafrost.config.paths import with_absolute_paths
from permafrost.config.runs import (
    CHECKPOINT_NAME,
    CONTINUED,
    mirrored_run,
    open_run,
    run_folder,
    to_plain_dict,
)
from permafrost.core.progress import show_epochs
from permafrost.evaluation.evaluator import align_columns
from permafrost.evaluation.inputs import (
    UNTRAINED,
    epoch_metric,
    named_baselines,
    open_network,
    open_student,
    open_teacher,
    trains_classifier,
    with_baselines,
)
from permafrost.evaluation.results import (
    METRICS_NAME,
    NETWORK_EVALUATION,
    TEACHER_EVALUATION,
    evaluation_folder,
    folder_of_evaluation,
    missing_evaluators,
    read_results,
    without_outputs,
)
from permafrost.models.resolve import resolve_distill
from permafrost.models.saved import is_finished, load_model
from permafrost.models.trained_weights import check_trained_weights
from permafrost.store.reader import Store
from permafrost.training.distill_job import Distillation, fingerprint_inputs
from permafrost.training.launch import run_training
from permafrost.training.student_passes import (
    open_passes,
    record_named_passes,
    with_named_passes,
)

if TYPE_CHECKING:
    from collections.abc import Callable

    from permafrost.config.distillation import DistillConfig
    from permafrost.config.verbs import EvaluateConfig
    from permafrost.evaluation.inputs import EvaluationInputs
    from permafrost.models.classifier import Classifier
    from permafrost.sweeps.runner import StudentRun

_DISTILL = logging.getLogger("permafrost.distill")
_EVALUATE = logging.getLogger("permafrost.evaluate")


# ---- training ------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class DistillResult:
    """Folder of the student, and the number of epochs trained by this call, 0 if it was already finished."""

    student: str
    trained_epochs: int
    last_epoch: str = ""
    """Mean loss and, on labeled records, mean training accuracy of the last epoch."""
    records_per_second: str = ""
    next: str = ""

    @property
    def model(self) -> Classifier:
        """The student's frozen network, loaded from its folder, from images in [0, 1] to `ModelOutput`."""
        return load_model(Path(self.student))[0]


def distill(
    config: DistillConfig, on_epoch: Callable[[int, str], None] | None = None
) -> DistillResult:
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
        _DISTILL.info("%s is finished", folder)
        command = evaluate_command(config.run, store, folder)
        return DistillResult(student=str(folder), trained_epochs=0, next=command)
    job = Distillation(config=with_absolute_paths(config), folder=folder.absolute())
    if on_epoch is not None:  # a student of a sweep, which has its own progress
        epochs = run_training(job, config.cluster, on_epoch, train_on_ranks).epochs
        return DistillResult(student=str(folder), trained_epochs=epochs)
    _announce(config, store, folder)
    with show_epochs("distill", config.trainer.epochs) as show:
        progress = run_training(job, config.cluster, show, train_on_ranks)
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
    default = to_plain_dict(type(config.subset)())
    subset = {
        k: v for k, v in to_plain_dict(config.subset).items() if v != default[k] and k != "seed"
    }
    _DISTILL.info(
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


# ---- evaluation ----------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class EvaluateResult:
    """Metrics by split, as fractions in [0, 1]."""

    metrics: str
    splits: dict[str, dict[str, Any]]
    classifier: str = ""
    """Fault of the last layer of a student, whose logits and maps mean nothing then."""
    next: str = ""

    def printed(self) -> dict[str, str]:
        """Values for the terminal: the file, and a table of the numbers, a column per split, without long lists.

        Numbers of a last layer that was not trained are left out.
        """
        shown = list(self.splits.values())
        if self.classifier:
            shown = [without_outputs(metrics) for metrics in shown]
        numbers = [dict(_numbers_of(metrics)) for metrics in shown]
        names = dict.fromkeys(chain.from_iterable(numbers))
        rows = [
            ["", *self.splits],
            *([name, *(_format_value(each.get(name)) for each in numbers)] for name in names),
        ]
        return {
            "metrics": self.metrics,
            "classifier": self.classifier,
            "results": "\n" + align_columns(rows),
            "next": self.next,
        }


_MOST_PRINTED = 8
"""Largest number of entries of a mapping that is printed, such as the accuracies of k neighbors, and not a curve."""


def _numbers_of(metrics: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    """Iterate over the numbers of nested metrics by their names, such as knn.accuracy.20."""
    for name, value in metrics.items():
        if isinstance(value, (int, float)):
            yield f"{prefix}{name}", value
        elif isinstance(value, dict) and len(value) <= _MOST_PRINTED:
            yield from _numbers_of(value, f"{prefix}{name}.")


def _format_value(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:,}" if isinstance(value, int) else f"{value:.4f}"


def evaluate(config: EvaluateConfig, name: str | None = None) -> EvaluateResult:
    """Run the missing evaluators for the student, its teacher or the given network, on each split.

    name  folder to write within the run's folder, if it is not the one that the options determine
    """
    if config.model == "teacher":  # a teacher is not compared with another student
        config = with_baselines(config, dict.fromkeys(named_baselines(config)))
        inputs, own = open_teacher(config), TEACHER_EVALUATION
    elif config.model == "network":
        inputs, own = open_network(config), NETWORK_EVALUATION
    else:
        inputs, own = open_student(config), evaluation_folder(config.evaluate.against)
    fingerprints = {
        config.model: inputs.fingerprint,
        "store": inputs.store.manifest.fingerprint,
        **inputs.others,
        **{f"teacher {teacher.name}": teacher.manifest.fingerprint for teacher in inputs.passes},
    }
    if config.evaluate.against is None:
        own = folder_of_evaluation(run_folder(config.run), own, config.evaluate, fingerprints)
    with open_run(name or own, config.run, config.shared, fingerprints) as folder:
        missing = missing_evaluators(folder, config)
        if name in (None, own):  # not one of a sweep's selections
            _EVALUATE.info(
                "%s of run %s on split %s of %s: %s; %s",
                config.model,
                config.run,
                ", ".join(config.evaluate.splits),
                config.evaluate.store or config.store.path,
                f"runs {', '.join(missing)}" if missing else "nothing to run",
                f"into {folder}",
            )
            if config.model == "student":
                _warn_of_chosen_epoch(config, inputs)
        if missing:
            from permafrost.evaluation.run import run_evaluators  # imports torch

            run_evaluators(config, inputs, folder, missing)
        found = read_results(folder)
    student = run_folder(config.run) / "distill"
    is_untrained = config.model == "student" and not trains_classifier(student)
    after = f"permafrost report store.path={config.store.path} run={config.run}"
    is_probed = bool({"knn", "linear_probe"} & found["evaluators"].keys())
    if is_untrained and not is_probed and inputs.store.manifest.classes:
        after = evaluate_command(config.run, inputs.store, student, config.evaluate.splits)
    return EvaluateResult(
        metrics=str(folder / METRICS_NAME),
        splits=found["splits"],
        classifier=UNTRAINED if is_untrained else "",
        next=after,
    )


def _warn_of_chosen_epoch(config: EvaluateConfig, inputs: EvaluationInputs) -> None:
    """Warn of results on the split by which the student's epoch was chosen."""
    metric = epoch_metric(run_folder(config.run), inputs.store.manifest.fingerprint)
    split = (metric or "").partition(".")[0]
    if split in config.evaluate.splits:
        _EVALUATE.warning(
            "the epoch of this student was chosen by %s (select_epoch), so its results on %s look better than they "
            "are; report another split",
            metric,
            split,
        )


# ---- both, in a sweep ----------------------------------------------------------------------------


@dataclass(frozen=True)
class StudentTask:
    """Task that distills and evaluates one student, in any process of the task runner."""

    run: StudentRun

    @property
    def name(self) -> str:
        """Name of the student's run."""
        return self.run.name

    @property
    def after(self) -> tuple[str, ...]:
        """Runs with which the student is compared."""
        return self.run.baselines

    def __call__(self, report: Callable[[str], None]) -> None:
        from permafrost.annotation.shard_tasks import torch_threads

        with (
            ExitStack() as stack,
            torch_threads(1),  # the same order of sums in parallel and serial execution
        ):
            for run in (*self.after, self.name):
                stack.enter_context(mirrored_run(run))
            distill(self.run.distill, lambda epoch, line: report(line))
            evaluate(self.run.evaluate, self.run.metrics_folder)
