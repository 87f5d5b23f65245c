"""The training job of `teach`: a network trained on a store's labels."""

from __future__ import annotations

import pkgutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING

from permafrost.config.models import ModelConfig, NoModelConfig
from permafrost.config.teaching import TeachConfig
from permafrost.config.training import TrainerOptions
from permafrost.core.digests import sha256_json
from permafrost.core.errors import require
from permafrost.models.network import Network
from permafrost.models.read_files import digests_of_reads
from permafrost.models.saved import TrainedModel
from permafrost.store.reader import Store
from permafrost.training.job import TrainingJob

if TYPE_CHECKING:
    from permafrost.core.distributed import DistributedContext
    from permafrost.models.classifier import Classifier
    from permafrost.training.spec import TrainingSpec
    from permafrost.training.targets import TargetSource


@dataclass(frozen=True, kw_only=True)
class Teaching(TrainingJob):
    """The training of one teacher."""

    config: TeachConfig

    @property
    def trainer(self) -> TrainerOptions:
        return self.config.teaching.trainer

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
        store = Store(self.config.store.folder) if self.opened is None else self.opened.store
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
        from permafrost.models.saved import TrainedModel

        return TrainedModel(
            config=self.config.teacher,
            num_classes=spec.num_classes,
            classes=spec.class_names,
            input_size=spec.input_size,
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
    augment, split = config.teaching.augment, config.teaching.split
    if augment.shifts_of_originals and split in store.manifest.records:
        from permafrost.loading.selected_records import SelectedRecords
        from permafrost.loading.subset import rows_of_split

        shifts = SelectedRecords(store, rows_of_split(store.index, split)).identify_shifts(augment)
        inputs |= {"shifts": shifts} if shifts is not None else {}
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
        inputs["black_box"] = sha256_json(black_box.describe())
    return inputs
