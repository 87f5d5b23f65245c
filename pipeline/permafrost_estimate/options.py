"""Verb `estimate`: its options, and how it enters."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, ClassVar

from annotated_types import Ge, Gt

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
    """Maximum bytes of the targets of a proposed setting; null for no limit."""
    max_distance: Annotated[float | None, Ge(0)] = None
    """Largest distance of the targets of a view to the teacher's answer to it, of every output (KL in nats, or 1 -
    cosine), for which a setting is proposed; null for no limit."""
    records: Annotated[int | None, Ge(1)] = None
    """Number of records to estimate for, such as those of a set that is not here; null takes those of the data."""
    workers: tuple[int, ...] = (1, 4, 16)
    """Numbers of workers for which hours are printed. A worker is an actor on a machine like this one."""

    def _check_together(self) -> None:
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


VERBS["estimate"] = Verb(
    options=EstimateConfig,
    function="permafrost_estimate.estimate:estimate_store",
    order=15,
    common=(
        "store.path data data.path teacher teacher.name teacher.weights annotate.outputs "
        "student student.name method trainer.batch_size estimate.views estimate.workers "
        "estimate.records estimate.budget_bytes"
    ),
    needs_run=False,
    needs_teacher=True,
    saves_options=True,
)
