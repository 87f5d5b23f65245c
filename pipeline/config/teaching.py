"""How a teacher is trained (`teaching=`)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, ClassVar, Literal

from annotated_types import Ge, Gt, Lt

from pipeline.config.augment import AugmentOptions
from pipeline.config.methods import LabelLoss, check_label_loss
from pipeline.config.options import Options, Role
from pipeline.config.training import OptimizerOptions, TrainerOptions, check_mixup_partners
from pipeline.core.errors import require


@dataclass(frozen=True, kw_only=True)
class LabelTeachingConfig(Options):
    """Train a teacher on labels, with its own optimizer, trainer and views."""

    section: ClassVar[str] = "teaching"

    implementation: ClassVar[str] = "pipeline.losses.labels:LabelsLoss"

    kind: Literal["labels"] = "labels"
    loss: LabelLoss = "ce"
    """As of method=labels."""
    label_smoothing: Annotated[float, Ge(0), Lt(1)] = 0.0
    start: Annotated[str | None, Role.FILE] = None
    """File of weights to start from, whose last layer is drawn anew where its classes are others, or `pretrained`;
    null starts at random, or from teacher.weights=pretrained."""
    split: str = "train"
    optimizer: OptimizerOptions = field(default_factory=OptimizerOptions)
    trainer: TrainerOptions = field(default_factory=TrainerOptions)
    augment: AugmentOptions = field(default_factory=AugmentOptions)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_label_loss(self.loss, self.label_smoothing)
        check_mixup_partners(self.augment, self.trainer)


@dataclass(frozen=True, kw_only=True)
class GuidedTeachingConfig(LabelTeachingConfig):
    """Labels, and explanations that lie on the object (Rao et al. 2023): the papers' guided teachers."""

    implementation: ClassVar[str] = "pipeline.losses.guided:GuidedLoss"

    kind: Literal["guided"] = "guided"  # type: ignore[assignment]
    localization: Literal["energy", "l1", "rrr", "ppce"] = "energy"
    """Of the attributions to one class of each record: their share inside, distance from the region, squares
    outside, or cross-entropy inside."""
    lambda_localization: Annotated[float, Ge(0)] = 1e-3
    """Of their sum over the batch."""
    region: Literal["boxes", "masks"] = "boxes"
    pareto_split: str | None = None
    """Evaluate every epoch on this split and keep all that are best in F1 (accuracy), EPG and IoU, in pareto/
    of the run; null keeps the last epoch only."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.augment.refuse_pixel_options(
            "teaching=guided pulls explanations onto regions, which are moved by the view's matrix alone; "
            "set teaching=labels",
            "teaching.augment",
        )


@dataclass(frozen=True, kw_only=True)
class KEDTeachingConfig(LabelTeachingConfig):
    """A teacher that explains by superfeatures (KED, Algorithm 1): find them in a black box, then train on them.

    The black box is the section `black_box=`; where teacher.partition names superfeatures they are taken instead.
    """

    implementation: ClassVar[str] = "pipeline.losses.ked_teacher:ExplainingTeacherLoss"
    minimal: ClassVar[tuple[str, ...]] = ("teacher=additive", "black_box=cifar")

    kind: Literal["ked"] = "ked"  # type: ignore[assignment]
    levels: Annotated[int, Ge(1)] = 16
    """M of the finest level that is found (no more than there are features). The groups at teacher.superfeatures and
    above do not depend on it."""
    records: Annotated[int, Ge(1)] = 1024
    """Of teaching.split, the same number of each class, on which dependency is measured."""
    max_records: int = 8192
    """`records` are doubled up to here, until two halves of them agree (Spearman's correlation >= 0.9)."""
    derivative: Literal["fd", "hvp", "ablate"] = "fd"
    """Of logits: central differences of gradients, for every activation; hvp: exact, for smooth networks; ablate:
    differences of logits, without a gradient."""
    step: Annotated[float, Gt(0)] = 1.0
    """Of fd and ablate, in standard deviations of a feature over the records."""
    draws: Annotated[int, Ge(1)] = 1
    """Of random signs over classes a record."""
    neighbors: Annotated[int | None, Ge(1)] = None
    """Strongest edges kept of each feature before grouping; null is max(4, features / 8)."""
    resolution: Annotated[float, Gt(0)] = 1.0
    """Of Louvain's algorithm, to start with; raised where it finds fewer than teacher.superfeatures groups."""
    grouping_seed: Annotated[int, Ge(0)] = 0
    """Of the choice of records, of signs and of Louvain's algorithm."""
    lambda_kd: Annotated[float, Ge(0)] = 0.0
    """Of soft targets of the black box beside the labels: it is then asked in every step."""
    tau: Annotated[float, Gt(0)] = 4.0
    """Their temperature."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(
            self.max_records >= self.records,
            f"teaching.max_records={self.max_records} is below teaching.records={self.records}; raise it",
        )
        require(
            self.loss == "ce" or self.lambda_kd == 0,
            f"teaching.lambda_kd={self.lambda_kd} has the classes compete for one label, teaching.loss={self.loss} "
            "does not; set one of them to its default",
        )


TeachingConfig = LabelTeachingConfig | GuidedTeachingConfig | KEDTeachingConfig

TEACHINGS: dict[str, type[LabelTeachingConfig]] = {
    cls.kind: cls for cls in (LabelTeachingConfig, GuidedTeachingConfig, KEDTeachingConfig)
}
