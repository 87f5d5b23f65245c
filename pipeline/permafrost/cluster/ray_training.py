"""Training on several ranks with Ray Train: the training loop of a single process, on each rank's slice.

Ray Train starts the ranks, connects them and restarts them when one dies. The state of a run is in checkpoint.pt,
written by the first rank in the same way as by a single process. A run may therefore resume with another number of
ranks, or without Ray. Ray Train's own checkpoints and reports are not used.
"""

from __future__ import annotations

import shutil
import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from uuid import uuid4

from permafrost.cluster.session import gpus_each, ray_session
from permafrost.config.runs import run_folder
from permafrost.core.addresses import is_address
from permafrost.core.errors import UserError
from permafrost.core.run_mirrors import fetch_folder

if TYPE_CHECKING:
    from collections.abc import Callable

    from permafrost.config.cluster import ClusterConfig
    from permafrost.training.spec import TrainingJob


_STATE_FOLDER = ".ray_train"
"""Name of Ray Train's temporary folder in the run's folder."""
_POLL_SECONDS = 0.5


class RanksError(UserError, RuntimeError):
    """Error for a training that its ranks could not finish. Its last checkpoint is kept."""


class _ProgressActor:
    """Actor that stores the first rank's progress and the first failure of any rank."""

    def __init__(self) -> None:
        self.epochs: list[tuple[int, str]] = []
        self.failure = ""

    def add_epoch(self, epoch: int, line: str) -> None:
        self.epochs.append((epoch, line))

    def take_epochs(self) -> list[tuple[int, str]]:
        taken, self.epochs = self.epochs, []
        return taken

    def record_failure(self, message: str) -> None:
        self.failure = self.failure or message

    def get_failure(self) -> str:
        return self.failure


@dataclass(frozen=True)
class _RankLoop:
    """Training loop of each rank."""

    job: TrainingJob
    news: Any

    def __call__(self) -> None:
        import ray
        import ray.train
        import ray.train.torch

        from permafrost.core.distributed import DistributedContext
        from permafrost.training.loop import run_job

        if failure := ray.get(self.news.get_failure.remote()):
            raise RanksError(failure)  # a restart would fail in the same way
        context = ray.train.get_context()
        distributed = DistributedContext(
            context.get_world_rank(),
            context.get_world_size(),
            ray.train.torch.get_device() if self.job.trainer.device == "auto" else None,
            context.get_local_world_size(),
        )

        def on_epoch(epoch: int, line: str) -> None:
            ray.get(self.news.add_epoch.remote(epoch, line))

        try:
            run_job(_at_home(self.job), on_epoch, distributed)
        except UserError as error:
            ray.get(self.news.record_failure.remote(str(error)))
            raise


def _at_home(job: TrainingJob) -> TrainingJob:
    """Return a job whose folder is that of its node, with the last checkpoint, if its run is in a bucket."""
    if not is_address(job.run):
        return job
    verb = job.folder.name
    fetch_folder(f"{job.run}/{verb}", exactly=True)
    return job.moved_to(run_folder(job.run) / verb)


def train_on_ranks(
    job: TrainingJob, cluster: ClusterConfig, on_epoch: Callable[[int, str], None]
) -> None:
    """Finish the job on its `trainer.ranks`. Raises RanksError if they cannot finish it."""
    job.plan()  # rejects options that do not fit the store before any rank is started
    ranks = job.trainer.ranks
    with ray_session(cluster, ranks * cluster.cpus_per_rank):
        import ray

        news = ray.remote(num_cpus=0)(_ProgressActor).remote()
        watcher = _Watcher(news, on_epoch)
        try:
            _trainer(job, cluster, news).fit()
        except ray.train.TrainingFailedError as error:
            failure = ray.get(news.get_failure.remote())
            raise RanksError(
                failure
                or f"ranks died more than cluster.max_restarts={cluster.max_restarts} times, the last time with: "
                f"{_last_line(error)}; run the same command again to resume from the last checkpoint"
            ) from error
        finally:
            watcher.stop()
            if is_address(job.run):
                fetch_folder(f"{job.run}/{job.folder.name}", exactly=True)
            shutil.rmtree(job.folder / _STATE_FOLDER, ignore_errors=True)


def _trainer(job: TrainingJob, cluster: ClusterConfig, news: Any) -> Any:
    import ray.train
    import ray.train.torch

    gpus = gpus_each(cluster.gpus_per_rank) if job.trainer.device == "auto" else 0.0
    resources = {"CPU": cluster.cpus_per_rank} | ({"GPU": gpus} if gpus else {})
    return ray.train.torch.TorchTrainer(
        _RankLoop(job, news),
        torch_config=ray.train.torch.TorchConfig(backend="nccl" if gpus else "gloo"),
        scaling_config=ray.train.ScalingConfig(
            num_workers=job.trainer.ranks, use_gpu=gpus > 0, resources_per_worker=resources
        ),
        run_config=ray.train.RunConfig(
            # A new name each time keeps Ray from restoring, because the state is in checkpoint.pt.
            name=uuid4().hex,
            storage_path=str(job.folder / _STATE_FOLDER),
            failure_config=ray.train.FailureConfig(max_failures=cluster.max_restarts),
        ),
    )


def _last_line(error: BaseException) -> str:
    return str(error).strip().splitlines()[-1]


class _Watcher:
    """Thread that reports the ranks' progress to the driver while `fit` blocks the main thread."""

    def __init__(self, news: Any, on_epoch: Callable[[int, str], None]) -> None:
        self.news = news
        self.on_epoch = on_epoch
        self.finished = threading.Event()
        self.thread = threading.Thread(target=self._watch, daemon=True)
        self.thread.start()

    def _watch(self) -> None:
        while not self.finished.wait(_POLL_SECONDS):
            self._poll()

    def _poll(self) -> None:
        import ray

        for epoch, line in ray.get(self.news.take_epochs.remote()):
            self.on_epoch(epoch, line)

    def stop(self) -> None:
        """Stop the thread and report the remaining progress."""
        self.finished.set()
        self.thread.join()
        self._poll()
