"""Verb `estimate`, evaluators `equivariance`, `knn` and `linear_probe`: their options, and how they enter."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, ClassVar

from annotated_types import Ge, Gt

from permafrost.config.evaluation import EVALUATORS, EvaluatorOptions, FeatureProbeOptions
from permafrost.config.methods import MethodConfig, Mode
from permafrost.config.models import ModelConfig
from permafrost.config.options import Options
from permafrost.config.store import PrecomputeConfig
from permafrost.config.training import OptimizerOptions, TrainerOptions
from permafrost.config.verbs import VERBS, Verb
from permafrost.core.errors import require


@dataclass(frozen=True, kw_only=True)
class EstimateOptions(Options):
    """Size of the sample that an estimate measures, and the questions that it answers."""

    section: ClassVar[str] = "estimate"

    shards: Annotated[int, Ge(1)] = 3
    """Number of shards to measure, drawn at random by store.seed; at least one is of `split`. If the data have
    fewer, some are measured in parts of shard_records."""
    shard_records: Annotated[int | None, Ge(1)] = 128
    """Largest number of records to measure of each of these shards; null takes all. A slow teacher needs few."""
    rounds: Annotated[int, Ge(1)] = 5
    """Number of steps to measure of a student with stored targets and, in turn, of one with a live teacher. On a GPU
    each measurement takes several steps."""
    seconds: Annotated[float | None, Gt(0)] = 120.0
    """Time of the estimate. A teacher or a student that is slow is measured on fewer records and rounds, at least one.
    The listing and packing of the sample is not limited. null sets no limit."""
    gigabytes: Annotated[float | None, Gt(0)] = None
    """Memory that a student's step may take, in 1e9 bytes; a step of fewer records is measured if one of
    trainer.batch_size would take more. null takes a quarter of what is free on the machine, or on its GPU."""
    students: Annotated[int, Ge(1)] = 10
    """Number of students of the comparison with one job, in which they share batches, views and a live teacher."""
    views: tuple[int, ...] = (0, 1, 4, 16, 50)
    """Numbers of stored views of `augment` whose price is printed; 0 are frozen targets of the whole image."""
    budget_bytes: Annotated[int | None, Ge(0)] = None
    """Maximum bytes of the targets of a proposed setting; null for no limit. What was measured to teach most within as
    many bytes per record is named, too."""
    max_distance: Annotated[float | None, Ge(0)] = None
    """Largest distance of the targets of a view to the teacher's answer to it, of every payload (KL in nats, or 1 -
    cosine), for which a setting is proposed; null for no limit."""
    records: Annotated[int | None, Ge(1)] = None
    """Number of records to estimate for, such as those of a set that is not here; null takes those of the data."""
    workers: tuple[int, ...] = (1, 4, 16)
    """Numbers of workers for which hours are printed. A worker is an actor on a machine like this one."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(
            len(self.workers) > 0 and min(self.workers) >= 1,
            f"estimate.workers={list(self.workers)} must list at least one number, each >= 1, as in "
            "estimate.workers=[1,4,16]",
        )
        require(
            len(self.views) > 0 and min(self.views) >= 0,
            f"estimate.views={list(self.views)} must list at least one number, each >= 0, as in "
            "estimate.views=[0,1,16]",
        )


@dataclass(frozen=True, kw_only=True)
class EstimateConfig(PrecomputeConfig):
    """Sections that `estimate` reads: those of precompute, and those of distill that describe a student."""

    estimate: EstimateOptions = field(default_factory=EstimateOptions)
    student: ModelConfig
    method: MethodConfig
    optimizer: OptimizerOptions
    trainer: TrainerOptions
    mode: Mode = "frozen"
    """Origin of the student's targets, as in distill: frozen or replay. It is compared with mode=live."""


@dataclass(frozen=True, kw_only=True)
class EquivarianceOptions(EvaluatorOptions):
    """Stored targets of views compared with the teacher's output, for each operation of `augment` and all together.

    Each kind of augment.mix is measured, too: the targets that its rules give to mixtures of whole images.
    """

    section: ClassVar[str] = "evaluate.equivariance"
    implementation: ClassVar[str] = "permafrost_estimate.equivariance:EVALUATOR"
    order: ClassVar[int] = 40
    reads_augment: ClassVar[bool] = True

    records: Annotated[int, Ge(1)] = 256
    """Records per split; every operation is one forward pass of each of them. The spread of the mean probability needs
    1,000 or more to tell recipes apart."""


@dataclass(frozen=True, kw_only=True)
class KNNOptions(FeatureProbeOptions):
    """Accuracy of the nearest training records by the cosine of pooled features."""

    section: ClassVar[str] = "evaluate.knn"
    implementation: ClassVar[str] = "permafrost_estimate.feature_probes:KNN"
    order: ClassVar[int] = 50

    k: tuple[int, ...] = (1, 20)
    """Numbers of neighbors; each gives one accuracy."""
    tau: Annotated[float, Gt(0)] = 0.07
    """Temperature of a neighbor's vote exp(cosine / tau)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(
            len(self.k) > 0 and min(self.k) >= 1 and len(set(self.k)) == len(self.k),
            f"evaluate.knn.k must list numbers of at least 1, each once, got {list(self.k)}",
        )


@dataclass(frozen=True, kw_only=True)
class LinearProbeOptions(FeatureProbeOptions):
    """Accuracy of a logistic regression on pooled features."""

    section: ClassVar[str] = "evaluate.linear_probe"
    implementation: ClassVar[str] = "permafrost_estimate.feature_probes:LINEAR_PROBE"
    order: ClassVar[int] = 60

    l2: tuple[float, ...] = (1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0)
    """Weights of the squared norm, of which the best on a fifth of the training records is used. Features have
    variance 1."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(
            len(self.l2) > 0 and min(self.l2) > 0,
            f"evaluate.linear_probe.l2 must list numbers above 0, got {list(self.l2)}",
        )


VERBS["estimate"] = Verb(
    options=EstimateConfig,
    function="permafrost_estimate.estimate:estimate_store",
    order=15,
    saves_options=True,
)
EVALUATORS["equivariance"] = EquivarianceOptions
EVALUATORS["knn"] = KNNOptions
EVALUATORS["linear_probe"] = LinearProbeOptions
