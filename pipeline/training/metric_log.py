"""Training metrics: metrics.jsonl, the source of truth, and the same numbers for TensorBoard."""

from __future__ import annotations

import json
import logging
import math
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from pipeline.core.errors import UserError
from pipeline.core.files import write_atomically
from pipeline.core.progress import SECONDS_PER_LINE
from pipeline.losses.base import LossTerms
from pipeline.training.state import Training

logger = logging.getLogger("permafrost.training")

METRICS_NAME = "metrics.jsonl"


class DivergedError(UserError, RuntimeError):
    """Error for a loss that is not finite."""


@dataclass(kw_only=True)
class StepLog:
    """Sums of the loss terms since the last written line, kept on the device until the next line is written."""

    write: Callable[[dict[str, float]], None]
    every_steps: int
    sums: dict[str, Tensor | float] = field(default_factory=lambda: defaultdict(float))
    counts: dict[str, int] = field(default_factory=lambda: defaultdict(int))
    """Number of steps in which each term was present. A guided term is not present in every step."""
    steps: int = 0
    records: int = 0
    last: dict[str, float] = field(default_factory=dict)
    """The last written line."""
    started: float = field(default_factory=time.monotonic)
    said: float = field(default_factory=time.monotonic)
    """Time of the last line on the terminal."""

    def add(self, training: Training, terms: LossTerms, records: int) -> None:
        """Add a finished step, and write a line after every `every_steps` steps.

        records  number of records of this rank
        """
        for name, value in {**terms.terms, **terms.statistics, "total": terms.total}.items():
            self.sums[name] = self.sums[name] + value.detach()
            self.counts[name] += 1
        self.steps += 1
        self.records += records
        if self.steps == self.every_steps:
            self.flush(training)

    def flush(self, training: Training) -> None:
        """Write the means over steps and ranks, if there are any. This synchronizes with the device once."""
        if self.steps == 0:
            return
        sums = torch.stack([torch.as_tensor(total) for total in self.sums.values()])
        means = training.distributed.mean(sums).tolist()
        line = {
            name: total / self.counts[name] for name, total in zip(self.sums, means, strict=True)
        }
        if not math.isfinite(line["total"]):
            raise DivergedError(
                f"the loss is {line['total']} at step {training.global_step} (epoch {training.epoch}); "
                "lower optimizer.lr or set trainer.clip_norm"
            )
        seconds = time.monotonic() - self.started
        line |= {
            "step": training.global_step,
            "epoch": training.epoch,
            "lr": training.optimizer.param_groups[0]["lr"],
            "records_per_second": self.records * training.distributed.world_size / seconds,
        }
        self.write(line)
        self.last = line
        self._say(training)
        self.sums, self.counts = defaultdict(float), defaultdict(int)
        self.steps = self.records = 0
        self.started = time.monotonic()

    def _say(self, training: Training) -> None:
        """Log the position of a long epoch, whose end may be hours away."""
        if training.distributed.is_first and time.monotonic() - self.said >= SECONDS_PER_LINE:
            self.said = time.monotonic()
            rate = f"{self.last['records_per_second']:,.0f} records/s"
            logger.info(
                "epoch %d, step %d: %s, %s",
                training.epoch,
                training.step,
                self.describe_last(),
                rate,
            )

    def describe_last(self) -> str:
        """Describe the last written line: its loss and, if it has one, its training accuracy."""
        text = f"loss {self.last.get('total', math.nan):.3f}"
        if "training_accuracy" in self.last:
            text += f", training accuracy {self.last['training_accuracy']:.3f}"
        return text


class MetricWriter:
    """Writer of metrics.jsonl and TensorBoard events. Lines after `global_step` (of a killed run) are dropped."""

    def __init__(self, folder: Path, global_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        path = folder / METRICS_NAME
        lines = list(read_metrics(folder)) if path.exists() else []
        kept = [json.dumps(line) + "\n" for line in lines if line["step"] <= global_step]
        write_atomically(path, "".join(kept).encode())
        self.file = path.open("a")
        self.events = SummaryWriter(str(folder / "tensorboard"), purge_step=global_step + 1)

    def __enter__(self) -> MetricWriter:
        return self

    def __exit__(self, *error: object) -> None:
        self.file.close()
        self.events.close()

    def write(self, line: dict[str, float]) -> None:
        """Append a line to the file and its numbers to the events."""
        self.file.write(json.dumps(line) + "\n")
        self.file.flush()
        for name, value in line.items():
            if name not in ("step", "epoch"):
                self.events.add_scalar(name, value, int(line["step"]))


def read_metrics(folder: Path) -> Iterator[dict[str, float]]:
    """Read the lines of a run's metrics.jsonl, leaving out an incomplete last line of a killed run."""
    with (folder / METRICS_NAME).open() as file:
        for text in file:
            if text.endswith("\n"):
                yield json.loads(text)
