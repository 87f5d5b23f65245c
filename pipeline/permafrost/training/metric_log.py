"""Training metrics: metrics.jsonl, the source of truth, and the same numbers for a tracker.

    {"total": 1.3, ..., "step": 8, "epoch": 0, "lr": 0.1, "records_per_second": 900.0, "chain": "<16 digits>"}

`chain` is a digest of the line and of the chain before it, and that of the first line also of the run's identity, so
a line that is changed, missing, out of place or of another run is recognized. The last line is that of the last step,
whose number is in the checkpoint and in model.json.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType, NoneType
from typing import NamedTuple

import torch
from torch import Tensor

from permafrost.core.digests import plain_values
from permafrost.core.errors import UserError, require
from permafrost.core.progress import count_records
from permafrost.losses.base import LossTerms
from permafrost.runs.folder import run_identity
from permafrost.runs.trackers import TrackedRun, Tracker
from permafrost.storage.files import file_at
from permafrost.storage.local_files import described_errors, write_error
from permafrost.storage.signed_files import DigestError, damaged, naming_damage
from permafrost.training.state import Training

METRIC_LOG_NAME = "metrics.jsonl"
_NONE: Mapping[str, float] = MappingProxyType({})
_DIGEST_START = ', "chain": "'
_ADVICE = "delete it; only the curves of the steps so far are lost"


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

    def add(self, training: Training, terms: LossTerms, records: int) -> None:
        """Add a finished step.

        Args:
            training: State after the step.
            terms: Loss of the step.
            records: Number of records of this rank.
        """
        for name, value in {**terms.terms, **terms.statistics, "total": terms.total}.items():
            self.sums[name] = self.sums[name] + value.detach()
            self.counts[name] += 1
        self.steps += 1
        self.records += records
        count_records(records * training.distributed.world_size)

    @property
    def is_due(self) -> bool:
        """True after `every_steps` steps since the last line."""
        return self.steps >= self.every_steps

    def flush(self, training: Training, numbers: Mapping[str, float] = _NONE) -> None:
        """Write the means over steps and ranks, if there are any. This synchronizes with the device once.

        Args:
            training: State after the last step.
            numbers: Further numbers of the line.

        Raises:
            DivergedError: If the mean loss is not finite.
        """
        if self.steps == 0:
            return
        sums = torch.stack([torch.as_tensor(total) for total in self.sums.values()])
        line = {
            name: total / self.counts[name]
            for name, total in zip(self.sums, training.distributed.mean(sums).tolist(), strict=True)
        }
        require(
            math.isfinite(line["total"]),
            f"the loss is {line['total']} at step {training.global_step} (epoch {training.epoch}); "
            "lower optimizer.lr or set trainer.clip_norm",
            DivergedError,
        )
        seconds = time.monotonic() - self.started
        line |= {
            "step": training.global_step,
            "epoch": training.epoch,
            "lr": training.optimizer.param_groups[0]["lr"],
            "records_per_second": self.records * training.distributed.world_size / seconds,
            **numbers,
        }
        self.write(line)
        if training.distributed.on_line is not None and training.distributed.is_first:
            training.distributed.on_line(line)
        self.last = line
        count_records(0, f"epoch {training.epoch + 1}, {self.describe_last()}")
        self.sums, self.counts = defaultdict(float), defaultdict(int)
        self.steps = self.records = 0
        self.started = time.monotonic()

    def describe_last(self) -> str:
        """Describe the last written line: its loss and, if it has one, its training accuracy."""
        text = f"loss {self.last.get('total', math.nan):.3f}"
        if "training_accuracy" in self.last:
            text += f", training accuracy {self.last['training_accuracy']:.3f}"
        return text


class MetricWriter:
    """Writer of metrics.jsonl and of a tracker's run. Lines after `global_step` (of a killed run) are dropped."""

    def __init__(self, tracked: TrackedRun, global_step: int) -> None:
        """Continue the folder's file.

        Args:
            tracked: Run of the tracker, with the folder of the training.
            global_step: Step of the checkpoint from which the training continues, 0 for a new one.

        Raises:
            DamagedFileError: If the file's lines up to `global_step` are not all there.
        """
        self.path = tracked.folder / METRIC_LOG_NAME
        kept, self._digest = b"", run_identity(tracked.folder) or ""
        written = global_step
        if self.path.exists():
            raw = file_at(self.path).read()
            last, problem = 0.0, "it is empty"
            try:
                for line in _iter_lines(raw, self._digest):
                    if (written := max(written, int(line.values["step"]))) > global_step:
                        continue
                    kept, self._digest, last = raw[: line.end], line.digest, line.values["step"]
                    problem = f"it ends at step {last:g}"
            except DigestError as error:  # beyond the checkpoint it does not matter
                problem = str(error)
            if last != global_step:
                reason = f"{problem}, but the checkpoint is of step {global_step}"
                raise damaged(self.path, reason, _ADVICE)
            if kept:
                file_at(self.path).write(kept)
            else:
                self.path.unlink()
        self.tracker = Tracker(tracked, global_step + 1, written)

    def __enter__(self) -> MetricWriter:
        return self

    def __exit__(self, kind: object, *error: object) -> None:
        self.tracker.close(is_finished=kind is None)

    def write(self, line: dict[str, float]) -> None:
        """Append a line to the file and its numbers to the tracker."""
        body = json.dumps(plain_values(line))[:-1]
        self._digest = _chain(self._digest, body.encode())
        with described_errors(write_error, self.path), self.path.open("a") as file:
            file.write(f'{body}{_DIGEST_START}{self._digest}"}}\n')
        self.tracker.add(line)

    def sync(self) -> None:
        """Make the lines durable, before a checkpoint that continues them."""
        if not self.path.exists():
            return
        with described_errors(write_error, self.path), self.path.open("ab") as file:
            os.fsync(file.fileno())


def read_metrics(folder: Path, steps: int | None = None) -> Iterator[dict[str, float]]:
    """Read the lines of a run's metrics.jsonl, leaving out an incomplete last line of a killed run.

    There are none if the file does not exist.

    Args:
        folder: Folder of the run.
        steps: Number of steps of a finished training, which the last line must be of, with nothing after it; None is
            not checked.

    Raises:
        DamagedFileError: If lines are missing, or are not those that were written.
    """
    if not (path := folder / METRIC_LOG_NAME).exists():
        return
    last, end, raw = None, 0, file_at(path).read()
    with naming_damage(path, _ADVICE):
        for line in _iter_lines(raw, run_identity(folder) or ""):
            last, end = line.values["step"], line.end
            yield line.values
    if steps is not None and last != steps:
        raise damaged(path, f"it ends at step {last}, but the training had {steps}", _ADVICE)
    if steps is not None and end != len(raw):
        raise damaged(path, f"it has {len(raw) - end} bytes after its last line", _ADVICE)


class _Line(NamedTuple):
    """A line of metrics.jsonl."""

    values: dict[str, float]
    digest: str
    end: int
    """Position of the byte after it."""


def _iter_lines(raw: bytes, digest: str) -> Iterator[_Line]:
    """Iterate over the complete lines of a file.

    Args:
        raw: Bytes of the file.
        digest: Digest of what comes before the first line, the identity of the run.

    Raises:
        DigestError: At the first line that is not the one written.
    """
    end = 0
    for number, text in enumerate(raw.split(b"\n")[:-1], start=1):
        end += len(text) + 1
        body, start, claimed = text.rpartition(_DIGEST_START.encode())
        digest = _chain(digest, body)
        require(
            start != b"" and claimed == f'{digest}"}}'.encode(),
            f"line {number} does not have the digest of its text and the lines before"
            + (", so it is damaged or that of another run" if number == 1 else ""),
            DigestError,
        )
        try:
            values = json.loads(body + b"}")
        except (ValueError, RecursionError) as error:
            raise DigestError(f"line {number} is not JSON ({error})") from error
        numbers = list(values.values()) if isinstance(values, dict) else [""]
        require(
            all(type(value) in (int, float, NoneType) for value in numbers)
            and type(values.get("step")) is int,
            f"line {number} has other values than numbers",
            DigestError,
        )
        yield _Line(
            {name: value for name, value in values.items() if value is not None}, digest, end
        )


def _chain(before: str, body: bytes) -> str:
    """Return the first 64 bits of the SHA-256 of a line and the digest of the line before."""
    return hashlib.sha256(before.encode() + body).hexdigest()[:16]
