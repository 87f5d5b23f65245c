"""Number of actors, and GPUs of each actor, rank and student: by the options, and by the GPUs of the cluster.

A process of this project computes on one GPU at most, and several may share one.
"""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass

from permafrost.config.cluster import ClusterConfig
from permafrost.core.errors import require

logger = logging.getLogger("permafrost.ray")


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
        from ray._private.state import state

        up = ray.cluster_resources().get("GPU", 0.0)
        announced = state.get_max_resources_from_cluster_config() or {}
        return cls(up, max(up, announced.get("GPU", 0)))

    def __str__(self) -> str:
        """Say how many are up, and how many may come."""
        more = "" if self.most == self.up else ", more to come"
        return f"GPUs of the cluster: {self.up:g}{more}"


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


def describe_room() -> str:
    """Describe the CPUs and GPUs of a running Ray, and those that are free."""
    import ray

    all_of, free = ray.cluster_resources(), ray.available_resources()
    return " and ".join(
        f"{all_of.get(kind, 0):g} {kind}s, of which {free.get(kind, 0):g} are free"
        for kind in ("CPU", "GPU")
    )
