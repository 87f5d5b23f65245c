"""The sections that each verb reads, and the families whose member is chosen by `kind`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from pipeline.config.augment import AugmentConfig
from pipeline.config.cluster import (
    ClusterConfig,
    Executor,
    ExistingClusterConfig,
    KubeRayClusterConfig,
    LocalClusterConfig,
)
from pipeline.config.data import (
    DataConfig,
    DemoDataConfig,
    ImageFolderDataConfig,
    ImageTableDataConfig,
    TinyImageNetDataConfig,
    TorchvisionDataConfig,
    WebDatasetDataConfig,
)
from pipeline.config.errors import require
from pipeline.config.models import (
    CifarModelConfig,
    ExplainerConfig,
    GradCamConfig,
    ModelConfig,
    NoModelConfig,
    TimmModelConfig,
    TorchvisionModelConfig,
)
from pipeline.config.store import PassConfig, StoreConfig, SubsetConfig
from pipeline.config.training import (
    E2KDConfig,
    KDConfig,
    LabelsConfig,
    LabelTeachingConfig,
    MethodConfig,
    OptimizerConfig,
    TeachingConfig,
    TrainerConfig,
)


@dataclass(frozen=True, kw_only=True)
class PrecomputeConfig:
    """Sections that `stages.precompute` reads."""

    data: DataConfig
    store: StoreConfig
    teacher: ModelConfig | NoModelConfig
    explainer: ExplainerConfig
    annotate: PassConfig
    cluster: ClusterConfig
    executor: Executor = "ray"
    run: str = "untitled"
    """Folder below runs/, in all stages; an absolute one is taken as it is (on a cluster it must be)."""


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

    def __post_init__(self) -> None:
        require(
            self.student.frame == "full",
            "student.frame=center_crop is an option of teachers; a student's views are augment.operations",
        )
        require(
            self.student.weights != "random",
            "student.weights=random would start every seed alike; leave it null for a start that seed= decides",
        )


@dataclass(frozen=True, kw_only=True)
class EvaluateOptions:
    """What an evaluation looks at."""

    splits: tuple[str, ...] = ("test",)
    """Of the store; `holdout` is what subset.holdout kept out of the student's own training."""
    batch_size: int = 256
    frame: Literal["auto", "center_crop", "full"] = "auto"
    """What part of an image is judged: all of it, or the field's centre crop of 7/8 of the shorter side
    in the original's proportions. auto takes all where the student's input is the canonical frame."""
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
    accuracy and agreement of the split `test`."""
    baseline: str = "kd"
    candidate: str = "e2kd"
    """The paired difference is candidate - baseline, seed by seed."""
    paired_column: str = "accuracy"
    next_command: str = ""
    """Printed last: what to try now."""
    contact_records: int = 8
    """Records on the contact sheet of the store and its teachers' maps; 0 leaves it out."""
    contact_views: int = 2
    """Random views (`augment=`) of each of them."""

    def __post_init__(self) -> None:
        if not self.columns:
            object.__setattr__(self, "columns", {n: f"test.{n}" for n in ("accuracy", "agreement")})
        for name in ("contact_records", "contact_views"):
            require(
                getattr(self, name) >= 0, f"report.{name} must be >= 0, got {getattr(self, name)}"
            )
        require(
            self.paired_column in self.columns,
            f"report.paired_column={self.paired_column} is not one of report.columns: {', '.join(self.columns)}",
        )


@dataclass(frozen=True, kw_only=True)
class ReportConfig:
    """Sections that `stages.report` reads."""

    store: StoreConfig
    augment: AugmentConfig
    report: ReportOptions
    run: str = "untitled"


@dataclass(frozen=True, kw_only=True)
class RenderConfig:
    """What `stages.render` reads; all other words are those of the verb that the job runs."""

    cluster: KubeRayClusterConfig
    verb: Literal["precompute", "teach", "verify", "distill", "evaluate", "sweep", "report"] = (
        "precompute"
    )
    words: tuple[str, ...] = ()
    """The verb's own, as they were typed."""
    output: str | None = None
    """File to write; null prints the manifest."""


_MODELS: dict[str, type[Any]] = {
    "cifar": CifarModelConfig,
    "torchvision": TorchvisionModelConfig,
    "timm": TimmModelConfig,
}

KINDS: dict[str, dict[str, type[Any]]] = {
    "data": {
        "demo": DemoDataConfig,
        "image_folder": ImageFolderDataConfig,
        "image_table": ImageTableDataConfig,
        "webdataset": WebDatasetDataConfig,
        "torchvision": TorchvisionDataConfig,
        "tiny_imagenet": TinyImageNetDataConfig,
    },
    "teacher": {"none": NoModelConfig, **_MODELS},
    "student": _MODELS,
    "explainer": {"gradcam": GradCamConfig},
    "teaching": {"labels": LabelTeachingConfig},
    "method": {"labels": LabelsConfig, "kd": KDConfig, "e2kd": E2KDConfig},
    "cluster": {
        "local": LocalClusterConfig,
        "existing": ExistingClusterConfig,
        "kuberay": KubeRayClusterConfig,
    },
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
    "render": RenderConfig,
}
