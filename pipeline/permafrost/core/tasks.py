"""Units of work, tasks per shard and independent tasks, and the executor that runs either.

An executor maps a picklable task over shards and yields results as they finish, in any order. It runs independent
tasks, each of which ends in an outcome, which may be an error. The one here works in this process. The one on Ray is in
permafrost/cluster, and has the same results.
"""

from __future__ import annotations

import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from itertools import islice, zip_longest
from typing import Any, ClassVar, Generic, NamedTuple, Protocol, TypeVar, runtime_checkable

from permafrost.core.errors import UserError, with_remedy
from permafrost.core.interrupts import check_interrupted
from permafrost.core.progress import progress
from permafrost.core.uploads import Uploads, collected_uploads

Value = TypeVar("Value")
Report = TypeVar("Report", covariant=True)
"""Type of the report of a task to the driver, which is picklable."""


class Subject(NamedTuple):
    """Store, and what of it a task makes, for displays."""

    store: str
    """Folder or address of the store, empty without one."""
    name: str
    """Name of a pass or its teacher, or of other work, such as pack."""

    def __str__(self) -> str:
        """Return the name, and the last part of the store's."""
        store = self.store.rpartition("/")[2]
        return f"{self.name} of {store}" if store else self.name


class ShardTask(Protocol[Report]):
    """Picklable operation on one shard."""

    needs_gpu: ClassVar[bool]
    """True if an actor that runs the task reserves its share of the GPUs."""

    @property
    def subject(self) -> Subject:
        """Store and work of the task, for displays."""

    def __call__(self, shard: Any, /) -> ShardResult[Report]:
        """Process one shard and commit its result to disk."""


@runtime_checkable
class SharedTask(Protocol):
    """Operation on shards that several processes divide among them: each has a commit marker, which decides."""

    def marker(self, shard: Any, /) -> Any:
        """Return the path of a shard's commit marker."""

    def is_done(self, shard: Any, /) -> bool:
        """Return whether a shard has its commit marker and the files that it lists."""


class OtherProcesses(Protocol):
    """Processes that decode for a task, on hosts that have cores for it."""

    ahead: int
    """Number of calls to begin ahead."""

    def begin(self, call: Callable[[], Value], /) -> Callable[[], Value]:
        """Begin a picklable call, and return what waits for its value, or makes the call if no process has done it."""


@dataclass
class TaskContext:
    """Offers of an executor to the task that it calls."""

    upcoming: Any = None
    """The shard on which this process works after the current one, None as long as there is none."""
    dropped: ExitStack = field(default_factory=ExitStack)
    """Closed if the work ends before the task is called with that shard, so that a task may begin to read it."""
    others: OtherProcesses | None = None
    """Processes that decode, None if this one does."""
    objects: dict[str, tuple[Any, Any]] = field(default_factory=dict)
    """Objects for the tasks that follow in this process: by kind, such as a network, with what they depend on."""

    def keep(self, kind: str, options: Any, build: Callable[[], Value]) -> Value:
        """Return the object that is kept for these options, or build it and keep it in place of the last one.

        Args:
            kind: Kind of the object.
            options: All that it depends on.
            build: Builds it.
        """
        if kind not in self.objects or self.objects[kind][0] != options:
            self.objects.pop(kind, None)
            self.objects[kind] = options, build()
        value: Value = self.objects[kind][1]
        return value


_context: ContextVar[TaskContext | None] = ContextVar("task context", default=None)


def task_context() -> TaskContext:
    """Return what the executor offers."""
    return _context.get() or TaskContext()


@contextmanager
def offered(context: TaskContext) -> Iterator[None]:
    """Have `task_context` return a context in the block."""
    token = _context.set(context)
    try:
        yield
    finally:
        _context.reset(token)


SAMPLE = "sample"
"""Name in the result of a task on a sample of the records, which writes no shard."""


@dataclass(frozen=True, kw_only=True)
class ShardResult(Generic[Report]):
    """Result of a task for the driver. The shard itself is already on disk."""

    name: str
    records: int
    seconds: float
    waits: dict[str, float] = field(default_factory=dict)
    """Seconds of these in which the work waited, by what it waited for."""
    report: Report
    """Report of the task, None for one without any."""


@contextmanager
def count_wait(what: str, waits: dict[str, float]) -> Iterator[None]:
    """Add the seconds of the block to those of `waits`.

    Args:
        what: Work that is waited for.
        waits: Seconds by what was waited for.
    """
    started = time.monotonic()
    try:
        yield
    finally:
        waits[what] = waits.get(what, 0.0) + time.monotonic() - started


class Task(Protocol):
    """Independent task, picklable and safe to restart."""

    @property
    def name(self) -> str:
        """Unique name."""

    @property
    def after(self) -> Sequence[str]:
        """Names of tasks that must end before this one starts, if they are among the tasks."""

    def __call__(self, report: Callable[[str], None], /) -> None:
        """Run the task. `report` passes one line of progress to the driver."""


@dataclass(frozen=True, kw_only=True)
class TaskOutcome:
    """Outcome of a task."""

    name: str
    error: str = ""
    """Error message; empty if the task succeeded."""
    traceback: str = ""
    """Traceback of an error that is not a UserError; empty otherwise."""
    is_elsewhere: bool = False
    """True if another process of a job array has ended it."""


class ShardError(UserError, RuntimeError):
    """Shards that could not be processed. Finished shards are kept."""


def run_task(task: Task, report: Callable[[str], None]) -> TaskOutcome:
    """Run a task in this process and return its outcome, which has the error if there was one.

    Args:
        task: The task.
        report: Receives each line of progress.
    """
    try:
        task(report)
    except UserError as error:
        return TaskOutcome(name=task.name, error=str(error))
    except OSError as error:
        return TaskOutcome(name=task.name, error=with_remedy(str(error), error))
    except (Exception, SystemExit) as error:  # also of a network that ends the program
        return TaskOutcome(name=task.name, error=repr(error), traceback=traceback.format_exc())
    return TaskOutcome(name=task.name)


# ---- executors -------------------------------------------------------------------------------------


class Executor(Protocol):
    """Executor of tasks."""

    name: ClassVar[str]
    """Value of `executor=` that names it."""

    def map_shards(
        self, task: ShardTask[Report], shards: Sequence[Any], following: int = 0
    ) -> Iterator[ShardResult[Report]]:
        """Iterate over the results of the task on each shard, as they finish.

        Args:
            task: The task.
            shards: Shards, as the task takes them.
            following: Largest number of shards of further calls, for which the same processes are kept.

        Raises:
            ShardError: After the last result, if shards failed. In this process, the first error itself.
        """

    def alone(self, folder: Any, work: str) -> AbstractContextManager[None]:
        """Do the work of the block in one process at a time, where several share the work on a folder.

        Args:
            folder: Folder of the store or pass.
            work: What the process does, as in "lists the data", for the messages of those that wait.
        """

    def run_tasks(
        self,
        tasks: Sequence[Task],
        on_report: Callable[[str, str], None],
        at_once: int | None = None,
    ) -> Iterator[TaskOutcome]:
        """Iterate over the outcomes of the tasks, as they end.

        Args:
            tasks: Tasks, each after those that it waits for.
            on_report: Receives the name of a task and its line of progress.
            at_once: Maximum number of parallel tasks, None to limit it only by their resources.
        """


class SerialExecutor:
    """Executor in this process, which stops at the first error of a shard, for debugging."""

    name: ClassVar[str] = "serial"

    @cached_property
    def _objects(self) -> dict[str, tuple[Any, Any]]:
        return {}

    def map_shards(
        self, task: ShardTask[Report], shards: Sequence[Any], following: int = 0
    ) -> Iterator[ShardResult[Report]]:
        """Iterate over results in the order of `shards`. An error stops immediately, with its traceback.

        What a shard puts off (its files, or their uploads to a bucket) is done during the work on the next one, and its
        result follows.
        """
        with ThreadPoolExecutor(1) as uploader, ExitStack() as dropped:
            uploading: Future[ShardResult[Report]] | None = None
            for shard, after in self.pairs(task, shards):
                dropped.pop_all()  # the task takes over what it has begun
                with (
                    offered(TaskContext(after, dropped, objects=self._objects)),
                    collected_uploads() as uploads,
                ):
                    result = task(shard)
                if uploading is not None:
                    before = time.monotonic()
                    with count_wait("write", result.waits):
                        written = uploading.result()
                    result = replace(result, seconds=result.seconds + time.monotonic() - before)
                    yield written
                uploading = uploader.submit(_send, uploads, result) if uploads else None
                if uploading is None:
                    yield result
            if uploading is not None:
                yield uploading.result()

    def pairs(self, task: ShardTask[Any], shards: Sequence[Any]) -> Iterator[tuple[Any, Any]]:
        """Iterate over the shards, each with the one that follows, None if it is not known."""
        return zip_longest(shards, islice(shards, 1, None))

    def alone(self, folder: Any, work: str) -> AbstractContextManager[None]:
        """Do the work of the block."""
        return nullcontext()

    def run_tasks(
        self,
        tasks: Sequence[Task],
        on_report: Callable[[str, str], None],
        at_once: int | None = None,
    ) -> Iterator[TaskOutcome]:
        """Iterate over outcomes in the order of `tasks`, one at a time."""
        yield from (run_task(task, partial(on_report, task.name)) for task in tasks)


def _send(uploads: Uploads, result: ShardResult[Report]) -> ShardResult[Report]:
    uploads.send()
    return result


def run_shards(
    title: str,
    executor: Executor,
    task: ShardTask[Report],
    shards: Sequence[Any],
    on_result: Callable[[ShardResult[Report]], object],
    total_records: int = 0,
) -> tuple[int, float]:
    """Run a task on all shards, with a progress display.

    Args:
        title: Title of the display.
        executor: Runs the task.
        task: The task.
        shards: Shards, as the task takes them.
        on_result: Receives each result as its shard finishes.
        total_records: Number of records of all shards, which the display counts; 0 counts the shards.

    Returns:
        The number of records of the finished shards, and the sum of their seconds.

    Raises:
        ShardError: After the last result, if shards failed. In this process, the first error itself.
    """
    done, records, seconds, waits = 0, 0, 0.0, Counter[str]()
    started = time.monotonic()
    total, unit = (total_records, "record") if total_records else (len(shards), "shard")
    with progress(title, total=total, unit=unit) as bar:
        for result in executor.map_shards(task, shards):
            records, done = records + result.records, done + 1
            seconds += result.seconds
            waits.update(result.waits)
            on_result(result)
            shares = ", ".join(f"{what} {waited / seconds:.0%}" for what, waited in waits.items())
            bar.set_postfix_str(
                f"{records / (time.monotonic() - started):,.0f} records/s"
                + (shares and f", waiting for {shares}")
            )
            bar.update((records if total_records else done) - bar.n)
            check_interrupted()
    return records, seconds
