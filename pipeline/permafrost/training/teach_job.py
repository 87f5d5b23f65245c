"""The training job of `teach`: a network trained on a store's labels."""

from __future__ import annotations

import pkgutil
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from permafrost.config.models import ModelConfig, NoModelConfig, is_published
from permafrost.config.paths import with_absolute_paths
from permafrost.config.teaching import TeachConfig
from permafrost.config.training import TrainerOptions
from permafrost.core.errors import require
from permafrost.models.network import Network
from permafrost.models.read_files import digests_of_reads
from permafrost.models.resolve import resolve_teach
from permafrost.models.saved import TrainedModel
from permafrost.runs.folder import PassRecords, RunFolder
from permafrost.runs.trackers import check_logger
from permafrost.store.reader import Store
from permafrost.training.job import TrainingJob, records_of_steps

if TYPE_CHECKING:
    from permafrost.core.distributed import DistributedContext
    from permafrost.models.classifier import Classifier
    from permafrost.training.spec import TrainingSpec
    from permafrost.training.targets import TargetSource


def plan_teacher(config: TeachConfig) -> TeacherPlan:
    """Resolve the options of a teacher's training, and open its store.

    Raises:
        ConfigError: If the options do not fit the store or the run's folder, or the package of `logger` is not
            installed.
    """
    check_logger(config.logger)
    folder = RunFolder(config.run).path / "teach"
    store = PassRecords([folder]).part_of(Store(config.store.folder))
    config = replace(config, evaluate=config.evaluate.on(store.manifest.records))
    # A weights file is the output of this verb, named for a later precompute. Published weights are initial weights.
    if not is_published(config.teacher.weights):
        config = replace(config, teacher=replace(config.teacher, weights=None))
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
        rows = self.store.num_records(self.options.teaching.split)
        return records_of_steps(rows, self.trainer)

    def inputs(self) -> dict[str, str]:
        return teacher_inputs(self.options, self.store)

    def describe_work(self) -> dict[str, str]:
        teacher, teaching = self.options.teacher, self.options.teaching
        return {
            "teacher": teacher.label,
            "teaching": teaching.kind,
            "weights": teaching.start or teacher.weights or "random",
            "records": f"{self.store.num_records(teaching.split):,} records of split {teaching.split} in "
            f"{self.options.store.path}",
            "epochs": str(teaching.trainer.epochs),
            "folder": self.describe_folder(),
        }

    def prepare(self, distributed: DistributedContext) -> None:
        teaching = self.config.teaching
        if teaching.needs_preparation(self.config.teacher):
            pkgutil.resolve_name(teaching.preparation)(self.config, self.folder, distributed)

    def spec(self, distributed: DistributedContext | None = None) -> TrainingSpec:
        from permafrost.loading.dataset import StoreDataset
        from permafrost.loading.decode_threads import decode_threads_of
        from permafrost.loading.subset import rows_of_split
        from permafrost.losses.base import build_loss
        from permafrost.training.spec import TrainingSpec

        teaching = self.config.teaching
        store = self.store
        threads = decode_threads_of(teaching.trainer, distributed)
        return TrainingSpec(
            dataset=StoreDataset(
                store,
                rows_of_split(store.index, teaching.split),
                with_regions=teaching.reads_regions,
                decode_threads=threads,
            ),
            model=self._network(),
            num_classes=len(store.manifest.classes),
            loss=build_loss(teaching),
            augment=teaching.augment,
            optimizer=teaching.optimizer,
            trainer=teaching.trainer,
            seed=self.config.seed,
            target_source=self._target_source(),
            after_epoch=self._after_epoch(store, threads),
            live_teacher=self._requested_teacher(),
        )

    def _network(self) -> ModelConfig:
        """Options of the teacher with its initial weights and the files that `prepare` has written."""
        teaching = self.config.teaching
        model = teaching.prepared(self.config.teacher, self.folder)
        return replace(model, weights=teaching.start) if teaching.start else model

    def _requested_teacher(self) -> ModelConfig | None:
        """Return the black box if the teacher is also trained on its logits, otherwise None."""
        black_box = self.config.black_box
        runs = self.config.teaching.runs_black_box
        return black_box if runs and not isinstance(black_box, NoModelConfig) else None

    def _target_source(self) -> Callable[[int, tuple[int, int]], TargetSource] | None:
        teaching = self.config.teaching
        function = teaching.target_source
        return partial(pkgutil.resolve_name(function), teaching) if function else None

    def _after_epoch(
        self, store: Store, decode_threads: int
    ) -> Callable[[Classifier, int], bool | None] | None:
        function = self.config.teaching.after_epoch
        if not function:
            return None
        callback: Callable[[Classifier, int], bool | None] | None = pkgutil.resolve_name(function)(
            self.config, self.folder, store, decode_threads
        )
        return callback

    def describe(self, spec: TrainingSpec) -> TrainedModel:
        return TrainedModel(
            config=self.config.teacher,
            num_classes=spec.num_classes,
            classes=spec.class_names,
            input_size=spec.input_size,
            picture=spec.picture,
            split=self.config.teaching.split,
        )


def check_splits(config: TeachConfig, store: Store) -> None:
    """Raise ConfigError unless the store has the splits for training and evaluation."""
    known = list(store.manifest.records)
    splits = [("teaching.split", config.teaching.split)]
    splits += [("evaluate.splits", split) for split in config.evaluate.splits]
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
        network = Network(start, store.manifest.classes)
        inputs["start"] = network.identify_start("teaching.start")
    files = config.teacher.fingerprint_files()
    files |= digests_of_reads(config.teacher, len(store.manifest.classes) or 1)
    inputs |= {f"teacher.{option}": sha256 for option, sha256 in files.items()}
    if config.teaching.uses_black_box(config.teacher) and not isinstance(
        config.black_box, NoModelConfig
    ):
        black_box = Network(config.black_box, store.manifest.classes, "black_box")
        inputs["black_box"] = black_box.digest()
    return inputs
