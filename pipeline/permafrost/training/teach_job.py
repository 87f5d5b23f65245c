"""The training job of `teach`: a network trained on a store's labels, and the Pareto front of a guided teacher.

Guidance trades accuracy against localization, so the choice between the epochs on the front is left to the user
(Rao et al. 2023: F1, EPG and IoU, in steps of 0.005).
"""

from __future__ import annotations

import pkgutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from permafrost.config.models import ModelConfig, NoModelConfig
from permafrost.config.teaching import GuidedTeachingConfig, TeachConfig
from permafrost.config.training import TrainerOptions
from permafrost.core.digests import sha256_json
from permafrost.core.errors import require
from permafrost.core.json_entries import from_dict
from permafrost.models.fingerprint import describe_teacher, identify_start
from permafrost.models.read_files import digests_of_reads
from permafrost.models.saved import TrainedModel
from permafrost.store.reader import Store
from permafrost.training.job import TrainingJob
from permafrost.training.kept_epochs import KeptEpochs, read_listed

if TYPE_CHECKING:
    from permafrost.core.distributed import DistributedContext
    from permafrost.loading.dataset import StoreDataset
    from permafrost.models.classifier import Classifier
    from permafrost.training.spec import TrainingSpec


STEP = 0.005
FOLDER = "pareto"
FRONT_NAME = "front.json"
_RIGHT = ("f1", "accuracy")
_REASONS = ("epg", "iou")


def pareto_front(points: Sequence[Sequence[float]], step: float = STEP) -> list[int]:
    """Return the positions of the points that no other point dominates, with values compared in steps of `step`.

    A point dominates another if it is at least as good in every value and better in one. Of equal points the first is
    kept.

    Args:
        points: Values of each point, of which higher ones are better.
        step: Width of the intervals in which values count as equal.
    """
    binned = [tuple(int(value / step + 1e-9) for value in point) for point in points]
    front = []
    for position, mine in enumerate(binned):
        beaten = any(
            all(theirs >= ours for theirs, ours in zip(other, mine, strict=True))
            and (other != mine or earlier < position)
            for earlier, other in enumerate(binned)
            if earlier != position
        )
        if not beaten:
            front.append(position)
    return front


class ParetoFront:
    """Keeper of the weights of the epochs on the front, in <run>/pareto/."""

    def __init__(self, folder: Path, evaluator: Callable[[Classifier], Mapping[str, Any]]) -> None:
        """Set the folder of the run and the evaluator.

        Args:
            folder: Folder of the run.
            evaluator: Function that returns a network's metrics on the split by which epochs are compared.

        Raises:
            DamagedFileError: If an earlier call has left a damaged front.
        """
        self.files = KeptEpochs(folder / FOLDER / FRONT_NAME, "front", "epoch-")
        self.evaluator = evaluator
        self.members()  # a damaged file is an error before the training, not after an epoch

    def __call__(self, model: Classifier, epoch: int) -> None:
        """Evaluate the network after an epoch, keep it if it is on the front, and delete epochs that left the front."""
        metrics = self.evaluator(model)
        right = next(name for name in _RIGHT if name in metrics)
        point = {name: float(metrics[name]) for name in (right, *_REASONS) if name in metrics}
        others = [c for c in self.members() if c["epoch"] != epoch]
        candidates: list[dict[str, Any]] = [*others, {"epoch": epoch, **point}]
        best = pareto_front([[c[name] for name in point] for c in candidates])
        front = [candidates[position] for position in best]
        self.files.write(model, epoch, front, {c["epoch"] for c in front})

    def members(self) -> list[dict[str, Any]]:
        """Read the members of the front so far, with epoch, metrics and the digest of their weights.

        Raises:
            DamagedFileError: If a digest or a type is wrong.
        """
        advice = "delete it; the epochs before the next one are then not on the front"
        return read_listed(self.files.path, "front", _check_front, advice)


def _check_front(values: dict[str, Any]) -> None:
    for member in from_dict(_FrontFile, values).front:
        from_dict(_Member, {"epg": None, "iou": None, "f1": None, "accuracy": None} | member)


@dataclass(frozen=True, kw_only=True)
class _Member:
    """Entry of an epoch in front.json, of whose metrics a data set has some."""

    epoch: int
    sha256: str
    f1: float | None
    accuracy: float | None
    epg: float | None
    iou: float | None


@dataclass(frozen=True, kw_only=True)
class _FrontFile:
    """Entries of front.json."""

    front: tuple[dict[str, Any], ...]


# ---- teach job -------------------------------------------------------------------------------------


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
        from permafrost.loading.decode_threads import decode_threads_of
        from permafrost.losses.base import build_loss
        from permafrost.training.spec import TrainingSpec

        teaching = self.config.teaching
        store = Store(self.config.store.folder) if self.opened is None else self.opened.store
        guided = isinstance(teaching, GuidedTeachingConfig)
        threads = decode_threads_of(teaching.trainer, distributed)
        return TrainingSpec(
            dataset=self._dataset(store, teaching.split, threads, with_regions=guided),
            model=self._network(),
            num_classes=len(store.manifest.classes),
            loss=build_loss(teaching),
            augment=teaching.augment,
            optimizer=teaching.optimizer,
            trainer=teaching.trainer,
            seed=self.config.seed,
            guided_by=teaching.region if isinstance(teaching, GuidedTeachingConfig) else None,
            after_epoch=self._pareto_front(store, threads),
            live_teacher=self._requested_teacher(),
        )

    def _dataset(
        self, store: Store, split: str, decode_threads: int, *, with_regions: bool
    ) -> StoreDataset:
        """Records of a split, read as the trainer's options say."""
        from permafrost.loading.dataset import StoreDataset
        from permafrost.loading.subset import rows_of_split

        return StoreDataset(
            store,
            rows_of_split(store.index, split),
            with_regions=with_regions,
            decode_threads=decode_threads,
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

    def _pareto_front(self, store: Store, decode_threads: int) -> ParetoFront | None:
        teaching = self.config.teaching
        if not isinstance(teaching, GuidedTeachingConfig) or teaching.pareto_split is None:
            return None
        from permafrost.evaluation.forward import evaluate_training

        dataset = self._dataset(store, teaching.pareto_split, decode_threads, with_regions=True)
        size = store.size if teaching.augment.size is None else (teaching.augment.size,) * 2
        options = replace(self.config.evaluate, region=teaching.region)
        return ParetoFront(self.folder, partial(evaluate_training, size, dataset, options))

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
        from permafrost.models.providers import name_weights

        network = name_weights(replace(config.teacher, weights=config.teaching.start))
        inputs["start"] = identify_start(network, "teaching.start", len(store.manifest.classes))
    files = config.teacher.fingerprint_files()
    files |= digests_of_reads(config.teacher, len(store.manifest.classes) or 1)
    inputs |= {f"teacher.{option}": sha256 for option, sha256 in files.items()}
    if config.teaching.uses_black_box(config.teacher) and not isinstance(
        config.black_box, NoModelConfig
    ):
        asked = describe_teacher(config.black_box, store.manifest.classes, section="black_box")
        inputs["black_box"] = sha256_json(asked)
    return inputs
