"""Batch transforms: changes to the records of a step, which the training step applies in order."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from permafrost.core.records import NO_LABEL, Batch, Guidance, Targets
from permafrost.models.additive.chimeras import draw_donors, mix_inputs, mix_rows

AnyTargets = Targets | Guidance


@dataclass(frozen=True, kw_only=True)
class StepInputs:
    """Inputs of one training step. Transforms return modified copies."""

    images: Tensor
    """Images f32 [B, 3, h, w], or rows of a table."""
    labels: tuple[tuple[float, Tensor], ...]
    """Labels in the form of Batch, each with its share. Shares sum to 1."""
    on_targets: tuple[Callable[[AnyTargets], AnyTargets], ...] = ()
    """Functions applied to each teacher's targets in this order."""


class BatchTransform(Protocol):
    """A change to the records of a step, with random draws from torch's global generator."""

    def __call__(self, inputs: StepInputs, batch: Batch) -> StepInputs:
        """Return the changed inputs. `batch` is the batch as loaded."""


class Mixup:
    """Mixup of labels: the labels of both records, each with its share (Zhang et al. 2018).

    The pixels are mixed when views are made, so a live teacher receives the same mixtures. Label terms are affine in
    their target, so the weighted sum of two losses is the loss of the mixed target. Unknown labels are left out of both
    means.
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
    """Chimeras: records added to a batch, with each superfeature taken from an independently drawn record (KED).

    Shape letters: B batch, n chimeras, M superfeatures of the compared level, K classes, d features.
    """

    fraction: float
    """Number n of chimeras as a fraction of B."""
    number: int
    """Number M of superfeatures."""
    assignment: Tensor
    """Superfeature of each of the student's features, i64 [d]."""
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
    """Append the targets of chimeras to those of a batch. Their logits are the sum of those of their parts."""
    assert isinstance(targets, Targets)
    intermediates = {
        name: torch.cat([values, mix_rows(values, donors)])
        for name, values in targets.intermediates.items()
    }
    mixed = intermediates["superfeature_logits"][len(targets.logits) :].sum(dim=1)
    return replace(targets, logits=torch.cat([targets.logits, mixed]), intermediates=intermediates)


def label_chimeras(labels: Tensor, count: int) -> Tensor:
    """Append NO_LABEL for each chimera to labels i64 [B], because chimeras have no correct label."""
    return torch.cat([labels, labels.new_full((count,), NO_LABEL)])
