"""Shards as rows of Ray Data: one execution of its actors for the work of a pass, and the gate that hands it out.

A row is a place in the queue. The actor that has it asks the gate for a shard, which is the next one of the work that
the driver has added last: samples first, and shards when the driver has decided on them. So each process is started
once, and builds its network once. Ray Data places actors, starts them again and adds some on hosts that join. It starts
them without end, so the gate counts the attempts of a shard.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import math
import os
import threading
import time
import traceback
from collections import Counter, defaultdict, deque
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from statistics import median
from typing import Any, NamedTuple

from permafrost.cluster.decode_tasks import DecodeTasks
from permafrost.cluster.placement import ClusterError, Request, Wait
from permafrost.cluster.ray_metrics import PassMetrics
from permafrost.cluster.session import last_line, on_this_node
from permafrost.config.cluster import ClusterConfig
from permafrost.core.errors import UserError, shorten
from permafrost.core.interrupts import units_of_work
from permafrost.core.tasks import ShardResult, ShardTask, Subject, TaskContext, offered
from permafrost.core.uploads import collected_uploads

_CALLS = 2
"""Calls of an actor at once: one works on a shard, and the other one writes that before it."""
_SPARE_ROWS = 8
"""Further rows for each actor, as those of a lost actor wait until a host has room for another one."""
_MAX_WAITING = 100_000
"""Largest number of actors that wait at the gate at once."""
_REPORT_SECONDS = 1.0
_SILENT_SECONDS = 30.0
"""Time without a report after which an actor is taken for stopped, with its host or alone."""
_LIVELY_SECONDS = 5.0
"""Time since its last report within which an actor is counted as one at work."""
_UNIT_SECONDS, _UNITS = 240.0, 10
"""An actor hangs, such as on a device, if one unit of work takes over 240 s and 10 times the median. Requests to a
bucket are repeated for up to 180 s."""
_numbers = itertools.count(1)
"""Numbers of the gates of this process."""

logger = logging.getLogger("permafrost.ray")


class ShardFailure(NamedTuple):
    """Error of a shard."""

    text: str
    is_shared: bool
    """True if every shard would fail in the same way."""


class ShardAssignment(NamedTuple):
    """Shard that an actor is to work on."""

    number: int
    """Number of the shard among all that were added."""
    work: int
    """Number of the work that it belongs to."""
    shard: bytes
    deaths: int = 0
    """Number of processes that died at it."""
    all_died: int = 0
    """Number of processes that died, if they are too many and none has finished a shard."""
    is_alone: bool = False
    """True if nothing else is done during its write, as a process died that had it and another shard."""


class _Worker(NamedTuple):
    """Actor, as it has last reported."""

    handle: list[Any]
    host: str
    beat: float
    """Time of its last report."""
    shard: str = ""
    """Name of its shard, empty between two of them."""
    units: int = 0
    """Units of work that it has begun."""
    since: float = 0.0
    """Time since which it is at the same unit."""
    is_writing: bool = False
    """True while it writes or uploads a shard, which may take longer than any unit of work."""


class Gate:
    """Actor of Ray that hands out shards, counts the deaths at each, and knows which actors work."""

    def __init__(self, most_deaths: int, actors: int) -> None:
        self._most_deaths, self._actors = most_deaths, actors
        self._tasks: dict[int, bytes] = {}
        self._shards: list[ShardAssignment] = []
        self._waiting: deque[int] = deque()
        self._rows: dict[int, tuple[int, str]] = {}
        """Number of the shard of each row, and the actor that has it."""
        self._holders: dict[int, str] = {}
        """Actor of each shard without an answer."""
        self._excused: set[int] = set()
        """Shards whose process died with another one, and which have not been taken again."""
        self._alone: set[int] = set()
        """Shards that had such a death."""
        self._idle_reports = 0
        """Times in a row that shards were left and all actors were between two shards and wrote none."""
        self._begun: defaultdict[int, list[str]] = defaultdict(list)
        """Hosts of the actors that began to work on each shard."""
        self._names: dict[int, str] = {}
        self._has_answer = False
        self._changed = asyncio.Condition()
        self._deaths = self.restarts = 0
        """Processes that died at a shard, and times that a shard was begun again."""
        self._is_over = False
        self._workers: dict[str, _Worker] = {}
        self._unit_seconds: deque[float] = deque(maxlen=100)
        self._lines: list[str] = []

    async def add(self, work: int, task: bytes, shards: Sequence[bytes]) -> None:
        """Add work: shards, and the task that is called with each of them."""
        self._tasks[work] = task
        first = len(self._shards)
        self._shards += [ShardAssignment(first + n, work, shard) for n, shard in enumerate(shards)]
        await self._give(range(first, len(self._shards)))

    async def _give(self, numbers: Iterable[int]) -> None:
        """Have shards wait for a row."""
        async with self._changed:
            self._waiting.extend(numbers)
            self._changed.notify_all()

    async def task(self, work: int) -> bytes:
        """Return the task of a work."""
        return self._tasks[work]

    async def take(self, row: int, actor: str) -> ShardAssignment | None:
        """Return the shard of a row, once there is one for its actor, the same at every attempt; None at the end."""
        if row not in self._rows:
            async with self._changed:
                await self._changed.wait_for(lambda: self._is_over or self._has_shard_for(actor))
                if self._is_over:
                    return None
                self._rows[row] = self._waiting.popleft(), actor
        number, before = self._rows[row]
        if number in self._holders and number not in self._excused:
            self._excuse(each for each, holder in self._holders.items() if holder == before)
        self._excused.discard(number)
        self._rows[row], self._holders[number] = (number, actor), actor
        deaths = 0
        if hosts := self._begun[number]:
            import ray

            alive = {node["NodeID"] for node in ray.nodes() if node["Alive"]}
            deaths = sum(host in alive for host in hosts)  # those of a lost host do not count
            self._deaths += deaths > 0
            self.restarts += 1
            now = time.monotonic()
            working = sum(now - each.beat < _LIVELY_SECONDS for each in self._workers.values())
            loss = (
                f"a process was lost at shard {self._names[number]}, {deaths} so far (Ray's logs of its host say why; "
                "memory is a common reason)"
                if deaths
                else f"a process with two shards or its host was lost at shard {self._names[number]}"
            )
            self._lines.append(f"{loss}; the shard is done again, {working} actors are at work")
        has_hope = self._has_answer or self._deaths <= self._most_deaths
        return self._shards[number]._replace(
            deaths=deaths,
            all_died=0 if has_hope else self._deaths,
            is_alone=number in self._alone,
        )

    def _excuse(self, numbers: Iterable[int]) -> None:
        """Blame none of the shards that a lost actor had, if it had begun two."""
        begun = {number for number in numbers if self._begun[number]} - self._excused
        if len(begun) > 1:
            self._alone |= begun
            self._excused |= begun
            for number in begun:
                self._begun[number][-1] = ""  # no host

    def _has_shard_for(self, actor: str) -> bool:
        """Return whether a shard waits for an actor; one that has a shard leaves one to each that has none."""
        if not self._waiting:
            return False
        busy = set(self._holders.values())
        return actor not in busy or len(self._waiting) > self._actors - len(busy)

    async def begin(self, number: int, name: str, actor: str, host: str) -> None:
        """Note that an actor begins to work on a shard of that name."""
        self._begun[number].append(host)
        self._names[number] = name
        if actor in self._workers:
            self._workers[actor] = self._workers[actor]._replace(shard=name)

    async def answered(self, number: int) -> None:
        """Note that the driver has the answer of a shard."""
        async with self._changed:
            self._has_answer = True
            self._holders.pop(number, None)
            self._changed.notify_all()

    async def report(
        self, actor: str, handle: list[Any], host: str, shard: str, units: int, is_writing: bool
    ) -> None:
        """Note that an actor is alive.

        Args:
            actor: Its identifier.
            handle: Its handle.
            host: Its host.
            shard: Name of its shard, empty between two of them.
            units: Units of work that it has begun.
            is_writing: Whether it writes or uploads a shard.
        """
        now = time.monotonic()
        before = self._workers.get(actor, _Worker(handle, host, now, since=now))
        if before.shard and units > before.units:
            self._unit_seconds.append((now - before.since) / (units - before.units))
        since = before.since if (before.shard, before.units) == (shard, units) else now
        self._workers[actor] = _Worker(handle, host, now, shard, units, since, is_writing)

    async def say(self, line: str) -> None:
        """Keep a line for the user."""
        self._lines.append(line)

    async def end(self) -> None:
        """Let the actors that wait for a shard go, so that none of their calls fails when this process ends."""
        async with self._changed:
            self._is_over = True
            self._changed.notify_all()

    async def take_lines(self) -> list[str]:
        """Return the lines for the user, once each."""
        lines, self._lines = self._lines, []
        return lines

    async def take_silent(self) -> tuple[int, int, list[_Worker], list[str]]:
        """Return the numbers of actors and restarts, and the actors that have not reported or gone on for too long.

        The last value has the names of shards without an answer, if all actors have been between two shards and
        written none for so many calls, once a second, that Ray Data must have lost them.

        An actor that has begun no unit of work builds its network, which may take any time. The shards of a silent
        actor are given to others at once, as it is not started again before a host has room for it.
        """
        now, unit = time.monotonic(), median(self._unit_seconds or [0.0])
        most = max(_UNIT_SECONDS, _UNITS * unit)
        silent = {
            actor: worker
            for actor, worker in self._workers.items()
            if now - worker.beat > _SILENT_SECONDS
            or (worker.shard and worker.units and now - worker.since > most)
        }
        for actor in silent:
            del self._workers[actor]
        lost = [row for row, (_, actor) in self._rows.items() if actor in silent]
        for actor in silent:
            self._excuse([number for number, holder in self._holders.items() if holder == actor])
        numbers = {self._rows.pop(row)[0] for row in lost} & self._holders.keys()
        self._excused -= numbers
        for number in numbers:
            del self._holders[number]
        await self._give(sorted(numbers))
        left = [*self._holders, *self._waiting]
        works = [bool(each.shard) or each.is_writing for each in self._workers.values()]
        is_idle = left and works and not any(works)
        self._idle_reports = self._idle_reports + 1 if is_idle else 0
        names = [self._names.get(number, f"number {number}") for number in left]
        stuck = names if self._idle_reports > _UNIT_SECONDS else []
        return len(self._workers), self.restarts, list(silent.values()), stuck


class _ShardActor:
    """Actor of Ray Data that calls the task of a shard, and returns an error.

    Of two calls at once, the other one writes or uploads its shard.
    """

    def __init__(self, gate: Any, config: ClusterConfig) -> None:
        import ray

        self._gate = gate
        self._max_restarts = config.max_restarts
        self._tasks: dict[int, ShardTask[Any]] = {}
        self._failures: dict[int, ShardFailure] = {}
        """Error of each work whose other shards would fail in the same way, so that none of them is tried."""
        self._work = threading.Lock()
        self._context = TaskContext()
        self._decoding = DecodeTasks(config, gate.say.remote)
        self._shard = ""
        self._writes: set[int] = set()
        """Numbers of the shards that are being written or uploaded."""
        context = ray.get_runtime_context()
        self._actor, self._handle = context.get_actor_id(), [context.current_actor]
        self._node = context.get_node_id()
        threading.Thread(target=self._report, name="report", daemon=True).start()

    def _report(self) -> None:
        """Report every second, as long as this process lives."""
        who = self._actor, self._handle, os.uname().nodename
        while True:
            self._gate.report.remote(*who, self._shard, units_of_work(), bool(self._writes))
            time.sleep(_REPORT_SECONDS)

    def __call__(self, rows: dict[str, Any]) -> dict[str, Any]:
        import ray
        from ray import cloudpickle

        (row,) = rows["row"].tolist()
        assignment: ShardAssignment | None = ray.get(self._gate.take.remote(row, self._actor))
        if assignment is None:
            return {"answer": []}
        answer = (
            assignment.work,
            assignment.number,
            self._answer(assignment),
            self._decoding.take_batches(),
        )
        return {"answer": [cloudpickle.dumps(answer)]}

    def _answer(self, assignment: ShardAssignment) -> ShardResult[Any] | ShardFailure:
        import ray
        from ray import cloudpickle

        try:
            shard = cloudpickle.loads(assignment.shard)
            name = str(getattr(shard, "name", shard))
            if assignment.all_died:
                text = f"{assignment.all_died} processes died, and none has finished a shard"
                return ShardFailure(f"{text}; see Ray's logs of their hosts", is_shared=True)
            if assignment.deaths > self._max_restarts:
                return ShardFailure(f"{assignment.deaths} processes died at shard {name}", False)
            self._context.upcoming = shard
            with self._work, collected_uploads() as uploads, offered(self._context):
                if assignment.work in self._failures:
                    return self._failures[assignment.work]
                self._context.upcoming, self._shard = None, name
                self._context.others = self._decoding if self._decoding.is_used else None
                ray.get(self._gate.begin.remote(assignment.number, name, self._actor, self._node))
                result = self._task(assignment.work)(shard)
                self._decoding.choose(result)
                self._writes.add(assignment.number)
                self._shard = ""
                if assignment.is_alone:
                    uploads.send()
            if not assignment.is_alone:
                uploads.send()
        except UserError as error:
            if (failure := ShardFailure(str(error), error.is_shared)).is_shared:
                self._failures[assignment.work] = failure
            return failure
        except BaseException:  # a SystemExit would end the actor
            return ShardFailure(traceback.format_exc(), is_shared=False)
        finally:
            self._writes.discard(assignment.number)
        return result

    def _task(self, work: int) -> ShardTask[Any]:
        """Return the task of a work, which is loaded once."""
        import ray
        from ray import cloudpickle

        if work not in self._tasks:
            data = ray.get(self._gate.task.remote(work))
            try:
                self._tasks = {work: cloudpickle.loads(data)}
            except Exception as error:
                raise _no_actor(error) from error
        return self._tasks[work]


class ShardRows:
    """Execution of Ray Data, whose rows are shards."""

    def __init__(
        self, config: ClusterConfig, subject: Subject, rows: int, actors: int, request: Request
    ) -> None:
        """Start the actors.

        Args:
            config: Options of `cluster=`.
            subject: What the actors work on, by which Ray's dashboard names them.
            rows: Number of shards and samples that they may work on.
            actors: Number of actors.
            request: What each of them needs.

        Raises:
            ClusterError: If no node can hold an actor.
        """
        import ray
        import ray.data

        request.await_node()
        gate = ray.remote(Gate).options(
            name=f"gate {next(_numbers)} of {subject}",
            max_concurrency=_MAX_WAITING,
            **on_this_node(),
        )
        self._gate = gate.remote(config.max_restarts * actors, actors)
        self.left, self.request = rows, request
        """Number of rows that have no shard yet, and what each actor needs."""
        self._work, self._is_idle = 0, False
        self._wait = Wait(request, actors, config.max_wait_seconds)
        self._metrics = PassMetrics(subject)
        logger.info("starting actors for %s: %d, each with %s", subject, actors, request)
        rows += _SPARE_ROWS * actors
        pool = ray.data.ActorPoolStrategy(
            min_size=1,
            max_size=actors,
            max_tasks_in_flight_per_actor=_CALLS,
            max_concurrent_calls_per_actor=_CALLS,
            enable_true_multi_threading=True,
        )
        with _quiet_context(config):
            places = ray.data.from_items(
                [{"row": row} for row in range(rows)], override_num_blocks=rows
            )
            answers = places.map_batches(
                type(str(subject), (_ShardActor,), {}),  # Ray names actors and tasks by the class
                fn_constructor_args=(self._gate, config),
                batch_size=1,
                compute=pool,
                **request.ray_options,
            )
        self._closed = threading.Event()
        self._end = ""
        """Why the work was ended by the watch."""
        threading.Thread(target=self._watch, name="shard-watch", daemon=True).start()
        self._batches = iter(
            answers.iter_batches(batch_size=None, prefetch_batches=0, batch_format="pyarrow")
        )

    def map(self, task: ShardTask[Any], shards: Sequence[Any]) -> Iterator[Any]:
        """Iterate over the results and errors of shards, as they finish.

        Raises:
            ClusterError: If no actor can be started.
        """
        import ray
        from ray import cloudpickle
        from ray.exceptions import RayError

        self._work, self.left = self._work + 1, self.left - len(shards)
        self._metrics = PassMetrics(task.subject, len(shards))
        data = [cloudpickle.dumps(shard) for shard in shards]
        try:
            ray.get(self._gate.add.remote(self._work, cloudpickle.dumps(task), data))
        except RayError as error:
            raise _no_actor(error) from error
        answered: set[int] = set()
        batches, self._is_idle = Counter[str](), False
        while len(answered) < len(shards):
            for answer in self._next_answers():
                work, number, result, decoded = cloudpickle.loads(answer)
                batches += decoded
                self._gate.answered.remote(number)
                # Others are those of an actor that was silent, and whose shard was given to another one.
                if work == self._work and number not in answered:
                    answered.add(number)
                    if isinstance(result, ShardResult):
                        self._metrics.add(result)
                    yield result
        self._is_idle = True
        if batches:
            shares = ", ".join(f"{count:,} by {host}" for host, count in batches.most_common())
            logger.info("batches of images that hosts were to decode: %s", shares)

    def _next_answers(self) -> list[bytes]:
        from ray.exceptions import GetTimeoutError, RayError

        try:
            answers: list[bytes] = next(self._batches)["answer"].to_pylist()
        except GetTimeoutError as error:
            raise ClusterError(self._wait.describe_end()) from error
        except (RayError, RuntimeError) as error:
            raise self._failure(error) from error
        return answers

    def _failure(self, error: Exception) -> ClusterError:
        """Describe the error of an execution."""
        from ray.exceptions import RayError

        try:
            self._log_lines()
        except RayError as end:
            return ClusterError(
                self._end
                or f"the process on this host that hands out the shards has ended ({last_line(end)}); the same command "
                "does those that are missing"
            )
        return _no_actor(error)

    def _watch(self) -> None:
        """End actors that are silent, and say if none has started, in a thread."""
        import ray
        from ray.exceptions import RayError

        asked, most, actors, silent, stuck = None, 0, 0, [], []
        while not self._closed.wait(_REPORT_SECONDS):
            try:
                asked = asked or self._gate.take_silent.remote()
                if ray.wait([asked], timeout=_REPORT_SECONDS)[0]:  # it takes seconds to start
                    actors, restarts, silent, stuck = ray.get(asked)
                    asked = None
                    self._log_lines()
                    self._metrics.set_actors(actors, restarts)
            except (RayError, ValueError):  # the work ends, and with it the gate
                continue
            for worker in silent:
                logger.warning(
                    "an actor on %s has not gone on for %.0f s (%s); it is ended, and another one gets its shard",
                    worker.host,
                    time.monotonic() - min(worker.beat, worker.since),
                    f"shard {worker.shard}" if worker.shard else "between two shards",
                )
                ray.kill(worker.handle[0], no_restart=False)
            if stuck:
                self._end = (
                    f"no actor has worked for {_UNIT_SECONDS:.0f} s, and {len(stuck)} shards are left "
                    f"({shorten(stuck, 3)}): Ray Data has lost them; the same command does them"
                )
                ray.kill(self._gate)
            silent = stuck = []
            most = max(most, actors)
            self._wait.note(most)

    def _log_lines(self) -> None:
        """Log what the actors say."""
        import ray

        for line in ray.get(self._gate.take_lines.remote(), timeout=_SILENT_SECONDS):
            logger.warning("%s", line)

    def close(self) -> None:
        """End all actors."""
        import ray

        if ray.is_initialized():  # a caller that stopped early may have closed the executor
            with suppress(ray.exceptions.RayError):
                self._log_lines()
                if self._is_idle:  # the other rows end, so that Ray lists no call that failed
                    ray.get(self._gate.end.remote(), timeout=_SILENT_SECONDS)
                    ending = threading.Thread(target=deque, args=(self._batches, 0), daemon=True)
                    ending.start()
                    ending.join(_SILENT_SECONDS)
            with suppress(
                ValueError
            ):  # an actor was lost meanwhile, and the thread waits for another one
                self._batches.close()
            ray.kill(self._gate)
        self._closed.set()


def _no_actor(error: Exception) -> ClusterError:
    return ClusterError(f"no actor can do the work: {last_line(error)}")


@contextmanager
def _quiet_context(config: ClusterConfig) -> Iterator[None]:
    """Have data sets of the block made with settings of their own."""
    from ray.data import DataContext

    context = DataContext.get_current().copy()
    logging.getLogger("ray.data").setLevel(logging.CRITICAL)  # errors are raised, and said once
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    context.execution_no_progress_timeout_s = -1  # a shard may take long
    context.wait_for_min_actors_s = math.ceil(config.max_wait_seconds)
    context.autoscaling_config.actor_pool_util_upscaling_threshold = 0.99
    with DataContext.current(context):
        yield
