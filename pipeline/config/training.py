"""What is optimised, and how long (`method=`, `optimizer=`, `trainer=`, `teaching=`)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from pipeline.config.augment import AugmentConfig
from pipeline.config.errors import require

LabelLoss = Literal["ce", "bce", "bce_offlabel"]


def _check_label_loss(loss: str, label_smoothing: float) -> None:
    require(0 <= label_smoothing < 1, f"label_smoothing must be in [0, 1), got {label_smoothing}")
    require(
        loss == "ce" or label_smoothing == 0,
        f"label_smoothing={label_smoothing} is an option of loss=ce; loss={loss} asks of each class on its own, "
        "set label_smoothing=0",
    )


def check_mixup_partners(augment: AugmentConfig, trainer: TrainerConfig) -> None:
    """ConfigError where a record of a rank's slice would be mixed with itself."""
    require(
        augment.mixup_alpha is None or trainer.batch_size > trainer.ranks,
        f"augment.mixup_alpha={augment.mixup_alpha}: trainer.batch_size={trainer.batch_size} leaves each of "
        f"{trainer.ranks} ranks one record and none to mix it with; raise it",
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
        _check_label_loss(self.loss, self.label_smoothing)


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


MethodConfig = (
    LabelsConfig | KDConfig | E2KDConfig | ATConfig | CatKDConfig | ReviewKDConfig | KEDConfig
)


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """One of torch's optimisers; weight decay applies to all parameters, as in the papers."""

    kind: Literal["adamw", "adam", "sgd"] = "adamw"
    lr: float = 3e-3
    weight_decay: float = 1e-4
    momentum: float = 0.9
    """Of sgd."""

    def __post_init__(self) -> None:
        require(self.lr > 0, f"optimizer.lr must be > 0, got {self.lr}")
        require(
            self.weight_decay >= 0, f"optimizer.weight_decay must be >= 0, got {self.weight_decay}"
        )
        require(
            0 <= self.momentum < 1, f"optimizer.momentum must be in [0, 1), got {self.momentum}"
        )


@dataclass(frozen=True, kw_only=True)
class TrainerConfig:
    """How long and in what steps a network is trained."""

    epochs: int = 30
    batch_size: int = 64
    """Records of a global batch."""
    schedule: Literal["cosine", "decay", "constant"] = "cosine"
    """After the warm-up: to zero along a cosine, down by a factor now and then, or not at all. The rate is set
    once an epoch, or in every step with warmup_steps."""
    warmup_epochs: int = 0
    """Linear from 0.01 * lr."""
    warmup_steps: int | None = None
    """The same in steps, instead, as ViTs are trained; null counts epochs."""
    decay: float = 0.1
    """Of schedule=decay: the factor, every decay_every_epochs."""
    decay_every_epochs: int = 30
    clip_norm: float | None = 1.0
    """Largest global gradient norm; null does not clip."""
    agc: float | None = None
    """Adaptive clipping instead, as B-cos networks are trained with (0.01): the largest norm of a unit's
    gradient in norms of its weight. Needs clip_norm=null."""
    ranks: int = 1
    """Processes that train together, each on its slice of the global batch; above 1 by Ray Train."""
    device: str = "auto"
    """auto takes a GPU where there is one."""
    precision: Literal["float32", "bfloat16", "float16"] = "float32"
    """Of the forward and backward pass (torch.autocast); losses and explanations stay float32."""
    compile: bool = False
    """torch.compile of the student's forward pass, where its explanation needs no double backward."""
    channels_last: bool = False
    """Memory format of the network and its images: faster convolutions in half precision."""
    num_threads: int | None = None
    """Of torch on the CPU; null leaves torch's own choice."""
    loader_processes: int = 0
    checkpoint_every_epochs: int = 1
    checkpoint_every_steps: int | None = None
    """Also within an epoch, for epochs that are too long to lose."""
    log_every_steps: int = 20

    def __post_init__(self) -> None:
        for name in (
            "epochs",
            "batch_size",
            "ranks",
            "decay_every_epochs",
            "checkpoint_every_epochs",
            "log_every_steps",
        ):
            require(
                getattr(self, name) >= 1, f"trainer.{name} must be >= 1, got {getattr(self, name)}"
            )
        require(
            self.batch_size % self.ranks == 0,
            f"trainer.batch_size={self.batch_size} is not a multiple of trainer.ranks={self.ranks}",
        )
        require(
            self.checkpoint_every_steps is None or self.checkpoint_every_steps >= 1,
            f"trainer.checkpoint_every_steps must be >= 1 or null, got {self.checkpoint_every_steps}",
        )
        require(
            0 <= self.warmup_epochs < self.epochs,
            f"trainer.warmup_epochs must be in [0, epochs), got {self.warmup_epochs} of {self.epochs}",
        )
        require(
            self.warmup_steps is None or (self.warmup_steps >= 1 and self.warmup_epochs == 0),
            f"trainer.warmup_steps={self.warmup_steps} must be >= 1 and takes the place of "
            f"trainer.warmup_epochs={self.warmup_epochs}; set that one to 0",
        )
        require(0 < self.decay < 1, f"trainer.decay must be in (0, 1), got {self.decay}")
        require(
            self.clip_norm is None or self.clip_norm > 0,
            f"trainer.clip_norm must be > 0 or null, got {self.clip_norm}",
        )
        require(
            self.agc is None or self.agc > 0, f"trainer.agc must be > 0 or null, got {self.agc}"
        )
        require(
            self.agc is None or self.clip_norm is None,
            f"trainer.agc={self.agc} takes the place of trainer.clip_norm={self.clip_norm}; set "
            "trainer.clip_norm=null beside it",
        )
        require(
            self.loader_processes >= 0,
            f"trainer.loader_processes must be >= 0, got {self.loader_processes}",
        )
        require(
            self.num_threads is None or self.num_threads >= 1,
            f"trainer.num_threads must be >= 1 or null, got {self.num_threads}",
        )


@dataclass(frozen=True, kw_only=True)
class LabelTeachingConfig:
    """Train a teacher on labels, with its own optimiser, trainer and views."""

    kind: Literal["labels"] = "labels"
    loss: LabelLoss = "ce"
    """As of method=labels."""
    label_smoothing: float = 0.0
    start: str | None = None
    """File of weights to start from, whose last layer is drawn anew where its classes are others, or `pretrained`;
    null starts at random, or from teacher.weights=pretrained."""
    split: str = "train"
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    augment: AugmentConfig = field(default_factory=AugmentConfig)

    def __post_init__(self) -> None:
        _check_label_loss(self.loss, self.label_smoothing)
        check_mixup_partners(self.augment, self.trainer)


@dataclass(frozen=True, kw_only=True)
class GuidedTeachingConfig(LabelTeachingConfig):
    """Labels, and explanations that lie on the object (Rao et al. 2023): the papers' guided teachers."""

    kind: Literal["guided"] = "guided"  # type: ignore[assignment]
    localization: Literal["energy", "l1", "rrr", "ppce"] = "energy"
    """Of the attributions to one class of each record: their share inside, distance from the region, squares
    outside, or cross-entropy inside."""
    lambda_localization: float = 1e-3
    """Of their sum over the batch."""
    region: Literal["boxes", "masks"] = "boxes"
    pareto_split: str | None = None
    """Judge every epoch on this split and keep all that are best in F1 (accuracy), EPG and IoU, in pareto/
    of the run; null keeps the last epoch only."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(
            self.lambda_localization >= 0,
            f"teaching.lambda_localization must be >= 0, got {self.lambda_localization}",
        )
        self.augment.refuse_pixel_options(
            "teaching=guided pulls explanations onto regions, which are moved by the view's matrix alone; "
            "set teaching=labels",
            "teaching.augment",
        )


TeachingConfig = LabelTeachingConfig | GuidedTeachingConfig
