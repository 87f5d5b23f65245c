"""Methods that look inside the networks (`method=`): labels and logits beside a term of their own."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from pipeline.config.methods import LabelLoss, SoftTargetsConfig
from pipeline.core.errors import require


@dataclass(frozen=True, kw_only=True)
class FeatureKDConfig(SoftTargetsConfig):
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
        for name in ("lambda_ce", "lambda_kd"):
            require(
                getattr(self, name) >= 0, f"method.{name} must be >= 0, got {getattr(self, name)}"
            )
        require(
            self.lambda_ce > 0 or self.lambda_kd > 0,
            f"method={self.kind} compares what lies before the logits: set method.lambda_ce or method.lambda_kd "
            "above 0, or nothing trains the whole classifier",
        )


@dataclass(frozen=True, kw_only=True)
class ATConfig(FeatureKDConfig):
    """Attention transfer (Zagoruyko & Komodakis 2017): where each stage of the networks is active."""

    kind: Literal["at"] = "at"
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

    kind: Literal["cat_kd"] = "cat_kd"
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

    kind: Literal["review_kd"] = "review_kd"
    lambda_review: float = 1.0
    """0 leaves the term out, and the fusions that it trains are never made."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(
            self.lambda_review >= 0, f"method.lambda_review must be >= 0, got {self.lambda_review}"
        )


@dataclass(frozen=True, kw_only=True)
class FTConfig(FeatureKDConfig):
    """Factor transfer (Kim et al. 2018): the teacher's features paraphrased, the student's translated.

    Needs mode=live, as no store holds whole features.
    """

    kind: Literal["ft"] = "ft"
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

    kind: Literal["sskd"] = "sskd"
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

    kind: Literal["crd"] = "crd"
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
