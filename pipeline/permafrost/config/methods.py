"""Methods: the training loss of a student (`method=`)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

from annotated_types import Ge, Gt, Lt

from permafrost.config.augment import AugmentOptions, ViewsConfig
from permafrost.config.explainers import explainer_of_line
from permafrost.config.models import ModelConfig
from permafrost.config.options import Options, Role
from permafrost.config.plugins import Family
from permafrost.config.store import require_stages
from permafrost.config.training import TrainerOptions
from permafrost.core.errors import require

LabelLoss = Literal["ce", "bce", "bce_offlabel"]
Mode = Literal["frozen", "replay", "live"]
"""Origin of the targets of a student: stored ones of the whole image or of views, or a teacher in every step."""
MapControl = Literal["none", "shuffled", "unaugmented"]
"""Negative controls of maps and features: none, those of another record, or those without the warp of the view."""
Standardization = Literal["none", "channel", "phi_s"]
"""Affine maps of a teacher's values to channels of mean 0 and variance 1."""


@dataclass(frozen=True, kw_only=True)
class LabelLossOptions(Options):
    """Loss on labels."""

    loss: LabelLoss = "ce"
    """Loss on the labels. ce: cross-entropy with one label per record. bce: binary cross-entropy of each class,
    required for several labels per record. bce_offlabel: bce with the target 1 / classes off the labels, as for
    B-cos networks (e2KD)."""
    label_smoothing: Annotated[float, Ge(0), Lt(1)] = 0.0
    """Label smoothing of loss=ce."""

    def _check_together(self) -> None:
        require(
            self.loss == "ce" or self.label_smoothing == 0,
            f"label_smoothing={self.label_smoothing} is an option of loss=ce; loss={self.loss} treats each class "
            "independently, so set label_smoothing=0",
        )


@dataclass(frozen=True, kw_only=True)
class MethodSetting:
    """Other options of a student that a method has to agree with."""

    mode: Mode
    views: ViewsConfig
    augment: AugmentOptions
    trainer: TrainerOptions
    student: ModelConfig


@dataclass(frozen=True, kw_only=True)
class MethodConfig(Options):
    """Base class of the options of all methods."""

    section: ClassVar[str] = "method"
    needs_teacher: ClassVar[bool] = True
    """True if the method uses a teacher."""
    needs_places: ClassVar[bool] = True
    """True if the method compares positions of an image, which rows of a table do not have."""
    live_views: ClassVar[str] = ""
    """Kind of `views` that a step of mode=live makes of each view of the student (ViewsConfig.expansion), empty if it
    has that view alone."""
    has_mix_rule: ClassVar[bool] = False
    """True if the targets of a mixture follow from the stored ones of its records (docs/concepts/one-geometry.md).
    Each class states this itself, since a loss of its own must read them."""
    needs_one_label: ClassVar[bool] = False
    """True if the loss needs the one label of a record, which a mixture of two does not have in any mode."""
    suggestion: ClassVar[str] = ""
    """`module:name` of a function (store, pass) -> arguments of `distill` besides method=, which choose a student that
    can be trained on the pass, or none if no student can; `next:` prefers methods with such a function."""
    is_term: ClassVar[bool] = False
    """True if method=several may combine it with others: its loss keeps no state besides its parameters."""

    kind: str = ""

    @property
    def trains_classifier(self) -> bool:
        """True if any term reaches the student's last layer."""
        return True

    @property
    def all_logits_option(self) -> str:
        """Option for which the loss needs the logits of all classes, not only the largest ones; empty without one."""
        return ""

    def check(self, setting: MethodSetting) -> None:
        """Check that the method and the student's other options agree.

        Raises:
            ConfigError: If they exclude each other.
        """

    def check_mix_rule(self, mode: Mode) -> None:
        """Check that the labels and, outside of mode=live, the stored targets of two records can be mixed.

        Raises:
            ConfigError: If the method has no rule for them.
        """
        require(
            not self.needs_one_label,
            f"augment.mix shows two records, and method={self.kind} needs one label; set augment.mix=[]",
        )
        require(
            mode == "live"
            or type(self).__dict__.get("has_mix_rule", False),  # of this class itself
            f"augment.mix shows two records, and method={self.kind} has no rule for the stored targets of both; set "
            f"augment.mix=[], or mode=live with teacher= in place of mode={mode}",
        )


@dataclass(frozen=True, kw_only=True)
class LabelsConfig(LabelLossOptions, MethodConfig):
    """Labels only: the supervised baseline."""

    implementation: ClassVar[str] = "permafrost.losses.labels:LabelsLoss"
    needs_teacher: ClassVar[bool] = False
    needs_places: ClassVar[bool] = False
    has_mix_rule: ClassVar[bool] = True

    kind: Literal["labels"] = "labels"


@dataclass(frozen=True, kw_only=True)
class SoftTargetsConfig(MethodConfig):
    """Options shared by all methods that use a teacher's logits."""

    tau: Annotated[float, Gt(0)] = 1.0
    """Temperature of the soft targets."""


@dataclass(frozen=True, kw_only=True)
class KDConfig(SoftTargetsConfig):
    """Soft targets (Hinton et al. 2015): total = lambda_ce * ce + lambda_kd * kd.

    In data sets with several labels per record the supervised term is bce instead of ce.
    """

    implementation: ClassVar[str] = "permafrost.losses.kd:KDLoss"
    needs_places: ClassVar[bool] = False
    is_term: ClassVar[bool] = True
    has_mix_rule: ClassVar[bool] = True

    kind: Literal["kd"] = "kd"
    logits: Literal["softmax", "softmax_mse", "mld"] = "softmax"
    """Comparison of the logits. softmax: the divergence of the distributions over classes, times tau^2. softmax_mse:
    their mean squared difference, times tau^2, as in the released code of UniCAM. mld: each class independently,
    times tau, required for several labels per record (multi-label logit distillation, e2KD eq. C.1)."""
    lambda_ce: Annotated[float, Ge(0)] = 0.0
    """Weight of the label term."""
    lambda_kd: Annotated[float, Ge(0)] = 1.0
    """Weight of the soft targets."""

    @property
    def all_logits_option(self) -> str:
        return "" if self.logits == "softmax" else f"method.logits={self.logits}"


@dataclass(frozen=True, kw_only=True)
class DKDConfig(SoftTargetsConfig):
    """DKD (Zhao et al. 2022, eq. 8): soft targets in two parts, of the label's class and of the other classes.

    total = lambda_ce * ce + lambda_target * target + lambda_others * others. KD weighs the second part by the
    teacher's probability of the other classes, which is small where the teacher is sure.
    """

    implementation: ClassVar[str] = "permafrost.losses.dkd:DKDLoss"
    needs_places: ClassVar[bool] = False
    needs_one_label: ClassVar[bool] = True

    kind: Literal["dkd"] = "dkd"
    lambda_ce: Annotated[float, Ge(0)] = 1.0
    """Weight of the label term."""
    lambda_target: Annotated[float, Ge(0)] = 1.0
    """Weight of the divergence of the label's class from all others (alpha of the paper)."""
    lambda_others: Annotated[float, Ge(0)] = 8.0
    """Weight of the divergence within the other classes (beta of the paper, 0.25 to 8 there)."""

    @property
    def all_logits_option(self) -> str:
        return "method=dkd"


@dataclass(frozen=True, kw_only=True)
class E2KDConfig(KDConfig):
    """e2KD (Parchami-Araghi et al. 2024, eq. 3): soft targets + lambda_map * (1 - cosine of the maps)."""

    implementation: ClassVar[str] = "permafrost.losses.e2kd:E2KDLoss"
    needs_places: ClassVar[bool] = True
    has_mix_rule: ClassVar[bool] = True

    kind: Literal["e2kd"] = "e2kd"  # type: ignore[assignment]
    lambda_map: Annotated[float, Ge(0)] = 1.0
    """Weight of the explanation term; 0 disables it, and the student's map is not computed."""
    normalize_by: Literal["batch", "valid"] = "batch"
    """Normalization of the sum over valid maps: by all maps of the batch (the paper's lambda) or by the valid
    maps. With several target classes, each record is normalized first."""
    guided_step_interval: Annotated[int, Ge(1)] = 1
    """Interval in steps at which the explanation term is added, unscaled."""
    max_classes: Annotated[int | None, Ge(1)] = None
    """Maximum number of target classes that are compared per record, the first ones of the pass; null compares all.
    One pass with explainer.target_classes=topk thus serves students that learn one map per record and students
    that learn several."""
    lambda_cat: Annotated[float, Ge(0)] = 0.0
    """Weight of CAT-KD's class-map term in addition; 0 disables it, and no class map is read. map_control does not
    change class maps."""
    resolution: Annotated[int, Ge(1)] = 2
    """Cells per side to which class maps are pooled before they are compared, as in method=cat_kd."""
    second_maps: Annotated[bool, Role.IF_SET] = True
    """With augment.mix and stored targets, explain the classes of both records of a mixture in each step; false
    explains those of the record itself, weighted by its share, which is one explanation less."""
    map_control: MapControl = "none"
    """Negative control: the map of another record of the batch (shuffled), or the map without the view's warp
    (unaugmented; with mode=replay, that of the record's first stored view)."""
    map_distance: Annotated[Literal["cosine", "absolute"], Role.IF_SET] = "cosine"
    """Distance of two maps s and t. cosine: 1 - cosine, whatever their size (the paper). absolute: |s - t|^2 / (2
    |t|^2), which is the same for maps of equal norm, and compares the size, too; for signed maps."""
    explainer: Annotated[str | None, Role.IF_SET] = None
    """Explainer of the student, with its options, as in "integrated_gradients steps=8"; null takes that of the
    teacher's maps. Maps that only the teacher can make (explainer=other) need one."""

    def _check_together(self) -> None:
        if self.explainer is not None:
            explainer_of_line(self.explainer)
        for option, weight in (
            *(("max_classes", "lambda_map"), ("explainer", "lambda_map")),
            *(("map_distance", "lambda_map"), ("resolution", "lambda_cat")),
        ):
            value, default = getattr(self, option), getattr(type(self), option)
            require(
                value == default or getattr(self, weight) > 0,
                f"method.{option}={value} has no effect with method.{weight}=0; leave it at "
                f"{'null' if default is None else default}, or raise method.{weight}",
            )

    def check(self, setting: MethodSetting) -> None:
        check_map_control(self.map_control, setting)


def check_map_control(map_control: MapControl, setting: MethodSetting) -> None:
    """Check that the mode has what a negative control needs.

    Raises:
        ConfigError: If it does not.
    """
    require(
        setting.mode != "live" or map_control != "unaugmented",
        "method.map_control=unaugmented needs a stored map of another view, and mode=live has none; set mode=frozen or "
        "mode=replay",
    )
    require(
        setting.mode != "replay" or not setting.augment.mixes or map_control != "unaugmented",
        "method.map_control=unaugmented gives each stored view the map of the record's first one, which does not fit "
        "its mixture; set method.map_control=none, or augment.mix=[]",
    )
    require(
        not setting.augment.mixes or map_control != "shuffled",
        "method.map_control=shuffled gives each record the map of its neighbor, whose image augment.mix may have put "
        "into it; set method.map_control=none, or augment.mix=[]",
    )


@dataclass(frozen=True, kw_only=True)
class FeatureKDConfig(SoftTargetsConfig):
    """Options shared by methods that compare features: lambda_ce * labels + lambda_kd * kd + the method's own term.

    The defaults are those of the e2KD paper's baselines: labels, and no logits.
    """

    trained_by: ClassVar[tuple[str, ...]] = ("lambda_ce", "lambda_kd")
    """Weights of which one must be above 0."""

    lambda_ce: Annotated[float, Ge(0)] = 1.0
    """Weight of the label term (`label_loss`)."""
    lambda_kd: Annotated[float, Ge(0)] = 0.0
    """Weight of the logit term, whose temperature is tau; 0 disables it."""
    label_loss: LabelLoss = "ce"
    """Loss on the labels, as method.loss of method=labels; bce_offlabel suits B-cos students."""

    @property
    def trains_classifier(self) -> bool:
        return self.lambda_ce > 0 or self.lambda_kd > 0

    def _check_together(self) -> None:
        options = " or ".join(f"method.{name}" for name in self.trained_by)
        without = "the last layer is not" if len(self.trained_by) == 2 else "nothing is"
        require(
            any(getattr(self, name) > 0 for name in self.trained_by),
            f"method={self.kind} compares features before the logits: set {options} above 0, or {without} trained",
        )
        require_stages("method.stages", getattr(self, "stages", ()))  # of those that choose stages


@dataclass(frozen=True, kw_only=True)
class ATConfig(FeatureKDConfig):
    """Attention transfer (Zagoruyko & Komodakis 2017): activation energy of each stage at each position."""

    implementation: ClassVar[str] = "permafrost.losses.feature_kd:ATLoss"
    is_term: ClassVar[bool] = True
    has_mix_rule: ClassVar[bool] = True

    kind: Literal["at"] = "at"
    lambda_at: Annotated[float, Ge(0)] = 1000.0
    """Weight of the attention term, large because the term is a mean over positions; 0 disables it, and no
    stage is read."""
    stages: tuple[int, ...] = ()
    """Stages to compare, counted from 1 at the finest, or from -1 at the deepest for networks with different
    numbers of stages; empty takes all, and both networks must then have the same number."""
    norm: Literal["mse", "l2"] = "mse"
    """Norm of the difference of two maps. mse: the mean square over positions, as in public code. l2: the norm
    in the paper, which is much larger and requires a smaller lambda_at."""


@dataclass(frozen=True, kw_only=True)
class CatKDConfig(FeatureKDConfig):
    """CAT-KD (Guo et al. 2023): class activation maps of all classes, pooled."""

    implementation: ClassVar[str] = "permafrost.losses.feature_kd:CatKDLoss"
    is_term: ClassVar[bool] = True
    has_mix_rule: ClassVar[bool] = True

    kind: Literal["cat_kd"] = "cat_kd"
    lambda_cat: Annotated[float, Ge(0)] = 1.0
    """Weight of the class-map term; 0 disables it, and no class map is computed."""
    resolution: Annotated[int, Ge(1)] = 2
    """Cells per side to which the maps are pooled before they are compared."""
    normalize: bool = False
    """Divide each map by its L2 norm, so that its magnitude does not matter."""


@dataclass(frozen=True, kw_only=True)
class FeaturesConfig(FeatureKDConfig):
    """Features of chosen stages, through a 1x1 convolution (FitNets, Romero et al. 2015), with any other term or alone.

    The features are those of a pass with the output features, or of a live teacher, before the stage's last ReLU.
    Without lambda_ce and lambda_kd the last layer is not trained, and only the features are worth evaluating.
    """

    implementation: ClassVar[str] = "permafrost.losses.projected_features:FeaturesLoss"
    is_term: ClassVar[bool] = True
    trained_by: ClassVar[tuple[str, ...]] = ("lambda_ce", "lambda_kd", "lambda_features")
    has_mix_rule: ClassVar[bool] = True

    kind: Literal["features"] = "features"
    lambda_ce: Annotated[float, Ge(0)] = 0.0
    lambda_features: Annotated[float, Ge(0)] = 1.0
    """Weight of the comparison of features; 0 disables it, and no stage is read."""
    stages: tuple[int, ...] = (-1,)
    """Stages of the student, counted from 1 at the finest or from -1 at the deepest."""
    teacher_stages: tuple[int, ...] = ()
    """Stage of the teacher to compare with each of method.stages, counted from 1 at its finest or from -1 at the
    deepest one of the pass; empty takes the same numbers."""
    distance: Literal["cosine", "mse"] = "cosine"
    """Distance of two features. cosine: 1 - cosine over the channels, mean over positions. mse: mean squared
    difference over channels and positions, in the teacher's units, or those of standardize."""
    standardize: Annotated[Standardization, Role.IF_SET] = "none"
    """Affine map of the teacher's features before the comparison, from the statistics of its stored values. channel:
    each channel gets mean 0 and variance 1. phi_s: the same after a rotation, with one factor for all channels (PHI-S,
    arXiv 2410.01680), so that all distances keep their ratios. For teachers of different scales in method=several."""
    map_control: MapControl = "none"
    """Negative control: the features of another record of the batch (shuffled), or those of the canonical view
    without the view's warp (unaugmented; with mode=replay, those of the record's first stored view)."""

    def _check_together(self) -> None:
        super()._check_together()
        require(len(self.stages) > 0, "method.stages=[] names no stage; name at least one")
        require(
            0 not in self.teacher_stages and len(self.teacher_stages) in (0, len(self.stages)),
            f"method.teacher_stages={list(self.teacher_stages)} must name one stage, from 1 or from -1, for each of "
            f"method.stages={list(self.stages)}, or be empty",
        )

    def check(self, setting: MethodSetting) -> None:
        if self.lambda_features > 0:
            check_map_control(self.map_control, setting)


@dataclass(frozen=True, kw_only=True)
class EmbeddingConfig(FeatureKDConfig):
    """Pooled features: through a linear map, or their relations in the batch (RKD, Park et al. 2019), or both.

    The features are those of a pass with the output pooled, or of a live teacher. Without lambda_ce and lambda_kd the
    last layer is not trained, and only the features are worth evaluating (evaluators=[knn,linear_probe]).
    """

    implementation: ClassVar[str] = "permafrost.losses.projected_features:EmbeddingLoss"
    is_term: ClassVar[bool] = True
    trained_by: ClassVar[tuple[str, ...]] = (
        "lambda_ce",
        "lambda_kd",
        "lambda_embedding",
        "lambda_distance",
        "lambda_angle",
    )
    has_mix_rule: ClassVar[bool] = True

    kind: Literal["embedding"] = "embedding"
    lambda_ce: Annotated[float, Ge(0)] = 0.0
    lambda_embedding: Annotated[float, Ge(0)] = 1.0
    """Weight of the distance from the teacher's embedding; 0 disables it, and no map is trained."""
    distance: Literal["cosine", "mse"] = "cosine"
    """Distance of two embeddings. cosine: 1 - cosine. mse: mean squared difference, in the teacher's units, or
    those of standardize."""
    standardize: Annotated[Standardization, Role.IF_SET] = "none"
    """Affine map of the teacher's embedding before the comparison, from the statistics of its stored values. channel:
    each channel gets mean 0 and variance 1. phi_s: the same after a rotation, with one factor for all channels (PHI-S,
    arXiv 2410.01680), so that all distances keep their ratios. For teachers of different scales in method=several."""
    lambda_distance: Annotated[float, Ge(0)] = 0.0
    """Weight of RKD's distances between the records of a batch, relative to their mean (25 in the paper)."""
    lambda_angle: Annotated[float, Ge(0)] = 0.0
    """Weight of RKD's angles between any three records of a batch (50 in the paper). Memory grows with batch size
    cubed, on each rank."""

    def check(self, setting: MethodSetting) -> None:
        trainer = setting.trainer
        for option, records in (("lambda_distance", 2), ("lambda_angle", 3)):
            require(
                getattr(self, option) == 0 or trainer.batch_size >= records,
                f"method.{option} compares {records} records, and trainer.batch_size={trainer.batch_size} has fewer; "
                "raise it",
            )

    def check_mix_rule(self, mode: Mode) -> None:
        super().check_mix_rule(mode)
        for option in ("lambda_distance", "lambda_angle"):
            require(
                mode == "live" or getattr(self, option) == 0,
                f"method.{option} compares relations of records, which are unknown for mixtures in mode={mode}; set it "
                "to 0, or augment.mix=[]",
            )


@dataclass(frozen=True, kw_only=True)
class TeacherTermOptions(Options):
    """Term of method=several: a method, the pass that it reads, and its weight."""

    section: ClassVar[str] = "method.terms"

    teacher: str
    """Pass that the term reads, named as in store.teacher."""
    method: MethodConfig
    """Method with its options, as in {kind: features, stages: [-1]}, or its name alone."""
    weight: Annotated[float, Gt(0)] = 1.0
    """Factor of the whole loss of that method."""

    def reads(self, name: str) -> bool:
        """Return whether the term reads the pass whose folder has this name."""
        return self.teacher in (name, *name.rsplit("-", 1))


@dataclass(frozen=True, kw_only=True)
class SeveralConfig(MethodConfig):
    """Several methods at once, each on a pass of its own: total = sum over terms of weight * the method's loss.

    A term is {teacher: <pass>, method: <method>, weight: <factor>}, its method a name or a mapping of its kind and
    options. The passes are those that the terms name, so store.teacher stays empty. They may have different outputs,
    and only those that a term compares logits or maps with need them. Each method's own terms (method.lambda_ce and so
    on) are part of its loss, so the labels belong into one term.
    """

    implementation: ClassVar[str] = "permafrost.losses.several:SeveralLoss"
    minimal: ClassVar[tuple[str, ...]] = ("method.terms=[{teacher: pass, method: kd}]",)

    kind: Literal["several"] = "several"
    terms: tuple[TeacherTermOptions, ...] = ()
    """Terms of the loss."""
    balance: Annotated[Literal["fixed", "uncertainty"], Role.IF_SET] = "fixed"
    """Further factors of the terms. fixed: none. uncertainty: exp(-s) for each term, where s is trained with the
    student and adds s to the loss (Kendall et al. 2018, arXiv 1705.07115)."""
    drop_teachers: Annotated[float, Ge(0), Lt(1), Role.IF_SET] = 0.0
    """Probability with which a step leaves out a term, drawn for each but the term of the largest weighted loss. UNIC
    (arXiv 2408.05088) draws for each image, and this for each batch; 0 leaves out none."""

    @property
    def pass_names(self) -> tuple[str, ...]:
        """Passes that the terms name, each once."""
        return tuple(dict.fromkeys(term.teacher for term in self.terms))

    @property
    def trains_classifier(self) -> bool:
        return any(term.method.trains_classifier for term in self.terms)

    def _check_together(self) -> None:
        for number, term in enumerate(self.terms):
            where, method = f"method.terms[{number}]", term.method
            allowed = ", ".join(kind for kind, cls in METHODS.items() if cls.is_term)
            require(
                method.is_term,
                f"{where}.method={method.kind} cannot be a term of method=several; choose among {allowed}",
            )
            require(
                getattr(method, "map_control", "none") == "none",
                f"{where}.method: map_control is a negative control of a single method; set it to none",
            )

    def check(self, setting: MethodSetting) -> None:
        require(
            len(self.terms) > 0,
            "method.terms=[] compares nothing; list terms, as in method.terms=[{teacher: dino, method: features}, "
            "{teacher: resnet, method: kd}]",
        )
        require(
            setting.mode != "live",
            "method=several reads the passes that its terms name, and mode=live has one teacher and no pass; set "
            "mode=frozen or mode=replay",
        )
        for term in self.terms:
            term.method.check(setting)

    def check_mix_rule(self, mode: Mode) -> None:
        for term in self.terms:
            term.method.check_mix_rule(mode)


METHODS: Family[type[MethodConfig]] = Family(
    {
        cls.kind: cls
        for cls in (
            LabelsConfig,
            KDConfig,
            DKDConfig,
            E2KDConfig,
            ATConfig,
            CatKDConfig,
            FeaturesConfig,
            EmbeddingConfig,
            SeveralConfig,
        )
    }
)
"""Methods of distillation (`method=`) by name."""
