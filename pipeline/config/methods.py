"""What a student is trained on (`method=`)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from pipeline.config.errors import require

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
class FeatureKDConfig(KDConfig):
    """What methods that look inside the networks share: lambda_ce * labels + lambda_kd * kd + their own term.

    The defaults are those of the e2KD paper's baselines: labels, and no logits.
    """

    lambda_ce: float = 1.0
    """Of the label term, whichever `label_loss` is."""
    lambda_kd: float = 0.0
    """0 leaves the logits out; tau is theirs."""
    label_loss: LabelLoss = "ce"
    """bce_offlabel for B-cos students."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(
            self.lambda_ce > 0 or self.lambda_kd > 0,
            f"method={self.kind} compares what lies before the logits: set method.lambda_ce or method.lambda_kd "
            "above 0, or nothing trains the whole classifier",
        )


@dataclass(frozen=True, kw_only=True)
class ATConfig(FeatureKDConfig):
    """Attention transfer (Zagoruyko & Komodakis 2017): where each stage of the networks is active."""

    kind: Literal["at"] = "at"  # type: ignore[assignment]
    lambda_at: float = 1000.0
    """Of a mean over places, which is why it is large; 0 leaves the term out, and no stage is read."""
    stages: tuple[int, ...] = ()
    """Which, counted from 1; empty takes all, of which both networks must have as many."""
    norm: Literal["mse", "l2"] = "mse"
    """Of the difference of two maps: the mean square over places, as public code has it, or the paper's norm, which
    is larger by far and wants a smaller lambda_at."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.lambda_at >= 0, f"method.lambda_at must be >= 0, got {self.lambda_at}")
        require(
            not self.stages
            or (min(self.stages) >= 1 and len(set(self.stages)) == len(self.stages)),
            f"method.stages counts from 1 and names none twice, got {list(self.stages)}",
        )


@dataclass(frozen=True, kw_only=True)
class CatKDConfig(FeatureKDConfig):
    """CAT-KD (Guo et al. 2023): the class activation maps of all classes, pooled."""

    kind: Literal["cat_kd"] = "cat_kd"  # type: ignore[assignment]
    lambda_cat: float = 1.0
    """0 leaves the term out, and no class map is computed."""
    resolution: int = 2
    """Cells a side to which the maps are pooled before they are compared."""
    normalise: bool = False
    """Divide each map by its L2 norm, so that its magnitude does not count."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.lambda_cat >= 0, f"method.lambda_cat must be >= 0, got {self.lambda_cat}")
        require(self.resolution >= 1, f"method.resolution must be >= 1, got {self.resolution}")


@dataclass(frozen=True, kw_only=True)
class ReviewKDConfig(FeatureKDConfig):
    """ReviewKD (Chen et al. 2021): the teacher's features, from the student's fused across stages.

    Needs mode=live, as no store holds whole features.
    """

    kind: Literal["review_kd"] = "review_kd"  # type: ignore[assignment]
    lambda_review: float = 1.0
    """0 leaves the term out, and the fusions that it trains are never made."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(
            self.lambda_review >= 0, f"method.lambda_review must be >= 0, got {self.lambda_review}"
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
            self.superfeatures is None or self.superfeatures >= 1,
            f"method.superfeatures must be >= 1 or null, got {self.superfeatures}",
        )

    @property
    def needs_explanations(self) -> bool:
        """Whether the teacher's superfeatures are read at all."""
        return self.lambda_ked > 0 and (self.mu > 0 or self.chimera_fraction > 0)


@dataclass(frozen=True, kw_only=True)
class FTConfig(FeatureKDConfig):
    """Factor transfer (Kim et al. 2018): the teacher's features paraphrased, the student's translated.

    Needs mode=live, as no store holds whole features.
    """

    kind: Literal["ft"] = "ft"  # type: ignore[assignment]
    lambda_ft: float = 1000.0
    """Of a mean over the factors' elements, which is why it is large; 0 leaves the term out."""
    paraphrase_rate: float = 0.5
    """The factors' channels as a share of the teacher's, in (0, 1]."""
    paraphraser_epochs: int = 1
    """Of the paraphraser on the teacher's features, before the student's first step; 0 leaves it random."""
    paraphraser_lr: float = 0.01

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.lambda_ft >= 0, f"method.lambda_ft must be >= 0, got {self.lambda_ft}")
        require(
            0 < self.paraphrase_rate <= 1,
            f"method.paraphrase_rate must be in (0, 1], got {self.paraphrase_rate}",
        )
        _check_phase("paraphraser", self.paraphraser_epochs, self.paraphraser_lr)


@dataclass(frozen=True, kw_only=True)
class SSKDConfig(FeatureKDConfig):
    """SSKD (Xu et al. 2020): which of a batch's records a turned image shows, as the teacher's features say it.

    Needs mode=replay with views=rotations views.per_step=4. total = lambda_ce * ce + lambda_kd * kd on upright images
    + lambda_ss * ss (similarities) + lambda_tf * tf (logits) on turned ones. The defaults are those of the public code.
    """

    kind: Literal["sskd"] = "sskd"  # type: ignore[assignment]
    tau: float = 4.0
    """Temperature of the logits, of upright and of turned images."""
    lambda_kd: float = 0.9
    """0 in the feature-only arm of Han et al. 2023."""
    lambda_ss: float = 10.0
    """Of the similarities; 0 leaves them out, and no feature is read."""
    lambda_tf: float = 2.7
    """Of turned images' logits."""
    tau_ss: float = 0.5
    """Temperature of the similarities; > 0."""
    keep_wrong_ss: float = 0.75
    """Share of the turned images that the teacher takes for another record that are compared, best-ranked first."""
    keep_wrong_tf: float = 1.0
    """The same of those that it takes for another class."""
    head_epochs: int = 30
    """Of the teacher's head on its features, before the student's first step; 0 leaves it random."""
    head_lr: float = 0.1
    """A tenth after each third of head_epochs."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("lambda_ss", "lambda_tf"):
            require(
                getattr(self, name) >= 0, f"method.{name} must be >= 0, got {getattr(self, name)}"
            )
        for name in ("keep_wrong_ss", "keep_wrong_tf"):
            value = getattr(self, name)
            require(0 <= value <= 1, f"method.{name} must be in [0, 1], got {value}")
        require(self.tau_ss > 0, f"method.tau_ss must be > 0, got {self.tau_ss}")
        _check_phase("head", self.head_epochs, self.head_lr)


def _check_phase(what: str, epochs: int, lr: float) -> None:
    require(epochs >= 0, f"method.{what}_epochs must be >= 0, got {epochs}")
    require(lr > 0, f"method.{what}_lr must be > 0, got {lr}")


@dataclass(frozen=True, kw_only=True)
class CRDConfig(FeatureKDConfig):
    """CRD (Tian et al. 2020): a record's embedding is told apart from those of records of other classes.

    The defaults are those of its public code. With lambda_ce and lambda_kd 0 nothing trains the classifier, and
    what lies before it alone is worth judging: the feature-only arm of Han et al. 2023.
    """

    kind: Literal["crd"] = "crd"  # type: ignore[assignment]
    lambda_crd: float = 0.8
    """0 leaves the term out, and no embedding is kept."""
    embedding_size: int = 128
    """Of both networks' pooled features after a linear map each."""
    tau_crd: float = 0.07
    """Temperature of the embeddings' inner products; > 0. tau is that of the logits."""
    negatives: int = 16384
    """Records of other classes that each record is told apart from in a step, drawn anew and with replacement; at
    most as many as every class has."""
    momentum: float = 0.5
    """Of the embedding that is kept of each record, in [0, 1): its share when the record comes again."""

    def __post_init__(self) -> None:
        SoftTargetsConfig.__post_init__(self)
        for name in ("lambda_ce", "lambda_kd", "lambda_crd"):
            value = getattr(self, name)
            require(value >= 0, f"method.{name} must be >= 0, got {value}")
        require(
            max(self.lambda_ce, self.lambda_kd, self.lambda_crd) > 0,
            "method=crd: set one of method.lambda_ce, method.lambda_kd and method.lambda_crd above 0, or nothing is "
            "trained",
        )
        require(self.tau_crd > 0, f"method.tau_crd must be > 0, got {self.tau_crd}")
        for name in ("embedding_size", "negatives"):
            value = getattr(self, name)
            require(value >= 1, f"method.{name} must be >= 1, got {value}")
        require(0 <= self.momentum < 1, f"method.momentum must be in [0, 1), got {self.momentum}")


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
