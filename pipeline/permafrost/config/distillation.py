"""Config of `distill`, and the combinations of its options that are allowed."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Annotated, ClassVar

from annotated_types import Ge

from permafrost.config.augment import (
    VIEWS,
    AugmentOptions,
    CanonicalViewsConfig,
    ViewsConfig,
)
from permafrost.config.cluster import (
    ClusterConfig,
    LocalClusterConfig,
)
from permafrost.config.evaluation import Frame
from permafrost.config.explainers import ExplainerConfig, GradCamConfig
from permafrost.config.methods import (
    MethodConfig,
    MethodSetting,
    Mode,
    SeveralConfig,
)
from permafrost.config.models import ModelConfig, NoModelConfig, whole_frame
from permafrost.config.options import Command, Options, Role
from permafrost.config.store import StoreOptions, SubsetOptions
from permafrost.config.training import (
    Logger,
    OptimizerOptions,
    TrainerOptions,
    check_pairs,
)
from permafrost.core.errors import require


def check_epoch_selection(select: str | None, trained_split: str, subset: SubsetOptions) -> None:
    """Check that select_epoch names a split that is not trained on.

    Args:
        select: The option, <split>.<metric>; None selects nothing.
        trained_split: Split that is trained on.
        subset: Options of the subset, of which `holdout` must hold out records to select on them.

    Raises:
        ConfigError: If the split cannot be used.
    """
    if select is None:
        return
    split, _, metric = select.partition(".")
    require(
        bool(split and metric),
        f"select_epoch must be <split>.<metric>, as in holdout.accuracy; got {select}",
    )
    require(
        split != trained_split,
        f"select_epoch={select}: students are trained on {split}; hold out records with subset.holdout=10 and set "
        "select_epoch=holdout.accuracy",
    )
    require(
        split != "holdout" or subset.holdout > 0,
        f"select_epoch={select}, but subset.holdout=0 holds out no records; set it to a number per class, as in "
        "subset.holdout=10",
    )


@dataclass(frozen=True, kw_only=True)
class CurveOptions(Options):
    """Evaluations during the training, for curves over the epochs. They change nothing in the student."""

    section: ClassVar[str] = "curve"

    splits: tuple[str, ...] = ()
    """Splits of the store on which accuracy and agreement are computed; empty computes none."""
    terms: bool = False
    """Compute every term of the loss on these splits, too, on whole frames with the stored targets."""
    top_k: tuple[int, ...] = ()
    """Numbers k for which top-k accuracy is computed, too."""
    every_epochs: Annotated[int, Ge(1)] = 1
    """Epochs between two of them; the last epoch is always one."""
    maps: Annotated[int, Ge(0)] = 0
    """Number of records of the training split, the first ones of the store, that are drawn with the teacher's map and
    the student's, for `logger` and as maps/epoch-<n>.png in the folder of the training; 0 draws none."""
    maps_every: Annotated[int, Ge(1)] = 10
    """Epochs between two of these pictures; the last epoch always has one."""

    def _check_together(self) -> None:
        measured = {"curve.terms=true": self.terms, f"curve.top_k={list(self.top_k)}": self.top_k}
        for option in filter(measured.get, measured):
            require(
                bool(self.splits),
                f"{option} is computed on curve.splits, which is empty; name one, as in curve.splits=[val]",
            )


@dataclass(frozen=True, kw_only=True)
class DistillConfig(Options):
    """Sections that `distill` reads: a store and no data, and a teacher only with mode=live."""

    store: StoreOptions
    student: ModelConfig
    method: MethodConfig
    augment: AugmentOptions
    optimizer: OptimizerOptions
    trainer: TrainerOptions
    subset: SubsetOptions
    mode: Mode = "frozen"
    """Origin of the teacher's targets. frozen: stored targets of the whole frame on a new random view, with the
    map warped to that view. replay: stored views with their own targets. live: the teacher's forward pass on
    every view, in every step."""
    views: ViewsConfig = field(default_factory=CanonicalViewsConfig)
    """Stored views, read with mode=replay: `per_step`, and `count` if the store holds several passes of stored
    views."""
    teacher: ModelConfig | NoModelConfig = field(default_factory=NoModelConfig)
    """Network of the teacher, read with mode=live."""
    explainer: ExplainerConfig = field(default_factory=GradCamConfig)
    """Explainer of the teacher, read with mode=live; a stored pass records its own explainer."""
    cluster: Annotated[ClusterConfig, Role.OUTSIDE_IDENTITY] = field(
        default_factory=LocalClusterConfig
    )
    """Cluster that the training processes run on."""
    split: str = "train"
    """Split of the store to train on."""
    select_epoch: str | None = None
    """Metric <split>.<metric>, computed after every epoch, that selects the epoch whose weights are kept, as in
    holdout.accuracy; null keeps the last epoch. The split is `holdout` (subset.holdout) or another of the store. EPG
    and IoU are those of the defaults of evaluate."""
    select_frame: Frame = "auto"
    """Part of an image on which select_epoch is computed, as evaluate.frame."""
    curve: Annotated[CurveOptions, Role.OUTSIDE_IDENTITY] = field(default_factory=CurveOptions)
    """Evaluations during the training."""
    seed: int = 0
    """Seed of the training: initial weights, order of the records and augmentation."""
    run: str = ""
    """Folder below runs/ for the results; an absolute path is taken as it is (required on a cluster)."""
    logger: Logger = "tensorboard"
    """Tracker that gets the curves of metrics.jsonl and the results of the evaluation: TensorBoard, Weights & Biases
    (wandb), MLflow or Trackio. It writes into the run's folder or where its environment variables say; all but
    TensorBoard need their package, as in pip install wandb."""
    command: Command = ()
    """Command that trained the student; of a student of a sweep, the sweep's."""

    def _check_together(self) -> None:
        if self.mode != "replay":
            kind = self.method.live_views if self.mode == "live" else ""
            views = VIEWS[kind]() if kind else CanonicalViewsConfig()
            object.__setattr__(self, "views", replace(views, per_step=views.count))
        require(
            self.mode != "replay" or self.method.needs_teacher,
            "mode=replay reads stored views of a teacher pass, and method=labels uses no teacher; drop one of them",
        )
        per_step = self.views.per_step
        require(
            self.trainer.batch_size % (self.trainer.ranks * per_step) == 0,
            f"trainer.batch_size={self.trainer.batch_size} is not a multiple of views.per_step={per_step} "
            f"for each of {self.trainer.ranks} ranks",
        )
        check_epoch_selection(self.select_epoch, self.split, self.subset)
        require(
            self.select_epoch is not None or self.select_frame == "auto",
            f"select_frame={self.select_frame} is an option of select_epoch, which is null; leave it at auto",
        )
        self.method.check(
            MethodSetting(
                mode=self.mode,
                views=self.views,
                augment=self.augment,
                trainer=self.trainer,
                student=self.student,
            )
        )
        if self.mode != "live":
            # An experiment may set these sections for all verbs; unread, they must not change the run's identity.
            object.__setattr__(self, "teacher", NoModelConfig())
            object.__setattr__(self, "explainer", GradCamConfig())
        else:
            if self.select_epoch is None:  # which may compare the student with a pass
                object.__setattr__(self, "store", replace(self.store, teacher=()))
            self._check_live()
        if self.augment.mixes:
            self._check_mix()
        if isinstance(self.method, SeveralConfig):
            require(
                self.store.teacher in ((), self.method.pass_names),
                f"store.teacher={list(self.store.teacher)}: method=several reads the passes that its terms name "
                f"({', '.join(self.method.pass_names)}); leave store.teacher empty",
            )
        object.__setattr__(self, "student", whole_frame(self.student))
        require(
            self.student.frame == "full",
            "student.frame=center_crop is an option of teachers; a student's views are augment.operations",
        )
        require(
            self.student.weights != "random",
            "student.weights=random would give every seed the same initial weights; leave it null, so that seed= "
            "decides",
        )

    def _check_mix(self) -> None:
        check_pairs(self.augment, self.trainer, self.views.per_step)
        self.method.check_mix_rule(self.mode)
        if self.mode == "live":
            chosen = self.explainer.target_classes
            require(
                chosen in ("top1", "topk"),
                f"explainer.target_classes={chosen} reads a record's labels, and augment.mix shows two records; set "
                "explainer.target_classes=top1, or augment.mix=[]",
            )

    def _check_live(self) -> None:
        require(
            self.method.needs_teacher,
            "mode=live runs a teacher in every step, and method=labels uses no teacher; drop one of them",
        )
        require(
            self.teacher.kind != "none",
            "mode=live needs the teacher network: name it with teacher= and teacher.weights=, as for precompute",
        )
        object.__setattr__(self, "teacher", whole_frame(self.teacher))
        if self.teacher.kind != "none":
            require(
                self.teacher.frame == "full",
                f"teacher.frame={self.teacher.frame} is for precompute; a live teacher receives the student's view: "
                "set teacher.frame=full",
            )
