"""Training of a teacher (`teaching=`)."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, ClassVar, Literal

from annotated_types import Ge, Le

from permafrost.config.augment import AugmentOptions
from permafrost.config.cluster import ClusterConfig, LocalClusterConfig, SharedExecutorName
from permafrost.config.evaluation import EvaluateOptions
from permafrost.config.methods import LabelLossOptions
from permafrost.config.models import ModelConfig, NoModelConfig, whole_frame
from permafrost.config.options import Command, Options, Role
from permafrost.config.plugins import Family
from permafrost.config.store import StoreOptions
from permafrost.config.training import Logger, OptimizerOptions, TrainerOptions, check_pairs
from permafrost.core.errors import require


@dataclass(frozen=True, kw_only=True)
class LabelTeachingConfig(LabelLossOptions):
    """Training of a teacher on labels, with its own optimizer, trainer and augmentation."""

    section: ClassVar[str] = "teaching"

    implementation: ClassVar[str] = "permafrost.losses.labels:LabelsLoss"
    preparation: ClassVar[str] = ""
    """`module:name` of a function (config of teach, folder of the run, ranks) that writes files which the training
    reads."""
    target_source: ClassVar[str] = ""
    """`module:name` of a function (teaching, number of classes, input size) -> function (batch, request) -> targets of
    the step, for a loss that reads more than labels."""
    after_epoch: ClassVar[str] = ""
    """`module:name` of a function (config of teach, folder of the run, store, decode threads) -> function (network,
    number of epochs done), which is called before their checkpoint, or None."""
    reads_regions: ClassVar[bool] = False
    """True if its targets are of the boxes and masks of images."""

    kind: Literal["labels"] = "labels"
    start: Annotated[str | None, Role.FILE] = None
    """File of initial weights, or `pretrained`; null starts at random, or from teacher.weights=pretrained. The
    last layer is reinitialized if its classes differ."""
    split: str = "train"
    """Split of the store to train on."""
    folds: Annotated[int, Ge(0), Le(255), Role.IF_SET] = 0
    """Number of teachers, each trained without one fold of the split, for a pass of teacher=folds: no record gets
    targets from a network that has seen it. Each fold has an equal share of each class, and whole groups of data.group
    if there are 10 groups or more for each. 0 trains one teacher on all records."""
    fold: Annotated[int | None, Ge(0), Role.IF_SET] = None
    """Fold, from 0, whose teacher alone is trained; null trains those of all folds and joins them."""
    optimizer: OptimizerOptions = field(default_factory=OptimizerOptions)
    trainer: TrainerOptions = field(default_factory=TrainerOptions)
    augment: AugmentOptions = field(default_factory=AugmentOptions)

    def _check_together(self) -> None:
        super()._check_together()
        check_pairs(self.augment, self.trainer)

    def check(self, teacher: ModelConfig, black_box: ModelConfig | NoModelConfig) -> None:
        """Check that the teaching fits the network to train, and has the black box that it needs.

        Raises:
            ConfigError: If it does not.
        """

    def needs_preparation(self, teacher: ModelConfig) -> bool:
        """Return whether `preparation` has to run before the network is trained."""
        return False

    @property
    def runs_black_box(self) -> bool:
        """True if the network is also trained on the logits of the black box, which runs in every step."""
        return False

    def uses_black_box(self, teacher: ModelConfig) -> bool:
        """Return whether the black box is read."""
        return self.needs_preparation(teacher) or self.runs_black_box

    def prepared(self, teacher: ModelConfig, folder: Path) -> ModelConfig:
        """Return the options of the network to train, with the files that `preparation` has written into the run."""
        return teacher


TEACHINGS: Family[type[LabelTeachingConfig]] = Family({"labels": LabelTeachingConfig})
"""Kinds of training of a teacher (`teaching=`) by name."""


@dataclass(frozen=True, kw_only=True)
class TeachConfig(Options):
    """Sections that `teach` reads; `teacher` is the network to train on a store's labels."""

    store: StoreOptions
    teacher: ModelConfig
    teaching: LabelTeachingConfig
    evaluate: EvaluateOptions
    black_box: ModelConfig | NoModelConfig = field(default_factory=NoModelConfig)
    """Trained network that some kinds of teaching read."""
    cluster: Annotated[ClusterConfig, Role.OUTSIDE_IDENTITY] = field(
        default_factory=LocalClusterConfig
    )
    """Cluster that the training processes run on."""
    executor: Annotated[SharedExecutorName, Role.OUTSIDE_IDENTITY] = "auto"
    """Executor of the folds of teaching.folds, as in sweep."""
    seed: int = 0
    """Seed of the training, as in distill."""
    run: str = ""
    """Folder below runs/ for the results; an absolute path is taken as it is (required on a cluster)."""
    logger: Logger = "tensorboard"
    """Tracker that gets the curves of metrics.jsonl and the results of the evaluation: TensorBoard, Weights & Biases
    (wandb), MLflow or Trackio. It writes into the run's folder or where its environment variables say; all but
    TensorBoard need their package, as in pip install wandb."""
    command: Command = ()
    """Command that trained the teacher."""

    def _check_together(self) -> None:
        object.__setattr__(self, "teacher", whole_frame(self.teacher))
        object.__setattr__(self, "black_box", whole_frame(self.black_box))
        self.teaching.check(self.teacher, self.black_box)
        folds, fold = self.teaching.folds, self.teaching.fold
        require(
            folds != 1 and (fold is None or fold < folds),
            f"teaching.folds={folds}, teaching.fold={'null' if fold is None else fold}: set folds to 0 or to 2 or "
            "more, and fold to null or to a number below folds",
        )
        require(
            folds == 0
            or (self.teacher.kind != "memory" and not self.teaching.uses_black_box(self.teacher)),
            f"teaching.folds={folds} trains networks of files or functions on labels, not teacher={self.teacher.kind} "
            f"with teaching={self.teaching.kind}; set teaching.folds=0",
        )
