"""Accuracy and agreement of a student over the epochs of its training (`curve=`).

runs/<run>/distill/curve.json   {"points": [{"epoch": 5, "splits": {<split>: {"accuracy": 0.81, ...}}}, ...]}
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from permafrost.config.distillation import DistillConfig
from permafrost.core.signed_files import damaged, read_json, write_json
from permafrost.models.classifier import Classifier
from permafrost.store.entries import EntryError, from_dict
from permafrost.store.file_entry import require_entry
from permafrost.store.reader import Store, TeacherPass
from permafrost.training.epoch_selection import split_evaluator
from permafrost.training.student_passes import compared_passes

CURVE_NAME = "curve.json"
METRICS = ("accuracy", "agreement")
"""Metrics of a curve, as far as a split has them."""


class AccuracyCurve:
    """Writer of a student's metrics after every nth epoch and after the last one, in the folder of the run.

    A training that continues from an earlier checkpoint replaces the entries of the epochs that it repeats.
    """

    def __init__(
        self,
        folder: Path,
        evaluators: Mapping[str, Callable[[Classifier], Mapping[str, Any]]],
        every_epochs: int,
        last_epoch: int,
    ) -> None:
        """Set the folder of the run, and what is computed when.

        evaluators  split -> function that returns a network's metrics on it
        """
        self.folder = folder
        self.evaluators = evaluators
        self.every_epochs = every_epochs
        self.last_epoch = last_epoch

    def __call__(self, model: Classifier, epoch: int) -> None:
        """Evaluate the network after an epoch, if it is one of the curve's."""
        if epoch % self.every_epochs and epoch != self.last_epoch:
            return
        splits = {}
        for split, evaluate in self.evaluators.items():
            metrics = evaluate(model)
            splits[split] = {name: float(metrics[name]) for name in METRICS if name in metrics}
        earlier = [point for point in read_curve(self.folder) if point["epoch"] < epoch]
        points = [*earlier, {"epoch": epoch, "splits": splits}]
        write_json(self.folder / CURVE_NAME, {"points": points})


def read_curve(folder: Path) -> list[dict[str, Any]]:
    """Read the points of a run's curve, none if it has no curve.

    folder  folder of the training, runs/<run>/distill
    Raises DamagedFileError for wrong digests, types and ranges.
    """
    path = folder / CURVE_NAME
    if not path.exists():
        return []
    advice = "delete it; only the curve of the epochs so far is lost"
    values = read_json(path, advice)
    try:
        for point in from_dict(_CurveFile, values).points:
            for metrics in point.splits.values():
                require_entry(all(type(value) is float for value in metrics.values()), "no number")
    except EntryError as error:
        raise damaged(path, error, advice) from error
    points: list[dict[str, Any]] = values["points"]
    return points


@dataclass(frozen=True, kw_only=True)
class _CurvePoint:
    """Point of a curve."""

    epoch: int
    splits: dict[str, dict[str, Any]]


@dataclass(frozen=True, kw_only=True)
class _CurveFile:
    """Entries of curve.json."""

    points: tuple[_CurvePoint, ...]


def plan_curve(
    config: DistillConfig,
    folder: Path,
    store: Store,
    passes: Sequence[TeacherPass],
    num_classes: int,
) -> AccuracyCurve | None:
    """Return the curve of the options, None if they name no split. Raises ConfigError if a split does not exist."""
    if not config.curve.splits:
        return None
    read_curve(folder)  # a damaged file is an error before the training, not after an epoch
    compared = compared_passes(config, store, passes, num_classes)
    evaluators = {
        split: split_evaluator(config, store, compared, split, num_classes, localize=False)
        for split in config.curve.splits
    }
    return AccuracyCurve(folder, evaluators, config.curve.every_epochs, config.trainer.epochs)
