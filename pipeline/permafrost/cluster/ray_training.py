"""Training on several ranks with Ray Train: the training loop of a single process, on each rank's slice.

Ray Train starts the ranks, connects them and restarts them when one dies. The state of a run is in checkpoint.pt,
written by the first rank in the same way as by a single process. A run may therefore resume with another number of
ranks, or without Ray. Ray Train's own checkpoints and reports are not used.
"""

from __future__ import annotations

import logging
import os
import shutil
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, Self
from uuid import uuid4

from permafrost.cluster.placement import Request, Wait, gpus_each
from permafrost.cluster.ray_metrics import TrainingMetrics
from permafrost.cluster.session import (
    last_line,
    open_queue,
    put_item,
    ray_session,
    take_items,
    variables_set,
)
from permafrost.config.cluster import ClusterConfig
from permafrost.config.training import TrainerOptions
from permafrost.core.errors import UserError, first_line, require
from permafrost.runs.mirrors import RunFiles

if TYPE_CHECKING:
    from ray.util.queue import Queue

    from permafrost.core.distributed import DistributedContext


_STATE_FOLDER = ".ray_train"
"""Name of Ray Train's temporary folder in the run's folder."""
_DEVICES_OF_RAY = ("auto", "cuda")
"""Values of trainer.device with which each rank has the device that Ray gives it."""
_POLL_SECONDS = 0.5
_STARTED = -1
"""Number in place of an epoch's that a rank sends when it begins."""
_INTERFACE = "GLOO_SOCKET_IFNAME"
_START_TIMEOUT = "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S"

logger = logging.getLogger("permafrost.ray")


class RanksError(UserError, RuntimeError):
    """Error for a training that its ranks could not finish. Its last checkpoint is kept."""


class RankedJob(Protocol):
    """Picklable training that a process finishes alone, or with other ranks."""

    @property
    def folder(self) -> Path:
        """Folder of the training in that of its run."""

    @property
    def run_name(self) -> str:
        """Name of the run, or its address in a bucket."""

    @property
    def cluster(self) -> ClusterConfig:
        """Cluster on which ranks run."""

    @property
    def trainer(self) -> TrainerOptions:
        """Trainer options, such as the number of ranks."""

    @property
    def records(self) -> int:
        """Number of records that an epoch reads."""

    def moved_to(self, folder: Path) -> Self:
        """Return the same job with the run's folder on another machine."""

    def spec(self) -> object:
        """Check the options against the store.

        Raises:
            ConfigError: If they do not fit.
        """

    def train(
        self, on_epoch: Callable[[int, str], None], distributed: DistributedContext | None = None
    ) -> None:
        """Train to the last epoch, starting from the folder's checkpoint if there is one.

        Args:
            on_epoch: Receives the number and a summary line of each finished epoch.
            distributed: Position of this process among the ranks; None for a single process.
        """


@dataclass(frozen=True)
class _RankLoop:
    """Training loop of each rank."""

    job: RankedJob
    epochs: Queue
    """Progress of the first rank."""
    failure: Queue
    """The first failure of any rank; later ones are not kept."""

    def __call__(self) -> None:
        import ray.train
        import ray.train.torch

        from permafrost.core.distributed import DistributedContext

        if self.failure.full():
            raise RanksError("a rank failed")  # a restart would fail in the same way
        put_item(self.epochs, (_STARTED, ""))
        context = ray.train.get_context()
        distributed = DistributedContext(
            context.get_world_rank(),
            context.get_world_size(),
            ray.train.torch.get_device() if self.job.trainer.device in _DEVICES_OF_RAY else None,
            context.get_local_world_size(),
            TrainingMetrics(
                self.job.run_name,
                context.get_world_size(),
                min(
                    self.job.trainer.batch_size, self.job.records
                ),  # a small selection is one batch
            ),
        )

        def on_epoch(epoch: int, line: str) -> None:
            put_item(self.epochs, (epoch, line))

        try:
            _at_home(self.job).train(on_epoch, distributed)
        except UserError as error:
            put_item(self.failure, str(error))
            raise


def _at_home(job: RankedJob) -> RankedJob:
    """Return a job whose folder is that of its node, with the last checkpoint, if its run is in a bucket."""
    files, verb = RunFiles(job.run_name), job.folder.name
    files.fetch(verb, exactly=True)
    return job.moved_to(files.folder / verb) if files.is_mirrored else job


def train_on_ranks(job: RankedJob, on_epoch: Callable[[int, str], None]) -> None:
    """Finish the job on its `trainer.ranks`.

    Args:
        job: The training.
        on_epoch: Receives the number and a summary line of each finished epoch, on the driver.

    Raises:
        ClusterError: If Ray cannot be started or joined.
        ConfigError: If the options do not fit the store.
        RanksError: If the ranks cannot finish the job.
    """
    job.spec()  # rejects options that do not fit the store before any rank is started
    ranks, cluster = job.trainer.ranks, job.cluster
    # Ray Train tries to start the ranks this many times, each of which waits for room.
    timeout = {_START_TIMEOUT: str(cluster.max_wait_seconds / (cluster.max_restarts + 1))}
    with variables_set(timeout), ray_session(cluster, ranks * cluster.cpus_per_rank):
        import ray
        import ray.train

        epochs, failure = open_queue(), open_queue(maxsize=1)
        request = _request(job, cluster)
        request.await_node()
        wait = Wait(request, ranks, cluster.max_wait_seconds)
        watcher = _Watcher(epochs, on_epoch, wait)
        try:
            _trainer(_RankLoop(job, epochs, failure), cluster, request).fit()
        except (ray.train.TrainingFailedError, ray.exceptions.RayError) as error:
            (reason,) = take_items(failure) or [_reason(error, cluster, wait)]
            raise RanksError(reason) from error
        finally:
            watcher.stop()
            RunFiles(job.run_name).fetch(job.folder.name, exactly=True)
            shutil.rmtree(job.folder / _STATE_FOLDER, ignore_errors=True)


def _request(job: RankedJob, cluster: ClusterConfig) -> Request:
    """Return what each rank needs."""
    device, option = job.trainer.device, cluster.gpus_per_rank
    if device == "cuda":
        require(
            option != 0, "trainer.device=cuda, but cluster.gpus_per_rank=0; set it to null or to 1"
        )
        option = 1.0
    gpus = gpus_each(option) if device in _DEVICES_OF_RAY else 0.0
    return Request("rank", cluster.cpus_per_rank, gpus, cluster.rank)


def _trainer(loop: _RankLoop, cluster: ClusterConfig, request: Request) -> Any:
    import ray.train
    import ray.train.torch

    return ray.train.torch.TorchTrainer(
        loop,
        torch_config=_process_group("nccl" if request.gpus else "gloo"),
        scaling_config=ray.train.ScalingConfig(
            num_workers=loop.job.trainer.ranks,
            use_gpu=request.gpus > 0,
            resources_per_worker=request.resources,
            accelerator_type=request.node.accelerator_type,
            label_selector=request.node.label_selector or None,
        ),
        run_config=ray.train.RunConfig(
            # A new name each time keeps Ray from restoring, because the state is in checkpoint.pt.
            name=uuid4().hex,
            storage_path=str(loop.job.folder.absolute() / _STATE_FOLDER),
            failure_config=ray.train.FailureConfig(
                max_failures=cluster.max_restarts, controller_failure_limit=cluster.max_restarts
            ),
        ),
    )


def _process_group(backend: str) -> Any:
    """Options of the process group, whose ranks use the interface of the node's address in Ray."""
    from ray.train.torch import TorchConfig

    class Backend(TorchConfig().backend_cls):  # type: ignore[misc]
        def on_start(self, worker_group: Any, backend_config: Any) -> None:
            worker_group.execute(_choose_interface)
            super().on_start(worker_group, backend_config)

    class Config(TorchConfig):  # type: ignore[misc]
        backend_cls = Backend

    return Config(backend=backend)


def _choose_interface() -> None:
    """Have Gloo use the interface of this node's address in Ray, unless the environment names one.

    Gloo would take the address of the host's own name, which other hosts do not reach where it is 127.0.1.1.
    """
    import ray

    if interface := interface_of(ray.util.get_node_ip_address()):
        os.environ.setdefault(_INTERFACE, interface)


def interface_of(address: str) -> str:
    """Return the name of this machine's network interface that has the address, or "" if none has it."""
    import psutil  # type: ignore[import-untyped]  # comes with Ray

    return next(
        (
            str(name)
            for name, addresses in psutil.net_if_addrs().items()
            if any(known_address.address == address for known_address in addresses)
        ),
        "",
    )


def _reason(error: Exception, cluster: ClusterConfig, wait: Wait) -> str:
    """Say in a line why the ranks did not finish."""
    from ray.exceptions import RayError
    from ray.train.v2._internal.exceptions import WorkerGroupStartupTimeoutError

    advice = "run the same command again to resume from the last checkpoint"
    if isinstance(getattr(error, "controller_failure", None), WorkerGroupStartupTimeoutError):
        return (
            f"{wait.describe_end()}; add hosts or lower cluster.cpus_per_rank or trainer.ranks, and "
            f"{advice}"
        )
    if isinstance(error, RayError):  # such as its controller, where the memory ran out
        return f"Ray ended the training ({first_line(error).rstrip('.')}); {advice}"
    return (
        f"ranks died more than cluster.max_restarts={cluster.max_restarts} times, the last time with: "
        f"{last_line(error)}; {advice}"
    )


class _Watcher:
    """Thread that reports the ranks' progress to the driver while `fit` blocks the main thread."""

    def __init__(self, epochs: Queue, on_epoch: Callable[[int, str], None], wait: Wait) -> None:
        self.epochs, self.on_epoch, self.wait = epochs, on_epoch, wait
        self.started = 0
        """Number of ranks that have begun since there was room for all of them."""
        self.finished = threading.Event()
        self.thread = threading.Thread(target=self._watch, daemon=True)
        self.thread.start()

    def _watch(self) -> None:
        while not self.finished.wait(_POLL_SECONDS):
            self._report()
            if self._lacks_room():
                self.started = 0
            self.wait.note(self.started)

    def _lacks_room(self) -> bool:
        """Return whether one of Ray's groups of such ranks waits for room."""
        import ray.util

        needs = self.wait.request.resources.items()
        return any(
            group["state"] == "PENDING"
            and len(group["bundles"]) == self.wait.count
            and all(needs <= bundle.items() for bundle in group["bundles"].values())
            for group in ray.util.placement_group_table().values()
        )

    def _report(self) -> None:
        for epoch, line in take_items(self.epochs):
            if epoch == _STARTED:
                self.started = min(self.started + 1, self.wait.count)
            else:
                self.on_epoch(epoch, line)

    def stop(self) -> None:
        """Stop the thread and report the remaining progress."""
        self.finished.set()
        self.thread.join()
        self._report()
