"""Execution of the work: Ray cluster and executor (`cluster=`, `executor=`)."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

from annotated_types import Ge, Gt

from permafrost.config.options import Options
from permafrost.core.errors import require

Authentication = Literal["disabled", "token"]
"""Authentication of Ray. Ray itself reads the token from RAY_AUTH_TOKEN or the file RAY_AUTH_TOKEN_PATH. The
environment variable RAY_AUTH_MODE takes precedence."""


@dataclass(frozen=True, kw_only=True)
class WorkConfig(Options):
    """Resources of the work on every kind of cluster."""

    section: ClassVar[str] = "cluster"

    actors: Annotated[int, Ge(1)] = 1
    """Teacher replicas; each processes whole shards."""
    cpus_per_actor: Annotated[float, Gt(0)] = 1.0
    """CPUs per teacher replica."""
    gpus_per_actor: Annotated[float | None, Ge(0)] = None
    """GPUs per teacher replica, possibly a fraction; null divides the cluster's GPUs among them, at most one
    each."""
    threads_per_actor: Annotated[int, Ge(1)] = 1
    """Torch threads per teacher replica. Their number can change the last bits, so the serial executor uses it
    too."""
    decode_threads: Annotated[int, Ge(1)] = 1
    """Decoding threads per teacher replica, in addition to torch's; they decode the next batches during the
    forward pass."""
    cpus_per_rank: Annotated[float, Gt(0)] = 1.0
    """CPUs per training process (trainer.ranks)."""
    gpus_per_rank: Annotated[float | None, Ge(0)] = None
    """GPUs per training process (trainer.ranks); null takes one whole GPU if the cluster has any."""
    cpus_per_student: Annotated[float, Gt(0)] = 1.0
    """CPUs per student of a sweep."""
    gpus_per_student: Annotated[float | None, Ge(0)] = None
    """GPUs per student of a sweep, possibly a fraction; null takes one whole GPU if the cluster has any."""
    max_restarts: Annotated[int, Ge(0)] = 3
    """Times that a shard, the ranks of a training or a student are started again after a process died."""
    max_wait_seconds: Annotated[float, Gt(0)] = 3600.0
    """Seconds for which ranks (trainer.ranks) may wait, in all, for hosts with room for all of them."""


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


@dataclass(frozen=True, kw_only=True)
class KubeRayClusterConfig(WorkConfig):
    """A Ray cluster that KubeRay creates for one job and then removes; `render` writes its manifest."""

    minimal: ClassVar[tuple[str, ...]] = (
        "cluster.image=registry/image",
        "cluster.volume_claim=shared",
    )

    kind: Literal["kuberay"] = "kuberay"
    auth: Authentication = "token"
    """Authentication of Ray; token needs KubeRay 1.5.1, which creates and mounts the token."""
    usage_statistics: bool = False
    """Report Ray's usage statistics to its developers."""

    name: str = "permafrost"
    """Name of the RayJob."""
    namespace: str = "default"
    """Kubernetes namespace of the RayJob."""
    image: str = ""
    """Container image with Ray and this project's packages. The code is in its working directory, or see
    working_dir."""
    image_pull_policy: Literal["IfNotPresent", "Always", "Never"] = "IfNotPresent"
    """Kubernetes pull policy of the image."""
    working_dir: str | None = None
    """Address of a zip of the code (file:// on the volume, https://, s3://, ...); null takes the code in the
    image."""
    service_account: str | None = None
    """Service account of the pods; null takes the namespace's default."""
    ray_version: str | None = None
    """Ray version in the image; null takes the version installed where the manifest is rendered."""

    volume_claim: str | None = None
    """Persistent volume claim that many nodes may write to, for data, store and runs; null if these are in a
    bucket."""
    mount_path: str = "/mnt/permafrost"
    """Mount path of the volume in every pod."""
    secret: str | None = None
    """Kubernetes secret whose entries are environment variables of the pods, such as AWS_ACCESS_KEY_ID,
    AWS_SECRET_ACCESS_KEY and AWS_ENDPOINT_URL of a bucket; null for none, as where the service account has a role."""

    workers: Annotated[int, Ge(1)] = 1
    """Number of workers at the start."""
    min_workers: int | None = None
    """Minimum number of workers; null takes `workers`."""
    max_workers: int | None = None
    """Maximum number of workers; null takes `workers`. Ray scales if minimum and maximum differ."""
    worker_cpus: Annotated[int, Ge(1)] = 4
    """CPUs per worker."""
    worker_gpus: Annotated[int, Ge(0)] = 0
    """GPUs per worker."""
    worker_memory: str = "8Gi"
    """Memory per worker."""
    head_cpus: Annotated[int, Ge(1)] = 2
    """CPUs of the head, for Ray's services and the driver; only workers process shards."""
    head_memory: str = "8Gi"
    """Memory of the head."""

    ttl_seconds_after_finished: Annotated[int, Ge(0)] = 600
    """Seconds for which finished pods are kept, so that their logs can be read."""
    active_deadline_seconds: Annotated[int | None, Ge(1)] = None
    """Time limit of the job in seconds; null sets none."""
    backoff_limit: Annotated[int, Ge(0)] = 2
    """Number of new clusters after a failed one; the same command resumes where the last one stopped."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(
            self.image != "", "cluster.image is empty; set it to an image with Ray and the packages"
        )
        require(
            self.volume_claim != "",
            "cluster.volume_claim is empty; name a persistent volume claim that all nodes can write to, or leave it "
            "out and set store.path and run to addresses of a bucket",
        )
        require(
            self.mount_path.startswith("/") and self.mount_path != "/",
            f"cluster.mount_path must be an absolute folder, got {self.mount_path!r}",
        )
        require(
            re.fullmatch("[a-z]([-a-z0-9]{0,45}[a-z0-9])?", self.name) is not None,
            "cluster.name must be at most 47 lower-case letters, digits and hyphens, starting with a letter, "
            f"got {self.name!r}",
        )
        require(
            self.working_dir is None or "://" in self.working_dir,
            f"cluster.working_dir must be an address such as file:///mnt/permafrost/code.zip, got {self.working_dir!r}",
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
                f"cluster.{name} must be an amount such as 8Gi, got {value!r}",
            )

    @property
    def shared_folder(self) -> str:
        """Folder that all pods share, "" for none."""
        return "" if self.volume_claim is None else self.mount_path

    @property
    def scale(self) -> tuple[int, int]:
        """Minimum and maximum number of workers."""
        low = self.workers if self.min_workers is None else self.min_workers
        return low, self.workers if self.max_workers is None else self.max_workers


ClusterConfig = LocalClusterConfig | ExistingClusterConfig | KubeRayClusterConfig
ExecutorName = Literal["auto", "ray", "serial"]
SMALL_STORE = 10_000
"""Number of records up to which executor=auto does not start Ray for a pass, as Ray takes 10 to 60 s to start."""

CLUSTERS: dict[str, type[WorkConfig]] = {
    cls.kind: cls for cls in (LocalClusterConfig, ExistingClusterConfig, KubeRayClusterConfig)
}
