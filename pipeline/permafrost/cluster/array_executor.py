"""Executor of one task of a job array: processes without a connection divide the shards of a folder among them.

Any two processes write the same bytes, and the commit marker of a shard says that it is done. A claim next to it only
saves the other processes the work. A task number chooses the first shard, and a process that has none left takes what
is free, until all are done.
"""

from __future__ import annotations

import json
import logging
import math
import os
import socket
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, suppress
from functools import partial
from typing import Any, ClassVar

from permafrost.config.cluster import ClusterConfig
from permafrost.core.errors import FileError
from permafrost.core.tasks import (
    Report,
    SerialExecutor,
    ShardError,
    ShardResult,
    ShardTask,
    SharedTask,
    Task,
    TaskOutcome,
    run_task,
)
from permafrost.storage.buckets import ReplacedError
from permafrost.storage.files import file_at
from permafrost.storage.local_files import MAX_EXCHANGED_BYTES
from permafrost.storage.lock import (
    CLAIM_SUFFIX,
    CLAIMS,
    EXPIRY_NOTE,
    FIRST_PAUSE,
    claim_of,
    claimed,
    sleep_longer,
)
from permafrost.storage.rooted_paths import RootedPath
from permafrost.store.commit_markers import MARKER_SUFFIX

logger = logging.getLogger("permafrost.array")

FAILED_NAME = "failed.jsonl"
"""File of the units that failed, a line for each time, in the folder of the store, pass or sweep."""
_NUMBERS = ("SLURM_ARRAY_TASK_ID", "PBS_ARRAY_INDEX", "PBS_ARRAYID", "LSB_JOBINDEX", "SGE_TASK_ID")
"""Environment variables of the number of a task."""
_GOLDEN = 0.6180339887498949
"""Fraction whose multiples are spread evenly over [0, 1), however many there are."""
_SCAN_SECONDS = 1.0
"""Age from which the folder of the commit markers is listed again."""


def start_of_task(part: str) -> float:
    """Return where a task begins, as a fraction of the units, in [0, 1).

    Args:
        part: Option cluster.part, empty to take the number of the scheduler, or that of the process.
    """
    if part:
        number, count = map(int, part.split("/"))
        return (number - 1) / count
    variables = (name for name in _NUMBERS if os.environ.get(name, "").isdigit())
    return int(os.environ.get(next(variables, ""), os.getpid())) * _GOLDEN % 1


def read_failures(path: RootedPath) -> bytes:
    """Return the content of a file of failures, empty if there is none."""
    try:
        return file_at(path).read(MAX_EXCHANGED_BYTES)
    except FileNotFoundError:
        return b""


def note_failure(path: RootedPath, unit: Mapping[str, str], cause: str) -> None:
    """Add a line to a file of failures; if it cannot be written, that is logged.

    Args:
        path: File of failures.
        unit: Name of the shard or student.
        cause: Message of the error.
    """
    entry = {**unit, "host": socket.gethostname(), "cause": cause}
    try:
        before = read_failures(path)
        file_at(path).exchange(before + json.dumps(entry).encode() + b"\n", before or None)
    except ReplacedError:  # of a failure at the same time
        note_failure(path, unit, cause)
    except FileError as error:
        logger.warning("%s", error)


class ArrayExecutor(SerialExecutor):
    """Executor in this process that shares the work on a folder with others, on any machines.

    An error ends this process, and leaves a line in FAILED_NAME. The others do not try that unit again.
    """

    name: ClassVar[str] = "array"

    def __init__(self, cluster: ClusterConfig) -> None:
        """Read the number of this task.

        Args:
            cluster: Options of `cluster=`.
        """
        self._start = start_of_task(cluster.part)
        self._units: _SharedUnits | None = None

    def alone(self, folder: Any, work: str) -> AbstractContextManager[None]:
        """Do the work of the block in one process at a time; the others wait and say for whom."""
        return claimed(claim_of(folder), work)

    def pairs(self, task: ShardTask[Any], shards: Sequence[Any]) -> Iterator[tuple[Any, Any]]:
        """Iterate over the shards that this process claims, each with the next one as long as there are many."""
        if (units := self._units) is None:
            yield from super().pairs(task, shards)
            return
        shard = units.take()
        while shard is not None:
            following = units.take(is_ahead=True)
            yield shard, following
            shard = following or units.take()

    def map_shards(
        self, task: ShardTask[Report], shards: Sequence[Any], following: int = 0
    ) -> Iterator[ShardResult[Report]]:
        """Iterate over the results of the shards that this process does, until all are done by some process.

        Raises:
            ShardError: If shards failed in another process.
        """
        if not isinstance(task, SharedTask) or not shards:
            yield from super().map_shards(task, shards)
            return
        folder: RootedPath = task.marker(shards[0]).parent
        self._units = units = _SharedUnits(
            {shard.name: shard for shard in shards},
            folder.parent,
            self._start,
            lambda shard: folder / f".{shard.name}{CLAIM_SUFFIX}",
            task.is_done,
            folder,
        )
        try:
            for result in super().map_shards(task, shards):
                units.end(result.name, "" if result.records else str(result.report))
                yield result
        except Exception as error:
            if units.fail_current(str(error)):
                raise
            logger.info("another process has done the shard that failed here: %s", error)
            yield from self.map_shards(task, list(units.waiting.values()))
        finally:
            self._units = None
            units.release()
        if failures := units.failures_of_others():
            causes = "; ".join(f"{name}: {cause}" for name, cause in [*failures.items()][:3])
            raise ShardError(
                f"{len(failures)} shards failed in other processes ({units.failed_path}); the same command tries them "
                f"again: {causes}"
            )
        units.remove_failures()

    def run_tasks(
        self,
        tasks: Sequence[Task],
        on_report: Callable[[str, str], None],
        at_once: int | None = None,
    ) -> Iterator[TaskOutcome]:
        """Iterate over the outcomes of all tasks, at last of those that other processes have ended."""
        elsewhere: dict[str, Any] = {task.name: task for task in tasks}
        units = _SharedUnits(
            elsewhere,
            next(iter(elsewhere.values())).folder.parent.parent,
            self._start,
            lambda task: claim_of(task.folder),
            lambda task: task.is_done(),
        )
        try:
            while (task := units.take()) is not None:
                outcome = run_task(task, partial(on_report, task.name))
                units.end(task.name, outcome.error)
                del elsewhere[task.name]
                yield outcome
        finally:
            units.release()
        failures = units.failures_of_others()
        yield from (
            TaskOutcome(name=name, error=failures.get(name, ""), is_elsewhere=True)
            for name in elsewhere
        )
        units.remove_failures()


class _SharedUnits:
    """Independent units of work that processes share: those that are not done, and the claims of this process."""

    def __init__(
        self,
        units: Mapping[str, Any],
        folder: RootedPath,
        start: float,
        claim: Callable[[Any], RootedPath],
        is_done: Callable[[Any], bool],
        markers: RootedPath | None = None,
    ) -> None:
        """Put the units in the order of this process.

        Args:
            units: Units by name, each perhaps with the names of those that must end before it in `after`.
            folder: Folder of FAILED_NAME.
            start: Where this process begins, as a fraction of the units.
            claim: Function of a unit that returns the path of its claim.
            is_done: Function of a unit that returns whether it has its results.
            markers: Folder of the commit markers and claims of all units, which is listed in place of asking for each.
        """
        self.failed_path, self._markers = folder / FAILED_NAME, markers
        self._noun = "student" if markers is None else "shard"
        self._claim, self._is_done = claim, is_done
        names, at = list(units), int(start * len(units))
        self.waiting = {name: units[name] for name in [*names[at:], *names[:at]]}
        """Units that are not known to be done, in the order of this process."""
        self._held: dict[str, RootedPath] = {}
        self._ahead = ""
        self._free: deque[str] = deque()
        self._claimed: list[str] = []
        self._scanned_at = -math.inf
        self._failed: dict[str, str] = {}
        """Causes of failures since this process began, empty for its own."""
        self._failed_before = len(read_failures(self.failed_path))
        self._lost = self._list_markers()
        """Commit markers of shards that have lost files, which do not show that these are done."""

    def take(self, *, is_ahead: bool = False) -> Any:
        """Claim a unit, and wait as long as others have claimed all that are left.

        Args:
            is_ahead: Claim one to prepare it during the work on another, only if more are left than others work on.

        Returns:
            The unit, None if there is none.
        """
        said, self._ahead, pause = "", "", FIRST_PAUSE
        while True:
            if not self._free or time.monotonic() - self._scanned_at > _SCAN_SECONDS:
                self._scan()
            if is_ahead and len(self._free) <= len(self._claimed):
                return None
            while self._free:
                name = self._free.popleft()
                if self._take(name):
                    self._ahead = name if is_ahead else ""
                    return self.waiting[name]
                if name in self.waiting:
                    self._claimed.append(name)  # by another process, since the scan
            if is_ahead:
                return None
            if (old := next(filter(self._take, self._claimed), None)) is not None:
                return self.waiting[old]
            if (busy := next(filter(self.waiting.__contains__, self._claimed), None)) is None:
                return None
            if (holder := CLAIMS.holder(self._claim(self.waiting[busy]))) != said:
                logger.info("waiting for %s, which works on %s%s", holder, busy, EXPIRY_NOTE)
                said = holder
            pause = sleep_longer(pause, self.failed_path)
            self._scan()

    def _scan(self) -> None:
        """Look which units are done, have failed, are claimed, and are free."""
        names = self._list_markers()
        done = {name.removesuffix(MARKER_SUFFIX) for name in names - self._lost}
        for name, unit in list(self.waiting.items()):
            if name in done or (self._markers is None and self._is_done(unit)):
                del self.waiting[name]
        for line in read_failures(self.failed_path)[self._failed_before :].splitlines():
            with suppress(ValueError, KeyError, TypeError):
                entry = json.loads(line)
                self._failed.setdefault(entry[self._noun], f"{entry['cause']} (on {entry['host']})")
        left = self.waiting.keys() - self._failed.keys() - self._held.keys()
        busy = {
            name for name in left if f".{name}{CLAIM_SUFFIX}" in names or not self._is_ready(name)
        }
        self._claimed = [name for name in self.waiting if name in busy]
        free = left - busy
        self._free = deque(name for name in self.waiting if name in free)
        self._scanned_at = time.monotonic()

    def _list_markers(self) -> set[str]:
        if self._markers is None:
            return set()
        return {name for name, _ in file_at(self._markers).entries()}

    def _is_ready(self, name: str) -> bool:
        """Return whether the units that must end before this one have ended."""
        after = set(getattr(self.waiting[name], "after", ()))
        return not after & (self.waiting.keys() - self._failed.keys())

    def _take(self, name: str) -> bool:
        path = self._claim(self.waiting[name])
        if not self._is_ready(name) or not CLAIMS.take(path):
            return False
        if self._is_done(self.waiting[name]):  # since the scan
            CLAIMS.release(path)
            del self.waiting[name]
            return False
        self._held[name] = path
        return True

    def end(self, name: str, error: str = "") -> None:
        """Release the claim of a unit on which this process has worked, and note why it is not done if it is not."""
        if error and name in self.waiting and not self._is_done(self.waiting[name]):
            self._fail(name, error)
        else:
            self.waiting.pop(name, None)
        CLAIMS.release(self._held.pop(name))

    def release(self) -> None:
        """Release all claims of this process."""
        while self._held:
            CLAIMS.release(self._held.popitem()[1])

    # ---- failures ------------------------------------------------------------------------------------

    def fail_current(self, error: str) -> bool:
        """Note an error that ended the work on the claimed units; return False if others have done these."""
        current = self._held.keys() - {self._ahead}
        failed = {
            name for name in current & self.waiting.keys() if not self._is_done(self.waiting[name])
        }
        for name in failed:
            self._fail(name, error)
        self.release()
        return bool(failed) or not current

    def _fail(self, name: str, cause: str) -> None:
        self._failed[name] = ""
        note_failure(self.failed_path, {self._noun: name}, cause)

    def failures_of_others(self) -> dict[str, str]:
        """Return the units that have failed in other processes, each with the cause and the host."""
        return {name: self._failed[name] for name in self.waiting if self._failed.get(name)}

    def remove_failures(self) -> None:
        """Remove the file of failures if all units are done."""
        if not self.waiting:
            file_at(self.failed_path).remove()
