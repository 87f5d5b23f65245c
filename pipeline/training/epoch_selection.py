"""Selection of the epoch whose weights a student keeps, by a metric on records outside its training (`select_epoch`).

e2KD chooses "the best checkpoint" on 50 held-out images per class (supplement C.1.1).
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from pipeline.core.errors import ConfigError, require
from pipeline.core.files import write_atomically
from pipeline.evaluation.metrics import METRICS
from pipeline.models.classifier import Classifier

EPOCHS_NAME = "epochs.json"
WEIGHTS_NAME = "selected-epoch.safetensors"


class EpochSelection:
    """Keeper of the weights of the best epoch so far, in the folder of the run.

    epochs.json lists the metric of every epoch. A training that is interrupted after an epoch's evaluation repeats the
    epoch, and its entry is replaced.
    """

    def __init__(
        self, folder: Path, select: str, evaluate: Callable[[Classifier], Mapping[str, Any]]
    ) -> None:
        """Set the folder of the run and the metric.

        select    option select_epoch, <split>.<metric>
        evaluate  function that returns a network's metrics on that split
        """
        require(
            select.partition(".")[2] in METRICS,
            f"select_epoch={select} names an unknown metric; choose one of {', '.join(METRICS)}",
        )
        self.folder = folder
        self.select = select
        self.evaluate = evaluate

    @property
    def metric(self) -> str:
        """Name of the metric."""
        return self.select.partition(".")[2]

    def __call__(self, model: Classifier, epoch: int) -> None:
        """Evaluate the network after an epoch, and keep its weights if no earlier epoch is as good."""
        from safetensors.torch import save

        value = self._value(self.evaluate(model))
        earlier = [one for one in self.epochs() if one["epoch"] < epoch]
        sign = 1 if METRICS[self.metric].higher_is_better else -1
        if all(sign * value > sign * one["value"] for one in earlier):
            state = {k: v.contiguous().cpu() for k, v in model.network.state_dict().items()}
            write_atomically(self.folder / WEIGHTS_NAME, save(state))
        epochs = [*earlier, {"epoch": epoch, "value": value}]
        write_atomically(self.folder / EPOCHS_NAME, json.dumps(epochs).encode())

    def epochs(self) -> list[dict[str, Any]]:
        """Number and value of each epoch so far."""
        path = self.folder / EPOCHS_NAME
        found: list[dict[str, Any]] = json.loads(path.read_text()) if path.exists() else []
        return found

    def restore(self, model: Classifier) -> None:
        """Load the weights of the selected epoch into the network."""
        from safetensors.torch import load_file

        model.network.load_state_dict(load_file(self.folder / WEIGHTS_NAME))

    def _value(self, metrics: Mapping[str, Any]) -> float:
        value = float(metrics.get(self.metric, math.nan))
        if math.isnan(value):
            known = ", ".join(m for m in METRICS if not math.isnan(metrics.get(m, math.nan)))
            raise ConfigError(
                f"select_epoch={self.select}, but the split has no {self.metric}; choose one of {known}, or null for "
                "the last epoch"
            )
        return value
