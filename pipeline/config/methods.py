"""Methods: the loss that a student is trained on (`method=`)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

from annotated_types import Ge, Gt, Le, Lt

from pipeline.config.augment import AugmentOptions
from pipeline.config.models import AdditiveModelConfig, ModelConfig
from pipeline.config.options import Options
from pipeline.config.training import TrainerOptions
from pipeline.config.views import NUM_ROTATIONS, AnyViewsConfig, RotationsViewsConfig
from pipeline.core.errors import require

LabelLoss = Literal["ce", "bce", "bce_offlabel"]
Mode = Literal["frozen", "replay", "live"]


def check_label_loss(loss: str, label_smoothing: float) -> None:
    """ConfigError where the loss takes no smoothing."""
    require(
        loss == "ce" or label_smoothing == 0,
        f"label_smoothing={label_smoothing} is an option of loss=ce; loss={loss} asks of each class on its own, "
        "set label_smoothing=0",
    )


@dataclass(frozen=True, kw_only=True)
class MethodSetting:
    """The other options of a student that a method has to agree with."""

    mode: Mode
    views: AnyViewsConfig
    augment: AugmentOptions
    trainer: TrainerOptions
    student: ModelConfig


@dataclass(frozen=True, kw_only=True)
class MethodConfig(Options):
    """The base of every method."""

    section: ClassVar[str] = "method"
    needs_teacher: ClassVar[bool] = True
    """Whether a teacher is read at all."""
    needs_places: ClassVar[bool] = True
    """Whether places of an image are compared, which rows of a table have none of."""

    kind: str = ""

    def check(self, setting: MethodSetting) -> None:
        """ConfigError where the method and the student's other options exclude each other."""


@dataclass(frozen=True, kw_only=True)
class LabelsConfig(MethodConfig):
    """Labels only: the supervised baseline."""

    implementation: ClassVar[str] = "pipeline.losses.labels:LabelsLoss"
    needs_teacher: ClassVar[bool] = False
    needs_places: ClassVar[bool] = False

    kind: Literal["labels"] = "labels"
    loss: LabelLoss = "ce"
    """ce: cross-entropy, of one label a record; bce: each class on its own, as sets with many labels a record
    need it; bce_offlabel: the same with 1 / classes off the labels, how B-cos networks are trained (e2KD)."""
    label_smoothing: Annotated[float, Ge(0), Lt(1)] = 0.0
    """Of ce."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_label_loss(self.loss, self.label_smoothing)


@dataclass(frozen=True, kw_only=True)
class SoftTargetsConfig(MethodConfig):
    """What methods that listen to a teacher's logits share."""

    tau: Annotated[float, Gt(0)] = 1.0
    """Temperature of the soft targets; > 0."""
    teacher_weights: tuple[float, ...] = ()
    """Of each pass of store.teacher, in that order, summing to 1; empty weighs all alike."""

    def __post_init__(self) -> None:
        super().__post_init__()
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

    implementation: ClassVar[str] = "pipeline.losses.kd:KDLoss"
    needs_places: ClassVar[bool] = False

    kind: Literal["kd"] = "kd"
    logits: Literal["softmax", "mld"] = "softmax"
    """What is compared: the distribution over classes, times tau^2; or each class on its own, times tau, which
    sets with many labels a record need (multi-label logit distillation, e2KD eq. C.1)."""
    lambda_ce: Annotated[float, Ge(0)] = 0.0
    lambda_kd: Annotated[float, Ge(0)] = 1.0


@dataclass(frozen=True, kw_only=True)
class E2KDConfig(KDConfig):
    """e2KD (Parchami-Araghi et al. 2024, eq. 3): soft targets + lambda_map * (1 - cosine of the maps)."""

    implementation: ClassVar[str] = "pipeline.losses.e2kd:E2KDLoss"
    needs_places: ClassVar[bool] = True

    kind: Literal["e2kd"] = "e2kd"  # type: ignore[assignment]
    lambda_map: Annotated[float, Ge(0)] = 1.0
    """0 switches the explanation term off, and the student's map is then never computed."""
    normalize_by: Literal["batch", "valid"] = "batch"
    """Divide the sum over valid maps by all maps of the batch (the paper's lambda) or by the valid ones; where
    several classes are explained, first within each record."""
    guided_step_interval: Annotated[int, Ge(1)] = 1
    """The explanation term enters every n-th step only, unscaled."""
    map_control: Literal["none", "shuffled", "unaugmented"] = "none"
    """Negative controls: the map of another record of the batch, or the map without the view's warp."""

    def check(self, setting: MethodSetting) -> None:
        require(
            setting.mode == "frozen" or self.map_control != "unaugmented",
            "method.map_control=unaugmented leaves a canonical map behind while the view moves; "
            f"mode={setting.mode} has none (mode=frozen does)",
        )
        mixup_alpha = setting.augment.mixup_alpha
        require(
            mixup_alpha is None or setting.mode != "live" or self.map_control != "shuffled",
            "method.map_control=shuffled gives each record the map of its neighbor, which shows the same image in "
            "part where the two are mixed; set method.map_control=none, or augment.mixup_alpha=null in place of "
            f"{mixup_alpha}",
        )


@dataclass(frozen=True, kw_only=True)
class KEDConfig(SoftTargetsConfig):
    """KED (arXiv 2310.02572): the prediction, and what each superfeature says of it.

    total = w * ce + lambda_ked * ((1 - mu) * kd + mu * (ked + rho * hint)), w = 1 - lambda_ked or 1. The mix is
    convex, as in the paper, so that lambda_ked and mu stand for lambda_ce and lambda_kd of the other methods.
    """

    implementation: ClassVar[str] = "pipeline.losses.ked:KEDLoss"
    needs_places: ClassVar[bool] = False
    minimal: ClassVar[tuple[str, ...]] = ("student=additive", "augment=none")

    kind: Literal["ked"] = "ked"
    tau: float = 4.0
    """Temperature of the predictions."""
    tau_superfeatures: Annotated[float, Gt(0)] = 4.0
    """Temperature of the explanations; > 0. One superfeature alone is flatter than the whole, so it may be < 1."""
    lambda_ked: Annotated[float, Ge(0), Le(1)] = 0.9
    """Share of the teacher, in [0, 1]; 0 leaves the labels."""
    mu: Annotated[float, Ge(0), Le(1)] = 0.5
    """Share of the explanations in what the teacher says, in [0, 1]; 0 is KD with an additive student."""
    hard_weight: Literal["complement", "one"] = "complement"
    """Of the labels: 1 - lambda_ked, or 1. The paper does not say."""
    rho: Annotated[float, Ge(0)] = 0.0
    """Of the hint (FitNets), the mean squared difference of the subnets' last hidden layers after a linear map
    of the student's; the spec's value is 100. Needs mode=live, as no store holds them; 0 leaves it out."""
    superfeatures: Annotated[int | None, Ge(1)] = None
    """Which level of both hierarchies is compared; null is the student's finest."""
    superfeature_control: Literal["none", "shuffled", "noise"] = "none"
    """Negative controls: explanations of another record of the batch, or noise of each record's own scale."""
    chimera_fraction: Annotated[float, Ge(0)] = 0.0
    """Records added to a batch, as a share of it: each takes every superfeature from a record of its own, and
    the teacher's logits with it, exactly and without asking the teacher. Of networks in input mode."""
    allow_view_mismatch: bool = False
    """Let mode=frozen move the images of explanations that stay where they are: an approximation."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(
            self.rho == 0 or self.lambda_ked * self.mu > 0,
            f"method.rho={self.rho} is a part of the explanations' share, which method.lambda_ked={self.lambda_ked} "
            f"and method.mu={self.mu} leave out: set both above 0, or method.rho=0",
        )

    def check(self, setting: MethodSetting) -> None:
        student, mode = setting.student, setting.mode
        if self.needs_explanations:
            require(
                mode != "frozen" or not setting.augment.operations or self.allow_view_mismatch,
                "augment.operations move the image, and the explanations of method=ked cannot move along: set "
                "augment=none, replay stored views (mode=replay) or ask the teacher itself (mode=live), or accept an "
                "approximation with method.allow_view_mismatch=true",
            )
            require(
                isinstance(student, AdditiveModelConfig),
                f"method=ked compares superfeatures, of which student={student.kind} has none: set "
                "student=additive, or method.mu=0 method.chimera_fraction=0 for KD",
            )
        require(
            self.rho == 0 or self.lambda_ked * self.mu == 0 or mode == "live",
            f"method.rho={self.rho} compares hidden layers, which no store holds, so mode={mode} has none: set "
            "mode=live with teacher= and teacher.weights=, or method.rho=0",
        )
        mixup_alpha = setting.augment.mixup_alpha
        require(
            mixup_alpha is None
            or (self.chimera_fraction == 0 and self.superfeature_control == "none"),
            "method.chimera_fraction and method.superfeature_control take whole records, and augment.mixup_alpha="
            f"{mixup_alpha} mixes them; set augment.mixup_alpha=null, or those to 0 and none",
        )
        require(
            self.chimera_fraction == 0
            or (isinstance(student, AdditiveModelConfig) and student.is_input_mode),
            f"method.chimera_fraction={self.chimera_fraction} puts superfeatures of several images into one, which "
            "is exact for parts of the input alone: set student.name=conv or mlp, or method.chimera_fraction=0",
        )

    @property
    def needs_explanations(self) -> bool:
        """Whether the teacher's superfeatures are read at all."""
        return self.lambda_ked > 0 and (self.mu > 0 or self.chimera_fraction > 0)


@dataclass(frozen=True, kw_only=True)
class FeatureKDConfig(SoftTargetsConfig):
    """What methods that look inside the networks share: lambda_ce * labels + lambda_kd * kd + their own term.

    The defaults are those of the e2KD paper's baselines: labels, and no logits.
    """

    lambda_ce: Annotated[float, Ge(0)] = 1.0
    """Of the label term, whichever `label_loss` is."""
    lambda_kd: Annotated[float, Ge(0)] = 0.0
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

    def _check_whole_features(self, setting: MethodSetting) -> None:
        require(
            setting.mode == "live",
            f"method={self.kind} compares whole feature maps, which no store holds, so mode={setting.mode} has "
            "none: set mode=live with teacher= and teacher.weights=, or choose method=at or method=cat_kd",
        )


@dataclass(frozen=True, kw_only=True)
class ATConfig(FeatureKDConfig):
    """Attention transfer (Zagoruyko & Komodakis 2017): where each stage of the networks is active."""

    implementation: ClassVar[str] = "pipeline.losses.at:ATLoss"

    kind: Literal["at"] = "at"
    lambda_at: Annotated[float, Ge(0)] = 1000.0
    """Of a mean over places, which is why it is large; 0 leaves the term out, and no stage is read."""
    stages: tuple[int, ...] = ()
    """Which, counted from 1; empty takes all, of which both networks must have as many."""
    norm: Literal["mse", "l2"] = "mse"
    """Of the difference of two maps: the mean square over places, as public code has it, or the paper's norm, which
    is larger by far and wants a smaller lambda_at."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(
            not self.stages
            or (min(self.stages) >= 1 and len(set(self.stages)) == len(self.stages)),
            f"method.stages counts from 1 and names none twice, got {list(self.stages)}",
        )


@dataclass(frozen=True, kw_only=True)
class CatKDConfig(FeatureKDConfig):
    """CAT-KD (Guo et al. 2023): the class activation maps of all classes, pooled."""

    implementation: ClassVar[str] = "pipeline.losses.cat_kd:CatKDLoss"

    kind: Literal["cat_kd"] = "cat_kd"
    lambda_cat: Annotated[float, Ge(0)] = 1.0
    """0 leaves the term out, and no class map is computed."""
    resolution: Annotated[int, Ge(1)] = 2
    """Cells a side to which the maps are pooled before they are compared."""
    normalize: bool = False
    """Divide each map by its L2 norm, so that its magnitude does not count."""


@dataclass(frozen=True, kw_only=True)
class ReviewKDConfig(FeatureKDConfig):
    """ReviewKD (Chen et al. 2021): the teacher's features, from the student's fused across stages.

    Needs mode=live, as no store holds whole features.
    """

    implementation: ClassVar[str] = "pipeline.losses.review_kd:ReviewKDLoss"
    minimal: ClassVar[tuple[str, ...]] = ("mode=live",)

    kind: Literal["review_kd"] = "review_kd"
    lambda_review: Annotated[float, Ge(0)] = 1.0
    """0 leaves the term out, and the fusions that it trains are never made."""

    def check(self, setting: MethodSetting) -> None:
        if self.lambda_review == 0:
            return
        self._check_whole_features(setting)
        trainer = setting.trainer
        require(
            trainer.batch_size > trainer.ranks,
            f"trainer.batch_size={trainer.batch_size} leaves each of {trainer.ranks} ranks one record, of "
            "which the batch norms of method=review_kd know no variance; raise it",
        )


@dataclass(frozen=True, kw_only=True)
class FTConfig(FeatureKDConfig):
    """Factor transfer (Kim et al. 2018): the teacher's features paraphrased, the student's translated.

    Needs mode=live, as no store holds whole features.
    """

    implementation: ClassVar[str] = "pipeline.losses.ft:FTLoss"
    minimal: ClassVar[tuple[str, ...]] = ("mode=live",)

    kind: Literal["ft"] = "ft"
    lambda_ft: Annotated[float, Ge(0)] = 1000.0
    """Of a mean over the factors' elements, which is why it is large; 0 leaves the term out."""
    paraphrase_rate: Annotated[float, Gt(0), Le(1)] = 0.5
    """The factors' channels as a share of the teacher's, in (0, 1]."""
    paraphraser_epochs: Annotated[int, Ge(0)] = 1
    """Of the paraphraser on the teacher's features, before the student's first step; 0 leaves it random."""
    paraphraser_lr: Annotated[float, Gt(0)] = 0.01

    def check(self, setting: MethodSetting) -> None:
        if self.lambda_ft > 0:
            self._check_whole_features(setting)


@dataclass(frozen=True, kw_only=True)
class SSKDConfig(FeatureKDConfig):
    """SSKD (Xu et al. 2020): which of a batch's records a turned image shows, as the teacher's features say it.

    Needs mode=replay with views=rotations views.per_step=4. total = lambda_ce * ce + lambda_kd * kd on upright images
    + lambda_ss * ss (similarities) + lambda_tf * tf (logits) on turned ones. The defaults are those of the public code.
    """

    implementation: ClassVar[str] = "pipeline.losses.sskd:SSKDLoss"
    minimal: ClassVar[tuple[str, ...]] = ("mode=replay", "views=rotations", "views.per_step=4")

    kind: Literal["sskd"] = "sskd"
    tau: float = 4.0
    """Temperature of the logits, of upright and of turned images."""
    lambda_kd: float = 0.9
    """0 in the feature-only arm of Han et al. 2023."""
    lambda_ss: Annotated[float, Ge(0)] = 10.0
    """Of the similarities; 0 leaves them out, and no feature is read."""
    lambda_tf: Annotated[float, Ge(0)] = 2.7
    """Of turned images' logits."""
    tau_ss: Annotated[float, Gt(0)] = 0.5
    """Temperature of the similarities; > 0."""
    keep_wrong_ss: Annotated[float, Ge(0), Le(1)] = 0.75
    """Share of the turned images that the teacher takes for another record that are compared, best-ranked first."""
    keep_wrong_tf: Annotated[float, Ge(0), Le(1)] = 1.0
    """The same of those that it takes for another class."""
    head_epochs: Annotated[int, Ge(0)] = 30
    """Of the teacher's head on its features, before the student's first step; 0 leaves it random."""
    head_lr: Annotated[float, Gt(0)] = 0.1
    """A tenth after each third of head_epochs."""

    def check(self, setting: MethodSetting) -> None:
        views, trainer = setting.views, setting.trainer
        require(
            setting.mode == "replay"
            and isinstance(views, RotationsViewsConfig)
            and views.per_step == NUM_ROTATIONS,
            "method=sskd compares an image with its three turns in one step, which mode=replay views=rotations "
            f"views.per_step={NUM_ROTATIONS} shows; here mode={setting.mode}, views={views.kind}, "
            f"views.per_step={views.per_step}",
        )
        require(
            trainer.batch_size > NUM_ROTATIONS * trainer.ranks,
            f"trainer.batch_size={trainer.batch_size} leaves each of {trainer.ranks} ranks one record, and "
            "method=sskd tells records apart; raise it",
        )


@dataclass(frozen=True, kw_only=True)
class CRDConfig(FeatureKDConfig):
    """CRD (Tian et al. 2020): a record's embedding is told apart from those of records of other classes.

    The defaults are those of its public code. With lambda_ce and lambda_kd 0 nothing trains the classifier, and
    what lies before it alone is worth evaluation: the feature-only arm of Han et al. 2023.
    """

    implementation: ClassVar[str] = "pipeline.losses.crd:CRDLoss"

    kind: Literal["crd"] = "crd"
    lambda_crd: Annotated[float, Ge(0)] = 0.8
    """0 leaves the term out, and no embedding is kept."""
    embedding_size: Annotated[int, Ge(1)] = 128
    """Of both networks' pooled features after a linear map each."""
    tau_crd: Annotated[float, Gt(0)] = 0.07
    """Temperature of the embeddings' inner products; > 0. tau is that of the logits."""
    negatives: Annotated[int, Ge(1)] = 16384
    """Records of other classes that each record is told apart from in a step, drawn anew and with replacement; at
    most as many as every class has."""
    momentum: Annotated[float, Ge(0), Lt(1)] = 0.5
    """Of the embedding that is kept of each record, in [0, 1): its share when the record comes again."""

    def __post_init__(self) -> None:
        SoftTargetsConfig.__post_init__(self)
        require(
            max(self.lambda_ce, self.lambda_kd, self.lambda_crd) > 0,
            "method=crd: set one of method.lambda_ce, method.lambda_kd and method.lambda_crd above 0, or nothing is "
            "trained",
        )

    def check(self, setting: MethodSetting) -> None:
        if self.lambda_crd == 0:
            return
        per_step, mixup_alpha = setting.views.per_step, setting.augment.mixup_alpha
        require(
            per_step == 1,
            f"method=crd keeps one embedding of each record, and views.per_step={per_step} shows it several "
            "times in a step; set views.per_step=1",
        )
        require(
            mixup_alpha is None,
            "method=crd keeps an embedding of each record, and a mixture shows two: set augment.mixup_alpha=null in "
            f"place of {mixup_alpha}",
        )


METHODS: dict[str, type[MethodConfig]] = {
    cls.kind: cls
    for cls in (
        LabelsConfig,
        KDConfig,
        E2KDConfig,
        ATConfig,
        CatKDConfig,
        ReviewKDConfig,
        FTConfig,
        CRDConfig,
        SSKDConfig,
        KEDConfig,
    )
}
