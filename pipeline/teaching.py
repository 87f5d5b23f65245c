"""From the options of `teach` to a training: a network on a store's labels."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.store.reader import Store

if TYPE_CHECKING:
    from pipeline.config import TeachConfig, TrainerConfig
    from pipeline.runs import TrainedModel
    from pipeline.training_run import TrainingPlan


@dataclass(frozen=True, kw_only=True)
class Teaching:
    """A TrainingJob: one teacher."""

    config: TeachConfig
    folder: Path

    @property
    def trainer(self) -> TrainerConfig:
        """How long, and by how many ranks."""
        return self.config.teaching.trainer

    def plan(self) -> TrainingPlan:
        """Everything that decides how it goes; ConfigError or StoreMismatchError where options do not fit."""
        from pipeline.dataset import StoreDataset
        from pipeline.losses import TEACHINGS
        from pipeline.selection import rows_of_split
        from pipeline.training_run import TrainingPlan

        teaching = self.config.teaching
        store = Store(Path(self.config.store.path))
        return TrainingPlan(
            dataset=StoreDataset(store, rows_of_split(store.index, teaching.split)),
            model=self.config.teacher,
            num_classes=len(store.manifest.classes),
            loss=TEACHINGS[teaching.kind](teaching),
            augment=teaching.augment,
            optimizer=teaching.optimizer,
            trainer=teaching.trainer,
            seed=self.config.seed,
        )

    def describe(self, plan: TrainingPlan) -> TrainedModel:
        """What model.json says of the result."""
        from pipeline.runs import TrainedModel

        return TrainedModel(
            config=self.config.teacher, num_classes=plan.num_classes, input_size=plan.input_size
        )
