"""One call of a training, in this process or on several ranks, and its progress."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from permafrost.config.cluster import ClusterConfig
from permafrost.runs.folder import read_cost
from permafrost.training.job import TrainingJob


@dataclass(kw_only=True)
class TrainingProgress:
    """Progress of one call of a training."""

    epochs: int = 0
    """Number of epochs trained by this call."""
    last_line: str = ""
    """Line of progress of the last epoch."""

    def rate(self, folder: Path) -> str:
        """Records per second over all calls of the run, empty if this call did nothing."""
        cost = read_cost(folder) if self.epochs else None
        return f"{cost['records'] / cost['seconds']:,.0f}" if cost and cost["seconds"] else ""


def run_training(
    job: TrainingJob, cluster: ClusterConfig, on_epoch: Callable[[int, str], None]
) -> TrainingProgress:
    """Finish a training in this process, or on `trainer.ranks` of Ray Train.

    Args:
        job: The training.
        cluster: Where ranks run.
        on_epoch: Receives the number of each epoch and its line of progress.

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
