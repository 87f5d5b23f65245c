"""A training as a job, which any process can run: of a student (distill.py) or of a teacher (teach_job.py).

It runs in this process or on several ranks.
"""

from __future__ import annotations

import logging
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Self

from permafrost.config.cluster import ClusterConfig
from permafrost.config.distillation import DistillConfig
from permafrost.config.teaching import TeachConfig
from permafrost.config.training import TrainerOptions
from permafrost.runs.folder import read_cost, save_cost
from permafrost.runs.mirrors import upload_mirror
from permafrost.runs.trackers import TrackedRun

if TYPE_CHECKING:
    from permafrost.core.distributed import DistributedContext
    from permafrost.models.saved import TrainedModel
    from permafrost.store.reader import Store, TeacherPass
    from permafrost.training.spec import TrainingSpec

logger = logging.getLogger("permafrost.training")


class OpenedInputs(NamedTuple):
    """The store and the passes of a training, as one process has opened them."""

    store: Store
    passes: Sequence[TeacherPass] = ()


@dataclass(frozen=True, kw_only=True)
class TrainingJob(ABC):
    """A training that a stage requests. It is picklable."""

    config: DistillConfig | TeachConfig
    folder: Path
    """Absolute path of the run's folder, for the checkpoint and the network."""
    opened: OpenedInputs | None = field(default=None, compare=False, repr=False)
    """Inputs that this process has opened, None to open them when they are needed."""

    def __getstate__(self) -> dict[str, Any]:
        # Another process opens the inputs itself.
        return self.__dict__ | {"opened": None}

    @property
    def run(self) -> str:
        """Name of the run, or its address in a bucket."""
        return self.config.run

    @property
    @abstractmethod
    def trainer(self) -> TrainerOptions:
        """Trainer options, such as epochs and number of ranks."""

    def moved_to(self, folder: Path) -> Self:
        """Return the same job with the run's folder on another machine."""
        return replace(self, folder=folder)

    def prepare(self, distributed: DistributedContext) -> None:  # noqa: B027, most jobs need none
        """Create the files that the training reads in addition to the store, on all ranks, unless they exist."""

    @abstractmethod
    def spec(self, distributed: DistributedContext | None = None) -> TrainingSpec:
        """Build the specification of the training.

        Args:
            distributed: Ranks that share the cores of this machine, None if this process trains alone.

        Raises:
            ConfigError: If the options do not fit the store.
            StoreMismatchError: If a pass does not have what the method reads.
        """

    @abstractmethod
    def describe(self, spec: TrainingSpec) -> TrainedModel:
        """Return the content of model.json for the result."""

    def train(
        self,
        on_epoch: Callable[[int, str], None],
        distributed: DistributedContext | None = None,
    ) -> None:
        """Train to the last epoch, starting from the folder's checkpoint if there is one, and export the network.

        Args:
            on_epoch: Function that the first rank calls after each epoch with its number and a line of progress.
            distributed: Ranks that train together, None if this process trains alone.
        """
        from permafrost.core.distributed import DistributedContext  # imports torch
        from permafrost.models.saved import save_model
        from permafrost.training.loop import train_to_end

        distributed = distributed or DistributedContext()
        self.prepare(distributed)
        spec = self.spec(distributed)
        if spec.doubt and distributed.is_first:
            logger.warning("%s", spec.doubt)
        at_once = spec.trainer.batch_size // spec.views_per_step
        records = len(spec.dataset) // at_once * spec.trainer.batch_size
        started = time.monotonic()

        def count_cost(epoch: int, line: str) -> None:
            nonlocal started
            now = time.monotonic()
            save_cost(self.folder, now - started, records)
            started = now
            on_epoch(epoch, line)

        read_cost(self.folder)  # a damaged file is an error before the training, not after an epoch
        tracked = TrackedRun(self.config.logger, self.run, self.folder)
        training = train_to_end(spec, tracked, count_cost, distributed)
        if distributed.is_first:
            trained = replace(
                self.describe(spec),
                steps=training.global_step,
                precision=training.compute_settings.precision_name,
            )
            save_model(self.folder, training.model, trained)
            upload_mirror(self.folder)  # this process may be on another machine than the command


# ---- one call of it ------------------------------------------------------------------------------


@dataclass(kw_only=True)
class TrainingProgress:
    """Progress of one call of a training."""

    epochs: int = 0
    """Number of epochs trained by this call."""
    last_line: str = ""
    """Line of progress of the last epoch."""

    def rate(self, folder: Path) -> str:
        """Return the records per second over all calls of the run, empty if this call did nothing."""
        cost = read_cost(folder) if self.epochs else None
        return f"{cost['records'] / cost['seconds']:,.0f}" if cost and cost["seconds"] else ""


def run_training(
    job: TrainingJob, cluster: ClusterConfig, on_epoch: Callable[[int, str], None]
) -> TrainingProgress:
    """Finish a training in this process, or on `trainer.ranks` of Ray Train.

    Args:
        job: The training.
        cluster: Cluster on which ranks run.
        on_epoch: Function that receives the number of each epoch and its line of progress.

    Returns:
        The progress of this call.
    """
    progress = TrainingProgress()

    def count(epoch: int, line: str) -> None:
        progress.epochs += 1
        progress.last_line = line
        on_epoch(epoch, line)

    if job.trainer.ranks == 1:
        job.train(count)
    else:
        from permafrost.cluster.ray_training import train_on_ranks

        train_on_ranks(job, cluster, count)
    return progress
