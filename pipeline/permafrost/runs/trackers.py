"""Trackers of trainings (`logger=`): TensorBoard, and those of plug-ins.

A training and the evaluations of its network are one run of the tracker, in a project named after the first part of the
run's name. The tracker's name of that run is in <folder of the training>/<tracker>/run.json, so that a training that is
resumed, or evaluated later, continues it.

Trackers are output only: metrics.jsonl is the source of truth, and where a tracker cannot write, the work continues
without it.
"""

from __future__ import annotations

import logging
import sys
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from pkgutil import resolve_name
from typing import Any

import numpy as np
from numpy.typing import NDArray

from permafrost.config.builder import flatten_options
from permafrost.config.environment import report_nothing
from permafrost.config.training import TRACKERS
from permafrost.core.errors import first_line, require
from permafrost.runs.folder import CONFIG_NAME, STUDENTS
from permafrost.runs.mirrors import upload_mirror
from permafrost.storage.signed_files import read_json, read_yaml, write_json

logger = logging.getLogger("permafrost.trackers")


def check_logger(kind: str) -> None:
    """Check that the package of a tracker is installed.

    Raises:
        ConfigError: If it is not.
    """
    require(
        kind in TRACKERS,
        f"logger={kind} is not a tracker; choose one of {', '.join(TRACKERS)}, or name the plug-in that adds it",
    )
    spec = find_spec(kind)
    require(
        spec is not None and spec.origin is not None,  # a folder of that name has no origin
        f"logger={kind} needs the package {kind}, which is not installed; run pip install {kind}",
    )


@dataclass(frozen=True)
class TrackedRun:
    """Run of a tracker, which shows a training and the evaluations of its network."""

    kind: str
    run: str
    """Name of the run, or its address in a bucket."""
    folder: Path
    """Absolute path of the folder of the training."""

    @property
    def project(self) -> str:
        """Name of the project: the first part of the run's name, or of a path or an address the last part."""
        run = self.run.partition(f"/{STUDENTS}/")[0].rstrip("/")
        is_path = run.startswith("/") or "://" in run
        return run.rpartition("/")[2] if is_path else run.partition("/")[0]

    @property
    def name(self) -> str:
        """Name of the tracker's run: that of a student's run, and of others also the folder."""
        return self.run if self.folder.name == "distill" else f"{self.run}/{self.folder.name}"

    @property
    def files(self) -> Path:
        """Folder of the tracker's files."""
        return self.folder / self.kind

    def read_options(self) -> dict[str, Any]:
        """Read the options of the training by their dotted names, and the fingerprints of its inputs; empty without.

        Raises:
            DamagedFileError: If the file is damaged.
        """
        path = self.folder / CONFIG_NAME
        return flatten_options(read_yaml(path, "restore it")) if path.exists() else {}

    def read_state(self, last_step: int = 0) -> tuple[str | None, int]:
        """Return the tracker's name of the run, None if it has none yet, and the last step whose numbers it has.

        Args:
            last_step: Last step that a killed call has written.

        Raises:
            DamagedFileError: If the file is damaged.
        """
        if not (path := self.files / "run.json").exists():
            return None, 0
        state = read_json(path, "delete it, and the tracker begins another run")
        return str(state["id"]), max(int(state["last_step"]), last_step)

    def save_state(self, run_id: str, last_step: int) -> None:
        """Save what `read_state` returns."""
        write_json(self.files / "run.json", {"id": run_id, "last_step": last_step})

    def add_results(self, evaluation: str, splits: Mapping[str, Mapping[str, float]]) -> None:
        """Add the numbers of an evaluation, as <evaluation>/<split>.<metric>.

        Args:
            evaluation: Name of the folder of the evaluation within that of the run.
            splits: Numbers of each split by metric.
        """
        tracker = Tracker(self)
        tracker.add_results(
            {
                f"{evaluation}/{split}.{metric}": number
                for split, numbers in splits.items()
                for metric, number in numbers.items()
            }
        )
        tracker.close()
        upload_mirror(self.folder)


class Tracker:
    """Writer of a tracked run. At the first error it gives up with one warning."""

    def __init__(self, tracked: TrackedRun, first_step: int = 0, last_step: int = 0) -> None:
        """Begin or continue the tracked run.

        Args:
            tracked: The run.
            first_step: First step of this call of a training, 0 for an evaluation.
            last_step: Last step that a killed call has written; the tracker keeps its numbers.
        """
        self.tracked = tracked
        self._client: TrackerClient | None = None
        report_nothing()
        with self._giving_up():
            tracked.files.mkdir(parents=True, exist_ok=True)
            self._client = resolve_name(TRACKERS[tracked.kind])(tracked, first_step, last_step)

    def add(self, line: Mapping[str, float]) -> None:
        """Add the numbers of a line of metrics, at its step."""
        if self._client is not None and line["step"] > self._client.last_step:
            numbers = {name: line[name] for name in line if name not in ("step", "epoch")}
            self._tell(lambda client: client.log(numbers, int(line["step"])))

    def add_results(self, numbers: Mapping[str, float]) -> None:
        """Add the numbers of an evaluation, which are of no step."""
        self._tell(lambda client: client.log_results(numbers))

    def add_picture(self, name: str, pixels: NDArray[np.uint8], step: int) -> None:
        """Add a picture [H, W, 3] at a step, if the tracker shows pictures."""
        self._tell(lambda client: client.log_picture(name, pixels, step))

    def close(self, is_finished: bool = True) -> None:
        """End the tracked run, as finished or as failed."""
        self._tell(lambda client: client.close(is_finished))
        self._client = None

    def _tell(self, message: Callable[[TrackerClient], None]) -> None:
        if self._client is not None:
            with self._giving_up():
                message(self._client)

    @contextmanager
    def _giving_up(self) -> Iterator[None]:
        """Track nothing more after an error in the block. Results of a stage alone are on the standard output."""
        try:
            with redirect_stdout(sys.stderr):
                yield
        except Exception as error:  # each tracker has errors of its own
            self._client = None
            logger.warning(
                "logger=%s cannot write the run in %s (%s); the work continues without it",
                self.tracked.kind,
                self.tracked.files,
                first_line(error),
            )


class TrackerClient(ABC):
    """Client of one tracker; `Tracker` catches its errors."""

    last_step = 0
    """Last step whose numbers the tracker keeps."""

    @abstractmethod
    def __init__(self, tracked: TrackedRun, first_step: int, last_step: int) -> None:
        """Begin or continue a tracked run. The arguments are those of `Tracker`."""

    @abstractmethod
    def log(self, numbers: Mapping[str, float], step: int) -> None:
        """Add numbers at a step."""

    def log_results(self, numbers: Mapping[str, float]) -> None:
        """Add the numbers of an evaluation."""
        self.log(numbers, 0)  # a training has no step 0

    def log_picture(self, name: str, pixels: NDArray[np.uint8], step: int) -> None:  # noqa: B027
        """Add a picture [H, W, 3] at a step. A tracker without pictures leaves it out."""

    @abstractmethod
    def close(self, is_finished: bool) -> None:
        """End the run, as finished or as failed."""


@cache
def _leave_to_the_client() -> None:
    """Print no traceback of TensorBoard's threads, as their error is raised at the client's next call."""
    of_others = threading.excepthook

    def hook(failed: threading.ExceptHookArgs) -> None:
        if not type(failed.thread).__module__.startswith("tensorboard."):
            of_others(failed)

    threading.excepthook = hook


class TensorBoard(TrackerClient):
    """Events in a folder, of which those of a killed run from the first step on are not shown."""

    def __init__(self, tracked: TrackedRun, first_step: int, last_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        _leave_to_the_client()
        self._writer: Any = SummaryWriter(str(tracked.files), purge_step=first_step or None)

    def log(self, numbers: Mapping[str, float], step: int) -> None:
        for name, value in numbers.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def log_picture(self, name: str, pixels: NDArray[np.uint8], step: int) -> None:
        self._writer.add_image(name, pixels, step, dataformats="HWC")

    def close(self, is_finished: bool) -> None:
        self._writer.close()
