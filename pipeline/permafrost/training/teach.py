"""Train a teacher on a store's labels.

    permafrost teach experiment=demo
    permafrost teach store.path=stores/demo run=my-teacher teacher=cifar teacher.name=resnet20 \\
        teaching.split=train teaching.trainer.epochs=30
    permafrost teach store.path=stores/demo run=folds teacher=cifar teaching.folds=5      (for teacher=folds)

Reads   <store.path> (packed, without a teacher pass)
Writes  runs/<run>/teach/: model.safetensors, model.json, checkpoint.pt, metrics.jsonl, metrics.json, config.yaml,
        tensorboard/; with teaching.folds the same in fold-0/ and so on; a teaching with a preparation also writes its
        result here, and as an artifact of the store
Rerun   the same command resumes from the last checkpoint, and does not change a finished run
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, replace
from statistics import mean
from typing import Any, ClassVar

import numpy as np

from permafrost.cluster.executors import ExecutorChoice
from permafrost.config.models import FoldsModelConfig
from permafrost.config.paths import with_absolute_paths
from permafrost.config.teaching import TeachConfig
from permafrost.config.verbs import Plan
from permafrost.core.errors import UserError, shorten
from permafrost.core.interrupts import check_interrupted
from permafrost.core.progress import progress
from permafrost.evaluation.results import METRICS_NAME
from permafrost.loading.subset import rows_of_split
from permafrost.models.saved import SavedNetwork, save_model
from permafrost.models.trained_weights import MODEL_NAME
from permafrost.runs.folder import PassRecords, RunFolder, mirrored_run
from permafrost.runs.mirrors import RunFiles
from permafrost.storage.addresses import is_address
from permafrost.storage.rooted_paths import RootedPath, rooted
from permafrost.store.reader import Store
from permafrost.training.teacher_training import (
    TeacherPlan,
    TeachResult,
    pass_command,
    plan_training,
)

logger = logging.getLogger("permafrost.teach")


class FoldsError(UserError, RuntimeError):
    """Error for folds that could not be finished. The others are kept."""


@dataclass(frozen=True)
class FoldTask:
    """Task that trains and evaluates the network of one fold, in any process of the task runner."""

    options: TeachConfig
    after: ClassVar[tuple[str, ...]] = ()
    """No other task."""

    def __reduce__(self) -> tuple[Any, ...]:
        return FoldTask, (with_absolute_paths(self.options),)

    @property
    def name(self) -> str:
        """Name of the fold's folder."""
        return f"fold-{self.options.teaching.fold}"

    @property
    def folder(self) -> RootedPath:
        """Folder of the fold, which a task of a job array claims."""
        run = self.options.run
        path = run if is_address(run) else str(RunFolder(run).path)
        root, _, teach = path.rpartition("/")  # a claim lies next to the folder
        return rooted(root) / teach / self.name

    def is_done(self) -> bool:
        """Return whether the network is trained and evaluated, here or on another machine."""
        RunFiles(self.options.run).fetch(self.name)
        return (RunFolder(self.options.run).path / self.name / METRICS_NAME).exists()

    def plan(self) -> TeacherPlan:
        """Plan the training.

        Raises:
            ConfigError: If the folder has results of other options.
        """
        return plan_training(self.options)

    def __call__(self, report: Callable[[str], None]) -> None:
        from permafrost.models.compute import torch_threads  # imports torch

        # The same order of sums in parallel and serial execution.
        with mirrored_run(self.options.run), torch_threads(1):
            self.plan().run(lambda epoch, line: report(line))


class FoldsPlan(Plan):
    """The training of the networks of all folds, and of the teacher that they are together."""

    def __init__(self, options: TeachConfig, store: Store) -> None:
        """Describe the folds.

        Args:
            options: Options of the command.
            store: The store, or the part of it that the folds read.
        """
        self.options, self.store = options, store
        self.run_folder = RunFolder(options.run)
        self.folder = self.run_folder.path / "teach"
        each = replace(options, run=f"{options.run}/teach")
        self.tasks = [
            FoldTask(replace(each, teaching=replace(each.teaching, fold=fold)))
            for fold in range(options.teaching.folds)
        ]

    def describe_work(self) -> dict[str, str]:
        plans = [task.plan() for task in self.tasks]
        left = ", ".join(task.name for task in self.tasks if not task.is_done())
        return {
            **plans[0].describe_work(),
            "records": f"{self.store.num_records(self.options.teaching.split):,} records of split "
            f"{self.options.teaching.split} in {len(plans)} folds, each left out of one network's training",
            "folder": f"{self.folder}, {f'without {left}' if left else 'finished'}",
        }

    def run(self) -> TeachResult:
        """Train what is missing of each fold, and join the networks.

        Raises:
            FoldsError: If folds could not be finished.
        """
        options = self.options
        plans = [task.plan() for task in self.tasks]  # whose checks come before hours of training
        counts = np.bincount(plans[0].folds)
        logger.info(
            "%d folds of %s records of split %s: %s",
            *(len(counts), f"{counts.sum():,}", options.teaching.split),
            ", ".join(f"{count:,}" for count in counts.tolist()),
        )
        self._warn_of_unseen_classes(plans[0])
        missing = [task for task in self.tasks if not task.is_done()]
        with ExitStack() as stack:
            choice = stack.enter_context(ExecutorChoice(options.executor, options.cluster))
            executor, _ = choice.for_tasks(len(missing), None, lambda: np.inf)
            bar = stack.enter_context(progress("teach", total=len(self.tasks), unit="fold"))
            bar.update(len(self.tasks) - len(missing))
            errors = []
            for outcome in (
                executor.run_tasks(
                    missing, lambda name, line: bar.set_postfix_str(f"{name} {line}")
                )
                if missing
                else ()
            ):
                check_interrupted()
                bar.update(1)
                if outcome.traceback:
                    logger.error("%s failed:\n%s", outcome.name, outcome.traceback)
                if outcome.error:
                    errors.append(f"{outcome.name}: {outcome.error}")
            if errors:
                raise FoldsError(
                    f"{len(errors)} of {len(self.tasks)} folds failed; the same command continues with them: "
                    + " | ".join(errors)
                )
            with executor.alone(self.tasks[0].folder.parent, "joins the folds"):
                self._join(plans)
        return self._result([plan.run() for plan in plans])

    def _warn_of_unseen_classes(self, plan: TeacherPlan) -> None:
        """Warn of classes whose records are all in one fold, so that its network has seen none of them."""
        if self.store.index.has_many_labels:
            return
        rows = rows_of_split(self.store.index, self.options.teaching.split)
        pairs = np.unique(np.stack([self.store.index.values("label", rows), plan.folds]), axis=1)
        labels, folds = np.unique(pairs[0][pairs[0] >= 0], return_counts=True)
        if len(alone := labels[folds == 1]):
            names = [self.store.manifest.classes[label] for label in alone.tolist()]
            logger.warning(
                "%d classes have all their records in one fold, so the network that answers them has not learned the "
                "class: %s",
                len(names),
                shorten(names, 5),
            )

    def _join(self, plans: list[TeacherPlan]) -> None:
        """Write the networks of all folds as one, unless they are written."""
        from permafrost.models.fold_networks import FoldsClassifier, digests_of_keys

        with self.run_folder.open("teach", self.options, plans[0].inputs()):
            if SavedNetwork(self.folder).is_finished:
                SavedNetwork(self.folder).check()
                return
            RunFiles(self.tasks[0].options.run).fetch()
            classes = self.store.manifest.classes
            networks = [SavedNetwork(plan.folder).load(classes) for plan in plans]
            described, folds = networks[0][1], plans[0].folds
            joined = FoldsClassifier([network for network, _ in networks], len(folds))
            rows = rows_of_split(self.store.index, self.options.teaching.split)
            digests = [
                digests_of_keys(self.store.index.keys(rows[start : start + _AT_ONCE]))
                for start in range(0, len(rows), _AT_ONCE)
            ]
            joined.set_folds(np.concatenate(digests), folds)
            each = described.config
            config = FoldsModelConfig(
                name=f"{each.name}-folds",
                classes=each.classes,
                mean=each.mean,
                std=each.std,
                frame=each.frame,
                network=each,
                folds=len(networks),
                records=len(folds),
            )
            save_model(self.folder, joined, replace(described, config=config))

    def _result(self, results: list[TeachResult]) -> TeachResult:
        def averages(name: str) -> dict[str, float]:
            by_split = [getattr(result, name) for result in results]
            return {split: mean(each[split] for each in by_split) for split in by_split[0]}

        return replace(
            results[0],
            weights=str(self.folder / MODEL_NAME),
            accuracy=averages("accuracy"),
            f1=averages("f1"),
            next=pass_command(self.options, self.store, str(self.folder / MODEL_NAME), "folds"),
        )


_AT_ONCE = 2**16
"""Records whose keys are read at once."""


def teach_network(config: TeachConfig) -> TeachResult:
    """Train, export and evaluate the teacher, or those of all folds."""
    return plan_teacher(config).run()


def plan_teacher(config: TeachConfig) -> TeacherPlan | FoldsPlan:
    """Plan the training of a teacher, or of those of all folds.

    Raises:
        ConfigError: If the options do not fit the store or the run's folder.
    """
    if config.teaching.folds == 0 or config.teaching.fold is not None:
        return plan_training(config)
    folder = RunFolder(config.run).path / "teach"
    records = PassRecords([folder, *folder.glob("fold-*")])  # the part that begun ones have read
    return FoldsPlan(config, records.part_of(Store(config.store.folder)))
