"""Number of actors, and GPUs of each actor, rank and student: by the options, and by the GPUs of the cluster.

A process of this project computes on one GPU at most, and several may share one.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from permafrost.config.cluster import ClusterConfig, NodeOptions
from permafrost.core.errors import UserError, require
from permafrost.core.interrupts import check_interrupted

_JOIN_SECONDS, _POLL_SECONDS = 15.0, 0.5
"""Time for which a node that is large enough may still join, and time between two looks."""
_LINE_SECONDS, _AGAIN_SECONDS = 8.0, 30.0
"""Seconds without a process until a line about it, at first and from the fourth line on."""

logger = logging.getLogger("permafrost.ray")


def _announced_resources() -> dict[str, float]:
    """Return the largest resources that the cluster may have, by its autoscaler; empty without one."""
    from ray._private.state import state

    return dict(state.get_max_resources_from_cluster_config() or {})


@dataclass(frozen=True)
class ClusterGpus:
    """GPUs of a running Ray."""

    up: float
    """GPUs of the hosts that are up."""
    most: float
    """GPUs of all hosts that the cluster may have, by what it has announced of its groups of hosts."""

    @classmethod
    def read_session(cls) -> ClusterGpus:
        """Ask the Ray of this process."""
        import ray

        up = ray.cluster_resources().get("GPU", 0.0)
        return cls(up, max(up, _announced_resources().get("GPU", 0)))

    def __str__(self) -> str:
        """Say how many are up, and how many may come."""
        more = "" if self.most == self.up else ", more to come"
        return f"GPUs of the cluster: {self.up:g}{more}"


class ClusterError(UserError, RuntimeError):
    """Error for a cluster that cannot be started or reached, or cannot run the work."""

    is_shared = True


@dataclass(frozen=True)
class Request:
    """Resources that a process needs of one node."""

    process: str
    """Kind of process, as in cluster.cpus_per_actor: actor, decoder, rank or student."""
    cpus: float
    gpus: float = 0.0
    node: NodeOptions = field(default_factory=NodeOptions)

    @property
    def ray_options(self) -> dict[str, Any]:
        """Keyword arguments of Ray for the process."""
        gpus = {"num_gpus": self.gpus} if self.gpus else {}
        return {"num_cpus": self.cpus, **gpus, **self.node.ray_options()}

    @property
    def resources(self) -> dict[str, float]:
        """Amounts by Ray's names of resources, without the model of the GPU."""
        amounts = {"CPU": self.cpus, "GPU": self.gpus, "memory": self.node.memory or 0.0}
        return {name: amount for name, amount in amounts.items() if amount} | self.node.resources

    @property
    def _needs(self) -> dict[str, float]:
        model = self.node.accelerator_type
        return self.resources | ({f"accelerator_type:{model}": 0.001} if model else {})

    def __str__(self) -> str:
        """Name each resource and label with its amount or value."""
        labels = [f"label {name}={value}" for name, value in self.node.label_selector.items()]
        needs = [
            name if ":" in name else f"{amount:,.15g} {name}"
            for name, amount in self._needs.items()
        ]
        return ", ".join([*needs, *labels])

    def is_met_by(self, node: Mapping[str, Any]) -> bool:
        """Return whether a node of `ray.nodes()` is large enough. Labels with an operator may fit any node."""
        labels = self.node.label_selector.items()
        return all(
            node["Resources"].get(name, 0.0) >= n for name, n in self._needs.items()
        ) and all(
            value[:1] == "!" or "(" in value or node["Labels"].get(name) == value
            for name, value in labels
        )

    def await_node(self) -> None:
        """Wait until a node is large enough, as nodes may be about to join.

        With an autoscaler, which may add such a node, return at once: the wait for room has its own limit.

        Raises:
            ClusterError: If no node is after 15 s.
        """
        import ray

        started = None
        while True:
            nodes = [node for node in ray.nodes() if node["Alive"]]
            if any(map(self.is_met_by, nodes)) or _announced_resources():
                return
            if started is None:
                started = time.monotonic()
                logger.warning(
                    "no node can hold one %s, which needs %s; waiting %.0f s for a node to join",
                    self.process,
                    self,
                    _JOIN_SECONDS,
                )
            if time.monotonic() - started > _JOIN_SECONDS:
                break
            check_interrupted()
            time.sleep(_POLL_SECONDS)
        has = ", ".join(
            [
                f"{max(node['Resources'].get(name, 0.0) for node in nodes):,.15g} {name}"
                for name in self._needs
            ]
            + [
                f"label {name}={sorted({node['Labels'].get(name, '') for node in nodes})}"
                for name in self.node.label_selector
            ]
        )
        raise ClusterError(
            f"no node can hold one {self.process}, which needs {self}; the most that a node has, of {len(nodes)}: "
            f"{has}. Correct cluster.cpus_per_{self.process}, cluster.gpus_per_{self.process} or "
            f"cluster.{self.process}, or start a node that has it all"
        )


def count_actors(config: ClusterConfig) -> int:
    """Return the number of actors: the option, or one for each GPU of this machine if Ray is started on it.

    Args:
        config: Options of `cluster=`.
    """
    if config.actors is not None:
        return config.actors
    return max(1, count_local_gpus()) if config.kind == "local" else 1


def count_local_gpus() -> int:
    """Return the number of GPUs of this machine that torch can use. None of them is touched."""
    import torch

    return torch.cuda.device_count()


def place_actors(config: ClusterConfig, actors: int) -> float:
    """Return the GPUs of each teacher on a running Ray, and say what of the cluster they use.

    Args:
        config: Options of `cluster=`.
        actors: Number of teachers.

    Raises:
        ConfigError: If GPUs would be shared so that some of them are idle.
    """
    gpus, share = ClusterGpus.read_session(), config.gpus_per_actor
    if share is None:
        share = _share(actors, gpus)
    each = "on CPUs" if share == 0 else f"cluster.gpus_per_actor={share:g}"
    logger.info("teachers: cluster.actors=%d, %s; %s", actors, each, _describe(actors, share, gpus))
    return share


def _share(actors: int, gpus: ClusterGpus) -> float:
    """Return the GPUs of each of the actors, at most one.

    Raises:
        ConfigError: If the number of actors is not a multiple of that of the GPUs, which Ray fills one by one.
    """
    if gpus.most == 0 or actors <= gpus.most:
        return min(1.0, gpus.most)
    number = int(gpus.most)
    fewer, more = actors // number * number, math.ceil(actors / number) * number
    require(
        fewer == actors,
        f"cluster.actors={actors} teachers cannot share {number} GPUs evenly, and some would be idle; set it to "
        f"{fewer} or {more}, or name cluster.gpus_per_actor",
    )
    return number / actors


def _describe(actors: int, share: float, gpus: ClusterGpus) -> str:
    """Say what the cluster has, and what of it stays idle."""
    idle = int(gpus.up - math.ceil(actors * share))
    return f"{gpus}, of which {idle} stay idle" if idle > 0 else str(gpus)


def gpus_each(option: float | None) -> float:
    """Return the GPUs of a rank or a student: the option, or a whole GPU if the cluster has any or some are to come.

    Args:
        option: The option, None if it is left to the cluster.
    """
    if option is not None:
        return option
    return 1.0 if ClusterGpus.read_session().most else 0.0


def describe_cluster() -> str:
    """Describe the hosts of a running Ray."""
    import ray

    hosts = [node for node in ray.nodes() if node["Alive"]]
    cpus = ray.cluster_resources().get("CPU", 0)
    return f"{len(hosts)} hosts, {cpus:g} CPUs; {ClusterGpus.read_session()}"


def describe_room(request: Request) -> str:
    """Describe what a running Ray has of the resources of a request, and what of it is free."""
    import ray

    all_of, free = ray.cluster_resources(), ray.available_resources()
    return ", ".join(
        f"{all_of.get(name, 0):,.15g} {name} ({free.get(name, 0):,.15g} free)"
        for name in request.resources
    )


class Wait:
    """Lines on a wait for processes, every 8 s at first and then every 30 s."""

    def __init__(self, request: Request, count: int, max_seconds: float) -> None:
        """Begin to wait.

        Args:
            request: What each process needs.
            count: Number of processes.
            max_seconds: Time after which the wait for the first one ends, for the lines.
        """
        self.request, self.count, self.max_seconds = request, count, max_seconds
        self._started, self._since, self._due = 0, time.monotonic(), _LINE_SECONDS

    def note(self, started: int) -> float:
        """Say what is waited for if it is time, and return the seconds since the number of processes changed.

        Args:
            started: Number of processes that have started.
        """
        now, process = time.monotonic(), self.request.process
        if started != self._started:
            self._started, self._since = started, now
            self._due = _AGAIN_SECONDS if started else _LINE_SECONDS
            if started and self.count > 1:
                logger.info("%ss: %d of %d started", process, started, self.count)
        waited = now - self._since
        if started < self.count and waited > self._due:
            logger.warning(
                "%ss: %d of %d started; each needs %s, and the cluster has %s%s",
                process,
                started,
                self.count,
                self.request,
                describe_room(self.request),
                ""
                if started
                else f"; cluster.max_wait_seconds leaves {max(0, self.max_seconds - waited):.0f} s",
            )
            # Processes that are at work wait for no other one, so their number is said once.
            pause = _LINE_SECONDS if self._due < _AGAIN_SECONDS else _AGAIN_SECONDS
            self._due = math.inf if started else self._due + pause
        return waited

    def describe_end(self) -> str:
        """Describe a wait that was too long."""
        return (
            f"cluster.max_wait_seconds={self.max_seconds:g} went by without room for {self.count} "
            f"{self.request.process}s; each needs {self.request}, and the cluster has {describe_room(self.request)}"
        )
