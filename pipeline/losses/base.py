"""What a loss takes and gives."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from pipeline.core.distributed import Ranks
from pipeline.core.records import Targets
from pipeline.loading.dataset import StoreDataset
from pipeline.models.output import NOTHING, Inner, Stage


@dataclass(frozen=True, kw_only=True)
class StudentOutput:
    """The student's side of a step; gradients flow through all of it."""

    logits: Tensor
    """[B, K]."""
    maps: Tensor | None = None
    """[B, E, A, h, w] for the teacher's explained classes, where the loss needs them in this step."""
    input_size: tuple[int, int] = (0, 0)
    """(height, width) of the student's input: the resolution at which maps are compared."""
    stages: tuple[Stage, ...] = ()
    """Of the student's own network, where the loss compares them."""
    class_maps: Tensor | None = None
    """[B, K, h, w], where the loss compares them."""
    superfeature_logits: Tensor | None = None
    """[B, M, K], where the loss compares them."""
    superfeature_hidden: Tensor | None = None
    """[B, M, width], where the loss compares them."""
    pooled: Tensor | None = None
    """[B, d], where the loss compares them."""
    record_index: Tensor | None = None
    """i64 [B]: which record of the training's selection each row shows, for losses that remember records."""
    view_index: Tensor | None = None
    """i64 [B]: which stored view of it, -1 for a fresh one."""


@dataclass(frozen=True, kw_only=True)
class LossTerms:
    """A scalar to minimise and what it is made of, all on the training device."""

    total: Tensor
    terms: dict[str, Tensor] = field(default_factory=dict)
    """Unweighted terms by name: ce or bce, kd, map, at, cat, review, ft, crd, ss, tf, ked, hint."""
    statistics: dict[str, Tensor] = field(default_factory=dict)
    """Numbers to log that are not terms, such as the fraction of valid maps."""


def weighted_sum(parts: Sequence[LossTerms], weights: Sequence[float]) -> LossTerms:
    """One loss of several teachers: everything is summed with its teacher's weight."""
    if len(parts) == 1 and weights[0] == 1:
        return parts[0]

    def total(values: Sequence[Tensor]) -> Tensor:
        weighted = [weight * value for weight, value in zip(weights, values, strict=True)]
        return torch.stack(weighted).sum()

    return LossTerms(
        total=total([part.total for part in parts]),
        terms={name: total([part.terms[name] for part in parts]) for name in parts[0].terms},
        statistics={
            name: total([part.statistics[name] for part in parts]) for name in parts[0].statistics
        },
    )


@dataclass(frozen=True, kw_only=True)
class TeacherPhase:
    """How a loss learns from the teacher alone, by SGD with momentum 0.9, before the student's first step."""

    parameters: list[nn.Parameter]
    """They stand still afterwards."""
    epochs: int
    """0 leaves them as they were drawn."""
    lr: float
    """Divided by 10 after each `decay_every_epochs`."""
    decay_every_epochs: int
    weight_decay: float


class DistillationLoss(nn.Module):
    """(student, targets, labels) -> LossTerms; its own parameters, if any, train with the student."""

    needs_targets = True
    """False where the loss reads labels only."""
    ranks: Ranks = Ranks()
    """The processes that train together, set by the training: what a loss keeps of records must be the same on all."""

    @property
    def needs_labels(self) -> bool:
        """Whether a label enters the loss."""
        return False

    @property
    def map_control(self) -> str:
        """How the teacher's maps are spoilt, for a negative control; "none" leaves them right."""
        return "none"

    def needs_maps(self, step: int) -> bool:
        """Whether the student's maps enter the loss in this step."""
        return False

    def check_labels(self, *, many: bool) -> None:
        """ConfigError where this loss does not fit a set with one label a record, or with many."""

    @property
    def inner(self) -> Inner:
        """What it compares from inside the networks."""
        return NOTHING

    @property
    def extra(self) -> str | None:
        """Whose fields of `Targets.extra` it reads: at, cat, review, ft, feature, ked_z or ked_hint."""
        return None

    @property
    def chimera_fraction(self) -> float:
        """Records that are put together from those of a batch and added to it, as a share of it."""
        return 0.0

    def prepare(self, student: StudentOutput, targets: Targets) -> None:
        """Called before training with an example of what `forward` will be given, where `inner` asks for any.

        Makes the parameters that depend on the networks' shapes; ConfigError where the two do not fit.
        """

    def prepare_records(self, dataset: StoreDataset) -> None:
        """Called after `prepare` with what will be trained on, always: makes what the loss keeps of each record.

        ConfigError where the records do not fit the loss.
        """

    def finish_step(self) -> None:
        """Called on every rank after the optimiser's step: what the loss keeps of records follows."""

    @property
    def teacher_phase(self) -> TeacherPhase | None:
        """What of it is trained on the teacher alone, before the student's first step."""
        return None

    def teacher_term(self, targets: Targets, view_index: Tensor) -> Tensor:
        """What that phase minimises; gradients reach the teacher's side of the loss alone."""
        raise NotImplementedError

    def forward(self, student: StudentOutput, targets: Targets | None, labels: Tensor) -> LossTerms:
        """labels: as of Batch."""
        raise NotImplementedError
