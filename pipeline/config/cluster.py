"""Where work runs (`cluster=`, `executor=`)."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

from annotated_types import Ge, Gt

from pipeline.config.options import Options
from pipeline.core.errors import require

Authentication = Literal["disabled", "token"]
"""Of Ray. The token itself is Ray's own affair: RAY_AUTH_TOKEN, or the file RAY_AUTH_TOKEN_PATH. What
the environment says in RAY_AUTH_MODE wins."""


@dataclass(frozen=True, kw_only=True)
class WorkConfig(Options):
    """How much works at once and what each asks for, whatever the cluster."""

    section: ClassVar[str] = "cluster"

    actors: Annotated[int, Ge(1)] = 1
    """Teacher replicas; each works on whole shards."""
    cpus_per_actor: Annotated[float, Gt(0)] = 1.0
    gpus_per_actor: Annotated[float | None, Ge(0)] = None
    """May be a fraction; null shares what the cluster has among the actors, at most one each."""
    threads_per_actor: Annotated[int, Ge(1)] = 1
    """Of torch; part of what makes bytes equal, so also used by the serial executor."""
    decode_threads: Annotated[int, Ge(1)] = 1
    """Of an actor, beside torch's: they decode the next batches while the teacher runs."""
    cpus_per_rank: Annotated[float, Gt(0)] = 1.0
    gpus_per_rank: Annotated[float | None, Ge(0)] = None
    """Of each training process (trainer.ranks); null takes a whole one where the cluster has any."""
    cpus_per_student: Annotated[float, Gt(0)] = 1.0
    gpus_per_student: Annotated[float | None, Ge(0)] = None
    """Of each student of a sweep; may be a fraction; null takes a whole one where the cluster has any."""
    max_restarts: Annotated[int, Ge(0)] = 3
    """Of an actor, a rank or a student's process that dies."""


@dataclass(frozen=True, kw_only=True)
class LocalClusterConfig(WorkConfig):
    """A Ray that is started for this run on this machine and ends with it."""

    kind: Literal["local"] = "local"
    auth: Authentication = "token"
    """Ray's ports are open to the machine's network while it runs; a token of this run alone guards them."""
    dashboard: bool = False
    usage_statistics: bool = False
    """Whether Ray reports its own use to its makers."""


@dataclass(frozen=True, kw_only=True)
class ExistingClusterConfig(WorkConfig):
    """A Ray that runs already; it is neither started nor stopped, and it says itself what it has."""

    kind: Literal["existing"] = "existing"
    address: str = "auto"
    """host:port of the head's control store (`ray start --head --port`); auto takes RAY_ADDRESS (which a
    submitted job has), or else the one on this machine."""
    auth: Authentication = "token"

    def __post_init__(self) -> None:
        super().__post_init__()
        require(
            self.address == "auto" or re.fullmatch(r"[^/]+:\d+", self.address) is not None,
            f"cluster.address={self.address} must be auto or the host:port of a head; "
            "from outside the cluster, submit a job (make submit)",
        )


@dataclass(frozen=True, kw_only=True)
class KubeRayClusterConfig(WorkConfig):
    """A Ray that KubeRay makes for one job and removes; `stages.render` writes its manifest."""

    minimal: ClassVar[tuple[str, ...]] = (
        "cluster.image=registry/image",
        "cluster.volume_claim=shared",
    )

    kind: Literal["kuberay"] = "kuberay"
    auth: Authentication = "token"
    """token needs KubeRay 1.5.1, which makes and mounts it."""
    usage_statistics: bool = False
    """Whether Ray reports its own use to its makers."""

    name: str = "permafrost"
    """Of the RayJob."""
    namespace: str = "default"
    image: str = ""
    """Holds Ray and this project's packages; the code lies in its working directory, or see working_dir."""
    image_pull_policy: Literal["IfNotPresent", "Always", "Never"] = "IfNotPresent"
    working_dir: str | None = None
    """Address of a zip with the code (file:// on the volume, https://, s3://, ...); null: in the image."""
    service_account: str | None = None
    """Of the pods; null takes the namespace's own."""
    ray_version: str | None = None
    """Of the image; null takes the one that is installed where the manifest is rendered."""

    volume_claim: str = ""
    """A persistent volume claim that many nodes may write to; data, store and runs lie on it."""
    mount_path: str = "/mnt/permafrost"
    """Where every pod has it."""

    workers: Annotated[int, Ge(1)] = 1
    min_workers: int | None = None
    max_workers: int | None = None
    """null takes `workers`; Ray scales where the two differ."""
    worker_cpus: Annotated[int, Ge(1)] = 4
    worker_gpus: Annotated[int, Ge(0)] = 0
    worker_memory: str = "8Gi"
    head_cpus: Annotated[int, Ge(1)] = 2
    """For Ray's own services and the driver; shards are worked on by the workers alone."""
    head_memory: str = "8Gi"

    ttl_seconds_after_finished: Annotated[int, Ge(0)] = 600
    """How long the pods stay, for a look at their logs."""
    active_deadline_seconds: Annotated[int | None, Ge(1)] = None
    """null: no limit."""
    backoff_limit: Annotated[int, Ge(0)] = 2
    """New clusters after a failed one; the same command goes on where the last one stopped."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.image != "", "cluster.image is empty; give an image with Ray and the packages")
        require(
            self.volume_claim != "",
            "cluster.volume_claim is empty; give a persistent volume claim that all nodes can write to",
        )
        require(
            self.mount_path.startswith("/") and self.mount_path != "/",
            f"cluster.mount_path must be an absolute folder, got {self.mount_path!r}",
        )
        require(
            re.fullmatch("[a-z]([-a-z0-9]{0,45}[a-z0-9])?", self.name) is not None,
            "cluster.name must be lower-case letters, digits and hyphens, at most 47 and a letter first, "
            f"got {self.name!r}",
        )
        require(
            self.working_dir is None or "://" in self.working_dir,
            f"cluster.working_dir must be an address as in file:///mnt/permafrost/code.zip, got {self.working_dir!r}",
        )
        self._check_sizes()

    def _check_sizes(self) -> None:
        low, high = self.scale
        require(
            0 <= low <= self.workers <= high,
            "cluster needs 0 <= min_workers <= workers <= max_workers, "
            f"got {low}, {self.workers}, {high}",
        )
        for name in ("worker_memory", "head_memory"):
            value = getattr(self, name)
            require(
                re.fullmatch(r"[1-9][0-9]*([KMGTPE]i?)?", value) is not None,
                f"cluster.{name} must be an amount as in 8Gi, got {value!r}",
            )

    @property
    def scale(self) -> tuple[int, int]:
        """The fewest and the most workers."""
        low = self.workers if self.min_workers is None else self.min_workers
        return low, self.workers if self.max_workers is None else self.max_workers


ClusterConfig = LocalClusterConfig | ExistingClusterConfig | KubeRayClusterConfig
Executor = Literal["ray", "serial"]

CLUSTERS: dict[str, type[WorkConfig]] = {
    cls.kind: cls for cls in (LocalClusterConfig, ExistingClusterConfig, KubeRayClusterConfig)
}
