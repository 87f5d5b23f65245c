"""Specification of a training."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from permafrost.config.augment import AugmentOptions
from permafrost.config.explainers import ExplainerConfig, GradCamConfig
from permafrost.config.models import ModelConfig, Picture
from permafrost.config.training import OptimizerOptions, TrainerOptions
from permafrost.core.batches import Batch
from permafrost.loading.dataset import StoreDataset
from permafrost.loading.random_views import trained_picture
from permafrost.losses.base import DistillationLoss
from permafrost.models.classifier import Classifier
from permafrost.models.explanations import DEFAULT_EXPLAINER
from permafrost.models.trained_weights import DataClasses
from permafrost.training.epoch_selection import EpochSelection
from permafrost.training.targets import TargetSource


@dataclass(frozen=True, kw_only=True)
class TrainingSpec:
    """Complete specification of a training."""

    dataset: StoreDataset
    model: ModelConfig
    num_classes: int
    loss: DistillationLoss
    augment: AugmentOptions
    optimizer: OptimizerOptions
    trainer: TrainerOptions
    seed: int
    explainer: str = DEFAULT_EXPLAINER
    sums_teachers: bool = False
    """True to add the losses of the teachers, which have weights of their own, in place of their mean."""
    replays: bool = False
    """True to train on the views stored in the dataset's passes, which ignores `augment.operations`."""
    views_per_step: int = 1
    """Number of views of one record in a step: stored ones, or those that `expand_views` makes."""
    expand_views: Callable[[Batch], Batch] | None = None
    """Function that expands each new view into `views_per_step` views; None keeps the single view."""
    target_source: Callable[[int, tuple[int, int]], TargetSource] | None = None
    """Function of the number of classes and the input size that makes the source of targets which take the place of a
    teacher's. The network is then explained by its attributions."""
    curve: Callable[[Classifier, int], Mapping[str, float]] | None = None
    """Function like `after_epoch` that returns numbers for metrics.jsonl."""
    after_epoch: Callable[[Classifier, int], bool | None] | None = None
    """Callback of the first rank with the network and the number of epochs done, before their checkpoint."""
    epoch_selection: EpochSelection | None = None
    """Callback like `after_epoch` that selects the epoch whose weights are kept; None keeps the last epoch."""
    live_teacher: ModelConfig | None = None
    """Teacher that runs in every step, None to read the targets of the dataset's passes."""
    live_explainer: ExplainerConfig = field(default_factory=GradCamConfig)
    """Explainer options of the live teacher, which select the target classes."""

    warning: str = ""
    """Warning about the options, which the first rank logs before the training."""

    @property
    def class_names(self) -> tuple[str, ...]:
        """Class names of the network's outputs, empty if they are not the classes of the data."""
        names = self.dataset.store.manifest.classes
        return names if (self.model.classes or self.num_classes) == len(names) else ()

    @property
    def data_classes(self) -> DataClasses:
        """Class names of the network's outputs, or their number if they are not the classes of the data."""
        return self.class_names or self.num_classes

    @property
    def picture(self) -> Picture | None:
        """Picture that the student receives outside of its views."""
        views = self.dataset.passes[0].views if self.replays else None
        return trained_picture(self.dataset.store, self.augment, views)

    @property
    def input_size(self) -> tuple[int, int]:
        """(height, width) of the student's view."""
        size = self.augment.size
        return self.dataset.store.size if size is None else (size, size)
