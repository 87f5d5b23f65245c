"""Options of KED: additive networks, the method, the training of a teacher, its explainer, output and evaluator."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, ClassVar, Literal

from annotated_types import Ge, Gt, Le

from permafrost.config.data import SOURCES
from permafrost.config.evaluation import EVALUATORS, EvaluatorOptions
from permafrost.config.explainers import EXPLAINERS, ExplainerConfig
from permafrost.config.methods import METHODS, MethodSetting, SoftTargetsConfig
from permafrost.config.models import (
    MODELS,
    CifarModelConfig,
    ModelConfig,
    NoModelConfig,
    TorchvisionModelConfig,
    is_published,
    rows_of_table,
)
from permafrost.config.options import Options, Role
from permafrost.config.store import OUTPUTS, STORE_SECTIONS, OutputInfo
from permafrost.config.teaching import TEACHINGS, LabelTeachingConfig
from permafrost.core.errors import ConfigError, require
from permafrost_papers.ked.data_options import (
    SklearnTableDataConfig,
    TableDataConfig,
    TinyImageNetDataConfig,
)
from permafrost_timm.options import TimmModelConfig

OUTPUT = "superfeature_logits"
HIDDEN_OUTPUT = "superfeature_hidden"
PARTITION_NAME = "partition.safetensors"
"""File with all levels of the partition that a run found, as read by the network option partition=<run folder>."""


@dataclass(frozen=True, kw_only=True)
class AdditiveModelConfig(ModelConfig):
    """Additive network that explains by superfeatures (KED): its logits are the sum over one subnet per superfeature.

    mlp: subnets on cells of the image, or on columns of a table. conv: grouped convolutions on masked copies of a
    small image. trunk: heads on the cells of one shared network (teacher and student agree cell by cell), or on groups
    of its channels.
    """

    implementation: ClassVar[str] = "permafrost_papers.ked.additive_network:PROVIDER"

    digests: ClassVar[str] = "permafrost_papers.ked.partition:partition_digests"
    table_options: ClassVar[tuple[str, ...]] = ("name=mlp",)
    pass_outputs: ClassVar[tuple[str, ...]] = ("logits", OUTPUT)

    kind: Literal["additive"] = "additive"
    name: Literal["mlp", "conv", "trunk"] = "trunk"
    superfeatures: int = 8
    """Number M of superfeatures at the finest level; every coarser level is saved with the weights."""
    partition: Annotated[str | None, Role.FILE, Role.OUTSIDE_IDENTITY, Role.IN_WEIGHTS] = None
    """Partition of cells or columns into superfeatures: a partition artifact's folder or its
    partition.safetensors. null takes contiguous blocks. A weights file contains its own partition, which takes
    precedence."""
    partition_control: Annotated[Literal["none", "random", "contiguous"], Role.IN_WEIGHTS] = "none"
    """Negative control: random groups of the same sizes (random), or contiguous blocks in place of the
    partition."""
    partition_seed: Annotated[int, Role.IN_WEIGHTS] = 0
    """Seed of partition_control=random."""
    grid: tuple[int, int] = (8, 8)
    """Grid (rows, columns) of the cells that are grouped, of the image or of the trunk's last stage (whose size
    it must match)."""
    columns: int | None = None
    """Number of columns of a table (name=mlp), each one feature. null takes the store's columns, or the grid's
    cells for a store of images."""
    width: int = 16
    """Width of each subnet: units of a hidden layer, or channels of a convolution. `constant` gives it another
    meaning."""
    constant: Literal["subnet_width", "total_width", "parameters"] = "subnet_width"
    """Quantity that `width` fixes and that superfeatures does not change. subnet_width: the width of each subnet.
    total_width: that of all subnets together, divided evenly; with name=mlp or conv the parameters then decrease with
    superfeatures, because each unit reads one group only. parameters: up to rounding, the parameters of a network
    with one superfeature and this width."""
    depth: int = 1
    """Depth of each subnet: layers before its last, linear one."""
    trunk: str = "resnet20"
    """Network below the heads with name=trunk, by its name in trunk_kind: resnet8, resnet14, resnet20, ... of kind
    cifar."""
    trunk_kind: Literal["cifar", "torchvision", "timm"] = "cifar"
    """Provider of the trunk, which is newly initialized."""
    trunk_features: Literal["cells", "channels"] = "cells"
    """Features of the trunk's last stage that are grouped: its cells, or its channels (in contiguous groups, as
    channels of two networks do not correspond)."""
    trunk_width: int = 16
    """Width of a trunk of kind cifar, as its `width`."""
    stem_stride: int = 1
    """Stride of the first convolution of a trunk of kind cifar, as its `stem_stride`."""

    def _check_together(self) -> None:
        super()._check_together()
        for option in ("superfeatures", "width", "depth", *(["columns"] if self.columns else [])):
            value = getattr(self, option)
            require(value >= 1, f"{option} must be >= 1, got {value}")
        require(min(self.grid) >= 1, f"grid must be [rows, columns] >= 1, got {list(self.grid)}")
        require(
            self.columns is None or self.name == "mlp",
            f"columns={self.columns} is an option of name=mlp, for tables; leave it null for name={self.name}",
        )
        require(
            self.infers_columns_from_store
            or self.features is None
            or self.superfeatures <= self.features,
            f"superfeatures={self.superfeatures} with {self.features} features: each needs at least one; lower "
            f"it{'' if self.columns else ', or choose a finer grid'}",
        )
        require(
            self.constant != "total_width" or self.width % self.superfeatures == 0,
            f"width={self.width} with constant=total_width is divided evenly over superfeatures={self.superfeatures}; "
            "choose a multiple of it",
        )
        require(
            self.partition_control != "random" or self.partition_seed >= 0,
            f"partition_seed must be >= 0, got {self.partition_seed}",
        )
        require(
            not is_published(self.weights),
            "weights=pretrained: no weights are published for kind additive; train a network with permafrost teach and "
            "set weights= to its model.safetensors",
        )
        if self.name == "mlp" and self.columns is None and self.input_size is not None:
            require(
                not any(self.input_size % side for side in self.grid),
                f"grid={list(self.grid)} does not divide input_size={self.input_size}; choose a divisor",
            )
        self._check_trunk()

    def _check_trunk(self) -> None:
        """Raise ConfigError if an option of the trunk is invalid or not read."""
        for option, reader, is_read in (
            ("trunk_kind", "name=trunk", self.name == "trunk"),
            ("trunk_features", "name=trunk", self.name == "trunk"),
            ("trunk_width", "trunk_kind=cifar", self.trunk_kind == "cifar"),
            ("stem_stride", "trunk_kind=cifar", self.trunk_kind == "cifar"),
            ("grid", "trunk_features=cells", self.trunk_features == "cells"),
        ):
            value, default = getattr(self, option), getattr(type(self), option)
            require(
                is_read or value == default,
                f"{option}={value} is an option of {reader}; leave it at {default}",
            )
        require(
            self.trunk_features == "cells" or self.partition is None,
            f"partition={self.partition} names groups of cells, and trunk_features=channels groups channels; set "
            "partition=null",
        )
        if self.name == "trunk":
            try:
                self.trunk_config  # noqa: B018, checks its name and width
            except ConfigError as error:
                raise ConfigError(
                    f"trunk: {error}; or set trunk_kind=torchvision or timm"
                ) from error

    @property
    def infers_columns_from_store(self) -> bool:
        """True if the number of features is known only from a table ."""
        return self.name == "mlp" and self.columns is None and self.input_size is None

    def input_shape(self, size: tuple[int, int]) -> tuple[int, ...]:
        return super().input_shape(size) if self.columns is None else (self.columns,)

    @property
    def learns_moments(self) -> bool:
        return self.columns is not None

    def resolve(self, option: str, store: str, columns: int | None) -> AdditiveModelConfig:
        if columns is None:
            require(
                not self.infers_columns_from_store,
                f"{option}.name=mlp needs the size of its images, and {store} holds images; set "
                f"{option}.input_size to their side in pixels",
            )
            require(
                self.columns is None,
                f"{option}.columns={self.columns} is for rows of a table, but {store} holds images; set it to null, or "
                "choose another store",
            )
            return self
        if self.name != "mlp":
            self.refuse_rows(option, store, columns)
        require(
            self.columns in (None, columns),
            f"{option}.columns={self.columns}, but {rows_of_table(store, columns)}; set it to null",
        )
        require(
            self.input_size is None and self.frame != "center_crop",
            f"{option}.input_size={self.input_size} and {option}.frame={self.frame} are for images, but "
            f"{rows_of_table(store, columns)}; set them to null and full",
        )
        return replace(self, columns=columns)

    @property
    def features(self) -> int | None:
        """Number d of features that are grouped, None for the channels of a trunk, which has to be built first."""
        cells = self.columns or self.grid[0] * self.grid[1]
        return None if self.trunk_features == "channels" else cells

    @property
    def is_input_mode(self) -> bool:
        """True if superfeatures are parts of the input itself, so that each subnet receives only its own part."""
        return self.name != "trunk"

    @property
    def trunk_config(self) -> ModelConfig:
        """Config of the network below the heads."""
        if self.trunk_kind != "cifar":
            cls = TorchvisionModelConfig if self.trunk_kind == "torchvision" else TimmModelConfig
            return cls(name=self.trunk, mean=self.mean, std=self.std, input_size=self.input_size)
        return CifarModelConfig(
            name=self.trunk,
            width=self.trunk_width,
            stem_stride=self.stem_stride,
            mean=self.mean,
            std=self.std,
        )


@dataclass(frozen=True, kw_only=True)
class KEDConfig(SoftTargetsConfig):
    """KED (arXiv 2310.02572): distillation of the prediction and of the contribution of each superfeature to it.

    total = w * ce + lambda_ked * ((1 - mu) * kd + mu * ked) + lambda_hint * hint, w = 1 - lambda_ked or 1. With
    the first and without the hint the combination is convex. lambda_ked and mu take the role of lambda_ce and lambda_kd
    of the other methods.
    """

    implementation: ClassVar[str] = "permafrost_papers.ked.losses:KEDLoss"
    needs_places: ClassVar[bool] = False
    suggestion: ClassVar[str] = "permafrost_papers.ked.losses:suggest_student"
    minimal: ClassVar[tuple[str, ...]] = ("student=additive", "augment=none")

    kind: Literal["ked"] = "ked"
    tau: float = 4.0
    """Temperature of the predictions."""
    tau_superfeatures: Annotated[float, Gt(0)] = 4.0
    """Temperature of the explanations. A single superfeature's logits are flatter than the sum, so it may be <
    1."""
    lambda_ked: Annotated[float, Ge(0), Le(1)] = 0.9
    """Weight of the teacher's terms, in [0, 1]; 0 trains on the labels only."""
    mu: Annotated[float, Ge(0), Le(1)] = 0.5
    """Weight of the explanations among the teacher's terms, in [0, 1]; 0 is KD with an additive student."""
    hard_weight: Literal["complement", "one"] = "complement"
    """Weight of the label term: 1 - lambda_ked, or 1 as in the summary of the paper that we used. Measured results of
    KED have the first."""
    lambda_hint: Annotated[float, Ge(0)] = 0.0
    """Weight of the hint (FitNets), independent of lambda_ked and mu; 0 disables it. With mu=0 it is KD + FitNet. 1 is
    a start, as 10 cost accuracy on handwritten digits. The hint is the mean squared
    difference of the subnets' last hidden layers, after a linear map of the student's. Stored ones are the output
    superfeature_hidden."""
    superfeatures: Annotated[int | None, Ge(1)] = None
    """Level of both hierarchies that is compared, in superfeatures; null takes the student's finest."""
    superfeature_control: Literal["none", "shuffled", "noise"] = "none"
    """Negative control: explanations of another record of the batch, or noise with each record's own standard
    deviation."""
    chimera_fraction: Annotated[float, Ge(0)] = 0.0
    """Number of chimera records added to a batch, as a fraction of its size. A chimera takes each superfeature
    from a different record, with the teacher's exact logits of that superfeature, so the teacher need not be
    run again. Requires networks in input mode."""
    allow_view_mismatch: bool = False
    """Allow mode=frozen to warp images while their superfeatures stay fixed, which is an approximation."""

    def _check_together(self) -> None:
        require(
            self.superfeature_control == "none" or self.lambda_ked * self.mu > 0,
            f"method.superfeature_control={self.superfeature_control} belongs to the explanation term, which "
            f"method.lambda_ked={self.lambda_ked} and method.mu={self.mu} disable: set both above 0, or "
            "method.superfeature_control=none",
        )

    def check(self, setting: MethodSetting) -> None:
        student, mode = setting.student, setting.mode
        if self.needs_superfeatures:
            require(
                mode != "frozen" or not setting.augment.moving or self.allow_view_mismatch,
                "augment.operations warp the image, but the superfeatures of method=ked cannot be warped with it: set "
                "augment=none, replay stored views (mode=replay), run the teacher itself (mode=live), or accept an "
                "approximation with method.allow_view_mismatch=true",
            )
        require(
            not self.needs_superfeatures or isinstance(student, AdditiveModelConfig),
            f"method=ked compares superfeatures, and student={student.kind} has none: set student=additive, or "
            "method.mu=0 method.chimera_fraction=0 method.lambda_hint=0 for KD",
        )
        require(
            not setting.augment.mixes
            or (self.chimera_fraction == 0 and self.superfeature_control == "none"),
            "method.chimera_fraction and method.superfeature_control take whole records, and augment.mix mixes them; "
            "set augment.mix=[], or those to 0 and none",
        )
        require(
            self.chimera_fraction == 0
            or (isinstance(student, AdditiveModelConfig) and student.is_input_mode),
            f"method.chimera_fraction={self.chimera_fraction} combines superfeatures of several images into one, which "
            "is exact only if superfeatures are parts of the input: set student.name=conv or mlp, or "
            "method.chimera_fraction=0",
        )

    @property
    def needs_superfeatures(self) -> bool:
        """True if the logits or the hidden layers of superfeatures are compared."""
        explains = self.lambda_ked > 0 and (self.mu > 0 or self.chimera_fraction > 0)
        return explains or self.lambda_hint > 0


@dataclass(frozen=True, kw_only=True)
class KEDTeachingConfig(LabelTeachingConfig):
    """Training of a teacher that explains by superfeatures, which are first found in a black box (KED, Algorithm 1).

    The black box is the section `black_box=`. If teacher.partition names superfeatures, these are used instead.
    """

    implementation: ClassVar[str] = "permafrost_papers.ked.losses:ExplainingTeacherLoss"
    minimal: ClassVar[tuple[str, ...]] = ("teacher=additive", "black_box=cifar")

    preparation: ClassVar[str] = "permafrost_papers.ked.search:search_superfeatures"

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

    def _check_together(self) -> None:
        super()._check_together()
        require(
            self.max_records >= self.records,
            f"teaching.max_records={self.max_records} is below teaching.records={self.records}; raise it",
        )
        require(
            self.loss == "ce" or self.lambda_kd == 0,
            f"teaching.lambda_kd={self.lambda_kd} needs one label per record, and teaching.loss={self.loss} "
            "does not assume one; set one of them to its default",
        )

    def check(self, teacher: ModelConfig, black_box: ModelConfig | NoModelConfig) -> None:
        require(
            isinstance(teacher, AdditiveModelConfig),
            f"teaching=ked trains a network that explains by superfeatures, not teacher={teacher.kind}; set "
            "teacher=additive, or choose another teaching=",
        )
        assert isinstance(teacher, AdditiveModelConfig)
        require(
            not self.needs_preparation(teacher) or teacher.trunk_features == "cells",
            "teaching=ked groups pixels or columns, and teacher.trunk_features=channels groups channels; set "
            "teaching=labels, or teacher.partition_control=contiguous",
        )
        require(
            not self.uses_black_box(teacher) or black_box.kind != "none",
            "teaching=ked needs a trained network, to find superfeatures in it or as a teacher (teaching.lambda_kd): "
            "name it with black_box=<kind> black_box.weights=, or set teacher.partition= (or "
            "teacher.partition_control=contiguous) and teaching.lambda_kd=0",
        )

    def needs_preparation(self, teacher: ModelConfig) -> bool:
        return (
            isinstance(teacher, AdditiveModelConfig)
            and teacher.partition is None
            and teacher.partition_control != "contiguous"
        )

    @property
    def runs_black_box(self) -> bool:
        return self.lambda_kd > 0

    def prepared(self, teacher: ModelConfig, folder: Path) -> ModelConfig:
        if not self.needs_preparation(teacher):
            return teacher
        return replace(teacher, partition=str(folder / PARTITION_NAME))  # type: ignore[call-arg]


@dataclass(frozen=True, kw_only=True)
class SuperfeaturesConfig(ExplainerConfig):
    """Contribution of each superfeature of an additive network to a class, spread over its cells."""

    implementation: ClassVar[str] = "permafrost_papers.ked.superfeatures:superfeature_contributions"

    kind: Literal["superfeatures"] = "superfeatures"


@dataclass(frozen=True, kw_only=True)
class SuperfeatureOutputOptions(Options):
    """Options of the output superfeature_logits."""

    section: ClassVar[str] = "annotate"

    superfeature_dtype: Literal["float16", "int8"] = "float16"
    """Storage dtype of superfeature_logits, the logits of each superfeature of an additive teacher, for method=ked.
    Each superfeature has a scale. int8 halves their size and is worthwhile from about 200 classes."""


@dataclass(frozen=True, kw_only=True)
class SuperfeaturesOptions(EvaluatorOptions):
    """Agreement with the teacher, superfeature by superfeature (KED)."""

    implementation: ClassVar[str] = "permafrost_papers.ked.superfeature_agreement:EVALUATOR"


MODELS["additive"] = AdditiveModelConfig
SOURCES.update(
    {
        "tiny_imagenet": TinyImageNetDataConfig,
        "table": TableDataConfig,
        "sklearn_table": SklearnTableDataConfig,
    }
)
METHODS["ked"] = KEDConfig
TEACHINGS["ked"] = KEDTeachingConfig
EXPLAINERS["superfeatures"] = SuperfeaturesConfig
OUTPUTS[OUTPUT] = OutputInfo(
    "permafrost_papers.ked.superfeatures:SuperfeatureOutput",
    fits_tables=True,
    adds=SuperfeatureOutputOptions,
    networks=("additive",),
    describe="permafrost_papers.ked.additive_network:describe_levels",
)
OUTPUTS[HIDDEN_OUTPUT] = OutputInfo(
    "permafrost_papers.ked.superfeatures:HiddenOutput",
    fits_tables=True,
    networks=("additive",),
    describe="permafrost_papers.ked.additive_network:describe_levels",
)
EVALUATORS["superfeatures"] = SuperfeaturesOptions
STORE_SECTIONS["superfeatures"] = "permafrost_papers.ked.partition_pictures:partition_section"
