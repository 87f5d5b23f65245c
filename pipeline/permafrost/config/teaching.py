"""Training of a teacher (`teaching=`)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, ClassVar, Literal

from annotated_types import Ge, Gt, Lt

from permafrost.config.augment import AugmentOptions
from permafrost.config.methods import LabelLoss, check_label_loss
from permafrost.config.options import Options, Role
from permafrost.config.plugins import Family
from permafrost.config.training import OptimizerOptions, TrainerOptions, check_mixup_partners
from permafrost.core.errors import require


@dataclass(frozen=True, kw_only=True)
class LabelTeachingConfig(Options):
    """Training of a teacher on labels, with its own optimizer, trainer and augmentation."""

    section: ClassVar[str] = "teaching"

    implementation: ClassVar[str] = "permafrost.losses.labels:LabelsLoss"

    kind: Literal["labels"] = "labels"
    loss: LabelLoss = "ce"
    """Loss on the labels, as for method=labels."""
    label_smoothing: Annotated[float, Ge(0), Lt(1)] = 0.0
    """Label smoothing of loss=ce."""
    start: Annotated[str | None, Role.FILE] = None
    """File of initial weights, or `pretrained`; null starts at random, or from teacher.weights=pretrained. The
    last layer is reinitialized if its classes differ."""
    split: str = "train"
    """Split of the store to train on."""
    optimizer: OptimizerOptions = field(default_factory=OptimizerOptions)
    trainer: TrainerOptions = field(default_factory=TrainerOptions)
    augment: AugmentOptions = field(default_factory=AugmentOptions)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_label_loss(self.loss, self.label_smoothing)
        check_mixup_partners(self.augment, self.trainer)


@dataclass(frozen=True, kw_only=True)
class GuidedTeachingConfig(LabelTeachingConfig):
    """Training on labels and on explanations that cover the object (Rao et al. 2023): guided teachers."""

    implementation: ClassVar[str] = "permafrost.losses.guided:GuidedLoss"

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

    def __post_init__(self) -> None:
        super().__post_init__()
        self.augment.refuse_replacing_options(
            "teaching=guided guides explanations onto regions, which are warped by the view's matrix only; "
            "set teaching=labels",
            "teaching.augment",
        )


@dataclass(frozen=True, kw_only=True)
class KEDTeachingConfig(LabelTeachingConfig):
    """Training of a teacher that explains by superfeatures, which are first found in a black box (KED, Algorithm 1).

    The black box is the section `black_box=`. If teacher.partition names superfeatures, these are used instead.
    """

    implementation: ClassVar[str] = "permafrost.losses.ked_teacher:ExplainingTeacherLoss"
    minimal: ClassVar[tuple[str, ...]] = ("teacher=additive", "black_box=cifar")

    kind: Literal["ked"] = "ked"  # type: ignore[assignment]
    levels: Annotated[int, Ge(1)] = 16
    """Number M of superfeatures at the finest level that is found (at most the number of features). The levels
    with at most teacher.superfeatures groups do not depend on it."""
    records: Annotated[int, Ge(1)] = 1024
    """Number of records of teaching.split, equally many per class, on which dependency is measured."""
    max_records: int = 8192
    """Limit up to which `records` is doubled until two halves of them agree (Spearman's correlation >= 0.9)."""
    derivative: Literal["fd", "hvp", "ablate"] = "fd"
    """Second derivative of the logits. fd: central differences of gradients, for every activation. hvp: exact,
    for smooth networks. ablate: differences of logits, without a gradient."""
    step: Annotated[float, Gt(0)] = 1.0
    """Step of fd and ablate, in standard deviations of a feature over the records."""
    draws: Annotated[int, Ge(1)] = 1
    """Draws per record of random signs over the classes."""
    neighbors: Annotated[int | None, Ge(1)] = None
    """Strongest edges kept per feature before grouping; null is max(4, features / 8)."""
    resolution: Annotated[float, Gt(0)] = 1.0
    """Initial resolution of Louvain's algorithm; increased if it finds fewer than teacher.superfeatures groups."""
    grouping_seed: Annotated[int, Ge(0)] = 0
    """Seed of the choice of records, of the signs and of Louvain's algorithm."""
    lambda_kd: Annotated[float, Ge(0)] = 0.0
    """Weight of soft targets of the black box in addition to the labels; above 0 it is run in every step."""
    tau: Annotated[float, Gt(0)] = 4.0
    """Temperature of these soft targets."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(
            self.max_records >= self.records,
            f"teaching.max_records={self.max_records} is below teaching.records={self.records}; raise it",
        )
        require(
            self.loss == "ce" or self.lambda_kd == 0,
            f"teaching.lambda_kd={self.lambda_kd} needs one label per record, and teaching.loss={self.loss} "
            "does not assume one; set one of them to its default",
        )


TeachingConfig = LabelTeachingConfig | GuidedTeachingConfig | KEDTeachingConfig

TEACHINGS: Family[type[LabelTeachingConfig]] = Family(
    {cls.kind: cls for cls in (LabelTeachingConfig, GuidedTeachingConfig, KEDTeachingConfig)}
)
