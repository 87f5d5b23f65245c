"""Guided teachers, whose explanations are trained to be on the object (Rao et al. 2023, "Model Guidance").

A step has one class per record, drawn uniformly, and the regions of that class.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from permafrost.core.batches import AnyLabels, AnyLogits, Batch, ExplainedTargets, Targets
from permafrost.core.label_forms import multi_hot
from permafrost.core.records import NO_CLASS
from permafrost.loading.geometry import TargetRequest
from permafrost.loading.regions import regions_of
from permafrost.loading.transfer import copy_to
from permafrost.losses.base import Needs, StudentOutput, Term, TermValue
from permafrost.losses.labels import LabelsLoss
from permafrost.losses.map_distances import MIN_ENERGY
from permafrost.losses.shapes import require_same_shape
from permafrost.models.classifier import to_float32
from permafrost_papers.e2kd.options import GuidedTeachingConfig

_TINY = torch.finfo(torch.float32).tiny


# ---- a map and a region -----------------------------------------------------------------------------


def energy_loss(attributions: Tensor, regions: Tensor) -> Tensor:
    """Compute 1 - the fraction of positive attributions inside the region.

    If the total of the positive attributions is ~0, it is 1 - their sum inside.

    Args:
        attributions: f32 [n, H, W], signed.
        regions: Bool [n, H, W].

    Returns:
        [n].
    """
    require_same_shape("energy_loss", attributions, regions, 3)
    attributions = to_float32(attributions)
    positive = attributions.relu()
    total, inside = positive.sum(dim=(1, 2)), (positive * regions).sum(dim=(1, 2))
    weak = total < MIN_ENERGY
    return 1 - torch.where(weak, inside, inside / torch.where(weak, 1.0, total))


def l1_loss(attributions: Tensor, regions: Tensor) -> Tensor:
    """Compute the mean absolute difference of the positive attributions from the region's mask.

    The attributions are scaled to a maximum of 1.

    Args:
        attributions: f32 [n, H, W], signed.
        regions: Bool [n, H, W].

    Returns:
        [n].
    """
    require_same_shape("l1_loss", attributions, regions, 3)
    return (_unit(attributions.relu()) - regions.float()).abs().mean(dim=(1, 2))


def rrr_loss(attributions: Tensor, regions: Tensor) -> Tensor:
    """Compute the sum of the squared attributions outside the region (RRR, Ross et al. 2017).

    The attributions are divided by their largest absolute value.

    Args:
        attributions: f32 [n, H, W], signed.
        regions: Bool [n, H, W].

    Returns:
        [n].
    """
    require_same_shape("rrr_loss", attributions, regions, 3)
    return ((_unit(attributions) * ~regions) ** 2).sum(dim=(1, 2))


def ppce_loss(attributions: Tensor, regions: Tensor) -> Tensor:
    """Compute the mean cross-entropy to 1 of the positive attributions inside the region, 0 without a region.

    The attributions are scaled to a maximum of 1.

    Args:
        attributions: f32 [n, H, W], signed.
        regions: Bool [n, H, W].

    Returns:
        [n].
    """
    require_same_shape("ppce_loss", attributions, regions, 3)
    positive = _unit(attributions.relu())
    per_pixel = F.binary_cross_entropy(positive, torch.ones_like(positive), reduction="none")
    return (per_pixel * regions).sum(dim=(1, 2)) / regions.sum(dim=(1, 2)).clamp(min=1)


def _unit(attributions: Tensor) -> Tensor:
    """Divide attributions by their largest absolute value, in float32 or wider."""
    attributions = to_float32(attributions)
    return attributions / attributions.abs().amax(dim=(1, 2), keepdim=True).clamp(min=_TINY)


LOCALIZATIONS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "energy": energy_loss,
    "l1": l1_loss,
    "rrr": rrr_loss,
    "ppce": ppce_loss,
}


# ---- targets ---------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Guidance(ExplainedTargets):
    """Object region of one class per record, in place of a teacher's outputs."""

    teacher: str = ""
    logits: AnyLogits | None = None
    regions: Tensor
    """Object region in the record's view, bool [B, H, W]; all False where the region is unknown."""


@dataclass(frozen=True)
class GuidanceSource:
    """Target source with one uniformly drawn class per record and its regions, used instead of `view_targets`."""

    teaching: GuidedTeachingConfig
    """Options that name the kind of regions."""
    num_classes: int
    input_size: tuple[int, int]
    """(height, width) of the network's view."""

    def __call__(self, batch: Batch, request: TargetRequest) -> tuple[Guidance, ...]:
        """Draw one Guidance with torch's global generator of the host, where boxes are."""
        classes = _draw(multi_hot(batch.labels_on_host, self.num_classes))
        regions = regions_of(batch, classes, self.teaching.region, self.input_size)
        explained = copy_to(classes[:, None], batch.inputs.device)
        return (Guidance(target_class=explained, regions=regions),)


def _draw(hot: Tensor) -> Tensor:
    """Draw one of each record's classes uniformly: i64 [n], NO_CLASS if it has none."""
    known = hot.any(dim=1)
    drawn = torch.multinomial(torch.where(known[:, None], hot, 1.0), 1)[:, 0]
    return torch.where(known, drawn, NO_CLASS)


# ---- the loss --------------------------------------------------------------------------------------


class GuidedLoss(LabelsLoss):
    """Loss of the labels + lambda_localization * sum over the batch of one of LOCALIZATIONS.

    It is a sum, not a mean, as in the source, so that published values of lambda apply, with any number of ranks. The
    attributions of a B-cos network are its contributions, those of others GradCAM, upsampled to the input.
    """

    config: GuidedTeachingConfig

    @property
    def needs(self) -> Needs:
        return Needs(labels=True, maps_every=1 if self.config.lambda_localization > 0 else None)

    def terms(self, student: StudentOutput, targets: Targets, labels: AnyLabels) -> Iterable[Term]:
        yield from super().terms(student, targets, labels)
        if (maps := student.maps) is not None:
            assert isinstance(targets, Guidance)
            yield Term(
                "localization",
                self.config.lambda_localization,
                lambda: self._localization(maps, targets.regions, student.input_size),
            )

    def _localization(
        self, maps: Tensor, regions: Tensor, input_size: tuple[int, int]
    ) -> TermValue:
        guided = regions.flatten(1).any(dim=1)
        attributions = F.interpolate(
            maps[:, 0].float(), input_size, mode="bilinear", align_corners=False
        )[:, 0]
        losses = LOCALIZATIONS[self.config.localization](attributions, regions)
        # The sum is over the whole batch, but averaging gradients over ranks divides by the world size.
        total = torch.where(guided, losses, 0.0).sum() * self.distributed.world_size
        return TermValue(total, {"guided_fraction": guided.float().mean()})
