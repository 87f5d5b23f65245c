"""Options of what only e2KD's tables need, and how they enter the families."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

from annotated_types import Ge

from permafrost.config.methods import (
    METHODS,
    FeatureKDConfig,
    MapControl,
    MethodSetting,
    check_map_control,
)
from permafrost.config.teaching import TEACHINGS, LabelTeachingConfig
from permafrost.core.errors import require


@dataclass(frozen=True, kw_only=True)
class ReviewKDConfig(FeatureKDConfig):
    """ReviewKD (Chen et al. 2021): the teacher's features, predicted from the student's features fused across stages.

    The features are those of a pass with the output features, or of a live teacher.
    """

    implementation: ClassVar[str] = "permafrost_papers.e2kd.review_kd:ReviewKDLoss"
    is_term: ClassVar[bool] = True
    has_mix_rule: ClassVar[bool] = True

    kind: Literal["review_kd"] = "review_kd"
    lambda_review: Annotated[float, Ge(0)] = 1.0
    """Weight of the review term; 0 disables it, and its trainable fusions are not created."""
    stages: tuple[int, ...] = ()
    """Stages to compare besides the average of the last one, counted from 1 at the finest, or from -1 at the deepest;
    empty takes all."""
    map_control: MapControl = "none"
    """Negative control: the features of another record of the batch (shuffled), or those of the canonical view
    without the view's warp (unaugmented; with mode=replay, those of the record's first stored view)."""

    def check(self, setting: MethodSetting) -> None:
        if self.lambda_review > 0:
            check_map_control(self.map_control, setting)
            trainer = setting.trainer
            require(
                trainer.batch_size > trainer.ranks,
                f"trainer.batch_size={trainer.batch_size} leaves each of {trainer.ranks} ranks one record, for "
                "which the batch norms of method=review_kd have no variance; raise it",
            )


@dataclass(frozen=True, kw_only=True)
class GuidedTeachingConfig(LabelTeachingConfig):
    """Training on labels and on explanations that cover the object (Rao et al. 2023): guided teachers."""

    implementation: ClassVar[str] = "permafrost_papers.e2kd.guided:GuidedLoss"
    target_source: ClassVar[str] = "permafrost_papers.e2kd.guided:GuidanceSource"
    after_epoch: ClassVar[str] = "permafrost_papers.e2kd.pareto_front:keep_front"
    reads_regions: ClassVar[bool] = True

    kind: Literal["guided"] = "guided"  # type: ignore[assignment]
    localization: Literal["energy", "l1", "rrr", "ppce"] = "energy"
    """Localization loss on the attributions to one class of each record. energy: 1 - their share inside the
    region. l1: distance from the region. rrr: squares outside. ppce: cross-entropy inside."""
    lambda_localization: Annotated[float, Ge(0)] = 1e-3
    """Weight of that loss, summed over the batch."""
    region: Literal["boxes", "masks"] = "boxes"
    """Region that explanations are guided onto."""
    pareto_split: str | None = None
    """Split to evaluate after every epoch for Pareto-optimal weights; null keeps the last epoch only. All
    weights that are optimal in F1 (accuracy), EPG and IoU are kept in pareto/ of the run."""

    def _check_together(self) -> None:
        super()._check_together()
        self.augment.refuse_mix(
            "teaching=guided guides explanations onto regions of one image; set teaching=labels",
            "teaching.augment",
        )


METHODS["review_kd"] = ReviewKDConfig
TEACHINGS["guided"] = GuidedTeachingConfig
