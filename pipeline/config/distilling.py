"""What `stages.distill` reads, and which of its options go together."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Literal

from pipeline.config.augment import AugmentConfig
from pipeline.config.cluster import (
    ClusterConfig,
    LocalClusterConfig,
)
from pipeline.config.feature_methods import (
    ATConfig,
    CatKDConfig,
    CRDConfig,
    FTConfig,
    ReviewKDConfig,
    SSKDConfig,
)
from pipeline.config.methods import (
    E2KDConfig,
    KDConfig,
    KEDConfig,
    LabelsConfig,
)
from pipeline.config.models import (
    AdditiveModelConfig,
    ExplainerConfig,
    GradCamConfig,
    ModelConfig,
    NoModelConfig,
)
from pipeline.config.store import StoreConfig, SubsetConfig
from pipeline.config.training import (
    OptimizerConfig,
    TrainerConfig,
    check_mixup_partners,
)
from pipeline.config.views import (
    NUM_ROTATIONS,
    AnyViewsConfig,
    CanonicalViewsConfig,
    RotationsViewsConfig,
)
from pipeline.core.errors import require

MethodConfig = (
    LabelsConfig
    | KDConfig
    | E2KDConfig
    | ATConfig
    | CatKDConfig
    | ReviewKDConfig
    | FTConfig
    | CRDConfig
    | SSKDConfig
    | KEDConfig
)


@dataclass(frozen=True, kw_only=True)
class DistillConfig:
    """Sections that `stages.distill` reads: a store, never data; a teacher with mode=live only."""

    store: StoreConfig
    student: ModelConfig
    method: MethodConfig
    augment: AugmentConfig
    optimizer: OptimizerConfig
    trainer: TrainerConfig
    subset: SubsetConfig
    mode: Literal["frozen", "replay", "live"] = "frozen"
    """frozen: a fresh view, the whole frame's targets and its map moved along; replay: one of the stored
    views with that view's own targets; live: the teacher looks at every view, in every step."""
    views: AnyViewsConfig = field(default_factory=CanonicalViewsConfig)
    """Read with mode=replay: `per_step`, and `count` where the store holds several passes of stored views."""
    teacher: ModelConfig | NoModelConfig = field(default_factory=NoModelConfig)
    """Read with mode=live."""
    explainer: ExplainerConfig = field(default_factory=GradCamConfig)
    """Read with mode=live; frozen maps say themselves what they are."""
    cluster: ClusterConfig = field(default_factory=LocalClusterConfig)
    """Where ranks run."""
    split: str = "train"
    seed: int = 0
    run: str = "untitled"

    def __post_init__(self) -> None:
        if self.mode != "replay":
            object.__setattr__(self, "views", CanonicalViewsConfig())
        require(
            self.mode != "replay" or self.method.kind != "labels",
            "mode=replay shows the views that a teacher has seen, and method=labels listens to none; drop one of them",
        )
        per_step = self.views.per_step
        require(
            self.trainer.batch_size % (self.trainer.ranks * per_step) == 0,
            f"trainer.batch_size={self.trainer.batch_size} is not a multiple of views.per_step={per_step} "
            f"for each of {self.trainer.ranks} ranks",
        )
        if self.mode != "frozen" and self.method.kind == "e2kd":
            require(
                self.method.map_control != "unaugmented",
                "method.map_control=unaugmented leaves a canonical map behind while the view moves; "
                f"mode={self.mode} has none (mode=frozen does)",
            )
        if isinstance(self.method, ReviewKDConfig) and self.method.lambda_review > 0:
            self._check_whole_features()
            self._check_batch_norms()
        if isinstance(self.method, FTConfig) and self.method.lambda_ft > 0:
            self._check_whole_features()
        if isinstance(self.method, SSKDConfig):
            self._check_rotations()
        if isinstance(self.method, CRDConfig) and self.method.lambda_crd > 0:
            self._check_crd()
        if isinstance(self.method, KEDConfig):
            self._check_ked(self.method)
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
        if self.mode != "live" and self.method.kind != "labels":
            self.augment.refuse_pixel_options(
                f"a stored target is of one image as its view's matrix shows it, and mode={self.mode} knows of no "
                "other; set mode=live with teacher= and teacher.weights="
            )
        check_mixup_partners(self.augment, self.trainer)

    def _check_whole_features(self) -> None:
        require(
            self.mode == "live",
            f"method={self.method.kind} compares whole feature maps, which no store holds, so mode={self.mode} has "
            "none: set mode=live with teacher= and teacher.weights=, or choose method=at or method=cat_kd",
        )

    def _check_batch_norms(self) -> None:
        require(
            self.trainer.batch_size > self.trainer.ranks,
            f"trainer.batch_size={self.trainer.batch_size} leaves each of {self.trainer.ranks} ranks one record, of "
            "which the batch norms of method=review_kd know no variance; raise it",
        )

    def _check_rotations(self) -> None:
        require(
            self.mode == "replay"
            and isinstance(self.views, RotationsViewsConfig)
            and self.views.per_step == NUM_ROTATIONS,
            "method=sskd compares an image with its three turns in one step, which mode=replay views=rotations "
            f"views.per_step={NUM_ROTATIONS} shows; here mode={self.mode}, views={self.views.kind}, "
            f"views.per_step={self.views.per_step}",
        )
        require(
            self.trainer.batch_size > NUM_ROTATIONS * self.trainer.ranks,
            f"trainer.batch_size={self.trainer.batch_size} leaves each of {self.trainer.ranks} ranks one record, and "
            "method=sskd tells records apart; raise it",
        )

    def _check_crd(self) -> None:
        require(
            self.views.per_step == 1,
            f"method=crd keeps one embedding of each record, and views.per_step={self.views.per_step} shows it several "
            "times in a step; set views.per_step=1",
        )
        require(
            self.augment.mixup_alpha is None,
            "method=crd keeps an embedding of each record, and a mixture shows two: set augment.mixup_alpha=null in "
            f"place of {self.augment.mixup_alpha}",
        )

    def _check_ked(self, method: KEDConfig) -> None:
        if method.needs_explanations:
            require(
                self.mode != "frozen" or not self.augment.operations or method.allow_view_mismatch,
                "augment.operations move the image, and the explanations of method=ked cannot move along: set "
                "augment=none, replay stored views (mode=replay) or ask the teacher itself (mode=live), or accept an "
                "approximation with method.allow_view_mismatch=true",
            )
            require(
                isinstance(self.student, AdditiveModelConfig),
                f"method=ked compares superfeatures, of which student={self.student.kind} has none: set "
                "student=additive, or method.mu=0 method.chimera_fraction=0 for KD",
            )
        require(
            method.rho == 0 or method.lambda_ked * method.mu == 0 or self.mode == "live",
            f"method.rho={method.rho} compares hidden layers, which no store holds, so mode={self.mode} has none: set "
            "mode=live with teacher= and teacher.weights=, or method.rho=0",
        )
        mixed = self.augment.mixup_alpha is not None
        require(
            not mixed or (method.chimera_fraction == 0 and method.superfeature_control == "none"),
            "method.chimera_fraction and method.superfeature_control take whole records, and augment.mixup_alpha="
            f"{self.augment.mixup_alpha} mixes them; set augment.mixup_alpha=null, or those to 0 and none",
        )
        require(
            method.chimera_fraction == 0
            or (isinstance(self.student, AdditiveModelConfig) and self.student.is_input_mode),
            f"method.chimera_fraction={method.chimera_fraction} puts superfeatures of several images into one, which "
            "is exact for parts of the input alone: set student.name=conv or mlp, or method.chimera_fraction=0",
        )

    def _check_live(self) -> None:
        require(
            self.method.kind != "labels",
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
        if self.method.kind != "labels":
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
        require(
            self.method.kind != "e2kd" or self.method.map_control != "shuffled",
            "method.map_control=shuffled gives each record the map of its neighbour, which shows the same image in "
            f"part where the two are mixed; set method.map_control=none, {off}",
        )
