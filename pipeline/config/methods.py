"""What a student is trained on (`method=`)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from pipeline.core.errors import require

LabelLoss = Literal["ce", "bce", "bce_offlabel"]


def check_label_loss(loss: str, label_smoothing: float) -> None:
    """ConfigError where the smoothing is out of range, or none of the loss's."""
    require(0 <= label_smoothing < 1, f"label_smoothing must be in [0, 1), got {label_smoothing}")
    require(
        loss == "ce" or label_smoothing == 0,
        f"label_smoothing={label_smoothing} is an option of loss=ce; loss={loss} asks of each class on its own, "
        "set label_smoothing=0",
    )


@dataclass(frozen=True, kw_only=True)
class LabelsConfig:
    """Labels only: the supervised baseline."""

    kind: Literal["labels"] = "labels"
    loss: LabelLoss = "ce"
    """ce: cross-entropy, of one label a record; bce: each class on its own, as sets with many labels a record
    need it; bce_offlabel: the same with 1 / classes off the labels, how B-cos networks are trained (e2KD)."""
    label_smoothing: float = 0.0
    """Of ce."""

    def __post_init__(self) -> None:
        check_label_loss(self.loss, self.label_smoothing)


@dataclass(frozen=True, kw_only=True)
class SoftTargetsConfig:
    """What methods that listen to a teacher's logits share."""

    kind: str = ""
    tau: float = 1.0
    """Temperature of the soft targets; > 0."""
    teacher_weights: tuple[float, ...] = ()
    """Of each pass of store.teacher, in that order, summing to 1; empty weighs all alike."""

    def __post_init__(self) -> None:
        require(self.tau > 0, f"method.tau must be > 0, got {self.tau}")
        require(
            not self.teacher_weights
            or (min(self.teacher_weights) >= 0 and abs(sum(self.teacher_weights) - 1) < 1e-6),
            f"method.teacher_weights must be >= 0 and sum to 1, got {list(self.teacher_weights)}",
        )


@dataclass(frozen=True, kw_only=True)
class KDConfig(SoftTargetsConfig):
    """Soft targets (Hinton et al. 2015): total = lambda_ce * ce + lambda_kd * kd.

    Of sets with many labels a record the supervised term is bce instead of ce.
    """

    kind: Literal["kd"] = "kd"
    logits: Literal["softmax", "mld"] = "softmax"
    """What is compared: the distribution over classes, times tau^2; or each class on its own, times tau, which
    sets with many labels a record need (multi-label logit distillation, e2KD eq. C.1)."""
    lambda_ce: float = 0.0
    lambda_kd: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("lambda_ce", "lambda_kd"):
            require(
                getattr(self, name) >= 0, f"method.{name} must be >= 0, got {getattr(self, name)}"
            )


@dataclass(frozen=True, kw_only=True)
class E2KDConfig(KDConfig):
    """e2KD (Parchami-Araghi et al. 2024, eq. 3): soft targets + lambda_map * (1 - cosine of the maps)."""

    kind: Literal["e2kd"] = "e2kd"  # type: ignore[assignment]
    lambda_map: float = 1.0
    """0 switches the explanation term off, and the student's map is then never computed."""
    normalise_by: Literal["batch", "valid"] = "batch"
    """Divide the sum over valid maps by all maps of the batch (the paper's lambda) or by the valid ones; where
    several classes are explained, first within each record."""
    guided_step_interval: int = 1
    """The explanation term enters every n-th step only, unscaled."""
    map_control: Literal["none", "shuffled", "unaugmented"] = "none"
    """Negative controls: the map of another record of the batch, or the map without the view's warp."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.lambda_map >= 0, f"method.lambda_map must be >= 0, got {self.lambda_map}")
        require(
            self.guided_step_interval >= 1,
            f"method.guided_step_interval must be >= 1, got {self.guided_step_interval}",
        )


@dataclass(frozen=True, kw_only=True)
class KEDConfig(SoftTargetsConfig):
    """KED (arXiv 2310.02572): the prediction, and what each superfeature says of it.

    total = w * ce + lambda_ked * ((1 - mu) * kd + mu * (ked + rho * hint)), w = 1 - lambda_ked or 1. The mix is
    convex, as in the paper, so that lambda_ked and mu stand for lambda_ce and lambda_kd of the other methods.
    """

    kind: Literal["ked"] = "ked"
    tau: float = 4.0
    """Temperature of the predictions."""
    tau_superfeatures: float = 4.0
    """Temperature of the explanations; > 0. One superfeature alone is flatter than the whole, so it may be < 1."""
    lambda_ked: float = 0.9
    """Share of the teacher, in [0, 1]; 0 leaves the labels."""
    mu: float = 0.5
    """Share of the explanations in what the teacher says, in [0, 1]; 0 is KD with an additive student."""
    hard_weight: Literal["complement", "one"] = "complement"
    """Of the labels: 1 - lambda_ked, or 1. The paper does not say."""
    rho: float = 0.0
    """Of the hint (FitNets), the mean squared difference of the subnets' last hidden layers after a linear map
    of the student's; the spec's value is 100. Needs mode=live, as no store holds them; 0 leaves it out."""
    superfeatures: int | None = None
    """Which level of both hierarchies is compared; null is the student's finest."""
    superfeature_control: Literal["none", "shuffled", "noise"] = "none"
    """Negative controls: explanations of another record of the batch, or noise of each record's own scale."""
    chimera_fraction: float = 0.0
    """Records added to a batch, as a share of it: each takes every superfeature from a record of its own, and
    the teacher's logits with it, exactly and without asking the teacher. Of networks in input mode."""
    allow_view_mismatch: bool = False
    """Let mode=frozen move the images of explanations that stay where they are: an approximation."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(
            self.tau_superfeatures > 0,
            f"method.tau_superfeatures must be > 0, got {self.tau_superfeatures}",
        )
        for name in ("lambda_ked", "mu"):
            value = getattr(self, name)
            require(0 <= value <= 1, f"method.{name} must be in [0, 1], got {value}")
        for name in ("rho", "chimera_fraction"):
            value = getattr(self, name)
            require(value >= 0, f"method.{name} must be >= 0, got {value}")
        require(
            self.rho == 0 or self.lambda_ked * self.mu > 0,
            f"method.rho={self.rho} is a part of the explanations' share, which method.lambda_ked={self.lambda_ked} "
            f"and method.mu={self.mu} leave out: set both above 0, or method.rho=0",
        )
        require(
            self.superfeatures is None or self.superfeatures >= 1,
            f"method.superfeatures must be >= 1 or null, got {self.superfeatures}",
        )

    @property
    def needs_explanations(self) -> bool:
        """Whether the teacher's superfeatures are read at all."""
        return self.lambda_ked > 0 and (self.mu > 0 or self.chimera_fraction > 0)
