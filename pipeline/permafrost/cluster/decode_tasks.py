"""Decoding by tasks of Ray, which run on hosts without GPUs as long as these have a free core.

An actor begins them a few batches ahead. It never depends on them: where no host has room, or one does not answer, the
actor decodes by its own threads.
"""

from __future__ import annotations

import os
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator
from functools import partial
from statistics import fmean
from typing import Any, TypeVar

from permafrost.cluster.placement import Request
from permafrost.cluster.session import last_line
from permafrost.config.cluster import ClusterConfig
from permafrost.core.tasks import ShardResult

Value = TypeVar("Value")

_ROOM_SECONDS, _ANSWER_SECONDS = 10.0, 120.0
"""Longest time until a task begins, and from then on until it ends."""
_PAUSE_SECONDS = 60.0
"""Time for which no task is begun after one has failed."""
_MIN_SHARE = 0.1
"""Part of a shard's time for which a teacher waits for its own threads until hosts are tried (cluster.decode=auto)."""
_MIN_SHARDS, _MAX_SHARDS = 3, 10
"""Numbers of shards by whose mean it is chosen who decodes (cluster.decode=auto)."""
_RETRIES = 3
"""Times that Ray runs a task again whose process or host was lost."""
_IN_ACTOR = "the teacher's actor"


class DecodeTasks:
    """Decoding of an actor's batches elsewhere, and the choice of who decodes."""

    def __init__(self, config: ClusterConfig, say: Callable[[str], object]) -> None:
        """Begin with the actor's own threads, unless cluster.decode=hosts.

        Args:
            config: Options of `cluster=`.
            say: Receives lines for the user.
        """
        self.ahead = config.batches_ahead
        self._request = Request("decoder", 1.0, node=config.decoder)
        self.is_used = config.decode == "hosts"
        """True if hosts decode the next shard."""
        self._chooses = config.decode == "auto"
        self._say = say
        self._waited = {is_used: deque[float](maxlen=_MAX_SHARDS) for is_used in (False, True)}
        """Seconds of waiting for a record, for each of the last shards, by `is_used`."""
        self._starting = 1
        """Shards that are not typical: the first one, and after a change the one begun before and the one after it."""
        self._batches = Counter[str]()
        self._paused_until = 0.0
        self._failure = threading.Lock()

    def begin(self, call: Callable[[], Value]) -> Callable[[], Value]:
        """Begin a picklable call, and return what waits for its value, or makes the call if no process has done it."""
        import ray
        from ray import cloudpickle

        if self._is_paused:
            return partial(self._call, call)
        task = ray.remote(_decode).options(
            **self._request.ray_options,
            max_retries=_RETRIES,
            num_returns="streaming",
            name="decode",
        )
        return partial(self._finish, call, task.remote(cloudpickle.dumps(call)))

    @property
    def _is_paused(self) -> bool:
        return time.monotonic() < self._paused_until

    def _finish(self, call: Callable[[], Value], items: Any) -> Value:
        """Wait for the items of a task, or make its call."""
        import ray
        from ray.exceptions import RayError

        value: Value
        try:
            for seconds, lack in (
                (_ROOM_SECONDS, "no host had a free core"),
                (_ANSWER_SECONDS, "a host did not answer"),
            ):
                if self._is_paused:
                    seconds = 0.0
                if not ray.wait([items], timeout=seconds)[0]:
                    raise TimeoutError(f"{lack} for {seconds:.0f} s")
                host, value = ray.get(next(items))
        except (RayError, TimeoutError) as error:
            with self._failure:
                if not self._is_paused:
                    self._paused_until = time.monotonic() + _PAUSE_SECONDS
                    self._say(
                        f"images are decoded in {_IN_ACTOR} for the next {_PAUSE_SECONDS:.0f} s, as {last_line(error)}"
                    )
            ray.cancel(items)
            return self._call(call)
        self._batches[host] += 1
        return value

    def _call(self, call: Callable[[], Value]) -> Value:
        self._batches[_IN_ACTOR] += 1
        return call()

    def take_batches(self) -> Counter[str]:
        """Return the number of batches by the host that has decoded them, since the last call."""
        batches, self._batches = self._batches, Counter()
        return batches

    def choose(self, result: ShardResult[Any]) -> None:
        """Choose who decodes from now on, by how long the teacher has waited for a shard (cluster.decode=auto)."""
        if not self._chooses or "decode" not in result.waits:
            return
        waited = result.waits["decode"]
        self._starting -= 1
        if self._starting >= 0:
            return
        self._waited[self.is_used].append(waited / max(1, result.records))
        means = {is_used: fmean(waits) for is_used, waits in self._waited.items() if waits}
        if len(self._waited[self.is_used]) < _MIN_SHARDS:
            return
        if self.is_used and means[True] > means[False]:
            self.is_used = self._chooses = False
        elif not self.is_used and waited > _MIN_SHARE * result.seconds and _has_room_elsewhere():
            self.is_used, self._starting = True, 2
        else:
            return
        by = "hosts with free cores" if self.is_used else _IN_ACTOR
        times = ", ".join(
            f"{1000 * seconds:.2g} ms a record for {'hosts' if is_used else 'its own threads'}"
            for is_used, seconds in means.items()
        )
        self._say(f"cluster.decode=auto: {by} will decode, as the teacher waited {times}")


def _decode(call: bytes) -> Iterator[tuple[str, Any]]:
    """Say that a process has begun, and yield the value of a call, each with the name of the host."""
    from ray import cloudpickle

    host = os.uname().nodename
    yield host, None
    yield host, cloudpickle.loads(call)()


def _has_room_elsewhere() -> bool:
    """Return whether a core is free in a cluster of several hosts."""
    import ray

    hosts = [node for node in ray.nodes() if node["Alive"]]
    return len(hosts) > 1 and ray.available_resources().get("CPU", 0.0) >= 1
