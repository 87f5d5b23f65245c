"""Where work runs (`cluster=`, `executor=`)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from pipeline.config.errors import require


@dataclass(frozen=True, kw_only=True)
class LocalClusterConfig:
    """A Ray that is started for this run on this machine and ends with it."""

    kind: Literal["local"] = "local"
    actors: int = 1
    """Teacher replicas; each works on whole shards."""
    cpus_per_actor: float = 1.0
    gpus_per_actor: float | None = None
    """May be a fraction; null shares what the machine has among the actors, at most one each."""
    threads_per_actor: int = 1
    """Of torch; part of what makes bytes equal, so also used by the serial executor."""
    decode_threads: int = 1
    """Of an actor, beside torch's: they decode the next batches while the teacher runs."""
    cpus_per_rank: float = 1.0
    gpus_per_rank: float | None = None
    """Of each training process (trainer.ranks); null takes a whole one where the cluster has any."""
    cpus_per_student: float = 1.0
    gpus_per_student: float | None = None
    """Of each student of a sweep; may be a fraction; null takes a whole one where the cluster has any."""
    max_restarts: int = 3
    """Of an actor, a rank or a student's process that dies."""

    def __post_init__(self) -> None:
        require(self.actors >= 1, f"cluster.actors must be >= 1, got {self.actors}")
        for what in ("actor", "rank", "student"):
            cpus, gpus = getattr(self, f"cpus_per_{what}"), getattr(self, f"gpus_per_{what}")
            require(cpus > 0, f"cluster.cpus_per_{what} must be > 0, got {cpus}")
            require(
                gpus is None or gpus >= 0,
                f"cluster.gpus_per_{what} must be >= 0 or null, got {gpus}",
            )
        require(
            self.threads_per_actor >= 1,
            f"cluster.threads_per_actor must be >= 1, got {self.threads_per_actor}",
        )
        require(
            self.decode_threads >= 1,
            f"cluster.decode_threads must be >= 1, got {self.decode_threads}",
        )


ClusterConfig = LocalClusterConfig
Executor = Literal["ray", "serial"]
