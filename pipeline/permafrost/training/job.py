"""A training as a job, which any process can run: of a student (distill.py) or of a teacher (teach.py).

It runs in this process or on several ranks.
"""

from __future__ import annotations

import logging
import time
from abc import abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from permafrost.config.cluster import ClusterConfig
from permafrost.config.distillation import DistillConfig
from permafrost.config.paths import with_absolute_paths
from permafrost.config.teaching import TeachConfig
from permafrost.config.training import TrainerOptions
from permafrost.config.verbs import Plan
from permafrost.models.saved import SavedNetwork
from permafrost.runs.folder import CHECKPOINT_NAME, RunFolder, read_cost, save_cost
from permafrost.runs.mirrors import remove_file, upload_mirror
from permafrost.runs.trackers import TrackedRun
from permafrost.store.facts import announce, read_sheets, write_sheets

if TYPE_CHECKING:
    from permafrost.core.distributed import DistributedContext
    from permafrost.models.saved import TrainedModel
    from permafrost.store.reader import Store
    from permafrost.training.spec import TrainingSpec

logger = logging.getLogger("permafrost.training")


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


def fit_batch(
    trainer: TrainerOptions, rows: int, views_per_step: int = 1, *, pairs: bool = False
) -> TrainerOptions:
    """Return the options with batches of at most a selection's records, equally many on each rank.

    Args:
        trainer: Options as they were typed.
        rows: Number of records of the selection.
        views_per_step: Number of views of a record in a batch.
        pairs: True if each rank's records are mixed in pairs.
    """
    each = trainer.ranks * (1 + pairs)
    largest = rows // each * each * views_per_step
    return replace(trainer, batch_size=min(trainer.batch_size, largest or trainer.batch_size))


def records_of_steps(rows: int, trainer: TrainerOptions, views_per_step: int = 1) -> int:
    """Return the number of records that the steps of an epoch over `rows` rows read, once for each view."""
    return rows // (trainer.batch_size // views_per_step) * trainer.batch_size


class TrainingJob(Plan):
    """A training that any process can finish, alone or with others. Another process opens its inputs itself."""

    def __init__(self, options: DistillConfig | TeachConfig, folder: Path, store: Store) -> None:
        """Describe the training.

        Args:
            options: Options of the command, resolved for the store.
            folder: Folder of the training in that of its run, for the checkpoint and the network.
            store: The store.
        """
        self.options = options
        self.folder = folder
        self.store = store

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (with_absolute_paths(self.options), self.folder.absolute())

    @contextmanager
    def open_folder(self) -> Iterator[None]:
        """Keep other processes from writing to the folder in the block, and save the options in it.

        Raises:
            ConfigError: If the folder has results of other options.
            LockedError: If another process writes to it.
        """
        with RunFolder(self.run_name).open(self.folder.name, self.options, self.inputs()):
            yield
            if SavedNetwork(self.folder).is_finished:  # by this process, or one that was killed
                self._remove_checkpoint()

    def _remove_checkpoint(self) -> None:
        """Remove what a finished training needs no more, unless this command or the one that began it keeps it."""
        from permafrost.training.epoch_selection import SELECTED_PREFIX  # imports torch

        options = self.tracked.read_options().items()
        is_kept = any(value for name, value in options if name.endswith("keep_checkpoint"))
        if not is_kept and not self.trainer.keep_checkpoint:
            for pattern in (CHECKPOINT_NAME, f"{SELECTED_PREFIX}*.safetensors"):
                for path in self.folder.glob(pattern):
                    remove_file(path)

    def check_folder(self) -> Self:
        """Return the job.

        Raises:
            ConfigError: If the folder has results of other options.
        """
        RunFolder(self.run_name).check(self.folder.name, self.options, self.inputs())
        return self

    @property
    def run_name(self) -> str:
        """Name of the run, or its address in a bucket."""
        return self.options.run

    @property
    def cluster(self) -> ClusterConfig:
        """Cluster on which ranks run."""
        return self.options.cluster

    @property
    def tracked(self) -> TrackedRun:
        """Run of the tracker."""
        return TrackedRun(self.options.logger, self.run_name, self.folder.absolute())

    @property
    def is_finished(self) -> bool:
        """True if the network was trained; its weights are checked.

        Raises:
            DamagedFileError: If they are not those that the training wrote.
        """
        if not SavedNetwork(self.folder).is_finished:
            return False
        SavedNetwork(self.folder).check()
        return True

    @property
    @abstractmethod
    def records(self) -> int:
        """Number of records that an epoch reads."""

    @property
    @abstractmethod
    def trainer(self) -> TrainerOptions:
        """Trainer options, such as epochs and number of ranks."""

    def describe_folder(self) -> str:
        """Return the folder, and whether it is finished or a checkpoint in it is continued."""
        if SavedNetwork(self.folder).is_finished:
            return f"{self.folder}, finished"
        is_begun = (self.folder / CHECKPOINT_NAME).exists()
        return f"{self.folder}{', from its checkpoint' if is_begun else ''}"

    @abstractmethod
    def inputs(self) -> dict[str, str]:
        """Compute the fingerprints of all inputs in addition to the options, by name."""

    def moved_to(self, folder: Path) -> Self:
        """Return the same job with the run's folder on another machine."""
        return type(self)(self.options, folder, self.store)

    def prepare(self, distributed: DistributedContext) -> None:
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
        *,
        announces: bool = False,
    ) -> None:
        """Train to the last epoch, starting from the folder's checkpoint if there is one, and export the network.

        Args:
            on_epoch: Function that the first rank calls after each epoch with its number and a line of progress.
            distributed: Ranks that train together, None if this process trains alone.
            announces: Log the facts about the training before its first step.
        """
        from permafrost.core.distributed import DistributedContext  # imports torch
        from permafrost.models.saved import save_model
        from permafrost.training.loop import train_to_end
        from permafrost.training.training_sheet import training_sheets

        distributed = distributed or DistributedContext()
        self.prepare(distributed)
        spec = self.spec(distributed)
        if spec.warning and distributed.is_first:
            logger.warning("%s", spec.warning)
        typed, batch_size = self.trainer.batch_size, spec.trainer.batch_size
        if batch_size < typed and distributed.is_first:
            logger.info(
                "the selection has %d records, fewer than trainer.batch_size=%d; a batch has %d",
                *(len(spec.dataset), typed, batch_size),
            )
        records = records_of_steps(len(spec.dataset), spec.trainer, spec.views_per_step)
        if distributed.is_first:
            sheets = training_sheets(self.options, spec, distributed)
            write_sheets(self.folder, sheets)
            if announces:
                announce(sheets.values())
        started = time.monotonic()

        def count_cost(epoch: int, line: str) -> None:
            nonlocal started
            now = time.monotonic()
            save_cost(self.folder, now - started, records)
            started = now
            on_epoch(epoch, line)

        read_cost(self.folder)  # a damaged file is an error before the training, not after an epoch
        training = train_to_end(spec, self.tracked, count_cost, distributed)
        if distributed.is_first:
            trained = replace(
                self.describe(spec),
                steps=training.global_step,
                precision=training.compute_settings.precision_name,
            )
            save_model(self.folder, training.network, trained)
            upload_mirror(self.folder)  # this process may be on another machine than the command
            self._remove_checkpoint()

    def finish(
        self, on_epoch: Callable[[int, str], None], *, announces: bool = False
    ) -> TrainingProgress:
        """Finish the training in this process, or on `trainer.ranks` of Ray Train.

        Args:
            on_epoch: Function that receives the number of each epoch and its line of progress.
            announces: Log the facts about the training, on Ray after its last step.

        Returns:
            The progress of this call.
        """
        progress = TrainingProgress()

        def count(epoch: int, line: str) -> None:
            progress.epochs += 1
            progress.last_line = line
            on_epoch(epoch, line)

        if self.trainer.ranks == 1:
            self.train(count, announces=announces)
        else:
            from permafrost.cluster.ray_training import train_on_ranks

            train_on_ranks(self, count)
            if announces:
                announce(read_sheets(self.folder).values())
        return progress
