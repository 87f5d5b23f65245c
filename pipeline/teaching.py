"""From the options of `teach` to a training: a network on a store's labels."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.config import GuidedTeachingConfig
from pipeline.store.reader import Store

if TYPE_CHECKING:
    from pipeline.config import TeachConfig, TrainerConfig
    from pipeline.models.classifier import Classifier
    from pipeline.pareto import ParetoFront
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
        guided = isinstance(teaching, GuidedTeachingConfig)
        rows = rows_of_split(store.index, teaching.split)
        model = self.config.teacher
        return TrainingPlan(
            dataset=StoreDataset(store, rows, with_regions=guided),
            model=replace(model, weights=teaching.start) if teaching.start else model,
            num_classes=len(store.manifest.classes),
            loss=TEACHINGS[teaching.kind](teaching),
            augment=teaching.augment,
            optimizer=teaching.optimizer,
            trainer=teaching.trainer,
            seed=self.config.seed,
            guided_by=teaching.region if isinstance(teaching, GuidedTeachingConfig) else None,
            after_epoch=self._pareto_front(store),
        )

    def _pareto_front(self, store: Store) -> ParetoFront | None:
        teaching = self.config.teaching
        if not isinstance(teaching, GuidedTeachingConfig) or teaching.pareto_split is None:
            return None
        from pipeline.dataset import StoreDataset
        from pipeline.evaluation.judge import Subject, judge_split
        from pipeline.pareto import ParetoFront
        from pipeline.selection import rows_of_split

        rows = rows_of_split(store.index, teaching.pareto_split)
        dataset = StoreDataset(store, rows, with_regions=True)
        size = store.size if teaching.augment.size is None else (teaching.augment.size,) * 2
        options = replace(self.config.evaluate, region=teaching.region)

        def judge(model: Classifier) -> dict[str, Any]:
            training = model.training
            judged = judge_split(
                Subject(model=model.eval(), input_size=(size[0], size[1])), dataset, options
            )
            model.train(training)
            return judged

        return ParetoFront(self.folder, judge)

    def describe(self, plan: TrainingPlan) -> TrainedModel:
        """What model.json says of the result."""
        from pipeline.runs import TrainedModel

        return TrainedModel(
            config=self.config.teacher, num_classes=plan.num_classes, input_size=plan.input_size
        )
