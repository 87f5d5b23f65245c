"""Train one student from a store, without running a teacher unless mode=live.

    permafrost distill experiment=demo
    permafrost distill store.path=stores/demo run=my-student student=cifar student.name=resnet8 \\
        method=e2kd method.tau=4 method.lambda_map=3
    permafrost distill experiment=demo run=two-ranks trainer.ranks=2
    permafrost distill experiment=demo run=reference mode=live

Reads   <store.path> and one teacher pass in it (named by `store.teacher=` if there are several), or the teacher's
        weights with mode=live
Writes  runs/<run>/distill/: model.safetensors, model.json, checkpoint.pt, metrics.jsonl, tensorboard/, config.yaml
        (logger= takes the place of tensorboard/)
Rerun   the same command resumes from the last checkpoint, with any trainer.ranks, and does not change a finished run
"""

from __future__ import annotations

import logging
import pkgutil
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Self

from permafrost.config.builder import to_plain_dict
from permafrost.config.distillation import DistillConfig
from permafrost.config.methods import SeveralConfig
from permafrost.config.paths import with_absolute_paths
from permafrost.config.training import TrainerOptions
from permafrost.core.progress import show_epochs
from permafrost.evaluation.trained_student import TrainedStudent
from permafrost.loading.subset import (
    HOLDOUT,
    rows_of_split,
    select_training_rows,
)
from permafrost.models.network import Network
from permafrost.models.read_files import digests_of_reads
from permafrost.models.resolve import resolve_distill
from permafrost.models.saved import SavedNetwork, TrainedModel
from permafrost.runs.folder import CONFIG_NAME, PassRecords, RunFolder, nearest_run, pass_inputs
from permafrost.runs.trackers import check_logger
from permafrost.store.reader import Store
from permafrost.training.job import TrainingJob, fit_batch, records_of_steps
from permafrost.training.student_passes import (
    check_passes,
    describe_moved_features_risk,
    explainer_of,
    live_teacher,
    open_passes,
    open_student_store,
    with_named_passes,
)

if TYPE_CHECKING:
    from torch import nn

    from permafrost.core.distributed import DistributedContext
    from permafrost.losses.base import DistillationLoss
    from permafrost.training.spec import TrainingSpec

logger = logging.getLogger("permafrost.distill")


@dataclass(frozen=True, kw_only=True)
class DistillResult:
    """Folder of the student, and the number of epochs trained by this call, 0 if it was already finished."""

    student: str
    trained_epochs: int
    last_epoch: str = ""
    """Mean loss and, on labeled records, mean training accuracy of the last epoch."""
    picture: str = ""
    """Picture that the student receives outside of its views, empty for a table."""
    records_per_second: str = ""
    next: str = ""
    network: nn.Module | None = field(default=None, repr=False)
    """The network of a Python program that was trained."""

    @property
    def model(self) -> nn.Module:
        """The program's own network, or the student's frozen one, from images in [0, 1] to `ModelOutput`."""
        return self.network or SavedNetwork(Path(self.student)).load()[0]


def distill_student(
    config: DistillConfig, on_epoch: Callable[[int, str], None] | None = None
) -> DistillResult:
    """Train and export the student.

    Args:
        config: Options of the command.
        on_epoch: Function that receives the number of each epoch and its line of progress, in place of the progress
            bar; None shows the bar.

    Raises:
        ConfigError: If the options do not fit the store, or the package of `logger` is not installed.
        StoreMismatchError: If a pass does not have what the method reads.
    """
    return plan_student(config).run(on_epoch)


def plan_student(config: DistillConfig) -> StudentPlan:
    """Resolve the options of a student, and open what it is trained on.

    Raises:
        ConfigError: If the options do not fit the store or the run's folder, or the package of `logger` is not
            installed.
        StoreMismatchError: If a name fits no pass or several.
    """
    check_logger(config.logger)
    folder = RunFolder(config.run).path / "distill"
    records = PassRecords([folder])
    store = open_student_store(config, records)
    resolved = with_named_passes(resolve_distill(config, store), store, records)
    return StudentPlan(resolved, folder, store).check_folder().check_contents()


class StudentPlan(TrainingJob):
    """The training of one student: its resolved options, its store and its passes."""

    options: DistillConfig

    def __init__(self, options: DistillConfig, folder: Path, store: Store | None = None) -> None:
        """Open the passes.

        Args:
            options: Options of the command, resolved for the store.
            folder: Folder of the training in that of its run.
            store: The store, None to open it.

        Raises:
            StoreMismatchError: If no pass is named and the store has several of stored views, or a name fits none.
        """
        if store is None:
            store = open_student_store(options, PassRecords([folder]))
        super().__init__(options, folder, store)
        self.passes = open_passes(options, self.store)

    @property
    def trainer(self) -> TrainerOptions:
        return self.options.trainer

    @property
    def records(self) -> int:
        rows = select_training_rows(self.store.index, self.options.split, self.options.subset)
        return records_of_steps(len(rows), self._fit_batch(len(rows)), self.options.views.per_step)

    def inputs(self) -> dict[str, str]:
        config, classes = self.options, self.store.manifest.classes
        inputs = {"store": self.store.manifest.fingerprint, **pass_inputs(self.passes)}
        if (live := live_teacher(config)) is not None:
            from permafrost.losses.base import build_loss

            reads_head = build_loss(config.method).needs.reads_head
            inputs["live teacher"] = Network(live, classes).digest(reads_head=reads_head)
        files = {
            **config.student.fingerprint_files(),
            **digests_of_reads(config.student, len(classes) or 1),
        }
        inputs |= {f"student.{option}": sha256 for option, sha256 in files.items()}
        if config.student.weights is not None:
            student = Network(config.student, classes, "student")
            inputs["student.weights"] = student.identify_start("student.weights")
        return inputs

    def next_command(self) -> str:
        """Return the command that evaluates the student."""
        return TrainedStudent(self.folder).evaluate_command(self.run_name, self.store)

    def describe_work(self) -> dict[str, str]:
        options = self.options
        others = RunFolder(self.run_name).path.parent.glob("*/distill")
        new = "" if (self.folder / CONFIG_NAME).exists() else self.describe_new(others)
        teacher = "no teacher"
        if options.method.needs_teacher and options.mode == "live":
            teacher = f"live teacher {options.teacher.name}"
        elif options.method.needs_teacher:
            teacher = (
                f"{options.mode} targets of {', '.join(teacher.name for teacher in self.passes)}"
            )
        if options.mode == "replay":
            visits = options.trainer.epochs * options.views.per_step / self.passes[0].num_views
            teacher += f" ({self.passes[0].num_views} stored views, each seen {visits:.3g} times)"
        subset, default = to_plain_dict(options.subset), to_plain_dict(type(options.subset)())
        changed = "".join(
            f", subset.{name}={value}"
            for name, value in subset.items()
            if value != default[name] and name != "seed"
        )
        return {
            "student": options.student.label,
            "method": options.method.kind,
            "targets": teacher,
            "records": f"{self.store.num_records(options.split):,} records of split {options.split}{changed} "
            f"in {options.store.path}",
            "epochs": str(options.trainer.epochs),
            "folder": self.describe_folder(),
            **({"new": new} if new else {}),
        }

    def describe_new(self, folders: Iterable[Path]) -> str:
        """Say what differs from the nearest student of the same store.

        Args:
            folders: Folders of other trainings.
        """
        return nearest_run(self.options, self.inputs(), folders)

    def run(self, on_epoch: Callable[[int, str], None] | None = None) -> DistillResult:
        """Train and export the student, unless it is finished.

        Args:
            on_epoch: As in `distill_student`.
        """
        folder = str(self.folder)
        with self.open_folder():
            if self.is_finished:
                logger.info("%s is finished", self.folder)
                return DistillResult(student=folder, trained_epochs=0, next=self.next_command())
            if on_epoch is not None:  # a student of a sweep, which has its own progress
                return DistillResult(student=folder, trained_epochs=self.finish(on_epoch).epochs)
            logger.info(
                "student %(student)s, method=%(method)s, %(targets)s: %(records)s, trainer.epochs=%(epochs)s, into "
                "%(folder)s",
                self.describe_work(),
            )
            with show_epochs("distill", self.trainer.epochs, self.records) as show:
                progress = self.finish(show, announces=True)
            return DistillResult(
                student=folder,
                trained_epochs=progress.epochs,
                last_epoch=progress.last_line,
                picture=str(SavedNetwork(self.folder).describe().picture or ""),
                records_per_second=progress.rate(self.folder),
                next=self.next_command(),
            )

    def check_contents(self) -> Self:
        """Return the plan, after the checks of splits, network and what the method reads, unless it is finished.

        Raises:
            ConfigError: If a split or the network does not exist, or too few records are selected.
            StoreMismatchError: If a pass does not have what the method reads.
        """
        from permafrost.models.providers import published  # imports torch

        if SavedNetwork(self.folder).is_finished:
            return self
        splits = {*self.options.curve.splits, (self.options.select_epoch or "").partition(".")[0]}
        for split in splits - {"", HOLDOUT}:
            rows_of_split(self.store.index, split)
        self._plan_loss()
        if ":" not in self.options.student.name:  # that of a hub or a folder is built to be known
            published(self.options.student)
        select_training_rows(self.store.index, self.options.split, self.options.subset)
        return self

    def _plan_loss(self) -> tuple[DistillationLoss, int]:
        """Build the loss, after the checks of what it reads; return it and the student's number of classes."""
        from permafrost.losses.base import build_loss

        config, passes = self.options, self.passes
        loss = build_loss(config.method)
        if passes:
            check_passes(config, passes, loss)
        if config.mode == "replay":
            self.store.compared_with(passes)  # refused now and not after the last epoch
        with_logits = (teacher.num_classes for teacher in passes if teacher.manifest.has_logits)
        # Without logits and labels the last layer is not trained, and has one output.
        num_classes = next(with_logits, max(1, len(self.store.manifest.classes)))
        if (live := live_teacher(config)) is not None:
            num_classes = live.classes or num_classes
        loss.plan(config, passes, num_classes)
        return loss, num_classes

    def spec(self, distributed: DistributedContext | None = None) -> TrainingSpec:
        from permafrost.loading.dataset import StoreDataset, rows_with_targets
        from permafrost.loading.decode_threads import decode_threads_of
        from permafrost.models.explanations import DEFAULT_EXPLAINER, resolve_explainer
        from permafrost.training.epoch_selection import plan_curve, select_epochs
        from permafrost.training.spec import TrainingSpec

        config, store, passes = with_absolute_paths(self.options), self.store, self.passes
        loss, num_classes = self._plan_loss()
        rows = select_training_rows(store.index, config.split, config.subset)
        if passes:
            rows = rows_with_targets(store, rows, passes)
        live, live_explainer = live_teacher(config), config.explainer
        if live is not None:
            live_explainer = resolve_explainer(config.explainer, store, num_classes)
        expansion = config.views.expansion if config.mode == "live" else ""
        return TrainingSpec(
            dataset=StoreDataset(
                store,
                rows,
                passes,
                num_classes=num_classes,
                output=[loss.outputs_of(teacher.name) for teacher in passes],
                decode_threads=decode_threads_of(config.trainer, distributed),
                blanks_maps=config.augment.blanks_maps,
                still_maps=any(
                    needs.map_control == "unaugmented"
                    for teacher in passes
                    for needs in loss.needs_of(teacher.name)
                ),
                scaled_maps=loss.needs.scaled_maps,
            ),
            model=config.student,
            num_classes=num_classes,
            loss=loss,
            augment=config.augment,
            optimizer=config.optimizer,
            trainer=self._fit_batch(len(rows)),
            seed=config.seed,
            explainer=explainer_of(passes, loss) or DEFAULT_EXPLAINER
            if live is None
            else loss.needs.explainer or live_explainer.line,
            sums_teachers=isinstance(config.method, SeveralConfig),
            replays=config.mode == "replay",
            views_per_step=config.views.per_step,
            expand_views=pkgutil.resolve_name(expansion) if expansion else None,
            live_teacher=live,
            live_explainer=live_explainer,
            curve=plan_curve(config, store, passes, num_classes, loss),
            epoch_selection=select_epochs(config, self.folder, store, passes, num_classes),
            warning=describe_moved_features_risk(config, passes, loss),
        )

    def describe(self, spec: TrainingSpec) -> TrainedModel:
        store, passes = self.store, self.passes
        compared = store.compared_with(passes) if spec.replays else passes
        return TrainedModel(
            config=with_absolute_paths(self.options).student,
            num_classes=spec.num_classes,
            classes=spec.class_names,
            input_size=spec.input_size,
            picture=spec.picture,
            teachers=tuple(teacher.name for teacher in compared),
            split=self.options.split,
            subset=self.options.subset,
            explainer=spec.loss.needs.explainer or "",
        )

    def _fit_batch(self, rows: int) -> TrainerOptions:
        """Return the trainer options with the batches of a selection."""
        config = self.options
        return fit_batch(config.trainer, rows, config.views.per_step, pairs=config.augment.mixes)
