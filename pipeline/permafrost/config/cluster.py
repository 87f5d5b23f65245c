"""Execution of the work: Ray cluster and executor (`cluster=`, `executor=`)."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar, Literal

from annotated_types import Ge, Gt

from permafrost.config.options import Options, options_of
from permafrost.core.errors import require

Authentication = Literal["disabled", "token"]
"""Authentication of Ray. Ray itself reads the token from RAY_AUTH_TOKEN or the file RAY_AUTH_TOKEN_PATH. The
environment variable RAY_AUTH_MODE takes precedence."""


@dataclass(frozen=True, kw_only=True)
class NodeOptions(Options):
    """Further needs of a process, under Ray's own names."""

    memory: Annotated[float | None, Gt(0)] = None
    """Bytes of memory that Ray reserves on the node; null reserves none."""
    accelerator_type: str | None = None
    """Model of the GPU, by Ray's name, such as A100 or L4; null takes any."""
    resources: dict[str, float] = field(default_factory=dict, hash=False)
    """Custom resources of the node (`ray start --resources`), as in {fast_disk: 1}."""
    label_selector: dict[str, str] = field(default_factory=dict, hash=False)
    """Labels of the node (`ray start --labels`), as in {zone: a}."""

    def ray_options(self) -> dict[str, Any]:
        """Return the options that are set, as keyword arguments of Ray."""
        values = {option.name: getattr(self, option.name) for option in options_of(type(self))}
        return {name: value for name, value in values.items() if value}


@dataclass(frozen=True, kw_only=True)
class WorkConfig(Options):
    """Resources of the work on every kind of cluster."""

    section: ClassVar[str] = "cluster"

    actors: Annotated[int | None, Ge(1)] = None
    """Teacher replicas; each processes whole shards. null: one for each GPU of this machine with cluster=local, and one
    on a cluster that runs."""
    cpus_per_actor: Annotated[float, Gt(0)] = 1.0
    """CPUs per teacher replica."""
    gpus_per_actor: Annotated[float | None, Ge(0)] = None
    """GPUs per teacher replica: 1, an even fraction of one, or 0; null divides the cluster's GPUs among them, also
    those of hosts that it has announced and that are not up yet, at most one each."""
    threads_per_actor: Annotated[int, Ge(1)] = 1
    """Torch threads per teacher replica. Their number can change the last bits, so the serial executor uses it
    too."""
    decode_threads: Annotated[int | None, Ge(1)] = None
    """Decoding threads per teacher replica, in addition to torch's; they decode the next batches during the
    forward pass. null: one for each of cpus_per_actor on Ray, and for each core of this machine without Ray, at most
    8."""
    decode: Literal["auto", "actors", "hosts"] = "auto"
    """Who decodes images on Ray: teachers by their own threads, or tasks on hosts with free cores, which Ray places on
    hosts without GPUs as long as these have any. auto: the teachers, until one waits for images for a tenth of its
    time and there are other hosts; it goes back if it waits longer for those."""
    batches_ahead: Annotated[int, Ge(1)] = 4
    """Batches that hosts decode ahead of a teacher. Ray's object store has room for about as many of each."""
    cpus_per_rank: Annotated[float, Gt(0)] = 1.0
    """CPUs per training process (trainer.ranks)."""
    gpus_per_rank: Annotated[float | None, Ge(0)] = None
    """GPUs per training process (trainer.ranks): 1 or 0, because NCCL refuses two processes on one; null takes
    one if the cluster has any or has announced some."""
    cpus_per_student: Annotated[float, Gt(0)] = 1.0
    """CPUs per student of a sweep."""
    gpus_per_student: Annotated[float | None, Ge(0)] = None
    """GPUs per student of a sweep: 1, an even fraction of one, or 0; null takes a whole GPU if the cluster has
    any or has announced some."""
    actor: NodeOptions = field(default_factory=NodeOptions)
    """Further needs of a teacher replica."""
    decoder: NodeOptions = field(default_factory=NodeOptions)
    """Further needs of a decoding task."""
    rank: NodeOptions = field(default_factory=NodeOptions)
    """Further needs of a training process."""
    student: NodeOptions = field(default_factory=NodeOptions)
    """Further needs of a student of a sweep."""
    part: str = ""
    """Number of this process and of all, as in 3/16, for executor=array. It chooses where the process begins; the
    others' parts need not be at work. Empty takes the number of a Slurm, PBS, LSF or SGE array task."""
    max_restarts: Annotated[int, Ge(0)] = 3
    """Times that a shard, the ranks of a training or a student are started again after a process died."""
    max_wait_seconds: Annotated[float, Gt(0)] = 3600.0
    """Total seconds for which the work may wait for hosts: a pass for room for one teacher, ranks (trainer.ranks) for
    room for all of them, a sweep for room for its first student."""

    def __post_init__(self) -> None:
        super().__post_init__()
        _require_even_share("cluster.gpus_per_actor", self.gpus_per_actor)
        _require_even_share("cluster.gpus_per_student", self.gpus_per_student)
        number, _, count = self.part.partition("/")
        require(
            self.part == ""
            or (number.isdecimal() and count.isdecimal() and 1 <= int(number) <= int(count)),
            f"cluster.part={self.part} must be the number of this process and of all, as in 1/16 to 16/16",
        )
        ranks = self.gpus_per_rank
        require(
            ranks is None or ranks in (0, 1),
            f"cluster.gpus_per_rank={ranks} must be 0 or 1: a rank uses one GPU, and NCCL refuses two ranks on one",
        )


def _require_even_share(option: str, share: float | None) -> None:
    """Raise ConfigError for GPUs of a process that would leave a part of each GPU idle."""
    if share is None or share == 0:
        return
    processes = max(1, int(1 / share + 1e-6))
    require(
        0.95 <= processes * share <= 1 + 1e-6,
        f"{option}={share:g} leaves GPUs idle, as a process uses one of them at most; set it to 1, or to "
        f"{1 / (processes + 1):.2g} for {processes + 1} processes on each",
    )


@dataclass(frozen=True, kw_only=True)
class LocalClusterConfig(WorkConfig):
    """A Ray cluster that is started on this machine for this run and stopped with it."""

    kind: Literal["local"] = "local"
    auth: Authentication = "token"
    """Authentication of Ray's ports, which are open to the machine's network; token: only with the token of
    this run."""
    dashboard: bool = False
    """Start Ray's dashboard."""
    usage_statistics: bool = False
    """Report Ray's usage statistics to its developers."""


@dataclass(frozen=True, kw_only=True)
class ExistingClusterConfig(WorkConfig):
    """A running Ray cluster, which is neither started nor stopped and reports its own resources."""

    kind: Literal["existing"] = "existing"
    address: str = "auto"
    """host:port of the head's control store (`ray start --head --port`), or auto. auto takes RAY_ADDRESS (set
    in a submitted job), or else the cluster on this machine."""
    auth: Authentication = "token"
    """Authentication of Ray."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(
            self.address == "auto" or re.fullmatch(r"[^/]+:\d+", self.address) is not None,
            f"cluster.address={self.address} must be auto or the host:port of a head node; "
            "from outside the cluster, submit a job (make submit)",
        )


ClusterConfig = LocalClusterConfig | ExistingClusterConfig
"""Options of `cluster=`: a Ray of this command, or one that runs."""
ExecutorName = Literal["auto", "ray", "serial"]
"""Values of `executor=`: Ray, this process, or the choice by the size of the work."""
SharedExecutorName = Literal["auto", "ray", "serial", "array"]
"""The same, or this process as one task of a job array, for work that several processes divide."""
SMALL_STORE = 10_000
"""Maximum number of records of a pass that executor=auto runs without Ray, which takes 10 to 60 s to start."""

CLUSTERS: dict[str, type[WorkConfig]] = {
    cls.kind: cls for cls in (LocalClusterConfig, ExistingClusterConfig)
}
