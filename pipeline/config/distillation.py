"""What `stages.distill` reads, and which of its options go together."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Annotated

from pipeline.config.augment import AugmentOptions
from pipeline.config.cluster import (
    ClusterConfig,
    LocalClusterConfig,
)
from pipeline.config.explainers import ExplainerConfig, GradCamConfig
from pipeline.config.methods import MethodConfig, MethodSetting, Mode, SoftTargetsConfig
from pipeline.config.models import ModelConfig, NoModelConfig
from pipeline.config.options import Options, Role
from pipeline.config.store import StoreOptions, SubsetOptions
from pipeline.config.training import (
    OptimizerOptions,
    TrainerOptions,
    check_mixup_partners,
)
from pipeline.config.views import (
    AnyViewsConfig,
    CanonicalViewsConfig,
)
from pipeline.core.errors import require


@dataclass(frozen=True, kw_only=True)
class DistillConfig(Options):
    """Sections that `stages.distill` reads: a store, never data; a teacher with mode=live only."""

    store: StoreOptions
    student: ModelConfig
    method: MethodConfig
    augment: AugmentOptions
    optimizer: OptimizerOptions
    trainer: TrainerOptions
    subset: SubsetOptions
    mode: Mode = "frozen"
    """frozen: a fresh view, the whole frame's targets and its map moved along; replay: one of the stored
    views with that view's own targets; live: the teacher looks at every view, in every step."""
    views: AnyViewsConfig = field(default_factory=CanonicalViewsConfig)
    """Read with mode=replay: `per_step`, and `count` where the store holds several passes of stored views."""
    teacher: ModelConfig | NoModelConfig = field(default_factory=NoModelConfig)
    """Read with mode=live."""
    explainer: ExplainerConfig = field(default_factory=GradCamConfig)
    """Read with mode=live; frozen maps say themselves what they are."""
    cluster: Annotated[ClusterConfig, Role.OUTSIDE_IDENTITY] = field(
        default_factory=LocalClusterConfig
    )
    """Where ranks run."""
    split: str = "train"
    seed: int = 0
    run: str = "untitled"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.mode != "replay":
            object.__setattr__(self, "views", CanonicalViewsConfig())
        require(
            self.mode != "replay" or self.method.needs_teacher,
            "mode=replay shows the views that a teacher has seen, and method=labels listens to none; drop one of them",
        )
        per_step = self.views.per_step
        require(
            self.trainer.batch_size % (self.trainer.ranks * per_step) == 0,
            f"trainer.batch_size={self.trainer.batch_size} is not a multiple of views.per_step={per_step} "
            f"for each of {self.trainer.ranks} ranks",
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
            # An experiment names both teachers, for all verbs; the one that is not read makes no difference.
            object.__setattr__(self, "teacher", NoModelConfig())
            object.__setattr__(self, "explainer", GradCamConfig())
        else:
            object.__setattr__(self, "store", replace(self.store, teacher=()))
            self._check_live()
        self._check_pixels()
        require(
            self.student.frame == "full",
            "student.frame=center_crop is an option of teachers; a student's views are augment.operations",
        )
        require(
            self.student.weights != "random",
            "student.weights=random would start every seed alike; leave it null for a start that seed= decides",
        )

    def _check_pixels(self) -> None:
        if self.mode != "live" and self.method.needs_teacher:
            self.augment.refuse_pixel_options(
                f"a stored target is of one image as its view's matrix shows it, and mode={self.mode} knows of no "
                "other; set mode=live with teacher= and teacher.weights="
            )
        check_mixup_partners(self.augment, self.trainer)

    def _check_live(self) -> None:
        require(
            self.method.needs_teacher,
            "mode=live asks a teacher in every step, and method=labels listens to none; drop one of them",
        )
        require(
            self.teacher.kind != "none",
            "mode=live needs the teacher itself: name it with teacher= and teacher.weights=, as for precompute",
        )
        if self.teacher.kind != "none":
            require(
                self.teacher.frame == "full",
                f"teacher.frame={self.teacher.frame} is for precompute; a live teacher sees the student's view",
            )
        if isinstance(self.method, SoftTargetsConfig):
            require(
                not self.method.teacher_weights,
                "method.teacher_weights weighs the passes of a store; mode=live has one teacher",
            )
        if self.augment.mixup_alpha is not None:
            self._check_live_mixup()

    def _check_live_mixup(self) -> None:
        chosen = self.explainer.explained_classes
        off = f"or augment.mixup_alpha=null in place of {self.augment.mixup_alpha}"
        require(
            chosen in ("top1", "topk"),
            f"explainer.explained_classes={chosen} reads a record's labels, and a mixture shows two records; set "
            f"explainer.explained_classes=top1, {off}",
        )
