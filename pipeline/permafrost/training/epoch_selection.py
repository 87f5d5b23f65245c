"""Evaluations during a training: the curve of accuracy (`curve=`), and the epoch whose weights a student keeps.

A point of the curve is in the line of an epoch's last step in metrics.jsonl: {..., "curve/<split>/accuracy": 0.81}.
The epoch is selected by a metric on records outside the training (`select_epoch`). e2KD chooses "the best checkpoint"
on 50 held-out images per class (supplement C.1.1).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from permafrost.config.distillation import DistillConfig
from permafrost.config.evaluation import EvaluateOptions, check_top_k
from permafrost.config.models import Picture
from permafrost.core.errors import ConfigError, first_line, require
from permafrost.core.json_entries import from_dict
from permafrost.evaluation.evaluator import METRICS, best_position, numbers_of
from permafrost.evaluation.forward import evaluate_training, open_split
from permafrost.loading.dataset import StoreDataset, covering_passes
from permafrost.loading.decode_threads import resolve_decode_threads
from permafrost.loading.random_views import trained_picture
from permafrost.loading.subset import HOLDOUT, rows_of_split, select_holdout_rows
from permafrost.losses.base import DistillationLoss
from permafrost.models.classifier import Classifier
from permafrost.models.saved import TrainedModel
from permafrost.runs.folder import CHECKPOINT_NAME
from permafrost.storage.files import file_at
from permafrost.storage.signed_files import damaged
from permafrost.storage.untrusted import FormatError, load_tensors
from permafrost.store.reader import Store, TeacherPass
from permafrost.training.kept_epochs import KeptEpochs, read_listed
from permafrost.training.metric_log import read_metrics
from permafrost.training.student_passes import compared_passes

_CURVE = "curve/"
"""Start of the names of a curve's numbers in metrics.jsonl."""
_ON_CURVE = ("accuracy", "agreement", "top_k")
"""Metrics of a curve, as far as a split has them."""


@dataclass(frozen=True)
class AccuracyCurve:
    """Metrics of a student after every nth epoch and after the last one, for metrics.jsonl."""

    evaluators: Mapping[str, Callable[[Classifier], Mapping[str, Any]]]
    """Function that returns a network's metrics on a split, by split."""
    every_epochs: int
    last_epoch: int
    term_records: Mapping[str, StoreDataset]
    """Records on which the terms of the loss are computed, by split; empty for none."""
    maps: StoreDataset | None = None
    """Records whose maps are drawn, None for none."""
    maps_every: int = 1

    def maps_after(self, epoch: int) -> StoreDataset | None:
        """Return the records whose maps are drawn after an epoch, None for none."""
        return self.maps if epoch % self.maps_every == 0 or epoch == self.last_epoch else None

    def __call__(self, model: Classifier, epoch: int) -> dict[str, float]:
        """Return the metrics as curve/<split>/<metric>, none after an epoch that is not one of the curve's."""
        if not self._is_point(epoch):
            return {}
        evaluated = {split: evaluate(model) for split, evaluate in self.evaluators.items()}
        return {
            f"{_CURVE}{split}/{name}": float(value)
            for split, metrics in evaluated.items()
            for name, value in numbers_of(metrics).items()
            if name.partition(".")[0] in _ON_CURVE and math.isfinite(value)
        }

    def term_records_after(self, epoch: int) -> dict[str, StoreDataset]:
        """Return the records on which terms are computed after an epoch, by the start of their names."""
        chosen = self.term_records if self._is_point(epoch) else {}
        return {f"{_CURVE}{split}/": records for split, records in chosen.items()}

    def _is_point(self, epoch: int) -> bool:
        return epoch % self.every_epochs == 0 or epoch == self.last_epoch


def read_curve(folder: Path) -> dict[str, dict[int, float]]:
    """Read a run's curve: by <split>.<metric>, the value after each of its epochs; empty if it has no curve.

    Args:
        folder: Folder of the training, runs/<run>/distill.

    Raises:
        DamagedFileError: If lines of metrics.jsonl are missing, or are not those that were written.
    """
    curve: dict[str, dict[int, float]] = {}
    for line in read_metrics(folder):
        for name, value in line.items():
            if name.startswith(_CURVE):
                split, _, metric = name.removeprefix(_CURVE).rpartition("/")
                curve.setdefault(f"{split}.{metric}", {})[int(line["epoch"]) + 1] = value
    return curve


def plan_curve(
    config: DistillConfig,
    store: Store,
    passes: Sequence[TeacherPass],
    num_classes: int,
    loss: DistillationLoss,
) -> AccuracyCurve | None:
    """Return the curve of the options, None if they name no split and no maps.

    Args:
        config: Options of the student.
        store: Store of the splits.
        passes: Passes that the student is trained on.
        num_classes: Number of the student's classes.
        loss: Loss of the student.

    Raises:
        ConfigError: If a split does not exist, a term has no value on its records, or if maps of a table are to be
            drawn.
    """
    require(
        not config.curve.maps or store.form.has_places,
        f"curve.maps={config.curve.maps} draws images, but {store.path} holds a table; set curve.maps=0",
    )
    if not ((curve := config.curve).splits or curve.maps):
        return None
    compared = compared_passes(config, store, passes, num_classes)
    picture = _picture(config, store, passes)
    evaluators = {
        split: split_evaluator(
            config, store, compared, split, num_classes, picture, localize=False, top_k=curve.top_k
        )
        for split in curve.splits
    }
    check_top_k("curve.top_k", curve.top_k, num_classes, many=store.index.has_many_labels)
    read = compared if loss.needs.targets and config.mode != "live" else []
    terms = {
        split: _term_records(config, store, read, split, num_classes, loss).in_picture(picture)
        for split in (curve.splits if curve.terms else ())
    }
    rows = rows_of_split(store.index, config.split)[: curve.maps]
    maps = (
        StoreDataset(
            store, rows, covering_passes(store, rows, compared), num_classes=num_classes
        ).in_picture(picture)
        if curve.maps
        else None
    )
    return AccuracyCurve(
        evaluators,
        curve.every_epochs,
        config.trainer.epochs,
        terms,
        maps,
        curve.maps_every,
    )


def _term_records(
    config: DistillConfig,
    store: Store,
    passes: Sequence[TeacherPass],
    split: str,
    num_classes: int,
    loss: DistillationLoss,
) -> StoreDataset:
    """Open the records of a split with everything that a loss reads.

    Raises:
        ConfigError: If the loss needs the records or views of the training, or a pass has no targets of the split.
    """
    outputs = [loss.outputs_of(teacher.name) for teacher in passes]
    require(
        not (
            loss.keeps_records
            or config.method.live_views
            or (config.mode == "replay" and any(outputs))
        ),
        f"curve.terms=true: the terms of method={config.method.kind} with mode={config.mode} read the records or the "
        "stored views of the training, and have no value on others; set curve.terms=false",
    )
    rows = (
        select_holdout_rows(store.index, config.split, config.subset)
        if split == HOLDOUT
        else rows_of_split(store.index, split)
    )
    missing = set(passes) - set(covering_passes(store, rows, passes))
    require(
        not missing,
        f"curve.terms=true: {', '.join(teacher.name for teacher in missing)} has no targets of split {split}; name "
        "another split in curve.splits, or set curve.terms=false",
    )
    return StoreDataset(
        store,
        rows,
        passes,
        num_classes=num_classes,
        output=outputs,
        scaled_maps=loss.needs.scaled_maps,
        decode_threads=resolve_decode_threads(config.trainer.decode_threads),
    )


# ---- epoch selection -------------------------------------------------------------------------------


EPOCHS_NAME = "epochs.json"
SELECTED_PREFIX = "selected-epoch-"
"""Start of the names of the files with the weights of the best epochs so far."""
_OF_LOGITS = (
    *("accuracy", "mean_class_accuracy", "worst_group_accuracy"),
    *("f1", "agreement", "kl_to_teacher"),
)
"""Metrics for which no map is computed."""
_OF_TEACHER = ("agreement", "kl_to_teacher", "map_cosine")
"""Metrics of a student and a pass."""


class EpochSelection:
    """Keeper of the weights of the best epoch so far, in the folder of the run.

    epochs.json lists the metric of every epoch and the digest of the weights that are kept. A training that continues
    from an earlier checkpoint replaces the entries of the epochs that it repeats. The weights of the previous best
    epoch stay for one more epoch, until the checkpoint of the new one is written.
    """

    def __init__(
        self, folder: Path, select: str, evaluate: Callable[[Classifier], Mapping[str, Any]]
    ) -> None:
        """Set the folder of the run and the metric.

        Args:
            folder: Folder of the training, runs/<run>/distill.
            select: Option select_epoch, <split>.<metric>.
            evaluate: Function that returns a network's metrics on that split.

        Raises:
            ConfigError: If the metric is unknown.
            DamagedFileError: If an earlier call has left a damaged list of epochs.
        """
        self.metric = select.partition(".")[2]
        require(
            self.metric in METRICS,
            f"select_epoch={select} names an unknown metric; choose one of {', '.join(METRICS)}",
        )
        self.files = KeptEpochs(folder / EPOCHS_NAME, "epochs", SELECTED_PREFIX)
        self.select, self.evaluate = select, evaluate
        self.epochs()  # a damaged file is an error before the training, not after an epoch

    def __call__(self, model: Classifier, epoch: int) -> bool:
        """Evaluate the network after an epoch, and keep its weights if no earlier epoch is as good.

        Returns:
            True if they are kept, after which a checkpoint is to be written.

        Raises:
            ConfigError: If the split does not have the metric, or it is not a number.
        """
        value = self._value(self.evaluate(model), epoch)
        earlier = [one for one in self.epochs() if one["epoch"] < epoch]
        epochs = [*earlier, {"epoch": epoch, "value": value, "sha256": None}]
        best = self._best(epochs)
        self.files.write(model, epoch, epochs, {best, self._best(earlier) if earlier else best})
        return best == epoch

    def epochs(self) -> list[dict[str, Any]]:
        """Read the number, value and digest of each epoch so far.

        Raises:
            DamagedFileError: If a digest or a type is wrong.
        """
        return read_listed(
            self.files.path, "epochs", lambda values: from_dict(_EpochsFile, values), self._advice
        )

    def restore(self, model: Classifier) -> None:
        """Load the weights of the selected epoch into the network.

        Raises:
            DamagedFileError: If they are not the weights that the list names.
        """
        epochs = self.epochs()
        best = self._best(epochs)
        (listed,) = (one["sha256"] for one in epochs if one["epoch"] == best)
        path = self.files.weights(best)
        if (actual := file_at(path).sha256()) != listed:
            reason = f"it has sha256 {actual[:12]}, but {EPOCHS_NAME} lists {str(listed)[:12]}"
            raise damaged(path, reason, self._advice)
        try:
            model.network.load_state_dict(load_tensors(path))
        except (FormatError, RuntimeError) as error:  # of another network
            raise damaged(path, first_line(error), self._advice) from error

    @property
    def _advice(self) -> str:
        return f"delete {self.files.path.with_name(CHECKPOINT_NAME)}, and the training starts again at epoch 0"

    def _best(self, epochs: Sequence[Mapping[str, Any]]) -> int:
        """Number of the best epoch, the first of equal ones."""
        values = [one["value"] for one in epochs]
        number: int = epochs[best_position(values, METRICS[self.metric])]["epoch"]
        return number

    def _value(self, metrics: Mapping[str, Any], epoch: int) -> float:
        value = metrics.get(self.metric)
        known = ", ".join(
            metric for metric in METRICS if not math.isnan(metrics.get(metric, math.nan))
        )
        if value is None:
            raise ConfigError(
                f"select_epoch={self.select}, but the split has no {self.metric}; choose one of {known}, or null for "
                "the last epoch"
            )
        require(
            math.isfinite(value),
            f"select_epoch={self.select}: {self.metric} is not a number after epoch {epoch}, because the split lacks "
            f"it or the training diverged; choose one of {known or 'another split'} or lower optimizer.lr",
        )
        return float(value)


@dataclass(frozen=True, kw_only=True)
class _EpochEntry:
    """Entry of an epoch in epochs.json."""

    epoch: int
    value: float
    sha256: str | None
    """SHA-256 of its weights, None if an earlier epoch was at least as good."""


@dataclass(frozen=True, kw_only=True)
class _EpochsFile:
    """Entries of epochs.json."""

    epochs: tuple[_EpochEntry, ...]


def select_epochs(
    config: DistillConfig,
    folder: Path,
    store: Store,
    passes: Sequence[TeacherPass],
    num_classes: int,
) -> EpochSelection | None:
    """Return the selection of select_epoch, None if it is null.

    Args:
        config: Options of the student.
        folder: Folder of the training, runs/<run>/distill.
        store: Store of the splits.
        passes: Passes that the student is trained on.
        num_classes: Number of the student's classes.

    Raises:
        ConfigError: If the split does not exist, or if a teacher's metric has no pass.
    """
    if config.select_epoch is None:
        return None
    split, _, metric = config.select_epoch.partition(".")
    compared = compared_passes(config, store, passes, num_classes)
    require(
        bool(compared) or metric not in _OF_TEACHER,
        f"select_epoch={config.select_epoch} compares the student with a pass; name one of "
        f"{', '.join(teacher.name for teacher in store.pass_folders()) or 'the passes (there are none)'} "
        "with store.teacher=",
    )
    evaluate = split_evaluator(
        config,
        store,
        compared,
        split,
        num_classes,
        _picture(config, store, passes),
        localize=metric not in _OF_LOGITS,
    )
    return EpochSelection(folder, config.select_epoch, evaluate)


def _picture(config: DistillConfig, store: Store, passes: Sequence[TeacherPass]) -> Picture | None:
    views = passes[0].views if config.mode == "replay" else None
    picture = trained_picture(store, config.augment, views)
    return None if picture is None else picture.on(config.select_frame)


def split_evaluator(
    config: DistillConfig,
    store: Store,
    compared: Sequence[TeacherPass],
    split: str,
    num_classes: int,
    picture: Picture | None,
    *,
    localize: bool,
    top_k: Sequence[int] = (),
) -> Callable[[Classifier], dict[str, Any]]:
    """Return the function that computes a network's metrics on a split, and leaves the network as it was.

    Args:
        config: Options of the student.
        store: Store of the split.
        compared: Canonical passes that the student is compared with; () for none.
        split: Name of the split.
        num_classes: Number of the student's classes.
        picture: What the student receives of an image.
        localize: Compute maps, too.
        top_k: Numbers k of top-k accuracies to compute.

    Raises:
        ConfigError: If the split does not exist.
    """
    size = store.size if config.augment.size is None else (config.augment.size,) * 2
    dataset = open_split(
        store,
        compared,
        split,
        TrainedModel(
            config=config.student,
            num_classes=num_classes,
            input_size=size,
            picture=picture,
            split=config.split,
            subset=config.subset,
        ),
        resolve_decode_threads(config.trainer.decode_threads),
        with_regions=localize,
    )
    options = EvaluateOptions()
    return partial(evaluate_training, size, dataset, options, localize=localize, top_k=top_k)
