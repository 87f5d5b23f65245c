"""Batch transforms: changes to a step's records that the step calls in turn and knows by no name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from pipeline.core.records import NO_LABEL, Batch, Guidance, Targets
from pipeline.models.additive.chimeras import draw_donors, mix_inputs, mix_rows

AnyTargets = Targets | Guidance


@dataclass(frozen=True, kw_only=True)
class StepInputs:
    """What one step trains on; transforms return changed ones."""

    images: Tensor
    """f32 [B, 3, h, w], or rows of a table."""
    labels: tuple[tuple[float, Tensor], ...]
    """Labels as of Batch, each with its share; shares sum to 1."""
    on_targets: tuple[Callable[[AnyTargets], AnyTargets], ...] = ()
    """What becomes of each teacher's targets, in this order."""


class BatchTransform(Protocol):
    """A change to the records of a step, drawn by torch's generator."""

    def __call__(self, inputs: StepInputs, batch: Batch) -> StepInputs:
        """The changed inputs; `batch` is as it was loaded."""


class Mixup:
    """Labels of mixtures: those of both records, each by its share (Zhang et al. 2018).

    The pixels are mixed where views are made, so that a live teacher sees the same mixtures. Label terms are affine in
    their target, so the weighted sum of two losses is the loss of the mixed target; a label that is not known is left
    out of either mean.
    """

    def __call__(self, inputs: StepInputs, batch: Batch) -> StepInputs:
        share = None if batch.pixel_augment is None else batch.pixel_augment.mixup_lambda
        if share is None:
            return inputs
        labels = tuple(
            pair
            for weight, own in inputs.labels
            for pair in ((weight * share, own), (weight * (1 - share), own.roll(1, dims=0)))
        )
        return replace(inputs, labels=labels)


@dataclass(frozen=True, kw_only=True)
class Chimeras:
    """Records added to a batch, each with every superfeature from a record of its own (KED).

    Shape letters: B batch, n chimeras, M superfeatures of the level that is compared, K classes.
    """

    fraction: float
    """n as a share of B."""
    number: int
    """M."""
    assignment: Tensor
    """i64 [d]: the level in the student's features."""
    grid: tuple[int, int] | None

    def __call__(self, inputs: StepInputs, batch: Batch) -> StepInputs:
        images = inputs.images
        count = round(self.fraction * len(images))
        donors = draw_donors(count, len(images), self.number, images.device)
        mixed = mix_inputs(images, self.assignment, donors, self.grid)
        return replace(
            inputs,
            images=torch.cat([images, mixed]),
            labels=tuple((share, label_chimeras(own, count)) for share, own in inputs.labels),
            on_targets=(*inputs.on_targets, lambda targets: add_chimeras(targets, donors)),
        )


def add_chimeras(targets: AnyTargets, donors: Tensor) -> Targets:
    """A teacher's targets of a batch and, after them, of its chimeras: their logits are the sum of their parts'."""
    assert isinstance(targets, Targets)
    intermediates = {
        name: torch.cat([values, mix_rows(values, donors)])
        for name, values in targets.intermediates.items()
    }
    mixed = intermediates["superfeature_logits"][len(targets.logits) :].sum(dim=1)
    return replace(targets, logits=torch.cat([targets.logits, mixed]), intermediates=intermediates)


def label_chimeras(labels: Tensor, count: int) -> Tensor:
    """Labels i64 [B] and, after them, those of chimeras, of which no label is right."""
    return torch.cat([labels, labels.new_full((count,), NO_LABEL)])
