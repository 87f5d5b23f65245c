"""Events of a training for TensorBoard: output only, so where they cannot be written, the training goes on without."""

from __future__ import annotations

import itertools
import logging
import os
import socket
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

logger = logging.getLogger("permafrost.training")

_numbers = itertools.count()


class EventLog:
    """File of events in a folder, written without a thread, as TensorBoard's own writer ends with an error of its."""

    def __init__(self, folder: Path, first_step: int) -> None:
        """Begin a file.

        Args:
            folder: Folder of the files, which is created.
            first_step: Step from which events of other files, of a killed run, are not shown.
        """
        from tensorboard.compat.proto.event_pb2 import SessionLog

        # TensorBoard reads the files in the order of their names.
        number = f"{next(_numbers):06d}"
        words = (int(time.time()), socket.gethostname(), os.getpid(), number)
        self.path = folder / ("events.out.tfevents." + ".".join(map(str, words)))
        self._file: IO[bytes] | None = None
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._file = self.path.open("wb")
        except OSError as error:
            self._give_up(error)
        self._write(file_version="brain.Event:2")
        self._write(session_log=SessionLog(status=SessionLog.START), step=first_step)

    def add(self, line: Mapping[str, float]) -> None:
        """Add the numbers of a line of metrics, at its step."""
        from tensorboard.compat.proto.summary_pb2 import Summary

        values = [
            Summary.Value(tag=name, simple_value=value)
            for name, value in line.items()
            if name not in ("step", "epoch")
        ]
        self._write(summary=Summary(value=values), step=int(line["step"]))

    def close(self) -> None:
        """Close the file."""
        if self._file is not None:
            with suppress(OSError):  # each event was flushed
                self._file.close()
            self._file = None

    def _write(self, **event: Any) -> None:
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.summary.writer.record_writer import RecordWriter

        if self._file is None:
            return
        try:
            RecordWriter(self._file).write(
                Event(wall_time=time.time(), **event).SerializeToString()
            )
            self._file.flush()
        except OSError as error:
            self._give_up(error)

    def _give_up(self, error: OSError) -> None:
        self.close()
        logger.warning(
            "%s cannot be written (%s); the training goes on without events for TensorBoard",
            self.path,
            error.strerror or error,
        )
