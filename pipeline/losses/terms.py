"""What a loss takes and gives."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import nn

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from pipeline.records import Targets


@dataclass(frozen=True, kw_only=True)
class StudentOutput:
    """The student's side of a step; gradients flow through all of it."""

    logits: Tensor
    """[B, K]."""
    maps: Tensor | None = None
    """[B, E, A, h, w] for the teacher's explained classes, where the loss needs them in this step."""
    input_size: tuple[int, int] = (0, 0)
    """(height, width) of the student's input: the resolution at which maps are compared."""


@dataclass(frozen=True, kw_only=True)
class LossTerms:
    """A scalar to minimise and what it is made of, all on the training device."""

    total: Tensor
    terms: dict[str, Tensor] = field(default_factory=dict)
    """Unweighted terms by name: ce or bce, kd, map."""
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


class DistillationLoss(nn.Module):
    """(student, targets, labels) -> LossTerms; its own parameters, if any, train with the student."""

    needs_targets = True
    """False where the loss reads labels only."""

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

    def forward(self, student: StudentOutput, targets: Targets | None, labels: Tensor) -> LossTerms:
        """labels: as of Batch."""
        raise NotImplementedError
