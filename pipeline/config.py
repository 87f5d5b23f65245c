"""Every option, its default and its limits, as frozen dataclasses.

A section with a `kind` is one of several dataclasses (KINDS, at the end); the kind is the name of the
YAML file in its group of conf/. Sections are built from composed YAML by config_builder.py.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from pipeline.errors import UserError


class ConfigError(UserError, ValueError):
    """An option that cannot be meant; the message names it, its value and the way out."""


def require(condition: bool, message: str) -> None:
    """Raise ConfigError(message) unless the condition holds."""
    if not condition:
        raise ConfigError(message)


# ---- data, models, explanations ------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class DemoDataConfig:
    """The embedded demo set (pipeline/sources/demo.py)."""

    kind: Literal["demo"] = "demo"
    seed: int = 0
    image_size: int = 32
    """Pixels a side."""
    test_digits: int = 350
    train_digits: int = 700
    """Of the digits that no test has."""
    teacher_digits: int | None = None
    """Likewise; null takes them all."""
    teacher_placements: int = 3
    """Pastes of each digit."""
    train_placements: int = 1
    test_placements: int = 2
    min_digit_size: int = 12
    max_digit_size: int = 20

    def __post_init__(self) -> None:
        for name in (
            "teacher_placements",
            "train_placements",
            "test_placements",
            "test_digits",
            "train_digits",
        ):
            require(
                getattr(self, name) >= 1, f"data.{name} must be >= 1, got {getattr(self, name)}"
            )
        require(
            self.test_digits + max(self.train_digits, self.teacher_digits or 1) <= 1797,
            "data.test_digits leaves too few of the 1797 digits for data.train_digits or "
            f"data.teacher_digits: {self.test_digits}, {self.train_digits}, {self.teacher_digits}",
        )
        require(self.seed >= 0, f"data.seed must be >= 0, got {self.seed}")
        require(
            self.teacher_digits is None or self.teacher_digits >= 1,
            f"data.teacher_digits must be >= 1 or null, got {self.teacher_digits}",
        )
        require(
            8 <= self.min_digit_size <= self.max_digit_size <= self.image_size <= 80,
            "data needs 8 <= min_digit_size <= max_digit_size <= image_size <= 80, got "
            f"{self.min_digit_size}, {self.max_digit_size}, {self.image_size}",
        )


DataConfig = DemoDataConfig


@dataclass(frozen=True, kw_only=True)
class NoModelConfig:
    """No network: a store that is only packed, a student that trains on labels."""

    kind: Literal["none"] = "none"
    name: ClassVar[str] = "none"


@dataclass(frozen=True, kw_only=True)
class CifarModelConfig:
    """A ResNet for small images (He et al. 2016, section 4.2): resnet8, resnet20, ... of depth 6n + 2."""

    kind: Literal["cifar"] = "cifar"
    name: str = "resnet20"
    width: int = 16
    """Channels of the first of three stages."""
    stem_stride: int = 1
    """2 halves the resolution at once: a quarter of the cost, half the map's grid."""
    mean: tuple[float, ...] = (0.485, 0.456, 0.406)
    std: tuple[float, ...] = (0.229, 0.224, 0.225)
    weights: str | None = None
    """File with trained weights (.safetensors, or .pt/.pth/.th loaded with weights_only)."""

    def __post_init__(self) -> None:
        depth = self.name.removeprefix("resnet")
        require(
            self.name.startswith("resnet")
            and depth.isdigit()
            and int(depth) % 6 == 2
            and int(depth) >= 8,
            f"cifar models are named resnet8, resnet14, resnet20, ... (depth 6n + 2), got {self.name!r}",
        )
        require(self.width >= 1, f"width must be >= 1, got {self.width}")
        require(self.stem_stride in (1, 2), f"stem_stride must be 1 or 2, got {self.stem_stride}")
        require(
            len(self.mean) == len(self.std) == 3 and min(self.std) > 0,
            f"mean and std need three values, std > 0; got {self.mean} and {self.std}",
        )


ModelConfig = CifarModelConfig


@dataclass(frozen=True, kw_only=True)
class GradCamConfig:
    """GradCAM at the model's last convolutional stage, on its own grid."""

    kind: Literal["gradcam"] = "gradcam"
    explained_classes: Literal["top1"] = "top1"
    """Which classes the teacher explains: its own highest logit."""


ExplainerConfig = GradCamConfig


# ---- the store -----------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class StoreConfig:
    """Where a store lies and how it is written; of a store that exists, only `path` matters to readers."""

    path: str = "stores/demo"
    backend: Literal["zarr", "webdataset"] = "zarr"
    """Of teacher columns."""
    shard_size: int = 512
    """Records a shard: the unit of work, retry and checksum."""
    seed: int = 0
    """Of the global permutation that decides which record goes to which shard."""
    teacher: str | None = None
    """Which pass to read, where the store holds several: its folder's name, or the 8 digits at its end."""

    def __post_init__(self) -> None:
        require(self.path != "", "store.path is empty; give the folder to write")
        require(
            "://" not in self.path,
            f"store.path must be a local or mounted folder, got {self.path!r}; object storage is not supported yet",
        )
        require(0 <= self.seed < 2**63, f"store.seed must be >= 0, got {self.seed}")
        require(self.shard_size >= 1, f"store.shard_size must be >= 1, got {self.shard_size}")


@dataclass(frozen=True, kw_only=True)
class PassConfig:
    """What a teacher pass computes and stores."""

    payloads: tuple[Literal["logits", "map"], ...] = ("logits", "map")
    map_dtype: Literal["float16", "int8"] = "float16"
    batch_size: int = 64
    """Records a teacher forward; constant, since it may change the last bits of the result."""
    min_fidelity: float = 0.999
    """Lowest cosine between a map and its stored form that may be written."""

    def __post_init__(self) -> None:
        require("logits" in self.payloads, "annotate.payloads must contain logits")
        require(
            len(set(self.payloads)) == len(self.payloads),
            f"annotate.payloads names one twice: {self.payloads}",
        )
        require(self.batch_size >= 1, f"annotate.batch_size must be >= 1, got {self.batch_size}")
        require(
            0 <= self.min_fidelity <= 1,
            f"annotate.min_fidelity must be in [0, 1], got {self.min_fidelity}",
        )


@dataclass(frozen=True, kw_only=True)
class SubsetConfig:
    """Which records of the training split a run reads; the store itself always holds the whole set."""

    shots: int | None = None
    """Records of each class; null takes all."""
    seed: int = 0
    """Apart from `seed`, so that the shots stay fixed while initialisation varies."""
    holdout: int = 0
    """Records of each class kept out of training for validation; taken before the shots."""

    def __post_init__(self) -> None:
        require(
            self.shots is None or self.shots >= 1,
            f"subset.shots must be >= 1 or null, got {self.shots}",
        )
        require(self.holdout >= 0, f"subset.holdout must be >= 0, got {self.holdout}")


# ---- geometry ------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class OperationConfig:
    """One random geometric operation; which options it reads depends on its kind."""

    kind: Literal[
        "pad_crop", "resized_crop", "horizontal_flip", "vertical_flip", "rotation", "affine"
    ]
    p: float = 0.5
    """Probability, of flips, rotations and affine maps; drawn for each record."""
    padding: int = 4
    """pad_crop: pixels of zeros on each side."""
    scale: tuple[float, float] | None = None
    """resized_crop: range of the crop's share of the area, null is (0.08, 1). affine: range of the zoom."""
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    """resized_crop: range of width / height."""
    degrees: float = 0.0
    """rotation, affine: up to this angle either way."""
    translate: tuple[float, float] | None = None
    """affine: up to this fraction of width and height either way."""
    shear: float | None = None
    """affine: up to this angle in degrees either way."""

    def __post_init__(self) -> None:
        require(0 <= self.p <= 1, f"augment {self.kind}: p must be in [0, 1], got {self.p}")
        require(self.padding >= 0, f"augment {self.kind}: padding must be >= 0, got {self.padding}")
        if self.scale is not None:
            low, high = self.scale
            top = 1.0 if self.kind == "resized_crop" else float("inf")
            require(
                0 < low <= high <= top,
                f"augment {self.kind}: scale must be 0 < low <= high{' <= 1' if top == 1 else ''}, got {self.scale}",
            )
        require(self.degrees >= 0, f"augment {self.kind}: degrees must be >= 0, got {self.degrees}")
        require(
            self.degrees <= 180, f"augment {self.kind}: degrees must be <= 180, got {self.degrees}"
        )
        require(
            self.shear is None or 0 <= self.shear < 90,
            f"augment {self.kind}: shear must be in [0, 90) or null, got {self.shear}",
        )
        require(
            self.translate is None or 0 <= min(self.translate) <= max(self.translate) <= 1,
            f"augment {self.kind}: translate must be two fractions in [0, 1] or null, got {self.translate}",
        )
        require(
            0 < self.ratio[0] <= self.ratio[1],
            f"augment {self.kind}: ratio must be 0 < low <= high, got {self.ratio}",
        )


@dataclass(frozen=True, kw_only=True)
class AugmentConfig:
    """How the student's view is drawn; the same matrix moves the image and its maps."""

    operations: tuple[OperationConfig, ...] = ()
    """Applied in this order, all in one warp."""
    size: int | None = None
    """Side of the student's input in pixels; null takes the canonical frame's."""

    def __post_init__(self) -> None:
        require(
            self.size is None or self.size >= 8,
            f"augment.size must be >= 8 or null, got {self.size}",
        )


# ---- what is optimised ---------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class LabelsConfig:
    """Labels only: the supervised baseline."""

    kind: Literal["labels"] = "labels"
    label_smoothing: float = 0.0

    def __post_init__(self) -> None:
        require(
            0 <= self.label_smoothing < 1,
            f"label_smoothing must be in [0, 1), got {self.label_smoothing}",
        )


@dataclass(frozen=True, kw_only=True)
class KDConfig:
    """Soft targets (Hinton et al. 2015): total = lambda_ce * ce + lambda_kd * kd."""

    kind: Literal["kd"] = "kd"
    tau: float = 1.0
    """Temperature of the soft targets; > 0."""
    lambda_ce: float = 0.0
    lambda_kd: float = 1.0

    def __post_init__(self) -> None:
        require(self.tau > 0, f"method.tau must be > 0, got {self.tau}")
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
    """Divide the sum over valid maps by all maps of the batch (the paper's lambda) or by the valid ones."""
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


MethodConfig = LabelsConfig | KDConfig | E2KDConfig


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
    schedule: Literal["cosine", "constant"] = "cosine"
    """After the warm-up: to zero along a cosine, or not at all; set once an epoch."""
    warmup_epochs: int = 0
    """Linear from 0.01 * lr."""
    clip_norm: float | None = 1.0
    """Largest global gradient norm; null does not clip."""
    device: str = "auto"
    """auto takes a GPU where there is one."""
    num_threads: int | None = None
    """Of torch on the CPU; null leaves torch's own choice."""
    loader_processes: int = 0
    checkpoint_every_epochs: int = 1
    log_every_steps: int = 20

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size", "checkpoint_every_epochs", "log_every_steps"):
            require(
                getattr(self, name) >= 1, f"trainer.{name} must be >= 1, got {getattr(self, name)}"
            )
        require(
            0 <= self.warmup_epochs < self.epochs,
            f"trainer.warmup_epochs must be in [0, epochs), got {self.warmup_epochs} of {self.epochs}",
        )
        require(
            self.clip_norm is None or self.clip_norm > 0,
            f"trainer.clip_norm must be > 0 or null, got {self.clip_norm}",
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
    label_smoothing: float = 0.0
    split: str = "train"
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    augment: AugmentConfig = field(default_factory=AugmentConfig)


TeachingConfig = LabelTeachingConfig


# ---- where it runs -------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class LocalClusterConfig:
    """A Ray that is started for this run on this machine and ends with it."""

    kind: Literal["local"] = "local"
    actors: int = 1
    """Teacher replicas; each works on whole shards."""
    cpus_per_actor: float = 1.0
    gpus_per_actor: float = 0.0
    threads_per_actor: int = 1
    """Of torch; part of what makes bytes equal, so also used by the serial executor."""
    max_restarts: int = 3
    """Of an actor that dies."""

    def __post_init__(self) -> None:
        require(self.actors >= 1, f"cluster.actors must be >= 1, got {self.actors}")
        require(
            self.cpus_per_actor > 0,
            f"cluster.cpus_per_actor must be > 0, got {self.cpus_per_actor}",
        )
        require(
            self.gpus_per_actor >= 0,
            f"cluster.gpus_per_actor must be >= 0, got {self.gpus_per_actor}",
        )
        require(
            self.threads_per_actor >= 1,
            f"cluster.threads_per_actor must be >= 1, got {self.threads_per_actor}",
        )


ClusterConfig = LocalClusterConfig
Executor = Literal["ray", "serial"]


# ---- one dataclass per verb ----------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class PrecomputeConfig:
    """Sections that `stages.precompute` reads."""

    data: DataConfig
    store: StoreConfig
    teacher: CifarModelConfig | NoModelConfig
    explainer: ExplainerConfig
    annotate: PassConfig
    cluster: ClusterConfig
    executor: Executor = "ray"
    run: str = "untitled"


@dataclass(frozen=True, kw_only=True)
class TeachConfig:
    """Sections that `stages.teach` reads: `teacher` is the network, trained on a store's labels."""

    store: StoreConfig
    teacher: ModelConfig
    teaching: TeachingConfig
    evaluate: EvaluateOptions
    seed: int = 0
    run: str = "untitled"


@dataclass(frozen=True, kw_only=True)
class VerifyConfig:
    """Sections that `stages.verify` reads."""

    store: StoreConfig


@dataclass(frozen=True, kw_only=True)
class DistillConfig:
    """Sections that `stages.distill` reads: a store, never data or a teacher."""

    store: StoreConfig
    student: ModelConfig
    method: MethodConfig
    augment: AugmentConfig
    optimizer: OptimizerConfig
    trainer: TrainerConfig
    subset: SubsetConfig
    mode: Literal["frozen"] = "frozen"
    split: str = "train"
    seed: int = 0
    run: str = "untitled"


@dataclass(frozen=True, kw_only=True)
class EvaluateOptions:
    """What an evaluation looks at."""

    splits: tuple[str, ...] = ("test",)
    batch_size: int = 256
    region: Literal["boxes", "masks"] = "boxes"
    """Where an explanation should lie, for EPG and IoU."""
    iou_threshold: float = 0.05
    """On the map scaled to [0, 1]; strict."""
    num_pictures: int = 8
    """Records whose maps are kept for the report, about as many of each split."""
    device: str = "auto"

    def __post_init__(self) -> None:
        require(
            len(self.splits) > 0, "evaluate.splits is empty; name at least one split of the store"
        )
        require(self.batch_size >= 1, f"evaluate.batch_size must be >= 1, got {self.batch_size}")
        require(
            0 <= self.iou_threshold < 1,
            f"evaluate.iou_threshold must be in [0, 1), got {self.iou_threshold}",
        )
        require(
            self.num_pictures >= 0, f"evaluate.num_pictures must be >= 0, got {self.num_pictures}"
        )


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """Sections that `stages.evaluate` reads; the student is the one that `run` names."""

    store: StoreConfig
    evaluate: EvaluateOptions
    run: str = "untitled"


@dataclass(frozen=True, kw_only=True)
class SweepConfig:
    """Sections that `stages.sweep` reads on top of those of distill and evaluate."""

    arms: dict[str, tuple[str, ...]]
    """Name of an arm -> its overrides of the distill options."""
    seeds: tuple[int, ...] = (0, 1, 2)
    parallel: int = 2
    """Students trained side by side, each in its own process with one thread."""
    run: str = "untitled"

    def __post_init__(self) -> None:
        require(
            len(self.arms) > 0,
            "arms is empty; choose experiment=... or give arms={name: [overrides]}",
        )
        require(len(self.seeds) > 0, "seeds is empty; give at least one, as in seeds=[0,1,2]")
        require(
            len(set(self.seeds)) == len(self.seeds), f"seeds names one twice: {list(self.seeds)}"
        )
        require(self.parallel >= 1, f"parallel must be >= 1, got {self.parallel}")


@dataclass(frozen=True, kw_only=True)
class ReportOptions:
    """What a report shows."""

    title: str = "Distillation report"
    columns: dict[str, str] = field(default_factory=dict)
    """Name -> <split>.<metric> of evaluate, or all.<metric> for the mean over splits; empty takes
    accuracy, agreement and EPG of the split `test`."""
    baseline: str = "kd"
    candidate: str = "e2kd"
    """The paired difference is candidate - baseline, seed by seed."""
    paired_column: str = "accuracy"
    next_command: str = ""
    """Printed last: what to try now."""

    def __post_init__(self) -> None:
        if not self.columns:
            object.__setattr__(
                self, "columns", {n: f"test.{n}" for n in ("accuracy", "agreement", "epg")}
            )
        require(
            self.paired_column in self.columns,
            f"report.paired_column={self.paired_column} is not one of report.columns: {', '.join(self.columns)}",
        )


@dataclass(frozen=True, kw_only=True)
class ReportConfig:
    """Sections that `stages.report` reads."""

    store: StoreConfig
    report: ReportOptions
    run: str = "untitled"


KINDS: dict[str, dict[str, type[Any]]] = {
    "data": {"demo": DemoDataConfig},
    "teacher": {"none": NoModelConfig, "cifar": CifarModelConfig},
    "student": {"cifar": CifarModelConfig},
    "explainer": {"gradcam": GradCamConfig},
    "teaching": {"labels": LabelTeachingConfig},
    "method": {"labels": LabelsConfig, "kd": KDConfig, "e2kd": E2KDConfig},
    "cluster": {"local": LocalClusterConfig},
}
"""Sections whose dataclass is chosen by their `kind`, which is also the YAML file's name."""

VERBS: dict[str, type[Any]] = {
    "precompute": PrecomputeConfig,
    "teach": TeachConfig,
    "verify": VerifyConfig,
    "distill": DistillConfig,
    "evaluate": EvaluateConfig,
    "sweep": SweepConfig,
    "report": ReportConfig,
}
