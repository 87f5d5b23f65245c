"""Accuracy and agreement of a student over the epochs of its training (`curve=`).

runs/<run>/distill/curve.json   [{"epoch": 5, "splits": {<split>: {"accuracy": 0.81, "agreement": 0.77}}}, ...]
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from pipeline.config.distillation import DistillConfig
from pipeline.core.files import write_atomically
from pipeline.models.classifier import Classifier
from pipeline.store.reader import Store, TeacherPass
from pipeline.training.epoch_selection import split_evaluator
from pipeline.training.student_passes import compared_passes, jpeg_decoder_of

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
        write_atomically(self.folder / CURVE_NAME, json.dumps(points).encode())


def read_curve(folder: Path) -> list[dict[str, Any]]:
    """Read the points of a run's curve, none if it has no curve.

    folder  folder of the training, runs/<run>/distill
    """
    path = folder / CURVE_NAME
    points: list[dict[str, Any]] = json.loads(path.read_text()) if path.exists() else []
    return points


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
    compared = compared_passes(config, store, passes, num_classes)
    decoder = jpeg_decoder_of(config, passes)
    evaluators = {
        split: split_evaluator(config, store, compared, split, num_classes, decoder, localize=False)
        for split in config.curve.splits
    }
    return AccuracyCurve(folder, evaluators, config.curve.every_epochs, config.trainer.epochs)
