"""The training of one teacher on a store's labels, or on those of all folds but one."""

from __future__ import annotations

import logging
import pkgutil
import shlex
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from permafrost.config.models import (
    MEMORY,
    RANDOM,
    NoModelConfig,
    is_weights_file,
)
from permafrost.config.paths import with_absolute_paths
from permafrost.config.teaching import TeachConfig
from permafrost.config.training import TrainerOptions
from permafrost.core.digests import derive_seed
from permafrost.core.errors import require
from permafrost.core.progress import show_epochs
from permafrost.core.records import NO_GROUP
from permafrost.evaluation.evaluator import numbers_of
from permafrost.evaluation.results import METRICS_NAME, PICTURE, read_metrics_file
from permafrost.loading.subset import rows_at, rows_of_split
from permafrost.models.network import Network
from permafrost.models.read_files import digests_of_reads
from permafrost.models.resolve import resolve_teach
from permafrost.models.saved import SavedNetwork, TrainedModel
from permafrost.models.trained_weights import MODEL_NAME
from permafrost.runs.folder import PassRecords, RunFolder
from permafrost.runs.trackers import check_logger
from permafrost.sources.drawn_splits import choose_test
from permafrost.storage.signed_files import write_json
from permafrost.store.index import RecordIndex, RowNumbers
from permafrost.store.reader import Store
from permafrost.training.job import TrainingJob, TrainingProgress, fit_batch, records_of_steps

if TYPE_CHECKING:
    from permafrost.core.distributed import DistributedContext
    from permafrost.training.spec import TrainingSpec


logger = logging.getLogger("permafrost.teach")

_GROUPS_PER_FOLD = 10
"""Least number of groups for each fold for which groups stay whole. Fewer are attributes, such as the place."""


@dataclass(frozen=True, kw_only=True)
class TeachResult:
    """The trained teacher and its metrics."""

    weights: str
    accuracy: dict[str, float]
    """Accuracy by split of evaluate.splits, empty if records have many labels."""
    f1: dict[str, float]
    """F1 by split of evaluate.splits, empty if records have one label."""
    last_epoch: str = ""
    """Mean loss and training accuracy of the last epoch, if this call trained."""
    picture: str = ""
    """Picture of an image on which they were measured (evaluate.frame), empty for a table."""
    records_per_second: str = ""
    next: str = ""


def plan_training(config: TeachConfig) -> TeacherPlan:
    """Resolve the options of a teacher's training, and open its store.

    Raises:
        ConfigError: If the options do not fit the store or the run's folder, a split is unknown, or the package of
            `logger` is not installed.
    """
    check_logger(config.logger)
    fold = config.teaching.fold
    folder = RunFolder(config.run).path / ("teach" if fold is None else f"fold-{fold}")
    store = PassRecords([folder]).part_of(Store(config.store.folder))
    config = replace(config, evaluate=config.evaluate.on(store.manifest.records))
    # A weights file is the output of this verb, named for a later precompute. Published weights are initial weights.
    if is_weights_file(config.teacher.weights) or config.teacher.weights == RANDOM:
        config = replace(config, teacher=replace(config.teacher, weights=None))
    check_splits(config, store)
    return TeacherPlan(resolve_teach(config, store), folder, store).check_folder()


class TeacherPlan(TrainingJob):
    """The training of one teacher: its resolved options and its store."""

    options: TeachConfig

    def __init__(self, options: TeachConfig, folder: Path, store: Store | None = None) -> None:
        """Describe the training.

        Args:
            options: Options of the command, resolved for the store.
            folder: Folder of the training in that of its run.
            store: The store, None to open it.
        """
        if store is None:
            store = PassRecords([folder]).part_of(Store(options.store.folder))
        super().__init__(options, folder, store)
        self.config = with_absolute_paths(options)

    @property
    def trainer(self) -> TrainerOptions:
        return self.options.teaching.trainer

    @property
    def records(self) -> int:
        rows = len(self.rows)
        pairs = self.options.teaching.augment.mixes
        return records_of_steps(rows, fit_batch(self.trainer, rows, pairs=pairs))

    @cached_property
    def folds(self) -> NDArray[np.uint8]:
        """Fold of each row of the split, from 0."""
        teaching, index = self.options.teaching, self.store.index
        return draw_folds(index, teaching.split, teaching.folds, self.options.seed)

    @property
    def rows(self) -> RowNumbers:
        """Rows of the split, without those of the fold that is left out."""
        rows = rows_of_split(self.store.index, self.options.teaching.split)
        fold = self.options.teaching.fold
        return rows if fold is None else rows_at(rows, np.flatnonzero(self.folds != fold))

    def inputs(self) -> dict[str, str]:
        return teacher_inputs(self.options, self.store)

    def describe_work(self) -> dict[str, str]:
        teacher, teaching = self.options.teacher, self.options.teaching
        return {
            "teacher": teacher.label,
            "teaching": teaching.kind,
            "weights": teaching.start or teacher.weights or "random",
            "records": f"{len(self.rows):,} records of split {teaching.split} in {self.options.store.path}",
            "epochs": str(teaching.trainer.epochs),
            "folder": self.describe_folder(),
        }

    def run(self, on_epoch: Callable[[int, str], None] | None = None) -> TeachResult:
        """Train, export and evaluate the teacher, as far as it is not done.

        Args:
            on_epoch: Function that receives the number of each epoch and its line of progress, in place of the
                progress bar; None shows the bar.
        """
        with self.open_folder():
            path = self.folder / METRICS_NAME
            advice = "delete it, and the same command evaluates the teacher again"
            measured = read_metrics_file(path, advice) if path.exists() else {}
            progress = self._train(on_epoch)
            trained = SavedNetwork(self.folder).describe()
            picture = str(trained.in_frame(self.options.evaluate.frame, self.store).picture or "")
            if measured.get(PICTURE) != picture:
                measured = {"splits": self._evaluate(), PICTURE: picture}
                write_json(path, measured)
        splits = measured["splits"]
        for split, metrics in splits.items():
            value, chance = metrics.get("accuracy", 1), metrics.get("majority_accuracy", 0)
            if value <= chance < 1 and on_epoch is None:  # once for a fold
                logger.warning(
                    "%s: accuracy on %s is %.3f, and that of the most frequent class alone would be %.3f: the "
                    "teacher has hardly learned; train it longer (teaching.trainer.epochs=) or with another "
                    "teaching.optimizer.lr=, or look at the labels",
                    self.folder,
                    split,
                    value,
                    chance,
                )
        accuracy, f1 = (
            {split: metrics[name] for split, metrics in splits.items() if name in metrics}
            for name in ("accuracy", "f1")
        )
        weights = str(self.folder / MODEL_NAME)
        return TeachResult(
            weights=weights,
            accuracy=accuracy,
            f1=f1,
            picture=picture,
            last_epoch=progress.last_line,
            records_per_second=progress.rate(self.folder),
            next=pass_command(self.options, self.store, weights),
        )

    def _train(self, on_epoch: Callable[[int, str], None] | None) -> TrainingProgress:
        if self.is_finished:
            logger.info("%s is finished", self.folder)
            return TrainingProgress()
        if on_epoch is not None:
            return self.finish(on_epoch)
        logger.info(
            "teacher %(teacher)s, teaching=%(teaching)s, from %(weights)s weights: %(records)s, "
            "teaching.trainer.epochs=%(epochs)s, into %(folder)s",
            self.describe_work(),
        )
        with show_epochs("teach", self.trainer.epochs, self.records) as show:
            return self.finish(show, announces=True)

    def _evaluate(self) -> dict[str, Any]:
        """Return the metrics by split, which the tracker gets, too."""
        from permafrost.evaluation.forward import evaluate_model  # imports torch

        splits = evaluate_model(self.folder, self.store, self.options.evaluate)
        numbers = {split: numbers_of(metrics) for split, metrics in splits.items()}
        self.tracked.add_results("evaluate", numbers)
        return splits

    def prepare(self, distributed: DistributedContext) -> None:
        if (teaching := self.config.teaching).needs_preparation(self.config.teacher):
            pkgutil.resolve_name(teaching.preparation)(self.config, self.folder, distributed)

    def spec(self, distributed: DistributedContext | None = None) -> TrainingSpec:
        from permafrost.loading.dataset import StoreDataset
        from permafrost.loading.decode_threads import decode_threads_of
        from permafrost.losses.base import build_loss
        from permafrost.training.spec import TrainingSpec

        teaching, black_box = self.config.teaching, self.config.black_box
        # With the files that `prepare` has written.
        model = teaching.prepared(self.config.teacher, self.folder)
        source, after_epoch = teaching.target_source, teaching.after_epoch
        threads = decode_threads_of(teaching.trainer, distributed)
        rows = self.rows
        return TrainingSpec(
            dataset=StoreDataset(
                self.store,
                rows,
                with_regions=teaching.reads_regions,
                decode_threads=threads,
            ),
            model=replace(model, weights=teaching.start) if teaching.start else model,
            num_classes=len(self.store.manifest.classes),
            loss=build_loss(teaching),
            augment=teaching.augment,
            optimizer=teaching.optimizer,
            trainer=fit_batch(self.trainer, len(rows), pairs=teaching.augment.mixes),
            seed=self.config.seed,
            target_source=partial(pkgutil.resolve_name(source), teaching) if source else None,
            after_epoch=pkgutil.resolve_name(after_epoch)(
                self.config, self.folder, self.store, threads
            )
            if after_epoch
            else None,
            live_teacher=black_box
            if teaching.runs_black_box and not isinstance(black_box, NoModelConfig)
            else None,
        )

    def describe(self, spec: TrainingSpec) -> TrainedModel:
        return TrainedModel(
            config=self.config.teacher,
            num_classes=spec.num_classes,
            classes=spec.class_names,
            input_size=spec.input_size,
            picture=spec.picture,
            split=self.config.teaching.split,
        )


def draw_folds(index: RecordIndex, split: str, folds: int, seed: int) -> NDArray[np.uint8]:
    """Draw the fold of each record of a split, as test splits are drawn: an equal share of each class.

    Copies of an image, of the same bytes, are in one fold, and groups stay whole if there are many.

    Args:
        index: Index of the store.
        split: Name of the split.
        folds: Number of folds.
        seed: Seed of the draw.

    Returns:
        Fold of each row of `rows_of_split`, from 0.

    Raises:
        ConfigError: If there are more folds than different records.
    """
    rows = np.asarray(rows_of_split(index, split), np.int64)
    starts = np.ascontiguousarray(index.values("image_sha256", rows)[:, :8]).view(np.uint64)
    _, first, copies = np.unique(starts, return_index=True, return_inverse=True)
    require(
        folds <= len(first),
        f"teaching.folds={folds}, but split {split} has {len(first):,} different records; lower it",
    )
    numbers = rows[first]
    digests = index.key_digests(numbers, derive_seed(seed, "folds"))
    groups = index.values("group", numbers)
    keeps_groups = len(np.unique(groups[groups != NO_GROUP])) >= _GROUPS_PER_FOLD * folds
    if keeps_groups:
        _, members = np.unique(groups, return_inverse=True)
        of_groups = np.zeros(members.max() + 1, np.uint64)
        np.bitwise_xor.at(of_groups, members, digests)
        digests = np.where(groups == NO_GROUP, digests, of_groups[members])
    positions = digests / 2.0**64
    labels = (
        np.zeros(len(numbers), np.int64)
        if index.has_many_labels
        else index.values("label", numbers).astype(np.int64)
    )
    drawn = np.full(len(numbers), folds - 1, np.uint8)
    left = np.arange(len(numbers))
    for fold in range(folds - 1):
        share = 1 / (folds - fold)
        chosen = choose_test(positions[left], labels[left], share, keep_groups=keeps_groups)
        drawn[left[chosen]] = fold
        left = left[~chosen]
        positions[left] = (positions[left] - share) / (1 - share)
    return drawn[copies.ravel()]


def check_splits(config: TeachConfig, store: Store) -> None:
    """Raise ConfigError unless the store has the splits for training and evaluation."""
    known = list(store.manifest.records)
    splits = [
        ("teaching.split", config.teaching.split),
        *(("evaluate.splits", split) for split in config.evaluate.splits),
    ]
    for option, split in splits:
        require(
            split in known,
            f"the store has no split {split!r}, which {option} names; its splits are: {', '.join(known)}; name one of "
            f"them, as in {option}={known[-1] if option == 'teaching.split' else f'[{known[-1]}]'}",
        )


def teacher_inputs(config: TeachConfig, store: Store) -> dict[str, str]:
    """Compute the fingerprints of all inputs of a teacher in addition to its config, by name."""
    inputs = {"store": store.manifest.fingerprint}
    if config.teaching.start is not None:
        start = replace(config.teacher, weights=config.teaching.start)
        inputs["start"] = Network(start, store.manifest.classes).identify_start("teaching.start")
    if str(config.teacher.weights).startswith(MEMORY):
        inputs["teacher.weights"] = str(config.teacher.weights)
    files = config.teacher.fingerprint_files()
    files |= digests_of_reads(config.teacher, len(store.manifest.classes) or 1)
    inputs |= {f"teacher.{option}": sha256 for option, sha256 in files.items()}
    if config.teaching.uses_black_box(config.teacher) and not isinstance(
        config.black_box, NoModelConfig
    ):
        black_box = Network(config.black_box, store.manifest.classes, "black_box")
        inputs["black_box"] = black_box.digest()
    return inputs


def pass_command(config: TeachConfig, store: Store, weights: str, kind: str = "saved") -> str:
    """Return the command of the pass of a teacher.

    Args:
        config: Options of its training.
        store: Store of its records.
        weights: File of its weights.
        kind: Kind of network.
    """
    arguments = [
        f"store.path={config.store.path}",
        f"run={config.run}",
        f"teacher={kind}",
        f"teacher.weights={Path(weights).parent}",
    ]
    outputs = config.teacher.pass_outputs
    if not store.form.has_places or len(outputs) > 1:
        # The network of several folds has no outputs of one kind of network.
        arguments.append(
            f"annotate.outputs=[{','.join(outputs if kind == 'saved' else ['logits'])}]"
        )
    return " ".join(["permafrost precompute", *map(shlex.quote, arguments)])
